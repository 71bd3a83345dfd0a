"""Milliseconds and memory of a training step on a city of 102 million Gaussians, of which a view sees 0.39 %.

    python -m benchmarks.bigcity [--trainers streamed_compact_geometry_on_host] [--quick]
    python -m benchmarks.bigcity --num_gaussians 250000000 --trainers streamed_compact_geometry_on_host

The numbers of CLM's BigCity (arXiv 2511.04951): 102,231,360 Gaussians, of which a view sees 0.39 % on average and
1.06 % at most, in pictures of 1920x1080 pixels. Each of the 64 cameras of benchmarks/train_step.py has a focal length
with which it sees its share. Everything else is as there, but the scene, which takes 20 bytes a Gaussian of host memory
until the trainer has stored it. A trainer that cannot fit is not started, and says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.aerial_scene import NUM_CAMERAS, AerialCameras, scaled
from benchmarks.city_scene import SIZE, City, shares_around
from benchmarks.command_line import run
from benchmarks.numbers import percent
from benchmarks.report import Report
from benchmarks.train_step import COLUMNS as STEP_COLUMNS
from benchmarks.train_step import (
    AerialRun,
    Job,
    bandwidths,
    check,
    in_fresh_process,
    measure,
    row_of,
    sentence_of,
)
from benchmarks.train_step import Options as StepOptions
from configs import Config
from offload.device_memory import bound_memory
from reporting.numbers import number
from trainers import TRAINERS, Lack, footprint_of, remedy
from training.memory_estimate import check_memory, needs, parameter_bytes
from training.run import select_device

NUM_GAUSSIANS = 102_231_360
MEAN_SHARE, LARGEST_SHARE = 0.0039, 0.0106  # of the Gaussians, that a view sees
SMALLEST_SHARE = 0.001
SEED = 0
SCENE_BYTES = 20  # of a Gaussian


@dataclass
class Options(StepOptions):
    num_gaussians: tuple[int, ...] = (NUM_GAUSSIANS,)
    """Sizes of the city; a view sees the same share of each."""
    steps: int = 64
    """Steps to measure, after a fifth of them to warm up."""
    trainers: tuple[str, ...] = (
        "streamed_compact_geometry_on_host",
        "streamed_compact",
        "streamed_bfloat16",
        "streamed_geometry_on_host",
    )
    """Which trainers."""


class CityRun(AerialRun):
    """An `AerialRun` over a city, which is made once it is known that the trainer fits."""

    def __init__(self, cfg: Config, job: Job, largest_share: float) -> None:
        check_fits(cfg, job, largest_share, SIZE, SCENE_BYTES)
        super().__init__(cfg, job)

    def make_scene(self) -> tuple[dict[str, Tensor], AerialCameras]:
        """Make the city, and a camera of each focal length."""
        city = City(self.job.num_gaussians, SEED)
        return city.parameters(), city.cameras(self.job.focal, self.job.picture_scale)


def check_fits(
    cfg: Config, job: Job, largest_share: float, size: tuple[int, int], scene_bytes: int, num_ranks: int = 1
) -> None:
    """Refuse what cannot fit: a machine may end all that runs where its memory runs out.

    Args:
        cfg: Options of the trainer.
        job: What is measured.
        largest_share: Of the Gaussians, that a view sees.
        size: Of the pictures before they are scaled, in pixels.
        scene_bytes: Of host memory, that a Gaussian takes until it is stored.
        num_ranks: That share the host's memory, the Gaussians and the views of a step, each with its own device.

    Raises:
        NotEnoughMemory: Saying what the trainer would take.
    """
    device, trainer = select_device(cfg.device), TRAINERS[job.trainer]
    if job.memory_cap:
        bound_memory(job.memory_cap, device)
    footprint = footprint_of(trainer, cfg, num_ranks)
    at_start = footprint.host_at_start - parameter_bytes(cfg.sh_degree) + scene_bytes
    width, height = scaled(size, job.picture_scale)
    share = min(num_ranks * largest_share, 1.0)
    check_memory(
        needs(replace(footprint, host_at_start=at_start), share, width * height, device, num_processes=num_ranks),
        -(-job.num_gaussians // num_ranks),
        0,
        what_helps=lambda memory: remedy(trainer, cfg, Lack(memory, share, num_ranks=num_ranks)),
    )


@dataclass(frozen=True)
class Found:
    """Cameras' focal lengths in pixels, and the shares of the Gaussians that they see with them."""

    focals: tuple[float, ...]
    mean_share: float
    largest_share: float


def find_focals(num_gaussians: int, mean_share: float = MEAN_SHARE) -> Found:
    """Find focal lengths with which views see the wanted shares, and count what they see.

    Args:
        num_gaussians: N.
        mean_share: Wanted of the views; the least and the most differ from it as those of CLM's BigCity do.
    """
    city = City(num_gaussians, SEED)
    factor = mean_share / MEAN_SHARE
    wanted = shares_around(mean_share, factor * SMALLEST_SHARE, factor * LARGEST_SHARE, NUM_CAMERAS)
    focals = city.focals_for(np.random.default_rng(SEED).permutation(wanted))
    shares = city.shares(city.cameras(focals))
    return Found(focals, float(shares.mean()), float(shares.max()))


def with_more(cells: Sequence[Any], largest_share: Any, mean_milliseconds: Any) -> list[Any]:
    """Put what a city tells beside the cells of `train_step`: after the mean share, and after the median time."""
    return [*cells[:3], largest_share, *cells[3:5], mean_milliseconds, *cells[5:]]


COLUMNS = dict(with_more(list(STEP_COLUMNS.items()), ("at most", percent), ("mean ms per step", number)))


def main(options: Options) -> None:
    if options.quick:  # a laptop's CPU
        options.num_gaussians, options.steps, options.picture_scale = (200_000,), 5, 0.25
    cap = check(options)
    report = Report(
        "bigcity", "Time and memory of one training step in a city", options, variant=options.device_memory_cap
    )
    bandwidth = in_fresh_process(bandwidths)
    report.say(sentence_of(bandwidth))
    if cap:
        report.say(f"Torch may take {options.device_memory_cap} of device memory.")
    width, height = scaled(SIZE, options.picture_scale)
    title = f"City, pictures of {width}x{height} pixels, no densification; memory in 10^9 bytes."
    table = report.table(title, COLUMNS)
    for num_gaussians in options.num_gaussians:
        views = in_fresh_process(find_focals, num_gaussians)
        for trainer, window in product(options.trainers, options.view_window):
            steps = max(options.steps // 10, 3) if TRAINERS[trainer].few_steps else options.steps
            job = Job(trainer, num_gaussians, views.focals, options.picture_scale, steps, cap, window)
            found = measure(job, partial(CityRun, largest_share=views.largest_share))
            cells = row_of(job, views.mean_share * num_gaussians, found, bandwidth)
            table.add(*with_more(cells, views.largest_share, found.mean_milliseconds))
    report.write()


if __name__ == "__main__":
    run(main, Options, __doc__)
