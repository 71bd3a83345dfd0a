// Gradients of harmonics that are made of means and of the gradients of sh0; offload/adam/harmonics.py says why that can
// be. Included by kernels, once per instruction set (KERNEL_ISA).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "adam_kernels.h"
#include "codes.h"

namespace offload {
namespace KERNEL_ISA {

constexpr int kHarmonics = 16;              // of degrees 0 to 3
constexpr float kShortestSquared = 1e-24f;  // of the way to a Gaussian

// A harmonic of a direction d, over the constant one: d[p] (a + b d[q] d[r] + c y^2), with d = (x, y, z, 1).
struct Harmonic {
  int32_t p, q, r;
  float a, b, c;
};
enum : int32_t { kX, kY, kZ, kOne };
constexpr Harmonic kHarmonic[kHarmonics] = {
    {kOne, kOne, kOne, 1.0f, 0.0f, 0.0f},
    {kY, kOne, kOne, -1.7320508075688772f, 0.0f, 0.0f},
    {kZ, kOne, kOne, 1.7320508075688772f, 0.0f, 0.0f},
    {kX, kOne, kOne, -1.7320508075688772f, 0.0f, 0.0f},
    {kX, kY, kOne, 0.0f, 3.872983346207417f, 0.0f},
    {kY, kZ, kOne, 0.0f, -3.872983346207417f, 0.0f},
    {kOne, kZ, kZ, -1.118033988749895f, 3.3541019662496847f, 0.0f},
    {kX, kZ, kOne, 0.0f, -3.872983346207417f, 0.0f},
    {kOne, kX, kX, 0.0f, 1.9364916731037085f, -1.9364916731037085f},
    {kY, kX, kX, 0.0f, -6.274950199005566f, 2.091650066335189f},
    {kX, kY, kZ, 0.0f, 10.246950765959598f, 0.0f},
    {kY, kZ, kZ, 1.6201851746019651f, -8.100925873009825f, 0.0f},
    {kZ, kZ, kZ, -3.968626966596886f, 6.614378277661477f, 0.0f},
    {kX, kZ, kZ, 1.6201851746019651f, -8.100925873009825f, 0.0f},
    {kZ, kX, kX, 0.0f, 5.123475382979799f, -5.123475382979799f},
    {kX, kX, kX, 0.0f, -2.091650066335189f, 6.274950199005566f},
};

// So many harmonics as a vector has lanes have three vectors of columns, of which these are the harmonics and colours.
struct ColumnNumbers {
  alignas(64) int32_t harmonics[3][kWidth], colors[3][kWidth];
  constexpr ColumnNumbers() : harmonics(), colors() {
    for (int i = 0; i < 3 * kWidth; ++i) {
      harmonics[i / kWidth][i % kWidth] = i / 3;
      colors[i / kWidth][i % kWidth] = i % 3;
    }
  }
};
constexpr ColumnNumbers kColumnNumbers;

// Gives each column of the vector `part` of three its harmonic.
template <int part>
inline Floats spread_harmonics(Floats v) {
#if defined(__AVX512F__)
  return _mm512_permutexvar_ps(_mm512_load_si512(kColumnNumbers.harmonics[part]), v);
#elif defined(__AVX2__)
  const int32_t* numbers = kColumnNumbers.harmonics[part];
  return _mm256_permutevar8x32_ps(v, _mm256_load_si256(reinterpret_cast<const __m256i*>(numbers)));
#else
  constexpr int first = part * kWidth;
  return Floats{v[first / 3], v[(first + 1) / 3], v[(first + 2) / 3], v[(first + 3) / 3]};
#endif
}

// Makes the gradients of a batch of rows: all their directions at once, and each gradient by itself, with harmonics and
// columns in the lanes of vectors.
class MadeGradients {
 public:
  explicit MadeGradients(const MadeOf& of) : of_(of) {
    if (!of.means.data) return;
    const int first = of.has_constant ? 0 : 1;
    harmonics_ = of.harmonics + 1 - first;
    for (int i = 0; i < kHarmonics; ++i) {
      const Harmonic harmonic = i < harmonics_ ? kHarmonic[first + i] : Harmonic{kOne, kOne, kOne, 0.0f, 0.0f, 0.0f};
      p_[i] = harmonic.p, q_[i] = harmonic.q, r_[i] = harmonic.r;
      a_[i] = harmonic.a, b_[i] = harmonic.b, c_[i] = harmonic.c;
    }
    for (int i = 0; i < kBatch; ++i) std::fill_n(gradients_[i], kMostMadeColumns, 0.0f);
  }

