"""Milliseconds and memory of a training step on several GPUs, which train one model together, against one of them.

    python -m benchmarks.ranks [--nproc 1 2 4] [--num_gaussians 18000000] [--trainers streamed_compact] [--quick]
    python -m benchmarks.ranks --scene city --num_gaussians 100000000 --visible 0.0039 0.075

It starts the processes itself, one a GPU, and measures each trainer with each number of them in turn, as
benchmarks/train_step.py does with one: in fresh processes, without densification, with random pictures that lie ready.
A step of W ranks has W views. Before it they agree as in training, after it they take the mean of their losses.

The scene is that of train_step, or the city of benchmarks/bigcity.py, whose views see a share that can be chosen. Each
rank makes the rows that it holds: of the city it takes no more than 20 bytes of each, of the other scene the geometry
of all, 44 bytes of each, for a moment. What cannot fit the memory that the ranks share is not started, and says so.

The time in exchange is that of all collectives of tensors, which includes waiting for a rank that comes later.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from benchmarks.aerial_scene import FOCAL, HEIGHT, WIDTH, AerialCameras, aerial_scene, mean_visible, scaled
from benchmarks.bigcity import MEAN_SHARE, SCENE_BYTES, SEED, SIZE, check_fits, find_focals
from benchmarks.city_scene import City
from benchmarks.command_line import BenchmarkOptions, run
from benchmarks.numbers import count, gigabytes, megabytes, percent
from benchmarks.rank_processes import RankFailed, in_ranks
from benchmarks.report import Report, milliseconds_by_name, spread
from benchmarks.timing import Clock, Spread
from benchmarks.train_step import OPTIONS, AerialRun, Job, in_fresh_process, moved_per_step, train
from configs import Config
from distributed.dealing import dealt_rows
from distributed.mesh import Ranks
from errors import InputError, counted
from offload.models.contract import GaussianModel
from reporting.numbers import number
from strategies.contract import Strategy
from trainers import TRAINERS
from training.memory import peak_bytes
from training.memory_estimate import parameter_bytes
from training.views import View

Event = torch.cuda.Event | float


@dataclass
class Options(BenchmarkOptions):
    nproc: tuple[int, ...] = (1, 2, 4)
    """Numbers of processes, one a GPU; those that there are not enough GPUs for are left out."""
    num_gaussians: tuple[int, ...] = (18_000_000,)
    """Sizes of the scene, of all ranks together."""
    trainers: tuple[str, ...] = (
        "gpu_only",
        "gpu_only_deferred",
        "streamed",
        "streamed_compact",
        "streamed_compact_geometry_on_host",
    )
    """Which trainers."""
    scene: Literal["aerial", "city"] = "aerial"
    """That of train_step, of which a view sees about 8 %, or that of bigcity."""
    visible: tuple[float, ...] = ()
    """Mean shares of the city's Gaussians that a view sees; 0.0039 unless given."""
    steps: int = 30
    """Steps to measure, after a fifth of them to warm up."""
    picture_scale: float = 1.0
    """Factor on the sides of the pictures and on the focal length."""


# ------------------------------------------------------------------------------------------------------- what is sent


@dataclass
class Exchanged:
    """Hold what a rank has sent to others in some steps, and when it was in exchange."""

    rows: int = 0  # of pairs, of which each goes out and has its gradient sent home
    bytes: int = 0
    spans: list[tuple[Event, Event]] = field(default_factory=list)

    def begin_anew(self) -> None:
        """Forget what there was."""
        self.rows = self.bytes = 0
        self.spans.clear()


@dataclass(frozen=True)
class CountedRanks(Ranks):
    """Ranks that count what they send of tensors, and note when.

    Attributes:
        exchanged: What has been counted.
        clock: Of the device.
    """

    exchanged: Exchanged = field(default_factory=Exchanged, repr=False)
    clock: Clock = field(default_factory=Clock, repr=False)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        begin = self.clock.mark()
        yield
        self.exchanged.spans.append((begin, self.clock.mark()))

    def all_to_all(
        self, rows: Tensor, sent: Sequence[int], received: Sequence[int], result: Tensor | None = None
    ) -> Tensor:
        leaving = sum(sent) - sent[self.rank]
        self.exchanged.bytes += leaving * rows[:1].nbytes
        self.exchanged.rows += leaving if rows.ndim == 2 else 0  # else they are counts
        with self._timed():
            return super().all_to_all(rows, sent, received, result)

    def mean(self, value: Tensor) -> Tensor:
        with self._timed():
            return super().mean(value)

    def largest(self, value: Tensor) -> Tensor:
        with self._timed():
            return super().largest(value)


# --------------------------------------------------------------------------------------------------------- one process


@dataclass(frozen=True)
class Views:
    """Say what the cameras of a scene see: their focal lengths in pixels, and shares of the Gaussians."""

    focal: float | tuple[float, ...]
    mean_share: float
    largest_share: float


