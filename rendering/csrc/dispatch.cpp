// Chooses among the builds of kernels.cpp by what the processor can do.
#include "instruction_set.h"
#include "kernels.h"

namespace rendering {

IN_EACH_BUILD(extern const Kernels<float> kernels_float32; extern const Kernels<double> kernels_float64;)

template <>
const Kernels<float>& best_kernels<float>() {
  static const Kernels<float>& best = OF_BEST_BUILD(kernels_float32);
  return best;
}

template <>
const Kernels<double>& best_kernels<double>() {
  static const Kernels<double>& best = OF_BEST_BUILD(kernels_float64);
  return best;
}

}  // namespace rendering
