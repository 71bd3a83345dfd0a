// Values in 16 bits and both Adam moments in 8 bits each: offload/adam/codes.py has the format and its reasons. Its
// loops are written so that compilers turn them into vector instructions: over whole rows, simple, without branches.
// Included by kernels, once per instruction set (KERNEL_ISA).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "bfloat16.h"

namespace offload {
namespace KERNEL_ISA {

constexpr int kBlock = 16;  // columns; rows are one, two or three of them
constexpr int kLargestRoot = 255, kLargestRatio = 127;
constexpr uint32_t kSecondHash = 0x9E3779B1;
constexpr uint32_t kHalfMax = 0x477FE000, kHalfNan = 0x47FC0000;  // bits of 65504 in float32, and of where NaN is then
constexpr float kStepUp = 0.0905077327f;       // 2^(2/16) - 1: from one code's second moment to the next's, over itself
constexpr float kPreviousRoot = 0.957603281f;  // 2^(-1/16)

// 2^((n - kOrigin) / 16) in float32 has the bits `of[n % 16] + (n << 19)`: the exponent is in the upper part of n.
template <int kOrigin>
struct Sixteenths {
  alignas(64) uint32_t of[16];
  constexpr Sixteenths() : of() {
    constexpr uint32_t powers[16] = {0x3F800000, 0x3F85AAC3, 0x3F8B95C2, 0x3F91C3D3, 0x3F9837F0, 0x3F9EF532,
                                     0x3FA5FED7, 0x3FAD583F, 0x3FB504F3, 0x3FBD08A4, 0x3FC5672A, 0x3FCE248C,
                                     0x3FD744FD, 0x3FE0CCDF, 0x3FEAC0C7, 0x3FF5257D};  // 2^(j / 16)
    for (uint32_t n = 0; n < 16; ++n) {
      const uint32_t j = (n - kOrigin) & 15;
      of[n] = powers[j] - ((kOrigin + j) << 19);
    }
  }
};
constexpr Sixteenths<kLargestRoot> kRoots;
constexpr Sixteenths<0> kPowers;

constexpr int degree_of(int columns) { return columns / kBlock; }
// The scales of the degrees follow the values.
constexpr int num_values(int degree) { return 3 * ((degree + 1) * (degree + 1) - 1); }

// ---------------------------------------------------------------------------------- what compilers need help with

// Reads 16 codes or halves of 16 bits.
inline void widen(const uint16_t* source, uint32_t* words) {
#if defined(__AVX512F__)
  const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  _mm512_store_si512(words, _mm512_cvtepu16_epi32(narrow));
#elif defined(__AVX2__)
  for (int i = 0; i < kBlock; i += 8) {
    const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i));
    _mm256_store_si256(reinterpret_cast<__m256i*>(words + i), _mm256_cvtepu16_epi32(narrow));
  }
#else
  for (int i = 0; i < kBlock; ++i) words[i] = source[i];
#endif
}

// Writes the lower halves of 16 words, whose upper halves are zero.
inline void narrow(const uint32_t* words, uint16_t* destination) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(destination), _mm512_cvtepi32_epi16(_mm512_load_si512(words)));
#elif defined(__AVX2__)
  const __m256i first = _mm256_load_si256(reinterpret_cast<const __m256i*>(words));
  const __m256i second = _mm256_load_si256(reinterpret_cast<const __m256i*>(words + 8));
  const __m256i mixed_up = _mm256_packus_epi32(first, second);  // within halves of 128 bits
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(destination), _mm256_permute4x64_epi64(mixed_up, 0xD8));
#else
  for (int i = 0; i < kBlock; ++i) destination[i] = static_cast<uint16_t>(words[i]);
#endif
}

