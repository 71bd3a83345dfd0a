"""What export.py writes of a city: size, time and memory of each format, and the pictures that it draws when read back.

    python -m benchmarks.exports [--reader "npx --yes @playcanvas/splat-transform@3.7.0"] [--num_gaussians 1000000]

Each export is a process of its own, with 2 seconds of start in it. Memory is what it takes beside the pages of the
model's file (RssAnon). Pictures are drawn by the CPU rasterizer, from the model and from what another program's reader
makes of each file; without --reader they are left out. Linux only.
"""

from __future__ import annotations

import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import export
from benchmarks.aerial_scene import FOCAL, AerialCameras, one_by_one
from benchmarks.city_scene import City
from benchmarks.command_line import BenchmarkOptions, run
from benchmarks.numbers import count, megabytes
from benchmarks.report import Report, Table
from configs import Config
from errors import InputError
from exports.spz import TURN
from exports.streamed import INDEX
from exports.world import TURN as TURN_OF
from reporting.numbers import number
from training.checkpoint_writing import save_checkpoint
from training.checkpoints import Checkpoint
from training.ply import load_ply
from training.similarity import moved
from training.views import render

SEED = 0
FORMATS = (".ply", ".compressed.ply", ".spz", ".sog", ".splat", ".html", INDEX)
MOST_DRAWN = 2_000_000  # Gaussians of which pictures are drawn
PICTURE_SCALE = 0.25
WAVES = 4.0  # radians over a unit of the ground, at most, of what harmonics do
ROW_BLOCK = 1 << 18


@dataclass
class Options(BenchmarkOptions):
    num_gaussians: int = 1_000_000
    """Of the city."""
    formats: tuple[str, ...] = FORMATS
    """Endings, in this order."""
    views: int = 4
    """Pictures that are drawn of each."""
    reader: str = ""
    """A command that reads a file, its first argument, and writes the PLY file that is its second one."""
    folder: Path | None = None
    """Where files go, which are removed; else the folder for temporary ones."""


def main(options: Options) -> None:
    if options.quick:
        options.num_gaussians, options.views = 20_000, 2
    unknown = [ending for ending in options.formats if ending not in FORMATS]
    if unknown:
        raise InputError(f"--formats {unknown[0]} is none of {', '.join(FORMATS)}.")
    report = Report("exports", "What export.py writes of a city", options)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure(Path(folder), options, report)
    report.write()


def measure(folder: Path, options: Options, report: Report) -> None:
    """Make the table."""
    drawn = bool(options.reader) and options.num_gaussians <= MOST_DRAWN
    city = City(options.num_gaussians, SEED)
    parameters = city.parameters()
    if options.num_gaussians <= MOST_DRAWN:
        parameters = coloured(parameters)
    state = {f"parameters/{name}": value for name, value in parameters.items()}
    save_checkpoint(folder / "city.pt", Checkpoint(1, np.eye(4), state))
    del state
    cameras = city.cameras(FOCAL, PICTURE_SCALE)
    expected = pictures(parameters, cameras, options.views, np.eye(4)) if drawn else []
    del parameters
    size = (folder / "city.pt").stat().st_size
    report.say(
        f"{options.num_gaussians:,} Gaussians with harmonics of degree 3, {size / 1e6:,.0f} MB as a checkpoint; "
        f"{options.views} pictures of {cameras.width}x{cameras.height} pixels."
    )
    columns = {
        "file": str,
        "MB": megabytes,
        "bytes a Gaussian": number,
        "seconds": number,
        "CPU seconds": number,
        "memory, MB": megabytes,
        "Gaussians read back": count,
        "PSNR, dB": number,
    }
    table = report.table("Each format:", columns)
    for ending in options.formats:
        to = folder / f"city/{ending}" if ending == INDEX else folder / f"city{ending}"
        spent = timed_export(folder / "city.pt", to)
        files = list(to.parent.rglob("*")) if ending == INDEX else [to]
        size = sum(file.stat().st_size for file in files if file.is_file())
        row = (size, size / options.num_gaussians, *spent)
        if not drawn or ending == ".html":  # a page holds the .spz
            table.add(ending, *row, None, None)
        elif ending == INDEX:
            add_levels(table, row, to, options, cameras, expected)
        else:
            table.add(ending, *row, *read_back(to, (), options, cameras, expected))
        shutil.rmtree(to.parent) if ending == INDEX else to.unlink()


