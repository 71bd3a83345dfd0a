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
  uint16_t* codes[kBatch];
  const float unit = unit_of(reach);
  for (int64_t begin = 0; begin < stored.count; begin += kBatch) {
    const int count = static_cast<int>(std::min<int64_t>(kBatch, stored.count - begin));
    for (int row = 0; row < count; ++row) {
      const int64_t first = (begin + row) * kColumns;
      for (int column = 0; column < kColumns; column += kWidth) {
        const int64_t i = first + column;
        const Words bits = load_words(random + i);
        const Floats square = load(rows.second + i);
        // The root of what is too small for arithmetic is so as well, but there all the same.
        const Words root = bits_of(square) < 0x800000u ? bits_of(square) : bits_of(square_root<float>(square));
        store<float>(moments.first[row] + column, load(rows.first + i) / unit);
        store(moments.roots[row] + column, floats_of(root));
        store_words(moments.random[row] + column, bits);
        store_rounded(load(rows.values + i), bits, stored.halves + i);
      }
      codes[row] = stored.codes + first;
    }
    moments.encode(count, codes);
  }
}

template <int kColumns>
__attribute__((noinline)) void decode_each(const StoredRows& stored, float reach, const FloatRows& rows) noexcept {
  for (int64_t first = 0; first < stored.count * kColumns; first += kColumns) {
    const Factors scales = load_scales<kColumns>(stored.codes + first);
    for (int column = 0; column < kColumns; column += kWidth) {
      const Decoded moments = decode<kColumns>(stored.codes + first, scales, column);
      store(rows.values + first + column, load_halves(stored.halves + first + column));
      store<float>(rows.first + first + column, moments.first * unit_of(reach));
      store<float>(rows.second + first + column, moments.root * moments.root);
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
