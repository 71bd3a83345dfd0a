// Arithmetic without division and roots, for which processors have one slow unit, on finite numbers that are not
// negative; from a guess that takes the exponent and the fraction of a float32 for its logarithm. Included by kernels,
// once per instruction set (KERNEL_ISA), and the same on all of them but for fused operations.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace offload {
namespace KERNEL_ISA {

// Moments that fade out become denormal numbers, on which x86 is some hundred times slower; as zeros they do.
class FlushDenormals {
 public:
#if defined(__SSE__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }  // flush to zero, denormals are zero
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  const unsigned saved_;
#else
  FlushDenormals() {}
#endif
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// 1 / x, off by 2^-23 of it.
inline float reciprocal(float x) {
  float y = float_of(0x7EF31000u - bits_of(x));  // off by 5 %
  const float rest = 1.0f - x * y;
  y += y * (rest + rest * rest);
  return y + y * (1.0f - x * y);
}

// x^(-1/2), off by 1e-4 of it; some large number for 0.
inline float rough_inverse_root(float x) {
  const float y = float_of(0x5F375800u - (bits_of(x) >> 1));  // off by 3 %
  const float one = x * y * y;
  return y * (1.875f - one * (1.25f - 0.375f * one));
}

// sqrt(x), off by 2^-23 of it.
inline float root_of(float x) {
  const float y = rough_inverse_root(x), root = x * y;
  return root + 0.5f * root * (1.0f - root * y);
}

// log2(x), off by 1.2e-4 and by 2^-23 of it; some negative number below -126 for 0.
inline float rough_log2(float x) {
  const float f = float_of((bits_of(x) & 0x7FFFFFu) | 0x3F800000u) - 1.0f;
  const float line = static_cast<float>(static_cast<int32_t>(bits_of(x))) * 0x1p-23f - 127.0f;
  return line + (f - f * f) * (0.43872572f + f * (-0.23905816f + f * 0.08213062f));
}

}  // namespace KERNEL_ISA
}  // namespace offload
