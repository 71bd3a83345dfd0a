// Random bits of a row's values, and both Adam moments of a value as bfloat16 in one word: offload/adam/bfloat16.py
// says why. Included by kernels, once per instruction set (KERNEL_ISA).
#pragma once

#include <cstdint>

#include "float32.h"

namespace offload {
namespace KERNEL_ISA {

// lowbias32 of C. Wellons, https://nullprogram.com/blog/2018/07/31/
template <class Word>
inline Word mixed(Word x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// The 32 random bits of value number `counter` (row * columns + column) at a step, whose number is mixed into `seed`.
inline uint32_t random_bits(uint32_t counter, uint32_t seed) { return mixed(counter ^ seed); }

inline float first_of_pair(uint32_t pair) { return float_of(pair << 16); }
inline float second_of_pair(uint32_t pair) { return float_of(pair & 0xFFFF0000u); }

// Rounds both moments with random bits.
inline uint32_t pair_of(float first, float second, uint32_t random) {
  return ((bits_of(first) + (random & 0xFFFFu)) >> 16) | ((bits_of(second) + (random >> 16)) & 0xFFFF0000u);
}

}  // namespace KERNEL_ISA
}  // namespace offload
