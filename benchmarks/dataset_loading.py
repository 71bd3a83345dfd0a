"""Reading a dataset: its COLMAP model, scaling of pictures, decoding, and the loader that training waits for.

    python -m benchmarks.dataset_loading [--data_dir data/garden --data_factor 4] [--quick]

Without --data_dir on a city block made for it. Files are in the page cache, as they are from the second epoch on where
memory allows. The loader's floor is decoding and undistorting on one thread, divided by the threads; what training
sees is the loader's time per picture, if that is longer than a step.

The second table is of a thread that launches work, as training does for a GPU: small operations, for each of which it
needs Python's lock, and a batch for each step. Threads that decode take the lock, and the processors, too.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice, repeat
from pathlib import Path

import torch

from benchmarks.command_line import BenchmarkOptions, run
from benchmarks.report import Report, Table, spread
from benchmarks.timing import Case, time_in_turns
from datasets.free_memory import SPARED_PART, free_bytes
from datasets.image_files import decode_image
from datasets.loader import Batch, training_loader
from datasets.scene import Scene, load_scene
from datasets.synthetic import write_city_block
from offload.backends import num_threads
from reporting.numbers import number

DECODE = "decode and undistort a picture, 1 thread"
LAUNCHES = 2000  # operations of a step, each on so few numbers that launching it is its time


@dataclass
class Options(BenchmarkOptions):
    data_dir: Path | None = None
    """A dataset to read; nothing is written to it but scaled pictures, as by the trainers. Else one is made."""
    data_factor: float = 2.0
    """Pictures are scaled down by this factor."""
    views: int = 24
    """Pictures of the dataset that is made."""
    width: int = 640
    """Width of its pictures in pixels; they are 3/4 as high."""
    repeats: int = 5
    """Timed turns."""
    steps: int = 100
    """Steps of a launching thread in each turn."""


@contextmanager
def dataset(options: Options) -> Iterator[Path]:
    """Yield the folder of the dataset, which is removed afterwards if it was made."""
    if options.data_dir is not None:
        yield options.data_dir
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "city_block"
        write_city_block(path, num_views=options.views, width=options.width, height=options.width * 3 // 4)
        yield path


def main(options: Options) -> None:
    if options.quick:
        options.views, options.width, options.repeats, options.steps = 8, 160, 2, 10
    with dataset(options) as data_dir:
        report = Report("dataset_loading", "Reading a dataset", options)
        measure(data_dir, options, report)
        report.write()


def measure(data_dir: Path, options: Options, report: Report) -> None:
    """Make the table."""
    threads = num_threads()

    def load():
        return load_scene(data_dir, data_factor=options.data_factor, num_workers=threads)

    scene = load()
    pictures = len(scene.image_names)
    camera = scene.cameras[0]
    report.say(
        f"{pictures} pictures, scaled by {options.data_factor:g} to {camera.width}x{camera.height} pixels, "
        f"{len(scene.points):,} points; {threads} threads, {options.repeats} turns."
    )
    paths = cycle(scene.image_paths[:16])

    def decode() -> None:
        camera.undistort(decode_image(next(paths)))

    cases = {
        "load the scene, pictures scaled before": Case(load),
        "decode and undistort a picture, 1 thread": Case(decode),
    }
    if options.data_dir is None and options.data_factor > 1:
        scaled = data_dir / f"images_{options.data_factor:g}"
        cases["load the scene, scale pictures"] = Case(load, lambda: shutil.rmtree(scaled))
    times = time_in_turns(cases, options.repeats)

    columns = {
        "work": str,
        "ms, median (10 %, 90 %)": spread,
        "ms per picture": number,
        "floor, ms per picture": number,
    }
    table = report.table("Time of each part:", columns)
    for name, time in times.items():
        table.add(name, time, time.median / (pictures if "scene" in name else 1), None)
    decoding = times[DECODE].median
    for workers in sorted({1, threads}):
        with training_loader(scene, scene.train_ids, num_workers=workers) as loader:
            batches = 8 * workers
            list(islice(loader, 4 * workers))  # what is ready before anybody asks
            case = Case(lambda loader=loader, batches=batches: list(islice(loader, batches)))
            (time,) = time_in_turns({"load": case}, options.repeats).values()
        name = f"training loader, {batches} pictures, {workers} thread{'s' if workers > 1 else ''}"
        table.add(name, time, time.median / batches, decoding / workers)
    measure_kept(scene, threads, options, report, table)


def measure_kept(scene: Scene, threads: int, options: Options, report: Report, table: Table) -> None:
    """Measure batches of pictures that are kept, and what a launching thread loses beside either kind of loader."""
    pictures = len(scene.train_ids)
    with (
        training_loader(scene, scene.train_ids, num_workers=threads) as decoding,
        training_loader(scene, scene.train_ids, num_workers=threads, keep_bytes=free_bytes() // SPARED_PART) as keeping,
    ):
        list(islice(keeping, 2 * pictures))  # of which the first half is decoded
        (time,) = time_in_turns({"take": Case(lambda: list(islice(keeping, pictures)))}, options.repeats).values()
        kept = f"training loader, {pictures} pictures of which {keeping.spared_bytes / 1e6:.0f} MB are kept"
        table.add(kept, time, time.median / pictures, None)
        cases = {
            "alone": repeat(next(keeping)),
            "beside a loader that decodes": decoding,
            "beside a loader that has kept them": keeping,
        }
        times = time_in_turns(
            {name: Case(lambda batches=batches: launch(batches, options.steps)) for name, batches in cases.items()},
            options.repeats,
        )
    columns = {"steps of a thread that launches work": str, "ms per step": number, "of alone": number}
    launching = report.table(f"{LAUNCHES:,} small operations a step, a batch for each:", columns)
    for name, time in times.items():
        launching.add(name, time.median / options.steps, time.median / times["alone"].median)


def launch(batches: Iterator[Batch], steps: int) -> None:
    """Take a batch for each step, and do small operations one after the other."""
    numbers = torch.zeros(16)
    for _ in islice(batches, steps):
        for _ in range(LAUNCHES):
            numbers.add_(1.0)


if __name__ == "__main__":
    run(main, Options, __doc__)
