#include <nanobind/nanobind.h>

namespace nb = nanobind;

void bind_store(nb::module_&) {}
