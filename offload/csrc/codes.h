// Values in 16 bits and both Adam moments in 8 bits each: offload/adam/codes.py has the format and its reasons. What
// bounds rows of codes is arithmetic, so each instruction counts: with AVX-512 codes are found and numbers are rounded
// by instructions that nothing else has. Included by kernels, once per instruction set (KERNEL_ISA).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "bfloat16.h"
#include "lanes.h"

namespace offload {
namespace KERNEL_ISA {

using Floats = Lanes<float>;
using Ints = LaneTypes<float>::Ints;
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
typedef float Factors __attribute__((vector_size(16)));  // of the three degrees, and 0 for columns without values

constexpr int kBlock = 16;             // columns; rows are one, two or three of them
constexpr int kWidth = kLanes<float>;  // columns of a vector
constexpr int kLargestRoot = 255, kLargestRatio = 127;
constexpr uint32_t kSecondHash = 0x9E3779B1;
constexpr float kHalfMax = 65504;
constexpr uint32_t kHalfNan = 0x47FC0000;         // bits of where NaN is among halves, in float32
constexpr float kStepUp = 0.0905077327f;          // 2^(2/16) - 1: from one second moment to the next, over itself
constexpr float kPreviousRoot = 0.957603281f;     // 2^(-1/16)
constexpr float kSmallestRoot = 0x1.172B84p-16f;  // 2^(-254/16), of code 1 over its scale

constexpr uint32_t kPowersOfTwo[16] = {0x3F800000, 0x3F85AAC3, 0x3F8B95C2, 0x3F91C3D3, 0x3F9837F0, 0x3F9EF532,
                                       0x3FA5FED7, 0x3FAD583F, 0x3FB504F3, 0x3FBD08A4, 0x3FC5672A, 0x3FCE248C,
                                       0x3FD744FD, 0x3FE0CCDF, 0x3FEAC0C7, 0x3FF5257D};  // bits of 2^(j / 16)

// 2^((n - kOrigin) / 16) in float32 has the bits `of[n % 16] + (n << 19)`: the exponent is in the upper part of n.
template <int kOrigin>
struct Sixteenths {
  alignas(64) uint32_t of[16];
  constexpr Sixteenths() : of() {
    for (uint32_t n = 0; n < 16; ++n) {
      const uint32_t j = (n - kOrigin) & 15;
      of[n] = kPowersOfTwo[j] - ((kOrigin + j) << 19);
    }
  }
};
constexpr Sixteenths<kLargestRoot> kRoots;
constexpr Sixteenths<0> kPowers;

#if defined(__AVX512F__)
// A root over its scale, rounded downwards, has the code ((bits + of[(bits >> 18) % 32]) >> 19) % 256: between two of
// the 32 fractions lies at most one sixteenth of an octave.
struct Corrections {
  alignas(64) uint32_t of[32];
  constexpr Corrections() : of() {
    for (uint32_t i = 0; i < 32; ++i) {
      uint32_t j = 0;  // the last sixteenth below the next fraction
      while (j < 15 && (kPowersOfTwo[j + 1] & 0x7FFFFFu) < (i + 1) << 18) ++j;
      // 1, whose bits are 127 << 23, has code 255.
      of[i] = ((j + 15) << 19) - std::max(kPowersOfTwo[j] & 0x7FFFFFu, i << 18);
    }
  }
};
constexpr Corrections kCorrections;

// And over the root of such a code, of which no remainder has been taken, the scale has the bits
// of[code % 16] - (code << 19).
struct InverseRoots {
  alignas(64) uint32_t of[16];
  constexpr InverseRoots() : of() {
    for (uint32_t n = 0; n < 16; ++n) {
      const uint32_t j = (15 - n) & 15;
      of[n] = kPowersOfTwo[j] + ((127 * 16 + 15 - j) << 19);
    }
  }
};
constexpr InverseRoots kInverseRoots;
#endif

constexpr int degree_of(int columns) { return columns / kBlock; }
// The scales of the degrees follow the values.
constexpr int num_values(int degree) { return 3 * ((degree + 1) * (degree + 1) - 1); }

// Which of `Factors` belongs to each column.
template <int kColumns>
struct DegreeNumbers {
  alignas(64) int32_t of[kColumns];
  constexpr DegreeNumbers() : of() {
    for (int i = 0; i < kColumns; ++i) {
      of[i] = 3;
      for (int degree = degree_of(kColumns) - 1; degree >= 0; --degree)
        if (i < num_values(degree + 1)) of[i] = degree;
    }
  }
};
template <int kColumns>
constexpr DegreeNumbers<kColumns> kDegreeNumbers;

// ---------------------------------------------------------------------------------------------------- bits of vectors

inline Words bits_of(Floats v) { return (Words)v; }
inline Floats floats_of(Words w) { return (Floats)w; }
inline Floats number_of(Words w) { return __builtin_convertvector((Ints)w, Floats); }  // below 2^31
inline Words whole(Floats v) { return (Words)__builtin_convertvector(v, Ints); }  // towards zero
inline Floats magnitude(Floats v) { return floats_of(bits_of(v) & 0x7FFFFFFFu); }

inline Words load_words(const uint32_t* from) {
  Words w;
  std::memcpy(&w, from, sizeof w);
  return w;
}

inline void store_words(uint32_t* to, Words w) { std::memcpy(to, &w, sizeof w); }

inline Words widen(const uint16_t* from) {
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  return __builtin_convertvector(halves, Words);
#endif
}

inline void narrow(Words w, uint16_t* to) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)w));
#else
  const Halves halves = __builtin_convertvector(w, Halves);
  std::memcpy(to, &halves, sizeof halves);
