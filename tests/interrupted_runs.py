"""Runs of trainer scripts that stop and go on, for tests of what they leave behind."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import simple_trainer
import simple_trainer_hybrid_baseline
import simple_trainer_hybrid_optimized
import simple_trainer_hybrid_optimized_split
import simple_trainer_hybrid_streamed
from training import command_line
from training.checkpoints import Checkpoint, load_checkpoint
from training.run import TrainingRun

# A script and the options that choose its variant.
SCRIPTS = [
    pytest.param(simple_trainer, (), id="gpu-only"),
    pytest.param(simple_trainer, ("--adam", "deferred"), id="gpu-only, deferred"),
    pytest.param(simple_trainer_hybrid_baseline, (), id="baseline"),
    pytest.param(simple_trainer_hybrid_optimized, ("--geometry", "device"), id="optimized"),
    pytest.param(simple_trainer_hybrid_optimized, ("--geometry", "host"), id="optimized, geometry on host"),
    pytest.param(simple_trainer_hybrid_streamed, (), id="streamed"),
    pytest.param(simple_trainer_hybrid_streamed, ("--geometry", "host"), id="streamed, geometry on host"),
    pytest.param(simple_trainer_hybrid_optimized, ("--state", "compact"), id="optimized, compact"),
    pytest.param(simple_trainer_hybrid_streamed, ("--state", "compact"), id="streamed, compact"),
    pytest.param(simple_trainer_hybrid_optimized_split, ("--split_threshold", 0.5), id="split"),
]
FLOAT32_SCRIPTS = [each for each in SCRIPTS if "compact" not in each.values[1]]  # which go on without rounding
STEPS = 60
DENSIFYING = (
    *("--max_steps", STEPS, "--refine_start_iter", 10, "--refine_every", 10, "--reset_every", 25),
    *("--refine_stop_iter", 50, "--sh_degree_interval", 15, "--grow_grad2d", 1e-4, "--random_background"),
    *("--num_workers", 1),
)


def run_script(monkeypatch, script: ModuleType, data_dir: Path, result_dir: Path, *options: object) -> int:
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
    """Load the checkpoint that a run has saved after so many steps."""
    return load_checkpoint(result_dir / f"ckpts/ckpt_{steps}.pt")


def assert_same_state(actual: Checkpoint, expected: Checkpoint) -> None:
    """Compare all that training goes on from, bit for bit; only the clock may have gone on."""
    assert actual.state.keys() == expected.state.keys()
    for name, value in expected.state.items():
        if name != "elapsed_seconds":
            assert torch.equal(actual.state[name], value), name
