"""Rounds of tiles that several processes draw: what each takes where all Gaussians are held keeps the budget."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from errors import InputError
from offload.culling.cameras import Cameras
from offload.culling.cells import CoveredCells
from offload.tiles.boxes import CELL, SMALLEST, Box, Coverage, Tile, box_of
from offload.tiles.budget import (
    EXCHANGED_BYTES,
    HEADROOM,
    INTERSECTION_BYTES,
    PAIR_BYTES,
    PIXEL_BYTES,
    RENDERING_BYTES,
    MemoryBudget,
    RowBytes,
    RowLimit,
)
from offload.tiles.planner import TilePlanner
from offload.tiles.rounds import RoundPlanner
from tests.test_split_planning import HEIGHT, WIDTH, corners_of, count, rectangles_in_cells

SIZE, ROWS = 3, 20_000
ROW_BYTES = RowBytes.of("host", 3, together=SIZE)
CAMERAS = Cameras(torch.eye(4).repeat(SIZE, 1, 1), torch.eye(3).repeat(SIZE, 1, 1), WIDTH, HEIGHT)
CELLS = [rectangles_in_cells(ROWS, seed=camera) for camera in range(SIZE)]


class Geometry:
    """Rows that may draw in rectangles of cells, others in each camera."""

    num_gaussians = ROWS

    def visible_ids(self, cameras: Cameras) -> Tensor:
        return torch.arange(ROWS)

    def covered_cells(self, ids: Tensor, cameras: Cameras, *, halo: int, cell: int) -> list[CoveredCells]:
        return [CoveredCells(torch.from_numpy(cells), corners_of(cells)) for cells in CELLS]


class Empty:
    """Two other processes without Gaussians, which cut their pictures as this one does."""

    rank, size = 0, SIZE

    def any(self, flag: bool) -> bool:
        return flag

    def gather(self, value: Any) -> list[Any]:
        if isinstance(value, list):
            return [[tile._replace(camera=rank) for tile in value] for rank in range(SIZE)]
        return [value, *[(0, 0) if isinstance(value, tuple) else 0.0] * (SIZE - 1)]

    def total(self, values: Tensor) -> Tensor:
        return values


def rows_in(tile: Tile) -> np.ndarray:
    left, right, top, bottom = box_of(tile)
    first_x, end_x, first_y, end_y = CELLS[tile.camera]
    return ((first_x < right) & (end_x > left) & (first_y < bottom) & (end_y > top)).nonzero()[0]


def bytes_of(tiles: tuple[Tile, ...], following: tuple[Tile, ...], own: Coverage) -> float:
    """What the first process needs for a round, counted row by row; all rows are seen by each camera."""
    here, after = (np.unique(np.concatenate([rows_in(tile) for tile in each])) for each in (tiles, following))
    sent = sum(len(rows_in(tile)) for tile in tiles)
    box = Box(*box_of(tiles[0]))
    drawn, intersections = count(CELLS[0], box), int(own.intersections(box))
    return (
        ROW_BYTES.values * (2 * len(here) + len(after))
        + RENDERING_BYTES * len(here)
        + PAIR_BYTES * (SIZE - 1) * len(here)
        + EXCHANGED_BYTES * (sent + drawn)
        + INTERSECTION_BYTES * intersections
        + PIXEL_BYTES * int(own.pixels(box))
    )


@pytest.mark.parametrize("budget", [25_000_000, 35_000_000])
def test_rounds_keep_the_budget_of_whoever_holds_all_rows(budget):
    limit, own = MemoryBudget(budget, ROW_BYTES, ROWS), Coverage(corners_of(CELLS[0]), WIDTH, HEIGHT)
    view = RoundPlanner(limit, Geometry(), 5, Empty()).find(CAMERAS)
    assert view.refusal is None
    rounds = [part.tiles for part in view.tiles]
    peaks = [bytes_of(*pair, own) for pair in zip(rounds, rounds[1:] + rounds[:1], strict=True)]
    room = (1 - HEADROOM) * budget - ROW_BYTES.view * ROWS
    assert 0.4 * room < max(peaks) <= room + SIZE * ROW_BYTES.values  # counts of pairs as rows are rounded
    # Tiles that were cut as if each process held its part would not have.
    assert len(rounds) > len(limit.cut([own], ROWS, ROWS)[0]) > 1
    for part in view.tiles:
        expected = np.unique(np.concatenate([rows_in(tile) for tile in part.tiles]))
        assert np.array_equal(part.numbers().numpy(), expected)


def test_a_budget_that_is_named_suffices():
    refusal = RoundPlanner(MemoryBudget(5_000_000, ROW_BYTES, ROWS), Geometry(), 5, Empty()).find(CAMERAS).refusal
    assert isinstance(refusal, InputError)
    named = int(str(refusal).partition("at least ")[2].split()[0]) * 2**20
    for budget, suffices in ((named, True), (0.9 * named, False)):
        limit = MemoryBudget(int(budget), ROW_BYTES, ROWS)
        assert (RoundPlanner(limit, Geometry(), 5, Empty()).find(CAMERAS).refusal is None) == suffices


class Large(Geometry):
    """Rows that may draw everywhere."""

    def covered_cells(self, ids: Tensor, cameras: Cameras, *, halo: int, cell: int) -> list[CoveredCells]:
        cells = np.tile(np.array([[0], [-(-WIDTH // CELL)], [0], [-(-HEIGHT // CELL)]], np.int16), len(ids))
        return [CoveredCells(torch.from_numpy(cells), corners_of(cells))] * SIZE


@pytest.mark.parametrize("together", [False, True])
def test_where_memory_lacks_tiles_are_cut_by_pixels_if_no_cut_makes_rows_fewer(together):
    """Pixels and what is sorted take memory, too, which no number of rows bounds."""
    limit = RowLimit(1.0)
    planner = RoundPlanner(limit, Large(), 5, Empty()) if together else TilePlanner(limit, Large(), 5)
    view = planner.find(CAMERAS)
    (whole,) = parts = view.tiles
    assert whole.rows is None
    number = 0
    while len(parts) > number:
        number = len(parts)
        parts = [cut for part in parts for cut in planner.refine(CAMERAS, view, part)]
    tiles = [tile for part in parts for tile in part.tiles]
    assert sum(tile.width * tile.height for tile in tiles) == SIZE * WIDTH * HEIGHT
    assert all(min(tile[3:]) >= SMALLEST for tile in tiles)
    assert max(max(tile[3:]) for tile in tiles) < 2 * SMALLEST
    assert all(len(part.numbers()) == ROWS for part in parts)