  void prefetch(int64_t row) const {
    __builtin_prefetch(of_.means.row<float>(row), 0, 2);
    __builtin_prefetch(of_.constant.row<float>(row), 0, 2);
  }

  // Reads what those of rows begin, begin + 1 ... of the visit are made of.
  __attribute__((noinline)) void read(const int64_t* gradient_rows, int64_t begin, int count) {
    for (int i = 0; i < count; ++i) read_row(gradient_rows ? gradient_rows[begin + i] : begin + i, i);
#pragma omp simd
    for (int i = 0; i < kBatch; ++i) {
      const float square = x_[i] * x_[i] + y_[i] * y_[i] + z_[i] * z_[i];
      const float inverse = 1.0f / std::sqrt(std::max(square, kShortestSquared));
      x_[i] *= inverse;
      y_[i] *= inverse;
      z_[i] *= inverse;
    }
  }

  // Makes the gradient of one of the rows that were read, [columns].
  const float* make(int i) {
    const Factors colors = {colors_[i][0], colors_[i][1], colors_[i][2], 0.0f};
    const Factors direction = {x_[i], y_[i], z_[i], 1.0f};
    const float yy = direction[kY] * direction[kY];
    const Floats color0 = choose(colors, kColumnNumbers.colors[0]);
    const Floats color1 = choose(colors, kColumnNumbers.colors[1]);
    const Floats color2 = choose(colors, kColumnNumbers.colors[2]);
    for (int n = 0; n < harmonics_; n += kWidth) {
      float* gradient = gradients_[i] + 3 * n;
      const Floats products = choose(direction, q_ + n) * choose(direction, r_ + n);
      const Floats sum = load(a_ + n) + load(b_ + n) * products + load(c_ + n) * yy;
      const Floats harmonics = choose(direction, p_ + n) * sum;
      store(gradient, spread_harmonics<0>(harmonics) * color0);
      store(gradient + kWidth, spread_harmonics<1>(harmonics) * color1);
      store(gradient + 2 * kWidth, spread_harmonics<2>(harmonics) * color2);
    }
    return gradients_[i];
  }

 private:
  // Notes the way to a Gaussian and the gradient of its sh0.
  void read_row(int64_t row, int i) {
    const float* constant = of_.constant.row<float>(row);
    std::memcpy(colors_[i], constant, 3 * sizeof(float));
    // What is not drawn has no gradient, wherever it lies: its direction may be none, and is zero here.
    const bool drawn = (bits_of(constant[0]) | bits_of(constant[1]) | bits_of(constant[2])) << 1;
    const float* mean = drawn ? of_.means.row<float>(row) : of_.position;
    x_[i] = mean[0] - of_.position[0];
    y_[i] = mean[1] - of_.position[1];
    z_[i] = mean[2] - of_.position[2];
  }

  const MadeOf of_;
  int harmonics_ = 0;  // that have a gradient
  alignas(64) int32_t p_[kHarmonics], q_[kHarmonics], r_[kHarmonics];  // as Harmonic
  alignas(64) float a_[kHarmonics], b_[kHarmonics], c_[kHarmonics];
  float x_[kBatch] = {}, y_[kBatch] = {}, z_[kBatch] = {};  // ways to Gaussians, and then directions
  float colors_[kBatch][3];
  Batch<float, kMostMadeColumns> gradients_;
};

}  // namespace KERNEL_ISA
}  // namespace offload
