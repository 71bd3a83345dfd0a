"""Milliseconds of the streamed trainer's steps, by the shape of the kernels that cross the link.

    python -m benchmarks.streamed_steps [--trainer streamed_bfloat16] [--fetch_blocks 16 64] [--write_blocks 8 64]
    python -m benchmarks.streamed_steps --trainer streamed_geometry_on_host --write_blocks 8 --step_blocks 16 32 64 128

All shapes take turns in one training run, so that each is a matter of a second.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from itertools import pairwise, product

import torch

from benchmarks.aerial_scene import FOCAL
from benchmarks.command_line import BenchmarkOptions, run
from benchmarks.numbers import count
from benchmarks.report import Report, milliseconds_by_name, spread
from benchmarks.timing import Spread
from benchmarks.train_step import AerialRun, Job, train
from configs import Config
from errors import InputError
from offload.models.contract import GaussianModel
from reporting.numbers import number
from training.views import View

SKIPPED = 6  # first steps with a shape: its kernels are compiled, and the lanes fill


@dataclass
class Options(BenchmarkOptions):
    num_gaussians: int = 18_000_000
    """Size of the scene."""
    trainer: str = "streamed"
    """Which of the streamed trainers."""
    fetch_blocks: tuple[int, ...] = (16, 64, 256)
    """Thread blocks of the kernel that reads over the link."""
    write_blocks: tuple[int, ...] = (8, 16, 64, 256)
    """Thread blocks of the kernel that writes."""
    step_blocks: tuple[int, ...] = (32,)
    """Thread blocks of the kernel that does both, where geometry is on the host."""
    tiles: tuple[int, ...] = (256, 1024)
    """16-byte vectors that a block moves at a time."""
    warps: tuple[int, ...] = (8,)
    """Warps in a block."""
    steps: int = 24
    """Steps to measure with each shape."""


@dataclass(frozen=True)
class Shape:
    """Hold the sizes with which the kernels that cross the link are launched."""

    tile: int
    warps: int
    fetch_blocks: int
    write_blocks: int
    step_blocks: int

    def use(self) -> None:
        from offload.adam import rows_triton as kernels  # Triton comes with CUDA builds of torch only

        kernels.LINK_TILE, kernels.LINK_WARPS = self.tile, self.warps
        kernels.FETCH_BLOCKS, kernels.WRITE_BLOCKS = self.fetch_blocks, self.write_blocks
        kernels.STEP_BLOCKS = self.step_blocks


class RunOfShapes(AerialRun):
    """A run in which the kernels change their shape now and then."""

    shapes: tuple[Shape, ...] = ()  # set before it begins

    def __init__(self, cfg: Config, job: Job) -> None:
        super().__init__(cfg, job)
        self.found: list[tuple[Spread, dict[str, float], float]] = []  # ms per step, of its stages, bytes over the link

    def steps(self, model: GaussianModel, strategy: object, draw: object = None) -> Iterator[tuple[int, View]]:
        each = self.job.steps // len(self.shapes)
        link_bytes = 0
        for step, view in super().steps(model, strategy, draw):
            index, turn = divmod(step - self.num_warmup, each)
            if index >= 0 and turn == 0:
                self.shapes[index].use()
            if index >= 0 and turn == SKIPPED:  # the last one before has ended
                torch.cuda.synchronize()
                self.times.mean_milliseconds()
                self.times.start()
                del self._ends[:-1]
                link_bytes = link_bytes_of(model)
            yield step, view
            if index >= 0 and turn == each - 1:
                torch.cuda.synchronize()
                steps = [self._clock.milliseconds(*ends) for ends in pairwise(self._ends)]
                moved = (link_bytes_of(model) - link_bytes) / len(steps)
                self.found.append((Spread.of(steps), self.times.mean_milliseconds(), moved))


def link_bytes_of(model: GaussianModel) -> int:
    """Return the bytes that have travelled over the link so far."""
    return (model.counters().traffic or {})["link_bytes"]


def main(options: Options) -> None:
    if not torch.cuda.is_available():
        raise InputError("This measures the link between host and GPU, and torch finds no CUDA GPU.")
    if options.quick:
        options.num_gaussians, options.tiles, options.fetch_blocks, options.write_blocks = (
            1_000_000,
            (256,),
            (64,),
            (64,),
        )
    blocks = (options.fetch_blocks, options.write_blocks, options.step_blocks)
    shapes = product(options.tiles, options.warps, *blocks)
    RunOfShapes.shapes = tuple(Shape(*shape) for shape in shapes)
    report = Report("streamed_steps", "Steps of the streamed trainer", options, variant=options.trainer)
    columns = {
        "vectors": count, "warps": count, "fetch blocks": count, "write blocks": count,
        "step blocks": count, "ms per step": spread, "GB over the link per step": lambda x: number(x / 1e9),
        "stages, mean ms": milliseconds_by_name,
    }  # fmt: skip
    table = report.table(
        f"{options.num_gaussians:,} Gaussians of the aerial scene, trainer {options.trainer}:", columns
    )
    steps = (SKIPPED + options.steps) * len(RunOfShapes.shapes)
    ran = train(Job(options.trainer, options.num_gaussians, FOCAL, 1.0, steps), RunOfShapes)
    for shape, (milliseconds, stages, moved) in zip(ran.shapes, ran.found, strict=True):
        table.add(*astuple(shape), milliseconds, moved, stages)
    report.write()


if __name__ == "__main__":
    run(main, Options, __doc__)
