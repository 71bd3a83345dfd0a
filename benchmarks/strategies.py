"""What MCMC costs beside the default strategy: milliseconds of a step, and of relocating dead Gaussians in place.

    python -m benchmarks.strategies [--num_gaussians 40000000] [--trainers streamed_compact_geometry_on_host] [--quick]

The scene and the loop are those of benchmarks/train_step.py, with as many Gaussians as the bound, of which a
twentieth is transparent. One refinement, in the middle of the measured steps, relocates those in mcmc; default refines
nothing here, so that its steps are those of any training between refinements. A relocation needs no memory for a
second model: compare the peaks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.aerial_scene import FOCAL, AerialCameras
from benchmarks.command_line import BenchmarkOptions, run
from benchmarks.numbers import count, gigabytes
from benchmarks.report import Report, spread
from benchmarks.timing import Spread
from benchmarks.train_step import OPTIONS, AerialRun, Job, check, in_fresh_process, train
from benchmarks.train_step import Options as StepOptions
from offload.models.contract import GaussianModel
from reporting.numbers import number
from strategies.contract import Strategy
from training.memory import peak_bytes
from training.views import View

DEAD_EVERY = 20  # rows
TRANSPARENT = -8.0  # logit, far below --prune_opa
STRATEGIES = ("default", "mcmc")


@dataclass
class Options(BenchmarkOptions):
    num_gaussians: tuple[int, ...] = (40_000_000,)
    """Sizes of the scene."""
    steps: int = 500
    """Steps to measure, after a fifth of them to warm up."""
    trainers: tuple[str, ...] = ("streamed_compact_geometry_on_host",)
    """Which trainers."""
    picture_scale: float = 1.0
    """Factor on the sides of the pictures and on the focal length."""


@dataclass(frozen=True)
class Found:
    """Hold what one strategy took."""

    steps: Spread  # milliseconds of those without a refinement
    refinement: float | None  # milliseconds of the step with it
    dead: tuple[int, int]  # transparent Gaussians before and after
    memory: dict[str, int]  # of `training.memory.peak_bytes`


class StrategyRun(AerialRun):
    """An `AerialRun` with some transparent Gaussians."""

    def make_scene(self) -> tuple[dict[str, Tensor], AerialCameras]:
        parameters, cameras = super().make_scene()
        parameters["opacities"][::DEAD_EVERY] = TRANSPARENT
        self.num_dead = self._dead_among(parameters["opacities"])
        return parameters, cameras

    def steps(self, model: GaussianModel, strategy: Strategy, draw: object = None) -> Iterator[tuple[int, View]]:
        """Yield the steps, and note which of the measured ones refine."""
        self.refines: list[bool] = []
        for step, view in super().steps(model, strategy, draw):
            if step >= self.num_warmup:
                self.refines.append(strategy.changes_rows_after(step))
            yield step, view

    def found(self) -> Found:
        """Return what was measured."""
        plain = [ms for ms, refines in zip(self.step_milliseconds(), self.refines, strict=True) if not refines]
        refined = [ms for ms, refines in zip(self.step_milliseconds(), self.refines, strict=True) if refines]
        memory = peak_bytes(self.device)
        dead = (self.num_dead, self._dead_among(self.model.read("opacities")))
        return Found(Spread.of(plain), max(refined, default=None), dead, memory)

    def _dead_among(self, opacities: Tensor) -> int:
        return int((torch.sigmoid(opacities) <= self.cfg.prune_opa).sum())


def options_of(strategy: str, steps: int) -> tuple[str, ...]:
    """Return the options of a trainer: one refinement in the middle of the measured steps, or none."""
    if strategy == "default":
        return OPTIONS
    middle = max(steps // 5, 3) + steps // 2  # counted from 0, after those to warm up
    refines = ("--refine_start_iter", "0", "--refine_every", str(middle), "--refine_stop_iter", str(middle + 1))
    return ("--sh_degree_interval", "1", "--strategy", strategy, *refines)


def measure(job: Job) -> Found:
    """Train, and return what it took."""
    return train(job, StrategyRun).found()


def main(options: Options) -> None:
    sizes, steps, scale = options.num_gaussians, options.steps, options.picture_scale
    if options.quick:
        sizes, steps, scale = (20_000,), 6, 0.1
    check(StepOptions(num_gaussians=sizes, steps=steps, trainers=options.trainers, picture_scale=scale))
    report = Report("strategies", "A step and a relocation under each strategy", options)
    columns = {
        "trainer": str,
        "Gaussians": count,
        "strategy": str,
        "ms per step: median (10 %, 90 %)": spread,
        "transparent before, after": lambda pair: f"{count(pair[0])}, {count(pair[1])}",
        "ms of the step that relocates": number,
        "peak device GB": gigabytes,
        "peak host GB": gigabytes,
    }
    table = report.table(f"{steps} steps; memory in 10^9 bytes.", columns)
    for num_gaussians in sizes:
        for trainer in options.trainers:
            for strategy in STRATEGIES:
                job = Job(trainer, num_gaussians, FOCAL, scale, steps, options=options_of(strategy, steps))
                found = in_fresh_process(measure, job)
                memory = (found.memory["device_allocated"], found.memory["host"])
                table.add(trainer, num_gaussians, strategy, found.steps, found.dead, found.refinement, *memory)
    report.write()


if __name__ == "__main__":
    run(main, Options, __doc__)