// powers[i] = 2^((n[i] - kOrigin) / 16)
template <int kOrigin>
inline void exp2_sixteenths(const Sixteenths<kOrigin>& table, const uint32_t* n, float* powers) {
#if defined(__AVX512F__)
  const __m512i x = _mm512_load_si512(n), part = _mm512_permutexvar_epi32(x, _mm512_load_si512(table.of));  // of x % 16
  _mm512_store_si512(powers, _mm512_add_epi32(part, _mm512_slli_epi32(x, 19)));
#elif defined(__AVX2__)
  const __m256 lower = _mm256_load_ps(reinterpret_cast<const float*>(table.of));
  const __m256 upper = _mm256_load_ps(reinterpret_cast<const float*>(table.of + 8));
  for (int i = 0; i < kBlock; i += 8) {
    const __m256i x = _mm256_load_si256(reinterpret_cast<const __m256i*>(n + i));
    const __m256 eight = _mm256_castsi256_ps(_mm256_slli_epi32(x, 28));  // the sign says whether x % 16 is 8 or more
    const __m256 part =
        _mm256_blendv_ps(_mm256_permutevar8x32_ps(lower, x), _mm256_permutevar8x32_ps(upper, x), eight);
    _mm256_store_si256(reinterpret_cast<__m256i*>(powers + i),
                       _mm256_add_epi32(_mm256_castps_si256(part), _mm256_slli_epi32(x, 19)));
  }
#else
  for (int i = 0; i < kBlock; ++i) powers[i] = float_of(table.of[n[i] % 16] + (n[i] << 19));
#endif
}

// ------------------------------------------------------------------------------------------------------ values

// Reads 16 halves. No arithmetic with denormal float32, which kernels flush to zero.
inline void load_halves(const uint16_t* halves, float* values) {
#if defined(__AVX512F__)
  _mm512_store_ps(values, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves))));
#else
  alignas(64) uint32_t words[kBlock];
  widen(halves, words);
#pragma omp simd
  for (int i = 0; i < kBlock; ++i) {
    const uint32_t size = words[i] & 0x7FFFu;
    const float normal = float_of((size << 13) + (size < 0x7C00u ? 112u << 23 : 224u << 23));  // or infinity or NaN
    const float denormal = static_cast<float>(static_cast<int32_t>(size)) * 0x1p-24f;
    values[i] = float_of(bits_of(size < 0x400u ? denormal : normal) | (words[i] & 0x8000u) << 16);
  }
#endif
}

// Rounds to the half below in size or the one above; with random bits right on average. What is beyond the range of
// halves becomes the largest, and what is not a number stays none.
inline uint32_t rounded_half(float value, uint32_t random) {
  const uint32_t size = bits_of(value) & 0x7FFFFFFFu;
  // Below 2^-14 all halves are equally far apart, as float32 are from there to 2^-13.
  const bool denormal = size < 113u << 23;
  const uint32_t bits = bits_of(float_of(size) + (denormal ? 0x1p-14f : 0.0f)) + (random & 0x1FFFu);
  const uint32_t largest = size > 0x7F800000u ? kHalfNan : kHalfMax;
  const uint32_t half = static_cast<uint32_t>(std::min(static_cast<int32_t>(bits), static_cast<int32_t>(largest)) >> 13);
  return (bits_of(value) >> 16 & 0x8000u) | (half - (denormal ? 113u << 10 : 112u << 10));
}

// ----------------------------------------------------------------------------------------------------- moments

// Rows that are worked on at once, each with one short chain of operations after another: a processor does not look
// ahead far enough to find the work of the next row behind a long one.
constexpr int kBatch = 8;

template <class T, int kColumns>
struct Batch {
  alignas(64) T rows[kBatch][kColumns];
  T* operator[](int row) { return rows[row]; }
  const T* operator[](int row) const { return rows[row]; }
};

// All bits where a column belongs to a degree.
struct DegreeMasks {
  alignas(64) uint32_t of[3][3 * kBlock];
  constexpr DegreeMasks() : of() {
    for (int degree = 0; degree < 3; ++degree)
      for (int i = num_values(degree); i < num_values(degree + 1); ++i) of[degree][i] = ~0u;
  }
};
constexpr DegreeMasks kMasks;

