"""Balls and boxes, by which a device culls rows that it does not hold, against culling of whole rows."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from benchmarks.aerial_scene import aerial_scene
from offload.adam import rows as row_kernels
from offload.adam.bfloat16 import pack, unpack
from offload.adam.options import AdamOptions
from offload.culling import bounds, kernels
from offload.culling.balls import Balls, BallsOfStore
from offload.culling.boxes import BLOCK_ROWS, Boxes
from offload.culling.cameras import Cameras, Margin
from offload.culling.margins import drift_after
from offload.culling.native import BlockBounds, visible_ids
from offload.models import geometry_culled
from offload.models.geometry_culled import CulledGeometry
from offload.pipelines import groups
from offload.pipelines.lanes import Lane
from offload.store.device_store import DeviceStore
from offload.store.host_store import HostStore
from offload.store.layout import RowState
from tests.aerial_training import views_of
from tests.test_culling import interpreted_block, named_geometry, random_cameras, random_geometry
from tests.triton_places import INTERPRETED, NEEDS, TRITON_DEVICE

CPU = torch.device("cpu")
BOUNDS = {"balls": Balls, "boxes": Boxes}
COUNTS = (0, 1, 63, 64, 65, 1000, 3001)
DRIFT = bounds.Drift(per_ratio=0.004, largest_ratio=7.5)
MARGIN = Margin(means=0.02, scales=0.01, quats=0.01, opacities=0.1)
MARGIN_OF_SCENE = Margin(means=1e-4, scales=0.01, quats=0.002, opacities=0.1)


def with_moments(rows: Tensor, seed: int = 0, share: float = 1.0) -> RowState:
    """Rows [M, columns] of which some have moments, up to a share of what they may be, and some have none yet."""
    generator = torch.Generator().manual_seed(seed + len(rows))
    v = torch.rand(rows.shape, generator=generator) ** 8
    ratio = share * DRIFT.largest_ratio * torch.rand(rows.shape, generator=generator).sub(0.5).mul(2) ** 3
    kept = torch.rand(len(rows), 1, generator=generator) < 0.7
    random = torch.zeros(rows.shape, dtype=torch.int64)
    return RowState(rows, (pack(kept * 0.99 * ratio * v.sqrt(), kept * v, random),))


def with_largest_moments(rows: Tensor) -> RowState:
    """Rows [M, columns] of which the first moments are as large as they may be."""
    m, v = torch.full_like(rows, DRIFT.largest_ratio), torch.ones_like(rows)
    return RowState(rows, (pack(m, v, torch.zeros(rows.shape, dtype=torch.int64)),))


def with_moments_that_are_not_finite(rows: RowState) -> RowState:
    """Of each axis the first and the second one, infinite and no number, each in a block of its own."""
    words = rows.moments[0].clone()
    for number, (axis, bits, shift) in enumerate(product(range(3), (0x7F80, 0x7FC0), (0, 16))):
        row = BLOCK_ROWS * number
        words[row, axis] = words[row, axis] & (0xFFFF << 16 - shift) | bits << shift
    return RowState(rows.parameters, (words,))


def bounds_of(kind: str, rows: Tensor | RowState, some: int = 640, drift: bounds.Drift | None = None) -> Balls | Boxes:
    """Bounds of rows [N, 12], which come in parts; without moments their means drift as far as any."""
    bounds, state = BOUNDS[kind](CPU), rows if isinstance(rows, RowState) else with_largest_moments(rows)
    count = len(state.parameters)
    bounds.rebuild(count, ((state[first : first + some], drift or DRIFT) for first in range(0, count, some)))
    return bounds


def exact(rows: Tensor, cameras: Cameras, margin: Margin) -> Tensor:
    return visible_ids(rows, BlockBounds(rows), cameras, margin)


@pytest.mark.parametrize("margin", [Margin(), MARGIN], ids=["at rest", "moving"])
@pytest.mark.parametrize("kind", BOUNDS)
def test_what_exact_culling_finds_is_found(kind, margin):
    num_found = 0
    for seed, n in enumerate(COUNTS):
        for offset in (0.0, 1e3):
            rows = random_geometry(n, seed, offset=offset) if n else torch.zeros(0, 12)
            bounds = bounds_of(kind, rows)
            for view in range(4):
                options = {"count": 1 + view % 3, "fov": (20, 60, 100, 5)[view], "antialiased": view == 2}
                cameras = random_cameras(10 * seed + view, offset=offset, inside=view != 1, **options)
                found, drawn = bounds.visible_ids(cameras, margin), exact(rows, cameras, margin)
                assert found.dtype == torch.int64
                assert bool((found[1:] > found[:-1]).all())
                assert bool(((found >= 0) & (found < n)).all())
                assert torch.isin(drawn, found).all()
                num_found += len(drawn)
    assert num_found > 3000


@pytest.mark.parametrize("kind", BOUNDS)
def test_what_just_touches_the_picture_is_found(kind):
    """Rows that exact culling finds, and would not find a hair further away."""
    rows = random_geometry(4000, seed=3, median_scale=0.2, spread=0.2)
    for view in range(3):
        cameras = random_cameras(view, count=1)
        drawn = exact(rows, cameras, Margin())
        moved = rows.clone()
        low, high = torch.zeros(len(drawn), 1), torch.full((len(drawn), 1), 20.0)
        away = torch.nn.functional.normalize(torch.randn(len(drawn), 3, generator=torch.Generator().manual_seed(view)))
        for _ in range(24):  # halves the way to where each leaves the picture
            middle = (low + high) / 2
            moved[drawn, :3] = rows[drawn, :3] + middle * away
            seen = torch.isin(drawn, exact(moved, cameras, Margin()))[:, None]
            low, high = torch.where(seen, middle, low), torch.where(seen, high, middle)
        moved[drawn, :3] = rows[drawn, :3] + low * away
        still = exact(moved, cameras, Margin())
        assert len(still) > 0.9 * len(drawn) > 50
        alone = moved.repeat_interleave(BLOCK_ROWS, dim=0)  # each with a block of its own
        assert torch.isin(BLOCK_ROWS * still, bounds_of(kind, alone).visible_ids(cameras, Margin())).all()


@pytest.mark.parametrize("kind", BOUNDS)
def test_rows_that_move_by_the_margin_are_found_where_they_were(kind):
    generator = torch.Generator().manual_seed(0)
    rows = random_geometry(2000, seed=1)
    bounds = bounds_of(kind, rows)
    for view in range(6):
        cameras, moved = random_cameras(view), rows.clone()
        for columns, most in ((slice(0, 3), 0.02), (slice(3, 6), 0.01), (slice(6, 10), 0.01), (slice(10, 11), 0.1)):
            moved[:, columns] += most * torch.randn(rows[:, columns].shape, generator=generator).sign()
        assert torch.isin(exact(moved, cameras, Margin()), bounds.visible_ids(cameras, MARGIN)).all()


@pytest.mark.parametrize("along", ["axes", "diagonals"])
def test_rows_that_drift_by_their_moments_are_found_where_they_were(along):
    """Each in a block of its own, so that a box is as small as a row; one without moments is found as ever."""
    generator, correction, missed = torch.Generator().manual_seed(0), 0.7, 0
    rows = random_geometry(3000, seed=1, median_scale=1e-3, spread=0.2)
    state = with_moments(rows)
    if along == "diagonals":  # farther than along any axis
        has_moments = state.moments[0][:, :1] != 0
        state = RowState(rows, (with_largest_moments(rows).moments[0] * has_moments,))
    m, v = unpack(state.moments[0][:, :3])
    assert bool((v == 0).any(dim=1).any())
    ratio = torch.where(v > 0, m.abs() / v.sqrt(), 0.0)
    alone = RowState(*(tensor.repeat_interleave(BLOCK_ROWS, dim=0) for tensor in (rows, state.moments[0])))
    drift = replace(DRIFT, per_ratio=0.2)
    boxes = bounds_of("boxes", RowState(alone.parameters, (alone.moments,)), drift=drift)
    for view in range(8):
        cameras, moved = random_cameras(view), rows.clone()
        moved[:, :3] += correction * drift.per_ratio * ratio * torch.randn(3000, 3, generator=generator).sign()
        drawn = BLOCK_ROWS * exact(moved, cameras, Margin())
        assert torch.isin(drawn, boxes.visible_ids(cameras, Margin(drift_correction=correction))).all()
        missed += int((~torch.isin(drawn, boxes.visible_ids(cameras, Margin()))).sum())
        still = (v == 0).all(dim=1).nonzero()[:, 0]
        found = torch.isin(BLOCK_ROWS * still, boxes.visible_ids(cameras, Margin(drift_correction=correction)))
        assert torch.equal(found, torch.isin(BLOCK_ROWS * still, boxes.visible_ids(cameras, Margin())))
    assert missed > 20


def test_a_first_moment_without_a_second_drifts_no_farther_than_any():
    m, v = torch.full((1, 12), 1e-20), torch.zeros(1, 12)
    state = RowState(torch.zeros(1, 12), (pack(m, v, torch.zeros(1, 12, dtype=torch.int64)),))
    assert bounds.boxes_of(state, DRIFT)[7].item() == pytest.approx(DRIFT.per_ratio * DRIFT.largest_ratio)


def test_chunks_of_rows_are_whole_blocks():
    assert Boxes(CPU)._boxes.shape[0] * 4 == Boxes.BYTES * BLOCK_ROWS
    assert groups.CHUNK_ROWS % BLOCK_ROWS == geometry_culled.COPIED_STATES % BLOCK_ROWS == 0


def test_blocks_are_found_whole():
    for n in (1, 63, 64, 65, 1000):
        boxes = bounds_of("boxes", random_geometry(n, seed=n))
        last = torch.arange(n)[-(n % BLOCK_ROWS or BLOCK_ROWS) :]
        assert torch.equal(boxes.whole(torch.tensor([n - 1])), last)
        assert torch.equal(boxes.whole(torch.arange(n - 1, -1, -3).flip(0)), torch.arange(n))
        assert len(boxes.whole(torch.zeros(0, dtype=torch.int64))) == 0
        found = boxes.visible_ids(random_cameras(n), MARGIN)
        assert torch.equal(boxes.whole(found), found)


@pytest.mark.parametrize("kind", BOUNDS)
def test_bounds_that_follow_rows_are_those_made_anew(kind):
    generator = torch.Generator().manual_seed(0)
    for n in (1, 64, 100, 1000):
        state = with_moments(torch.cat([random_geometry(n, seed=n), torch.zeros(n, 4)], dim=1))  # rows are wider
        bounds = bounds_of(kind, state)
        for share in (0.3, 0.0, 1.0):
            ids = bounds.whole((torch.rand(n, generator=generator) < share).nonzero()[:, 0])
            state.parameters[ids] += torch.randn(len(ids), 16, generator=generator)
            state.moments[0][ids] = with_moments(state.parameters[ids]).moments[0]
            moments = state.moments[0][ids]
            bounds.follow(ids, state.parameters[ids], moments.clone, DRIFT)
            anew = bounds_of(kind, state)
            for cameras in (random_cameras(n), random_cameras(n + 1)):
                assert torch.equal(bounds.visible_ids(cameras, MARGIN), anew.visible_ids(cameras, MARGIN))
            stored, expected = (vars(some)[f"_{kind}"] for some in (bounds, anew))
            assert torch.equal(stored, expected)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e30])
def test_a_row_that_is_not_finite_hides_no_other(number):
    """Nor does a scale of which the exponential is infinite; blocks without such rows are culled as before."""
    rows = random_geometry(1000, seed=2)
    before = bounds_of("boxes", rows)
    for column in (0, 4):
        spoiled = rows.clone()
        spoiled[500, column] = number
        for seed in range(4):
            cameras = random_cameras(seed)
            drawn = exact(rows, cameras, Margin())
            for kind in BOUNDS:
                found = bounds_of(kind, spoiled).visible_ids(cameras, Margin())
                assert torch.isin(drawn[drawn != 500], found).all()
            if number != 1e30 or column == 4:
                whole = torch.cat([before.visible_ids(cameras, Margin()), torch.tensor([500])])
                assert torch.equal(found, before.whole(whole))


@pytest.mark.slow
@pytest.mark.parametrize("place", [pytest.param(TRITON_DEVICE, marks=NEEDS)])
def test_kernels_find_what_torch_finds(place):
    from offload.culling import bounds_triton, kernels_triton

    for seed, n in enumerate((0, 1, 300, 3001)):
        if INTERPRETED:
            kernels_triton.BLOCK = interpreted_block(n)
        rows = random_geometry(n, seed) if n else torch.zeros(0, 12)
        balls = vars(bounds_of("balls", rows))["_balls"]
        for view in range(3):
            cameras = random_cameras(view, count=1 + view % 2)
            expected = kernels.visible_balls(balls, cameras, MARGIN)
            found = kernels_triton.visible_balls(balls.to(place), cameras, MARGIN).cpu()
            # Each rounds in its own order, and allows for that: few rows lie between.
            assert torch.isin(exact(rows, cameras, MARGIN), found).all()
            differing = len(found) + len(expected) - 2 * int(torch.isin(found, expected).sum())
            assert differing <= 0.002 * len(expected)

            for words in (32, 28):
                wide = torch.cat([rows[:, :11], torch.full((n, words - 11), torch.nan)], dim=1)  # which are not taken
                ids = kernels.visible_rows(wide[:, : words // 2], cameras, MARGIN)
                assert torch.equal(ids, expected)
                ids = kernels_triton.visible_rows(wide.to(place)[:, : words // 2], cameras, MARGIN)
                assert torch.equal(ids.cpu(), found)

            boxes = vars(bounds_of("boxes", rows))["_boxes"]
            found = bounds_triton.visible_boxes(boxes.to(place), cameras, MARGIN).cpu()
            expected = bounds.visible_boxes(boxes, cameras, MARGIN)
            assert torch.isin(exact(rows, cameras, MARGIN) // BLOCK_ROWS, found).all()
            assert torch.equal(found, expected)  # with these seeds none is so close to the border


@pytest.mark.parametrize("place", [pytest.param(TRITON_DEVICE, marks=NEEDS)])
def test_kernels_allow_for_drifts_as_torch_does(place):
    from offload.culling import bounds_triton

    margin, more = replace(MARGIN, drift_correction=0.7), 0
    for seed in range(3):
        rows = random_geometry(3001, seed)
        rows = rows[rows[:, 0].argsort()]  # so that blocks are slices
        boxes = vars(bounds_of("boxes", with_moments(rows), drift=replace(DRIFT, per_ratio=0.2)))["_boxes"]
        for view in range(3):
            cameras = random_cameras(view, count=1 + view % 2, fov=15)
            found = bounds_triton.visible_boxes(boxes.to(place), cameras, margin).cpu()
            assert torch.equal(found, bounds.visible_boxes(boxes, cameras, margin))
            more += len(found) - len(bounds.visible_boxes(boxes, cameras, MARGIN))
    assert more > 0


def arguments_of(kind: str, rows: RowState) -> tuple[Tensor] | tuple[RowState, bounds.Drift]:
    return (rows.parameters,) if kind == "balls" else (rows, DRIFT)


@pytest.mark.parametrize("place", [pytest.param(TRITON_DEVICE, marks=NEEDS)])
def test_kernels_follow_rows_as_torch_does(place):
    """Also rows that are not finite, of which a box knows nothing and a ball the number itself."""
    from offload.culling import bounds_triton

    for n in (1, 64, 100, 1000):
        before, after = random_geometry(n, seed=n), random_geometry(n, seed=n + 1)
        if n == 1000:
            after[500, 0], after[700, 4] = float("nan"), float("inf")
        rows = torch.cat([after, torch.zeros(n, 4)], dim=1)  # wider than what is taken
        for kind, share in product(BOUNDS, (0.4, 0.0, 1.0)):
            torch.manual_seed(n)
            some = bounds_of(kind, before)
            ids = some.whole((torch.rand(n) < share).nonzero()[:, 0])
            expected = vars(some)[f"_{kind}"]
            found = expected.clone().to(place)
            moved = with_moments(rows[ids], seed=n)
            if n == 1000 and share == 1.0:
                moved = with_moments_that_are_not_finite(moved)
            there = RowState(moved.parameters.to(place), tuple(moments.to(place) for moments in moved.moments))
            getattr(bounds, f"follow_{kind}")(expected, ids, *(arguments_of(kind, moved)))
            getattr(bounds_triton, f"follow_{kind}")(found, ids.to(place), *arguments_of(kind, there))
            finite = expected.isfinite()
            drifts = slice(7, 8)  # torch's roots on the CPU are good to a last place
            torch.testing.assert_close(found.cpu()[drifts], expected[drifts], rtol=1e-6, atol=0, equal_nan=True)
            found[drifts] = expected[drifts].to(place)
            assert torch.equal(found.cpu()[finite], expected[finite])
            assert not found.cpu()[~finite].isfinite().any()


@pytest.mark.parametrize("num_gaussians", [40_000, 400_000])
def test_little_is_found_in_excess_of_an_aerial_scene(num_gaussians):
    """In Morton order, of views from above: rows along the border of the picture, and blocks that they complete.

    A view of V rows is sqrt(V / 64) blocks wide, so boxes find a number of times sqrt(64 V) rows more: a share that
    falls with the size of the view.
    """
    parameters, cameras = aerial_scene(num_gaussians, seed=0)
    columns = [parameters[name].view(num_gaussians, -1) for name in ("means", "scales", "quats", "opacities")]
    rows = torch.cat([*columns, torch.zeros(num_gaussians, 1)], dim=1)
    balls, boxes = bounds_of("balls", rows, 6400), bounds_of("boxes", rows, 6400)
    for view in views_of(cameras)[:4]:
        drawn = len(exact(rows, view, MARGIN_OF_SCENE))
        assert drawn > 0.05 * num_gaussians
        assert len(balls.visible_ids(view, MARGIN_OF_SCENE)) < 1.05 * drawn
        assert len(boxes.visible_ids(view, MARGIN_OF_SCENE)) < drawn + 9 * (BLOCK_ROWS * drawn) ** 0.5


def test_the_device_reads_stored_values_itself(monkeypatch):
    """All of them, and those of some rows, several at a time."""
    monkeypatch.setattr(geometry_culled, "COPIED_ROWS", 2 * BLOCK_ROWS)
    monkeypatch.setattr(HostStore, "device", torch.device("meta"))  # as if rendering were elsewhere
    rows, ids = random_geometry(1000, seed=5), torch.randint(1000, (300,))
    parameters = named_geometry(rows)
    colours = {"sh0": torch.randn(1000, 1, 3), "shN": torch.zeros(1000, 15, 3)}
    store = HostStore(parameters | colours, "geometry", state="compact")
    store.rows.moments[0].fill_(1)
    adam = AdamOptions(dict.fromkeys(parameters | colours, 1e-3), lambda step: 1e-3, (0.9, 0.999))
    geometry = CulledGeometry(store, adam, Balls(CPU), device=CPU)
    for name, values in parameters.items():
        assert torch.equal(geometry.read(name), values)
        assert torch.equal(geometry.read(name, ids), values[ids])
        assert geometry.read(name, ids[:0]).shape == values[:0].shape


def test_what_the_device_reads_has_come_before_rows_may_change(monkeypatch):
    """The host changes rows of a store by itself, and waits for nothing that the device may still read of them."""
    monkeypatch.setattr(HostStore, "device", torch.device("meta"))
    rows, events = random_geometry(100, seed=5), list[str]()
    parameters = named_geometry(rows)
    parameters |= {"sh0": torch.randn(100, 1, 3), "shN": torch.zeros(100, 15, 3)}
    store = HostStore(parameters, "geometry", state="compact")
    adam = AdamOptions(dict.fromkeys(parameters, 1e-3), lambda step: 1e-3, (0.9, 0.999))
    geometry, move_rows = CulledGeometry(store, adam, Balls(CPU), device=CPU), row_kernels.move_rows
    monkeypatch.setattr(row_kernels, "move_rows", lambda *rows: events.append("begun") or move_rows(*rows))
    monkeypatch.setattr(Lane, "finish", lambda lane: events.append("done"))
    geometry.read("opacities")
    geometry.read("means", torch.tensor([3, 1]))
    assert events == ["begun", "done"] * 2


@pytest.mark.cuda
def test_what_a_gpu_has_read_is_what_stood_there_before_rows_changed():
    torch.manual_seed(0)
    n, device = 2_000_000, torch.device("cuda")
    shapes = {"means": (3,), "scales": (3,), "quats": (4,), "opacities": (), "sh0": (1, 3), "shN": (0, 3)}
    parameters = {name: torch.randn(n, *shape) for name, shape in shapes.items()}
    store = HostStore(parameters, "geometry", state="compact", pin=True)
    adam = AdamOptions(dict.fromkeys(parameters, 1e-3), lambda step: 1e-3, (0.9, 0.999))
    geometry = CulledGeometry(store, adam, Balls(device), device=device)
    read = geometry.read("opacities")
    geometry.clamp_opacities(-10.0)
    assert torch.equal(read.cpu(), parameters["opacities"])


RATES = dict.fromkeys(("means", "scales", "quats", "opacities", "sh0", "shN"), 1e-3)


def store_of_geometry(place: str) -> HostStore | DeviceStore:
    """1,000 rows, with moments."""
    rows = random_geometry(1000, seed=5, median_scale=1e-3)
    parameters = named_geometry(rows)
    parameters |= {"sh0": torch.randn(1000, 1, 3), "shN": torch.zeros(1000, 15, 3)}
    if place == "host":
        store = HostStore(parameters, "geometry", state="compact", max_gaussians=2000)
    else:
        store = DeviceStore(parameters, "geometry", state="compact", device=CPU)
    store.rows.moments[0].copy_(with_moments(store.rows.parameters, share=0.02).moments[0])
    return store


@pytest.mark.parametrize("store", ["host", "device"])
def test_boxes_of_a_store_know_when_each_row_had_its_last_step(monkeypatch, store):
    """Rows come in several parts, and each has its own time."""
    monkeypatch.setattr(geometry_culled, "COPIED_STATES", 3 * BLOCK_ROWS)
    rows_of, boxes = store_of_geometry(store), Boxes(CPU)
    adam = AdamOptions(RATES, lambda step: 1e-3 * 0.9**step, (0.9, 0.999))
    geometry = CulledGeometry(rows_of, adam, boxes, device=CPU)
    rows_of.last_step.copy_(torch.arange(1000) // BLOCK_ROWS % 9 + 1)
    geometry.steps_done = 9
    geometry.visible_ids(random_cameras(0))
    expected = []
    for first in range(0, 1000, BLOCK_ROWS):
        block, last_step = rows_of.rows[first : first + BLOCK_ROWS], int(rows_of.last_step[first])
        expected.append(bounds.boxes_of(block, drift_after(adam, last_step - 1)))
    torch.testing.assert_close(vars(boxes)["_boxes"], torch.cat(expected, dim=1), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("kind", "store"), [*product(BOUNDS, ("host", "device")), pytest.param("balls", "its own", id="balls of the store")]
)
def test_geometry_that_travels_is_culled_by_its_store(monkeypatch, kind, store):
    """Bounds are made of the stored rows in several parts, follow steps, and are made anew after rows have changed."""
    monkeypatch.setattr(geometry_culled, "COPIED_ROWS", 2 * BLOCK_ROWS)
    monkeypatch.setattr(geometry_culled, "COPIED_STATES", 3 * BLOCK_ROWS)
    rows_of = store_of_geometry(store)
    adam = AdamOptions({**RATES, "means": 0.05}, lambda step: 0.05, (0.9, 0.999))
    its_bounds = BallsOfStore(rows_of) if store == "its own" else BOUNDS[kind](CPU)
    geometry = CulledGeometry(rows_of, adam, its_bounds, device=CPU)
    assert geometry._margin().means > 0
    numbers_found = set[int]()

    def assert_culled() -> None:
        stored = rows_of.rows.parameters[:, :12].clone()
        stored[:, 11] = 0
        margin = geometry._margin(know_drifts=kind == "boxes")
        assert (margin.drift_correction > 0) == (kind == "boxes")
        for seed in range(6):
            cameras = random_cameras(seed, count=1, fov=20)
            state = RowState(stored, rows_of.rows.moments)
            expected = bounds_of(kind, state, drift=drift_after(adam, 0)).visible_ids(cameras, margin)
            assert torch.equal(geometry.visible_ids(cameras), expected)
            numbers_found.add(len(expected))

    assert_culled()
    ids = geometry.whole(torch.arange(100, 300))
    values = torch.zeros(len(ids), 16)
    values[:, :14] = rows_of.rows.parameters[ids, :14] + torch.randn(len(ids), 14)
    state = with_moments(values, seed=9, share=0.02)
    with rows_of.changing(ids) as changed:
        columns = changed.parameters.shape[1]  # which are 14 on the device
        changed.parameters[ids], changed.moments[0][ids] = values[:, :columns], state.moments[0][:, :columns]
    geometry.follow(ids, state.parameters, lambda: state.moments[0])
    assert_culled()
    away = Cameras(torch.eye(4)[None], 1e3 * torch.eye(3)[None], 4, 4, near_plane=1e5)
    geometry.expect_strays(torch.tensor([3, 970]))
    assert torch.equal(geometry.visible_ids(away), geometry.whole(torch.tensor([3, 970])))
    geometry.expect_strays(None)
    assert len(geometry.visible_ids(away)) == 0
    geometry.catch_up(None)
    geometry.append_copies(torch.arange(70))
    assert_culled()
    geometry.catch_up(None)
    geometry.keep(torch.arange(0, 1070, 2))
    assert_culled()
    geometry.truncate(100)
    assert_culled()
    assert len(numbers_found) > 8
