// SIMD with few intrinsics: vectors as wide as the instruction set that this file is compiled for. GCC and Clang turn
// arithmetic and comparisons on them into single instructions, on x86 and on ARM.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct LaneTypes;
template <>
struct LaneTypes<float> {
  typedef float Lanes __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
};
template <>
struct LaneTypes<double> {
  typedef double Lanes __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Ints __attribute__((vector_size(kVectorBytes)));
};

template <class T>
using Lanes = typename LaneTypes<T>::Lanes;

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
inline Lanes<T> load(const T* from) {
  Lanes<T> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class T>
inline void store(T* to, const Lanes<T>& v) {
  std::memcpy(to, &v, sizeof v);
}

template <class T>
inline Lanes<T> broadcast(T value) {
  return Lanes<T>{} + value;
}

// 0, 1, 2, ...
template <class T>
inline Lanes<T> lane_numbers() {
  Lanes<T> v;
  for (int i = 0; i < kLanes<T>; ++i) v[i] = static_cast<T>(i);
  return v;
}

template <class V>
inline V minimum(const V& a, const V& b) {  // b where a or b is NaN
  return a < b ? a : b;
}

template <class V>
inline V maximum(const V& a, const V& b) {  // b where a or b is NaN
  return a > b ? a : b;
}

// Of the above compilers make a comparison and a choice, where one instruction does.
#if defined(__AVX512F__)
inline Lanes<float> minimum(const Lanes<float>& a, const Lanes<float>& b) { return _mm512_min_ps(a, b); }
inline Lanes<float> maximum(const Lanes<float>& a, const Lanes<float>& b) { return _mm512_max_ps(a, b); }
#elif defined(__AVX2__)
inline Lanes<float> minimum(const Lanes<float>& a, const Lanes<float>& b) { return _mm256_min_ps(a, b); }
inline Lanes<float> maximum(const Lanes<float>& a, const Lanes<float>& b) { return _mm256_max_ps(a, b); }
#elif defined(__SSE__)
inline Lanes<float> minimum(const Lanes<float>& a, const Lanes<float>& b) { return _mm_min_ps(a, b); }
inline Lanes<float> maximum(const Lanes<float>& a, const Lanes<float>& b) { return _mm_max_ps(a, b); }
#endif

template <class T>
inline Lanes<T> square_root(const Lanes<T>& v) {
  Lanes<T> r;
  for (int i = 0; i < kLanes<T>; ++i) r[i] = std::sqrt(v[i]);
  return r;
}

#if defined(__AVX512F__)
template <>
inline Lanes<float> square_root<float>(const Lanes<float>& v) {
  return _mm512_sqrt_ps(v);
}
#elif defined(__AVX2__)
template <>
inline Lanes<float> square_root<float>(const Lanes<float>& v) {
  return _mm256_sqrt_ps(v);
}
#elif defined(__SSE__)
template <>
inline Lanes<float> square_root<float>(const Lanes<float>& v) {
  return _mm_sqrt_ps(v);
}
#endif

template <class T, int Bytes>
inline T sum_bytes(const T* values) {
  if constexpr (Bytes == sizeof(T)) {
    return values[0];
  } else if constexpr (Bytes == 2 * sizeof(T)) {
    return values[0] + values[1];
  } else {
    // Halves are added as vectors: a tree of adds, always in the same order.
    typedef T Half __attribute__((vector_size(Bytes / 2)));
    Half low, high;
    std::memcpy(&low, values, sizeof low);
    std::memcpy(&high, values + Bytes / 2 / sizeof(T), sizeof high);
    low += high;
    T half[Bytes / 2 / sizeof(T)];
    std::memcpy(half, &low, sizeof half);
    return sum_bytes<T, Bytes / 2>(half);
  }
}

template <class T>
inline T sum(const Lanes<T>& v) {
  T values[kLanes<T>];
  std::memcpy(values, &v, sizeof values);
  return sum_bytes<T, kVectorBytes>(values);
}

template <class T>
inline bool any_positive(const T* values, int count) {
  Lanes<T> highest = load<T>(values);
  for (int i = kLanes<T>; i < count; i += kLanes<T>) highest = maximum(highest, load<T>(values + i));
  T lanes[kLanes<T>];
  std::memcpy(lanes, &highest, sizeof lanes);
  for (int i = 0; i < kLanes<T>; ++i) {
    if (lanes[i] > T(0)) return true;
  }
  return false;
}

// 2^x for x <= 0, relative error 1e-7; 2^-126 below that, and for NaN.
inline Lanes<float> exp2_nonpositive(const Lanes<float>& x_in) {
  const Lanes<float> x = maximum(x_in, broadcast(-126.0f));
  // Truncation of x - 0.5 rounds a nonpositive x to the nearest integer.
  const auto whole = __builtin_convertvector(x - 0.5f, LaneTypes<float>::Ints);
  const Lanes<float> f = x - __builtin_convertvector(whole, Lanes<float>);
  // Taylor series of 2^f = e^(f ln 2) on [-1/2, 1/2].
  Lanes<float> p = broadcast(1.540353e-4f);
  p = p * f + 1.333356e-3f;
  p = p * f + 9.618129e-3f;
  p = p * f + 5.550411e-2f;
  p = p * f + 2.402265e-1f;
  p = p * f + 6.931472e-1f;
  p = p * f + 1.0f;
  const auto exponent = (whole + 127) << 23;
  Lanes<float> scale;
  std::memcpy(&scale, &exponent, sizeof scale);
  return p * scale;
}

// The double version serves tests, so it is exact instead of fast.
inline Lanes<double> exp2_nonpositive(const Lanes<double>& x) {
  Lanes<double> r;
  for (int i = 0; i < kLanes<double>; ++i) r[i] = x[i] > -1022 ? std::exp2(x[i]) : 0.0;
  return r;
}

}  // namespace
