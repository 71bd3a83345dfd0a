"""Once every view has been seen, a training step allocates nothing that stays, and stages no more memory."""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from datasets.synthetic import write_city_block
from offload.pipelines.worker import WorkAhead
from tests.training_scripts import slow_but, train
from trainers import TRAINERS
from training import tiles
from training.event_log import EventLog

LIBC = ctypes.CDLL(None)
CONSTANT_NUMBER = ("--refine_start_iter", 10**6, "--sh_degree_interval", 1, "--log_every", 10)


@pytest.fixture(scope="module")
def city_block(tmp_path_factory) -> Path:
    data_dir = tmp_path_factory.mktemp("data") / "city_block"
    write_city_block(data_dir, num_views=16, width=48, height=36, num_points=3000)
    return data_dir


class Mallinfo2(ctypes.Structure):
    """What glibc's `mallinfo2` returns."""

    _fields_ = (("sizes", ctypes.c_size_t * 10),)


def allocated_bytes() -> int:
    """Bytes that the process has from malloc, as all tensors' are: unlike resident memory, no matter of chance."""
    LIBC.mallinfo2.restype = Mallinfo2
    _, _, _, _, mapped, _, _, in_arenas, _, _ = LIBC.mallinfo2().sizes
    return mapped + in_arenas


@pytest.fixture
def log(monkeypatch) -> Iterator[dict[str, dict[int, float]]]:
    """What is logged of memory by name and step, with what the process has allocated."""
    logged = {"allocated_bytes": {}}
    workers: list[WorkAhead] = []
    begin = WorkAhead.__init__

    def noted(self, *arguments: object) -> None:
        begin(self, *arguments)
        workers.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        if name.startswith("memory/"):
            logged.setdefault(name.removeprefix("memory/"), {})[step] = value
        elif name == "train/loss" and hasattr(LIBC, "mallinfo2"):
            if not logged["allocated_bytes"]:
                gc.freeze()  # so that collections visit what training makes, and not all modules
            for worker in workers:
                worker._thread.submit(int).result()  # how far it has come, and what it holds, is a matter of chance
            gc.collect()
            logged["allocated_bytes"][step] = allocated_bytes()

    monkeypatch.setattr(WorkAhead, "__init__", noted)
    monkeypatch.setattr(EventLog, "add_scalar", add_scalar)
    yield logged
    gc.unfreeze()


def mean(values: dict[int, float], first: int, last: int) -> float:
    chosen = [value for step, value in values.items() if first < step <= last]
    return sum(chosen) / len(chosen)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(LIBC, "mallinfo2"), reason="needs glibc 2.33 or newer")
@pytest.mark.parametrize("trainer", TRAINERS)
def test_host_memory_does_not_creep(monkeypatch, city_block, tmp_path, log, trainer):
    """A view's rows are 600 KB; 4 KB that are kept from each step are noticed."""
    way = TRAINERS[trainer]
    train(monkeypatch, way.load(), city_block, tmp_path, *CONSTANT_NUMBER, "--max_steps", 300, *way.arguments)
    allocated = log["allocated_bytes"]
    assert mean(allocated, 200, 300) - mean(allocated, 100, 200) < 0.3e6  # 0.08e6 where nothing is kept
    staged = log.get("staging_allocations", {300: 0})
    assert len(set(list(staged.values())[-20:])) == 1


@pytest.mark.parametrize("trainer", slow_but(("streamed_compact",), TRAINERS))
def test_a_step_is_forgotten_when_the_next_view_is_rendered(monkeypatch, city_block, tmp_path, trainer):
    """Any tensor of its graph would keep the leaves: the rows of the view, their gradients, and where they lie."""
    way = TRAINERS[trainer]
    script = way.load()
    module = script if hasattr(script, "render") else tiles
    render, rendered, steps = module.render, {}, []

    def watched_render(*arguments, **options):
        if not torch.is_grad_enabled():  # an evaluation, in the midst of a step
            return render(*arguments, **options)
        assert [name for name, tensor in rendered.items() if tensor() is not None] == []
        colors, info = render(*arguments, **options)
        tensors = {"colors": colors, "means2d": info["means2d"]}
        rendered.update({name: weakref.ref(tensor) for name, tensor in tensors.items()})
        steps.append(len(rendered))
        return colors, info

    monkeypatch.setattr(module, "render", watched_render)
    train(monkeypatch, script, city_block, tmp_path, *CONSTANT_NUMBER, "--max_steps", 3, *way.arguments)
    assert len(steps) >= 3


@pytest.mark.cuda
@pytest.mark.parametrize("trainer", TRAINERS)
def test_device_memory_does_not_creep_over_5000_steps(monkeypatch, city_block, tmp_path, log, trainer):
    way, options = TRAINERS[trainer], ("--device", "cuda", *CONSTANT_NUMBER, "--max_steps", 5000)
    train(monkeypatch, way.load(), city_block, tmp_path, *options, *way.arguments)
    allocated = {step: gib * 2**30 for step, gib in log["device_allocated_now_GiB"].items()}
    # As many views are on the device at any time, so the mean over many steps is constant, but for the tables of
    # skipped steps, which double at step 4,096 (offload/adam/deferral.py). 150 bytes kept from each step are noticed.
    early, late = mean(allocated, 1000, 3000), mean(allocated, 3000, 5000)
    assert late == pytest.approx(early, abs=0.3e6)  # 0.12e6 where nothing is kept
    staged = list(log.get("staging_allocations", {5000: 0}).values())
    assert len(set(staged[-400:])) == 1  # all but the first 1000 steps
