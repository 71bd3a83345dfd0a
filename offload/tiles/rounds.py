"""Finds the tiles that several processes draw together, round after round, where each holds a part of the Gaussians.

A view has W B cameras, of which each of the W processes draws B. Each cuts its own pictures, by counts of the Gaussians
of all. In round k everybody draws its k-th tile, and all bring those of their rows that any tile of the round needs. So
a tile bounds the pairs that come to who draws it; and of the rows of W tiles a process brings its own part, which is
about one tile's worth. What a round takes at each process is known before it is drawn; where it would be more than a
budget allows anywhere, all cut finer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from offload.culling.cameras import Cameras
from offload.culling.cells import CoveredCells
from offload.culling.visible import to_host
from offload.errors import MemoryParameterError
from offload.tiles.boxes import Box, Coverage, Tile, box_of
from offload.tiles.budget import Load, MemoryBudget, RowLimit, mebibytes
from offload.tiles.planner import CulledGeometry, TiledRows, TilePlanner, TileRows

T = TypeVar("T")
SHARES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.15, 0.08, 0.0)  # of the limit that tiles are tried with, until they fit


class Others(Protocol):
    """Speaks with the processes that hold the other Gaussians; all of them call each method at once."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set at some process."""

    def gather(self, value: T) -> list[T]:
        """Return the values of all; small ones."""

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over all processes of a tensor on the host."""


@contextmanager
def lacking_together(others: Others | None) -> Iterator[None]:
    """Let what one process lacks device memory for be out of memory at all; each of them comes here.

    Args:
        others: None: there is this process only.

    Raises:
        OutOfMemoryError: At every process.
    """
    failure: torch.cuda.OutOfMemoryError | None = None
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        failure = error
    if failure is not None and others is None:
        raise failure
    if others is not None and others.any(failure is not None):
        raise failure or torch.cuda.OutOfMemoryError("Device memory ran out at another rank.")


class RoundPlanner(TilePlanner):
    """Splits views that exceed a limit at any process into rounds, of which each process draws a tile or none.

    All processes make each plan at once, by one thread. What one of them lacks memory for is planned by none.
    """

    def __init__(self, limit: RowLimit | MemoryBudget, geometry: CulledGeometry, halo: int, others: Others) -> None:
        """
        Args:
            limit: How large a tile may be, or what a round may take here; of the same kind everywhere.
            geometry: The Gaussians held here.
            halo: Pixels around a tile that are rendered with it.
            others: Who holds the others.
        """
        super().__init__(limit, geometry, halo)
        self._together_by = limit
        self._others = others

    def find(self, cameras: Cameras) -> TiledRows:
        """Find the rows held here that cameras may draw after one more step, and the rounds to render them in.

        Args:
            cameras: Of the view, of all processes.
        """
        with lacking_together(self._others):
            ids = self._geometry.visible_ids(cameras)
            host_ids = to_host(ids)
        whole = TiledRows(ids, host_ids, [TileRows()])
        counts = self._others.gather((len(ids), self._geometry.num_gaussians))
        in_view, num_gaussians = (sum(count) for count in zip(*counts, strict=True))
        if not self._others.any(not self._allows_whole(cameras, len(ids), in_view, num_gaussians)):
            return whole
        with lacking_together(self._others):
            cells, local = self._look(cameras, ids)
        own = self._of_all(cameras, local)
        for share in SHARES:
            boxes = self._together_by.cut(own, len(ids), num_gaussians, share)
            with lacking_together(self._others):
                rounds, loads = self._rounds(cameras, boxes, own, cells)
            if not self._others.any(not self._together_by.allows_together(loads, len(ids))):
                return whole if len(rounds) == 1 else TiledRows(ids, host_ids, rounds)
        refusal = None
        if isinstance(self._together_by, MemoryBudget):
            least = mebibytes(max(self._others.gather(self._together_by.needs_together(loads, len(ids)))))
            refusal = MemoryParameterError(
                f"{{device_memory_budget}} is too small for the views of a step, which {self._others.size} ranks draw "
                f"of {in_view:,} Gaussians, however they are split: give it at least {least}.",
                {"device_memory_budget": least},
            )
        return TiledRows(ids, host_ids, rounds, refusal=refusal)

    def refine(self, cameras: Cameras, view: TiledRows, tile: TileRows) -> list[TileRows]:
        """Cut the tiles of a round at all processes; as `TilePlanner.refine`."""
        with lacking_together(self._others):
            cells, local = self._look(cameras, view.of_tile(tile).ids)
        own, first = self._of_all(cameras, local), self._first(cameras)
        boxes: list[list[Box]] = []
        for camera, coverage in enumerate(own, start=first):
            given = [coverage.everything] if not tile.tiles else [box_of(t) for t in tile.tiles if t.camera == camera]
            boxes.append([finer for box in given for finer in self._together_by.refine(coverage, box)])
        with lacking_together(self._others):
            rounds, _ = self._rounds(cameras, boxes, own, cells)
        return [part.within(tile) for part in rounds]

    # --------------------------------------------------------------------------------------------------- inside

    def _first(self, cameras: Cameras) -> int:
        """Return the first of the cameras that are drawn here."""
        return self._others.rank * (len(cameras.Ks) // self._others.size)

    def _allows_whole(self, cameras: Cameras, num_here: int, in_view: int, num_gaussians: int) -> bool:
        """Tell whether a view may be rendered whole, wherever its rows are: with 16 cells met by each."""
        limit, num_cameras = self._together_by, len(cameras.Ks)
        own = num_cameras // self._others.size
        pixels = own * cameras.width * cameras.height
        if isinstance(limit, RowLimit):
            return limit.allows(in_view, pixels, num_gaussians)
        made, drawn = num_cameras * num_here, own * in_view
        return limit.allows_together([Load(num_here, made, made, drawn, 16 * drawn, pixels)], num_here)

    def _of_all(self, cameras: Cameras, local: Sequence[Coverage]) -> list[Coverage]:
        """Return what the cameras drawn here see of the rows of all processes."""
        counts = self._others.total(torch.stack([torch.from_numpy(coverage.corners) for coverage in local]))
        first = self._first(cameras)
        own = counts[first : first + len(local) // self._others.size].numpy()
        return [Coverage(corners, cameras.width, cameras.height) for corners in own]

    def _rounds(
        self,
        cameras: Cameras,
        boxes: Sequence[Sequence[Box]],
        own: Sequence[Coverage],
        cells: Sequence[CoveredCells],
    ) -> tuple[list[TileRows], list[Load]]:
        """Put the tiles of all processes into rounds.

        Args:
            cameras: Of the view.
            boxes: Of each camera drawn here.
            own: What these cameras see.
            cells: Where rows held here may draw, in all cameras.

        Returns:
            The rounds, with the rows held here that each needs, and what each takes here.
        """
        first = self._first(cameras)
        drawn = [
            (coverage.tile(camera, box), coverage, box)
            for camera, (coverage, its_boxes) in enumerate(zip(own, boxes, strict=True), start=first)
            for box in its_boxes
        ]
        everyone = self._others.gather([tile for tile, _, _ in drawn])  # [W] lists
        rounds = [[tile for tile in tiles if tile is not None] for tiles in zip_longest(*everyone)]
        chosen = _rows_of_tiles(cells, everyone)
        seen = [(c.cells[0] < c.cells[1]) & (c.cells[2] < c.cells[3]) for c in cells]  # [V] each, by camera
        parts = []
        for number, tiles in enumerate(rounds):
            rows = torch.cat([chosen[tile] for tile in tiles])
            sent, rows = len(rows), rows.unique()
            made = sum(int(seen[tile.camera][rows].sum()) for tile in tiles)
            counts = (0, 0, 0)
            if number < len(drawn):
                _, coverage, box = drawn[number]
                counts = (int(coverage.rows(box)), int(coverage.intersections(box)), int(coverage.pixels(box)))
            parts.append(TileRows(tuple(tiles), rows, to_host(rows), Load(len(rows), made, sent, *counts)))
        return parts, [part.load for part in parts if part.load is not None]


def _rows_of_tiles(cells: Sequence[CoveredCells], everyone: Sequence[Sequence[Tile]]) -> dict[Tile, Tensor]:
    """Return the rows held here that may draw in each tile, int64, ascending.

    Args:
        cells: Where rows may draw, by camera.
        everyone: The tiles of each process.
    """
    chosen: dict[Tile, Tensor] = {}
    tiles = [tile for each in everyone for tile in each]
    for camera, covered in enumerate(cells):
        its_tiles = [tile for tile in tiles if tile.camera == camera]
        if its_tiles:
            rows, _ = covered.rows_in([box_of(tile) for tile in its_tiles])
            chosen.update(zip(its_tiles, rows, strict=True))
    return chosen
