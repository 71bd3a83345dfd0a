"""The lanes and the worker of the pipeline that updates rows in host memory, in any order they allow, against Adam."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from offload.adam import rows as row_kernels
from offload.adam.deferral import DeferralTables
from offload.pipelines import arena as arenas
from offload.pipelines import rendering_memory
from offload.pipelines import streamed_host as in_place_pipeline
from offload.pipelines import worker as work_ahead
from offload.pipelines.arena import Arena
from offload.pipelines.groups import RowGroup
from offload.pipelines.streamed_host import StreamedHostPipeline
from offload.store.host_store import HostStore
from offload.store.layout import Moments
from tests.test_adam import APPEARANCE, EPS, GEOMETRY, DenseOracle, largest_row_error
from tests.test_streamed_pipeline import BETAS, CPU, RATE, Clock, SimulatedLane, random_views

MULTIPLIERS = {"geometry": GEOMETRY, "appearance": APPEARANCE}
RATES = {"geometry": [RATE, 0.3 * RATE], "appearance": [RATE]}


class Job:
    """What a worker has been given; done at once, or when its result is needed."""

    def __init__(self, work: Callable[[], object], at_once: bool) -> None:
        self.work, self.done = work, False
        if at_once:
            self.result()

    def result(self) -> object:
        if not self.done:
            self.value, self.done = self.work(), True
        return self.value


class SimulatedWorker:
    """In place of a thread: it does its jobs as early or as late as can be, by turns."""

    def __init__(self, *arguments: object, **options: object) -> None:
        self.jobs = 0

    def submit(self, function: Callable[..., object], *arguments: object) -> Job:
        self.jobs += 1
        return Job(lambda: function(*arguments), at_once=self.jobs % 3 > 0)


def make_pipeline(
    n: int, cull: Callable[[int], Tensor], device: torch.device = CPU, moments: Moments = "float32"
) -> tuple[StreamedHostPipeline, dict[str, RowGroup]]:
    """A pipeline whose cameras are numbers of views."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"means": (3,), "scales": (3,), "quats": (4,), "opacities": (), "sh0": (1, 3), "shN": (15, 3)}
    parameters = {name: torch.randn(n, *shape, generator=generator) for name, shape in shapes.items()}
    groups = {}
    for name, multipliers in MULTIPLIERS.items():
        store = HostStore(
            parameters, name, moments=moments, max_gaussians=n, pin=device.type == "cuda", pad_to_cache_line=True
        )
        tables = DeferralTables(multipliers, BETAS, EPS, device)
        groups[name] = RowGroup(store, tables, lambda step, name=name: RATES[name])
    return StreamedHostPipeline(groups, cull, device), groups


class Training:
    """Steps with random gradients, and dense Adam beside them; now and then the next view is not known in time."""

    def __init__(self, n: int, views: list[Tensor]) -> None:
        self.views, self.n = views, n
        self.pipeline, self.groups = make_pipeline(n, self.cull)
        self.oracles = {
            name: DenseOracle(group.store.rows.parameters[:, : group.adam.columns], BETAS, MULTIPLIERS[name])
            for name, group in self.groups.items()
        }
        self.steps = 0
        self.told: list[Tensor] = []  # of rows that have changed on the host
        self.groups["geometry"].store.on_change = self.told.append

    def cull(self, index: int) -> Tensor:
        """May read what the steps so far have left on the host: rows of the last view, and their last steps."""
        if self.steps > 0:
            before = self.views[self.steps - 1]
            assert torch.equal(self.told[-1], before)
            for name, group in self.groups.items():
                assert (group.store.last_step[before] == self.steps).all()
                actual = group.store.rows.parameters[before, : group.adam.columns]
                torch.testing.assert_close(actual.double(), self.oracles[name].state()[0][before], rtol=1e-5, atol=1e-6)
        return self.views[index]

    def run(self, after: Callable[[int], None] = lambda step: None) -> None:
        for step, ids in enumerate(self.views):
            view = self.pipeline.fetch(step)
            assert torch.equal(view.ids, ids)
            if step + 1 < len(self.views) and step % 7 < 5:
                self.pipeline.prefetch(step + 1)
            gradients = {name: torch.randn(len(ids), group.adam.columns) for name, group in self.groups.items()}
            for name, values in view.values.items():
                values.grad = gradients[name]
            self.pipeline.update()
            for name, oracle in self.oracles.items():
                dense = torch.zeros(self.n, gradients[name].shape[1]).index_copy(0, ids, gradients[name])
                oracle.step(dense, torch.tensor(RATES[name]).double() @ MULTIPLIERS[name].double())
            self.steps += 1
            after(step)

    def assert_exact(self) -> None:
        self.pipeline.finish()
        stale = (self.groups["geometry"].store.last_step < self.steps).nonzero()[:, 0]
        for name, group in self.groups.items():
            self.pipeline.catch_up(name, None)
            columns = group.adam.columns
            updated = MULTIPLIERS[name].sum(0) > 0
            for actual, expected in zip(group.store.rows.tensors(), self.oracles[name].state(), strict=True):
                assert largest_row_error(actual[:, :columns][:, updated], expected[:, updated]) < 1e-5
                assert not actual[:, columns:].any()
            assert (group.store.last_step == self.steps).all()
        assert torch.equal(self.told[-1], stale)