def add_levels(
    table: Table, row: tuple, to: Path, options: Options, cameras: AerialCameras, expected: list[Tensor]
) -> None:
    """Add a row for each level of detail."""
    levels = len({file.parent.name.split("_")[0] for file in to.parent.rglob("meta.json")})
    for level in range(levels):
        found = read_back(to, ("--select-lod", str(level)), options, cameras, expected)
        table.add(f"{INDEX}, level {level}", *(row if level == 0 else (None,) * len(row)), *found)


def coloured(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the city with colours and harmonics that change gradually over the ground, and a little noise.

    A trained model is like that; the city's own are noise, which no palette has colours for.
    """
    n = len(parameters["means"])
    generator = torch.Generator().manual_seed(SEED)
    result = {**parameters, "sh0": torch.empty(n, 1, 3), "shN": torch.empty(n, 15, 3)}
    for name, largest, noise in (("sh0", 0.8, 0.15), ("shN", 0.1, 0.02)):
        values = result[name].view(n, -1)
        waves = WAVES * torch.randn(3, values.shape[1], generator=generator)
        phases = 6.3 * torch.rand(values.shape[1], generator=generator)
        for first in range(0, n, ROW_BLOCK):
            means = parameters["means"][first : first + ROW_BLOCK]
            values[first : first + ROW_BLOCK] = largest * torch.sin(means @ waves + phases)
            values[first : first + ROW_BLOCK] += noise * torch.randn(len(means), values.shape[1], generator=generator)
    return result


def timed_export(model: Path, to: Path) -> tuple[float, float, int]:
    """Return seconds, those of all processors, and the largest memory in bytes beside pages of files."""
    command = [sys.executable, str(Path(export.__file__)), str(model), "--to", str(to)]
    begin, largest = time.perf_counter(), 0
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
            largest = max(largest, int(lines.get("RssAnon", "0 kB").split()[0]) * 1024)
            time.sleep(0.02)
    if process.returncode:
        raise InputError(f"The export of {to.name} ended with exit code {process.returncode}.")
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, largest


def read_back(
    path: Path, reader_options: tuple[str, ...], options: Options, cameras: AerialCameras, expected: list[Tensor]
) -> tuple[int, float]:
    """Return how many Gaussians another program reads, and the PSNR of pictures of them in dB."""
    ply = path.parent.parent / "read_back.ply"
    command = [*shlex.split(options.reader), *reader_options, str(path), str(ply)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    gaussians = load_ply(ply)
    ply.unlink()
    if path.suffix == ".spz":  # the axes of that format, which the reader leaves as they are
        gaussians = moved(gaussians, TURN)
    upright = np.eye(4) if path.suffix == ".ply" and ".compressed" not in path.suffixes else TURN_OF["y"]
    found = pictures(gaussians, cameras, options.views, upright)
    error = torch.stack([(a - b).square().mean() for a, b in zip(found, expected, strict=True)]).mean()
    return len(gaussians["means"]), float("inf") if error == 0 else float(-10 * error.log10())


def pictures(gaussians: dict[str, Tensor], cameras: AerialCameras, views: int, turn: np.ndarray) -> list[Tensor]:
    """Return pictures [H, W, 3] of Gaussians that were turned, from the first cameras."""
    degree = round((gaussians["shN"].shape[1] + 1) ** 0.5) - 1
    result = []
    for camera in one_by_one(cameras)[:views]:
        camera = replace(camera, viewmats=camera.viewmats @ torch.from_numpy(turn.T).float())
        result.append(render(gaussians, camera, Config(), sh_degree=degree)[0][0].clamp(0, 1))
    return result


if __name__ == "__main__":
    run(main, Options, __doc__)
