// The bits of float32, and what is denormal among them. Included by kernels, once per instruction set (KERNEL_ISA).
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

}  // namespace KERNEL_ISA
}  // namespace offload
