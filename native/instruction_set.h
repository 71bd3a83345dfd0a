// Kernels are compiled once per instruction set, by add_kernels in CMakeLists.txt, each time into another namespace;
// here the one that this processor can run is chosen.
#pragma once

#ifdef X86_KERNELS

enum class InstructionSet { baseline, avx2, avx512 };

inline InstructionSet best_instruction_set() {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return InstructionSet::baseline;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  return avx512 ? InstructionSet::avx512 : InstructionSet::avx2;
}

// Declares what every build defines; at the namespace that holds theirs.
#define IN_EACH_BUILD(declaration)  \
  namespace baseline {              \
  declaration                       \
  }                                 \
  namespace avx2 {                  \
  declaration                       \
  }                                 \
  namespace avx512 {                \
  declaration                       \
  }

#define OF_BEST_BUILD(name)                                         \
  (best_instruction_set() == InstructionSet::avx512 ? avx512::name  \
   : best_instruction_set() == InstructionSet::avx2 ? avx2::name    \
                                                    : baseline::name)

#else

#define IN_EACH_BUILD(declaration) \
  namespace baseline {             \
  declaration                      \
  }

#define OF_BEST_BUILD(name) baseline::name

#endif
