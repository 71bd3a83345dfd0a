"""Milliseconds and memory of one training step on a synthetic aerial scene of any size, for each trainer.

python -m benchmarks.train_step [--num_gaussians 4000000] [--trainers gpu_only optimized ...] [--quick]

Each trainer runs in its own process, from the same scene, without densification. Floor of a GPU-only step: rendering,
plus 28 bytes of device memory for each of 59 parameters of every Gaussian (Adam reads four floats and writes three).
An offloaded step moves 192 bytes to and 192 bytes from the device for each visible Gaussian, and on the host reads
768 + 192 and writes 192 + 576 bytes for it.
"""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import tyro

from benchmarks.aerial_scene import aerial_scene
from benchmarks.machine import processor
from configs import Config
from offload.host_gaussians import HostGaussians
from offload.hybrid_gaussians import HybridGaussians
from rendering.losses import photometric_loss
from training import schedules
from training.gaussians import DeviceGaussians, activate
from training.memory import limit_fragmentation
from training.stages import StageTimes
from training.views import View, cameras_of, render_view

Trainer = Literal["gpu_only", "baseline", "optimized", "optimized_geometry_on_host"]
TRAINERS: tuple[Trainer, ...] = ("gpu_only", "baseline", "optimized", "optimized_geometry_on_host")
SCENE_SCALE = 3.2  # world units: how far the cameras stand apart


@dataclass
class Options:
    """Measure training steps."""

    num_gaussians: int = 4_000_000
    """Size of the scene."""
    steps: int = 100
    """Steps to measure, after a fifth of them to warm up; the baseline takes a tenth."""
    trainers: tuple[Trainer, ...] = TRAINERS
    """Which trainers."""
    quick: bool = False
    """A size for a laptop's CPU."""
    only: str = ""
    """Measure this trainer in this process and print JSON."""


def random_views(cameras, num_views: int, device: torch.device) -> list[View]:
    """Cameras with random photos; all views share 4 of them."""
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(1, cameras.height, cameras.width, 3, generator=generator).to(device) for _ in range(4)]
    views = []
    for index in torch.randint(len(cameras.viewmats), (num_views,), generator=generator).tolist():
        viewmats, Ks = cameras.viewmats[index : index + 1], cameras.Ks[index : index + 1]
        view = View(
            images=images[index % 4],
            masks=None,
            viewmats=viewmats.to(device),
            Ks=Ks.to(device),
            host_viewmats=viewmats,
            host_Ks=Ks,
            width=cameras.width,
            height=cameras.height,
        )
        views.append(view)
    return views


def measure(trainer: Trainer, num_gaussians: int, num_steps: int) -> dict[str, object]:
    """Run one trainer; returns the figures of its row."""
    limit_fragmentation()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cfg = Config(sh_degree_interval=1)
    parameters, cameras = aerial_scene(num_gaussians, seed=0)
    rates, means_lr = (
        schedules.learning_rates(cfg, SCENE_SCALE),
        lambda step: schedules.means_lr(cfg, SCENE_SCALE, step),
    )
    adam = {"betas": schedules.adam_betas(1), "eps": 1e-15, "device": device}
    if trainer == "gpu_only":
        gaussians = DeviceGaussians(parameters, rates, **adam)
    elif trainer == "baseline":
        gaussians = HostGaussians(parameters, rates, means_lr, max_gaussians=num_gaussians, **adam)
    else:
        place = "host" if trainer == "optimized_geometry_on_host" else "device"
        gaussians = HybridGaussians(parameters, rates, means_lr, geometry=place, max_gaussians=num_gaussians, **adam)
    del parameters
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    num_warmup = max(num_steps // 5, 3)
    views = random_views(cameras, num_warmup + num_steps + 1, device)
    times, milliseconds, visible = StageTimes(device), [], []
    for step in range(num_warmup + num_steps):
        if step == num_warmup:
            times.mean_milliseconds()
            staging = getattr(gaussians, "staging_allocations", 0)
        begin = time.perf_counter()
        times.start()
        view = views[step]
        if trainer == "gpu_only":
            activated = gaussians.activated()
        else:
            activated = activate(gaussians.fetch(cameras_of(view, cfg)))
            times.mark("fetch")
        if isinstance(gaussians, HybridGaussians):
            gaussians.prefetch(cameras_of(views[step + 1], cfg))
            times.mark("cull ahead")
        colors, _, info = render_view(activated, view, cfg, sh_degree=3)
        times.mark("render")
        loss = photometric_loss(colors, view.images, ssim_lambda=cfg.ssim_lambda)
        loss.backward()
        times.mark("backward")
        if trainer == "gpu_only":
            gaussians.step(means_lr(step))
        elif trainer == "baseline":
            gaussians.update()
        else:
            gaussians.update(step)
        times.mark("update")
        if device.type == "cuda":
            torch.cuda.synchronize()
        if step >= num_warmup:
            milliseconds.append(1000 * (time.perf_counter() - begin))
            visible.append(len(info["gaussian_ids"]) / num_gaussians)
    return {
        "trainer": trainer,
        "ms": [float(x) for x in np.percentile(milliseconds, [50, 10, 90])],
        "stages": times.mean_milliseconds(),
        "device_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
        "host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "visible": float(np.mean(visible)),
        "staging_allocations": getattr(gaussians, "staging_allocations", 0) - staging,
        "loss": loss.item(),
    }


def main(options: Options) -> None:
    """Print a Markdown table, one row per trainer."""
    if options.quick:
        options.num_gaussians, options.steps = 100_000, 10
    if options.only:
        print(json.dumps(measure(options.only, options.num_gaussians, options.steps)))
        return
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    print(
        f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"
    )
    print(f"{options.num_gaussians} Gaussians, 1152x864\n")
    print("| trainer | ms per step: median (10 %, 90 %) | peak device GB | peak host GB | visible | stages, mean ms |")
    print("|---|---|---|---|---|---|", flush=True)
    for trainer in options.trainers:
        steps = max(options.steps // 10, 3) if trainer == "baseline" else options.steps
        arguments = ["--only", trainer, "--num_gaussians", str(options.num_gaussians), "--steps", str(steps)]
        run = subprocess.run(
            [sys.executable, "-m", "benchmarks.train_step", *arguments], capture_output=True, text=True, check=False
        )
        if run.returncode != 0:
            print(f"| {trainer} | failed: {(run.stderr.strip().splitlines() or ['?'])[-1]} | | | | |", flush=True)
            continue
        row = json.loads(run.stdout.strip().splitlines()[-1])
        stages = ", ".join(f"{name} {value:.1f}" for name, value in row["stages"].items())
        median, low, high = row["ms"]
        print(
            f"| {trainer} | {median:.1f} ({low:.1f}, {high:.1f}) | {row['device_bytes'] / 1e9:.2f} "
            f"| {row['host_bytes'] / 1e9:.1f} | {100 * row['visible']:.1f} % | {stages}; "
            f"staging allocations {row['staging_allocations']} |",
            flush=True,
        )


if __name__ == "__main__":
    main(tyro.cli(Options))
