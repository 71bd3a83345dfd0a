"""`offload/adam/deferral.py` for CUDA: a kernel in Triton for its tables, and what other kernels inline."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

BLOCK = 256  # steps
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


def add_step(sums: Sequence[Tensor], changed: slice, powers: Tensor, rates: Sequence[Sequence[float]]) -> list[Tensor]:
    """Do as `offload.adam.deferral.add_step`, for one schedule or two of each table."""
    capacity, count, schedules = sums[0].shape[1], changed.stop - changed.start, [len(table) for table in rates]
    if max(schedules) > 2:
        raise ValueError(f"{max(schedules)} schedules are more than two")
    before = [torch.empty_like(table) for table in sums]
    # Triton takes numbers as float32: the bits of float64 go as an integer.
    bits = [struct.unpack("2q", struct.pack("2d", table[0], table[-1])) for table in rates]
    (other, other_before, other_bits) = (sums[1], before[1], bits[1]) if sums[1:] else (None, None, (0, 0))
    with torch.cuda.device_of(sums[0]):
        _add_step[(-(-capacity // BLOCK),)](
            sums[0], before[0], *bits[0], other, other_before, *other_bits,
            capacity, changed.start, count, powers, powers.shape[0] - count,
            SCHEDULES=schedules[0], OTHER_SCHEDULES=schedules[1] if sums[1:] else 0, BLOCK=BLOCK,
        )  # fmt: skip
    return before


NUMBERS = ["capacity", "first", "count", "first_power", "bits0", "bits1", "other_bits0", "other_bits1"]


@triton.jit(do_not_specialize=NUMBERS)
def _add_step(
    sums, before,  # of a table: [SCHEDULES, capacity] float64; the latter to be written
    bits0, bits1,  # of its rates in float64, the latter of the second schedule
    other_sums, other_before, other_bits0, other_bits1,  # of another, or None
    capacity,
    first,  # step that is changed
    count,  # of steps that are changed
    powers,  # [first_power + count] float64
    first_power,
    SCHEDULES: tl.constexpr,
    OTHER_SCHEDULES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, changed = i < capacity, (i >= first) & (i < first + count)
    power = tl.load(powers + first_power + i - first, mask=changed, other=0.0)
    _add_to(sums + i, before + i, power, bits0, inside, changed)
    if SCHEDULES == 2:
        _add_to(sums + capacity + i, before + capacity + i, power, bits1, inside, changed)
    if OTHER_SCHEDULES > 0:
        _add_to(other_sums + i, other_before + i, power, other_bits0, inside, changed)
    if OTHER_SCHEDULES == 2:
        _add_to(other_sums + capacity + i, other_before + capacity + i, power, other_bits1, inside, changed)


@triton.jit
def _add_to(sums, before, power, rate_bits, inside, changed):
    """Copy sums, and add a power times a rate to those that are changed."""
    rate = rate_bits.to(tl.int64).to(tl.float64, bitcast=True)
    values = tl.load(sums, mask=inside, other=0.0)
    tl.store(before, values, mask=inside)
    tl.store(sums, tl.fma(power, rate, values), mask=changed)


@triton.jit
def quotient(numerator, denominator):
    """Divide float32; the last bits may be off on a GPU, which so takes 2 instructions, and 8 for `/`.

    Args:
        numerator: Anything.
        denominator: Neither below 2^-126 nor above 2^126 in size.
    """
    # The interpreter knows nothing of CUDA's functions.
    return numerator / denominator if _INTERPRETED else libdevice.fast_dividef(numerator, denominator)


@triton.jit
def skipped_sizes(sums, multipliers, capacity, last_step, mask, SCHEDULES: tl.constexpr, NUM_COLUMNS: tl.constexpr):
    """Sum up C_t(s) [BLOCK] of rows with these `last_step` [BLOCK], for the column that `multipliers` begins with.

    sums [SCHEDULES, capacity] float64, multipliers [SCHEDULES, NUM_COLUMNS].
    """
    sizes = 0.0
    for schedule in tl.static_range(SCHEDULES):
        total = tl.load(sums + schedule * capacity + last_step, mask=mask, other=0.0).to(tl.float32)
        sizes += total * tl.load(multipliers + schedule * NUM_COLUMNS)
    return sizes


@triton.jit
def caught_up(w, m, v, sizes, eps):
    """Compute parameters after the skipped steps, from them and their moments before those."""
    return w - sizes * quotient(m, tl.sqrt(v) + eps)


@triton.jit
def decays_of(decays, capacity, skipped, mask):
    """Load what so many steps [BLOCK] without gradient leave of moments, as `decayed` takes it.

    decays [2, capacity] float64.
    """
    decay1 = tl.load(decays + skipped, mask=mask, other=0.0).to(tl.float32)
    decay2 = tl.load(decays + capacity + skipped, mask=mask, other=0.0)
    # b2 in float32 is off by 1e-8, and 1000 steps remember it: the rest is added on top.
    near = decay2.to(tl.float32)
    rest = (decay2 - near.to(tl.float64)).to(tl.float32)
    return decay1[:, None], near[:, None], rest[:, None]


@triton.jit
def decayed(m, v, decay1, near, rest):
    """Compute both moments [BLOCK, columns] after steps without gradient, from what `decays_of` gives."""
    return m * decay1, v * near + v * rest


@triton.jit
def adam_step(w, m, v, gradients, sizes, gradient_weight, square_weight, eps):
    """Apply one step of Adam to parameters and both moments; the weights are 1 - b1 and 1 - b2, as in `deferral.py`."""
    m += gradient_weight * (gradients - m)
    v += square_weight * (gradients * gradients - v)
    return w - sizes * quotient(m, tl.sqrt(v) + eps), m, v
