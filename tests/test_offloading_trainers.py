"""Offloading trainers from the command line: evaluation, statistics, errors, and views that show nothing.

That their models are those of GPU-only training: tests/test_same_model.py.
"""

import json
import math
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

import simple_trainer
import simple_trainer_hybrid_baseline
import simple_trainer_hybrid_optimized
import simple_trainer_hybrid_streamed
from offload.adam.deferral import largest_step
from offload.culling.margins import largest_correction, largest_drift
from offload.culling.native import BlockBounds
from offload.culling.visible import VisibleRows
from offload.pipelines import forwarded
from offload.pipelines.forwarded import ForwardedPipeline, Upcoming, shared_positions
from offload.pipelines.streamed_host import StreamedHostPipeline
from strategies.default import DefaultStrategy
from tests.training_scripts import DENSIFICATION, NO_DENSIFICATION, differences, slow_but, train
from training import command_line
from training.checkpoints import load_checkpoint

pytestmark = pytest.mark.usefixtures("anisotropic_gaussians")

BASELINE = pytest.param(simple_trainer_hybrid_baseline, (), id="baseline")
OPTIMIZED = [
    pytest.param(simple_trainer_hybrid_optimized, ("--geometry", place), id=f"geometry on {place}")
    for place in ("device", "host")
]
STREAMED = [
    pytest.param(simple_trainer_hybrid_streamed, ("--geometry", place), id=f"streamed, geometry on {place}")
    for place in ("device", "host")
]
COMPACT = [
    pytest.param(
        simple_trainer_hybrid_streamed, ("--state", "compact", "--geometry", place), id=f"streamed, compact, {place}"
    )
    for place in ("device", "host")
]
COMPACT.append(pytest.param(simple_trainer_hybrid_optimized, ("--state", "compact"), id="optimized, compact"))
ROUNDED = pytest.param(simple_trainer_hybrid_streamed, ("--moments", "bfloat16"), id="streamed, bfloat16")


@pytest.mark.slow
def test_moments_in_bfloat16_stay_close(monkeypatch, city_block, tmp_path):
    """Beside float32, by the way that each parameter goes in training.

    A moment is off by up to 2^-8 at each rounding, and v remembers all 40 of them: a step's size is off by a percent or
    two, in both directions. Geometry feels the other colours only.
    """
    script, options = simple_trainer_hybrid_streamed, (*NO_DENSIFICATION, "--max_steps", 40)
    before = train(monkeypatch, simple_trainer, city_block, tmp_path / "start", *NO_DENSIFICATION, "--max_steps", 1)
    exact = train(monkeypatch, script, city_block, tmp_path / "float32", *options)
    rounded = train(monkeypatch, script, city_block, tmp_path / "bfloat16", *options, "--moments", "bfloat16")
    for name in exact:
        way = (exact[name] - before[name]).norm()
        assert 0 < (rounded[name] - exact[name]).norm() < 0.05 * way, name


@pytest.mark.slow
@pytest.mark.parametrize(("script", "place"), [BASELINE, *OPTIMIZED, *STREAMED, *COMPACT, ROUNDED])
def test_evaluation_and_repetition_change_nothing(monkeypatch, city_block, tmp_path, script, place):
    options = (*DENSIFICATION, "--max_steps", 60, *place)
    hybrid = (script, city_block)
    plain = train(monkeypatch, *hybrid, tmp_path / "plain", *options)
    evaluations = ("2", "17", "31", "46", "58")  # between refinements, after one, and after a reset
    evaluated = train(
        monkeypatch, *hybrid, tmp_path / "evaluated", *options, "--eval_steps", *evaluations, "--ply_steps", 33, 51
    )
    assert all(torch.equal(plain[name], evaluated[name]) for name in plain)


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("out of memory"), ValueError("a defect")], ids=str)
def test_what_has_been_trained_is_saved_when_the_worker_fails(monkeypatch, city_block, tmp_path, capsys, error):
    prepare = ForwardedPipeline._prepare

    def fail_at_step_8(self, *arguments: object) -> object:
        if self._groups["appearance"].adam.step == 8:
            raise error
        return prepare(self, *arguments)

    monkeypatch.setattr(ForwardedPipeline, "_prepare", fail_at_step_8)
    with pytest.raises(SystemExit, match="1"):
        train(monkeypatch, simple_trainer_hybrid_optimized, city_block, tmp_path, "--max_steps", 20)
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("Stopped: ")
    assert "ckpt_8.pt" in message
    assert load_checkpoint(tmp_path / "ckpts/ckpt_8.pt").steps == 8