#endif
}

#if defined(__AVX512F__)
using Mask = __mmask16;
inline Mask less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline Mask not_zero(Words w) { return _mm512_test_epi32_mask((__m512i)w, (__m512i)w); }
inline Words where(Mask mask, Words w) { return (Words)_mm512_maskz_mov_epi32(mask, (__m512i)w); }
inline Floats times_where(Mask mask, Floats v, float factor) {
  return (Floats)_mm512_mask_mul_ps((__m512)v, mask, (__m512)v, _mm512_set1_ps(factor));
}
inline Words one_more(Mask mask, Words w) {
  return (Words)_mm512_mask_add_epi32((__m512i)w, mask, (__m512i)w, _mm512_set1_epi32(1));
}
#else
using Mask = Ints;  // all bits where true
inline Mask less(Floats a, Floats b) { return a < b; }
inline Mask not_zero(Words w) { return w != 0; }
inline Words where(Mask mask, Words w) { return (Words)mask & w; }
inline Floats times_where(Mask mask, Floats v, float factor) {
  const uint32_t one = bits_of(1.0f);
  return v * floats_of(((Words)mask & (bits_of(factor) ^ one)) ^ one);
}
inline Words one_more(Mask mask, Words w) { return w - (Words)mask; }
#endif

inline Floats where(Mask mask, Floats v) { return floats_of(where(mask, bits_of(v))); }

// Gives numbers that are not negative the signs of others.
inline Words with_sign(Words size, Words sign) {
#if defined(__AVX512F__)
  return (Words)_mm512_ternarylogic_epi32(_mm512_set1_epi32(INT32_MIN), (__m512i)sign, (__m512i)size, 0xCA);
#else
  return size | (sign & 0x80000000u);
#endif
}

// table[index % 16]
inline Words look_up(const uint32_t* table, Words index) {
#if defined(__AVX512F__)
  return (Words)_mm512_permutexvar_epi32((__m512i)index, _mm512_load_si512(table));
#elif defined(__AVX2__)
  const __m256 lower = _mm256_load_ps(reinterpret_cast<const float*>(table));
  const __m256 upper = _mm256_load_ps(reinterpret_cast<const float*>(table + 8));
  const __m256 eight = _mm256_castsi256_ps((__m256i)(index << 28));  // the sign says whether it is 8 or more
  const __m256 of_lower = _mm256_permutevar8x32_ps(lower, (__m256i)index);
  return (Words)_mm256_blendv_ps(of_lower, _mm256_permutevar8x32_ps(upper, (__m256i)index), eight);
#else
  Words found;
  for (int i = 0; i < kWidth; ++i) found[i] = table[index[i] % 16];
  return found;
#endif
}

