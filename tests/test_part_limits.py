"""The memory model of `MemoryBudget`: what it learns, what it refuses, and whether its plans keep the budget."""

from __future__ import annotations

import numpy as np
import pytest

from errors import InputError
from offload.tiles.boxes import Coverage, plan_boxes
from offload.tiles.budget import CALIBRATION_TILES, HEADROOM, MemoryBudget, RowBytes, RowLimit
from tests.test_split_planning import HEIGHT, WIDTH, corners_of, rectangles_in_cells

ROWS = RowBytes.of("device", 3)
TRUE = np.array([900.0, 40.0, 300.0])  # bytes per row, intersection and pixel


@pytest.fixture(scope="module")
def coverage() -> Coverage:
    return Coverage(corners_of(rectangles_in_cells(100_000, seed=0)), WIDTH, HEIGHT)


def test_rows_of_a_compact_state_have_sizes_of_their_own():
    """Values as they are rendered, and packed rows of geometry where these are on the device."""
    assert RowBytes.of("host", 3, "compact") == RowBytes(values=256, geometry=0, view=32, everywhere=0)
    assert RowBytes.of("device", 3, "compact") == RowBytes(values=192, geometry=128, view=88, everywhere=112 + 4 + 12)
    assert RowBytes.of("host", 3) == RowBytes(values=192 + 48, geometry=0, view=32, everywhere=0)


def calibrated(budget: int, *, excess: float = 1.0) -> MemoryBudget:
    """Having seen parts that take `excess` times what the true constants say."""
    limit = MemoryBudget(budget, ROWS, num_gaussians=1000)
    rng = np.random.default_rng(1)
    for _ in range(CALIBRATION_TILES):
        x = rng.uniform([1e4, 2e4, 1e4], [1e5, 5e5, 1e5])
        limit.observe(*x.astype(int).tolist(), grown=int(excess * TRUE @ x), peak=0)
    return limit


def test_constants_are_learned_from_the_first_parts():
    limit = calibrated(10**9)
    x = np.array([50_000, 300_000, 40_000])
    assert limit.is_calibrated
    predicted = limit.cost(*x) - ROWS.values * x[0]
    assert TRUE @ x <= predicted < 1.15 * (TRUE @ x)  # the factor covers the part that was predicted worst


def test_parts_that_look_alike_are_predicted_too():
    """All views see as much: no regression could tell rows from pixels."""
    limit = MemoryBudget(10**9, ROWS, num_gaussians=1000)
    for _ in range(CALIBRATION_TILES):
        limit.observe(50_000, 300_000, 40_000, grown=80_000_000, peak=0)
    assert limit.cost(50_000, 300_000, 40_000) - ROWS.values * 50_000 == pytest.approx(80_000_000, rel=0.02)
    assert limit.cost(25_000, 150_000, 20_000) - ROWS.values * 25_000 == pytest.approx(40_000_000, rel=0.02)


def test_a_part_that_takes_more_makes_later_ones_smaller(coverage):
    limit = calibrated(10**8)
    before = len(limit.plan([coverage], 100_000, 1000)[0])
    limit.observe(50_000, 300_000, 40_000, grown=int(1.5 * TRUE @ [50_000, 300_000, 40_000]), peak=0)
    assert limit.factor > 1.4
    after = limit.plan([coverage], 100_000, 1000)[0]
    assert len(after) > before
    for _ in range(300):  # is forgotten
        limit.observe(50_000, 300_000, 40_000, grown=int(TRUE @ [50_000, 300_000, 40_000]), peak=0)
    assert limit.factor < 1.1


def test_a_peak_above_the_budget_makes_later_parts_smaller():
    limit = calibrated(10**8)
    before = limit.factor
    limit.observe(50_000, 300_000, 40_000, grown=1, peak=10**8 + 1)
    assert limit.factor > 1.1 * before


@pytest.mark.parametrize("budget", [70_000_000, 90_000_000, 150_000_000])
def test_two_parts_at_a_time_keep_the_budget(coverage, budget):
    limit = calibrated(budget)
    limit.fixed = 5_000_000
    (boxes,) = limit.plan([coverage], 100_000, 1000)
    assert len(boxes) > 1
    assert not limit.allows(100_000, WIDTH * HEIGHT, 1000)
    rows = np.array([coverage.rows(box) for box in boxes])
    rendering = [TRUE @ [coverage.rows(b), coverage.intersections(b), coverage.pixels(b)] for b in boxes]
    peaks = limit.fixed + ROWS.view * 100_000 + ROWS.values * (rows + np.roll(rows, -1)) + rendering
    assert peaks.max() < budget
    assert peaks.max() > 0.4 * budget  # and it is used


def test_a_budget_that_no_tiles_can_keep_names_one_that_they_can(coverage):
    limit = calibrated(20_000_000)
    with pytest.raises(InputError, match="give it at least") as refused:
        limit.plan([coverage], 100_000, 1000)
    smallest = int(str(refused.value).partition("at least ")[2].split()[0])
    (boxes,) = calibrated(smallest * 2**20).plan([coverage], 100_000, 1000)
    assert boxes == plan_boxes(coverage, limit.cost, 0) or len(boxes) > 4
    assert len(limit.plan([coverage], 100_000, 1000, must_fit=False)[0]) > 4  # pictures that nobody trains on
    with pytest.raises(InputError):
        calibrated(int(0.9 * smallest) * 2**20).plan([coverage], 100_000, 1000)


def test_a_budget_below_the_geometry_is_refused():
    with pytest.raises(InputError, match="geometry of 1,000,000 Gaussians alone takes 150 MiB"):
        MemoryBudget(100_000_000, ROWS, num_gaussians=1_000_000)
    MemoryBudget(100_000_000, RowBytes.of("host", 3), num_gaussians=1_000_000)
    assert ROWS.everywhere * 1_000_000 / (1 - HEADROOM) < 150 * 2**20


@pytest.mark.parametrize("threshold", [0, -0.1, 1.001, float("nan")])
def test_thresholds_out_of_range(threshold):
    with pytest.raises(InputError, match="above 0 and at most 1"):
        RowLimit(threshold)