@pytest.fixture
def simulated(monkeypatch) -> Callable[[tuple[int, ...], int], None]:
    """Puts lanes and a worker in place that do their work in the order of a clock."""

    def start(favourites: tuple[int, ...], seed: int) -> None:
        clock = Clock(favourites, seed)
        monkeypatch.setattr(in_place_pipeline, "kernels_for", lambda device, module: clock.kernels())
        monkeypatch.setattr(in_place_pipeline, "positions_among", clock.positions_among)
        monkeypatch.setattr(work_ahead, "ThreadPoolExecutor", SimulatedWorker)
        monkeypatch.setattr(SimulatedLane, "new", lambda device: SimulatedLane(clock), raising=False)
        monkeypatch.setattr(SimulatedLane, "current", lambda device: clock.current[-1], raising=False)
        monkeypatch.setattr(in_place_pipeline, "Lane", SimulatedLane)
        add_step = DeferralTables._add_step
        monkeypatch.setattr(
            DeferralTables, "_add_step", lambda *arguments: clock.current[-1].give(lambda: add_step(*arguments))
        )

    return start


@pytest.mark.parametrize("favourites", [(), (0,), (1,)], ids=["any", "rendering first", "fetching first"])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_any_order_of_the_lanes_is_dense_adam(simulated, favourites, seed):
    simulated(favourites, seed)
    torch.manual_seed(seed)
    training = Training(60, random_views(60, 30))
    reads = []

    def read_now_and_then(step: int) -> None:
        if step % 9 == 8:
            training.pipeline.finish()  # in the midst of training, with a view on its way
        if step % 15 == 14:
            for name, oracle in training.oracles.items():
                reads.append((name, training.pipeline.read(name, torch.arange(60)), oracle.state()[0].clone()))

    training.run(read_now_and_then)
    training.assert_exact()
    assert len(reads) == 4
    for name, actual, expected in reads:
        updated = MULTIPLIERS[name].sum(0) > 0
        assert largest_row_error(actual[:, updated], expected[:, updated]) < 1e-5


def test_views_that_do_not_fit_together_come_one_by_one(monkeypatch):
    """Where memory bounds the arena, which then stays as it is."""
    retained = []
    for most_rows in (35, 1000):
        monkeypatch.setattr(Arena, "_most_rows", lambda self, count, caution=1, most=most_rows: most)
        torch.manual_seed(0)
        views = random_views(60, 30)
        assert max(map(len, views)) < 35 < max(len(view) + len(after) for view, after in pairwise(views))
        training = Training(60, views)
        training.run()
        training.assert_exact()
        retained.append(training.pipeline.rows_moved["rows_retained"])
        assert max(len(rows) for rows in training.pipeline._arena._rows.values()) <= most_rows
        assert training.pipeline.staging_allocations < 6
    assert 0 < retained[0] < retained[1]