// 2^((n - kOrigin) / 16)
template <int kOrigin>
inline Floats exp2_sixteenths(const Sixteenths<kOrigin>& table, Words n) {
  return floats_of(look_up(table.of, n) + (n << 19));
}

// ------------------------------------------------------------------------------------------------------ values

// No arithmetic with denormal float32, which kernels flush to zero.
inline Floats load_halves(const uint16_t* halves) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves)));
#else
  const Words half = widen(halves), size = half & 0x7FFFu;
  const Words normal = (size << 13) + (size < 0x7C00u ? Words{} + (112u << 23) : Words{} + (224u << 23));
  const Words denormal = bits_of(number_of(size) * 0x1p-24f);
  return floats_of(with_sign(size < 0x400u ? denormal : normal, half << 16));
#endif
}

// Rounds to the half below in size or the one above; with random bits right on average. What is beyond the range of
// halves becomes the largest, and what is not a number stays none.
inline void store_rounded(Floats value, Words random, uint16_t* halves) {
  // Below 2^-14 all halves are equally far apart, as float32 are from there to 2^-13.
  const Floats size = minimum(broadcast(kHalfMax), magnitude(value));  // what is not a number if that is none
  const Mask denormal = less(size, broadcast(0x1p-14f));
  const Words bits = bits_of(size + where(denormal, broadcast(0x1p-14f))) + (random & 0x1FFFu);
#if defined(__AVX512F__)
  // Rounded towards zero; and no half is denormal, which processors may be slow at.
  const __m256i half = _mm512_cvtps_ph((__m512)with_sign(bits, bits_of(value)), _MM_FROUND_TO_ZERO);
  const __m256i less = _mm256_mask_sub_epi16(half, denormal, half, _mm256_set1_epi16(0x400));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(halves), less);
#else
  const Words none = Words{} + kHalfNan;
  const Words half = ((Ints)bits < (Ints)none ? bits : none) >> 13;
  const Words less = half - (112u << 10) - where(denormal, Words{} + (1u << 10));
  narrow(less | (bits_of(value) >> 16 & 0x8000u), halves);
#endif
}

// ----------------------------------------------------------------------------------------------------- moments

// First moments of columns, in the unit in which they are squares of their codes times roots; and roots of the second.
struct Decoded {
  Floats first, root;
};

inline float unit_of(float reach) { return reach / static_cast<float>(kLargestRatio * kLargestRatio); }

// factors[number] for each lane
inline Floats choose(Factors factors, const int32_t* numbers) {
#if defined(__AVX512F__)
  const __m512i index = _mm512_load_si512(numbers);
  return (Floats)_mm512_permutexvar_ps(index, _mm512_castps128_ps512((__m128)factors));
#elif defined(__AVX2__)
  const __m256i index = _mm256_load_si256(reinterpret_cast<const __m256i*>(numbers));
  return (Floats)_mm256_permutevar8x32_ps(_mm256_castps128_ps256((__m128)factors), index);
#else
  Floats chosen;
  for (int i = 0; i < kWidth; ++i) chosen[i] = factors[numbers[i]];
  return chosen;
#endif
}

// Gives columns from `column` on the factor of their degree.
template <int kColumns>
inline Floats spread(Factors factors, int column) {
  return choose(factors, kDegreeNumbers<kColumns>.of + column);
}

// Reads the scales of a row.
template <int kColumns>
inline Factors load_scales(const uint16_t* codes) {
  constexpr int degrees = degree_of(kColumns), first = std::min(num_values(degrees), kColumns - 4);
  uint64_t four;
  std::memcpy(&four, codes + first, sizeof four);
  four >>= 16 * (num_values(degrees) - first);
#if defined(__AVX2__)
  constexpr int keep = (1 << degrees) - 1;
  const __m128i words = _mm_slli_epi32(_mm_cvtepu16_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(four))), 16);
  return (Factors)_mm_blend_ps(_mm_setzero_ps(), _mm_castsi128_ps(words), keep);
#else
  Factors scales;
  for (int i = 0; i < 4; ++i)
    scales[i] = i < degrees ? float_of(static_cast<uint32_t>(four >> 16 * i << 16)) : 0.0f;
  return scales;
#endif
}

