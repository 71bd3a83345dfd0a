// Python bindings of the native kernels over host memory; each source file binds its own.
#include <nanobind/nanobind.h>

#include "instruction_set.h"

namespace nb = nanobind;

void bind_adam(nb::module_& module);
void bind_codes(nb::module_& module);
void bind_culling(nb::module_& module);
void bind_ids(nb::module_& module);
void bind_store(nb::module_& module);

NB_MODULE(offload, module) {
  module.doc() = "Kernels over the host store; arrays are raw contiguous buffers.";
  module.attr("INSTRUCTION_SET") = best_instruction_set_name();
  module.attr("SOURCE_HASH") = SOURCE_HASH;
  bind_adam(module);
  bind_codes(module);
  bind_culling(module);
  bind_ids(module);
  bind_store(module);
}
