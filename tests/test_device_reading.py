"""A device that reads rows of compact stores itself renders what the host would have forwarded."""

from __future__ import annotations

import importlib
import itertools
import weakref
from collections.abc import Callable
from functools import partial
from threading import Event

import pytest
import torch
from torch import Tensor

from benchmarks.aerial_scene import aerial_scene
from offload.adam.host import DeferredAdam
from offload.adam.schedules import schedules_of
from offload.adam.state import current_values
from offload.culling.cameras import Cameras
from offload.culling.visible import VisibleRows
from offload.models.forwarded import ForwardedGaussians
from offload.pipelines.device_reading import READ_ROWS, Compared, DeviceReading, Division
from offload.pipelines.forwarded import ForwardedPipeline, ForwardedRows, Upcoming
from offload.pipelines.groups import RowGroup
from offload.pipelines.transfer import Downloaded, RowTransfer
from offload.store.host_store import HostStore
from offload.store.layout import PackedRows
from tests.aerial_training import gaussians_of, views_of
from tests.test_pipeline import ADAM, repeated
from tests.triton_places import INTERPRETED
from tests.waiting import HANGS_AFTER

CPU = torch.device("cpu")
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.cuda)]
BOTH, HARMONICS = ("geometry", "appearance"), ("appearance",)  # groups that travel
PREFETCHED, LATE, FORGOTTEN, UNDONE = range(4)
TAKING_MEMORY = [
    *((DeviceReading, name) for name in ("compare", "begin", "go_on", "divide", "upload")),
    (RowGroup, "new_packed"),
    (ForwardedPipeline, "_find"),
]


