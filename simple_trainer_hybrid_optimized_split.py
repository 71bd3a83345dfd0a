"""Host offloading with all optimizations, in bounded device memory: views that see too much are rendered in tiles.

    python simple_trainer_hybrid_optimized_split.py SCENE --data_dir D --result_dir R [--split_threshold 0.3]
    python simple_trainer_hybrid_optimized_split.py SCENE --data_dir D --result_dir R --device_memory_budget 6GiB

As simple_trainer_hybrid_optimized.py, but a view that sees more than a share of all Gaussians, or more than fits into
the budget, is rendered and propagated back tile by tile. Each tile brings only its own rows to the device, while the
one before is rendered, and a halo that makes SSIM exact, so the gradients add up to those of the whole view. The model
is that of the other trainers up to float rounding.

The training loop is `train`; the hyperparameters of each scene stand at the end of this file, to be edited.
"""

import os
from dataclasses import dataclass
from functools import partial
from typing import Literal

# Read by OpenMP when torch loads: threads sleep between parallel loops. Spinning, they take the cores that the next
# loop of another library, and the threads that read pictures, need at that moment.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from torch import Tensor

from configs import Config, scene_config
from errors import InputError
from offload.culling.cameras import Cameras
from offload.device_memory import bound_memory
from offload.models.tiled import TiledGaussians, TileResult, ViewTile
from offload.tiles.budget import MemoryBudget, RowBytes, RowLimit
from training import memory_estimate, schedules
from training.command_line import main
from training.densification import Densification
from training.memory import available_bytes, format_bytes, parse_bytes
from training.run import TrainingRun
from training.tiles import ScreenGradients, halo_of, part_loss, render_in_parts, render_part
from training.views import View


@dataclass
class SplitConfig(Config):
    """Train a 3D Gaussian Splatting model of a COLMAP scene, offloaded, in bounded device memory."""

    geometry: Literal["device", "host"] = "device"
    """Where means, scales, quaternions and opacities are; on the host they cost no device memory."""
    split_threshold: float | None = None
    """Share of all Gaussians that a view may see before it is rendered in tiles; 0.3 where nothing is given."""
    device_memory_budget: str | None = None
    """Device memory that torch may take, such as 6GiB; views are split so that it suffices. Excludes a threshold."""


def part_limit(cfg: SplitConfig, run: TrainingRun, num_gaussians: int) -> RowLimit | MemoryBudget:
    """How large the parts of a view may be.

    Raises:
        InputError: The options contradict each other, or the budget is too small for the geometry alone.
    """
    if cfg.device_memory_budget is None:
        return RowLimit(0.3 if cfg.split_threshold is None else cfg.split_threshold)
    if cfg.split_threshold is not None:
        raise InputError("--split_threshold and --device_memory_budget exclude each other: give one of them.")
    budget = parse_bytes(cfg.device_memory_budget, "--device_memory_budget")
    if run.device.type == "cuda" and budget > available_bytes(run.device):
        raise InputError(
            f"--device_memory_budget is {format_bytes(budget)}, but the GPU has only "
            f"{format_bytes(available_bytes(run.device))} free: give at most that."
        )
    limit = MemoryBudget(budget, RowBytes.of(cfg.geometry, cfg.sh_degree), num_gaussians)
    bound_memory(budget, run.device)
    return limit


