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


def add_step(sums: Tensor, changed: slice, powers: Tensor, rates: Sequence[float]) -> Tensor:
    """Do as `offload.adam.deferral.add_step`, for one schedule or two."""
    (schedules, capacity), count = sums.shape, changed.stop - changed.start
    if schedules > 2:
        raise ValueError(f"{schedules} schedules are more than two")
    before = torch.empty_like(sums)
    # Triton takes numbers as float32: the bits of float64 go as an integer.
    bits = [struct.unpack("q", struct.pack("d", rate))[0] for rate in rates]
    with torch.cuda.device_of(sums):
        _add_step[(-(-capacity // BLOCK),)](
            sums, capacity, changed.start, count, powers, powers.shape[0] - count, before, bits[0], bits[-1],
            SCHEDULES=schedules, BLOCK=BLOCK,
        )  # fmt: skip
    return before


@triton.jit(do_not_specialize=["capacity", "first", "count", "first_power", "rate_bits", "other_rate_bits"])
def _add_step(
    sums,  # [SCHEDULES, capacity] float64
    capacity,
    first,  # step that is changed
    count,  # of steps that are changed
    powers,  # [first_power + count] float64
    first_power,
    before,  # [SCHEDULES, capacity] float64, to be written
    rate_bits,  # of float64, as those of the second schedule
    other_rate_bits,
    SCHEDULES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, changed = i < capacity, (i >= first) & (i < first + count)
    power = tl.load(powers + first_power + i - first, mask=changed, other=0.0)
    _add_to(sums + i, before + i, power, rate_bits, inside, changed)
    if SCHEDULES == 2:
        _add_to(sums + capacity + i, before + capacity + i, power, other_rate_bits, inside, changed)


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
