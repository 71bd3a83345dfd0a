// Encodes and decodes rows in batches.
#include "codes_kernels.h"

#include <algorithm>

#include "codes.h"

namespace offload {
namespace KERNEL_ISA {

template <int kColumns>
__attribute__((noinline)) void encode_batches(const FloatRows& rows, const uint32_t* random, float reach,
                                              const StoredRows& stored) noexcept {
  CodedMoments<kColumns> moments;
  alignas(64) uint32_t words[kColumns];
  uint16_t* codes[kBatch];
  for (int64_t begin = 0; begin < stored.count; begin += kBatch) {
    const int count = static_cast<int>(std::min<int64_t>(kBatch, stored.count - begin));
    for (int row = 0; row < count; ++row) {
      const int64_t first = (begin + row) * kColumns;
#pragma omp simd
      for (int i = 0; i < kColumns; ++i) {
        moments.first[row][i] = rows.first[first + i];
        moments.second[row][i] = rows.second[first + i];
        moments.random[row][i] = random[first + i];
        words[i] = rounded_half(rows.values[first + i], random[first + i]);
      }
      for (int i = 0; i < kColumns; i += kBlock) narrow(words + i, stored.halves + first + i);
      codes[row] = stored.codes + first;
    }
    moments.encode(count, reach, codes);
  }
}

template <int kColumns>
__attribute__((noinline)) void decode_each(const StoredRows& stored, float reach, const FloatRows& rows) noexcept {
  alignas(64) float values[kColumns], means[kColumns], roots[kColumns];
  for (int64_t first = 0; first < stored.count * kColumns; first += kColumns) {
    for (int i = 0; i < kColumns; i += kBlock) load_halves(stored.halves + first + i, values + i);
    decode_moments<kColumns>(stored.codes + first, reach, means, roots);
#pragma omp simd
    for (int i = 0; i < kColumns; ++i) {
      rows.values[first + i] = values[i];
      rows.first[first + i] = means[i];
      rows.second[first + i] = roots[i] * roots[i];
    }
  }
}

void encode_rows(const FloatRows& rows, const uint32_t* random, float reach, const StoredRows& stored) {
  const FlushDenormals flush;
  if (stored.columns == 16) return encode_batches<16>(rows, random, reach, stored);
  if (stored.columns == 32) return encode_batches<32>(rows, random, reach, stored);
  return encode_batches<48>(rows, random, reach, stored);
}

void decode_rows(const StoredRows& stored, float reach, const FloatRows& rows) {
  const FlushDenormals flush;
  if (stored.columns == 16) return decode_each<16>(stored, reach, rows);
  if (stored.columns == 32) return decode_each<32>(stored, reach, rows);
  return decode_each<48>(stored, reach, rows);
}

}  // namespace KERNEL_ISA
}  // namespace offload
