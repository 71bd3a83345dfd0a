"""In which cells of a grid over a picture rows may draw, by which views are cut into tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from offload.backends import kernels_for, native, num_threads
from offload.culling.cameras import Cameras, Margin, pack


@dataclass(frozen=True)
class CoveredCells:
    """Say in which square cells of a grid over one picture each row may draw.

    A row that draws in none ends in each direction before it begins. Cells are counted from the picture's corner.
    """

    cells: Tensor  # [4, V] int16: the first and the end along x, the first and the end along y
    corners: np.ndarray  # [2, 2, columns + 1, rows + 1] int64: rows that draw, by (first, end) along x and y

    @staticmethod
    def joined(parts: Sequence[CoveredCells]) -> CoveredCells:
        """Return the cells of rows of which these are parts, one after the other."""
        cells = torch.cat([part.cells for part in parts], dim=1)
        return CoveredCells(cells, np.sum([part.corners for part in parts], axis=0))

    def rows_in(self, boxes: Sequence[tuple[int, int, int, int]]) -> tuple[list[Tensor], Tensor]:
        """Find the rows that may draw in boxes of cells.

        Args:
            boxes: left, right, top and bottom of each, in cells; right and bottom not included.

        Returns:
            For each box int64 [T], ascending; and int64 [S], the rows that may draw in several of them.
        """
        return kernels_for(self.cells.device, "offload.culling.kernels").rows_in_boxes(self.cells, boxes)


def covered_cells(geometry: Tensor, ids: Tensor, cameras: Cameras, margin: Margin, cell: int) -> list[CoveredCells]:
    """Find where rows of geometry on the host may draw, for each camera, on the CPU, in parallel.

    Args:
        geometry: [N, 12] as for `offload.culling.native.BlockBounds`.
        ids: Sorted int64 [V], the rows to look at.
        cameras: The pictures.
        margin: How much the rows may still move; its pixels reach beyond the rows on every side.
        cell: Width and height of a cell in pixels.
    """
    if len(ids) and not 0 <= ids[0] <= ids[-1] < len(geometry):
        raise ValueError(f"ids reach from {ids[0]} to {ids[-1]}, but there are {len(geometry)} rows")
    found = []
    for camera in pack(cameras, margin):
        cells = torch.empty(4, len(ids), dtype=torch.int16)
        corners = np.empty((4, *(end + 1 for end in grid_of(cameras, cell))), np.int64)
        native.covered_cells(
            geometry.detach().numpy(), ids.numpy(), camera, cell, cells.numpy(), corners, num_threads()
        )
        found.append(CoveredCells(cells, corners.reshape(2, 2, *corners.shape[1:])))
    return found


def grid_of(cameras: Cameras, cell: int) -> tuple[int, int]:
    """Count the columns and rows of cells that cover a picture."""
    return -(-cameras.width // cell), -(-cameras.height // cell)
