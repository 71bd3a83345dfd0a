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
constexpr int32_t kHalfMaxBits = 0x477FE000;  // of 65504 in float32
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
// halves becomes the largest. Returns the half and makes `value` what it is.
inline uint32_t round_to_half(float& value, uint32_t random) {
  const uint32_t sign = bits_of(value) & 0x80000000u, size = bits_of(value) & 0x7FFFFFFFu;
  // Below 2^-14 all halves are equally far apart, as float32 are from there to 2^-13.
  const bool denormal = size < 113u << 23;
  const float base = denormal ? 0x1p-14f : 0.0f;
  uint32_t bits = (bits_of(float_of(size) + base) + (random & 0x1FFFu)) & ~0x1FFFu;
  bits = static_cast<uint32_t>(std::min(static_cast<int32_t>(bits), kHalfMaxBits));
  value = float_of(bits_of(float_of(bits) - base) | sign);
  return ((bits >> 13) - (denormal ? 113u << 10 : 112u << 10)) | sign >> 16;
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
ALWAYS_INLINE void decode_moments(const uint16_t* codes, Factors scales, float reach, float* first, float* root) {
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

// All bits where a column of a row belongs to a degree.
struct DegreeMasks {
  alignas(64) uint32_t of[3][48];
  constexpr DegreeMasks() : of() {
    for (int degree = 1; degree <= 3; ++degree)
      for (int i = num_values(degree - 1); i < num_values(degree); ++i) of[degree - 1][i] = ~0u;
  }
};
constexpr DegreeMasks kMasks;

// The largest second moment of a degree, of a row of `kBlocks` blocks.
template <int kBlocks, int kDegree>
ALWAYS_INLINE float largest_of_degree(const float* second) {
  alignas(64) int32_t largest[kBlock];  // bits: those of numbers that are not negative have their order
  for (int i = 0; i < kBlock; ++i) largest[i] = 0;
  for (int first = 0; first < kBlocks * kBlock; first += kBlock) {
#pragma omp simd
    for (int i = 0; i < kBlock; ++i) {
      const uint32_t inside = bits_of(second[first + i]) & kMasks.of[kDegree - 1][first + i];
      largest[i] = std::max(largest[i], static_cast<int32_t>(inside));
    }
  }
  for (int half = kBlock / 2; half > 0; half /= 2) {
#pragma omp simd
    for (int i = 0; i < half; ++i) largest[i] = std::max(largest[i], largest[half + i]);
  }
  return float_of(static_cast<uint32_t>(largest[0]));
}

// Encodes the block of columns `kFirst`; the scales of the row's degrees are given, and their inverses or zero.
template <int kFirst>
ALWAYS_INLINE void encode_block(const float* first, const float* second, float reach, const uint32_t* random,
                         Factors inverse_scales, uint16_t* codes) {
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
    // 0 ... 65535, below 65536 times the probability of being rounded up
    const float for_second = static_cast<float>(static_cast<int32_t>(random[i] >> 16));
    const float for_first = static_cast<float>(static_cast<int32_t>(random[i] * 0x9E3779B1u >> 16));

    const float over = shares[i] * inverse_roots[i] * inverse_roots[i];  // the second moment over that of `lower`
    const bool up = for_second < over * (65536.0f / kStepUp) - 65536.0f / kStepUp;
    const int32_t root = std::min(lower[i] + static_cast<int32_t>(up), kLargestRoot);
    const float step = 1.0f - (1.0f - kPreviousRoot) * static_cast<float>(root - lower[i]);

    const float inverse = inverses[i] * inverse_roots[i] * step;  // of the root as it will be decoded
    const float squares = float_of(bits_of(first[i]) & 0x7FFFFFFFu) * of_ratio * inverse;
    const int32_t floor = static_cast<int32_t>(squares * rough_inverse_root(squares));
    const float lower_ratio = static_cast<float>(floor);
    const bool ratio_up = for_first * (2.0f * lower_ratio + 1.0f) < (squares - lower_ratio * lower_ratio) * 65536.0f;
    const int32_t ratio = std::min(floor + static_cast<int32_t>(ratio_up), kLargestRatio);

    const uint32_t word = static_cast<uint32_t>(root) << 8 | static_cast<uint32_t>(ratio);
    words[i] = (word & (second[i] > 0.0f ? ~0u : 0u)) | (bits_of(first[i]) >> 24 & 0x80u);
  }
  narrow(words, codes + kFirst);
}

}  // namespace KERNEL_ISA
}  // namespace offload
