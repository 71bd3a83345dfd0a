"""Views that come in parts leave the rows of the store as views that come whole."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from offload.adam.host import DeferredAdam
from offload.adam.options import AdamOptions
from offload.adam.schedules import schedules_of
from offload.pipelines.groups import RowGroup
from offload.pipelines.tiled import TiledPipeline
from offload.pipelines.transfer import RowTransfer
from offload.store.host_store import HostStore
from offload.tiles.planner import TiledRows, TileRows

N, STEPS = 400, 25
RATES = {"means": 1e-2, "scales": 2e-2, "quats": 1e-2, "opacities": 3e-2, "sh0": 1e-2, "shN": 1e-3}
ADAM = AdamOptions(RATES, lambda step: 1e-2 * 0.99**step, (0.9, 0.999))


def random_ids(seed: int) -> Tensor:
    """The rows of a view: a third of all, anew for each seed."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(N, generator=generator) < 0.35).nonzero().squeeze(1)


def random_parts(num_rows: int, num_parts: int, seed: int) -> list[TileRows]:
    """Parts that overlap by about a tenth of their rows, one of them empty."""
    generator = torch.Generator().manual_seed(seed)
    home = torch.randint(num_parts, (num_rows,), generator=generator)
    parts = []
    for part in range(num_parts):
        rows = ((home == part) | (torch.rand(num_rows, generator=generator) < 0.1)).nonzero().squeeze(1)
        rows = rows[:0] if part == 3 else rows
        parts.append(TileRows((), rows, rows))
    missing = torch.ones(num_rows, dtype=torch.bool)
    for part in parts:
        missing[part.rows] = False
    rows = missing.nonzero().squeeze(1)
    return [*parts, TileRows((), rows, rows)]


def rows_of(part: TileRows) -> Tensor | slice:
    return slice(None) if part.rows is None else part.rows


def make_pipeline(num_parts: int) -> TiledPipeline:
    """Views are named by a number in place of their cameras."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"means": (3,), "scales": (3,), "quats": (4,), "opacities": (), "sh0": (1, 3), "shN": (15, 3)}
    parameters = {name: torch.randn(N, *shape, generator=generator) for name, shape in shapes.items()}
    groups = {}
    for name in ("geometry", "appearance"):
        store = HostStore(parameters, name)
        multipliers, rates = schedules_of(name, store.sh_degree, ADAM)
        groups[name] = RowGroup(store, DeferredAdam(multipliers), rates)

    def find(view: int) -> TiledRows:
        ids = random_ids(view)
        return TiledRows(ids, ids, [TileRows()] if num_parts == 1 else random_parts(len(ids), num_parts, seed=view))

    return TiledPipeline(groups, find, torch.device("cpu"))


def train(pipeline: TiledPipeline, *, split_at: int = -1) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The rows after all steps, and for each step the sum over the view of the values it was given.

    The gradient of a row is its value plus a number that depends on view and row. Parts share it equally.
    """
    seen = []
    for step in range(STEPS):
        parts = pipeline.begin(step).tiles  # follows replace_tile
        counts = torch.zeros(len(random_ids(step)))
        for part in parts:
            counts[rows_of(part)] += 1
        shares = [1 / counts[rows_of(part)][:, None] for part in parts]
        sums = torch.zeros(48)
        index = 0
        while index < len(shares):
            part = pipeline.fetch_tile()
            pipeline.prefetch(None if step % 7 == 3 else step + 1)
            if step == split_at and index == 1 and len(parts) == len(random_parts(9, 4, 0)):
                middle, rows, share = len(part.host_ids) // 2, rows_of(pipeline.tile), shares[1].clone()
                halves = [slice(middle + 9), slice(middle - 9, None)]
                share[middle - 9 : middle + 9] /= 2
                pipeline.abandon_tile()
                pipeline.replace_tile([TileRows((), rows[half], rows[half]) for half in halves])
                shares[1:2] = [share[half] for half in halves]
                continue
            offsets = torch.sin(part.host_ids * (1.0 + step))[:, None]
            for values in part.values.values():
                values.grad = (values.detach() + offsets) * shares[index]
            sums += (part.values["appearance"].detach() * shares[index]).sum(0)
            index += 1
            if index < len(shares):
                pipeline.next_tile()
        pipeline.update()
        seen.append(sums)
    return {name: pipeline.read(name, torch.arange(N)) for name in ("geometry", "appearance")}, seen


