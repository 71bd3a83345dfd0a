"""Milliseconds and memory of one training step of each trainer, on a synthetic aerial scene of any size.

    python -m benchmarks.train_step [--num_gaussians 4000000 18000000] [--trainers gpu_only optimized] [--quick]
    python -m benchmarks.train_step --num_gaussians 18000000 --device_memory_cap 24GB
    python -m benchmarks.train_step --num_gaussians 18000000 --trainers streamed --view_window 1 16 64
    python -m benchmarks.train_step --trainers streamed_compact --steps 300 --resident_share 0 0.2

Each trainer runs its own `train` in its own process, from the same scene, without densification, in a run that has
random pictures ready on the device. Floor of the memory traffic: the bytes
that a step must move (trainers.py) at the bandwidth of large copies on the same machine. Rendering comes on top of it
where everything is on the device, and runs beside it where Gaussians are offloaded with all optimizations.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from itertools import count as count_from
from itertools import islice, pairwise, product
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from benchmarks.aerial_scene import FOCAL, HEIGHT, WIDTH, AerialCameras, aerial_scene, mean_visible, scaled
from benchmarks.command_line import BenchmarkOptions, run
from benchmarks.numbers import count, gigabytes, percent
from benchmarks.report import Report, milliseconds_by_name, spread
from benchmarks.timing import CPU, Clock, Spread, copy_bandwidth, upload_bandwidth
from configs import Config
from datasets.view_order import ViewWindows
from distributed.mesh import Ranks
from errors import InputError, TrainingStopped
from offload.adam.options import AdamOptions
from offload.culling.cameras import Cameras
from offload.device_memory import bound_memory
from offload.models.contract import GaussianModel
from offload.pipelines.contract import Counters
from reporting.numbers import number
from strategies.contract import Strategy
from trainers import TRAINERS, Traffic
from training import schedules
from training.command_line import parse
from training.memory import limit_fragmentation, parse_bytes, peak_bytes
from training.modules import RunModules
from training.per_step import PerStep
from training.run import select_device
from training.stages import StageTimes
from training.strategy import strategy_of
from training.views import View

SCENE_SCALE = 3.2  # world units: how far the cameras stand apart

# Options of every trainer here: nothing is refined or reset, and all spherical harmonics are in use at once.
OPTIONS = ("--refine_stop_iter", "0", "--sh_degree_interval", "1")


@dataclass
class Options(BenchmarkOptions):
    num_gaussians: tuple[int, ...] = (4_000_000,)
    """Sizes of the scene."""
    steps: int = 100
    """Steps to measure, after a fifth of them to warm up; slow trainers take a tenth of them."""
    trainers: tuple[str, ...] = tuple(TRAINERS)
    """Which trainers."""
    picture_scale: float = 1.0
    """Factor on the sides of the pictures and on the focal length."""
    view_window: tuple[int, ...] = (1,)
    """Arrange so many of the 64 views at a time so that neighbours see the same."""
    resident_share: tuple[float, ...] = (0.0,)
    """Shares of all Gaussians that stay on the GPU, of trainers that have the option; the first are chosen after 16
    steps and then 32, 64 and so on, so measure 300."""
    device_memory_cap: str = ""
    """Device memory that torch may take, such as 24GB; a trainer that needs more is reported as such."""


@dataclass(frozen=True)
class Job:
    """One measurement."""

    trainer: str
    num_gaussians: int
    focal: float | tuple[float, ...]  # pixels, of all cameras or of each
    picture_scale: float
    steps: int
    memory_cap: int = 0  # bytes; 0: none
    view_window: int = 1
    options: tuple[str, ...] = OPTIONS  # of the trainer
    resident_share: float = 0.0

    @property
    def name(self) -> str:
        """Return the trainer, and what of its options is not the default."""
        return f"{self.trainer}, {percent(self.resident_share)} resident" if self.resident_share else self.trainer


@dataclass(frozen=True)
class Measurement:
    """Hold what one trainer did; `problem` says why it did not come to the end."""

    milliseconds: Spread | None = None
    mean_milliseconds: float | None = None  # of a step, where views differ much
    stages: dict[str, float] | None = None  # mean milliseconds
    offload: dict[str, float] | None = None  # mean milliseconds beside the stages; of trainers that offload
    memory: dict[str, int] | None = None  # of `training.memory.peak_bytes`
    staging_allocations: int = 0  # in the measured steps
    link_bytes_per_step: float | None = None  # both ways; of trainers that count them
    loss: float | None = None
    problem: str = ""


class AerialRun:
    """Do what a trainer script asks of its `TrainingRun`, over a synthetic scene, timing every step."""

    def __init__(self, cfg: Config, job: Job, ranks: Ranks | None = None) -> None:
        """
        Args:
            cfg: Options of the trainer.
            job: What is measured.
            ranks: That train together, each its share of the Gaussians with its own views; None: this process alone.
        """
        self.cfg = cfg
        self.job = job
        self.ranks = ranks
        self.num_ranks = 1 if ranks is None else ranks.size
        self.device = select_device(cfg.device) if ranks is None else ranks.device
        if job.memory_cap:
            bound_memory(job.memory_cap, self.device)
        self.scene_scale = SCENE_SCALE
        self.times = StageTimes(self.device)
        self.upcoming: View | None = None
        self.sh_degree = 0
        self.num_warmup = max(job.steps // 5, 3)
        self._clock = Clock(self.device)
        self._ends: list[torch.cuda.Event | float] = []  # of the measured steps and the one before
        self.stages: dict[str, float] = {}
        self._parameters, cameras = self.make_scene()
        drawn = drawn_cameras(cameras, self._parameters["means"], job.view_window)
        self._offload_per_step = PerStep()
        steps = zip(*[drawn] * self.num_ranks, strict=False)  # the cameras of each
        self._views = views_of(cameras, islice(steps, self.num_warmup + job.steps + 1), self.device)
        self._counted_before = Counters()
        self.modules = RunModules(cfg, None, self.device, ranks)  # of a run without any
        self.depth_weight = 0.0

    def make_scene(self) -> tuple[dict[str, Tensor], AerialCameras]:
        """Make the Gaussians that this process starts with, in Morton order, and the cameras."""
        job = self.job
        return aerial_scene(job.num_gaussians, seed=0, focal=job.focal, picture_scale=job.picture_scale)

    @property
    def adam(self) -> AdamOptions:
        """Say how Adam updates the Gaussians."""
        return schedules.adam_options(replace(self.cfg, batch_size=self.num_ranks), self.scene_scale)

    @property
    def num_initial_gaussians(self) -> int:
        """Count the Gaussians that `initial_gaussians` returns."""
        return self.job.num_gaussians

    def initial_gaussians(self) -> dict[str, Tensor]:
        """Return the scene's Gaussians, once. Whether they fit into memory is found out."""
        parameters, self._parameters = self._parameters, {}  # not held while the trainer has its own
        return parameters

    def new_strategy(self) -> Strategy:
        """Return the strategy that the options choose."""
        return strategy_of(self.cfg, self.scene_scale, self.ranks)

    def mark(self, stage: str) -> None:
        """End a stage of the present step."""
        self.times.mark(stage)

    def steps(self, model: GaussianModel, strategy: Strategy, draw: object = None) -> Iterator[tuple[int, View]]:
        """Yield the steps to warm up and those to measure."""
        self.model = model
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for step in range(self.num_warmup + self.job.steps):
            if step == self.num_warmup:
                self.times.mean_milliseconds()  # forgets the first steps
                self._mean_offload()
                self._counted_before = model.counters()
            self.sh_degree = schedules.sh_degree(self.cfg, step)
            self.times.start()
            self.upcoming = self._views[step + 1]
            yield step, self._views[step]

    def backgrounds(self, view: View) -> None:
        """Return None: pictures are drawn before black."""

    def after_step(self, step: int, loss: Tensor) -> None:
        """Note when the step has ended."""
        # Nobody waits for the device here, as in training: what a trainer does behind the next step stays there.
        if step >= self.num_warmup - 1:
            self._ends.append(self._clock.mark())
        self._loss = loss.detach()

    def step_milliseconds(self) -> list[float]:
        """Return how long each of the measured steps took."""
        return [self._clock.milliseconds(*ends) for ends in pairwise(self._ends)]

    def measurement(self) -> Measurement:
        counted, before = self.model.counters(), self._counted_before
        return Measurement(
            milliseconds=Spread.of(self.step_milliseconds()),
            mean_milliseconds=self._clock.milliseconds(self._ends[0], self._ends[-1]) / self.job.steps,
            stages=self.times.mean_milliseconds(),
            offload=self._mean_offload(),
            memory=peak_bytes(self.device),
            staging_allocations=(counted.staging_allocations or 0) - (before.staging_allocations or 0),
            link_bytes_per_step=moved_per_step(before, counted, self.job.steps),
            loss=self._loss.item(),
        )

    def _mean_offload(self) -> dict[str, float] | None:
        """Return the means since it was last called."""
        milliseconds = self.model.counters().milliseconds
        if milliseconds is None:
            return None
        return self._offload_per_step.means("", self.model.steps_done, milliseconds)