def test_memory_for_rows_is_what_rendering_leaves(monkeypatch):
    """Of 10,000 bytes, of which all but the arena takes 4,000 while 100 rows are rendered; a tenth more for caution."""
    taken = {"peak": 0, "now": 500}
    monkeypatch.setattr(rendering_memory, "begin_stretch", lambda device: taken["peak"])
    monkeypatch.setattr(arenas, "most_bytes", lambda device: (10_000 + arenas.IDLE) / arenas.USABLE)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: taken["now"])
    arena = Arena({"appearance": 5}, CPU)  # 20 bytes a row
    arena._device = arena._rendering._device = torch.device("cuda")
    arena._look()
    arena.see()  # before anything has been rendered: what is there already, and the least that rendering takes
    assert arena._most_rows(2) == int(10_000 - 1.1 * (500 + 1024 * 2)) // 20
    for rows, peak in ((100, 4000), (30, 1000), (50, 900)):
        arena.renders(rows)
        taken["peak"] = peak + 20 * arena._capacity
        arena.see()
    assert arena._most_rows(100) == (10_000 - 4400) // 20
    assert arena._most_rows(200) == (10_000 - 8800) // 20  # a larger one takes as much more
    assert arena._most_rows(70) == (10_000 - 4400) // 20  # none like it has been seen
    assert arena._most_rows(50) == arena._most_rows(30) == (10_000 - 1100) // 20  # it takes no less than a smaller one
    assert arena._most_rows(51) == int(10_000 - 1100 * 51 / 50) // 20  # of the same size as the second
    arena._capacity = 250
    assert arena.has_space_for(100, 110)  # whichever of them is rendered
    assert not arena.has_space_for(100, 150)  # rendering it would take 6,600 bytes, and the arena takes 5,000
    assert arena._fits(300) == (arena._most_rows(300) >= 300)
    assert arena._fits(100)
    arena.rests()
    taken["peak"] = 9000  # while rows were changed, which is no rendering's
    arena.see()
    assert arena._most_rows(100) == (10_000 - 4400) // 20


