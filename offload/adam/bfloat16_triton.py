"""`offload/adam/bfloat16.py` for kernels in Triton, which inline it."""

from __future__ import annotations

import triton
import triton.language as tl

from offload.adam.bfloat16 import MIX_1, MIX_2

_MIX_1, _MIX_2 = tl.constexpr(MIX_1), tl.constexpr(MIX_2)


@triton.jit
def unpack(words):
    """Unpack both moments, float32, from words int32."""
    return (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)


@triton.jit
def pack(m, v, random):
    """Pack both moments, float32, into words int32, rounded with the 32 random bits (uint32) of each."""
    first = (m.to(tl.uint32, bitcast=True) + (random & 0xFFFF)) >> 16
    second = (v.to(tl.uint32, bitcast=True) + (random >> 16)) & tl.full([1], 0xFFFF0000, tl.uint32)
    return (first | second).to(tl.int32, bitcast=True)


@triton.jit
def random_bits(counter, seed):
    """Draw 32 random bits, uint32, for counters: a row's id times the number of columns, plus the column."""
    x = counter.to(tl.uint32) ^ seed.to(tl.uint32)
    x = (x ^ (x >> 16)) * tl.full([1], _MIX_1, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full([1], _MIX_2, tl.uint32)
    return x ^ (x >> 16)