def moved_per_step(before: Counters, after: Counters, steps: int) -> float | None:
    """Return the bytes over the link per step, both ways; None of trainers that do not count them."""
    if before.traffic is None or after.traffic is None:
        return None
    return (after.traffic["link_bytes"] - before.traffic["link_bytes"]) / steps


def drawn_cameras(cameras: AerialCameras, means: Tensor, view_window: int) -> Iterator[int]:
    """Draw indices of cameras as training draws its views: one permutation after another, arranged in windows."""
    viewmats, Ks = cameras.viewmats.numpy(), cameras.Ks.numpy()
    sizes = [(cameras.width, cameras.height)] * len(Ks)
    windows = ViewWindows.of_cameras(means.numpy(), viewmats, Ks, sizes, view_window)
    for epoch in count_from():
        drawn = np.random.default_rng([1, epoch]).permutation(len(cameras.Ks))
        yield from windows.arrange(drawn).tolist()


def views_of(cameras: AerialCameras, steps: Iterable[Sequence[int]], device: torch.device) -> list[View]:
    """Make the views of steps, whose photos are random; they share 2, as many as training has on the device at a time.

    Args:
        cameras: All there are.
        steps: Indices of the cameras of each step; a rank has a photo of one of them.
        device: Where photos are.
    """
    generator = torch.Generator().manual_seed(1)
    shape = (1, cameras.height, cameras.width, 3)
    photos = [torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(device) for _ in range(2)]
    views = []
    for indices in map(list, steps):
        viewmats, Ks = cameras.viewmats[indices], cameras.Ks[indices]
        views.append(View(photos[len(views) % 2], Cameras(viewmats, Ks, cameras.width, cameras.height)))
    return views


