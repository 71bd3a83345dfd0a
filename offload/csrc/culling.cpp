#include <nanobind/nanobind.h>

namespace nb = nanobind;

void bind_culling(nb::module_&) {}
