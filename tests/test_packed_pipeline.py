"""The lanes of the pipeline of packed rows: no order they allow, and no fault, changes a row."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from offload.adam import deferral
from offload.adam import rows as row_kernels
from offload.adam.deferral import DeferralTables
from offload.adam.harmonics import HarmonicsGradient
from offload.adam.options import AdamOptions
from offload.adam.schedules import schedules_of
from offload.adam.stored_harmonics import StoredHarmonics, StoredRows
from offload.pipelines import arena as arenas
from offload.pipelines import overlap, passing_rows, residents, rows_in_place
from offload.pipelines import packed as packed_pipeline
from offload.pipelines.arena import Arena
from offload.pipelines.groups import RowGroup
from offload.pipelines.packed import PackedPipeline
from offload.pipelines.resident import ResidentPipeline
from offload.store.device_store import DeviceStore
from offload.store.host_store import HostStore
from offload.store.layout import RowState
from tests.ordered_lanes import OrderedKernels, OrderedLanes, Race
from tests.test_streamed_pipeline import CPU, random_views
from tests.tight_rows import USED, same_rows
from training.checkpoint_writing import PartialCheckpoint
from training.checkpoints import Checkpoint, peek_checkpoint

BETAS, EPS, N = (0.9, 0.999), 1e-15, 40
GROUPS = ("geometry", "appearance")
RATES = {"means": 1e-2, "scales": 5e-3, "quats": 1e-3, "opacities": 5e-2, "sh0": 2.5e-3, "shN": 1e-3}
ADAM = AdamOptions(RATES, lambda step: RATES["means"] * 0.99**step, BETAS, EPS)
ROW_BYTES = 128 + 4 + 192 + 4


def start(n: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"means": (3,), "scales": (3,), "quats": (4,), "opacities": (), "sh0": (1, 3), "shN": (15, 3)}
    return {name: torch.randn(n, *shape, generator=generator) for name, shape in shapes.items()}


def groups_of(stores: dict[str, HostStore] | dict[str, DeviceStore], device: torch.device) -> dict[str, RowGroup]:
    groups = {}
    for name, store in stores.items():
        multipliers, rates = schedules_of(name, 3, ADAM, "compact")
        groups[name] = RowGroup(store, DeferralTables(multipliers, BETAS, EPS, device), rates)
    return groups


def whole(ids: Tensor) -> Tensor:
    return ids


def make_pipeline(
    n: int, cull: Callable[[int], Tensor], device: torch.device = CPU, resident_share: float = 0.0
) -> tuple[PackedPipeline, dict[str, RowGroup]]:
    """A pipeline whose cameras are numbers of views."""
    parameters, pin = start(n), device.type == "cuda"
    stores = {name: HostStore(parameters, name, state="compact", max_gaussians=n, pin=pin) for name in GROUPS}
    groups = groups_of(stores, device)
    return PackedPipeline(groups, cull, whole, device, resident_share), groups


class Training:
    """Steps with random gradients, and beside them those of rows that stay where they are, which must be bit-equal.

    Now and then the next view is not known in time. What culling reads on the device is written after each step. Every
    second view leaves harmonics as they are stored, and reads them when the next view is on its way, as backward does.
    """

    def __init__(self, views: list[Tensor], lanes: OrderedLanes | None = None, *, resident_share: float = 0.0) -> None:
        self.views, self.lanes = views, lanes
        self.bounds = torch.zeros(N)
        self.pipeline, self.groups = make_pipeline(N, self.cull, resident_share=resident_share)
        self.groups["geometry"].on_step = self.follow
        stores = {name: DeviceStore(start(N), name, state="compact", device=CPU) for name in GROUPS}
        self.resident = groups_of(stores, CPU)
        self.reference = ResidentPipeline(self.resident, views.__getitem__, CPU)
        for rows in self.reference._rows.values():
            rows._kernels = row_kernels  # whose order is not looked at
        self.steps = 0
        self.prefetches = lambda step: step % 7 < 5
        if lanes is not None:
            tensors = [
                tensor for group in self.groups.values() for tensor in (group.store.packed, group.store.last_step)
            ]
            lanes.on_host.update(tensor.untyped_storage().data_ptr() for tensor in tensors)

    def cull(self, index: int) -> Tensor:
        """Read bounds, wait for a number, as for that of visible rows, and work on with it."""
        (self.bounds > 0).nonzero()
        return self.views[index].clone()

    def follow(self, ids: Tensor, values: Tensor, moments: Callable[[], Tensor]) -> None:
        self.bounds[ids] = values[:, 0]

    def run(self, after: Callable[[int], None] = lambda step: None) -> None:
        for step in range(self.steps, len(self.views)):
            self.fetch_and_prefetch(step)
            self.update()
            after(step)

    def fetch_and_prefetch(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        gradients = {
            name: torch.randn(len(self.views[step]), group.adam.columns, generator=generator)
            for name, group in self.groups.items()
        }
        gradients["geometry"][:, USED:] = 0  # of columns without values, which rows on the device lack
        made = HarmonicsGradient(gradients["appearance"][:, :3], gradients["appearance"][:, 3:6], (0.0, 1.0, 2.0), 3)
        stored = current = self.made = None
        with self.noted():
            if step % 2:
                view, stored = self.pipeline.fetch_stored(step, "appearance")
            else:
                view = self.pipeline.fetch(step)
            if step + 1 < len(self.views) and self.prefetches(step):
                self.pipeline.prefetch(step + 1)
            geometry = self.pipeline.read_present("geometry")
            if stored is not None:
                current = self.values_of(stored, len(view.ids))
        assert torch.equal(view.ids, self.views[step])
        expected = self.reference.fetch(step)
        if current is not None:
            assert torch.equal(current, expected.values["appearance"])
            expected.values["appearance"].grad = made.dense(current.shape[1])
            self.made = made
        for name, leaf in view.values.items():
            assert torch.equal(geometry if name == "geometry" else leaf, expected.values[name])
            leaf.grad, expected.values[name].grad = gradients[name].clone(), gradients[name]
        self.view = view

    def values_of(self, stored: StoredRows, count: int) -> Tensor:
        """Read rows of harmonics [V, columns] as the kernel of colours does, in a view or on the host."""
        if stored.places is None:
            return stored.of(torch.arange(count))
        values, kernels = torch.empty(count, 48), packed_pipeline.kernels_for(CPU, "offload.adam.rows")
        out = RowState(values, ())
        kernels.fetch_rows(stored.rows, stored.places, stored.places, stored.last_step, None, out, stored.skipped)
        return values

    def update(self) -> None:
        with self.noted():
            self.pipeline.update(self.made)
        assert not self.view.values  # nothing of a view is kept
        self.view = None
        self.reference.update()
        self.steps += 1

    def noted(self):
        return NOTHING if self.lanes is None else self.lanes

    def assert_exact(self) -> None:
        with self.noted():
            self.pipeline.finish()
        assert_same_stores(self.groups, self.resident)


def assert_same_stores(groups: dict[str, RowGroup], resident: dict[str, RowGroup]) -> None:
    """Compare rows on the host with those of a device, bit for bit."""
    for name, group in groups.items():
        rows, there = group.store.packed, resident[name].store.packed.cpu()
        assert torch.equal(rows, there) if name == "appearance" else same_rows(rows, there)
        assert torch.equal(group.store.last_step, resident[name].store.last_step.cpu())


class Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


NOTHING = Nothing()


@pytest.fixture
def ordered(monkeypatch) -> Callable[..., OrderedLanes]:
    """Puts lanes in place that keep to the order, and cuts views into several parts."""

    def begin(
        left_out: tuple[str, int, int] | None = None, smallest_cut: int = 4, most_rows: int | None = None
    ) -> OrderedLanes:
        monkeypatch.setattr(
            Arena, "_most_rows", lambda self, count, caution=1: sys.maxsize if most_rows is None else most_rows
        )
        lanes = OrderedLanes(left_out)
        kernels = {"offload.adam.rows": OrderedKernels(lanes), "offload.pipelines.overlap": overlap}
        for module in (packed_pipeline, rows_in_place):
            monkeypatch.setattr(module, "kernels_for", lambda device, module: kernels[module])
        for module in (packed_pipeline, passing_rows):
            monkeypatch.setattr(module, "Lane", lanes)
        monkeypatch.setattr(
            passing_rows, "chunks_of", lambda count: [(first, min(first + 7, count)) for first in range(0, count, 7)]
        )
        monkeypatch.setattr(packed_pipeline, "SMALLEST_CUT", smallest_cut)
        monkeypatch.setattr(arenas, "ROOM", 0)  # for the largest view alone, so that many meet
        monkeypatch.setattr(deferral, "FIRST_CAPACITY", 64)  # little to note
        monkeypatch.setattr(residents, "FIRST_CHOICE", 3)
        monkeypatch.setattr(residents, "CHOICES", 5)
        return lanes

    return begin


def views_of_all_kinds(seed: int) -> list[Tensor]:
    """Also such as see nothing, and all; rows come back after one view, two, three and many."""
    torch.manual_seed(seed)
    views = random_views(N, 24)
    views[4] = views[5] = views[11] = torch.zeros(0, dtype=torch.int64)
    views[16] = torch.arange(N)
    return views


def train_in_order(lanes: OrderedLanes, seed: int, resident_share: float = 0.4) -> Training:
    """Train, with all that may be asked in between."""
    with lanes:
        training = Training(views_of_all_kinds(seed), lanes, resident_share=resident_share)

    third, few = torch.arange(0, N, 3), torch.arange(3)

    def in_between(step: int) -> None:
        with lanes:
            if step % 9 == 3:
                training.pipeline.finish()  # with a view on its way
                training.pipeline.finish()
            if step % 9 == 7:
                read = training.pipeline.read("appearance", torch.arange(N))
                training.groups["appearance"].store.last_step.clone()  # by the host
            if step == 18:
                training.pipeline.catch_up("geometry", third)
            if step == 20:
                training.pipeline.catch_up("appearance", None)
                training.pipeline.catch_up("appearance", few)  # which are
        if step % 9 == 7:
            assert torch.equal(read, training.reference.read("appearance", torch.arange(N)))
        if step == 18:
            training.reference.catch_up("geometry", third)
        if step == 20:
            training.reference.catch_up("appearance", None)

    training.run(in_between)
    training.assert_exact()
    return training


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "resident_share", "smallest_cut"), [(0, 0.0, 4), (0, 0.4, 4), (1, 0.4, 4), (0, 0.0, N), (1, 0.4, N)]
)
def test_every_order_of_the_lanes_gives_rows_that_stay_in_place(
    ordered, seed, resident_share, smallest_cut, monkeypatch
):
    lanes = ordered(smallest_cut=smallest_cut)
    late, lost = [], []
    read_late, find_on_host = PackedPipeline._read_late, packed_pipeline._find_on_host

    def noting_late(self: PackedPipeline, view, rows, present) -> None:
        late.append(rows.shared)
        read_late(self, view, rows, present)

    def noting_lost(common, overwritten: slice) -> None:
        places = common.places[common.nearby]
        lost.append(places[(places >= overwritten.start) & (places < overwritten.stop)])
        find_on_host(common, overwritten)

    monkeypatch.setattr(PackedPipeline, "_read_late", noting_late)
    monkeypatch.setattr(packed_pipeline, "_find_on_host", noting_lost)
    training = train_in_order(lanes, seed, resident_share)
    assert not lanes.refused
    assert torch.cat(late).any()
    moved = training.pipeline.rows_moved
    assert moved["rows_retained"] > 0
    if smallest_cut == N:  # all are small, and take nothing from the view before the last
        assert not lost
        assert training.pipeline._rows_kept == 0
    else:
        assert len(torch.cat(lost))
        assert training.pipeline._rows_kept > 0


@pytest.mark.slow
@pytest.mark.parametrize("resident_share", [0.0, 0.4])
@pytest.mark.parametrize("most_rows", [12, 25])
def test_every_order_gives_the_same_where_large_views_stay_on_the_host(ordered, most_rows, resident_share):
    lanes = ordered(most_rows=most_rows)
    training = train_in_order(lanes, 0, resident_share)
    assert not lanes.refused
    large = sum(len(view) for view in training.views if len(view) > most_rows)
    traffic = training.pipeline.counters().traffic
    assert traffic["rows_in_place"] == large > 0
    assert (traffic["rows_retained"] > 0) == (most_rows == 25)  # views beside each other


@pytest.mark.parametrize("prefetched", [True, False])
def test_a_view_of_one_chunk_that_stays_is_counted_in_order(ordered, prefetched):
    """One lane steps it; the other, which counts what views show, has to know of its ids all the same."""
    lanes = ordered(most_rows=4)
    with lanes:
        views = [ids(0, 1, 2), ids(4, 5, 6, 7, 8), ids(1, 2, 3, 4, 5, 6), ids(9)]
        training = Training(views, lanes, resident_share=0.4)
    training.prefetches = lambda step: prefetched
    training.run()
    training.assert_exact()


@pytest.mark.slow
def test_no_wait_can_be_left_out(ordered):
    """Each of them, left out once, is a race in one of four trainings of views that are cut, or two of small ones, or
    two where large ones stay on the host.

    Not so what is said of memory that is used: here the lane that made it always comes to know of it by other ways.
    """
    places = set()
    for smallest_cut, most_rows in ((4, None), (N, None), (4, 12), (4, 2)):
        lanes = ordered(smallest_cut=smallest_cut, most_rows=most_rows)
        train_in_order(lanes, 0)
        places |= lanes.places
    waits = sorted(place for place in places if place[0] != "uses")
    assert {kind for kind, _, _ in waits} == {"wait", "finish"}
    trainings = [(seed, 4, None) for seed in range(4)] + [
        (seed, cut, most) for cut, most in ((N, None), (4, 12), (4, 2)) for seed in range(2)
    ]
    assert [place for place in waits if not any(is_noticed(ordered, place, *each) for each in trainings)] == []


def is_noticed(
    ordered: Callable[..., OrderedLanes],
    place: tuple[str, int, int],
    seed: int,
    smallest_cut: int,
    most_rows: int | None,
) -> bool:
    try:
        train_in_order(ordered(place, smallest_cut, most_rows), seed)
    except Race:
        return True
    return False


@pytest.fixture(params=[False, True], ids=["side by side", "meeting"])
def meeting(request, monkeypatch) -> None:
    """Lets views lie side by side, or has space for the largest alone."""
    if request.param:
        monkeypatch.setattr(arenas, "ROOM", 0)


def ids(*rows: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64)


def train_simply(views: list[Tensor], after: Callable[[Training, int], None] = lambda training, step: None) -> Training:
    training = Training(views)
    training.prefetches = lambda step: True
    training.run(lambda step: after(training, step))
    training.assert_exact()
    return training


@pytest.mark.parametrize("is_small", [True, False])
def test_rows_counted_as_travelling(monkeypatch, is_small):
    if not is_small:
        monkeypatch.setattr(packed_pipeline, "SMALLEST_CUT", 0)
    views = [ids(0, 1, 2), ids(1, 2, 5), ids(2), ids(0, 2, 5), ids(0, 1)]
    moved = []
    training = train_simply(views, lambda training, step: moved.append(training.pipeline.rows_moved))
    # The second view finds no space yet beside the first, which is written whole; later ones share 1, 1 and 1 rows with
    # the view before them. Row 5 of the fourth comes from the view before that, or where views are small from the host,
    # as row 1 of the last does.
    assert moved[0] == {"rows_fetched": 3, "rows_retained": 0, "rows_written": 3}
    assert moved[1] == {"rows_fetched": 6, "rows_retained": 1, "rows_written": 5}
    assert moved[2] == {"rows_fetched": 7 + is_small, "rows_retained": 2, "rows_written": 5}
    assert moved[3] == {"rows_fetched": 8 + is_small, "rows_retained": 3, "rows_written": 7}
    assert moved[4] == {"rows_fetched": 8 + is_small, "rows_retained": 3, "rows_written": 9}
    traffic = training.pipeline.counters().traffic
    assert traffic == {**moved[4], "rows_in_place": 0, "link_bytes": ROW_BYTES * (8 + is_small + 9)}


def test_rows_that_stay_on_the_host_are_counted(monkeypatch):
    """They are read there twice and written; the view after them comes late."""
    monkeypatch.setattr(Arena, "_most_rows", lambda self, count, caution=1: 4)
    traffic = train_simply([ids(0, 1, 2), ids(4, 5, 6, 7, 8), ids(2, 3), ids(9)]).pipeline.counters().traffic
    fetched, written = 3 + 2 * 5 + 2 + 1, 3 + 5 + 2 + 1
    assert traffic == {
        "rows_fetched": fetched,
        "rows_retained": 0,
        "rows_written": written,
        "rows_in_place": 5,
        "link_bytes": ROW_BYTES * (fetched + written),
    }


def test_copies_of_rows_have_the_memory_of_views_where_there_is_no_other(monkeypatch):
    """What had been fetched ahead comes once more; the training is the same."""
    torch.manual_seed(0)
    training, taken, has_room = Training(random_views(N, 20)), [], True
    monkeypatch.setattr(Arena, "leaves_copies", lambda self, count: has_room)
    monkeypatch.setattr(Arena, "release", lambda self, release=Arena.release: (taken.append(self), release(self)))

    def read(step: int) -> None:
        nonlocal has_room
        has_room, upcoming, before = step % 3 > 0, training.pipeline.upcoming_ids, len(taken)
        values = training.pipeline.read("geometry", torch.arange(N))
        assert torch.equal(values, training.reference.read("geometry", torch.arange(N)))
        assert training.pipeline.upcoming_ids is upcoming
        assert len(taken) - before == (not has_room)
        assert has_room or training.pipeline._arena._capacity == 0

    training.run(read)
    training.assert_exact()


def test_a_step_on_rows_that_stay_takes_its_memory_before_it_begins(monkeypatch):
    """So it can be undone where that is not there."""
    monkeypatch.setattr(Arena, "_most_rows", lambda self, count, caution=1: 4)
    training = Training([ids(0, 1, 2), torch.arange(20), ids(3)])
    for step in range(2):
        training.fetch_and_prefetch(step)
        if step == 0:
            training.update()

    def fail(*shape: object, **options: object) -> Tensor:
        raise torch.OutOfMemoryError("a defect")

    with monkeypatch.context() as failing:
        failing.setattr(torch, "empty", fail)
        with pytest.raises(torch.OutOfMemoryError):
            training.pipeline.update(training.made)
    training.pipeline.undo_step(1)
    training.reference.undo_step(1)
    training.run()
    training.assert_exact()


def test_residents_that_could_not_be_read_are_none(monkeypatch):
    """The fetch that chose them is repeated, and finds all rows on the host."""
    monkeypatch.setattr(residents, "FIRST_CHOICE", 3)
    torch.manual_seed(0)
    training, read, failures = Training(random_views(N, 12), resident_share=0.5), row_kernels.read_packed_rows, []

    def fail_once(host, ids, wanted, view, *others: object) -> None:
        if training.pipeline._residents._counted == 0 and training.steps == 3 and not failures:
            failures.append(training.steps)
            raise torch.OutOfMemoryError("a defect")
        read(host, ids, wanted, view, *others)

    monkeypatch.setattr(row_kernels, "read_packed_rows", fail_once)
    training.prefetches = lambda step: step != 2
    with pytest.raises(torch.OutOfMemoryError):
        training.run()
    assert failures == [3]
    assert training.pipeline._residents.rows is None
    training.run()
    training.assert_exact()


def test_values_of_geometry_are_not_held_beside_what_rendering_takes_of_them():
    pipeline, _ = make_pipeline(N, lambda index: torch.arange(index, N))
    values = pipeline.fetch(0).values
    assert {name: leaf.untyped_storage().nbytes() for name, leaf in values.items()}["geometry"] == 4
    assert values["geometry"].shape == (N, 16)


def test_rows_written_since_a_view_was_given_up_are_counted():
    """What was retained for a view that is then fetched anew has travelled after all."""
    views = [ids(0, 1, 2), ids(0, 1), ids(0, 1), ids(1)]

    def forget(training: Training, step: int) -> None:
        if step == 1:
            training.pipeline.forget_upcoming()

    moved = train_simply(views, forget).pipeline.rows_moved
    # The third view had rows 0 and 1 from the second, which are then written and fetched.
    assert moved == {"rows_fetched": 3 + 2 + 2, "rows_retained": 2 + 1, "rows_written": 3 + 2 + 1 + 1}


def test_rows_of_a_view_that_was_undone_are_counted():
    """What was fetched ahead is fetched again; what would have been retained has not been."""
    training = Training([ids(0, 1, 2), ids(0, 1, 2), ids(0, 1, 5), ids(1)])
    training.prefetches = lambda step: True
    for step in range(2):
        training.fetch_and_prefetch(step)
        if step == 1:
            training.pipeline.undo_step(1)
            training.reference.undo_step(1)
            assert training.pipeline.rows_moved == {"rows_fetched": 3 + 3 + 1, "rows_retained": 0, "rows_written": 3}
            training.fetch_and_prefetch(1)
        training.update()
    training.run()
    moved = training.pipeline.rows_moved
    assert moved == {"rows_fetched": 3 + 3 + 1 + 3 + 1, "rows_retained": 2 + 1, "rows_written": 3 + 1 + 2 + 1}


def test_space_grows_with_pairs_of_views_and_stays():
    torch.manual_seed(0)
    counts = []
    train_simply(4 * random_views(N, 15), lambda training, step: counts.append(training.pipeline.staging_allocations))
    assert 1 < counts[-1] < 12
    assert counts[30] == counts[-1]


def test_views_that_do_not_fit_together_meet(monkeypatch):
    """Where memory bounds the arena, which then stays as it is: what is handed on is less, and no view comes late."""
    retained, fetched_late, fetch_late = [], [], PackedPipeline._fetch_late

    def noting(self: PackedPipeline, cameras: int, ids: Tensor | None) -> object:
        fetched_late.append(cameras)
        return fetch_late(self, cameras, ids)

    monkeypatch.setattr(PackedPipeline, "_fetch_late", noting)
    for most_rows in (25, 1000):
        monkeypatch.setattr(Arena, "_most_rows", lambda self, count, caution=1, most=most_rows: most)
        torch.manual_seed(0)
        views = random_views(N, 30)
        assert max(map(len, views)) < 25 < max(len(view) + len(after) for view, after in pairwise(views))
        training = train_simply(views)
        retained.append(training.pipeline.rows_moved["rows_retained"])
        assert max(len(rows) for rows in training.pipeline._arena._rows.values()) <= most_rows
        assert training.pipeline.staging_allocations < 6
        assert len(fetched_late) == training.pipeline.staging_allocations
        fetched_late.clear()
    assert 0 < retained[0] < retained[1]


def test_space_is_for_the_largest_view_and_two_usual_ones(monkeypatch):
    """More is taken where a single pair is larger no more, nor where memory is short."""
    monkeypatch.setattr(arenas, "ROOM", 1.25)
    arena = Arena({"geometry": 5}, CPU)
    assert arena.make_space_for(320)
    assert arena._capacity == 330
    assert arena.rows_in_common(320, 160) is None  # wants more, which comes with the next view
    assert arena.make_space_for(160)
    assert arena._capacity == 480 + 15
    assert [arena.rows_in_common(160, 320), arena.rows_in_common(320, 170)] == [0, 0]
    for _ in range(40):
        assert arena.rows_in_common(160, 160) == 0
    assert arena.rows_in_common(400, 400) == 800 - 495  # the usual pair is of 320 rows
    assert arena.rows_in_common(400, 500) is None  # which does not fit at all
    monkeypatch.setattr(Arena, "_most_rows", lambda self, count, caution=1: 450)
    for view in (400, 500):  # once there was memory for this much beside a view of 500
        assert arena.make_space_for(500) == (view == 400)
        arena.renders(view)
        assert arena.rows_in_common(view, 400) == (None if view == 400 else 400)
    assert arena._capacity == 500


def test_views_do_not_meet_for_the_sake_of_what_is_beside_them(monkeypatch):
    """That gives way when the next view is fetched, late, where views would have space without it."""
    arena = Arena({"geometry": 5}, CPU)  # 20 bytes a row
    assert arena.make_space_for(100)
    monkeypatch.setattr(Arena, "_most_rows", lambda self, count, caution=1: 250 - self._beside // 20)
    arena.set_beside(20 * 145)
    assert arena.rows_in_common(100, 100) is None  # 105 rows are left, and 200 are wanted
    arena.set_beside(0)
    assert arena.make_space_for(100)
    assert arena.rows_in_common(100, 100) == 0
    arena.set_beside(20 * 60)
    assert arena.rows_in_common(206, 0) is None  # 190 rows are left of 206


def test_the_arena_is_made_anew_after_there_was_no_memory_for_it(monkeypatch):
    """A fetch that has failed may be repeated, of a smaller view as well."""
    arena = Arena({"geometry": 5, "last": 1}, CPU, torch.int32)
    arena.make_space_for(10)
    empty = torch.empty
    sizes = []

    def fail_at_second(*shape: object, **options: object) -> Tensor:
        sizes.append(shape)
        if len(sizes) == 2:
            raise torch.OutOfMemoryError("a defect")
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", fail_at_second)
    with pytest.raises(torch.OutOfMemoryError):
        arena.make_space_for(20)
    assert arena.make_space_for(5)
    assert [len(rows) for rows in arena.rows(5, at_end=True).values()] == [5, 5]


@pytest.mark.parametrize("prefetched", [True, False])
def test_a_fetch_that_has_failed_may_be_repeated(meeting, monkeypatch, prefetched):
    torch.manual_seed(0)
    training = Training(random_views(N, 8))
    training.prefetches = lambda step: prefetched
    decoded, failures = PackedPipeline._decoded, []

    def fail_once(self: PackedPipeline, name: str, view: object) -> Tensor:
        if training.steps == 4 and len(failures) < 2:
            failures.append(name)
            raise torch.OutOfMemoryError("a defect")
        return decoded(self, name, view)

    monkeypatch.setattr(PackedPipeline, "_decoded", fail_once)
    with pytest.raises(torch.OutOfMemoryError):
        training.run()
    with pytest.raises(torch.OutOfMemoryError):
        training.pipeline.fetch(4)
    training.run()
    training.assert_exact()
    assert len(failures) == 2


@pytest.mark.parametrize("moment", ["fetched", "prefetched", "prefetched and finished"])
def test_a_step_is_undone_with_rows_that_the_host_lacks(meeting, moment):
    """And repeated, several times in a run, without any row having changed."""
    torch.manual_seed(0)
    training = Training(random_views(N, 20))
    lacking = 0
    for step in range(20):
        training.prefetches = lambda step, at=step: moment != "fetched" or at % 3 < 2
        training.fetch_and_prefetch(step)
        if step % 3 == 2:
            lacking += training.pipeline._lacking is not None
            if moment.endswith("finished"):
                training.pipeline.finish()
            training.pipeline.undo_step(step)
            training.reference.undo_step(step)
            assert torch.equal(training.pipeline.upcoming_ids, training.views[step])
            training.assert_exact()
            training.fetch_and_prefetch(step)
        training.update()
    training.assert_exact()
    assert lacking > 3


def test_a_step_that_has_begun_to_be_applied_is_not_undone(monkeypatch):
    training = Training([ids(0, 1), ids(1, 2)])
    training.fetch_and_prefetch(0)

    def fail(*arguments: object) -> None:
        raise torch.OutOfMemoryError("a defect")

    monkeypatch.setattr(row_kernels, "step_view_rows", fail)
    with pytest.raises(torch.OutOfMemoryError):
        training.pipeline.update()
    with pytest.raises(RuntimeError, match="applied in part"):
        training.pipeline.undo_step(0)


def test_an_error_of_culling_ends_the_step_before_anything_is_changed():
    torch.manual_seed(0)
    views = random_views(N, 10)
    training = Training(views)
    good = training.pipeline._cull

    def fail_once(index: int) -> Tensor:
        if index == 4:
            training.pipeline._cull = good
            raise ValueError("a defect")
        return good(index)

    training.pipeline._cull = fail_once
    with pytest.raises(ValueError, match="a defect"):
        training.run()
    assert training.steps == 3
    training.pipeline.undo_step(3)  # raises it no second time
    training.reference.undo_step(3)
    assert all(group.adam.step == group.store.step == 3 for group in training.groups.values())
    assert torch.equal(training.pipeline.upcoming_ids, views[3])
    training.assert_exact()
    training.run()
    training.assert_exact()


def test_rows_that_arrive_do_not_disturb_the_backward_pass():
    training = Training(2 * [torch.arange(0, 30), torch.arange(15, 40)])
    for step in range(4):
        view = training.pipeline.fetch(step)
        appearance, geometry = view.values["appearance"], training.pipeline.read_present("geometry")
        loss = (appearance**2).sum() + view.values["geometry"].sum()
        if step < 3:
            training.pipeline.prefetch(step + 1)
            training.pipeline.finish()
        loss.backward()
        assert torch.equal(appearance.grad, 2 * appearance)
        assert torch.equal(geometry, training.pipeline.read_present("geometry"))
        training.pipeline.update()
    assert training.pipeline.rows_moved["rows_retained"] > 0


def test_a_finish_after_a_finish_writes_nothing(monkeypatch):
    torch.manual_seed(0)
    training = Training(random_views(N, 12))
    written, write = [], row_kernels.write_packed_rows
    monkeypatch.setattr(row_kernels, "write_packed_rows", lambda *given: (written.append(len(given[1])), write(*given)))

    def finish_often(step: int) -> None:
        training.pipeline.finish()
        before = len(written)
        training.pipeline.finish()
        training.pipeline.finish()
        assert len(written) == before

    training.run(finish_often)
    training.assert_exact()


@pytest.mark.parametrize("resident_share", [0.0, 0.5])
def test_a_checkpoint_is_written_while_training_goes_on(tmp_path, monkeypatch, resident_share):
    """It holds the rows that there were when it was begun, each copied before it changes."""
    monkeypatch.setattr(residents, "FIRST_CHOICE", 3)
    torch.manual_seed(0)
    training = Training(random_views(N, 20), resident_share=resident_share)
    saved: list[tuple[dict[str, Tensor], PartialCheckpoint]] = []

    def save(step: int) -> None:
        if step % 5 != 1:
            return
        training.pipeline.finish()
        state, stores = {}, {}
        for name, group in training.groups.items():
            state |= {f"packed/{name}": group.store.packed, f"last_step/{name}": group.store.last_step}
            stores |= {f"packed/{name}": group.store, f"last_step/{name}": group.store}
        frozen = {key: value.clone() for key, value in state.items()}
        if saved:
            saved[-1][1].publish()
        checkpoint = Checkpoint(step, np.eye(4), {**state, "packed/sh_degree": torch.tensor(3)})
        saved.append((frozen, PartialCheckpoint(tmp_path / f"{step}.pt", checkpoint, stores)))

    training.run(save)
    saved[-1][1].publish()
    assert len(saved) == 4
    for frozen, partial in saved:
        written = peek_checkpoint(partial.path).state
        for key, value in frozen.items():
            assert torch.equal(written[key], value), key
    training.assert_exact()


@pytest.mark.cuda
@pytest.mark.parametrize("resident_share", [0.0, 0.3])
@pytest.mark.parametrize("smallest_cut", [1 << 15, 1 << 19])
def test_lanes_on_a_gpu_are_those_of_rows_that_stay(monkeypatch, resident_share, smallest_cut):
    """Large views, so that kernels of all lanes are under way at once; after a while no memory is taken."""
    monkeypatch.setattr(packed_pipeline, "SMALLEST_CUT", smallest_cut)
    torch.manual_seed(0)
    device, n = torch.device("cuda"), 1_000_000
    views = [(torch.rand(n) < 0.15).nonzero()[:, 0] for _ in range(30)]
    on_device = [view.to(device) for view in views]
    pipeline, groups = make_pipeline(n, on_device.__getitem__, device, resident_share)
    resident = groups_of({name: DeviceStore(start(n), name, state="compact", device=device) for name in GROUPS}, device)
    reference = ResidentPipeline(resident, on_device.__getitem__, device)
    for step in range(len(views)):
        view, expected = pipeline.fetch(step), reference.fetch(step)
        if step + 1 < len(views):
            pipeline.prefetch(step + 1)
        geometry = pipeline.read_present("geometry")
        for name, leaf in view.values.items():
            assert torch.equal(geometry if name == "geometry" else leaf, expected.values[name])
            leaf.grad = torch.randn(leaf.shape, device=device)
            if name == "geometry":
                leaf.grad[:, USED:] = 0
            expected.values[name].grad = leaf.grad.clone()
        pipeline.update()
        reference.update()
    pipeline.finish()
    assert pipeline.rows_moved["rows_retained"] > 20 * 0.15**2 * n
    assert pipeline.staging_allocations < 5
    assert len(pipeline._residents) == int(resident_share * n)
    assert_same_stores(groups, resident)


@pytest.mark.cuda
def test_large_views_on_a_gpu_are_read_and_stepped_where_they_are_on_the_host(monkeypatch):
    """Of views with and without colours some stay on the host, in between views that travel."""
    torch.manual_seed(0)
    device, n, most = torch.device("cuda"), 1_000_000, 120_000
    monkeypatch.setattr(Arena, "_most_rows", lambda self, count, caution=1: most)
    shares = [0.05, 0.2, 0.2, 0.06, 0.05, 0.2, 0.05, 0.04] * 3
    views = [(torch.rand(n) < share).nonzero()[:, 0].to(device) for share in shares]
    pipeline, groups = make_pipeline(n, views.__getitem__, device)
    resident = groups_of({name: DeviceStore(start(n), name, state="compact", device=device) for name in GROUPS}, device)
    reference, at = ResidentPipeline(resident, views.__getitem__, device), torch.zeros(1, 3, device=device)
    for step in range(len(views)):
        is_stored, found = step % 3 > 0, []
        for each in (pipeline, reference):
            view, stored = each.fetch_stored(step, "appearance") if is_stored else (each.fetch(step), None)
            found.append((view.values, stored))
        if step + 1 < len(views):
            pipeline.prefetch(step + 1)
        geometry = pipeline.read_present("geometry")
        made, count = None, len(views[step])
        gradient = torch.randn(count, 16, device=device)
        gradient[:, USED:] = 0
        if is_stored:
            means, numbers = torch.randn(count, 3, device=device), torch.arange(count, device=device)
            made = HarmonicsGradient(means, gradient[:, :3].contiguous(), (0.0, 1.0, 2.0), 3)
            one, other = (
                StoredHarmonics(torch.zeros(count, 1, 3, device=device), stored, 3).colors(
                    means, at, 0 * numbers, numbers
                )
                for _, stored in found
            )
            assert torch.equal(one, other)
        for name, leaf in found[0][0].items():
            assert torch.equal(geometry if name == "geometry" else leaf, found[1][0][name])
            leaf.grad = gradient.clone() if name == "geometry" else torch.randn(leaf.shape, device=device)
            found[1][0][name].grad = leaf.grad.clone()
        pipeline.update(made)
        reference.update(made)
    pipeline.finish()
    traffic = pipeline.counters().traffic
    assert traffic["rows_in_place"] == sum(len(view) for view in views if len(view) > most) > 8 * most
    assert traffic["rows_retained"] > 0
    assert_same_stores(groups, resident)
