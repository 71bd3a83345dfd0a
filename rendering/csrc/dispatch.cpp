// Chooses among the builds of kernels.cpp by what the processor can do.
#include "kernels.h"

namespace rendering {

#define DECLARE_KERNELS(isa)                    \
  namespace isa {                               \
  extern const Kernels<float> kernels_float32;  \
  extern const Kernels<double> kernels_float64; \
  }

DECLARE_KERNELS(baseline)
#ifdef X86_KERNELS
DECLARE_KERNELS(avx2)
DECLARE_KERNELS(avx512)

namespace {
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
}
}  // namespace
#define BEST_KERNELS(table) (has_avx512() ? avx512::table : has_avx2() ? avx2::table : baseline::table)
#else
#define BEST_KERNELS(table) baseline::table
#endif

template <>
const Kernels<float>& best_kernels<float>() {
  static const Kernels<float>& best = BEST_KERNELS(kernels_float32);
  return best;
}

template <>
const Kernels<double>& best_kernels<double>() {
  static const Kernels<double>& best = BEST_KERNELS(kernels_float64);
  return best;
}

}  // namespace rendering
