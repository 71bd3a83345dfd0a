"""Gradients of harmonics that travel to the host as what they are made of, beside those that travel whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from offload.adam.harmonics import MADE_COLUMNS, HarmonicsGradient
from offload.adam.host import DeferredAdam
from offload.adam.schedules import schedules_of
from offload.pipelines.contract import MEANS, Displacement
from offload.pipelines.forwarded import ForwardedPipeline
from offload.pipelines.groups import RowGroup
from offload.pipelines.tiled import TiledPipeline
from offload.pipelines.transfer import Downloaded, RowTransfer
from offload.store.host_store import HostStore
from offload.tiles.planner import TiledRows, TileRows
from tests.test_device_reading import FORGOTTEN, LATE, PREFETCHED, UNDONE, view
from tests.test_pipeline import ADAM

N, POSITION = 400, (0.3, -1.2, 2.5)
WAYS = ["float32", "compact", "compact, read by the device"]
DEVICES = [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=pytest.mark.cuda)]
# The fifth view has no rows; half of the rows of others are in the next one too.
KINDS = [PREFETCHED, PREFETCHED, LATE, PREFETCHED, PREFETCHED, PREFETCHED, FORGOTTEN, UNDONE, PREFETCHED, PREFETCHED]


def groups_of(state: str, sh_degree: int, device: torch.device) -> dict[str, RowGroup]:
    """Rows of random Gaussians on the host."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"means": (3,), "scales": (3,), "quats": (4,), "opacities": (), "sh0": (1, 3)}
    shapes["shN"] = ((sh_degree + 1) ** 2 - 1, 3)
    parameters = {name: torch.randn(N, *shape, generator=generator) for name, shape in shapes.items()}
    groups = {}
    for name in ("geometry", "appearance"):
        store = HostStore(parameters, name, state=state, pin=device.type == "cuda")
        multipliers, rates = schedules_of(name, sh_degree, ADAM, state)
        groups[name] = RowGroup(store, DeferredAdam(multipliers), rates)
    return groups


def make_pipeline(way: str, device: torch.device, sh_degree: int = 3) -> ForwardedPipeline:
    """Views are named by a number in place of their cameras."""
    state, reads = way.split(",")[0], "read" in way
    return ForwardedPipeline(
        groups_of(state, sh_degree, device), lambda step: view(step, N), device, device_reads=reads
    )


def made_of(geometry: Tensor, step: int, sh_degree: int, has_constant: bool) -> HarmonicsGradient:
    """A gradient of harmonics in rows [V] with these values: a third are not drawn, one of which lies nowhere."""
    generator = torch.Generator().manual_seed(step)
    means = geometry[:, MEANS].clone()
    constant = 1e-3 * torch.randn(len(means), 3, generator=generator).to(means.device)
    constant[::3] = 0
    means[:1] = torch.nan
    return HarmonicsGradient(means, constant, POSITION, sh_degree, has_constant)


def take_step(pipeline: ForwardedPipeline, step: int, kind: int, *, is_made: bool, degree: int) -> Tensor:
    """Take a step whose gradients depend on the values of means alone; return the harmonics that it was given."""
    group = pipeline._groups["appearance"]

    def fetch() -> tuple:
        return pipeline.fetch_stored(step, "appearance") if is_made else (pipeline.fetch(step), None)

    rows, stored = fetch()
    if kind == UNDONE:
        pipeline.prefetch(step + 1)
        pipeline.undo_step(step)
        rows, stored = fetch()
    if kind != LATE:
        pipeline.prefetch(step + 1)
    geometry = rows.values["geometry"]
    made = made_of(geometry.detach(), step, degree, group.store.layout.has_constant)
    offsets = torch.sin(rows.host_ids[:, None] * (1.0 + step) + torch.arange(geometry.shape[1]))
    geometry.grad = 1e-3 * offsets.to(geometry.device)
    if len(rows.ids) and step % 2:
        moved = torch.arange(0, len(rows.ids), 2)
        pipeline.displace(Displacement(moved, 0.1 * torch.ones(len(moved), 3)))
    if stored is None:
        values = rows.values["appearance"].detach().clone()
        rows.values["appearance"].grad = made.dense(group.adam.columns)
        pipeline.update()
    else:
        assert list(rows.values) == ["geometry"]
        assert stored.has_constant == group.store.layout.has_constant
        # Colours are made in the kernels of a device; here are rows as plain torch reads them.
        values = stored.of(torch.arange(len(rows.ids), device=rows.ids.device))
        pipeline.update(made)
        stored.forget()
    if kind == FORGOTTEN:
        pipeline.forget_upcoming()
    return values.cpu()


