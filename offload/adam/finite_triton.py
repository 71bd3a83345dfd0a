"""Gradients that are not finite, found and cleared on CUDA without anybody waiting for it.

Finding them reads each value once. What clears them looks at what was found first, and then writes nothing in all steps
but the rare one: 0.1 ms for the 59 values of 1.4 million rows at 4 TB/s. Each is one launch for all gradients, and the
latter counts as well: where views are small, launching is what takes time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
MOST = 6  # gradients
UNSPECIALIZED = ["n0", "n1", "n2", "n3", "n4", "n5", "call"]  # or each new kind of number would compile kernels again


def clear_unless_finite(gradients: Sequence[Tensor], ids: Tensor | None, skipped: Tensor, call: int) -> None:
    """Do as `offload.adam.finite.clear_unless_finite`, of at most six float32 gradients, contiguous each."""
    values, counts, widths = [], [], []
    for gradient in gradients:
        width = gradient.shape[1:].numel()
        count = gradient.numel() if ids is None else ids.shape[0] * width
        if count:
            values.append(gradient.view(-1))  # which refuses what is not contiguous
            counts.append(count)
            widths.append(width)
    num_blocks, absent = sum(-(-count // BLOCK) for count in counts), MOST - len(values)
    arguments = [*values, *[None] * absent, *counts, *[0] * absent, ids, skipped, call, *widths, *[1] * absent, BLOCK]
    with torch.cuda.device_of(skipped):
        if num_blocks:
            _find[(num_blocks,)](*arguments, num_warps=8)
        _clear[(max(num_blocks, 1),)](*arguments, num_warps=8)


@triton.jit
def _places(ids, block, num_values, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Return where a block's values are [BLOCK] int64, and which of these places it has."""
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < num_values
    if ids is not None:
        i = tl.load(ids + i // WIDTH, mask=inside, other=0) * WIDTH + i % WIDTH
    return i, inside


@triton.jit
def _find_in(values, num_values, ids, block, skipped, call, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Look at a block of a gradient, where it has so many; return which one it is of the next gradient."""
    if values is not None:
        num_blocks = (num_values - 1) // BLOCK + 1
        if (block >= 0) & (block < num_blocks):
            at, inside = _places(ids, block, num_values, WIDTH, BLOCK)
            value = tl.load(values + at, mask=inside, other=0.0)
            if tl.max((value - value != 0.0).to(tl.int32), axis=0) == 1:  # NaN of what is NaN or infinite
                tl.store(skipped + 2, call)
        block -= num_blocks
    return block


@triton.jit
def _clear_in(values, num_values, ids, block, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Clear a block of a gradient, as `_find_in` looks at it."""
    if values is not None:
        num_blocks = (num_values - 1) // BLOCK + 1
        if (block >= 0) & (block < num_blocks):
            at, inside = _places(ids, block, num_values, WIDTH, BLOCK)
            tl.store(values + at, tl.zeros([BLOCK], tl.float32), mask=inside)
        block -= num_blocks
    return block


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _find(
    g0, g1, g2, g3, g4, g5,  # gradients; None where there are fewer
    n0, n1, n2, n3, n4, n5,  # of their values that are looked at
    ids,  # [V] or None
    skipped,  # int32 [3]
    call,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, W3: tl.constexpr, W4: tl.constexpr, W5: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    block = _find_in(g0, n0, ids, block, skipped, call, W0, BLOCK)
    block = _find_in(g1, n1, ids, block, skipped, call, W1, BLOCK)
    block = _find_in(g2, n2, ids, block, skipped, call, W2, BLOCK)
    block = _find_in(g3, n3, ids, block, skipped, call, W3, BLOCK)
    block = _find_in(g4, n4, ids, block, skipped, call, W4, BLOCK)
    block = _find_in(g5, n5, ids, block, skipped, call, W5, BLOCK)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _clear(
    g0, g1, g2, g3, g4, g5, n0, n1, n2, n3, n4, n5, ids, skipped, call,  # as of `_find`
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, W3: tl.constexpr, W4: tl.constexpr, W5: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    spoiled = (tl.load(skipped + 2) == call).to(tl.int32)
    if block == 0:
        tl.store(skipped, tl.load(skipped) + spoiled)
        tl.store(skipped + 1, (tl.load(skipped + 1) + 1) * spoiled)
    if spoiled == 1:
        block = _clear_in(g0, n0, ids, block, W0, BLOCK)
        block = _clear_in(g1, n1, ids, block, W1, BLOCK)
        block = _clear_in(g2, n2, ids, block, W2, BLOCK)
        block = _clear_in(g3, n3, ids, block, W3, BLOCK)
        block = _clear_in(g4, n4, ids, block, W4, BLOCK)
        block = _clear_in(g5, n5, ids, block, W5, BLOCK)
