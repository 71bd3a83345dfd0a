"""What devices compute with balls and boxes in their memory; here in torch.

`offload/culling/bounds_triton.py` has the same functions for CUDA, one kernel each: where views are small, launching is
what takes time. To find rows by balls is `visible_balls` of `offload/culling/kernels.py`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from offload.backends import native
from offload.culling.cameras import Cameras, Margin, pack

BLOCK_ROWS = 64  # of a box
NUM_HALF_SPACES = 6  # of a camera's view, six numbers each


def balls_of(rows: Tensor) -> Tensor:
    """Return balls [5, M] of rows [M, columns] of geometry: the mean, the largest log scale and the logit opacity."""
    return torch.stack([*rows[:, :3].unbind(1), rows[:, 3:6].amax(1), rows[:, 10]])


def boxes_of(rows: Tensor) -> Tensor:
    """Return boxes [7, blocks] of rows [M, columns] of geometry, of which the last block may lack some.

    They are the lowest and the highest mean and the largest log scale.
    """
    lacking = -len(rows) % BLOCK_ROWS
    geometry = rows[:, :6]
    if lacking:
        geometry = torch.cat([geometry, geometry[-1:].expand(lacking, -1)])
    blocks = geometry.view(-1, BLOCK_ROWS, 6)
    means = blocks[..., :3]
    return torch.cat([means.amin(1), means.amax(1), blocks[..., 3:].amax((1, 2))[:, None]], dim=1).T


def follow_balls(balls: Tensor, ids: Tensor, rows: Tensor) -> None:
    """Make balls [5, N] anew of Gaussians [V], whose geometry is rows [V, columns]."""
    balls[:, ids] = balls_of(rows)


def follow_boxes(boxes: Tensor, ids: Tensor, rows: Tensor) -> None:
    """Make boxes [7, blocks] anew of Gaussians [V], which are whole blocks and whose geometry is rows [V, columns]."""
    if len(ids):
        boxes[:, ids[::BLOCK_ROWS] // BLOCK_ROWS] = boxes_of(rows)


def visible_boxes(boxes: Tensor, cameras: Cameras, margin: Margin) -> Tensor:
    """Find the blocks of which any of the cameras may draw some rows; on a GPU this waits for the device.

    A block of which any number is not finite is found, since nothing is known of it.

    Args:
        boxes: float32 [7, blocks] of `boxes_of`.
        cameras: The pictures to be drawn.
        margin: How much rows may still move.

    Returns:
        Sorted int64 [blocks that are found], where the boxes are.
    """
    low, high, scales = boxes[:3], boxes[3:6], boxes[6].exp()
    centres, reach = (low + high) / 2, (high - low) / 2  # [3, blocks]
    largest = boxes[:6].abs().amax(0)
    drawn = torch.zeros(boxes.shape[1], dtype=torch.bool, device=boxes.device)
    for largest_translation, move, *numbers in tests_of(cameras, margin).tolist():
        error = move + 2 * native.POSITION_ERROR * (3 * largest + largest_translation)  # no dimension
        misses = torch.zeros_like(drawn)
        for first in range(0, len(numbers), 6):
            nx, ny, nz, offset, scale_reach, error_reach = numbers[first : first + 6]
            value = centres[0] * nx + centres[1] * ny + centres[2] * nz
            value += reach[0] * abs(nx) + reach[1] * abs(ny) + reach[2] * abs(nz)
            misses |= value + scales * scale_reach + offset + error_reach * error < 0
        drawn |= ~misses
    return drawn.nonzero().squeeze(1)


def tests_of(cameras: Cameras, margin: Margin) -> np.ndarray:
    """Return what boxes are tested by, float32 [C, 2 + 36]: two numbers of the error of means, and six half-spaces."""
    packed = pack(cameras, margin)
    half_spaces = np.empty((len(packed), NUM_HALF_SPACES, 6))
    native.half_spaces(packed, half_spaces)
    errors = packed[:, [native.CAMERA_FIELDS[name] for name in ("largest_translation", "move")]]
    return np.concatenate([errors, half_spaces.reshape(len(packed), -1).astype(np.float32)], axis=1)
