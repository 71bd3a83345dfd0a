"""Pictures of a finished model a second, as the viewer draws them; no browser is needed.

    python -m benchmarks.viewer [--num_gaussians 4000000 18000000] [--picture_scale 1] [--frames 60] [--quick]

The scene of `train_step`, in host memory as `view.py` has it. A camera goes from one of the scene's to the next, and
turns on the way; each frame is what `viewer.frame` makes: culled, fetched, rendered, brought to the host as bytes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from benchmarks.aerial_scene import aerial_scene, one_by_one
from benchmarks.command_line import BenchmarkOptions, run
from benchmarks.numbers import count, gigabytes
from benchmarks.report import Report, spread
from benchmarks.timing import Spread
from datasets.trajectories import through
from offload.culling.cameras import Cameras
from reporting.numbers import number
from training.evaluation import synchronize
from training.memory import peak_bytes
from training.opened import OpenedModel
from viewer.frame import frame

FRAMES_PER_SECOND = 30
SEED = 0


@dataclass
class Options(BenchmarkOptions):
    num_gaussians: tuple[int, ...] = (4_000_000, 18_000_000)
    """Sizes of the scene."""
    frames: int = 60
    """Frames to measure, after the first one."""
    picture_scale: float = 1.0
    """Factor on the sides of the pictures and on the focal length."""


def moving_cameras(cameras: list[Cameras], frames: int) -> list[Cameras]:
    """Return what a camera sees on its way past some of the scene's, frame by frame."""
    keys = np.linalg.inv(np.concatenate([camera.viewmats.double().numpy() for camera in cameras[:4]]))
    poses = through(keys, frames_per_second=FRAMES_PER_SECOND, seconds=frames / FRAMES_PER_SECOND)
    viewmats = torch.from_numpy(np.linalg.inv(poses)).float()
    return [replace(cameras[0], viewmats=viewmat[None]) for viewmat in viewmats]


def main(options: Options) -> None:
    sizes, frames, scale = options.num_gaussians, options.frames, options.picture_scale
    if options.quick:
        sizes, frames, scale = (20_000,), 6, 0.1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = Report("viewer", "Frames of a finished model in host memory", options)
    report.say(f"On {device.type}.")
    columns = {"N": count, "picture": str, "first frame, ms": number, "ms": spread, "frames a second": number}
    table = report.table("Milliseconds of a frame, median (10 %, 90 %):", {**columns, "device GB": gigabytes})
    for num_gaussians in sizes:
        parameters, cameras = aerial_scene(num_gaussians, SEED, picture_scale=scale)
        model = OpenedModel(parameters, device)
        del parameters
        samples = []
        for camera in moving_cameras(one_by_one(cameras), frames + 1):
            synchronize(device)
            begin = time.perf_counter()
            frame(model.draw, camera)
            samples.append(1e3 * (time.perf_counter() - begin))
        times = Spread.of(samples[1:])
        size = f"{cameras.width}x{cameras.height}"
        table.add(num_gaussians, size, samples[0], times, 1e3 / times.median, peak_bytes(device)["device_allocated"])
        del model
    report.write()


if __name__ == "__main__":
    run(main, Options, __doc__)
