"""Runs trainer scripts in this process, from a start at which two runs can be compared."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from trainers import TRAINERS
from training import command_line
from training.checkpoints import load_checkpoint
from training.gaussians import initial_gaussians

ROUNDED_OPTIONS = {("moments", "bfloat16"), ("state", "compact")}
ROUNDED = [name for name, way in TRAINERS.items() if ROUNDED_OPTIONS & set(way.options.items())]
EXACT = [name for name in TRAINERS if name not in ROUNDED]  # that keep all in float32
QUICK_TRAINERS = ("gpu_only", "split", "streamed_compact")  # three scripts, all kinds of Adam, both states


def slow_but(quick: Collection[str], cases: Iterable) -> list:
    """Mark the cases of a test as slow, but for those of these ids.

    A run of a script takes most of a second: where a test runs it for many cases, the quick set has one of each kind.
    """
    marked = []
    for case in cases:
        values, name = (case.values, case.id) if hasattr(case, "values") else ((case,), str(case))
        marked.append(pytest.param(*values, id=name, marks=() if name in quick else pytest.mark.slow))
    return marked


def train(
    monkeypatch: pytest.MonkeyPatch, script, data_dir: Path, result_dir: Path, *options: object
) -> dict[str, Tensor]:
    """The Gaussians after training with a script."""
    common = ("--data_dir", data_dir, "--result_dir", result_dir, "--device", "cpu")
    monkeypatch.setattr("sys.argv", ["script", "default", *map(str, (*common, *options))])
    command_line.main(script.CONFIGS, script.train, "test")
    (checkpoint,) = (result_dir / "ckpts").iterdir()
    return load_checkpoint(checkpoint).gaussians


def anisotropic_start(points: np.ndarray, *arguments: object, **options: object) -> dict[str, Tensor]:
    """Initial Gaussians whose axes differ, as those of any trained model do.

    Turning a ball changes nothing, so its quaternion's gradient is rounding noise, which Adam scales to full steps:
    from equal axes two runs that differ by one rounding anywhere have other quaternions after a few steps.
    """
    parameters = initial_gaussians(points, *arguments, **options)
    parameters["scales"] += 0.3 * torch.randn(len(points), 3, generator=torch.Generator().manual_seed(0))
    return parameters


def start_one_ulp_off(points: np.ndarray, *arguments: object, draw: int = 1, **options: object) -> dict[str, Tensor]:
    """Return `anisotropic_start` with every number moved to the next float, up or down at random; zeros stay.

    Args:
        draw: Which of many such starts.
    """
    generator, infinity = torch.Generator().manual_seed(draw), torch.tensor(torch.inf)
    moved = {}
    for name, value in anisotropic_start(points, *arguments, **options).items():
        upwards = torch.rand(value.shape, generator=generator) < 0.5
        neighbour = torch.nextafter(value, torch.where(upwards, infinity, -infinity))
        moved[name] = torch.where(value == 0, value, neighbour)
    return moved


NO_DENSIFICATION = ("--refine_start_iter", 10**6, "--sh_degree_interval", 10)
DENSIFICATION = (
    *("--refine_start_iter", 10, "--refine_every", 10, "--reset_every", 45, "--refine_stop_iter", 80),
    *("--sh_degree_interval", 15, "--grow_grad2d", 1e-4),
)

# With noise, which what is nearly transparent has; a dozen rows a step leave the margin of culling by it.
MCMC = (
    *("--strategy", "mcmc", "--max_gaussians", 2100, "--init_opacity", 0.05, "--refine_start_iter", 5),
    *("--refine_every", 10, "--refine_stop_iter", 50, "--sh_degree_interval", 10),
)


def differences(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative norm of the difference of each tensor, without the 2 % of rows that differ most.

    Rounding decides now and then whether a pixel passes the threshold of alpha (1/255), which disturbs the few
    Gaussians there; a wrong update disturbs them all.
    """
    found = {}
    for name, value in expected.items():
        rows = (actual[name] - value).reshape(len(value), -1).norm(dim=1)
        found[name] = (rows.sort().values[: max(len(rows) * 98 // 100, 1)].norm() / value.norm()).item()
    return found
