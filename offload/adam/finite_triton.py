"""Gradients that are not finite, found and cleared on CUDA without anybody waiting for it.

Finding them reads each value once. What clears them looks at what was found first, and then writes nothing in all steps
but the rare one: 0.1 ms for the 59 values of 1.4 million rows at 4 TB/s.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


def clear_unless_finite(gradients: Sequence[Tensor], ids: Tensor | None) -> Tensor:
    """Set all gradients to zero, in place, unless all their values are finite.

    Args:
        gradients: [N, ...] float32 each, contiguous.
        ids: int64 [V], the rows to look at and to clear; None: all rows.

    Returns:
        int32 scalar: 1 where they were cleared, else 0.
    """
    spoiled = torch.zeros((), dtype=torch.int32, device=gradients[0].device)
    flat = [gradient.view(-1) for gradient in gradients]  # which refuses what is not contiguous
    widths = [gradient[:1].numel() for gradient in gradients]
    with torch.cuda.device_of(spoiled):
        for kernel in (_find, _clear):
            for values, width in zip(flat, widths, strict=True):
                num_values = len(values) if ids is None else len(ids) * width
                if num_values:
                    kernel[(triton.cdiv(num_values, BLOCK),)](
                        values, ids, spoiled, num_values, WIDTH=width, BLOCK=BLOCK, num_warps=8
                    )
    return spoiled


@triton.jit
def _places(ids, num_values, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Return where a program's values are [BLOCK] int64, and which of these places it has."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < num_values
    if ids is not None:
        i = tl.load(ids + i // WIDTH, mask=inside, other=0) * WIDTH + i % WIDTH
    return i, inside


@triton.jit(do_not_specialize=["num_values"])  # or each new kind of number would compile it again
def _find(values, ids, spoiled, num_values, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    at, inside = _places(ids, num_values, WIDTH, BLOCK)
    value = tl.load(values + at, mask=inside, other=0.0)
    if tl.max((value - value != 0.0).to(tl.int32), axis=0) == 1:  # NaN of what is NaN or infinite
        tl.store(spoiled, 1)


@triton.jit(do_not_specialize=["num_values"])
def _clear(values, ids, spoiled, num_values, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    if tl.load(spoiled) == 1:
        at, inside = _places(ids, num_values, WIDTH, BLOCK)
        tl.store(values + at, tl.zeros([BLOCK], tl.float32), mask=inside)
