"""Finds the tiles that a view is rendered in, and the rows that each of them needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from offload.culling.cameras import Cameras
from offload.culling.cells import CoveredCells
from offload.culling.visible import VisibleRows, to_host
from offload.errors import ParameterError
from offload.tiles.boxes import CELL, Box, Coverage, Tile, box_of
from offload.tiles.budget import Load, MemoryBudget, RowLimit


@dataclass
class TileRows:
    """Name the rows of a view that are rendered together."""

    # What they draw: all pictures of the view where nothing is named; else one tile or, where several processes draw at
    # once, at most one of each.
    tiles: tuple[Tile, ...] = ()
    rows: Tensor | None = None  # [T] int64, ascending: which of the view's rows they are; None: all
    host_rows: Tensor | None = None  # [T] the same on the host
    load: Load | None = None  # what several processes have planned that they take here; None: not known

    def numbers(self) -> Tensor:
        """Return which of the view's rows they are, [T] on the host, where they are not all."""
        if self.host_rows is None:
            raise RuntimeError("The view is rendered whole.")
        return self.host_rows

    def within(self, tile: TileRows) -> TileRows:
        """Return the same rows of the view, where these count from those of another tile."""
        if tile.rows is None:
            return self
        return TileRows(self.tiles, tile.rows[self.rows], tile.numbers()[self.numbers()], self.load)


@dataclass
class TiledRows(VisibleRows):
    """Name the rows that a view needs, and those of each tile it is rendered in."""

    tiles: list[TileRows]
    shared: Tensor | None = None  # [S] int64 on the host: rows that several tiles have; None: to be counted
    refusal: ParameterError | None = None  # why these may be shown but not trained, since they are above the limit

    def of_tile(self, tile: TileRows) -> VisibleRows:
        """Return the rows [T] of a tile."""
        if tile.rows is None:
            return self
        return VisibleRows(self.ids[tile.rows], self.host_ids[tile.host_rows])


class CulledGeometry(Protocol):
    """Knows where Gaussians are."""

    @property
    def num_gaussians(self) -> int: ...

    def visible_ids(self, cameras: Cameras) -> Tensor:
        """Return the sorted ids [V] of what cameras may draw after one more step."""

    def covered_cells(self, ids: Tensor, cameras: Cameras, *, halo: int, cell: int) -> list[CoveredCells]:
        """Find for each camera the cells of so many pixels that rows [V] may draw in, or so many pixels beside."""


class TilePlanner:
    """Splits views that exceed a limit into tiles; see `offload/tiles/boxes.py`.

    Plans are made from the present geometry whenever a view is found, in one pass over its rows and only where it may
    exceed the limit; so nothing has to be renewed when densification has changed the scene.
    """

    def __init__(self, limit: RowLimit | MemoryBudget | None, geometry: CulledGeometry, halo: int) -> None:
        """
        Args:
            limit: How large a tile may be; None: all views are rendered whole.
            geometry: The Gaussians.
            halo: Pixels around a tile that are rendered with it.
        """
        self._limit = limit
        self._geometry = geometry
        self._halo = halo

    def find(self, cameras: Cameras) -> TiledRows:
        """Find the rows that cameras may draw after one more step, and the tiles to render them in."""
        return self.plan(cameras, self._geometry.visible_ids(cameras))

    def plan(self, cameras: Cameras, ids: Tensor) -> TiledRows:
        """Find the tiles of a view that needs rows `ids` [V]; else as `find`."""
        host_ids, num_pixels = to_host(ids), len(cameras.Ks) * cameras.width * cameras.height
        num_gaussians = self._geometry.num_gaussians
        whole = TiledRows(ids, host_ids, [TileRows()])
        if self._limit is None or self._limit.allows(len(ids), num_pixels, num_gaussians):
            return whole
        cells, coverages = self._look(cameras, ids)
        try:
            plans, refusal = self._limit.plan(coverages, len(ids), num_gaussians), None
        except ParameterError as error:
            plans, refusal = self._limit.plan(coverages, len(ids), num_gaussians, must_fit=False), error
        if len(plans) == len(plans[0]) == 1:
            return replace(whole, refusal=refusal)
        tiles, shared = _tiles(plans, coverages, cells)
        return TiledRows(ids, host_ids, tiles, shared, refusal)

    def refine(self, cameras: Cameras, view: TiledRows, tile: TileRows) -> list[TileRows]:
        """Cut a tile that memory has not sufficed for, for each camera, as the limit's `refine` says.

        Returns:
            Tiles that together have its rows and pixels; or one alone, where it cannot be cut.
        """
        if self._limit is None:
            return [tile]
        cells, coverages = self._look(cameras, view.of_tile(tile).ids)
        plans: list[list[Box]] = []
        for camera, coverage in enumerate(coverages):
            boxes = [coverage.everything] if not tile.tiles else [box_of(t) for t in tile.tiles if t.camera == camera]
            plans.append([finer for box in boxes for finer in self._limit.refine(coverage, box)])
        finer, _ = _tiles(plans, coverages, cells)
        return [part.within(tile) for part in finer]

    def _look(self, cameras: Cameras, ids: Tensor) -> tuple[list[CoveredCells], list[Coverage]]:
        cells = self._geometry.covered_cells(ids, cameras, halo=self._halo, cell=CELL)
        return cells, [Coverage(covered.corners, cameras.width, cameras.height) for covered in cells]


def _tiles(
    plans: Sequence[Sequence[Box]], coverages: Sequence[Coverage], cells: Sequence[CoveredCells]
) -> tuple[list[TileRows], Tensor | None]:
    """Make a tile of each box of each camera, with the rows that may draw there.

    Returns:
        The tiles; and, where there is one camera, the rows that several of them have.
    """
    tiles: list[TileRows] = []
    for camera, (boxes, coverage, covered) in enumerate(zip(plans, coverages, cells, strict=True)):
        chosen, shared = covered.rows_in(boxes)
        for box, rows in zip(boxes, chosen, strict=True):
            tiles.append(TileRows((coverage.tile(camera, box),), rows, to_host(rows)))
    return tiles, to_host(shared) if len(cells) == 1 else None