def test_what_has_been_trained_is_saved_when_the_streamed_worker_fails(monkeypatch, city_block, tmp_path, capsys):
    prepare, options = StreamedHostPipeline._prepare, ("--max_steps", 20, "--geometry", "host")

    def fail_at_step_8(self, *arguments: object) -> object:
        if self.step_count == 8:
            raise ValueError("a defect")
        return prepare(self, *arguments)

    monkeypatch.setattr(StreamedHostPipeline, "_prepare", fail_at_step_8)
    with pytest.raises(SystemExit, match="1"):
        train(monkeypatch, simple_trainer_hybrid_streamed, city_block, tmp_path, *options)
    assert "ckpt_7.pt" in capsys.readouterr().err.splitlines()[-1]
    assert load_checkpoint(tmp_path / "ckpts/ckpt_7.pt").steps == 7


def test_a_failure_to_save_after_an_error_is_a_sentence_too(monkeypatch, city_block, tmp_path, capsys):
    def fail(*arguments: object) -> None:
        raise ValueError("a defect")

    monkeypatch.setattr(DefaultStrategy, "resets_at", lambda self, step: step > 5 and fail())
    monkeypatch.setattr(simple_trainer_hybrid_optimized.ForwardedGaussians, "state", fail)
    with pytest.raises(SystemExit, match="1"):
        train(monkeypatch, simple_trainer_hybrid_optimized, city_block, tmp_path, "--max_steps", 20)
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("Stopped: An error ended training")
    assert "could not be saved (a defect)" in message


@pytest.mark.parametrize(("script", "place"), slow_but(["geometry on host"], [BASELINE, *OPTIMIZED]))
def test_statistics_name_the_stages(monkeypatch, city_block, tmp_path, script, place):
    train(monkeypatch, script, city_block, tmp_path, "--max_steps", 12, "--log_every", 5, *place)
    statistics = json.loads((tmp_path / "stats/train_step12.json").read_text())
    stages = {"load", "fetch", "render", "backward", "update", "densify"} | ({"cull"} if place else set())
    assert set(statistics["stages_ms"]) == stages
    assert sum(statistics["stages_ms"].values()) < 1000 * statistics["elapsed_seconds"] / 12
    # On the CPU nothing is copied, which is all that the baseline times beside its stages.
    worker = {"worker_forward", "worker_commit"} | ({"worker_cull"} if "host" in place else set())
    waiting = {"wait_for_worker", "wait_for_gradients", "update_shared_rows"}
    assert set(statistics["offload_ms"]) == (worker | waiting if place else set())
    assert all(0 < mean < 1000 * statistics["elapsed_seconds"] / 12 for mean in statistics["offload_ms"].values())
    assert statistics["staging_allocations"] == 0  # on the CPU rows are written where they are used


def test_statistics_count_what_travels(monkeypatch, city_block, tmp_path):
    views = []
    fetch = simple_trainer_hybrid_streamed.StreamedGaussians.fetch
    monkeypatch.setattr(
        simple_trainer_hybrid_streamed.StreamedGaussians,
        "fetch",
        lambda self, *told: (fetch(self, *told), views.append(set(self.ids.tolist())))[0],
    )
    options = (*NO_DENSIFICATION, "--max_steps", 12, "--log_every", 5)
    train(monkeypatch, simple_trainer_hybrid_streamed, city_block, tmp_path, *options)
    found = json.loads((tmp_path / "stats/train_step12.json").read_text())["per_step"]
    retained = sum(len(before & view) for before, view in pairwise(views))
    written = sum(map(len, views)) - retained
    rows_of = [set(), set(), *views]  # what the last two views had need not be fetched
    fetched = sum(
        len(view - before - earlier) for earlier, before, view in zip(rows_of, rows_of[1:], views, strict=False)
    )
    assert found == {
        "rows_fetched": fetched / 12,
        "rows_retained": retained / 12,
        "rows_written": written / 12,
        "link_bytes": 576 * (fetched + written) / 12,
    }
    assert retained > 0


