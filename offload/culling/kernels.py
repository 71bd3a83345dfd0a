"""Culling of geometry in a device's own memory, whose rows lag behind; here on the CPU.

`offload/culling/kernels_triton.py` has the same functions for CUDA. What single rows are tested for is explained in
`offload/csrc/culling_kernels.cpp`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from offload.adam.deferral import DeferralTables
from offload.adam.geometry import COLUMNS, GeometryState, flat, gather_rows
from offload.backends import native, num_threads
from offload.culling import cells as grids
from offload.culling import native as rows_on_host
from offload.culling.cameras import Cameras, Margin, pack
from offload.culling.cells import CoveredCells

_CHUNK_ROWS = 1 << 22  # tested at once, with temporaries of about 24 bytes a row
_LOGIT_THRESHOLD = -math.log(254)  # logit of 1/255


@torch.no_grad()
def visible_ids(
    state: GeometryState, tables: DeferralTables, cameras: Cameras, margin: Margin, lag_margin: Margin
) -> Tensor:
    """Find the rows that any of the cameras may draw; on a GPU this waits for the device.

    A cheap test that allows for the lag of all rows leaves few, which are caught up and tested whole.

    Args:
        state: Geometry of N rows as it was after each row's last update.
        tables: Of the steps that rows have skipped.
        cameras: The pictures to be drawn.
        margin: How much rows may still move after step `tables.step`.
        lag_margin: How much they may move after their last update.

    Returns:
        Sorted int64 [V], where the geometry is.
    """
    means, scales, opacities = (state.parameters[name] for name in ("means", "scales", "opacities"))
    candidates = _reachable_ids(means, scales, opacities, pack(cameras, lag_margin))
    rows = _rows(gather_rows(state, candidates, tables)).cpu()
    drawn = rows_on_host.visible_ids(rows, rows_on_host.BlockBounds(rows), cameras, margin)
    return candidates[drawn.to(candidates.device)]


def visible_balls(balls: Tensor, cameras: Cameras, margin: Margin) -> Tensor:
    """Find the rows that any of the cameras may draw, from the ball around each; on a GPU this waits for the device.

    Some more than `visible_ids` finds: a row is taken for as large in every direction as in its largest, so it may pass
    beside the picture.

    Args:
        balls: float32 [5, N]: the three coordinates of means, the largest log scale and the logit opacity.
        cameras: The pictures to be drawn.
        margin: How much rows may still move.

    Returns:
        Sorted int64 [V], where the balls are.
    """
    means, log_scales, logits = balls[:3].T, balls[3][:, None], balls[4]
    return _reachable_ids(means, log_scales, logits, pack(cameras, margin))


def visible_rows(rows: Tensor, cameras: Cameras, margin: Margin) -> Tensor:
    """Do as `visible_balls`, of the balls around rows of geometry.

    Args:
        rows: float32 [N, columns]: means, log scales, quats, the logit opacity and others; the values of a row lie side
            by side.
        cameras, margin: As for `visible_balls`.
    """
    return _reachable_ids(rows[:, :3], rows[:, 3:6], rows[:, 10], pack(cameras, margin))


def covered_cells(parameters: Mapping[str, Tensor], cameras: Cameras, margin: Margin, cell: int) -> list[CoveredCells]:
    """Find where rows may draw, for each camera.

    Args:
        parameters: means [V, 3], log scales [V, 3], quats [V, 4] and logit opacities [V] of these rows.
        cameras: The pictures.
        margin: How much the rows may still move; its pixels reach beyond the rows on every side.
        cell: Width and height of a cell in pixels.
    """
    rows = _rows(parameters)
    return grids.covered_cells(rows, torch.arange(len(rows)), cameras, margin, cell)


def rows_in_boxes(cells: Tensor, boxes: Sequence[tuple[int, int, int, int]]) -> tuple[list[Tensor], Tensor]:
    """Find the rows that may draw in boxes of cells, as `CoveredCells.rows_in`.

    Args:
        cells: [4, V] int16 of `CoveredCells`.
        boxes: left, right, top and bottom of each, in cells.
    """
    edges = np.array(boxes, np.int32).reshape(-1, 4)
    counts = np.zeros((-(-cells.shape[1] // native.CHUNK_ROWS), len(boxes) + 1), np.int64)  # [chunks, boxes + 1]
    native.count_in_boxes(cells.numpy(), edges, counts, num_threads())
    ends = counts.T.cumsum().reshape(counts.T.shape)  # box after box, chunk after chunk
    rows = torch.empty(int(counts.sum()), dtype=torch.int64)
    offsets = np.ascontiguousarray((ends - counts.T).T)
    native.write_in_boxes(cells.numpy(), edges, offsets, rows.numpy(), num_threads())
    *chosen, shared = rows.split(counts.sum(0).tolist())
    return chosen, shared


def _rows(parameters: Mapping[str, Tensor]) -> Tensor:
    """Return rows [M, 12] as culling on the host takes them."""
    columns = [flat(parameters[name]) for name in COLUMNS]
    return torch.cat([*columns, columns[0].new_zeros(len(columns[0]), 1)], dim=1)


def _reachable_ids(means: Tensor, log_scales: Tensor, logits: Tensor, packed: np.ndarray) -> Tensor:
    """Find the rows whose ball of the largest scale may meet any camera's picture.

    Args:
        means: [N, 3].
        log_scales: [N, 3], or [N, 1] where only the largest is known.
        logits: [N] of the opacities.
        packed: Cameras [C, native.CAMERA_FLOATS], with the margin of rows that lag behind.

    Returns:
        Sorted int64 [M].
    """
    half_spaces = np.empty((len(packed), 6, 6))
    native.half_spaces(packed, half_spaces)
    near = torch.zeros(len(means), dtype=torch.bool, device=means.device)
    for first in range(0, len(means), _CHUNK_ROWS):
        part = slice(first, first + _CHUNK_ROWS)
        for camera, its_half_spaces in zip(packed, half_spaces, strict=True):
            near[part] |= _may_reach(camera, its_half_spaces, means[part], log_scales[part], logits[part])
    return near.nonzero().squeeze(1)


def _may_reach(
    camera: np.ndarray, half_spaces: np.ndarray, means: Tensor, log_scales: Tensor, logits: Tensor
) -> Tensor:
    """Say which rows [n] the camera may see, in few passes over memory."""
    largest_translation, move, logit_gain = (
        float(camera[native.CAMERA_FIELDS[name]]) for name in ("largest_translation", "move", "logit_gain")
    )
    mx, my, mz = (column.contiguous() for column in means.unbind(1))
    scale = log_scales.amax(1).exp()
    error = move + 2 * native.POSITION_ERROR * (3 * means.abs().amax() + largest_translation)  # no dimension
    misses = logits < _LOGIT_THRESHOLD - native.RELATIVE_ERROR - logit_gain
    for nx, ny, nz, offset, reach, error_reach in half_spaces.tolist():
        value = mx * nx
        value.add_(my, alpha=ny).add_(mz, alpha=nz).add_(scale, alpha=reach)
        misses |= value < -offset - error_reach * error
    return ~misses