// Gives each column of a row the factor of its degree, and 0 to those behind the values.
template <int kColumns>
inline void spread(const float* factors, float* of_columns) {
  constexpr int degrees = degree_of(kColumns);
  const float first = factors[0], second = degrees > 1 ? factors[1] : 0.0f, third = degrees > 2 ? factors[2] : 0.0f;
#pragma omp simd
  for (int i = 0; i < kColumns; ++i)
    of_columns[i] = i < num_values(1) ? first : i < num_values(2) ? second : i < num_values(3) ? third : 0.0f;
}

// Decodes the first moments of a row and the roots of the second.
template <int kColumns>
inline void decode_moments(const uint16_t* codes, float reach, float* first, float* root) {
  constexpr int degrees = degree_of(kColumns);
  alignas(64) uint32_t words[kColumns], root_codes[kColumns];
  alignas(64) float powers[kColumns], scales[kColumns];
  float of_degrees[degrees];
  for (int i = 0; i < degrees; ++i)
    of_degrees[i] = float_of(static_cast<uint32_t>(codes[num_values(degrees) + i]) << 16);
  spread<kColumns>(of_degrees, scales);
  for (int i = 0; i < kColumns; i += kBlock) widen(codes + i, words + i);
#pragma omp simd
  for (int i = 0; i < kColumns; ++i) root_codes[i] = words[i] >> 8;
  for (int i = 0; i < kColumns; i += kBlock) exp2_sixteenths(kRoots, root_codes + i, powers + i);
  const float of_squares = reach / static_cast<float>(kLargestRatio * kLargestRatio);
#pragma omp simd
  for (int i = 0; i < kColumns; ++i) {
    root[i] = scales[i] * (words[i] > 0xFFu ? powers[i] : 0.0f);
    const float ratio = static_cast<float>(static_cast<int32_t>(words[i] & 0x7Fu));
    first[i] = float_of(bits_of(ratio * ratio * of_squares * root[i]) | (words[i] & 0x80u) << 24);
  }
}

// Moments of a batch of rows, and random bits to encode them with.
template <int kColumns>
class CodedMoments {
 public:
  Batch<float, kColumns> first, second;
  Batch<uint32_t, kColumns> random;

  void encode(int count, float reach, uint16_t* const* codes) {
    for (int row = 0; row < count; ++row) find_largest(row);
    for (int row = 0; row < count; ++row) find_scales(row);
    for (int row = 0; row < count; ++row) find_lower_roots(row);
    for (int row = 0; row < count; ++row) round_roots(row);
    for (int row = 0; row < count; ++row) find_ratios(row, static_cast<float>(kLargestRatio * kLargestRatio) / reach);
    for (int row = 0; row < count; ++row) round_ratios(row);
    for (int row = 0; row < count; ++row) store(row, codes[row]);
  }

 private:
  static constexpr int kDegrees = degree_of(kColumns);

  // The largest second moment of each degree.
  void find_largest(int row) {
    const float* v = second[row];
    for (int degree = 0; degree < kDegrees; ++degree) {
      alignas(64) int32_t largest[kBlock] = {};  // bits: those of numbers that are not negative have their order
      for (int from = 0; from < kColumns; from += kBlock) {
#pragma omp simd
        for (int i = 0; i < kBlock; ++i) {
          const uint32_t inside = bits_of(v[from + i]) & kMasks.of[degree][from + i];
          largest[i] = std::max(largest[i], static_cast<int32_t>(inside));
        }
      }
      for (int half = kBlock / 2; half > 0; half /= 2) {
#pragma omp simd
        for (int i = 0; i < half; ++i) largest[i] = std::max(largest[i], largest[half + i]);
      }
      largest_[row][degree] = float_of(static_cast<uint32_t>(largest[0]));
    }
  }

  void find_scales(int row) {
    float inverse_scales[kDegrees];
    for (int i = 0; i < kDegrees; ++i) {
      scale_bits_[row][i] = (bits_of(std::sqrt(largest_[row][i])) + 0xFFFFu) & 0xFFFF0000u;  // rounded upwards
      inverse_scales[i] = scale_bits_[row][i] ? 1.0f / float_of(scale_bits_[row][i]) : 0.0f;
    }
    spread<kColumns>(inverse_scales, inverses_[row]);
  }