@pytest.fixture(scope="module")
def whole() -> tuple[dict[str, Tensor], list[Tensor]]:
    return train(make_pipeline(1))


def check(actual: tuple, expected: tuple) -> None:
    for name, rows in expected[0].items():
        assert (actual[0][name] - rows).abs().max() < 2e-6
    for here, there in zip(actual[1], expected[1], strict=True):
        assert torch.allclose(here, there, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("num_parts", [2, 5])
def test_parts_equal_the_whole(whole, num_parts):
    check(train(make_pipeline(num_parts)), whole)


def test_a_part_may_be_replaced_by_finer_ones(whole):
    check(train(make_pipeline(4), split_at=6), whole)


def repeated(method: Callable) -> Callable:
    """Do as a method, once more where memory runs out."""

    def call(*arguments: object):
        try:
            return method(*arguments)
        except torch.cuda.OutOfMemoryError:
            return method(*arguments)

    return call


def test_an_upload_that_ran_out_of_memory_is_repeated(whole, monkeypatch):
    upload, failures = RowTransfer.upload, []

    def fail_now_and_then(self, *arguments: object):
        fail_now_and_then.calls += 1
        if fail_now_and_then.calls % 9 == 0:
            failures.append(True)
            raise torch.cuda.OutOfMemoryError("out of memory")
        return upload(self, *arguments)

    fail_now_and_then.calls = 0
    monkeypatch.setattr(RowTransfer, "upload", fail_now_and_then)
    pipeline = make_pipeline(4)
    for name in ("begin", "fetch_tile", "next_tile", "update", "finish"):
        monkeypatch.setattr(pipeline, name, repeated(getattr(pipeline, name)))
    check(train(pipeline), whole)
    assert len(failures) > 10


@pytest.mark.parametrize("num_parts", [1, 4])
def test_an_update_that_has_begun_to_change_rows_is_not_repeated(num_parts, monkeypatch):
    """Rows of several tiles would get the gradient of the last one twice."""
    complete = RowTransfer.complete

    def fail_once(*arguments: object) -> None:
        monkeypatch.setattr(RowTransfer, "complete", complete)
        raise torch.cuda.OutOfMemoryError("out of memory")

    monkeypatch.setattr(RowTransfer, "complete", fail_once)
    pipeline = make_pipeline(num_parts)
    monkeypatch.setattr(pipeline, "update", repeated(pipeline.update))
    with pytest.raises(torch.cuda.OutOfMemoryError, match="in part"):
        train(pipeline)
    with pytest.raises(RuntimeError, match="in part"):
        pipeline.undo_step(0)


@pytest.mark.slow
@pytest.mark.parametrize("num_parts", [1, 4])
def test_slow_commits_are_waited_for(monkeypatch, num_parts):
    """Whether the next view has been prefetched or not, and at the end."""
    expected = train(make_pipeline(num_parts))
    commit = DeferredAdam.commit

    def commit_slowly(self, *arguments: object, **options: object) -> None:
        time.sleep(0.01)
        commit(self, *arguments, **options)

    monkeypatch.setattr(DeferredAdam, "commit", commit_slowly)
    rows, seen = train(make_pipeline(num_parts))
    assert all(torch.equal(rows[name], expected[0][name]) for name in rows)
    assert all(map(torch.equal, seen, expected[1]))


def test_a_sum_that_is_off_is_noticed(whole, monkeypatch):
    pipeline = make_pipeline(4)
    next_tile = pipeline.next_tile

    def next_tile_with_error() -> None:
        next_tile()
        pipeline._progress.sums["appearance"] += 0.1

    monkeypatch.setattr(pipeline, "next_tile", next_tile_with_error)
    with pytest.raises(AssertionError):
        check(train(pipeline), whole)
