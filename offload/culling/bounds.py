"""What devices compute with balls and boxes in their memory; here in torch.

`offload/culling/bounds_triton.py` has the same functions for CUDA, one kernel each: where views are small, launching is
what takes time. To find rows by balls is `visible_balls` of `offload/culling/kernels.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from offload.adam.bfloat16 import unpack
from offload.backends import native
from offload.culling.cameras import Cameras, Margin, pack
from offload.store.layout import RowState

BLOCK_ROWS = 64  # of a box
NUM_HALF_SPACES = 6  # of a camera's view, six numbers each
FIRST_HALF_SPACE = 3  # of the numbers of a test, where these begin
SMALLEST_ROOT = 1e-30  # of a second moment; where that is zero so is the first one, but for what is too small for it


@dataclass(frozen=True)
class Drift:
    """Say how far means drift by steps without a gradient, where there is no bias correction.

    After a step that leaves the moments m and v, all that come move a mean by at most |m| / sqrt(v) times `per_ratio`.
    """

    per_ratio: float | Tensor  # world units; float32 [M] of rows that had their last steps at several times
    largest_ratio: float  # of |m| / sqrt(v)


def balls_of(rows: Tensor) -> Tensor:
    """Return balls [5, M] of rows [M, columns] of geometry: the mean, the largest log scale and the logit opacity."""
    return torch.stack([*rows[:, :3].unbind(1), rows[:, 3:6].amax(1), rows[:, 10]])


def boxes_of(rows: RowState, drift: Drift) -> Tensor:
    """Return boxes [8, blocks] of M rows of geometry, of which the last block may lack some.

    They are the lowest and the highest mean, the largest log scale, and how far a mean drifts at most.

    Args:
        rows: float32 [M, columns] and pairs of moments.
        drift: What moments mean.
    """
    lacking = -len(rows.parameters) % BLOCK_ROWS
    per_ratio = drift.per_ratio[:, None] if isinstance(drift.per_ratio, Tensor) else drift.per_ratio
    geometry = torch.cat([rows.parameters[:, :6], per_ratio * _ratios(rows, drift.largest_ratio)], dim=1)
    if lacking:
        geometry = torch.cat([geometry, geometry[-1:].expand(lacking, -1)])
    blocks = geometry.view(-1, BLOCK_ROWS, geometry.shape[1])
    means, scales, drifts = blocks[..., :3], blocks[..., 3:6], blocks[..., 6:]
    largest = (scales.amax((1, 2))[:, None], drifts.amax((1, 2))[:, None])
    return torch.cat([means.amin(1), means.amax(1), *largest], dim=1).T


def _ratios(rows: RowState, largest: float) -> Tensor:
    """Return |m| / sqrt(v) of means, [M, 3]; NaN where one of them is not finite."""
    m, v = unpack(rows.moments[0][:, :3])
    ratios = m.abs() / v.sqrt().clamp(min=SMALLEST_ROOT)
    return ratios.clamp(max=largest) + (m - m) + (v - v)


def follow_balls(balls: Tensor, ids: Tensor, rows: Tensor) -> None:
    """Make balls [5, N] anew of Gaussians [V], whose geometry is rows [V, columns]."""
    balls[:, ids] = balls_of(rows)


def follow_boxes(boxes: Tensor, ids: Tensor, rows: RowState, drift: Drift) -> None:
    """Make boxes [8, blocks] anew of Gaussians [V], which are whole blocks and had their last step at one time."""
    if len(ids):
        boxes[:, ids[::BLOCK_ROWS] // BLOCK_ROWS] = boxes_of(rows, drift)


def visible_boxes(boxes: Tensor, cameras: Cameras, margin: Margin) -> Tensor:
    """Find the blocks of which any of the cameras may draw some rows; on a GPU this waits for the device.

    A block of which any number is not finite is found, since nothing is known of it.

    Args:
        boxes: float32 [8, blocks] of `boxes_of`.
        cameras: The pictures to be drawn.
        margin: How much rows may still move.

    Returns:
        Sorted int64 [blocks that are found], where the boxes are.
    """
    low, high, scales, drifts = boxes[:3], boxes[3:6], boxes[6].exp(), boxes[7]
    centres, reach = (low + high) / 2, (high - low) / 2  # [3, blocks]
    largest = boxes[:6].abs().amax(0)
    drawn = torch.zeros(boxes.shape[1], dtype=torch.bool, device=boxes.device)
    for largest_translation, move, drifting, *numbers in tests_of(cameras, margin).tolist():
        error = move + drifting * drifts + 2 * native.POSITION_ERROR * (3 * largest + largest_translation)
        misses = torch.zeros_like(drawn)
        for first in range(0, len(numbers), 6):
            nx, ny, nz, offset, scale_reach, error_reach = numbers[first : first + 6]
            value = centres[0] * nx + centres[1] * ny + centres[2] * nz
            value += reach[0] * abs(nx) + reach[1] * abs(ny) + reach[2] * abs(nz)
            misses |= value + scales * scale_reach + offset + error_reach * error < 0
        drawn |= ~misses
    return drawn.nonzero().squeeze(1)


def tests_of(cameras: Cameras, margin: Margin) -> np.ndarray:
    """Return what boxes are tested by, float32 [C, 3 + 36]: three numbers of means' errors, and six half-spaces."""
    packed = pack(cameras, margin)
    half_spaces = np.empty((len(packed), NUM_HALF_SPACES, 6))
    native.half_spaces(packed, half_spaces)
    errors = packed[:, [native.CAMERA_FIELDS[name] for name in ("largest_translation", "move")]]
    length = np.sqrt(3.0) * margin.drift_correction  # of what moves so far along each axis
    drifting = np.full((len(packed), 1), length, np.float32)
    return np.concatenate([errors, drifting, half_spaces.reshape(len(packed), -1).astype(np.float32)], axis=1)
