// Kernels are compiled once per instruction set, by add_kernels in CMakeLists.txt, each time into another namespace;
// here the one that this processor can run is chosen.
#pragma once

#ifdef X86_KERNELS

#include <cstdlib>
#include <string>

enum class InstructionSet { baseline, avx2, avx512 };

inline InstructionSet largest_instruction_set() {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return InstructionSet::baseline;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  return avx512 ? InstructionSet::avx512 : InstructionSet::avx2;
}

// The environment may ask for less than the processor can do, which is how the other builds are tested. It is read
// once; any other word leaves the choice to the processor.
inline InstructionSet best_instruction_set() {
  static const InstructionSet best = [] {
    const InstructionSet largest = largest_instruction_set();
    const char* variable = std::getenv("GAUSSIAN_OFFLOAD_CPU_CAPABILITY");
    const std::string wanted = variable ? variable : "";
    if (wanted == "baseline") return InstructionSet::baseline;
    if (wanted == "avx2" && largest == InstructionSet::avx512) return InstructionSet::avx2;
    return largest;
  }();
  return best;
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

inline const char* best_instruction_set_name() {
  const char* const names[] = {"baseline", "avx2", "avx512"};
  return names[static_cast<int>(best_instruction_set())];
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

inline const char* best_instruction_set_name() { return "baseline"; }

#define OF_BEST_BUILD(name) baseline::name

#endif
