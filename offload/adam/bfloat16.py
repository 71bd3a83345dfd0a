"""Both Adam moments of a value in one 32-bit word: the first in its lower half, the second in its upper, as bfloat16.

A bfloat16 is the upper half of a float32. Its 8 significant bits are too few to add to by rounding to the nearest: a
step changes the second moment by a thousandth (b2 = 0.999), which would be lost again and again. So values are rounded
at random, upwards with the probability of what is cut off, and moments are right on average (stochastic rounding,
Gupta et al., arXiv 1502.02551). The first moment would do without; its random bits come with those of the second.

Random bits are a hash of step, row and column. There is no generator to save, and no order of rows matters.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Multipliers and shifts of a bijection of 32-bit words that changes half of the bits for every bit that changes:
# lowbias32 of C. Wellons, https://nullprogram.com/blog/2018/07/31/
MIX_1, MIX_2 = 0x7FEB352D, 0x846CA68B
_WORD = 0xFFFFFFFF


def unpack(words: Tensor) -> tuple[Tensor, Tensor]:
    """Unpack both moments, float32, from words int32."""
    return (words << 16).view(torch.float32), (words & -65536).view(torch.float32)


def pack(exp_avg: Tensor, exp_avg_sq: Tensor, random: Tensor) -> Tensor:
    """Pack both moments, float32, into words int32, rounded with the 32 random bits of each."""
    first = (exp_avg.contiguous().view(torch.int32) + (random & 0xFFFF).int()) >> 16
    second = (exp_avg_sq.contiguous().view(torch.int32) + (random >> 16).int()) & -65536
    return (first & 0xFFFF) | second


def random_bits(ids: Tensor, columns: int, step: int) -> Tensor:
    """Draw 32 random bits for each value of rows `ids` [V] at a step: int64 [V, columns], from 0 to 2^32 - 1."""
    counters = ids[:, None] * columns + torch.arange(columns, device=ids.device)
    x = (counters ^ seed_of(step)) & _WORD
    x = ((x ^ (x >> 16)) * MIX_1) & _WORD
    x = ((x ^ (x >> 15)) * MIX_2) & _WORD
    return x ^ (x >> 16)


def seed_of(step: int) -> int:
    """Return what the counters of a step are combined with, a 32-bit word as a signed number."""
    x = step & _WORD
    x = ((x ^ (x >> 16)) * MIX_1) & _WORD
    x = ((x ^ (x >> 15)) * MIX_2) & _WORD
    x ^= x >> 16
    return x - (1 << 32) if x >= 1 << 31 else x
