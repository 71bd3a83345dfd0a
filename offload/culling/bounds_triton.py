"""`offload/culling/bounds.py` as CUDA kernels in Triton, each one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.adam.bfloat16_triton import unpack
from offload.backends import native
from offload.culling import bounds
from offload.culling.cameras import Cameras, Margin
from offload.culling.kernels_triton import as_arguments, number
from offload.store.layout import RowState

BLOCK = 256  # rows, or boxes
BLOCK_ROWS = tl.constexpr(bounds.BLOCK_ROWS)
NUM_HALF_SPACES = tl.constexpr(bounds.NUM_HALF_SPACES)
FIRST_HALF_SPACE = tl.constexpr(bounds.FIRST_HALF_SPACE)
_SMALLEST_ROOT = tl.constexpr(bounds.SMALLEST_ROOT)
POSITION_ERROR = tl.constexpr(native.POSITION_ERROR)


def follow_balls(balls: Tensor, ids: Tensor, rows: Tensor) -> None:
    """Do as `offload.culling.bounds.follow_balls`."""
    count = ids.shape[0]
    if count:
        with torch.cuda.device_of(balls):
            _follow_balls[(-(-count // BLOCK),)](balls, balls.stride(0), ids, rows, rows.stride(0), count, BLOCK=BLOCK)


def follow_boxes(boxes: Tensor, ids: Tensor, rows: RowState, drift: bounds.Drift) -> None:
    """Do as `offload.culling.bounds.follow_boxes`."""
    if len(ids):
        values, moments = rows.parameters, rows.moments[0]
        with torch.cuda.device_of(boxes):
            _follow_boxes[(triton.cdiv(len(ids), bounds.BLOCK_ROWS),)](
                boxes, boxes.stride(0), ids, values, values.stride(0), moments, moments.stride(0), drift.per_ratio,
                drift.largest_ratio, len(ids), num_warps=2,
            )  # fmt: skip


def visible_boxes(boxes: Tensor, cameras: Cameras, margin: Margin) -> Tensor:
    """Do as `offload.culling.bounds.visible_boxes`."""
    num_boxes = boxes.shape[1]
    drawn = torch.zeros(num_boxes, dtype=torch.uint8, device=boxes.device)
    if num_boxes:
        with torch.cuda.device_of(boxes):
            for test in as_arguments(bounds.tests_of(cameras, margin), boxes.device):
                _mark_boxes[(triton.cdiv(num_boxes, BLOCK),)](
                    boxes, boxes.stride(0), num_boxes, test, drawn, BLOCK=BLOCK
                )
    return drawn.nonzero().squeeze(1)


@triton.jit(do_not_specialize=["stride", "num_rows"])
def _follow_balls(
    balls,  # [5, N]
    stride,  # between two of these five
    ids,  # [V]
    rows,  # [V, columns]
    columns,
    num_rows,  # V
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    i = tl.load(ids + row, mask=inside, other=0)
    values = rows + row * columns
    for axis in tl.static_range(3):
        tl.store(balls + axis * stride + i, tl.load(values + axis, mask=inside, other=0.0), mask=inside)
    s0 = tl.load(values + 3, mask=inside, other=0.0)
    s1 = tl.load(values + 4, mask=inside, other=0.0)
    s2 = tl.load(values + 5, mask=inside, other=0.0)
    spoiled = (s0 - s0) + (s1 - s1) + (s2 - s2)  # NaN where any is not finite, which `maximum` hides
    tl.store(balls + 3 * stride + i, tl.maximum(s0, tl.maximum(s1, s2)) + spoiled, mask=inside)
    tl.store(balls + 4 * stride + i, tl.load(values + 10, mask=inside, other=0.0), mask=inside)


@triton.jit(do_not_specialize=["stride", "num_rows"], do_not_specialize_on_alignment=["moments"])
def _follow_boxes(
    boxes,  # [8, blocks]
    stride,  # between two of these eight
    ids,  # [V], whole blocks
    rows,  # [V, columns]
    columns,
    moments,  # int32 [V, words], pairs
    words,
    drift_per_ratio,
    largest_ratio,
    num_rows,  # V
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    row = first + tl.arange(0, BLOCK_ROWS)
    row = tl.minimum(row, num_rows - 1)  # those that the last block lacks: its last row once more
    box = boxes + tl.load(ids + first) // BLOCK_ROWS
    values = rows + row * columns
    largest = 0.0
    moments_spoiled = 0.0
    for axis in tl.static_range(3):
        x = tl.load(values + axis)
        m, v = unpack(tl.load(moments + row * words + axis))
        # Rounded as torch does: boxes that are made anew are the same, or a resumed run would fetch other rows.
        ratio = tl.div_rn(tl.abs(m), tl.maximum(tl.sqrt_rn(v), _SMALLEST_ROOT))
        largest = tl.maximum(largest, tl.max(tl.minimum(ratio, largest_ratio), axis=0))
        moments_spoiled += tl.sum((m - m) + (v - v), axis=0)
        spoiled = tl.sum(x - x, axis=0)  # NaN where any is not finite, which `min` and `max` hide
        tl.store(box + axis * stride, tl.min(x, axis=0) + spoiled)
        tl.store(box + (3 + axis) * stride, tl.max(x, axis=0) + spoiled)
    s0, s1, s2 = tl.load(values + 3), tl.load(values + 4), tl.load(values + 5)
    spoiled = tl.sum((s0 - s0) + (s1 - s1) + (s2 - s2), axis=0)
    tl.store(box + 6 * stride, tl.max(tl.maximum(s0, tl.maximum(s1, s2)), axis=0) + spoiled)
    tl.store(box + 7 * stride, (largest + moments_spoiled) * drift_per_ratio)


@triton.jit(do_not_specialize=["stride", "num_boxes"])
def _mark_boxes(
    boxes,  # [8, blocks]
    stride,  # between two of these eight
    num_boxes,
    test,  # of `tests_of`
    drawn,  # [blocks] uint8
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < num_boxes
    low_x = tl.load(boxes + i, mask=inside, other=0.0)
    low_y = tl.load(boxes + stride + i, mask=inside, other=0.0)
    low_z = tl.load(boxes + 2 * stride + i, mask=inside, other=0.0)
    high_x = tl.load(boxes + 3 * stride + i, mask=inside, other=0.0)
    high_y = tl.load(boxes + 4 * stride + i, mask=inside, other=0.0)
    high_z = tl.load(boxes + 5 * stride + i, mask=inside, other=0.0)
    scale = tl.exp(tl.load(boxes + 6 * stride + i, mask=inside, other=0.0))
    x, y, z = (low_x + high_x) / 2, (low_y + high_y) / 2, (low_z + high_z) / 2
    reach_x, reach_y, reach_z = (high_x - low_x) / 2, (high_y - low_y) / 2, (high_z - low_z) / 2
    largest_x = tl.maximum(tl.abs(low_x), tl.abs(high_x))
    largest_y = tl.maximum(tl.abs(low_y), tl.abs(high_y))
    largest_z = tl.maximum(tl.abs(low_z), tl.abs(high_z))
    largest = tl.maximum(largest_x, tl.maximum(largest_y, largest_z))
    drift = tl.load(boxes + 7 * stride + i, mask=inside, other=0.0)
    error = number(test, 1) + number(test, 2) * drift + 2 * POSITION_ERROR * (3 * largest + number(test, 0))
    misses = i < 0
    for half_space in tl.static_range(NUM_HALF_SPACES):
        misses |= _beyond(test, FIRST_HALF_SPACE + 6 * half_space, x, y, z, reach_x, reach_y, reach_z, scale, error)
    tl.store(drawn + i, 1, mask=inside & (misses == 0))  # `~` is unknown to the interpreter of Triton 3.2


@triton.jit
def _beyond(test, FIRST: tl.constexpr, x, y, z, reach_x, reach_y, reach_z, scale, error):
    """Tell which boxes lie outside of a half-space whose numbers begin at FIRST; not those with NaN."""
    nx, ny, nz = number(test, FIRST), number(test, FIRST + 1), number(test, FIRST + 2)
    value = x * nx + y * ny + z * nz
    value += reach_x * tl.abs(nx) + reach_y * tl.abs(ny) + reach_z * tl.abs(nz)
    value += scale * number(test, FIRST + 4) + number(test, FIRST + 3)
    return value + number(test, FIRST + 5) * error < 0
