"""A kernel that Triton's interpreter runs and its compiler refuses."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def double(values, numbers, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    for each in tl.static_range(1):
        place = each + 1
        tl.store(values + at, tl.load(values + at) * numbers[place])
