"""A run that was interrupted and resumed gives, bit for bit on the CPU, what one that never stopped gives."""

import os
import random
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_offloading_trainers import _anisotropic_start, differences  # noqa: F401, the fixture is for all tests here

import simple_trainer
import simple_trainer_hybrid_baseline
import simple_trainer_hybrid_optimized
import simple_trainer_hybrid_optimized_split
import simple_trainer_hybrid_streamed
from datasets.synthetic import write_city_block
from offload.adam.state import current_rows
from training import command_line
from training.checkpoints import Checkpoint, load_checkpoint
from training.ply import load_ply
from training.run import TrainingRun

TRAINERS = [
    pytest.param(simple_trainer, (), id="gpu-only"),
    pytest.param(simple_trainer_hybrid_baseline, (), id="baseline"),
    pytest.param(simple_trainer_hybrid_optimized, ("--geometry", "device"), id="optimized"),
    pytest.param(simple_trainer_hybrid_optimized, ("--geometry", "host"), id="optimized, geometry on host"),
    pytest.param(simple_trainer_hybrid_streamed, (), id="streamed"),
    pytest.param(simple_trainer_hybrid_streamed, ("--geometry", "host"), id="streamed, geometry on host"),
    pytest.param(simple_trainer_hybrid_optimized_split, ("--split_threshold", 0.5), id="split"),
]
ROUNDED = [
    pytest.param(
        simple_trainer_hybrid_streamed, ("--moments", "bfloat16", "--geometry", place), id=f"bfloat16, {place}"
    )
    for place in ("device", "host")
]
STEPS = 60
DENSIFYING = (
    *("--max_steps", STEPS, "--refine_start_iter", 10, "--refine_every", 10, "--reset_every", 25),
    *("--refine_stop_iter", 50, "--sh_degree_interval", 15, "--grow_grad2d", 1e-4, "--random_background"),
    *("--num_workers", 1),
)


@pytest.fixture(scope="module")
def city_block(tmp_path_factory) -> Path:
    data_dir = tmp_path_factory.mktemp("data") / "city_block"
    write_city_block(data_dir, num_views=16, width=130, height=40, num_points=600)
    return data_dir


def train(monkeypatch, script: ModuleType, data_dir: Path, result_dir: Path, *options: object) -> int:
    """Run a trainer script in this process; returns its exit code."""
    common = ("--data_dir", data_dir, "--result_dir", result_dir, "--device", "cpu")
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "default", *map(str, (*common, *options))])
    try:
        command_line.main(script.CONFIGS, script.train, "test")
    except SystemExit as stop:
        return stop.code or 0
    return 0


def interrupt_after(monkeypatch, *steps_done: int, number: int = signal.SIGINT) -> None:
    """Send this process a signal after these numbers of steps, as if it came while the step was computed."""
    after_step = TrainingRun.after_step

    def interrupted(self, step: int, *arguments: object) -> None:
        if step + 1 in steps_done:
            os.kill(os.getpid(), number)
        after_step(self, step, *arguments)

    monkeypatch.setattr(TrainingRun, "after_step", interrupted)


def saved(result_dir: Path, steps: int = STEPS) -> Checkpoint:
    return load_checkpoint(result_dir / f"ckpts/ckpt_{steps}.pt")


def assert_same_state(actual: Checkpoint, expected: Checkpoint) -> None:
    assert actual.state.keys() == expected.state.keys()
    for name, value in expected.state.items():
        if name != "elapsed_seconds":
            assert torch.equal(actual.state[name], value), name


ARRANGED = pytest.param(simple_trainer_hybrid_streamed, ("--view_window", 5), id="streamed, views arranged")


@pytest.mark.slow
@pytest.mark.parametrize(("script", "place"), [*TRAINERS, *ROUNDED, ARRANGED])
def test_an_interrupted_run_is_bit_equal(monkeypatch, city_block, tmp_path, script, place):
    options = (*DENSIFYING, "--keep", 0, *place)
    assert train(monkeypatch, script, city_block, tmp_path / "whole", *options) == 0
    stops = [*sorted(random.Random(script.__name__ + str(place)).sample(range(1, STEPS), 4)), 30, 31, 50]
    interrupt_after(monkeypatch, *stops)
    for _ in stops:
        assert train(monkeypatch, script, city_block, tmp_path / "parts", *options, "--resume") == 0
    assert train(monkeypatch, script, city_block, tmp_path / "parts", *options, "--resume") == 0
    assert len(saved(tmp_path / "whole").gaussians["means"]) > 700
    assert_same_state(saved(tmp_path / "parts"), saved(tmp_path / "whole"))
    if script is simple_trainer_hybrid_optimized_split:
        assert any("upcoming/tiles" in saved(tmp_path / "parts", stop).state for stop in stops)


