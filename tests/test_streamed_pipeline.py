"""The three lanes of the streamed pipeline, run in every order that their waits allow, against dense Adam."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from offload.adam import rows as row_kernels
from offload.adam.deferral import DeferralTables
from offload.pipelines import groups as streamed_groups
from offload.pipelines import overlap
from offload.pipelines import streamed as streamed_pipeline
from offload.pipelines.groups import RowGroup
from offload.pipelines.overlap import Overlap
from offload.pipelines.streamed import StreamedPipeline
from offload.store.host_store import HostStore
from offload.store.layout import Moments
from tests.test_adam import APPEARANCE, EPS, DenseOracle, largest_row_error

BETAS, RATE = (0.9, 0.999), 1e-2
CPU = torch.device("cpu")


class Event:
    """That a lane's first `position` tasks are done."""

    def __init__(self, lane: SimulatedLane, position: int) -> None:
        self.lane, self.position = lane, position

    def happened(self) -> bool:
        return self.lane.done >= self.position

    def synchronize(self) -> None:
        self.lane.clock.run_until(self.happened)


class SimulatedLane:
    """A lane whose tasks wait to be run, in the order in which they were given."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.tasks, self.done = clock, [], 0
        clock.lanes.append(self)

    def __enter__(self) -> SimulatedLane:
        self.clock.current.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        self.clock.current.pop()

    def give(self, task: Callable[[], None], after: Event | None = None) -> None:
        self.tasks.append((task, after))

    def wait(self, *events: Event | None) -> None:
        for event in events:
            if event is not None:
                self.give(lambda: None, event)

    def record(self) -> Event:
        return Event(self, len(self.tasks))

    def finish(self) -> None:
        self.record().synchronize()

    def uses(self, *tensors: Tensor) -> None:
        pass

    def runnable(self) -> bool:
        return self.done < len(self.tasks) and (self.tasks[self.done][1] is None or self.tasks[self.done][1].happened())


class Clock:
    """Decides which lane works next: at random, or by favour of some."""

    def __init__(self, favourites: tuple[int, ...], seed: int) -> None:
        self.favourites, self.random = favourites, random.Random(seed)
        self.lanes: list[SimulatedLane] = []
        self.current = [SimulatedLane(self)]  # the lane of rendering
        self.found: list[tuple[Tensor, Event]] = []  # positions of rows, and that their lane has come to them

    def run_until(self, happened: Callable[[], bool]) -> None:
        while not happened():
            lanes = [lane for lane in self.lanes if lane.runnable()]
            assert lanes, "the lanes wait for each other"
            favoured = [lane for lane in lanes if self.lanes.index(lane) in self.favourites]
            lane = self.random.choice(favoured or lanes)
            task, _ = lane.tasks[lane.done]
            task()
            lane.done += 1

    def positions_among(self, others: Tensor, ids: Tensor) -> Tensor:
        """Known at once here, but no kernel may use them before their lane has come to them."""
        positions = streamed_groups.positions_among(others, ids)
        self._note_found(positions)
        return positions

    def overlap(self, ids: Tensor, present: Tensor, previous: Tensor, num_moved: Tensor) -> Overlap:
        """As `positions_among`."""
        common = overlap.overlap(ids, present, previous, num_moved)
        self._note_found(*common)
        return common

    def _note_found(self, *tensors: Tensor) -> None:
        lane = self.current[-1]
        lane.give(lambda: None)
        self.found += [(tensor, lane.record()) for tensor in tensors]

    def kernels_for(self, device: torch.device, module: str) -> object:
        return self if module == "offload.pipelines.overlap" else self.kernels()

    def kernels(self) -> object:
        """The row kernels, done when their lane comes to them; what the host tells them is fixed when it does."""

        class Kernels:
            def __getattr__(_, name: str) -> Callable[..., None]:
                def give(*arguments: object) -> None:
                    frozen = [copy.copy(x) if isinstance(x, DeferralTables) else x for x in arguments]
                    found = [event for positions, event in self.found if any(x is positions for x in arguments)]

                    def task() -> None:
                        assert all(event.happened() for event in found)
                        getattr(row_kernels, name)(*frozen)

                    self.current[-1].give(task)

                return give

        return Kernels()


def make_pipeline(
    n: int, views: list[Tensor], device: torch.device, moments: Moments = "float32"
) -> tuple[StreamedPipeline, RowGroup]:
    """A pipeline whose cameras are numbers of views."""
    parameters = {"means": torch.zeros(n, 3), "sh0": torch.randn(n, 1, 3), "shN": torch.randn(n, 15, 3)}
    pin = device.type == "cuda"
    store = HostStore(parameters, "appearance", moments=moments, max_gaussians=n, pin=pin)
    group = RowGroup(store, DeferralTables(APPEARANCE, BETAS, EPS, device), lambda step: [RATE])
    return StreamedPipeline({"appearance": group}, lambda index: views[index].to(device), device), group


def random_views(n: int, num_views: int) -> list[Tensor]:
    """Sorted ids of views of all sizes; rows come back after one view, two, three and many."""
    return [torch.nonzero(torch.rand(n) < 0.5 * torch.rand(()))[:, 0] for _ in range(num_views)]


def train(pipeline: StreamedPipeline, views: list[Tensor], oracle: DenseOracle, n: int, after: Callable[[int], None]):
    """Steps with random gradients; now and then the next view is not known in time."""
    for step, (ids, _) in enumerate(pairwise([*views, None])):
        view = pipeline.fetch(step)
        assert torch.equal(view.ids.cpu(), ids)
        if step + 1 < len(views) and step % 7 != 6:
            pipeline.prefetch(step + 1)
        gradients = torch.randn(len(ids), 48)
        view.values["appearance"].grad = gradients.to(view.ids.device)
        pipeline.update()
        dense = torch.zeros(n, 48)
        dense[ids] = gradients
        oracle.step(dense, RATE * APPEARANCE[0].double())
        after(step)


@pytest.mark.parametrize("favourites", [(), (0,), (2,), (3,), (0, 2), (0, 3)], ids=str)  # 2 fetches and 3 writes
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_any_order_of_the_lanes_is_dense_adam(monkeypatch, favourites, seed):
    torch.manual_seed(seed)
    n, views = 60, random_views(60, 40)
    clock = Clock(favourites, seed)
    monkeypatch.setattr(streamed_pipeline, "kernels_for", clock.kernels_for)
    monkeypatch.setattr(SimulatedLane, "new", lambda device: SimulatedLane(clock), raising=False)
    monkeypatch.setattr(SimulatedLane, "current", lambda device: clock.current[-1], raising=False)
    monkeypatch.setattr(streamed_pipeline, "Lane", SimulatedLane)
    add_step = DeferralTables._add_step
    monkeypatch.setattr(
        DeferralTables, "_add_step", lambda *arguments: clock.current[-1].give(lambda: add_step(*arguments))
    )
    pipeline, group = make_pipeline(n, views, CPU)
    oracle = DenseOracle(group.store.rows.parameters.clone(), BETAS)

    reads = []

    def read_now_and_then(step: int) -> None:
        if step % 9 == 8:
            pipeline.finish()  # in the midst of training, with a view on its way
        if step % 15 == 14:
            reads.append((pipeline.read("appearance", torch.arange(n)), oracle.state()[0].clone()))

    train(pipeline, views, oracle, n, read_now_and_then)
    pipeline.catch_up("appearance", None)
    assert len(reads) == 2
    for actual, expected in (*reads, *zip(group.store.rows.tensors(), oracle.state(), strict=True)):
        assert largest_row_error(actual, expected) < 1e-5
    assert (group.store.last_step == len(views)).all()
    assert pipeline.staging_allocations <= 3 * 4  # of three slots, although views come in all sizes


@pytest.mark.parametrize(("moments", "row_bytes"), [("float32", 576), ("bfloat16", 384)])
def test_rows_counted_as_travelling(moments, row_bytes):
    views = [torch.tensor(ids) for ids in ([0, 1, 2], [1, 2, 5], [2], [0, 2, 5])]
    pipeline, _ = make_pipeline(8, views, CPU, moments)
    for index in range(len(views)):
        view = pipeline.fetch(index)
        if index + 1 < len(views):
            pipeline.prefetch(index + 1)
        view.values["appearance"].grad = torch.zeros(len(view.ids), 48)
        pipeline.update()
        if index == 0:  # 2 of 3 rows are retained, and the other one of the next view has been fetched
            assert pipeline.rows_moved == {"rows_fetched": 4, "rows_retained": 2, "rows_written": 1}
    # 10 rows are rendered, of which 2, 1 and 1 stay from one view to the next, and 1 comes from the view before that.
    assert pipeline.rows_moved == {"rows_fetched": 5, "rows_retained": 4, "rows_written": 6}
    assert pipeline.link_bytes == row_bytes * (5 + 6)


@pytest.mark.cuda
def test_lanes_on_a_gpu_are_dense_adam():
    """Large views, so that kernels of all lanes are under way at once."""
    torch.manual_seed(0)
    device, n = torch.device("cuda"), 1_000_000
    views = [(torch.rand(n) < 0.15).nonzero()[:, 0] for _ in range(30)]
    pipeline, group = make_pipeline(n, views, device)
    expected = group.store.rows.parameters.clone().to(device).requires_grad_()
    adam = torch.optim.Adam([expected], lr=RATE, betas=BETAS, eps=EPS, fused=True)
    for step, ids in enumerate(views):
        view = pipeline.fetch(step)
        if step + 1 < len(views):
            pipeline.prefetch(step + 1)
        gradients = torch.randn(len(ids), 48, device=device)
        view.values["appearance"].grad = gradients
        pipeline.update()
        expected.grad = torch.zeros_like(expected)
        expected.grad[view.ids] = gradients
        adam.step()
    pipeline.catch_up("appearance", None)
    state = adam.state[expected]
    for actual, moment in zip(group.store.rows.moments, (state["exp_avg"], state["exp_avg_sq"]), strict=True):
        # The terms of a first moment may cancel: its rounding error is that of the largest of them.
        rounding = 4 * torch.finfo(torch.float32).eps * moment.abs().max().item()
        torch.testing.assert_close(actual.to(device), moment, rtol=1e-4, atol=rounding)
    sh0 = slice(0, 3)  # the columns that have the learning rate of the schedule
    torch.testing.assert_close(
        group.store.rows.parameters[:, sh0].to(device), expected.detach()[:, sh0], rtol=1e-4, atol=1e-4
    )