  // The codes at or below the roots, at least 1.
  void find_lower_roots(int row) {
    const float *v = second[row], *inverse = inverses_[row];
    float* share = shares_[row];
    uint32_t *code = codes_[row], *above = above_[row];
#pragma omp simd
    for (int i = 0; i < kColumns; ++i) {
      const float part = v[i] * inverse[i] * inverse[i];
      share[i] = part < 1.0f ? part : 1.0f;
      // An octave of second moments is half of one of roots.
      const float position = kLargestRoot + 8.0f * rough_log2(share[i]);
      const int32_t lower = std::max(static_cast<int32_t>(position), 1);
      code[i] = static_cast<uint32_t>(lower);
      above[i] = static_cast<uint32_t>(kLargestRoot - lower);
    }
  }

  // Up or not, with second moments right on average, though the logarithm is a rough one.
  void round_roots(int row) {
    for (int i = 0; i < kColumns; i += kBlock) exp2_sixteenths(kPowers, above_[row] + i, roots_[row] + i);
    const float *share = shares_[row], *inverse_root = roots_[row];
    float* inverse = inverses_[row];
    const uint32_t* bits = random[row];
    uint32_t* code = codes_[row];
#pragma omp simd
    for (int i = 0; i < kColumns; ++i) {
      const float over = share[i] * inverse_root[i] * inverse_root[i] - 1.0f;
      const float fraction = static_cast<float>(static_cast<int32_t>(bits[i] >> 16));  // times 2^16
      const int32_t up = static_cast<int32_t>(fraction * (kStepUp * 0x1p-16f) < over);
      code[i] += static_cast<uint32_t>(up);
      // Now of the roots that will be decoded.
      inverse[i] = inverse[i] * inverse_root[i] * (1.0f - (1.0f - kPreviousRoot) * static_cast<float>(up));
    }
  }

  // The squares of the ratios' codes, not rounded, and their roots, roughly.
  void find_ratios(int row, float of_squares) {
    const float *m = first[row], *inverse = inverses_[row];
    float *square = shares_[row], *root = roots_[row];
#pragma omp simd
    for (int i = 0; i < kColumns; ++i) {
      square[i] = float_of(bits_of(m[i]) & 0x7FFFFFFFu) * of_squares * inverse[i];
      root[i] = square[i] * rough_inverse_root(square[i]);
    }
  }

  void round_ratios(int row) {
    const float *m = first[row], *v = second[row], *square = shares_[row], *root = roots_[row];
    const uint32_t* bits = random[row];
    uint32_t* code = codes_[row];
#pragma omp simd
    for (int i = 0; i < kColumns; ++i) {
      const int32_t lower = static_cast<int32_t>(root[i]);
      const float floor = static_cast<float>(lower), over = square[i] - floor * floor;
      const float fraction = static_cast<float>(static_cast<int32_t>(bits[i] * kSecondHash >> 16));  // times 2^16
      const bool up = fraction * (floor * 0x1p-15f + 0x1p-16f) < over;
      const int32_t ratio = std::min(lower + static_cast<int32_t>(up), kLargestRatio);
      const uint32_t present = bits_of(v[i]) ? ~0u : 0u;  // also of what is too small for arithmetic
      code[i] = (bits_of(m[i]) >> 24 & 0x80u) | ((code[i] << 8 | static_cast<uint32_t>(ratio)) & present);
    }
  }

  void store(int row, uint16_t* codes) {
    for (int i = 0; i < kColumns; i += kBlock) narrow(codes_[row] + i, codes + i);
    for (int i = num_values(kDegrees), degree = 0; i < kColumns; ++i, ++degree)
      codes[i] = degree < kDegrees ? static_cast<uint16_t>(scale_bits_[row][degree] >> 16) : 0;
  }

  float largest_[kBatch][kDegrees];
  uint32_t scale_bits_[kBatch][kDegrees];
  Batch<float, kColumns> inverses_, shares_, roots_;
  Batch<uint32_t, kColumns> codes_, above_;
};

}  // namespace KERNEL_ISA
}  // namespace offload
