// Values in 16 bits and both Adam moments in 8 bits each: offload/adam/codes.py has the format and its reasons. One
// row at a time, in blocks of 16 columns, whose loops the compiler turns into vector instructions; included by kernels,
// once per instruction set (KERNEL_ISA).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "bfloat16.h"

// Row loops keep constants in registers where all of a row's work stands in them.
#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace offload {
namespace KERNEL_ISA {

constexpr int kBlock = 16;              // columns
constexpr int kLargestRoot = 255, kLargestRatio = 127;  // codes
constexpr int32_t kHalfMaxBits = 0x477FE000;   // of 65504, the largest half, in float32
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

// How many values a row of so many columns has, 3 ((degree + 1)^2 - 1); the scales of the degrees follow them.
constexpr int degree_of(int columns) { return columns / 16; }
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
    const float normal = float_of((size << 13) + (112u << 23));
    const float denormal = static_cast<float>(static_cast<int32_t>(size)) * 0x1p-24f;
    values[i] = float_of(bits_of(size < 0x400u ? denormal : normal) | (words[i] & 0x8000u) << 16);
  }
#endif
}

// Rounds to the half below in size or the one above; with random bits right on average. What is beyond the range of
// halves becomes the largest.
inline uint32_t rounded_half(float value, uint32_t random) {
  const uint32_t size = bits_of(value) & 0x7FFFFFFFu;
  // Below 2^-14 all halves are equally far apart, as float32 are from there to 2^-13.
  const bool denormal = size < 113u << 23;
  const uint32_t bits = bits_of(float_of(size) + (denormal ? 0x1p-14f : 0.0f)) + (random & 0x1FFFu);
  const int32_t half = std::min(static_cast<int32_t>(bits), kHalfMaxBits) >> 13;
  return (bits_of(value) >> 16 & 0x8000u) | (static_cast<uint32_t>(half) - (denormal ? 113u << 10 : 112u << 10));
}

// ----------------------------------------------------------------------------------------------------- moments

// Decodes the first moments and the roots of the second of 16 columns, which have these scales.
ALWAYS_INLINE void decode_moments(const uint16_t* codes, const float* scales, float reach, float* first, float* root) {
  alignas(64) uint32_t words[kBlock], roots[kBlock];
  alignas(64) float powers[kBlock];
  widen(codes, words);
#pragma omp simd
  for (int i = 0; i < kBlock; ++i) roots[i] = words[i] >> 8;
  exp2_sixteenths(kRoots, roots, powers);
  const float of_ratio = reach / static_cast<float>(kLargestRatio * kLargestRatio);
#pragma omp simd
  for (int i = 0; i < kBlock; ++i) {
    root[i] = scales[i] * (words[i] > 0xFFu ? powers[i] : 0.0f);
    const float ratio = static_cast<float>(static_cast<int32_t>(words[i] & 0x7Fu));
    first[i] = float_of(bits_of(ratio * ratio * of_ratio * root[i]) | (words[i] & 0x80u) << 24);
  }
}

// All bits where a column of a row belongs to a degree.
struct DegreeMasks {
  alignas(64) uint32_t of[3][48];
  constexpr DegreeMasks() : of() {
    for (int degree = 1; degree <= 3; ++degree)
      for (int i = num_values(degree - 1); i < num_values(degree); ++i) of[degree - 1][i] = ~0u;
  }
};
constexpr DegreeMasks kMasks;

// Gives each column of a row the factor of its degree; 0 behind the values.
template <int kDegree>
ALWAYS_INLINE void spread(const float* factors, float* of_columns) {
  const float first = factors[0], second = kDegree > 1 ? factors[1] : 0.0f, third = kDegree > 2 ? factors[2] : 0.0f;
  for (int from = 0; from < kDegree * kBlock; from += kBlock) {
#pragma omp simd
    for (int i = from; i < from + kBlock; ++i)
      of_columns[i] = i < num_values(1) ? first : i < num_values(2) ? second : i < num_values(3) ? third : 0.0f;
  }
}

