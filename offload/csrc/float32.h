// The bits of float32, and what is denormal among them. Included by kernels, once per instruction set (KERNEL_ISA).
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace offload {
namespace KERNEL_ISA {

// Moments that fade out become denormal numbers, on which x86 is some hundred times slower; as zeros they do. Codes
// count on it everywhere: a scale that is denormal has no inverse.
class FlushDenormals {
 public:
#if defined(__SSE__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }  // flush to zero, denormals are zero
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  const unsigned saved_;
#elif defined(__aarch64__)
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    set(saved_ | uint64_t{1} << 24);  // the same, in one bit
  }
  ~FlushDenormals() { set(saved_); }

 private:
  static void set(uint64_t control) { asm volatile("msr fpcr, %0" : : "r"(control) : "memory"); }

  uint64_t saved_;
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