AnyRun = TypeVar("AnyRun", bound=AerialRun)


def train(job: Job, run_type: Callable[[Config, Job], AnyRun]) -> AnyRun:
    """Run one trainer's `train` in this process; returns what it has run in."""
    limit_fragmentation()
    trainer = TRAINERS[job.trainer]
    script = trainer.load()
    bound = ("--max_gaussians", str(job.num_gaussians))
    share = ("--resident_share", str(job.resident_share)) if job.resident_share else ()
    _, cfg = parse(script.CONFIGS, ["default", *trainer.arguments, *job.options, *share, *bound], "")
    aerial_run = run_type(cfg, job)
    script.train(aerial_run)
    return aerial_run


def run_trainer(job: Job, run_type: Callable[[Config, Job], AerialRun] = AerialRun) -> Measurement:
    """Measure one trainer in this process."""
    try:
        return train(job, run_type).measurement()
    except torch.OutOfMemoryError:
        return Measurement(problem="out of device memory")
    except (InputError, TrainingStopped) as error:
        return Measurement(problem=str(error))


def in_fresh_process(function: Callable, *arguments: object):
    """Call a function in a process of its own, which inherits neither memory nor threads nor a CUDA context."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(job: Job, run_type: Callable[[Config, Job], AerialRun] = AerialRun) -> Measurement:
    """Run one trainer in a process of its own."""
    try:
        return in_fresh_process(run_trainer, job, run_type)
    except BrokenProcessPool:
        return Measurement(problem="killed, most likely out of host memory")


def bandwidths() -> Traffic:
    """Measure the bytes per second of large copies: on the device, from the host to it, and on the host."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_device, link = (copy_bandwidth(device), upload_bandwidth(device)) if device.type == "cuda" else (0.0, 0.0)
    return Traffic(device=on_device, link=link, host=copy_bandwidth(CPU))


def sentence_of(bandwidth: Traffic) -> str:
    host = f"Large copies: on the host {bandwidth.host / 1e9:.0f} GB/s read and written"
    if not bandwidth.device:
        return host + "."
    return host + (
        f", on the device {bandwidth.device / 1e9:.0f} GB/s, from pinned memory to the device "
        f"{bandwidth.link / 1e9:.0f} GB/s one way."
    )


