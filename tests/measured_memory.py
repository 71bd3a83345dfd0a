"""What each trainer takes of main memory to start, grow, train and save some Gaussians on the CPU, as JSON.

MALLOC_MMAP_THRESHOLD_=65536 python -m tests.measured_memory
"""

from __future__ import annotations

import gc
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.aerial_scene import AerialCameras, aerial_scene
from offload.culling.cameras import Cameras
from offload.store.morton import morton_order
from rendering.losses import photometric_loss
from tests.aerial_training import CONFIG, KINDS, Gaussians, gaussians_of
from tests.resident_memory import resident_bytes
from training.checkpoint_writing import save_checkpoint
from training.checkpoints import Checkpoint
from training.memory_estimate import parameter_bytes
from training.ply import save_ply
from training.views import View, render

WIDTH, HEIGHT = 288, 216
NUM_VIEWS = 4
CPU = torch.device("cpu")


def train_some_steps(trainer: str, gaussians: Gaussians, cameras: AerialCameras, device: torch.device) -> float:
    """Train on random pictures; returns the largest share of the Gaussians in a view."""
    scale = torch.tensor([[WIDTH / cameras.width], [HEIGHT / cameras.height], [1.0]])
    views = []
    for index in range(NUM_VIEWS + 1):
        viewmats, Ks = cameras.viewmats[index : index + 1], scale * cameras.Ks[index : index + 1]
        images = torch.rand(1, HEIGHT, WIDTH, 3, device=device)
        views.append(View(images, Cameras(viewmats, Ks, WIDTH, HEIGHT)))
    largest_view = 0
    for step in range(NUM_VIEWS):
        view = views[step]
        rows = gaussians.fetch(view.cameras, 3)
        gaussians.prefetch(views[step + 1].cameras)
        colors, info = render(rows, view.cameras, CONFIG, sh_degree=3)
        largest_view = max(largest_view, len(info["gaussian_ids"]))
        photometric_loss(colors, view.images, ssim_lambda=0.2).backward()
        if trainer == "gpu_only":
            gaussians.update(info["gaussian_ids"])
        else:
            gaussians.update()
        del rows, colors, info
    return largest_view / gaussians.num_gaussians


def densify(gaussians: Gaussians) -> None:
    """Grow by a twentieth and sort, as a refinement does."""
    gaussians.append_copies(torch.arange(0, gaussians.num_gaussians, 20))
    gaussians.keep(morton_order(gaussians.read("means")))


def save(folder: Path, gaussians: Gaussians) -> None:
    save_checkpoint(folder / "ckpt.pt", Checkpoint(NUM_VIEWS, np.eye(4), gaussians.state()))
    save_ply(folder / "a.ply", gaussians.rows, gaussians.num_gaussians, np.eye(4))


def grow_train_and_save(trainer: str, gaussians: Gaussians, cameras: AerialCameras) -> float:
    """Returns the largest share of the Gaussians in a view."""
    densify(gaussians)
    share = train_some_steps(trainer, gaussians, cameras, CPU)
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), gaussians)
    return share


def measure(trainer: str, num_gaussians: int) -> dict[str, float]:
    parameters, cameras = aerial_scene(1000, seed=0)
    gaussians = gaussians_of(trainer, parameters, CPU)
    grow_train_and_save(trainer, gaussians, cameras)  # libraries and threads have their memory from now on

    parameters, cameras = aerial_scene(num_gaussians, seed=0)
    gc.collect()
    before = resident_bytes("VmRSS") - num_gaussians * parameter_bytes(3)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    gaussians = gaussians_of(trainer, parameters, CPU)
    taken_at_start = resident_bytes("VmHWM") - before

    Path("/proc/self/clear_refs").write_text("5")
    share = grow_train_and_save(trainer, gaussians, cameras)
    return {
        "num_gaussians_at_start": num_gaussians,
        "bytes_at_start": taken_at_start,
        "num_gaussians": gaussians.num_gaussians,
        "bytes": resident_bytes("VmHWM") - before,
        "share_in_view": share,
    }


if __name__ == "__main__":
    print(json.dumps({trainer: measure(trainer, 300_000) for trainer in KINDS}))