def test_a_view_is_left_elsewhere_without_caution_where_its_size_is_known(monkeypatch):
    monkeypatch.setattr(arenas, "most_bytes", lambda device: (1000 + arenas.IDLE) / arenas.USABLE)
    arena = Arena({"appearance": 1}, CPU)  # 4 bytes a row
    arena._device = torch.device("cuda")
    arena._rendering._seen, arena._rendering.largest = {53: (100, 600)}, 100
    assert (arena._rendering.expected(100), arena._rendering.expected(50)) == (600, 600)
    arena._look()
    assert [arena._most_rows(100), arena._most_rows(101)] == [(1000 - 660) // 4, int(1000 - 660 * 1.01) // 4]
    assert [arena._fits(count) for count in (85, 86, 99, 100, 101)] == [True, True, True, True, False]
    arena._rendering._seen[53] = 100, 602
    assert [arena._fits(count) for count in (99, 100)] == [True, False]
    arena.renders(100)
    assert arena._fits(100)  # since it has been there once
    arena.rests(changing=True)  # Gaussians that have been added take memory
    assert not arena._fits(100)
    monkeypatch.setattr(rendering_memory, "begin_stretch", lambda device: 0)
    arena._capacity = 30
    assert arena.leaves_copies(50) == (30 <= (1000 - 2 * 602) // 4) is False
    arena._rendering._seen[53] = 100, 400
    assert arena.leaves_copies(50) == (30 <= (1000 - 2 * 400) // 4) is True


@pytest.mark.parametrize(("moments", "read", "written"), [("float32", 768, 768), ("bfloat16", 512, 512)])
def test_rows_counted_as_travelling(monkeypatch, moments, read, written):
    """The store of the test has bfloat16 moments of geometry too, so that a row has 512 bytes in place of 576."""
    views = [torch.tensor(ids) for ids in ([0, 1, 2], [1, 2, 5], [2], [0, 2, 5])]
    pipeline, groups = make_pipeline(8, views.__getitem__, moments=moments)
    fetched, fetch_rows = [], row_kernels.fetch_dated_rows

    def count(source, places, last_step, wanted, *others: object) -> None:
        fetched.append(len(places) if wanted is None else int(wanted.sum()))
        fetch_rows(source, places, last_step, wanted, *others)

    monkeypatch.setattr(row_kernels, "fetch_dated_rows", count)
    for index in range(len(views)):
        view = pipeline.fetch(index)
        if index + 1 < len(views):
            pipeline.prefetch(index + 1)
        for name, group in groups.items():
            view.values[name].grad = torch.zeros(len(view.ids), group.adam.columns)
        pipeline.update()
    # Space for two views is there from the second on: of 3, 1 and 3 rows one each stays from one view to the next.
    assert pipeline.rows_moved == {"rows_fetched": 8, "rows_retained": 2, "rows_written": 10}
    assert sum(fetched) == len(groups) * 8
    assert pipeline.link_bytes == read * 8 + (read - 256 + written) * 10


def test_space_grows_with_pairs_of_views_and_stays():
    torch.manual_seed(0)
    training = Training(60, 4 * random_views(60, 20))
    counts = []
    training.run(lambda step: counts.append(training.pipeline.staging_allocations))
    assert 1 < counts[-1] < 12
    assert counts[40] == counts[-1]


def test_rows_that_arrive_do_not_disturb_the_backward_pass():
    torch.manual_seed(0)
    training = Training(60, 2 * [torch.arange(0, 40), torch.arange(20, 60)])
    for step in range(4):
        view = training.pipeline.fetch(step)
        loss = sum((values**2).sum() for values in view.values.values())
        if step < 3:
            training.pipeline.prefetch(step + 1)
            training.pipeline.finish()
        loss.backward()
        assert all(torch.equal(values.grad, 2 * values) for values in view.values.values())
        training.pipeline.update()
    assert training.pipeline.rows_moved["rows_retained"] > 0


def test_an_error_of_the_worker_ends_the_step_before_anything_is_changed():
    torch.manual_seed(0)
    views = random_views(60, 10)
    training = Training(60, views)
    good = training.cull

    def fail_once(index: int) -> Tensor:
        if index == 4:
            training.pipeline._cull = good
            raise ValueError("a defect")
        return good(index)

    training.pipeline._cull = fail_once
    with pytest.raises(ValueError, match="a defect"):
        training.run()
    assert training.steps == 3
    training.pipeline.undo_step(3)
    assert training.pipeline.step_count == 3
    assert torch.equal(training.pipeline.upcoming_ids, views[3])
    training.assert_exact()


@pytest.mark.cuda
def test_lanes_on_a_gpu_are_dense_adam():
    """Large views, so that kernels of both lanes are under way at once; after a while no memory is taken."""
    torch.manual_seed(0)
    device, n = torch.device("cuda"), 1_000_000
    views = [(torch.rand(n) < 0.15).nonzero()[:, 0] for _ in range(30)]
    pipeline, groups = make_pipeline(n, views.__getitem__, device)
    expected, adams = {}, {}
    for name, group in groups.items():
        columns = group.store.rows.parameters[:, : group.adam.columns].clone().to(device)
        rates = torch.tensor(RATES[name]) @ MULTIPLIERS[name]
        expected[name] = [column.clone().requires_grad_() for column in columns.unbind(1)]
        adams[name] = torch.optim.Adam(
            [{"params": [column], "lr": rate} for column, rate in zip(expected[name], rates.tolist(), strict=True)],
            betas=BETAS,
            eps=EPS,
            foreach=True,
        )
    for step, ids in enumerate(views):
        view = pipeline.fetch(step)
        if step + 1 < len(views):
            pipeline.prefetch(step + 1)
        for name, group in groups.items():
            gradients = torch.randn(len(ids), group.adam.columns, device=device)
            view.values[name].grad = gradients
            for i, column in enumerate(expected[name]):
                column.grad = torch.zeros_like(column)
                column.grad[view.ids] = gradients[:, i]
        pipeline.update()
        for adam in adams.values():
            adam.step()
    assert pipeline.rows_moved["rows_retained"] > 20 * 0.15**2 * n
    assert pipeline.staging_allocations < 5
    for name, group in groups.items():
        pipeline.catch_up(name, None)
        columns = group.adam.columns
        parameters, *moments = group.store.rows.tensors()
        actual = parameters[:, :columns].clone().to(device)
        torch.testing.assert_close(actual, torch.stack(expected[name], 1).detach(), rtol=1e-4, atol=1e-4)
        for moment, key in zip(moments, ("exp_avg", "exp_avg_sq"), strict=True):
            wanted = torch.stack([adams[name].state[column][key] for column in expected[name]], 1)
            # The terms of a first moment may cancel: its rounding error is that of the largest of them.
            rounding = 4 * torch.finfo(torch.float32).eps * wanted.abs().max().item()
            torch.testing.assert_close(moment[:, :columns].clone().to(device), wanted, rtol=1e-4, atol=rounding)