@pytest.mark.slow
def test_arranged_views_give_the_model_of_gpu_only_with_less_traffic(monkeypatch, city_block, tmp_path):
    options = (*NO_DENSIFICATION, "--max_steps", 40)
    arranged = (*options, "--view_window", 14)  # of 14 training views
    largest, traffic = [], {}
    for seed in (1, 2, 3):
        place = (*arranged, "--seed", seed)
        expected = train(monkeypatch, simple_trainer, city_block, tmp_path / f"gpu_only {seed}", *place)
        actual = train(monkeypatch, simple_trainer_hybrid_streamed, city_block, tmp_path / f"streamed {seed}", *place)
        largest.append(max(differences(actual, expected).values()))
    assert sorted(largest)[1] < 1e-4  # in one of them rounding may decide whether a pixel passes alpha's threshold
    for name, place in (("drawn", options), ("arranged", arranged)):
        train(monkeypatch, simple_trainer_hybrid_streamed, city_block, tmp_path / name, *place)
        traffic[name] = json.loads((tmp_path / name / "stats/train_step40.json").read_text())["per_step"]
    rows = [per_step["rows_written"] + per_step["rows_retained"] for per_step in traffic.values()]
    assert rows[0] == pytest.approx(rows[1], rel=0.05)  # the views are the same
    assert traffic["arranged"]["rows_written"] < 0.8 * traffic["drawn"]["rows_written"]
    assert traffic["arranged"]["link_bytes"] < 0.9 * traffic["drawn"]["link_bytes"]


@pytest.mark.slow
def test_bounds_of_blocks_are_made_once_when_all_rows_have_changed(monkeypatch, city_block, tmp_path):
    made, changed = [], []
    rebuild, after_step = BlockBounds.rebuild, DefaultStrategy.after_step

    def observed_after_step(self, step: int, info, store, *ids: object) -> bool:
        refined = after_step(self, step, info, store, *ids)
        if refined or self.resets_at(step):
            changed.append(store.num_gaussians)
        return refined

    monkeypatch.setattr(BlockBounds, "rebuild", lambda self, rows: (made.append(len(rows)), rebuild(self, rows)))
    monkeypatch.setattr(DefaultStrategy, "after_step", observed_after_step)
    options = ("--geometry", "host", *DENSIFICATION, "--max_steps", 60)
    train(monkeypatch, simple_trainer_hybrid_optimized, city_block, tmp_path, *options)
    assert len(set(changed)) > 3
    assert made == [600, *changed]


@pytest.mark.slow
def test_a_checkpoint_is_evaluated_as_by_gpu_only(monkeypatch, city_block, tmp_path, capsys):
    train(monkeypatch, simple_trainer, city_block, tmp_path / "run", "--max_steps", 30)
    lines = []
    for script, options in (
        (simple_trainer, ()),
        (simple_trainer_hybrid_baseline, ()),
        (simple_trainer_hybrid_optimized, ("--geometry", "device")),
        (simple_trainer_hybrid_optimized, ("--geometry", "host")),
        (simple_trainer_hybrid_streamed, ()),
        (simple_trainer_hybrid_streamed, ("--geometry", "host")),
    ):
        capsys.readouterr()
        arguments = ("--data_dir", city_block, "--result_dir", tmp_path / "evaluated", "--device", "cpu")
        ckpt = ("--ckpt", tmp_path / "run/ckpts/ckpt_30.pt")
        monkeypatch.setattr(sys, "argv", ["script", "default", *map(str, (*arguments, *ckpt, *options))])
        command_line.main(script.CONFIGS, script.train, "test")
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("Step 30"))
        lines.append(line.split(", LPIPS")[0])
    assert len(set(lines)) == 1