@dataclass(frozen=True)
class OfRank:
    """Hold what one process did."""

    milliseconds: Spread  # of a step
    stages: dict[str, float]  # mean milliseconds
    memory: dict[str, int]  # of `training.memory.peak_bytes`
    link_bytes: float | None  # of a step, both ways; of trainers that count them
    pairs_sent: float  # of a step, to other ranks
    bytes_sent: float  # the same
    in_exchange: float  # milliseconds of a step


class RankRun(AerialRun):
    """An `AerialRun` of one of several processes, with its share of the Gaussians; or of one that is alone."""

    ranks: CountedRanks | None

    def __init__(self, cfg: Config, job: Job, ranks: Ranks | None, scene: str, largest_share: float) -> None:
        if ranks is not None:
            ranks = CountedRanks(**vars(ranks), clock=Clock(ranks.device))
        size, scene_bytes = ((WIDTH, HEIGHT), parameter_bytes(3)) if scene == "aerial" else (SIZE, SCENE_BYTES)
        check_fits(cfg, job, largest_share, size, scene_bytes, 1 if ranks is None else ranks.size)
        if ranks is not None:
            ranks.barrier()  # all have seen what memory there is before one takes of it
        self._scene = scene
        super().__init__(cfg, job, ranks)

    def make_scene(self) -> tuple[dict[str, Tensor], AerialCameras]:
        """Make the Gaussians that this process starts with, in Morton order, and the cameras."""
        job, ranks = self.job, self.ranks
        rows = None if ranks is None else dealt_rows(job.num_gaussians, ranks.rank, ranks.proportions)
        if self._scene == "aerial":
            return aerial_scene(job.num_gaussians, SEED, focal=job.focal, picture_scale=job.picture_scale, rows=rows)
        city = City(job.num_gaussians, SEED)
        return city.parameters(rows), city.cameras(job.focal, job.picture_scale)

    def steps(self, model: GaussianModel, strategy: Strategy, draw: object = None) -> Iterator[tuple[int, View]]:
        """Yield the steps to warm up and those to measure."""
        for step, view in super().steps(model, strategy, draw):
            if self.ranks is not None:
                if step == self.num_warmup:
                    self.ranks.exchanged.begin_anew()
                self.ranks.any_of([False] * 5)  # whether all have a picture, and what they do after the step
                self.mark("agree")
            yield step, view

    def after_step(self, step: int, loss: Tensor) -> None:
        """Take the mean of the losses, and note when the step has ended."""
        super().after_step(step, loss if self.ranks is None else self.ranks.mean(loss.detach()))

    def of_rank(self) -> OfRank:
        """Return what this process did in the measured steps."""
        exchanged, steps = Exchanged() if self.ranks is None else self.ranks.exchanged, self.job.steps
        return OfRank(
            milliseconds=Spread.of(self.step_milliseconds()),
            stages=self.times.mean_milliseconds(),
            memory=peak_bytes(self.device),
            link_bytes=moved_per_step(self._counted_before, self.model.counters(), steps),
            pairs_sent=exchanged.rows / 2 / steps,
            bytes_sent=exchanged.bytes / steps,
            in_exchange=sum(self._clock.milliseconds(*span) for span in exchanged.spans) / steps,
        )


def run_rank(ranks: Ranks | None, job: Job, scene: str, largest_share: float) -> OfRank:
    """Measure a trainer in this process, together with the others."""
    return train(job, partial(RankRun, ranks=ranks, scene=scene, largest_share=largest_share)).of_rank()


# ----------------------------------------------------------------------------------------------------------- all ranks


def views_in(scene: str, num_gaussians: int, share: float) -> Views:
    """Count what the cameras of a scene see; those of a city are to see a share of it in the mean."""
    if scene == "aerial":
        share = mean_visible(num_gaussians, FOCAL, SEED) / num_gaussians
        return Views(FOCAL, share, share)
    found = find_focals(num_gaussians, share)
    return Views(found.focals, found.mean_share, found.largest_share)


def least_and_most(values: Sequence[float]) -> str:
    return f"{number(min(values))} to {number(max(values))}"


COLUMNS = {
    "trainer": str,
    "Gaussians": count,
    "ranks": count,
    "visible": percent,
    "ms per step: median (10 %, 90 %)": spread,
    "ms per view": number,
    "views per second": number,
    "of one rank": number,
    "pairs sent per rank and step": count,
    "MB sent per rank and step": megabytes,
    "ms in exchange, of the ranks": least_and_most,
    "peak device GB per rank": gigabytes,
    "reserved": gigabytes,
    "peak host GB per rank": gigabytes,
    "GB over the link per rank and step": gigabytes,
    "stages of rank 0, mean ms": milliseconds_by_name,
    "remark": str,
}


