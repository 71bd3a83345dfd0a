"""Boxes around blocks of consecutive Gaussians, by which a device culls rows that it does not hold.

In Morton order a block is small. A view gets whole blocks, more rows than it needs by those along its border: of V rows
about 7 sqrt(64 V), a few percent of a million (`tests/test_bounds.py`). So boxes take half a byte a Gaussian, blocks
cross the link in one piece, and since all rows of a block are stepped together its box can be made anew each time, and
never grows too large.

Stored rows lag behind by the steps that they have skipped, whose sum is bound by the moments after the last one
(`bounds.Drift`). A box has the largest of its rows, where a margin for all boxes would be that of the worst gradients
there can be: of a city of 100 million Gaussians a small view took a third more than it needed for that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch import Tensor

from offload.backends import kernels_for
from offload.culling.bounds import BLOCK_ROWS, Drift, boxes_of
from offload.culling.cameras import Cameras, Margin
from offload.store.growth import Growth
from offload.store.layout import RowState


class Boxes:
    """Holds a box around the means of each block of 64 Gaussians, their largest scale, and how far means drift."""

    BYTES = 8 * 4 / BLOCK_ROWS  # of a Gaussian
    know_drifts: ClassVar[bool] = True  # so that margins need not allow for it, and rows have moments

    def __init__(self, device: torch.device) -> None:
        """
        Args:
            device: Where they are.
        """
        self._device = device
        self._kernels = kernels_for(device, "offload.culling.bounds")
        self._num_rows = 0
        self._boxes = torch.empty(8, 0, device=device)  # low x, y, z; high x, y, z; the largest log scale; drift

    def rebuild(self, num_rows: int, rows: Iterator[tuple[RowState, Drift]]) -> None:
        """Take the geometry of all Gaussians.

        Args:
            num_rows: N.
            rows: All rows in order, on the device, some at a time: whole blocks, but for the last; and how far their
                means drift.
        """
        self._num_rows = num_rows
        self._boxes = torch.empty(8, -(-num_rows // BLOCK_ROWS), device=self._device)
        first = 0
        for some in rows:
            boxes = boxes_of(*some)
            self._boxes[:, first : first + boxes.shape[1]] = boxes
            first += boxes.shape[1]

    def follow(self, ids: Tensor, values: Tensor, moments: Callable[[], Tensor], drift: Drift) -> None:
        """Take new geometry of Gaussians, which are whole blocks.

        Args:
            ids: int64 [V], sorted.
            values: [V, columns].
            moments: Gives pairs of them, int32 [V, words].
            drift: How far means drift from there.
        """
        self._kernels.follow_boxes(self._boxes, ids, RowState(values, (moments(),)), drift)

    def visible_ids(self, cameras: Cameras, margin: Margin) -> Tensor:
        """Find the sorted ids, int64 [V], of blocks of which cameras may draw some after moving as far as the margin.

        It waits for the device.
        """
        return self._rows_of(self._kernels.visible_boxes(self._boxes, cameras, margin))

    def whole(self, ids: Tensor) -> Tensor:
        """Return the ids of all rows of the blocks that rows [V] are of, sorted."""
        return self._rows_of((ids // BLOCK_ROWS).unique())

    def growth(self, num_new: int) -> dict[torch.device, Growth]:
        """Count the bytes of memory that so many Gaussians more take: all stand twice while they are made anew."""
        return {self._boxes.device: Growth(math.ceil(self.BYTES * num_new), self._boxes.nbytes)}

    def _rows_of(self, blocks: Tensor) -> Tensor:
        """Return the ids of the rows of blocks, sorted as these are."""
        ids = (blocks[:, None] * BLOCK_ROWS + torch.arange(BLOCK_ROWS, device=self._device)).view(-1)
        beyond = -self._num_rows % BLOCK_ROWS  # rows that the last block lacks
        if beyond and len(blocks) and int(blocks[-1]) == self._num_rows // BLOCK_ROWS:
            ids = ids[:-beyond]
        return ids