def view(step: int, n: int) -> Tensor:
    """The rows of a view: a third of all, of which half are in the next one; none of the fifth view."""
    generator = torch.Generator().manual_seed(step // 2)
    chosen = torch.rand(n, generator=generator) < 0.35
    generator.manual_seed(1000 + step)
    return (chosen & (torch.rand(n, generator=generator) < 0.8)).nonzero().squeeze(1)[: 0 if step == 5 else n]


def make_pipeline(
    device: torch.device, n: int, device_reads: bool, travelling: tuple[str, ...] = BOTH
) -> ForwardedPipeline:
    """Views are named by a number in place of their cameras, and found where geometry is."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"means": (3,), "scales": (3,), "quats": (4,), "opacities": (), "sh0": (1, 3), "shN": (15, 3)}
    parameters = {name: torch.randn(n, *shape, generator=generator) for name, shape in shapes.items()}
    groups = {}
    for name in travelling:
        store = HostStore(parameters, name, state="compact", pin=device.type == "cuda")
        multipliers, rates = schedules_of(name, store.sh_degree, ADAM, "compact")
        groups[name] = RowGroup(store, DeferredAdam(multipliers), rates)
    place = CPU if "geometry" in travelling else device
    return ForwardedPipeline(groups, lambda step: view(step, n).to(place), device, device_reads=device_reads)


def packed(pipeline: ForwardedPipeline) -> list[Tensor]:
    """All that the stores hold."""
    stores = [group.store for group in pipeline._groups.values()]
    return [tensor.clone() for store in stores for tensor in (store.packed, store.last_step)]


def take_step(pipeline: ForwardedPipeline, step: int, kind: int) -> dict[str, Tensor]:
    """Return the values that a view was given; gradients do not depend on them, so that stores are the same."""
    rows = pipeline.fetch(step)
    if kind == UNDONE:
        pipeline.prefetch(step + 1)
        pipeline.undo_step(step)
        rows = pipeline.fetch(step)
    if kind != LATE:
        pipeline.prefetch(step + 1)
    given = give_gradients(rows, step)
    pipeline.update()
    if kind == FORGOTTEN:
        pipeline.forget_upcoming()
    return given


def give_gradients(rows: ForwardedRows, step: int) -> dict[str, Tensor]:
    """Return the values of rows."""
    given = {}
    for name, values in rows.values.items():
        given[name] = values.detach().cpu()
        offsets = torch.sin(rows.host_ids[:, None] * (1.0 + step) + torch.arange(values.shape[1]))
        values.grad = 1e-3 * offsets.to(values.device)
    return given


def assert_same_values(reading: ForwardedPipeline, forwarding: ForwardedPipeline, step: int, kind: int) -> None:
    """Of one step, which both take."""
    actual, expected = (take_step(pipeline, step, kind) for pipeline in (reading, forwarding))
    for name, values in expected.items():
        assert torch.allclose(actual[name], values, rtol=1e-6, atol=1e-7)


def assert_same_stores(reading: ForwardedPipeline, forwarding: ForwardedPipeline) -> None:
    """To the bit, when all has been written."""
    for pipeline in (reading, forwarding):
        pipeline.finish()
    for here, there in zip(packed(reading), packed(forwarding), strict=True):
        assert torch.equal(here, there)


@pytest.mark.parametrize("travelling", [BOTH, HARMONICS])
@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_a_device_reads_are_those_that_the_host_forwards(device, travelling, monkeypatch):
    monkeypatch.setattr("offload.pipelines.device_reading.READ_ROWS", 64)
    reading, forwarding = (make_pipeline(device, 600, reads, travelling) for reads in (True, False))
    kinds = [PREFETCHED, PREFETCHED, LATE, PREFETCHED, FORGOTTEN, PREFETCHED, PREFETCHED, UNDONE, PREFETCHED]
    for step, kind in enumerate(kinds):
        assert_same_values(reading, forwarding, step, kind)
    assert_same_stores(reading, forwarding)


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="a GPU has them in the tests above")
@pytest.mark.parametrize("travelling", [BOTH, HARMONICS])
def test_rows_that_kernels_in_triton_read(travelling, monkeypatch):
    """Their tables are float32, and views are cut into blocks."""
    monkeypatch.setattr(
        "offload.pipelines.device_reading.kernels_for",
        lambda device, module: importlib.import_module(f"{module}_triton"),
    )
    monkeypatch.setattr("offload.pipelines.device_reading.READ_ROWS", 32)
    reading, forwarding = (make_pipeline(CPU, 200, reads, travelling) for reads in (True, False))
    for step, kind in enumerate([PREFETCHED, PREFETCHED, LATE]):
        assert_same_values(reading, forwarding, step, kind)


@pytest.mark.parametrize("travelling", [BOTH, HARMONICS])
@pytest.mark.parametrize("device", DEVICES)
def test_rows_read_ahead_have_the_bits_of_rows_read_late(device, travelling):
    """So that training which goes on from a state is the same to the last bit."""
    ahead, late = (make_pipeline(device, 400, True, travelling) for _ in range(2))
    for step in range(8):
        values = [take_step(pipeline, step, kind) for pipeline, kind in ((ahead, PREFETCHED), (late, LATE))]
        for name in values[0]:
            assert torch.equal(values[0][name], values[1][name])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("step", "next_step"), [(0, 1), (0, 2), (3, 5), (5, 6), (5, 5)])
def test_a_device_divides_rows_as_the_host_does(device, step, next_step):
    """Views share many rows, some rows, or none; one has none, or both."""
    pipeline = make_pipeline(device, 500, True, HARMONICS)
    present, ids = (VisibleRows.of(view(number, 500).to(device)) for number in (step, next_step))
    reading = DeviceReading(pipeline._groups, device, pipeline._times)
    compared = reading.compare(ids.ids, present.ids, ids.ids[:0])
    expected = Upcoming.between(ids, ids.host_ids, present.host_ids)
    for name, numbers in reading.divide(compared)._asdict().items():
        assert torch.equal(numbers.cpu(), getattr(expected, name))
    assert torch.equal(compared.host_ids(), ids.host_ids)


@pytest.mark.parametrize("previous", [False, True])
def test_values_before_the_present_step_can_be_read_still(previous):
    pipeline = make_pipeline(CPU, 300, device_reads=True)
    for step in range(4):
        take_step(pipeline, step, LATE)
    pipeline.finish()
    ids = torch.arange(300)
    reading = DeviceReading(pipeline._groups, CPU, pipeline._times)
    before = {name: upload.ready() for name, upload in reading.upload(ids, None)[1].items()}
    for group in pipeline._groups.values():
        group.begin_step()
    _, uploads = reading.upload(ids, None, previous=previous)
    same = [torch.equal(uploads[name].ready(), rows) for name, rows in before.items()]
    assert same == [previous, previous]


def step_though_memory_runs_out(pipeline: ForwardedPipeline, step: int, arm: Callable[[], None]) -> dict[str, Tensor]:
    """Take a step; `arm` lets memory run out once from then on: before the fetch of even steps, else after it."""
    if step % 2 == 0:
        arm()
    rows = repeated(pipeline.fetch)(step)
    if step % 2:
        arm()
    try:
        pipeline.prefetch(step + 1)
    except torch.cuda.OutOfMemoryError:  # on the main thread
        pipeline.undo_step(step)
        rows = pipeline.fetch(step)
        pipeline.prefetch(step + 1)
    given = give_gradients(rows, step)
    repeated(pipeline.update)()  # which hears of the worker's
    return given


@pytest.mark.parametrize("travelling", [BOTH, HARMONICS])
@pytest.mark.parametrize(("owner", "name"), TAKING_MEMORY)
@pytest.mark.parametrize("is_late", [False, True])
def test_a_step_goes_on_where_memory_has_run_out(owner, name, is_late, travelling, monkeypatch):
    """Before anything has been done, or after all of it; rows that were begun to be read are of no use then."""
    reading, forwarding = (make_pipeline(CPU, 300, reads, travelling) for reads in (True, False))
    method, failures = getattr(owner, name), []

    def fail(*arguments: object, **options: object) -> None:
        monkeypatch.setattr(owner, name, method)
        failures.append(method(*arguments, **options) if is_late else None)
        raise torch.cuda.OutOfMemoryError("on purpose")

    for step in range(9):
        given = step_though_memory_runs_out(reading, step, lambda: monkeypatch.setattr(owner, name, fail))
        monkeypatch.setattr(owner, name, method)
        for group, values in take_step(forwarding, step, PREFETCHED).items():
            assert torch.allclose(given[group], values, rtol=1e-6, atol=1e-7)
    assert_same_stores(reading, forwarding)
    assert failures or (travelling == BOTH and name in ("compare", "begin", "go_on", "divide"))


def test_an_update_that_is_done_again_spares_gradients_that_are_not_committed_yet(monkeypatch):
    """Downloads take turns in two buffers, as on a GPU, of which the worker still commits the last one."""

    def download(self: RowTransfer, rows: Tensor, *, urgent: bool = False) -> Downloaded:
        buffers = vars(self).setdefault(f"urgent: {urgent}", [torch.empty(300, rows.shape[1]) for _ in range(2)])
        buffers.reverse()
        return Downloaded(buffers[0][: len(rows)].copy_(rows), None)

    def divide(self: DeviceReading, views: Compared) -> Division:
        fails.append(len(fails) % 2 == 0)
        if fails[-1]:
            raise torch.cuda.OutOfMemoryError("on purpose")
        may_commit.set()
        return divide_rows(self, views)

    def commit(*arguments: object) -> None:
        assert may_commit.wait(HANGS_AFTER)
        commit_rows(*arguments)

    monkeypatch.setattr(RowTransfer, "download", download)
    reading, forwarding = (make_pipeline(CPU, 300, reads, HARMONICS) for reads in (True, False))
    divide_rows, commit_rows, may_commit, fails = DeviceReading.divide, reading._commit, Event(), []
    monkeypatch.setattr(DeviceReading, "divide", divide)
    monkeypatch.setattr(reading, "_commit", commit)
    for step in range(4):
        rows = reading.fetch(step)
        reading.prefetch(step + 1)
        give_gradients(rows, step)
        repeated(reading.update)()
        may_commit.clear()
        take_step(forwarding, step, PREFETCHED)
    may_commit.set()
    assert_same_stores(reading, forwarding)
    assert fails == [True, False] * 4


@pytest.mark.parametrize("travelling", [BOTH, HARMONICS])
@pytest.mark.parametrize("device_reads", [False, True])
def test_ids_of_a_view_are_kept_for_the_next_step_where_that_reads_early_alone(travelling, device_reads):
    """They lie in the device's memory where geometry does, and a view in tiles may see most of the scene."""
    pipeline = make_pipeline(CPU, 300, device_reads, travelling)
    take_step(pipeline, 0, PREFETCHED)
    rows = pipeline.fetch(1)
    for values in rows.values.values():
        values.grad = torch.ones_like(values)
    ids = weakref.ref(rows.ids)
    del rows
    pipeline.update()
    pipeline.finish()
    assert (ids() is not None) == (device_reads and travelling == HARMONICS)


def train_on_colors(gaussians: ForwardedGaussians, views: list[Cameras], *, found_first: bool) -> list[Tensor]:
    """Return the colours of each step; the next view is found before colours are made, or after that."""
    colors = []
    for present, upcoming in itertools.pairwise(views):
        rows = gaussians.fetch(present, 3)
        if found_first:
            gaussians.prefetch(upcoming)
        numbers = torch.arange(len(rows["means"]))
        position = torch.linalg.inv(present.viewmats)[:, :3, 3]
        colors.append(rows["colors"].colors(rows["means"], position, torch.zeros_like(numbers), numbers))
        if not found_first:
            gaussians.prefetch(upcoming)
        (colors[-1] * torch.sin(numbers[:, None] + torch.arange(3.0))).sum().backward()
        for name in ("scales", "quats", "opacities"):
            rows[name].grad = torch.zeros_like(rows[name])
        gaussians.update()
    return [made.detach() for made in colors]


@pytest.mark.parametrize("found_first", [True, False])
def test_rows_of_one_view_at_a_time_are_on_the_device(found_first, monkeypatch):
    """Those of the next view come where colours have been made; the model is that of rows which the host forwards."""
    spaces, trained = set(), []
    take_space = DeviceReading._take_space

    def take(self: DeviceReading, count: int) -> PackedRows:
        space = take_space(self, count)
        spaces.add((space[0].data_ptr(), count <= len(self._space[0]) <= max_rows + max_rows // 32))
        return space

    monkeypatch.setattr(DeviceReading, "_take_space", take)
    for reads in (False, True):
        torch.manual_seed(0)
        parameters, cameras = aerial_scene(3000, seed=0)
        reading = partial(ForwardedPipeline, device_reads=reads)
        monkeypatch.setattr(
            "offload.models.forwarded.ForwardedPipeline",
            lambda *arguments, device_reads, reading=reading: reading(*arguments),
        )
        gaussians = gaussians_of("geometry on device, compact", parameters, CPU)
        views = views_of(cameras)
        views = [views[0], views[1], views[0], *views[2:5]]  # so that some rows are in two views, or in every second
        max_rows = max(len(gaussians.read_view(view)["means"]) for view in views)
        views[0] = max(views, key=lambda view: len(gaussians.read_view(view)["means"]))  # so that space is taken once
        trained.append(
            [*train_on_colors(gaussians, views, found_first=found_first), *current_values(gaussians.state()).values()]
        )
    for actual, expected in zip(*reversed(trained), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2**-8, atol=2**-10)  # codes may be rounded the other way
    assert len({address for address, _ in spaces}) == 1
    assert all(fits for _, fits in spaces)

    rows = gaussians.fetch(views[-1], 3)
    make = partial(rows["colors"].colors, rows["means"], torch.zeros(1, 3), torch.zeros(2, dtype=torch.int64))
    make(torch.arange(2))
    with pytest.raises(RuntimeError, match="made way"):
        make(torch.arange(2))


def test_rows_that_change_leave_no_memory_to_those_of_a_view():
    """Geometry on the device stands twice while Gaussians are added: nothing may hold on to the rows of a view then."""
    pipeline = make_pipeline(CPU, 300, True, HARMONICS)
    take_step(pipeline, 0, PREFETCHED)
    pipeline.finish()
    words, last_step = map(weakref.ref, pipeline._reading._space)
    pipeline.forget_upcoming()
    assert words() is None
    assert last_step() is None


@pytest.mark.cuda
@pytest.mark.parametrize("travelling", [BOTH, HARMONICS])
def test_many_rows_are_read_while_others_are_written(travelling):
    """Views of several blocks, on a GPU, where the worker commits rows while the device reads others."""
    device, n = torch.device("cuda"), 6 * READ_ROWS
    reading, forwarding = (make_pipeline(device, n, reads, travelling) for reads in (True, False))
    for step in range(6):
        assert_same_values(reading, forwarding, step, PREFETCHED)
    assert_same_stores(reading, forwarding)
