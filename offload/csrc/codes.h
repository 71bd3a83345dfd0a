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
constexpr int kLargestRoot = 255, kLargestRatio = 127;  // codes
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

// A factor of each degree; 0 for degrees that the rows do not have.
struct Factors {
  float first = 0.0f, second = 0.0f, third = 0.0f;

  // Of a column; 0 behind the values. By value, since compilers do not choose between addresses in vectors.
  float of(int column) const {
    return column < num_values(1) ? first : column < num_values(2) ? second : column < num_values(3) ? third : 0.0f;
  }
};

// factors of what f(degree - 1) gives
template <int kDegree, class Function>
inline Factors factors_of(const Function& f) {
  Factors factors{f(0)};
  if constexpr (kDegree > 1) factors.second = f(1);
  if constexpr (kDegree > 2) factors.third = f(2);
  return factors;
}

// The scales of the degrees of a row.
template <int kDegree>
inline Factors scales_of(const uint16_t* codes) {
  return factors_of<kDegree>(
      [&](int i) { return float_of(static_cast<uint32_t>(codes[num_values(kDegree) + i]) << 16); });
}

// Decodes the first moments and the roots of the second of the block of columns `kFirst`.
template <int kFirst>
inline void decode_moments(const uint16_t* codes, Factors scales, float reach, float* first, float* root) {
  alignas(64) uint32_t words[kBlock];
  alignas(64) int32_t sixteenths[kBlock];
  alignas(64) float powers[kBlock];
  widen(codes + kFirst, words);
#pragma omp simd
  for (int i = 0; i < kBlock; ++i) sixteenths[i] = static_cast<int32_t>(words[i] >> 8) - kLargestRoot;
  exp2_sixteenths(sixteenths, powers);
  const float of_ratio = reach / static_cast<float>(kLargestRatio * kLargestRatio);
#pragma omp simd
  for (int i = 0; i < kBlock; ++i) {
    root[i] = words[i] > 0xFFu ? scales.of(kFirst + i) * powers[i] : 0.0f;
    const float ratio = static_cast<float>(static_cast<int32_t>(words[i] & 0x7Fu));
    first[i] = float_of(bits_of(ratio * ratio * of_ratio * root[i]) | (words[i] & 0x80u) << 24);
  }
}

// The largest second moment of the columns of a degree.
template <int kDegree>
inline float largest_of_degree(const float* second) {
  float largest = 0.0f;
#pragma omp simd reduction(max : largest)
  for (int i = num_values(kDegree - 1); i < num_values(kDegree); ++i) largest = std::max(largest, second[i]);
  return largest;
}

// log2(1 + f), off by at most 2e-5, 0 <= f < 1.
inline float rough_log2(float f) {
  return f + f * (1 - f) * (0.44191704f + f * (-0.26717937f + f * (0.14842658f - 0.045149f * f)));
}

// Encodes the block of columns `kFirst`; the scales of the row's degrees are given, and their inverses or zero.
template <int kFirst>
inline void encode_block(const float* first, const float* second, float reach, const uint32_t* random,
                         Factors inverse_scales, uint16_t* codes) noexcept {
  alignas(64) uint32_t words[kBlock];
  alignas(64) int32_t lower[kBlock], above[kBlock];
  alignas(64) float inverses[kBlock], shares[kBlock], inverse_roots[kBlock];
#pragma omp simd
  for (int i = 0; i < kBlock; ++i) {
    inverses[i] = inverse_scales.of(kFirst + i);
    shares[i] = second[i] * inverses[i] * inverses[i];  // 0 ... 1, of the second moment; its root has half the logarithm
    const uint32_t bits = bits_of(shares[i]);
    const int32_t octaves = static_cast<int32_t>(bits >> 23) - 127;
    const float rest = rough_log2(float_of((bits & 0x7FFFFFu) | 0x3F800000u) - 1.0f) * 8.0f;
    lower[i] = std::min(std::max(8 * octaves + kLargestRoot + static_cast<int32_t>(rest), 1), kLargestRoot);
    above[i] = kLargestRoot - lower[i];
  }
  exp2_sixteenths(above, inverse_roots);
  const float of_ratio = static_cast<float>(kLargestRatio * kLargestRatio) / reach;
#pragma omp simd
  for (int i = 0; i < kBlock; ++i) {
    const uint32_t other = random[i] * 0x9E3779B1u;
    const float for_second = static_cast<float>(static_cast<int32_t>(random[i] >> 16)) * 0x1p-16f;
    const float for_first = static_cast<float>(static_cast<int32_t>(other >> 16)) * 0x1p-16f;

    const float over = shares[i] * inverse_roots[i] * inverse_roots[i];  // the second moment over that of `lower`
    const int32_t root = std::min(lower[i] + static_cast<int32_t>(for_second * kStepUp < over - 1.0f), kLargestRoot);
    const float step = 1.0f - (1.0f - kPreviousRoot) * static_cast<float>(root - lower[i]);

    const float inverse = inverses[i] * inverse_roots[i] * step;  // of the root as it will be decoded
    const float size = float_of(bits_of(first[i]) & 0x7FFFFFFFu);
    const float squares = size * inverse * of_ratio;
    const float floor = static_cast<float>(static_cast<int32_t>(std::sqrt(squares)));
    const bool ratio_up = for_first * (2.0f * floor + 1.0f) < squares - floor * floor;
    const int32_t ratio = std::min(static_cast<int32_t>(floor) + static_cast<int32_t>(ratio_up), kLargestRatio);

    const uint32_t word = static_cast<uint32_t>(root) << 8 | static_cast<uint32_t>(ratio);
    const uint32_t sign = bits_of(first[i]) >> 24 & 0x80u;
    words[i] = (word & (second[i] > 0.0f ? ~0u : 0u)) | sign;
  }
  narrow(words, codes + kFirst);
}

}  // namespace KERNEL_ISA
}  // namespace offload
