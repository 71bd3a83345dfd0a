"""Boxes around blocks of consecutive Gaussians, by which a device culls rows that it does not hold.

In Morton order a block is small. A view gets whole blocks, more rows than it needs by those along its border: of V rows
about 7 sqrt(64 V), a few percent of a million (`tests/test_bounds.py`). So boxes take half a byte a Gaussian, blocks
cross the link in one piece, and since all rows of a block are stepped together its box can be made anew each time, and
never grows too large.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from offload.backends import native
from offload.culling.cameras import Cameras, Margin, pack

BLOCK_ROWS = 64


class Boxes:
    """Holds a box around the means of each block of 64 Gaussians, and their largest scale."""

    BYTES = 7 * 4 / BLOCK_ROWS  # of a Gaussian

    def __init__(self, device: torch.device) -> None:
        """
        Args:
            device: Where they are.
        """
        self._device = device
        self._num_rows = 0
        self._boxes = torch.empty(7, 0, device=device)  # low x, y, z; high x, y, z; the largest log scale

    def rebuild(self, num_rows: int, rows: Iterator[Tensor]) -> None:
        """Take the geometry of all Gaussians.

        Args:
            num_rows: N.
            rows: All rows [M, columns] in order, on the device, some at a time: whole blocks, but for the last.
        """
        self._num_rows = num_rows
        self._boxes = torch.empty(7, -(-num_rows // BLOCK_ROWS), device=self._device)
        first = 0
        for some in rows:
            boxes = _boxes_of(some)
            self._boxes[:, first : first + boxes.shape[1]] = boxes
            first += boxes.shape[1]

    def follow(self, ids: Tensor, rows: Tensor) -> None:
        """Take new geometry [V, columns] of Gaussians [V], which are whole blocks."""
        if len(ids):
            self._boxes[:, ids[::BLOCK_ROWS] // BLOCK_ROWS] = _boxes_of(rows)

    def visible_ids(self, cameras: Cameras, margin: Margin) -> Tensor:
        """Find the sorted ids, int64 [V], of blocks of which cameras may draw some after moving as far as the margin.

        It waits for the device.
        """
        low, high, scales = self._boxes[:3], self._boxes[3:6], self._boxes[6].exp()
        centres, reach = (low + high) / 2, (high - low) / 2  # [3, blocks]
        # A block of which any number is not finite is found, since nothing is known of it; it spoils no other one.
        drawn = torch.zeros(self._boxes.shape[1], dtype=torch.bool, device=self._device)
        packed = pack(cameras, margin)
        half_spaces = np.empty((len(packed), 6, 6))
        native.half_spaces(packed, half_spaces)
        largest = self._boxes[:6].abs().nan_to_num(0.0, posinf=0.0).amax() if len(drawn) else 0.0
        for camera, its_half_spaces in zip(packed, half_spaces, strict=True):
            largest_translation, move = (
                float(camera[native.CAMERA_FIELDS[name]]) for name in ("largest_translation", "move")
            )
            error = move + 2 * native.POSITION_ERROR * (3 * largest + largest_translation)  # no dimension
            misses = torch.zeros_like(drawn)
            for nx, ny, nz, offset, scale_reach, error_reach in its_half_spaces.tolist():
                value = centres[0] * nx + centres[1] * ny + centres[2] * nz
                value += reach[0] * abs(nx) + reach[1] * abs(ny) + reach[2] * abs(nz)
                misses |= value + scales * scale_reach + offset + error_reach * error < 0
            drawn |= ~misses
        return self._rows_of(drawn.nonzero().squeeze(1))

    def whole(self, ids: Tensor) -> Tensor:
        """Return the ids of all rows of the blocks that rows [V] are of, sorted."""
        return self._rows_of((ids // BLOCK_ROWS).unique())

    def _rows_of(self, blocks: Tensor) -> Tensor:
        """Return the ids of the rows of blocks, sorted as these are."""
        ids = (blocks[:, None] * BLOCK_ROWS + torch.arange(BLOCK_ROWS, device=self._device)).view(-1)
        beyond = -self._num_rows % BLOCK_ROWS  # rows that the last block lacks
        if beyond and len(blocks) and int(blocks[-1]) == self._num_rows // BLOCK_ROWS:
            ids = ids[:-beyond]
        return ids


def _boxes_of(rows: Tensor) -> Tensor:
    """Return boxes [7, blocks] of rows [M, columns] of geometry, of which the last block may lack some."""
    lacking = -len(rows) % BLOCK_ROWS
    geometry = rows[:, :6]
    if lacking:
        geometry = torch.cat([geometry, geometry[-1:].expand(lacking, -1)])
    blocks = geometry.view(-1, BLOCK_ROWS, 6)
    means = blocks[..., :3]
    return torch.cat([means.amin(1), means.amax(1), blocks[..., 3:].amax((1, 2))[:, None]], dim=1).T