def floor_milliseconds(trainer: str, num_gaussians: int, visible: float, bandwidth: Traffic) -> float:
    """Return the time of a step's memory traffic: that of its slowest part, since all may overlap."""
    traffic, speed = asdict(TRAINERS[trainer].traffic(num_gaussians, visible)), asdict(bandwidth)
    speed = {place: value or bandwidth.host for place, value in speed.items()}  # without a GPU all is on the host
    return 1e3 * max(traffic[place] / speed[place] for place in traffic)


def check(options: Options) -> int:
    """Refuse options that cannot work; returns the memory cap in bytes, 0 for none.

    Raises:
        InputError: Naming the option.
    """
    unknown = [name for name in options.trainers if name not in TRAINERS]
    if unknown:
        raise InputError(f"--trainers {unknown[0]} is unknown: choose from {', '.join(TRAINERS)}.")
    if options.picture_scale <= 0:
        raise InputError(f"--picture_scale is {options.picture_scale}, but must be above 0.")
    sizes = [min(values, default=0) for values in (options.num_gaussians, options.view_window)]
    if not all(0 <= share <= 1 for share in options.resident_share):
        raise InputError("--resident_share must be from 0 to 1.")
    if min(options.steps, *sizes) < 1:
        raise InputError("--steps, --num_gaussians and --view_window must be at least 1.")
    if options.device_memory_cap and not torch.cuda.is_available():
        raise InputError("--device_memory_cap bounds a GPU's memory, but torch finds none: leave it out.")
    return parse_bytes(options.device_memory_cap, "--device_memory_cap") if options.device_memory_cap else 0


COLUMNS = {
    "trainer": str,
    "Gaussians": count,
    "visible": percent,
    "view window": count,
    "ms per step: median (10 %, 90 %)": spread,
    "floor of memory traffic, ms": number,
    "peak device GB": gigabytes,
    "reserved": gigabytes,
    "peak host GB": gigabytes,
    "staging allocations": count,
    "GB over the link per step": gigabytes,
    "stages, mean ms": milliseconds_by_name,
    "beside the stages, mean ms": milliseconds_by_name,
    "remark": str,
}


def row_of(job: Job, visible: float, found: Measurement, bandwidth: Traffic) -> list[object]:
    """Return the cells of `COLUMNS`."""
    floor = None  # where rows stay, it depends on how often views show them
    if job.resident_share == 0:
        floor = floor_milliseconds(job.trainer, job.num_gaussians, visible, bandwidth)
    row = [job.name, job.num_gaussians, visible / job.num_gaussians, job.view_window, found.milliseconds, floor]
    if found.memory is None:
        return [*row, *[None] * 7, found.problem]
    memory = [found.memory[kind] for kind in ("device_allocated", "device_reserved", "host")]
    over = job.memory_cap and found.memory["device_reserved"] > job.memory_cap
    moved = (found.staging_allocations, found.link_bytes_per_step)
    return [*row, *memory, *moved, found.stages, found.offload, "took more than the cap" if over else None]


def has_residents(trainer: str) -> bool:
    """Tell whether rows of a trainer may stay on the device."""
    has_option = hasattr(TRAINERS[trainer].load().CONFIGS["default"], "resident_share")
    return has_option and TRAINERS[trainer].options.get("state") == "compact"


def main(options: Options) -> None:
    if options.quick:  # a laptop's CPU
        options.num_gaussians, options.steps, options.picture_scale = (100_000,), 5, 0.25
    cap = check(options)
    purpose = "Time and memory of one training step, each trainer in turn"
    report = Report("train_step", purpose, options, variant=options.device_memory_cap)
    bandwidth = in_fresh_process(bandwidths)
    report.say(sentence_of(bandwidth))
    if cap:
        report.say(f"Torch may take {options.device_memory_cap} of device memory.")
    width, height = scaled((WIDTH, HEIGHT), options.picture_scale)
    title = f"Aerial scene, pictures of {width}x{height} pixels, no densification; memory in 10^9 bytes."
    table = report.table(title, COLUMNS)
    for num_gaussians in options.num_gaussians:
        visible = in_fresh_process(mean_visible, num_gaussians, FOCAL)
        for trainer, window, share in product(options.trainers, options.view_window, options.resident_share):
            if share > 0 and not has_residents(trainer):
                continue
            steps = max(options.steps // 10, 3) if TRAINERS[trainer].few_steps else options.steps
            job = Job(trainer, num_gaussians, FOCAL, options.picture_scale, steps, cap, window, resident_share=share)
            table.add(*row_of(job, visible, measure(job), bandwidth))
    report.write()


if __name__ == "__main__":
    run(main, Options, __doc__)
