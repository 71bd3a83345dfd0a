// Encodes and decodes whole rows of the appearance of a compact store. codes_kernels.cpp is compiled once per
// instruction set.
#pragma once

#include <cstdint>

namespace offload {

// Rows [count, columns] as they are stored, of 16, 32 or 48 columns.
struct StoredRows {
  int64_t count, columns;
  uint16_t *halves, *codes;
};

// The same in float32.
struct FloatRows {
  float *values, *first, *second;
};

}  // namespace offload