def train(cfg: SplitConfig, scene_name: str) -> None:
    """Train on one scene, or evaluate `cfg.ckpt` on it.

    Raises:
        InputError: The input cannot be used; nothing has been trained.
        TrainingStopped: Training cannot go on; a checkpoint has been saved.
    """
    with TrainingRun(cfg, scene_name) as run:
        cfg = run.cfg
        parameters = run.initial_gaussians()
        limit = part_limit(cfg, run, len(parameters["means"]))
        run.check_memory(
            memory_estimate.optimized(cfg.sh_degree, cfg.geometry),
            largest_part=limit.threshold if isinstance(limit, RowLimit) else 0.0,
        )
        gaussians = TiledGaussians(
            parameters,
            schedules.adam_options(cfg, run.scene_scale),
            device=run.device,
            geometry=cfg.geometry,
            max_gaussians=cfg.max_gaussians,
            limit=limit,
            halo=halo_of(cfg),
        )
        del parameters
        densification = Densification(cfg, run.scene_scale, cfg.seed)

        def draw(cameras: Cameras) -> Tensor:
            return render_in_parts(gaussians.view_tiles(cameras), cameras, cfg)

        if cfg.ckpt:
            run.evaluate_checkpoint(draw, gaussians)
            return

        def train_part(
            part: ViewTile, view: View, sh_degree: int, backgrounds: Tensor | None, screen: ScreenGradients
        ) -> TileResult:
            """Render one tile with its halo, or all of the view, and propagate its share of the loss back."""
            run.times.mark("fetch")
            colors, info = render_part(
                part, view.cameras, cfg, sh_degree=sh_degree, backgrounds=backgrounds, halo=halo_of(cfg)
            )
            run.times.mark("render")
            loss = part_loss(colors, view, part.tile, ssim_lambda=cfg.ssim_lambda, halo=halo_of(cfg))
            loss.backward()
            screen.add(part, len(gaussians.ids), info)
            run.times.mark("backward")
            return TileResult(loss.detach(), info["n_intersections"], colors.shape[:3].numel())

        for step, view in run.steps(gaussians, densification, draw):
            # Behind the rendering of each part the CPU commits gradients of the part before and sends the rows of the
            # next part, or of the next view's first one. A part that runs out of memory is rendered in finer tiles.
            rows_will_change = densification.refines_at(step) or densification.resets_at(step)
            upcoming = None if run.upcoming is None or rows_will_change else run.upcoming.cameras
            sh_degree = schedules.sh_degree(cfg, step)
            screen = ScreenGradients(view.cameras, needed=step < cfg.refine_stop_iter)
            loss = gaussians.train_view(
                view.cameras,
                upcoming,
                partial(train_part, view=view, sh_degree=sh_degree, backgrounds=run.backgrounds(view), screen=screen),
            )

            # Every Gaussian has one gradient, whatever the number of tiles, and is updated once.
            ids = gaussians.ids
            gaussians.update()
            run.times.mark("update")

            densification.after_step(step, screen.info(ids), gaussians)
            run.times.mark("densify")

            run.after_step(step, loss, sh_degree)


# ----------------------------------------------------------------------------------------------------
# Hyperparameters of each scene; edit them here. What is not named has the default of configs.py.
#
# Larger models come from lower thresholds. The ladder (grow_grad2d, grow_scale3d):
#   (2e-4, 0.01)  (1.5e-4, 0.005)  (1.3e-4, 0.003)  (1e-4, 0.002)  (8e-5, 0.0016)
# ----------------------------------------------------------------------------------------------------
LARGE_SCENE = {
    "max_steps": 200_000,
    "eval_steps": [200_000],
    "save_steps": [200_000],
    "ply_steps": [200_000],
    "grow_grad2d": 2e-4,
    "grow_scale3d": 0.01,
    "refine_stop_iter": 15_000,
}

CONFIGS = {
    "demo": scene_config(
        "demo",
        SplitConfig,
        max_steps=2000,
        eval_steps=[500, 2000],
        save_steps=[2000],
        ply_steps=[2000],
        sh_degree_interval=500,
        refine_start_iter=200,
        refine_stop_iter=1200,
        max_gaussians=40_000,
    ),
    "rubble": scene_config("rubble", SplitConfig, position_lr=1.6e-5, scaling_lr=5e-3, **LARGE_SCENE),
    "building": scene_config("building", SplitConfig, position_lr=8e-6, scaling_lr=2.5e-3, **LARGE_SCENE),
    "sztu": scene_config("sztu", SplitConfig, position_lr=1.6e-5, scaling_lr=5e-3, **LARGE_SCENE),
    "lfls": scene_config("lfls", SplitConfig, position_lr=1.6e-5, scaling_lr=5e-3, **LARGE_SCENE),
    "sziit": scene_config("sziit", SplitConfig, position_lr=1.6e-5, scaling_lr=5e-3, **LARGE_SCENE),
    "aerial": scene_config("aerial", SplitConfig, position_lr=8e-6, scaling_lr=2.5e-3, **LARGE_SCENE),
    "residence": scene_config("residence", SplitConfig, position_lr=1.6e-5, scaling_lr=5e-3, **LARGE_SCENE),
    "sciart": scene_config("sciart", SplitConfig, position_lr=1.6e-5, scaling_lr=5e-3, **LARGE_SCENE),
    "default": scene_config("default", SplitConfig),
}

if __name__ == "__main__":
    main(CONFIGS, train, __doc__)