def test_saving_changes_nothing(monkeypatch, city_block, tmp_path):
    script, options = simple_trainer_hybrid_optimized, (*DENSIFYING, "--geometry", "host")
    assert train(monkeypatch, script, city_block, tmp_path / "plain", *options) == 0
    assert train(monkeypatch, script, city_block, tmp_path / "saving", *options, "--save_every", 3, "--keep", 0) == 0
    assert len(list((tmp_path / "saving/ckpts").iterdir())) == STEPS // 3
    assert_same_state(saved(tmp_path / "saving"), saved(tmp_path / "plain"))


@pytest.mark.slow
@pytest.mark.parametrize(("after_script", "after_place"), TRAINERS)
@pytest.mark.parametrize(("before_script", "before_place"), [TRAINERS[0], TRAINERS[3], TRAINERS[4]])
def test_another_trainer_goes_on(
    monkeypatch, city_block, tmp_path, before_script, before_place, after_script, after_place
):
    """Its first step after the change gives what the first trainer's would have given, up to rounding."""
    options = ("--max_steps", 21, "--save_steps", 20, "--refine_start_iter", 1000, "--num_workers", 1)
    assert train(monkeypatch, before_script, city_block, tmp_path / "whole", *options, *before_place) == 0
    (tmp_path / "changed/ckpts").mkdir(parents=True)
    (tmp_path / "whole/ckpts/ckpt_20.pt").rename(tmp_path / "changed/ckpts/ckpt_20.pt")
    options = (*options, "--max_gaussians", 700, "--resume")
    assert train(monkeypatch, after_script, city_block, tmp_path / "changed", *options, *after_place) == 0
    expected, actual = saved(tmp_path / "whole", 21), saved(tmp_path / "changed", 21)
    for name, value in expected.gaussians.items():
        assert torch.allclose(actual.gaussians[name], value, rtol=1e-5, atol=1e-6), name
    current = (next(current_rows(checkpoint.state, "sh0"))[1] for checkpoint in (expected, actual))
    moments, other_moments = (rows["exp_avg"] for rows in current)
    assert (moments - other_moments).norm() < 1e-5 * moments.norm()


def test_a_deferred_checkpoint_holds_current_values(monkeypatch, city_block, tmp_path):
    """What --ckpt evaluates is what the PLY file holds, although rows in the file lag behind."""
    options = ("--max_steps", 30, "--geometry", "host", "--refine_start_iter", 1000)
    assert train(monkeypatch, simple_trainer_hybrid_optimized, city_block, tmp_path, *options) == 0
    exported, checkpoint = load_ply(tmp_path / "ply/point_cloud_30.ply"), saved(tmp_path, 30)
    assert (checkpoint.state["last_step/appearance"] < 30).any()
    assert not torch.equal(checkpoint.state["parameters/sh0"], exported["sh0"])
    for name, value in checkpoint.gaussians.items():
        assert torch.allclose(value, exported[name], rtol=1e-6, atol=1e-7), name


@pytest.mark.cuda
@pytest.mark.parametrize(("script", "place"), TRAINERS)
def test_an_interrupted_run_on_the_gpu_is_the_same_up_to_rounding(monkeypatch, city_block, tmp_path, script, place):
    """As far as two undisturbed runs are the same: the rasterizer adds in any order."""
    options = ("--max_steps", 40, "--refine_start_iter", 10**6, "--sh_degree_interval", 10, "--device", "cuda", *place)
    assert train(monkeypatch, script, city_block, tmp_path / "whole", *options) == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 13, 27)
        for _ in range(3):
            assert train(patch, script, city_block, tmp_path / "parts", *options, "--resume") == 0
    found = differences(saved(tmp_path / "parts", 40).gaussians, saved(tmp_path / "whole", 40).gaussians)
    assert max(found.values()) < 1e-4, found
