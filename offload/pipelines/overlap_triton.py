"""`offload/pipelines/overlap.py` as a CUDA kernel in Triton: one launch in place of twenty.

Views are looked through in each other by halving, of which a thread does three: its row of the next view in both before
it, and its row of the present one in the next.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.pipelines.overlap import Overlap

BLOCK = 256  # rows


def overlap(ids: Tensor, present: Tensor, previous: Tensor, num_moved: Tensor) -> Overlap:
    """Do as `offload.pipelines.overlap.overlap`."""
    sources, places = torch.empty_like(ids), torch.empty_like(ids)
    moved, nearby, on_host = (torch.empty_like(ids, dtype=torch.bool) for _ in range(3))
    leaving = torch.empty_like(present, dtype=torch.bool)
    count, num_present = ids.shape[0], present.shape[0]
    if count or num_present:
        with torch.cuda.device_of(ids):
            _overlap_kernel[(-(-max(count, num_present) // BLOCK),)](
                ids, count, present, num_present, previous, previous.shape[0],
                sources, moved, places, nearby, on_host, leaving, num_moved, BLOCK=BLOCK,
            )  # fmt: skip
    return Overlap(sources, moved, places, nearby, on_host, leaving)


@triton.jit
def _position(others, count, number, wanted):
    """Find where numbers stand among `count` sorted others: the place, and whether they do; by halving."""
    low = number * 0
    high = low + count
    length = count
    while length > 0:
        middle = (low + high) // 2
        open_yet = wanted & (low < high)
        below = open_yet & (tl.load(others + middle, mask=open_yet, other=0) < number)
        low = tl.where(below, middle + 1, low)
        high = tl.where(open_yet & ~below, middle, high)
        length = length // 2
    there = wanted & (low < count)
    return low, there & (tl.load(others + low, mask=there, other=-1) == number)


@triton.jit(do_not_specialize=["num_rows", "num_present", "num_previous"])
def _overlap_kernel(
    ids, num_rows,  # [V]
    present, num_present,  # [V of the present view]
    previous, num_previous,  # [V of the view before that]
    sources, moved, places, nearby, on_host,  # [V] of `Overlap`, to be written
    leaving,  # [V of the present view] of it, to be written
    num_moved,  # scalar, to be added to
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < num_rows
    number = tl.load(ids + i, mask=inside, other=0)
    source, is_moved = _position(present, num_present, number, inside)
    place, is_kept = _position(previous, num_previous, number, inside & ~is_moved)
    tl.store(sources + i, tl.where(is_moved, source, -1), mask=inside)
    tl.store(moved + i, is_moved, mask=inside)
    tl.store(places + i, tl.where(is_kept, place, -1), mask=inside)
    tl.store(nearby + i, is_kept, mask=inside)
    tl.store(on_host + i, (is_moved | is_kept) == 0, mask=inside)
    tl.atomic_add(num_moved, tl.sum(is_moved.to(tl.int64)))
    inside = i < num_present
    _place, stays = _position(ids, num_rows, tl.load(present + i, mask=inside, other=0), inside)
    tl.store(leaving + i, stays == 0, mask=inside)
