"""Time and device memory of training when one view in eight sees most of the scene: whole, in tiles, in a budget.

    python -m benchmarks.split [--num_gaussians 18000000] [--steps 96] [--budget_steps 500] [--quick]

The scene and the views of `train_step`, but every eighth view is from a camera raised until it sees 60 % of the
Gaussians. Time is the mean over eight consecutive steps, since what a wide view costs is spread over its neighbours.
"""

from __future__ import annotations

import math
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import pairwise
from types import ModuleType
from unittest import mock

import torch

import simple_trainer_hybrid_optimized
import simple_trainer_hybrid_optimized_split
from benchmarks.aerial_scene import FOCAL, AerialCameras, aerial_cameras, aerial_geometry, geometry_rows
from benchmarks.command_line import BenchmarkOptions, run
from benchmarks.numbers import count, gigabytes, percent
from benchmarks.report import Report, milliseconds_by_name, spread
from benchmarks.timing import Spread
from benchmarks.train_step import OPTIONS, AerialRun, Job, Measurement, in_fresh_process
from configs import Config
from errors import InputError, TrainingStopped
from offload.culling.cameras import Cameras
from offload.culling.native import BlockBounds, visible_ids
from offload.tiles.planner import TiledRows, TilePlanner
from reporting.numbers import number
from training.command_line import parse
from training.memory import limit_fragmentation, parse_bytes, peak_bytes

WIDE_EVERY = 8  # views
WIDE_SHARE = 0.6  # of the Gaussians, in a wide view


@dataclass
class Options(BenchmarkOptions):
    num_gaussians: int = 18_000_000
    """Size of the scene."""
    steps: int = 96
    """Steps to measure, after a fifth of them to warm up."""
    budget: str = "4GiB"
    """The budget to be kept."""
    budget_steps: int = 500
    """Steps to measure with it."""
    picture_scale: float = 1.0
    """Factor on the sides of the pictures and on the focal length."""


@dataclass(frozen=True)
class Variant:
    """A way to train."""

    name: str
    geometry: str
    arguments: tuple[str, ...]
    steps: int
    budget: int = 0  # bytes; 0: none

    @property
    def script(self) -> ModuleType:
        return simple_trainer_hybrid_optimized_split if self.arguments else simple_trainer_hybrid_optimized


def wide_camera(num_gaussians: int, seed: int, picture_scale: float) -> AerialCameras:
    """Place a camera over the middle of the scene, so high that it sees the wanted share of it."""
    rows = geometry_rows(aerial_geometry(num_gaussians, torch.Generator().manual_seed(seed)))
    bounds = BlockBounds(rows)
    cameras = aerial_cameras(seed, picture_scale=picture_scale)
    viewmat = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))  # looks straight down
    low, high = 0.5, 40.0
    for _ in range(20):
        viewmat[2, 3] = math.sqrt(low * high)  # the height
        camera = Cameras(viewmat[None].clone(), cameras.Ks[:1], cameras.width, cameras.height)
        share = len(visible_ids(rows, bounds, camera)) / num_gaussians
        if abs(share - WIDE_SHARE) < 0.002:
            break
        low, high = (viewmat[2, 3].item(), high) if share < WIDE_SHARE else (low, viewmat[2, 3].item())
    return AerialCameras(camera.viewmats, camera.Ks, cameras.width, cameras.height)


class SplitRun(AerialRun):
    """An `AerialRun` whose every eighth view is wide; notes the memory in use after each step and the parts."""

    def __init__(self, cfg: Config, job: Job, variant: Variant) -> None:
        super().__init__(cfg, job)
        wide = wide_camera(job.num_gaussians, 0, job.picture_scale)
        for index in range(WIDE_EVERY - 1, len(self._views), WIDE_EVERY):
            view = self._views[index]
            self._views[index] = replace(view, cameras=replace(view.cameras, viewmats=wide.viewmats))
        self.variant = variant
        self.parts: list[int] = []  # of each view that was found
        self.steps_above_budget = 0

    def after_step(self, step: int, loss: torch.Tensor) -> None:
        super().after_step(step, loss)
        peaks = peak_bytes(self.device)
        self.steps_above_budget += 0 < self.variant.budget < peaks["device_reserved"]

    def mean_over_eight(self) -> Spread:
        """Return the milliseconds per step."""
        pairs = pairwise(self._ends[::WIDE_EVERY])
        return Spread.of([self._clock.milliseconds(*pair) / WIDE_EVERY for pair in pairs])


