// Colour from real spherical harmonics up to degree 3 in the direction from the camera to a Gaussian, and its gradient.
// Basis, order and signs are those of 3DGS (Kerbl et al. 2023).
#pragma once

#include <cmath>

#include "kernels.h"

namespace {

using namespace rendering;

// Basis functions of a unit direction, and with Gradient their derivatives by x, y, z.
template <class T, bool Gradient>
inline void sh_basis(int degree, T x, T y, T z, T* basis, T (*d_basis)[3]) {
  const auto set = [&](int k, T value, T dx, T dy, T dz) {
    basis[k] = value;
    if constexpr (Gradient) {
      d_basis[k][0] = dx;
      d_basis[k][1] = dy;
      d_basis[k][2] = dz;
    }
  };
  constexpr T c0 = T(0.28209479177387814);
  set(0, c0, 0, 0, 0);
  if (degree < 1) return;
  constexpr T c1 = T(0.4886025119029199);
  set(1, -c1 * y, 0, -c1, 0);
  set(2, c1 * z, 0, 0, c1);
  set(3, -c1 * x, -c1, 0, 0);
  if (degree < 2) return;
  constexpr T c2 = T(1.0925484305920792), c20 = T(0.9461746957575601), c20_0 = T(0.31539156525252005);
  const T xx = x * x, yy = y * y, zz = z * z;
  set(4, c2 * x * y, c2 * y, c2 * x, 0);
  set(5, -c2 * y * z, 0, -c2 * z, -c2 * y);
  set(6, c20 * zz - c20_0, 0, 0, 2 * c20 * z);
  set(7, -c2 * x * z, -c2 * z, 0, -c2 * x);
  set(8, c2 / 2 * (xx - yy), c2 * x, -c2 * y, 0);
  if (degree < 3) return;
  constexpr T c33 = T(0.5900435899266435), c32 = T(2.890611442640554), c31 = T(0.4570457994644658);
  constexpr T c30 = T(0.3731763325901154);
  set(9, -c33 * y * (3 * xx - yy), -6 * c33 * x * y, -3 * c33 * (xx - yy), 0);
  set(10, c32 * x * y * z, c32 * y * z, c32 * x * z, c32 * x * y);
  set(11, -c31 * y * (5 * zz - 1), 0, -c31 * (5 * zz - 1), -10 * c31 * y * z);
  set(12, c30 * z * (5 * zz - 3), 0, 0, c30 * (15 * zz - 3));
  set(13, -c31 * x * (5 * zz - 1), -c31 * (5 * zz - 1), 0, -10 * c31 * x * z);
  set(14, c32 / 2 * z * (xx - yy), c32 * x * z, -c32 * y * z, c32 / 2 * (xx - yy));
  set(15, -c33 * x * (xx - 3 * yy), -3 * c33 * (xx - yy), 6 * c33 * x * y, 0);
}

// Direction of a Gaussian from the camera; returns 1 / distance, or 0 for a Gaussian in the camera's centre.
template <class T>
inline T view_direction(const T* mean, const T* camera_position, T* direction) {
  T norm2 = 0;
  for (int k = 0; k < 3; ++k) {
    direction[k] = mean[k] - camera_position[k];
    norm2 += direction[k] * direction[k];
  }
  const T inverse = norm2 > T(0) ? T(1) / std::sqrt(norm2) : T(0);
  for (int k = 0; k < 3; ++k) direction[k] *= inverse;
  return inverse;
}

// A colour above minus this is zero but for rounding, and is not cut: black points begin there, which would else get no
// gradient.
constexpr double kColorRounding = 0x1p-22;

template <class T>
void sh_forward(int degree, int n_bases, const T* means, const T* camera_position, const T* coeffs,
                const int64_t* gaussian_ids, int64_t begin, int64_t end, T* colors, bool* clamped) {
  const int used = (degree + 1) * (degree + 1);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t i = gaussian_ids[row];
    T direction[3], basis[kMaxShBases];
    view_direction(means + 3 * i, camera_position, direction);
    sh_basis<T, false>(degree, direction[0], direction[1], direction[2], basis, nullptr);
    const T* coeff = coeffs + i * n_bases * 3;
    T color[3] = {T(0.5), T(0.5), T(0.5)};
    for (int k = 0; k < used; ++k) {
      for (int c = 0; c < 3; ++c) color[c] += basis[k] * coeff[3 * k + c];
    }
    for (int c = 0; c < 3; ++c) {
      clamped[3 * row + c] = color[c] < -T(kColorRounding);
      colors[3 * row + c] = color[c] < T(0) ? T(0) : color[c];
    }
  }
}

// A template of its own with the camera's gradient: without it the compiler makes the arithmetic that there was before.
template <class T, bool OfCamera>
void sh_backward_of(int degree, int n_bases, const T* means, const T* camera_position, const T* coeffs,
                    const int64_t* gaussian_ids, int64_t begin, int64_t end, const bool* clamped, const T* v_colors,
                    T* v_means, T* v_coeffs, T* v_camera_position) {
  const int used = (degree + 1) * (degree + 1);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t i = gaussian_ids[row];
    T direction[3], basis[kMaxShBases], d_basis[kMaxShBases][3];
    const T inverse = view_direction(means + 3 * i, camera_position, direction);
    sh_basis<T, true>(degree, direction[0], direction[1], direction[2], basis, d_basis);
    const T* coeff = coeffs + i * n_bases * 3;
    T* v_coeff = v_coeffs + i * n_bases * 3;
    T v[3];
    for (int c = 0; c < 3; ++c) v[c] = clamped[3 * row + c] ? T(0) : v_colors[3 * row + c];
    T v_direction[3] = {};
    for (int k = 0; k < used; ++k) {
      for (int c = 0; c < 3; ++c) v_coeff[3 * k + c] += basis[k] * v[c];
      const T v_basis = coeff[3 * k] * v[0] + coeff[3 * k + 1] * v[1] + coeff[3 * k + 2] * v[2];
      for (int c = 0; c < 3; ++c) v_direction[c] += v_basis * d_basis[k][c];
    }
    // Normalization passes only what is perpendicular to the direction.
    const T along = v_direction[0] * direction[0] + v_direction[1] * direction[1] + v_direction[2] * direction[2];
    for (int c = 0; c < 3; ++c) v_means[3 * i + c] += (v_direction[c] - along * direction[c]) * inverse;
    if constexpr (OfCamera) {
      for (int c = 0; c < 3; ++c) v_camera_position[c] -= (v_direction[c] - along * direction[c]) * inverse;
    }
  }
}

template <class T>
void sh_backward(int degree, int n_bases, const T* means, const T* camera_position, const T* coeffs,
                 const int64_t* gaussian_ids, int64_t begin, int64_t end, const bool* clamped, const T* v_colors,
                 T* v_means, T* v_coeffs, T* v_camera_position) {
  const auto backward = v_camera_position ? sh_backward_of<T, true> : sh_backward_of<T, false>;
  backward(degree, n_bases, means, camera_position, coeffs, gaussian_ids, begin, end, clamped, v_colors, v_means,
           v_coeffs, v_camera_position);
}

}  // namespace