def assert_close(actual: Tensor, expected: Tensor, way: str) -> None:
    """Compare values of rows.

    The host may make gradients in another order of operations. A harmonic near zero, where its terms cancel, has few
    digits right then, and Adam's first steps have the size of the learning rate, 1e-3, whatever the gradient's: they
    are off by a hundredth at most. In a compact state a value and a moment may then be rounded the other way, to the
    next float16 or code, here and there, and what follows differs as much.
    """
    if way == "float32":
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        return
    torch.testing.assert_close(actual, expected, rtol=2**-8, atol=2**-10)
    assert ((actual - expected).abs() > 1e-5).sum() <= 1 + actual.numel() / 20


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", WAYS)
def test_rows_are_those_of_gradients_that_travel_whole(way, device):
    """From degree to degree, among steps of several cameras, whose gradients travel whole in either."""
    made, dense = (make_pipeline(way, device) for _ in range(2))
    for step, kind in enumerate(KINDS):
        is_made, degree = step != 8, min(step // 2, 3)
        actual = take_step(made, step, kind, is_made=is_made, degree=degree)
        assert_close(actual, take_step(dense, step, kind, is_made=False, degree=degree), way)
    assert any(len(set(view(step, N).tolist()) & set(view(step + 1, N).tolist())) > 20 for step in range(len(KINDS)))
    for pipeline in (made, dense):
        pipeline.finish()
    for name in ("geometry", "appearance"):
        assert torch.equal(made.last_step(name), dense.last_step(name))
        assert_close(made.read(name, torch.arange(N)), dense.read(name, torch.arange(N)), way)


@pytest.mark.parametrize("degree", range(4))
@pytest.mark.parametrize("way", WAYS)
def test_rows_of_each_degree(way, degree):
    """Of harmonics that have no higher ones."""
    made, dense = (make_pipeline(way, torch.device("cpu"), degree) for _ in range(2))
    for step in range(4):
        actual, expected = (
            take_step(pipeline, step, PREFETCHED, is_made=pipeline is made, degree=degree) for pipeline in (made, dense)
        )
        assert_close(actual, expected, way)
    assert_close(*(pipeline.read("appearance", torch.arange(N)) for pipeline in (made, dense)), way)


@pytest.mark.parametrize("way", WAYS)
def test_no_gradient_of_harmonics_travels(way, monkeypatch):
    download, widths = RowTransfer.download, []

    def noted(self, rows: Tensor, *, urgent: bool = False) -> Downloaded:
        widths.append((urgent, rows.shape[1]))
        return download(self, rows, urgent=urgent)

    monkeypatch.setattr(RowTransfer, "download", noted)
    pipeline = make_pipeline(way, torch.device("cpu"))
    take_step(pipeline, 0, PREFETCHED, is_made=True, degree=3)
    geometry = pipeline._groups["geometry"].adam.columns
    assert widths == [(urgent, width) for urgent in (False, True) for width in (geometry, MADE_COLUMNS)]


@pytest.mark.parametrize("way", WAYS)
def test_a_step_whose_gradients_have_been_sent_may_be_undone_still(way, monkeypatch):
    pipeline, twin = (make_pipeline(way, torch.device("cpu")) for _ in range(2))
    for each in (pipeline, twin):
        for step in range(3):
            take_step(each, step, PREFETCHED, is_made=True, degree=3)
    send = pipeline._download_urgently

    def fail(*arguments: object) -> None:
        send(*arguments)
        raise torch.cuda.OutOfMemoryError("on purpose")

    with monkeypatch.context() as failing:
        failing.setattr(pipeline, "_download_urgently", fail)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            take_step(pipeline, 3, PREFETCHED, is_made=True, degree=3)
    pipeline.undo_step(3)
    for step in range(3, 5):
        # Whichever way the step goes that is taken again.
        actual, expected = (take_step(each, step, PREFETCHED, is_made=True, degree=2) for each in (pipeline, twin))
        assert torch.equal(actual, expected)
    for each in (pipeline, twin):
        each.finish()
    for name, group in pipeline._groups.items():
        for here, there in zip(group.store.rows.tensors(), twin._groups[name].store.rows.tensors(), strict=True):
            assert torch.equal(here, there)


def test_an_update_that_lacks_memory_may_be_repeated(monkeypatch):
    """As the split trainer does, before anything is changed."""
    pipeline, twin = (make_pipeline("float32", torch.device("cpu")) for _ in range(2))
    download, update = RowTransfer.download, pipeline.update

    def fail_once(self, rows: Tensor, *, urgent: bool = False) -> Downloaded:
        monkeypatch.setattr(RowTransfer, "download", download)
        raise torch.cuda.OutOfMemoryError("on purpose")

    def update_again(made: HarmonicsGradient) -> None:
        monkeypatch.setattr(RowTransfer, "download", fail_once)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            update(made)
        update(made)

    monkeypatch.setattr(pipeline, "update", update_again)
    for step in range(3):
        for each in (pipeline, twin):
            take_step(each, step, PREFETCHED, is_made=True, degree=3)
    assert torch.equal(*(each.read("appearance", torch.arange(N)) for each in (pipeline, twin)))


def test_a_view_in_one_tile_may_be_fetched_so_and_one_in_several_may_not():
    def find(step: int) -> TiledRows:
        ids = view(step, N)
        halves = [ids.new_tensor(range(len(ids) // 2)), ids.new_tensor(range(len(ids) // 2, len(ids)))]
        return TiledRows(ids, ids, [TileRows()] if step < 3 else [TileRows((), rows, rows) for rows in halves])

    cpu = torch.device("cpu")
    tiled, whole = TiledPipeline(groups_of("float32", 3, cpu), find, cpu), make_pipeline("float32", cpu)
    for step in range(3):
        for pipeline in (tiled, whole):
            take_step(pipeline, step, PREFETCHED, is_made=True, degree=3)
    assert torch.equal(*(pipeline.read("appearance", torch.arange(N)) for pipeline in (tiled, whole)))
    with pytest.raises(RuntimeError, match="tile by tile"):
        tiled.fetch_stored(3, "appearance")