// Decodes columns from `column` on.
template <int kColumns>
inline Decoded decode(const uint16_t* codes, Factors scales, int column) {
  const Words words = widen(codes + column);
  const Floats power = exp2_sixteenths(kRoots, words >> 8);
  const Floats root = words > 0xFFu ? spread<kColumns>(scales, column) * power : Floats{};
  const Floats ratio = number_of(words & 0x7Fu);
  return {floats_of(with_sign(bits_of(ratio * ratio * root), words << 24)), root};
}

// All bits where a column belongs to a degree.
struct DegreeMasks {
  alignas(64) uint32_t of[3][3 * kBlock];
  constexpr DegreeMasks() : of() {
    for (int degree = 0; degree < 3; ++degree)
      for (int i = num_values(degree); i < num_values(degree + 1); ++i) of[degree][i] = ~0u;
  }
};
constexpr DegreeMasks kMasks;

// The largest roots of the degrees of a row.
template <int kColumns>
inline Factors largest_roots(const float* roots) {
  constexpr int degrees = degree_of(kColumns);
#if defined(__AVX2__)
  __m256 of_degrees[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
  for (int degree = 0; degree < degrees; ++degree)
    for (int i = num_values(degree) / 8 * 8; i < num_values(degree + 1); i += 8) {
      const __m256 mask = _mm256_load_ps(reinterpret_cast<const float*>(kMasks.of[degree] + i));
      of_degrees[degree] = _mm256_max_ps(of_degrees[degree], _mm256_and_ps(_mm256_load_ps(roots + i), mask));
    }
  // Halves what is left of four degrees, again and again, until each has one number.
  const auto halved = [](__m256 a, __m256 b) {
    return _mm256_castps_pd(_mm256_max_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)));
  };
  const __m256d two = halved(of_degrees[0], of_degrees[1]), others = halved(of_degrees[2], of_degrees[3]);
  const __m256 four = _mm256_max_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(two, others)),
                                    _mm256_castpd_ps(_mm256_unpackhi_pd(two, others)));
  return (Factors)_mm_max_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1));
#else
  Factors largest = {};
  for (int degree = 0; degree < degrees; ++degree) {
    Floats of_degree = {};
    for (int i = num_values(degree) / kWidth * kWidth; i < num_values(degree + 1); i += kWidth) {
      const Words inside = bits_of(load(roots + i)) & load_words(kMasks.of[degree] + i);
      of_degree = maximum(of_degree, floats_of(inside));
    }
    for (int i = 0; i < kWidth; ++i) largest[degree] = std::max(largest[degree], of_degree[i]);
  }
  return largest;
#endif
}

// Rows that are worked on at once, each with one short chain of operations after another: of a long chain so many wait
// in a processor that it does not see those of the next columns behind them.
constexpr int kBatch = 16;

template <class T, int kColumns>
struct Batch {
  alignas(64) T rows[kBatch][kColumns];
  T* operator[](int row) { return rows[row]; }
  const T* operator[](int row) const { return rows[row]; }
};

// Moments of a batch of rows, and random bits to encode them with.
template <int kColumns>
class CodedMoments {
 public:
  Batch<float, kColumns> first, roots;  // as Decoded
  Batch<uint32_t, kColumns> random;

  void encode(int count, uint16_t* const* codes) {
    for (int row = 0; row < count; ++row) {
      const Factors largest = largest_roots<kColumns>(roots[row]);
      std::memcpy(largest_[row], &largest, sizeof largest);
    }
    find_scales();
    // One row after the other: ratios wait for the processor's one unit for roots, while it does the other work.
    for (int row = 0; row <= count; ++row) {
      if (row < count) encode_roots(row);
      if (row > 0) encode_ratios(row - 1, codes[row - 1]);
    }
  }

 private:
  static constexpr int kDegrees = degree_of(kColumns);

  void find_scales() {
    const float* largest = largest_[0];
    uint32_t* scales = scales_[0];
    float* inverses = inverses_[0];
#pragma omp simd
    for (int i = 0; i < 4 * kBatch; ++i) {
      scales[i] = largest[i] > 0.0f ? (bits_of(largest[i]) + 0xFFFFu) & 0xFFFF0000u : 0;  // rounded upwards
      // A little less, so that no share of a scale is above 1.
      inverses[i] = scales[i] ? (1.0f - 0x1p-23f) / float_of(scales[i]) : 0.0f;
    }
  }