@pytest.mark.slow
def test_bounds_of_adam_steps():
    """No sequence of gradients moves a parameter further than the bounds that culling ahead relies on."""
    betas, generator = (0.9, 0.999), torch.Generator().manual_seed(0)
    worst_step = worst_drift = 0.0
    for pattern in ("growing", "steady", "random"):
        parameter = torch.zeros(50, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([parameter], lr=1.0, betas=betas, eps=1e-15)
        for step in range(-5000, 300):  # late, when bias correction no longer damps the steps
            gradient = torch.zeros(50, dtype=torch.float64)
            if step >= 0 and pattern == "growing":  # where the Cauchy-Schwarz inequality is an equality
                gradient = torch.full((50,), (betas[1] / betas[0]) ** step, dtype=torch.float64)
            elif step >= 0 and pattern == "steady":
                gradient = torch.ones(50, dtype=torch.float64)
            elif step >= 0:
                gradient = torch.randn(50, generator=generator, dtype=torch.float64)
            parameter.grad = gradient
            before = parameter.detach().clone()
            optimizer.step()
            worst_step = max(worst_step, (parameter.detach() - before).abs().max().item())
        before = parameter.detach().clone()
        for _ in range(300):
            parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
        worst_drift = max(worst_drift, (parameter.detach() - before).abs().max().item())
    assert 0.9 * largest_step(betas) < worst_step <= largest_step(betas)
    bound = largest_drift(betas, largest_step(betas))
    assert 0.8 * bound < worst_drift <= bound
    assert math.isclose(largest_step(betas), 7.27, rel_tol=1e-3)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9**4, 0.999**4), (0.0, 0.999), (0.99, 0.999)], ids=str)
def test_bounds_of_early_adam_steps(betas):
    """The same for steps that bias correction still damps, and for what follows when they end at any of them."""
    factors = [math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) for t in range(1, 2001)]
    for step in (1, 2, 10, 100, 2000):
        assert math.isclose(largest_correction(betas, step), max(factors[:step]))
    parameter = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([parameter], lr=1.0, betas=betas, eps=1e-15)
    reached = 0.0
    for step in range(1, 201):
        parameter.grad = torch.tensor((betas[1] / max(betas[0], 0.1)) ** step, dtype=torch.float64)
        before = parameter.item()
        optimizer.step()
        reached = max(reached, abs(parameter.item() - before) / largest_step(betas) / largest_correction(betas, step))
    # The first step's factor, 3.2 at b1 = 0.99, is a bound of all, of which later steps reach 0.15; else all of it.
    assert (0.15 if betas[0] == 0.99 else 0.99) < reached < 1 + 1e-9
    before = parameter.item()
    for _ in range(300):
        parameter.grad.zero_()
        optimizer.step()
    assert abs(parameter.item() - before) <= largest_drift(betas, largest_step(betas)) * largest_correction(betas, 500)


def test_shared_positions():
    ids, other = torch.tensor([1, 4, 5, 9, 12]), torch.tensor([0, 4, 9, 10])
    here, there = shared_positions(ids, other)
    assert (here.tolist(), there.tolist()) == ([1, 3], [1, 2])
    nothing = torch.zeros(0, dtype=torch.int64)
    assert [len(x) for x in shared_positions(ids, nothing) + shared_positions(nothing, ids)] == [0, 0, 0, 0]


@pytest.mark.parametrize(("count", "num_before"), [(0, 0), (0, 7), (7, 0), (30_000, 20_000), (9_000, 60_000)])
def test_rows_of_two_views_are_divided(monkeypatch, count, num_before):
    """As sets say it; the larger views are divided by several threads."""
    monkeypatch.setattr(forwarded, "num_threads", lambda: 3)
    rng = np.random.default_rng(0)
    ids, before = (np.sort(rng.choice(70_000, size, replace=False)) for size in (count, num_before))
    view = VisibleRows(torch.from_numpy(ids), torch.from_numpy(ids))
    upcoming = Upcoming.between(view, view.host_ids, torch.from_numpy(before))
    shared = np.intersect1d(ids, before)
    assert np.array_equal(ids[upcoming.shared_here], shared)
    assert np.array_equal(before[upcoming.shared_before], shared)
    assert np.array_equal(upcoming.only_here_ids, np.setdiff1d(ids, before))
    assert np.array_equal(ids[upcoming.only_here], upcoming.only_here_ids)
    assert np.array_equal(upcoming.only_before_ids, np.setdiff1d(before, ids))
    assert np.array_equal(before[upcoming.only_before], upcoming.only_before_ids)
