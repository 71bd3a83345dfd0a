// Compiled once per instruction set, each time under another KERNEL_ISA. Everything else in this file has internal
// linkage, so that the linker cannot use a function built for one machine on another.
#include "kernels.h"

#include "blend_kernels.h"
#include "projection_kernels.h"
#include "spherical_harmonics_kernels.h"

namespace rendering {
namespace KERNEL_ISA {

template <class T>
constexpr Kernels<T> table() {
  return {project_forward<T>,
          project_backward<T>,
          sh_forward<T>,
          sh_backward<T>,
          {blend_forward<T, 1>, blend_forward<T, 2>, blend_forward<T, 3>, blend_forward<T, 4>},
          {blend_backward<T, 1>, blend_backward<T, 2>, blend_backward<T, 3>, blend_backward<T, 4>}};
}

extern const Kernels<float> kernels_float32;
extern const Kernels<double> kernels_float64;
const Kernels<float> kernels_float32 = table<float>();
const Kernels<double> kernels_float64 = table<double>();

}  // namespace KERNEL_ISA
}  // namespace rendering
