"""Cuts pictures that see too many Gaussians into tiles, which are rendered one after another.

The plan needs one pass over the visible Gaussians: it notes the rectangle of grid cells that each may draw in, and
counts how many rectangles have their corners where (offload/culling/cells.py). From prefix sums of these counts
follows how many rectangles meet any box of cells, by inclusion and exclusion:

    #(first < right, end > left)  =  #(first < right) - #(end <= left)        along x, and likewise along y,

so each cut that is tried costs a few additions, however many Gaussians there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

CELL = 16  # pixels; the rasterizer works on blocks of this size
SMALLEST = 64  # pixels; no tile is cut below this, in either direction
HALO = 5  # pixels around a tile that are rendered with it: half of the SSIM window (`rendering.ssim.WINDOW_SIZE`)

Numbers = Any  # a number, or a numpy array of them

# What a tile costs with so many rows, so often met by cells, on so many pixels.
Cost = Callable[[Numbers, Numbers, Numbers], Numbers]


class Tile(NamedTuple):
    """Names pixels x to x + width, y to y + height of one camera's picture."""

    camera: int
    x: int
    y: int
    width: int
    height: int

    def with_halo(self, halo: int, picture_width: int, picture_height: int) -> Tile:
        """Return the tile with so many pixels more on every side, as far as the picture reaches."""
        left, top = max(self.x - halo, 0), max(self.y - halo, 0)
        right = min(self.x + self.width + halo, picture_width)
        bottom = min(self.y + self.height + halo, picture_height)
        return Tile(self.camera, left, top, right - left, bottom - top)


class Box(NamedTuple):
    """Names cells left to right - 1, top to bottom - 1 of a picture's grid; arrays name several boxes."""

    left: Numbers
    right: Numbers
    top: Numbers
    bottom: Numbers


class Coverage:
    """Knows how many rows may draw in any box of cells of one picture."""

    def __init__(self, corners: np.ndarray, width: int, height: int) -> None:
        """
        Args:
            corners: [2, 2, columns + 1, rows + 1] of `offload.culling.cells.CoveredCells`.
            width, height: Of the picture, in pixels.
        """
        self.corners, self.width, self.height = corners, width, height
        # [2, 2, columns + 2, rows + 2]: rows whose (first, end) along x is below i and along y below j.
        self._below = np.pad(corners.cumsum(2).cumsum(3), ((0, 0), (0, 0), (1, 0), (1, 0)))
        columns, rows = corners.shape[2] - 1, corners.shape[3] - 1
        self.everything = Box(0, columns, 0, rows)
        left, top = np.meshgrid(np.arange(columns), np.arange(rows), indexing="ij")
        cells = self.rows(Box(left, left + 1, top, top + 1))  # [columns, rows]
        self._cells_below = np.pad(cells.cumsum(0).cumsum(1), ((1, 0), (1, 0)))

    def rows(self, box: Box) -> np.ndarray:
        """Count the rows that may draw in a box."""
        left, right, top, bottom = box
        below = self._below
        return (
            below[0, 0, right, bottom]
            - below[1, 0, left + 1, bottom]
            - below[0, 1, right, top + 1]
            + below[1, 1, left + 1, top + 1]
        )

    def intersections(self, box: Box) -> np.ndarray:
        """Count the pairs of a row and a cell of the box that it may draw in."""
        left, right, top, bottom = box
        below = self._cells_below
        return below[right, bottom] - below[left, bottom] - below[right, top] + below[left, top]

    def pixels(self, box: Box) -> np.ndarray:
        """Count the pixels in a box, with the halo but for what that loses at the picture's border."""
        width = np.minimum(box.right * CELL, self.width) - np.multiply(box.left, CELL)
        height = np.minimum(box.bottom * CELL, self.height) - np.multiply(box.top, CELL)
        return (width + 2 * HALO) * (height + 2 * HALO)

    def tile(self, camera: int, box: Box) -> Tile:
        """Return the pixels of a box."""
        left, top = int(box.left) * CELL, int(box.top) * CELL
        right, bottom = min(int(box.right) * CELL, self.width), min(int(box.bottom) * CELL, self.height)
        return Tile(camera, left, top, right - left, bottom - top)


def box_of(tile: Tile) -> Box:
    """Return the cells of a tile."""
    return Box(tile.x // CELL, -(-(tile.x + tile.width) // CELL), tile.y // CELL, -(-(tile.y + tile.height) // CELL))


def plan_boxes(coverage: Coverage, cost: Cost, limit: float, box: Box | None = None) -> list[Box]:
    """Cut a picture, or a box of it, until each box costs at most the limit.

    Each cut is the one, along either axis, whose dearer side is cheapest. A box stays above the limit where it has
    reached the smallest size, or where no cut makes its dearer side cheaper.

    Args:
        coverage: What the picture's cells see.
        cost: What is limited, for instance the number of rows.
        limit: The most that a box may cost.
        box: What to cut; None: everything.

    Returns:
        Boxes that divide it, neighbours near each other.
    """
    box = box or coverage.everything
    price = _price(coverage, cost, box)
    if price <= limit:
        return [box]
    halves = _best_cut(coverage, cost, box)
    if halves is None or max(_price(coverage, cost, half) for half in halves) >= price:
        return [box]
    return [smaller for half in halves for smaller in plan_boxes(coverage, cost, limit, half)]


def halved(coverage: Coverage, cost: Cost, box: Box) -> list[Box]:
    """Cut a box until each one costs half; as `plan_boxes`."""
    return plan_boxes(coverage, cost, _price(coverage, cost, box) / 2, box)


def _price(coverage: Coverage, cost: Cost, box: Box) -> Numbers:
    return cost(coverage.rows(box), coverage.intersections(box), coverage.pixels(box))


def _best_cut(coverage: Coverage, cost: Cost, box: Box) -> tuple[Box, Box] | None:
    """Return the halves of the box after its best cut; None where it is too small to be cut."""
    found = []
    for (low, high), size, names in zip(
        (box[:2], box[2:]), (coverage.width, coverage.height), (("right", "left"), ("bottom", "top")), strict=True
    ):
        last = (min(high * CELL, size) - SMALLEST) // CELL
        cuts = np.arange(low + SMALLEST // CELL, last + 1)
        if not len(cuts):
            continue
        sides = [box._replace(**{name: cuts}) for name in names]
        prices = np.stack([_price(coverage, cost, side) for side in sides])  # [2, cuts]
        # Of equals, the cut that divides fewer rows, and then the one nearest to the middle.
        off_middle = np.abs(2 * cuts - low - high)
        cut = np.lexsort((off_middle, prices.sum(0), prices.max(0)))[0]
        halves = box._replace(**{names[0]: int(cuts[cut])}), box._replace(**{names[1]: int(cuts[cut])})
        found.append((prices[:, cut].max(), prices[:, cut].sum(), low - high, halves))  # of equals the longer axis
    return min(found)[-1] if found else None
