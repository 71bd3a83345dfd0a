"""Plans of tiles: what they divide, how they balance, and that each tile has all rows that draw in it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from offload.culling import kernels
from offload.culling.cameras import Margin
from offload.culling.cells import CoveredCells, covered_cells
from offload.culling.strays import Strays
from offload.tiles.boxes import CELL, HALO, SMALLEST, Box, Coverage, box_of, plan_boxes
from rendering.rasterize import rasterize
from rendering.region import Region
from rendering.ssim import WINDOW_SIZE
from tests.oracles import culling as oracle
from tests.test_culling import COLUMNS, activated, interpreted_block, random_cameras, random_geometry
from tests.triton_places import INTERPRETED, NEEDS, TRITON_DEVICE

WIDTH, HEIGHT = 403, 299  # no multiples of anything
NO_MARGIN = Margin(pixels=HALO)
ROWS = lambda rows, intersections, pixels: rows  # noqa: E731


def test_the_halo_is_what_a_window_of_ssim_reaches():
    assert HALO == WINDOW_SIZE // 2  # two rooms that do not know each other


def rectangles_in_cells(count: int, seed: int, size: float = 1.5) -> np.ndarray:
    """first and end along x and y [4, count] of random rectangles on the grid, dense towards one corner."""
    rng = np.random.default_rng(seed)
    ends = np.array([-(-WIDTH // CELL), -(-HEIGHT // CELL)])
    middle = rng.random((count, 2)) ** 2 * ends
    half = size * rng.exponential(size=(count, 2))
    low = np.clip(np.floor(middle - half), 0, ends - 1)
    high = np.clip(np.ceil(middle + half), low + 1, ends)
    return np.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]]).astype(np.int16)


def corners_of(cells: np.ndarray) -> np.ndarray:
    corners = np.zeros((2, 2, -(-WIDTH // CELL) + 1, -(-HEIGHT // CELL) + 1), np.int64)
    for a in range(2):
        for b in range(2):
            np.add.at(corners[a, b], (cells[a], cells[2 + b]), 1)
    return corners


def count(cells: np.ndarray, box: Box) -> int:
    meets = (cells[0] < box.right) & (cells[1] > box.left) & (cells[2] < box.bottom) & (cells[3] > box.top)
    return int(meets.sum())


@pytest.fixture(scope="module")
def cells() -> np.ndarray:
    return rectangles_in_cells(4000, seed=0)


@pytest.fixture(scope="module")
def coverage(cells) -> Coverage:
    return Coverage(corners_of(cells), WIDTH, HEIGHT)


def test_strays_are_in_every_cell(cells):
    """Also those that draw in none where they lie."""
    hidden = cells.copy()
    ends = np.array([-(-WIDTH // CELL), -(-HEIGHT // CELL)])
    hidden[:, 5::50] = np.array([ends[0], 0, ends[1], 0])[:, None]
    drawn = hidden[0] < hidden[1]
    ids, strays = torch.arange(0, 8000, 2), Strays()
    strays.expect(torch.tensor([5, 6, 10, 402, 7998]))  # of which one is none of these rows
    covered = CoveredCells(torch.from_numpy(hidden), corners_of(hidden[:, drawn]))
    (everywhere,) = strays.everywhere([covered], ids)
    expected = hidden.copy()
    expected[:, [3, 5, 201, 3999]] = np.array([0, ends[0], 0, ends[1]])[:, None]
    assert np.array_equal(everywhere.cells.numpy(), expected)
    assert np.array_equal(everywhere.corners, corners_of(expected[:, expected[0] < expected[1]]))
    assert np.array_equal(covered.cells.numpy(), hidden)
    strays.expect(None)
    assert strays.everywhere([covered], ids) == [covered]


@pytest.mark.parametrize("count", [0, 1, 50])
def test_strays_are_joined_in_order(count):
    generator = torch.Generator().manual_seed(count)
    ids = torch.randperm(100, generator=generator)[:count].sort().values
    strays = Strays()
    assert strays.beside(ids) is ids
    for some in ([0], [99], [3, 4, 50], range(100)):
        strays.expect(torch.tensor([*some]))
        assert torch.equal(strays.beside(ids), torch.cat([ids, torch.tensor([*some])]).unique())


def test_counts_of_any_box(cells, coverage):
    rng = np.random.default_rng(1)
    for _ in range(200):
        left, right = np.sort(rng.choice(coverage.everything.right + 1, 2, replace=False))
        top, bottom = np.sort(rng.choice(coverage.everything.bottom + 1, 2, replace=False))
        box = Box(left, right, top, bottom)
        assert coverage.rows(box) == count(cells, box)
        pairs = (np.minimum(cells[1], right) - np.maximum(cells[0], left)).clip(0).astype(int)
        pairs = pairs * (np.minimum(cells[3], bottom) - np.maximum(cells[2], top)).clip(0)
        assert coverage.intersections(box) == pairs.sum()


@pytest.mark.parametrize("threshold", [1.0, 0.5, 0.3, 0.1, 0.02])
def test_tiles_divide_the_picture(cells, coverage, threshold):
    boxes = plan_boxes(coverage, ROWS, threshold * len(cells[0]))
    tiles = [coverage.tile(0, box) for box in boxes]
    covered = np.zeros((HEIGHT, WIDTH), int)
    for tile, box in zip(tiles, boxes, strict=True):
        covered[tile.y : tile.y + tile.height, tile.x : tile.x + tile.width] += 1
        assert tile.x % CELL == tile.y % CELL == 0
        assert min(tile.width, tile.height) >= SMALLEST
        assert box_of(tile) == box
        # Above the threshold only where it cannot be cut.
        at_end = tile.width < 2 * SMALLEST and tile.height < 2 * SMALLEST
        assert count(cells, box) <= threshold * len(cells[0]) or at_end
    assert (covered == 1).all()
    assert (len(tiles) == 1) == (threshold == 1)


def test_cuts_balance_the_count(cells, coverage):
    """Dense towards one corner, so that cuts through the middle of the picture would be far off."""
    first, second = plan_boxes(coverage, ROWS, 0.75 * len(cells[0]))
    assert max(count(cells, first), count(cells, second)) < 0.65 * len(cells[0])
    middle = coverage.everything._replace(right=coverage.everything.right // 2)
    assert count(cells, middle) > 0.72 * len(cells[0])
    ends = (("right", "left", coverage.everything.right), ("bottom", "top", coverage.everything.bottom))
    best = min(
        max(count(cells, coverage.everything._replace(**{name: cut})) for name in names)
        for *names, end in ends
        for cut in range(SMALLEST // CELL, end - SMALLEST // CELL)
    )
    assert max(count(cells, first), count(cells, second)) == best


def test_cuts_go_along_both_axes(cells, coverage):
    tiles = [coverage.tile(0, box) for box in plan_boxes(coverage, ROWS, 0.2 * len(cells[0]))]
    assert len({tile.x for tile in tiles}) > 1
    assert len({tile.y for tile in tiles}) > 1


def test_what_no_cut_makes_cheaper_is_not_cut():
    everywhere = np.tile(np.array([[0], [-(-WIDTH // CELL)], [0], [-(-HEIGHT // CELL)]], np.int16), 50)
    coverage = Coverage(corners_of(everywhere), WIDTH, HEIGHT)
    assert plan_boxes(coverage, ROWS, 10) == [coverage.everything]
    # but it is where pixels cost something
    assert len(plan_boxes(coverage, lambda rows, intersections, pixels: rows + pixels / 1000, 100)) > 1


@pytest.mark.parametrize(("width", "height"), [(127, 40), (11, 11), (1, 300)])
def test_tiny_pictures(width, height):
    corners = np.zeros((2, 2, -(-width // CELL) + 1, -(-height // CELL) + 1), np.int64)
    corners[0, :, 0, 0] = corners[1, :, -1, -1] = 100
    coverage = Coverage(corners, width, height)
    for box in plan_boxes(coverage, lambda rows, intersections, pixels: pixels, 0):
        tile = coverage.tile(3, box)
        assert tile.width >= min(width, SMALLEST)
        assert tile.height >= min(height, SMALLEST)


def test_halo_ends_at_the_border():
    coverage = Coverage(corners_of(rectangles_in_cells(10, 0)), WIDTH, HEIGHT)
    everything = coverage.tile(1, coverage.everything)
    assert everything == (1, 0, 0, WIDTH, HEIGHT)
    assert everything.with_halo(HALO, WIDTH, HEIGHT) == everything
    inner = coverage.tile(1, Box(4, 9, 0, 5))
    assert inner.with_halo(HALO, WIDTH, HEIGHT) == (1, 59, 0, 90, 85)


def large(cameras):
    """The same cameras with a picture of many cells."""
    Ks = cameras.Ks.clone()
    Ks[:, :2] *= 3
    return replace(cameras, Ks=Ks, width=3 * cameras.width, height=3 * cameras.height)


def native(rows, ids, cameras, margin) -> list[CoveredCells]:
    return covered_cells(rows, ids, cameras, margin, CELL)


def named(rows, device="cpu") -> dict:
    return {name: rows[:, columns].to(device) for name, columns in COLUMNS.items()}


def with_torch(rows, ids, cameras, margin) -> list[CoveredCells]:
    return oracle.covered_cells(**named(rows[ids]), cameras=cameras, margin=margin, cell=CELL)


def on_the_cpu(rows, ids, cameras, margin) -> list[CoveredCells]:
    return kernels.covered_cells(named(rows[ids]), cameras, margin, CELL)


def with_triton(rows, ids, cameras, margin) -> list[CoveredCells]:
    from offload.culling import kernels_triton as culling_triton

    if INTERPRETED:
        culling_triton.BLOCK = interpreted_block(len(ids))
    found = culling_triton.covered_cells(named(rows[ids], TRITON_DEVICE), cameras, margin, CELL)
    return [CoveredCells(covered.cells.cpu(), covered.corners) for covered in found]


TRITON = pytest.param(with_triton, marks=NEEDS)
ALL = pytest.mark.parametrize("find", [native, on_the_cpu, with_torch, TRITON])


@ALL
@pytest.mark.parametrize("antialiased", [False, True])
def test_each_tile_has_every_row_that_draws_in_it(find, antialiased):
    """Pixels of a tile and its halo, rendered with its rows only, are those of the whole picture."""
    rows = random_geometry(3000, seed=1, median_scale=0.05, spread=1.0)
    cameras = large(random_cameras(2, antialiased=antialiased, inside=False))
    ids = torch.arange(0, len(rows), 2)  # positions are not row numbers
    colors = torch.rand(len(rows), 3, generator=torch.Generator().manual_seed(3))
    mode = "antialiased" if antialiased else "classic"
    for camera, covered in enumerate(find(rows, ids, cameras, NO_MARGIN)):
        view = (cameras.viewmats[[camera]], cameras.Ks[[camera]], cameras.width, cameras.height)
        whole = rasterize(**activated(rows[ids]), colors=colors[ids], rasterize_mode=mode, **picture(view))[0]
        coverage = Coverage(covered.corners, cameras.width, cameras.height)
        boxes = plan_boxes(coverage, ROWS, 300)
        assert len(boxes) >= 4
        chosen, shared = covered.rows_in(boxes)
        assert torch.equal(shared, (torch.cat(chosen).bincount(minlength=len(ids)) > 1).nonzero().squeeze(1))
        for box, positions in zip(boxes, chosen, strict=True):
            assert len(positions) == coverage.rows(box) < len(ids)
            here = ids[positions]
            padded = coverage.tile(camera, box).with_halo(HALO, cameras.width, cameras.height)
            region = Region(*padded[1:])
            part = rasterize(
                **activated(rows[here]), colors=colors[here], rasterize_mode=mode, region=region, **picture(view)
            )[0]
            expected = whole[:, region.y : region.y + region.height, region.x : region.x + region.width]
            assert (part - expected).abs().max() < 1e-5


def picture(view: tuple) -> dict:
    return dict(zip(("viewmats", "Ks", "width", "height"), view, strict=True))


@ALL
def test_rows_that_move_within_the_margin_stay_in_their_cells(find):
    margin = Margin(means=0.02, scales=0.05, quats=0.02, opacities=0.1)
    rows = random_geometry(5000, seed=4, median_scale=0.05)
    rows[:, COLUMNS["quats"]] = torch.randn(len(rows), 4, generator=torch.Generator().manual_seed(5))
    cameras = large(random_cameras(6, count=1))
    ids = torch.arange(len(rows))
    (wide,) = find(rows, ids, cameras, margin)
    generator = torch.Generator().manual_seed(7)
    moved = rows.clone()
    for name, columns in COLUMNS.items():
        signs = torch.randint(0, 2, moved[:, columns].shape, generator=generator) * 2 - 1
        moved[:, columns] += getattr(margin, name) * signs
    (after,) = find(moved, ids, cameras, Margin())
    draws = after.cells[1] > 0
    assert draws.sum() > 500
    assert (wide.cells[0::2] <= after.cells[0::2])[:, draws].all()
    assert (wide.cells[1::2] >= after.cells[1::2])[:, draws].all()


@pytest.mark.parametrize("find", [on_the_cpu, with_torch, TRITON])
def test_all_ways_agree(find):
    rows = random_geometry(20_000, seed=8, median_scale=0.05, spread=1.5)
    rows[7, COLUMNS["scales"]] = 90
    cameras = large(random_cameras(9, count=2))
    ids = torch.arange(3, len(rows))
    for here, there in zip(native(rows, ids, cameras, NO_MARGIN), find(rows, ids, cameras, NO_MARGIN), strict=True):
        draws = (here.cells[1] > 0) & (there.cells[1] > 0)
        assert ((here.cells[1] > 0) != (there.cells[1] > 0)).sum() < 5  # by rounding
        assert (here.cells != there.cells)[:, draws].sum() < 20
        assert abs(here.corners - there.corners).sum() < 200


def test_rows_of_boxes_on_any_number_of_threads(cells, coverage, monkeypatch):
    """Also of more rows than a thread takes at once."""
    many = torch.from_numpy(np.tile(cells, 20))
    boxes = plan_boxes(coverage, ROWS, 0.3 * len(cells[0]))
    covered = CoveredCells(many, np.zeros(0))
    expected, expected_shared = oracle.rows_in_boxes(many, boxes)
    for threads in ("1", "3"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        chosen, shared = covered.rows_in(boxes)
        assert all(map(torch.equal, chosen, expected))
        assert torch.equal(shared, expected_shared)
        assert [len(rows) for rows in chosen] == [20 * count(cells, box) for box in boxes]


def test_a_nan_is_left_to_the_rasterizer():
    rows, cameras = random_geometry(10, seed=8), large(random_cameras(9, count=1))
    rows[5, COLUMNS["means"]] = float("nan")
    rows[5, COLUMNS["opacities"]] = 3
    (covered,) = native(rows, torch.arange(10), cameras, NO_MARGIN)
    assert covered.cells[:, 5].tolist() == [0, 17, 0, 12]


@ALL
def test_no_rows(find):
    rows, cameras = random_geometry(10, seed=10), large(random_cameras(11))
    for covered in find(rows, torch.zeros(0, dtype=torch.int64), cameras, NO_MARGIN):
        coverage = Coverage(covered.corners, cameras.width, cameras.height)
        assert plan_boxes(coverage, ROWS, 0) == [coverage.everything]
        (rows,), shared = covered.rows_in([coverage.everything])
        assert len(rows) == len(shared) == 0


def test_ids_out_of_range_are_refused():
    rows, cameras = random_geometry(10, seed=12), random_cameras(13)
    with pytest.raises(ValueError, match="rows"):
        native(rows, torch.tensor([3, 10]), cameras, NO_MARGIN)