// The largest second moment of a degree, of a row of `kBlocks` blocks.
template <int kBlocks>
ALWAYS_INLINE float largest_of_degree(const float* second, int degree) {
  alignas(64) int32_t largest[kBlock];  // bits: those of numbers that are not negative have their order
  for (int i = 0; i < kBlock; ++i) largest[i] = 0;
  for (int from = 0; from < kBlocks * kBlock; from += kBlock) {
#pragma omp simd
    for (int i = 0; i < kBlock; ++i) {
      const uint32_t inside = bits_of(second[from + i]) & kMasks.of[degree - 1][from + i];
      largest[i] = std::max(largest[i], static_cast<int32_t>(inside));
    }
  }
  for (int half = kBlock / 2; half > 0; half /= 2) {
#pragma omp simd
    for (int i = 0; i < half; ++i) largest[i] = std::max(largest[i], largest[half + i]);
  }
  return float_of(static_cast<uint32_t>(largest[0]));
}

// Encodes 16 columns; their scales are given, inverted, or zero where these are.
ALWAYS_INLINE void encode_moments(const float* first, const float* second, float reach, const uint32_t* random,
                                  const float* inverse_scales, uint16_t* codes) {
  alignas(64) uint32_t words[kBlock], lower[kBlock], above[kBlock];
  alignas(64) float shares[kBlock], inverse_roots[kBlock];
#pragma omp simd
  for (int i = 0; i < kBlock; ++i) {
    // Of the second moment, whose logarithm is twice that of its root: an octave of it has 8 codes.
    const float share = second[i] * inverse_scales[i] * inverse_scales[i];
    shares[i] = share < 1.0f ? share : 1.0f;
    const int32_t code = static_cast<int32_t>(kLargestRoot + 8.0f * rough_log2(shares[i]));
    lower[i] = static_cast<uint32_t>(std::max(code, 1));
    above[i] = kLargestRoot - lower[i];
  }
  exp2_sixteenths(kPowers, above, inverse_roots);
  const float of_ratio = static_cast<float>(kLargestRatio * kLargestRatio) / reach;
#pragma omp simd
  for (int i = 0; i < kBlock; ++i) {
    // 0 ... 65535; below 65536 times the probability of being rounded up
    const float for_second = static_cast<float>(static_cast<int32_t>(random[i] >> 16));
    const float for_first = static_cast<float>(static_cast<int32_t>(random[i] * 0x9E3779B1u >> 16));

    const float over = shares[i] * inverse_roots[i] * inverse_roots[i];  // the second moment over that of `lower`
    const bool up = for_second < over * (65536.0f / kStepUp) - 65536.0f / kStepUp;
    const uint32_t root = lower[i] + static_cast<uint32_t>(up);
    const float step = 1.0f - (1.0f - kPreviousRoot) * static_cast<float>(static_cast<int32_t>(up));
    const float inverse = inverse_scales[i] * inverse_roots[i] * step;  // of what is decoded

    const float squares = float_of(bits_of(first[i]) & 0x7FFFFFFFu) * of_ratio * inverse;
    const int32_t floor = static_cast<int32_t>(squares * rough_inverse_root(squares));
    const float lower_ratio = static_cast<float>(floor);
    const bool ratio_up = for_first * (lower_ratio * 0x1p-15f + 0x1p-16f) < squares - lower_ratio * lower_ratio;
    const int32_t ratio = std::min(floor + static_cast<int32_t>(ratio_up), kLargestRatio);

    const uint32_t word = root << 8 | static_cast<uint32_t>(ratio);
    const uint32_t present = second[i] > 0.0f ? ~0u : 0u;  // no choice between words: that would become a branch
    words[i] = (bits_of(first[i]) >> 24 & 0x80u) | (word & present);
  }
  narrow(words, codes);
}

}  // namespace KERNEL_ISA
}  // namespace offload