def row_of(job: Job, views: Views, found: Sequence[OfRank], one_rank: float | None) -> list[object]:
    """Return the cells of `COLUMNS`.

    Args:
        job: What was measured.
        views: Of the scene.
        found: At each rank.
        one_rank: Views per second of one rank; None where that is not known.
    """
    size = len(found)
    milliseconds = slowest(found)
    speed = views_per_second(found)
    ratio = None if one_rank is None else speed / one_rank
    is_joint = size > 1
    moved = [each.link_bytes for each in found if each.link_bytes is not None]
    return [
        *(job.trainer, job.num_gaussians, size, views.mean_share, milliseconds, milliseconds.median / size),
        *(speed, ratio),
        round(sum(each.pairs_sent for each in found) / size) if is_joint else None,
        sum(each.bytes_sent for each in found) / size if is_joint else None,
        [each.in_exchange for each in found] if is_joint else None,
        *(max(each.memory[kind] for each in found) for kind in ("device_allocated", "device_reserved", "host")),
        sum(moved) / size if moved else None,
        found[0].stages,
        None,
    ]


def views_per_second(found: Sequence[OfRank]) -> float:
    """Return the views that all ranks draw in a second, by the median step of the slowest."""
    return 1e3 * len(found) / slowest(found).median


def slowest(found: Sequence[OfRank]) -> Spread:
    """Return the milliseconds of a step at the rank whose median is the longest."""
    return max((each.milliseconds for each in found), key=lambda spread: spread.median)


def check(options: Options) -> None:
    """Refuse options that cannot work.

    Raises:
        InputError: Naming the option.
    """
    for name in options.trainers:
        if name not in TRAINERS or not TRAINERS[name].several_gpus:
            known = ", ".join(name for name, trainer in TRAINERS.items() if trainer.several_gpus)
            raise InputError(f"--trainers {name} cannot train on several GPUs: choose from {known}.")
    if min(options.steps, *options.nproc, *options.num_gaussians) < 1:
        raise InputError("--steps, --nproc and --num_gaussians must be at least 1.")
    if options.picture_scale <= 0:
        raise InputError(f"--picture_scale is {options.picture_scale}, but must be above 0.")
    if options.visible and options.scene != "city":
        raise InputError("--visible is for --scene city: views of the aerial scene see what they see.")
    if not all(0 < share < 0.1 for share in options.visible):
        raise InputError("--visible must be above 0 and below 0.1: a view may see almost three times the mean.")


def main(options: Options) -> None:
    if options.quick:  # a laptop's CPU
        given = Options()
        if options.nproc == given.nproc:
            options.nproc = (1, 2)
        if options.trainers == given.trainers:
            options.trainers = ("streamed_compact",)
        options.num_gaussians, options.steps, options.picture_scale = (20_000,), 3, 0.1
    check(options)
    device = "cuda" if torch.cuda.is_available() and not options.quick else "cpu"
    report = Report("ranks", "Time and memory of one training step on several GPUs", options, variant=options.scene)
    sizes = sorted({*options.nproc})  # one rank first, which the others are held against
    num_gpus = torch.cuda.device_count()
    if device == "cuda" and sizes[-1] > num_gpus:
        left_out = ", ".join(str(size) for size in sizes if size > num_gpus)
        report.say(f"Left out: {left_out} ranks, since this machine has {counted(num_gpus, 'GPU')}.")
        sizes = [size for size in sizes if size <= num_gpus]
    width, height = scaled((WIDTH, HEIGHT) if options.scene == "aerial" else SIZE, options.picture_scale)
    title = (
        f"{options.scene.capitalize()} scene, pictures of {width}x{height} pixels, no densification, a view a rank and "
        "step; memory in 10^9 bytes. Times, unless said, are of the slowest rank; memory is that of the rank with most."
    )
    table = report.table(title, COLUMNS)
    shares = options.visible or (MEAN_SHARE,)
    for num_gaussians, share in product(options.num_gaussians, shares):
        views = in_fresh_process(views_in, options.scene, num_gaussians, share)
        for trainer in options.trainers:
            arguments = (*OPTIONS, "--device", device)
            job = Job(trainer, num_gaussians, views.focal, options.picture_scale, options.steps, options=arguments)
            one_rank = None
            for size in sizes:
                try:
                    found = in_ranks(size, device, run_rank, job, options.scene, views.largest_share)
                except RankFailed as problem:
                    head = [trainer, num_gaussians, size, views.mean_share]
                    table.add(*head, *[None] * (len(COLUMNS) - len(head) - 1), str(problem))
                    continue
                if size == 1:
                    one_rank = views_per_second(found)
                table.add(*row_of(job, views, found, one_rank))
    report.write()


if __name__ == "__main__":
    run(main, Options, __doc__)
