"""Rows that a device reads early wait for all that they must, in every order of its lanes and of the host's threads."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from offload.adam import deferral
from offload.adam.harmonics import HarmonicsGradient
from offload.adam.host import DeferredAdam
from offload.adam.stored_harmonics import StoredRows
from offload.pipelines import device_reading, forwarded
from offload.pipelines.forwarded import ForwardedPipeline, ForwardedRows
from offload.pipelines.overlap import overlap
from offload.pipelines.times import OffloadTimes
from offload.pipelines.transfer import Downloaded, RowTransfer, Uploaded
from offload.store.host_store import HostStore
from offload.store.layout import RowState
from tests import test_device_reading
from tests.ordered_lanes import OrderedKernels, OrderedLane, OrderedLanes, Race
from tests.test_device_reading import (
    CPU,
    FORGOTTEN,
    HARMONICS,
    LATE,
    PREFETCHED,
    UNDONE,
    give_gradients,
    make_pipeline,
    packed,
    view,
)

N = 40
# The fifth view has no rows.
KINDS = [PREFETCHED, PREFETCHED, FORGOTTEN, LATE, PREFETCHED, PREFETCHED, UNDONE, PREFETCHED, FORGOTTEN, PREFETCHED]


class OrderedWork:
    """In place of `WorkAhead`: its thread knows what the main one had done when it was given something."""

    def __init__(self, lanes: OrderedLanes) -> None:
        self.lanes, self.worker = lanes, lanes.new_actor("the worker")
        self.work = None

    def begin_before(self, work: Callable[[], None]) -> None:
        self._do(work)

    def begin(self, work: Callable, *arguments: object) -> None:
        self.work = (self._do(partial(work, *arguments)),)

    def finish_before(self) -> None:
        self.lanes.host.learn(self.worker.seen)

    def result(self) -> object:
        self.lanes.host.learn(self.worker.seen)
        return None if self.work is None else self.work[0]

    def forget(self) -> None:
        self.work = None

    def _do(self, work: Callable) -> object:
        self.worker.learn(self.lanes.host.seen)
        with self.lanes.thread(self.worker):
            return work()


def on_its_way(lanes: OrderedLanes, lane: OrderedLane, tensor: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """Copy a tensor to the host on a lane; return it, and what waits there until it has arrived."""
    lanes.touch(tensor, lanes.begin(), writes=False)
    sent = lane.record()
    return tensor.detach().clone(), lambda: lanes.host.learn(sent)


@pytest.fixture
def ordered(monkeypatch) -> Callable[..., OrderedLanes]:
    """Puts lanes and threads in place that keep to the order."""
    commit_rows, skipped_steps = DeferredAdam.commit, DeferredAdam.skipped_steps

    def begin(left_out: tuple[str, int, int] | None = None) -> OrderedLanes:
        lanes = OrderedLanes(left_out)
        kernels = {
            "offload.adam.rows": OrderedKernels(lanes),
            "offload.pipelines.overlap": SimpleNamespace(overlap=overlap),
        }
        down = {urgent: lanes.new(CPU) for urgent in (False, True)}

        def arriving(tensor: Tensor) -> Callable[[], Tensor]:
            with _disable_current_modes():
                copy, wait = on_its_way(lanes, lanes.current(CPU), tensor)

            def arrived() -> Tensor:
                wait()
                return copy

            return arrived

        def download(self: RowTransfer, rows: Tensor, *, urgent: bool = False) -> Downloaded:
            known = lanes.current(CPU).record()
            with down[urgent] as lane, _disable_current_modes():
                lane.actor.learn(known)
                lane.uses(rows)
                copy, wait = on_its_way(lanes, lane, rows)
            return Downloaded(copy, wait)

        def downloaded(self: Downloaded) -> Tensor:
            self.done()
            return self.rows

        def uploaded(self: Uploaded) -> Tensor:
            lane = lanes.current(CPU)
            lane.actor.learn(self.done)
            lane.uses(self.rows)
            return self.rows

        def commit(self: DeferredAdam, rows: RowState, last_step: Tensor, ids: Tensor | None, *given, **options):
            with _disable_current_modes():
                lanes.host.seen[lanes.host.number] += 1
                for tensor in lanes.stored:
                    lanes.touch(tensor, lanes.host, writes=True, rows=ids)
                commit_rows(self, rows, last_step, ids, *given, **options)

        def skipped(self: DeferredAdam, device: torch.device, *, previous: bool = False):
            with _disable_current_modes():
                return skipped_steps(self, device, previous=previous)

        for module in (device_reading, forwarded):
            monkeypatch.setattr(module, "Lane", lanes)
        monkeypatch.setattr(device_reading, "kernels_for", lambda device, module: kernels[module])
        monkeypatch.setattr(device_reading, "arriving", arriving)
        monkeypatch.setattr("offload.culling.visible.arriving", arriving)
        monkeypatch.setattr(forwarded, "WorkAhead", lambda times, device: OrderedWork(lanes))
        monkeypatch.setattr(deferral, "FIRST_CAPACITY", 64)
        monkeypatch.setattr(OffloadTimes, "on_lane", lambda times, name, lane: nullcontext())
        monkeypatch.setattr(RowTransfer, "download", download)
        monkeypatch.setattr(Downloaded, "ready", downloaded)
        monkeypatch.setattr(Uploaded, "ready", uploaded)
        monkeypatch.setattr(DeferredAdam, "commit", commit)
        monkeypatch.setattr(DeferredAdam, "skipped_steps", skipped)
        monkeypatch.setattr(test_device_reading, "HostStore", partial(HostStore, max_gaussians=N))  # little to note
        return lanes

    return begin


@pytest.fixture
def expected() -> list[Tensor]:
    """What the stores hold after the same steps where the host forwards rows; before lanes are put in place."""
    return trained(make_pipeline(CPU, N, False, HARMONICS), nullcontext())


def train_in_order(lanes: OrderedLanes) -> list[Tensor]:
    """Train where the device reads rows; return what the stores hold then."""
    with lanes:
        pipeline = make_pipeline(CPU, N, True, HARMONICS)
    pipeline._cull = lambda step: view(step, N).clone()  # the host has not waited for that
    store = pipeline._groups["appearance"].store
    lanes.stored = store.packed, store.last_step
    lanes.on_host.update(tensor.untyped_storage().data_ptr() for tensor in lanes.stored)
    return trained(pipeline, lanes)


def trained(pipeline: ForwardedPipeline, noted: AbstractContextManager) -> list[Tensor]:
    """Take steps of all kinds; every second one leaves rows as they are stored, and reads them as colours are made."""
    for step, kind in enumerate(KINDS):
        made = None
        with noted:
            if kind == UNDONE:
                fetch(pipeline, step)
                pipeline.prefetch(step + 1)
                pipeline.undo_step(step)
            rows, stored = fetch(pipeline, step)
            if kind != LATE:
                pipeline.prefetch(step + 1)
            if stored is not None:
                stored.of(torch.arange(len(rows.ids)))
                stored.spend()
        give_gradients(rows, step)
        if stored is not None:
            numbers = rows.host_ids[:, None] + torch.arange(6.0)
            made = HarmonicsGradient(numbers[:, :3], 1e-3 * numbers[:, 3:].sin(), (0.1, 0.2, 0.3), 3, True)
        del rows, stored
        with noted:
            pipeline.update(made)
        if kind == FORGOTTEN:  # which torch works for on the host, as on no lane
            pipeline.catch_up("appearance", None)
    with noted:
        pipeline.finish()
    return packed(pipeline)


def fetch(pipeline: ForwardedPipeline, step: int) -> tuple[ForwardedRows, StoredRows | None]:
    return pipeline.fetch_stored(step, "appearance") if step % 2 else (pipeline.fetch(step), None)


def test_every_order_of_the_lanes_gives_the_rows_that_the_host_forwards(expected, ordered):
    lanes = ordered()
    for here, there in zip(train_in_order(lanes), expected, strict=True):
        assert torch.equal(here, there)
    assert not lanes.refused


def test_no_wait_can_be_left_out(ordered):
    """Not so what is said of memory that is used: as in `tests/test_packed_pipeline.py`."""
    lanes = ordered()
    train_in_order(lanes)
    waits = sorted(place for place in lanes.places if place[0] != "uses")
    assert {kind for kind, _, _ in waits} == {"wait", "finish"}
    assert [place for place in waits if not is_noticed(ordered(place))] == []


def is_noticed(lanes: OrderedLanes) -> bool:
    try:
        train_in_order(lanes)
    except Race:
        return True
    return bool(lanes.refused)