@dataclass(frozen=True)
class Found:
    """Hold what a variant did."""

    measurement: Measurement
    steps_above_budget: int = 0
    most_parts: int = 1


def run_variant(variant: Variant, num_gaussians: int, picture_scale: float) -> Found:
    """Train in this process."""
    limit_fragmentation()
    steps = max(variant.steps // WIDE_EVERY, 2) * WIDE_EVERY
    job = Job(variant.name, num_gaussians, FOCAL, picture_scale, steps)
    options = (*OPTIONS, "--max_gaussians", str(num_gaussians), "--geometry", variant.geometry, *variant.arguments)
    _, cfg = parse(variant.script.CONFIGS, ["default", *options], "")
    plan = TilePlanner.plan

    def counting(*arguments: object, **options: object) -> TiledRows:
        view = plan(*arguments, **options)
        split_run.parts.append(len(view.tiles))
        return view

    try:
        split_run = SplitRun(cfg, job, variant)
        with mock.patch.object(TilePlanner, "plan", counting):
            variant.script.train(split_run)
    except torch.OutOfMemoryError:
        return Found(Measurement(problem="out of device memory"))
    except (InputError, TrainingStopped) as error:
        return Found(Measurement(problem=str(error)))
    found = replace(split_run.measurement(), milliseconds=split_run.mean_over_eight())
    return Found(found, split_run.steps_above_budget, max(split_run.parts, default=1))


COLUMNS = {
    "views": str,
    "geometry": str,
    "ms per step: median (10 %, 90 %)": spread,
    "over whole": number,
    "peak device GB": gigabytes,
    "whole over it": number,
    "reserved": gigabytes,
    "tiles of a wide view": count,
    "budget": str,
    "stages, mean ms": milliseconds_by_name,
    "remark": str,
}


def variants(options: Options) -> list[list[Variant]]:
    """Run each place of geometry, the whole views first."""
    budget = ("--device_memory_budget", options.budget)
    num_bytes = parse_bytes(options.budget, "--budget")
    return [
        [
            Variant("whole", place, (), options.steps),
            Variant("threshold 0.3", place, ("--split_threshold", "0.3"), options.steps),
            Variant("threshold 0.1", place, ("--split_threshold", "0.1"), options.steps),
            Variant(f"budget {options.budget}", place, budget, options.budget_steps, num_bytes),
        ]
        for place in ("device", "host")
    ]


def row_of(variant: Variant, found: Found, whole: Measurement) -> list[object]:
    """Return the cells of `COLUMNS`."""
    measured = found.measurement
    if measured.memory is None:
        return [variant.name, variant.geometry, *[None] * 8, measured.problem]
    peak, time = measured.memory["device_allocated"], measured.milliseconds.median
    slower = time / whole.milliseconds.median if whole.milliseconds else None
    smaller = whole.memory["device_allocated"] / peak if whole.memory and peak else None
    kept = None
    if variant.budget:
        kept = "kept in every step" if found.steps_above_budget == 0 else f"broken in {found.steps_above_budget} steps"
        kept += f" of {variant.steps}"
    return [
        variant.name, variant.geometry, measured.milliseconds, slower, peak, smaller,
        measured.memory["device_reserved"], found.most_parts, kept, measured.stages, None,
    ]  # fmt: skip


def main(options: Options) -> None:
    if options.quick:  # a laptop's CPU
        options.num_gaussians, options.steps, options.budget_steps = 20_000, 16, 16
        options.picture_scale, options.budget = 0.25, "16MB"
    if options.num_gaussians < 1 or options.steps < 1 or options.budget_steps < 1:
        raise InputError("--num_gaussians, --steps and --budget_steps must be at least 1.")
    report = Report("split", "Views that see most of the scene, whole and in tiles", options)
    report.say(f"One view in {WIDE_EVERY} sees {percent(WIDE_SHARE)} of the {count(options.num_gaussians)} Gaussians.")
    table = report.table("Memory in 10^9 bytes, as torch allocates and reserves it.", COLUMNS)
    for place in variants(options):
        whole = Measurement()
        for variant in place:
            try:
                found = in_fresh_process(run_variant, variant, options.num_gaussians, options.picture_scale)
            except BrokenProcessPool:
                found = Found(Measurement(problem="killed, most likely out of host memory"))
            whole = whole if variant.arguments else found.measurement
            table.add(*row_of(variant, found, whole))
    report.write()


if __name__ == "__main__":
    run(main, Options, __doc__)
