"""How a training step grows: with N at a fixed number of visible Gaussians, and with that number at fixed N.

    python -m benchmarks.scaling [--trainer optimized] [--quick]

The scene and the loop are those of benchmarks/train_step.py. The focal length of the cameras is set so that a view
sees the wanted number of Gaussians in the mean: as N grows, Gaussians shrink and the pictures show a smaller part of
the scene, so that as many of them, as large in pixels, are drawn. An offloading trainer with all optimizations should
then take the same time; its device memory grows with N only by what it keeps there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.aerial_scene import HEIGHT, WIDTH, focals_for
from benchmarks.command_line import BenchmarkOptions, run
from benchmarks.numbers import count, gigabytes
from benchmarks.report import Report, Table, milliseconds_by_name, spread
from benchmarks.train_step import Job, in_fresh_process, measure
from errors import InputError
from reporting.numbers import number
from trainers import TRAINERS


@dataclass
class Options(BenchmarkOptions):
    trainer: str = "optimized"
    """Which trainer."""
    num_gaussians: tuple[int, ...] = (1_000_000, 2_000_000, 4_000_000, 8_000_000, 16_000_000, 32_000_000)
    """Sizes of the scene at the first of the visible numbers."""
    visible: tuple[int, ...] = (75_000, 150_000, 300_000, 600_000, 1_200_000, 2_400_000)
    """Mean numbers of visible Gaussians in the scene of --fixed_num_gaussians."""
    fixed_num_gaussians: int = 16_000_000
    """Size of the scene for the second table."""
    steps: int = 60
    """Steps to measure, after a fifth of them to warm up."""
    picture_scale: float = 1.0
    """Factor on the sides of the pictures and on the focal length."""


COLUMNS = {
    "Gaussians": count,
    "visible per view": lambda value: count(round(value)),
    "focal length, px": number,
    "ms per step: median (10 %, 90 %)": spread,
    "to the first row": number,
    "peak device GB": gigabytes,
    "peak host GB": gigabytes,
    "bytes per Gaussian: device, host": lambda pair: f"{pair[0]:.0f}, {pair[1]:.0f}",
    "stages, mean ms": milliseconds_by_name,
    "remark": str,
}


def measure_rows(table: Table, options: Options, scenes: Sequence[tuple[int, float, float]]) -> None:
    """Make a row for each scene: its N, the focal length and the mean number of visible Gaussians."""
    first = None
    for num_gaussians, focal, visible in scenes:
        found = measure(Job(options.trainer, num_gaussians, focal, options.picture_scale, options.steps))
        if found.milliseconds is None:
            table.add(num_gaussians, visible, focal, *[None] * 6, found.problem)
            continue
        first = first or found.milliseconds.median
        device, host = found.memory["device_allocated"], found.memory["host"]
        table.add(
            num_gaussians,
            visible,
            focal,
            found.milliseconds,
            found.milliseconds.median / first,
            device,
            host,
            [device / num_gaussians, host / num_gaussians],
            found.stages,
            None,
        )


def main(options: Options) -> None:
    if options.trainer not in TRAINERS:
        raise InputError(f"--trainer {options.trainer} is unknown: choose one of {', '.join(TRAINERS)}.")
    if options.quick:
        options.num_gaussians, options.visible = (50_000, 200_000), (5_000, 20_000)
        options.fixed_num_gaussians, options.steps, options.picture_scale = 100_000, 5, 0.25
    if max(options.visible) > options.fixed_num_gaussians / 2 or options.visible[0] > min(options.num_gaussians) / 2:
        raise InputError("--visible must be at most half of --num_gaussians and of --fixed_num_gaussians.")
    purpose = f"Time and memory of a training step of {options.trainer} against N and V"
    report = Report("scaling", purpose, options, variant="" if options.trainer == "optimized" else options.trainer)
    size = f"{round(WIDTH * options.picture_scale)}x{round(HEIGHT * options.picture_scale)}"
    report.say(f"Aerial scene, pictures of {size} pixels, no densification; memory in 10^9 bytes.")

    wanted = options.visible[0]
    scenes = [(n, *in_fresh_process(focals_for, n, [wanted])[0]) for n in options.num_gaussians]
    measure_rows(report.table(f"N grows, about {wanted:,} Gaussians are visible:", COLUMNS), options, scenes)

    n = options.fixed_num_gaussians
    scenes = [(n, *found) for found in in_fresh_process(focals_for, n, options.visible)]
    measure_rows(report.table(f"The visible number grows, N is {n:,}:", COLUMNS), options, scenes)
    report.write()


if __name__ == "__main__":
    run(main, Options, __doc__)
