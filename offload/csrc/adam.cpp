#include <nanobind/nanobind.h>

namespace nb = nanobind;

void bind_adam(nb::module_&) {}
