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

namespace offload {
namespace KERNEL_ISA {

constexpr int kBlock = 16;              // columns
constexpr int kLargestRoot = 255;       // codes
constexpr float kLargestRatio = 127.0f;
constexpr float kHalfMax = 65504.0f;
constexpr uint32_t kHalfMaxBits = 0x7BFF;
constexpr float kStepUp = 0.0905077327f;    // 2^(2/16) - 1: what a code's second moment grows by to the next, over itself
constexpr float kPreviousRoot = 0.957603281f;  // 2^(-1/16)
// 2^(j/16)
alignas(64) constexpr float kSixteenths[16] = {
    0x1p+0f,        0x1.0b5586p+0f, 0x1.172b84p+0f, 0x1.2387a6p+0f, 0x1.306fep+0f,  0x1.3dea64p+0f,
    0x1.4bfdaep+0f, 0x1.5ab07ep+0f, 0x1.6a09e6p+0f, 0x1.7a1148p+0f, 0x1.8ace54p+0f, 0x1.9c4918p+0f,
    0x1.ae89fap+0f, 0x1.c199bep+0f, 0x1.d5818ep+0f, 0x1.ea4afap+0f};

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

// powers[i] = 2^(sixteenths[i] / 16)
inline void exp2_sixteenths(const int32_t* sixteenths, float* powers) {
#if defined(__AVX512F__)
  const __m512i x = _mm512_load_si512(sixteenths);
  const __m512i fraction = _mm512_castps_si512(_mm512_permutexvar_ps(x, _mm512_load_ps(kSixteenths)));  // by x & 15
  _mm512_store_si512(powers, _mm512_add_epi32(fraction, _mm512_slli_epi32(_mm512_srai_epi32(x, 4), 23)));
#elif defined(__AVX2__)
  const __m256 lower = _mm256_load_ps(kSixteenths), upper = _mm256_load_ps(kSixteenths + 8);
  for (int i = 0; i < kBlock; i += 8) {
    const __m256i x = _mm256_load_si256(reinterpret_cast<const __m256i*>(sixteenths + i));
    const __m256 fraction = _mm256_blendv_ps(_mm256_permutevar8x32_ps(lower, x), _mm256_permutevar8x32_ps(upper, x),
                                             _mm256_castsi256_ps(_mm256_slli_epi32(x, 28)));  // by x & 8
    const __m256i exponent = _mm256_slli_epi32(_mm256_srai_epi32(x, 4), 23);
    _mm256_store_si256(reinterpret_cast<__m256i*>(powers + i),
                       _mm256_add_epi32(_mm256_castps_si256(fraction), exponent));
  }
#else
  for (int i = 0; i < kBlock; ++i) {
    const uint32_t exponent = static_cast<uint32_t>(sixteenths[i] >> 4) << 23;
    powers[i] = float_of(bits_of(kSixteenths[sixteenths[i] & 15]) + exponent);
  }
#endif
}

// ------------------------------------------------------------------------------------------------------ values

// No arithmetic with denormal float32, which kernels flush to zero.
inline float float_of_half(uint32_t half) {
  const uint32_t size = half & 0x7FFFu;
  const float normal = float_of((size << 13) + (112u << 23));
  const float denormal = static_cast<float>(static_cast<int32_t>(size)) * 0x1p-24f;
  return float_of(bits_of(size < 0x400u ? denormal : normal) | (half & 0x8000u) << 16);
}

// The bits of the half below `value` in size, or of the one above; with random bits right on average. Values beyond
// the range of halves become the largest.
inline uint32_t rounded_half(float value, uint32_t random) {
  const uint32_t bits = bits_of(value), size = bits & 0x7FFFFFFFu;
  const int32_t exponent = std::max(static_cast<int32_t>(size >> 23), 127 - 14);  // smaller ones have its spacing
  // In 8192ths of the spacing of halves: exact, but for what is smaller.
  const float spacings = float_of(size) * float_of(static_cast<uint32_t>(254 - exponent + 10 + 13) << 23);
  const int32_t steps = (static_cast<int32_t>(spacings) + static_cast<int32_t>(random & 0x1FFFu)) >> 13;
  const int32_t half = std::min((exponent - 113) * 1024 + steps, static_cast<int32_t>(kHalfMaxBits));
  return static_cast<uint32_t>(half) | (bits >> 16 & 0x8000u);
}

// ----------------------------------------------------------------------------------------------------- moments

// Which block of its row a column is in: that of its degree; or none, behind the values.
constexpr bool in_degree(int column, int degree) { return column >= num_values(degree - 1) && column < num_values(degree); }

// The factor of each column's degree. scales [kDegree].
template <int kDegree>
inline float of_degree(int column, const float* scales) {
  float scale = 0.0f;
  for (int degree = 1; degree <= kDegree; ++degree)
    scale = column >= num_values(degree - 1) && column < num_values(kDegree) ? scales[degree - 1] : scale;
  return scale;
}

// Decodes the first moments and the roots of the second of the block of columns `kFirst`.
template <int kColumns, int kFirst>
inline void decode_moments(const uint16_t* codes, float reach, float* first, float* root) {
  constexpr int degree = degree_of(kColumns);
  alignas(64) uint32_t words[kBlock];
  alignas(64) int32_t sixteenths[kBlock];
  alignas(64) float powers[kBlock];
  float scales[degree];
  for (int i = 0; i < degree; ++i) scales[i] = float_of(static_cast<uint32_t>(codes[num_values(degree) + i]) << 16);
  widen(codes + kFirst, words);
#pragma omp simd
  for (int i = 0; i < kBlock; ++i) sixteenths[i] = static_cast<int32_t>(words[i] >> 8) - kLargestRoot;
  exp2_sixteenths(sixteenths, powers);
  const float of_ratio = reach / (kLargestRatio * kLargestRatio);
#pragma omp simd
  for (int i = 0; i < kBlock; ++i) {
    const float scale = of_degree<degree>(kFirst + i, scales);
    root[i] = words[i] > 0xFFu ? scale * powers[i] : 0.0f;
    const float ratio = static_cast<float>(static_cast<int32_t>(words[i] & 0x7Fu));
    first[i] = float_of(bits_of(ratio * ratio * of_ratio * root[i]) | (words[i] & 0x80u) << 24);
  }
}

// The largest second moment of each degree, of a row's [kColumns].
template <int kColumns, int kDegree>
inline float largest_of_degree(const float* second) {
  float largest = 0.0f;
#pragma omp simd reduction(max : largest)
  for (int i = 0; i < kColumns; ++i) largest = std::max(largest, in_degree(i, kDegree) ? second[i] : 0.0f);
  return largest;
}

// log2(1 + f), off by at most 2e-5, 0 <= f < 1.
inline float rough_log2(float f) {
  return f + f * (1 - f) * (0.44191704f + f * (-0.26717937f + f * (0.14842658f - 0.045149f * f)));
}

// Encodes the block of columns `kFirst`; the scales of the row's degrees are given, and their inverses or zero.
template <int kColumns, int kFirst>
inline void encode_block(const float* first, const float* second, float reach, const uint32_t* random,
                         const float* inverse_scales, uint16_t* codes) {
  constexpr int degree = degree_of(kColumns);
  alignas(64) uint32_t words[kBlock];
  alignas(64) int32_t lower[kBlock], above[kBlock];
  alignas(64) float shares[kBlock], inverse_roots[kBlock];
#pragma omp simd
  for (int i = 0; i < kBlock; ++i) {
    const float inverse = of_degree<degree>(kFirst + i, inverse_scales);
    shares[i] = second[i] * inverse * inverse;  // 0 ... 1, of the second moment; its root has half the logarithm
    const uint32_t bits = bits_of(shares[i]);
    const int32_t octaves = static_cast<int32_t>(bits >> 23) - 127;
    const float rest = rough_log2(float_of((bits & 0x7FFFFFu) | 0x3F800000u) - 1.0f) * 8.0f;
    lower[i] = std::min(std::max(8 * octaves + kLargestRoot + static_cast<int32_t>(rest), 1), kLargestRoot);
    above[i] = kLargestRoot - lower[i];
  }
  exp2_sixteenths(above, inverse_roots);
  const float of_ratio = kLargestRatio * kLargestRatio / reach;
#pragma omp simd
  for (int i = 0; i < kBlock; ++i) {
    const uint32_t other = random[i] * 0x9E3779B1u;
    const float for_second = static_cast<float>(static_cast<int32_t>(random[i] >> 16)) * 0x1p-16f;
    const float for_first = static_cast<float>(static_cast<int32_t>(other >> 16)) * 0x1p-16f;

    const float over = shares[i] * inverse_roots[i] * inverse_roots[i];  // the second moment over that of `lower`
    const bool up = for_second * kStepUp < over - 1.0f && lower[i] < kLargestRoot;
    const int32_t root_code = second[i] > 0.0f ? lower[i] + up : 0;

    const float inverse = of_degree<degree>(kFirst + i, inverse_scales) * inverse_roots[i] * (up ? kPreviousRoot : 1.0f);
    const float size = float_of(bits_of(first[i]) & 0x7FFFFFFFu);
    const float squares = second[i] > 0.0f ? std::min(size * inverse * of_ratio, kLargestRatio * kLargestRatio) : 0.0f;
    const int32_t ratio = static_cast<int32_t>(std::sqrt(squares));
    const float lower_ratio = static_cast<float>(ratio);
    const bool ratio_up =
        for_first * (2.0f * lower_ratio + 1.0f) < squares - lower_ratio * lower_ratio && lower_ratio < kLargestRatio;
    words[i] = static_cast<uint32_t>(root_code) << 8 | (bits_of(first[i]) >> 24 & 0x80u) |
               static_cast<uint32_t>(ratio + ratio_up);
    words[i] = kFirst + i < num_values(degree) ? words[i] : 0u;
  }
  narrow(words, codes + kFirst);
}

}  // namespace KERNEL_ISA
}  // namespace offload