  // Codes and signs; and the squares of the ratios' codes, not rounded.
  void encode_roots(int row) {
    Factors inverses;
    std::memcpy(&inverses, inverses_[row], sizeof inverses);
    for (int column = 0; column < kColumns; column += kWidth) {
      const Floats m = load(first[row] + column), root = load(roots[row] + column);
      const Floats inverse_scale = spread<kColumns>(inverses, column), share = root * inverse_scale;
      // The code at or below the root; then up or not, with second moments right on average.
      const LowerRoots lower = lower_roots(share);
      const Floats part = share * lower.inverse;
      const Floats over = part * part * (0x1p16f / kStepUp) - 0x1p16f / kStepUp;
      const Mask up = less(number_of(load_words(random[row] + column) >> 16), over);
      const Floats inverse = times_where(up, inverse_scale * lower.inverse, kPreviousRoot);

      const Mask present = not_zero(bits_of(root));  // also what is too small for arithmetic
      const Words code = where(present, one_more(up, lower.codes) << 8);
      store_words(codes_[row] + column, code | (bits_of(m) >> 24 & 0x80u));
      const Floats largest = broadcast(static_cast<float>(kLargestRatio * kLargestRatio));
      store(squares_[row] + column, where(present, minimum(magnitude(m) * inverse, largest)));
    }
  }

  // Rounds ratios like roots, and writes the row.
  void encode_ratios(int row, uint16_t* codes) {
    for (int column = 0; column < kColumns; column += kWidth) {
      const Floats square = load(squares_[row] + column);
      const Words lower = whole(square_root<float>(square));
      const Floats floor = number_of(lower);
      const Floats fraction = number_of(load_words(random[row] + column) * kSecondHash >> 16);  // times 2^16
      const Mask up = less(fraction * (floor * 0x1p-15f + 0x1p-16f), square - floor * floor);
      narrow(load_words(codes_[row] + column) | one_more(up, lower), codes + column);
    }
    for (int i = num_values(kDegrees), degree = 0; i < kColumns; ++i, ++degree)
      codes[i] = degree < kDegrees ? static_cast<uint16_t>(scales_[row][degree] >> 16) : 0;
  }

  // The codes, in their lower 8 bits, at or below roots over their scales, at least 1; and one over their roots.
  struct LowerRoots {
    Words codes;
    Floats inverse;
  };

  static LowerRoots lower_roots(Floats share) {
#if defined(__AVX512F__)
    const Words bits = bits_of(maximum(share, broadcast(kSmallestRoot)));
    const __m512i lower = _mm512_load_si512(kCorrections.of), upper = _mm512_load_si512(kCorrections.of + 16);
    const Words correction = (Words)_mm512_permutex2var_epi32(lower, (__m512i)(bits >> 18), upper);
    const Words codes = (bits + correction) >> 19;
    return {codes, floats_of(look_up(kInverseRoots.of, codes) - (codes << 19))};
#else
    const Floats code = maximum(kLargestRoot + 16.0f * rough_log2(share), broadcast(1.0f));
    const Words codes = whole(code);
    return {codes, exp2_sixteenths(kPowers, kLargestRoot - codes)};
  }

  // log2(x), off by 1.2e-4 and by 2^-23 of it; some negative number below -126 for 0.
  static Floats rough_log2(Floats x) {
    const Floats f = floats_of((bits_of(x) & 0x7FFFFFu) | 0x3F800000u) - 1.0f;
    const Floats line = number_of(bits_of(x)) * 0x1p-23f - 127.0f;
    return line + (f - f * f) * (0.43872572f + f * (-0.23905816f + f * 0.08213062f));
#endif
  }

  alignas(64) float largest_[kBatch][4] = {};
  alignas(64) uint32_t scales_[kBatch][4];
  alignas(64) float inverses_[kBatch][4];
  Batch<float, kColumns> squares_;
  Batch<uint32_t, kColumns> codes_;
};

}  // namespace KERNEL_ISA
}  // namespace offload
