"""Host offloading for fast links: appearance, or everything, lives in host memory, and the device itself updates it.

    python simple_trainer_hybrid_streamed.py SCENE --data_dir D --result_dir R [--geometry host] [--moments bfloat16]

The rows that a view needs are read by the device from pinned host memory, moments and all, while the view before is
rendered; steps that they have skipped are caught up on the way. After the backward pass the device applies Adam, hands
rows that the next view needs too on to it, and writes the others back while that is rendered. With --geometry host
moments stay on the host, where the device updates them after the backward pass, and a view's parameters alone are on
the device: its memory then depends on the largest views, and not on the number of Gaussians. The CPU moves no row. The
model is that of simple_trainer.py up to float rounding.

The training loop is `train`; the hyperparameters of each scene stand at the end of this file, to be edited.
"""

import os

# Read by OpenMP when torch loads: threads sleep between parallel loops. Spinning, they take the cores that the next
# loop of another library, and the threads that read pictures, need at that moment.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from configs import Config, scene_config
from offload.culling.cameras import Cameras
from offload.models.streamed import StreamedGaussians
from rendering.losses import photometric_loss
from training import memory_estimate, schedules
from training.calibration import print_last_verdict
from training.command_line import main
from training.densification import Densification
from training.run import TrainingRun
from training.views import render


@dataclass
class StreamedConfig(Config):
    """Train a 3D Gaussian Splatting model of a COLMAP scene, in host memory, updated by the GPU."""

    geometry: Literal["device", "host"] = "device"
    """Where means, scales, quaternions and opacities are; on the host they cost no device memory, nor do moments."""

    moments: Literal["float32", "bfloat16"] = "float32"
    """Precision of Adam's moments of the appearance; bfloat16, rounded at random, is a third less to move."""


def train(cfg: StreamedConfig, scene_name: str) -> None:
    """Train on one scene, or evaluate `cfg.ckpt` on it.

    Raises:
        InputError: The input cannot be used; nothing has been trained.
        TrainingStopped: Training cannot go on; a checkpoint has been saved.
    """
    with TrainingRun(cfg, scene_name) as run:
        cfg = run.cfg
        run.check_memory(memory_estimate.streamed(cfg.sh_degree, cfg.geometry, cfg.moments))
        gaussians = StreamedGaussians(
            run.initial_gaussians(),
            schedules.adam_options(cfg, run.scene_scale),
            device=run.device,
            geometry=cfg.geometry,
            moments=cfg.moments,
            max_gaussians=cfg.max_gaussians,
        )
        densification = Densification(cfg, run.scene_scale, cfg.seed)

        def draw(cameras: Cameras) -> Tensor:
            return render(gaussians.read_view(cameras), cameras, cfg, sh_degree=cfg.sh_degree)[0]

        if cfg.ckpt:
            run.evaluate_checkpoint(draw, gaussians)
            return

        print_last_verdict(run.device)  # of benchmarks.calibrate, where it has been run
        for step, view in run.steps(gaussians, densification, draw):
            # The rows of this view are on the device already, but for the first one and after densification.
            rows = gaussians.fetch(view.cameras)
            run.times.mark("fetch")

            # Behind the rendering the next view's rows come from the host, and those of the last one go there.
            rows_will_change = densification.refines_at(step) or densification.resets_at(step)
            if run.upcoming is not None and not rows_will_change:
                gaussians.prefetch(run.upcoming.cameras)
            run.times.mark("cull")

            sh_degree = schedules.sh_degree(cfg, step)
            colors, info = render(rows, view.cameras, cfg, sh_degree=sh_degree, backgrounds=run.backgrounds(view))
            run.times.mark("render")

            loss = photometric_loss(colors, view.images, ssim_lambda=cfg.ssim_lambda, masks=view.masks)
            loss.backward()
            run.times.mark("backward")

            # Adam by the device; rows that the next view needs too stay there, the others are written to the host.
            ids = gaussians.ids
            gaussians.update()
            run.times.mark("update")

            densification.after_step(step, {**info, "gaussian_ids": ids[info["gaussian_ids"]]}, gaussians)
            run.times.mark("densify")

            run.after_step(step, loss.detach(), sh_degree)
            del rows, colors, info, loss  # each keeps what the next view needs memory for


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
        StreamedConfig,
        max_steps=2000,
        eval_steps=[500, 2000],
        save_steps=[2000],
        ply_steps=[2000],
        sh_degree_interval=500,
        refine_start_iter=200,
        refine_stop_iter=1200,
        max_gaussians=40_000,
    ),
    "rubble": scene_config("rubble", StreamedConfig, position_lr=1.6e-5, scaling_lr=5e-3, **LARGE_SCENE),
    "building": scene_config("building", StreamedConfig, position_lr=8e-6, scaling_lr=2.5e-3, **LARGE_SCENE),
    "sztu": scene_config("sztu", StreamedConfig, position_lr=1.6e-5, scaling_lr=5e-3, **LARGE_SCENE),
    "lfls": scene_config("lfls", StreamedConfig, position_lr=1.6e-5, scaling_lr=5e-3, **LARGE_SCENE),
    "sziit": scene_config("sziit", StreamedConfig, position_lr=1.6e-5, scaling_lr=5e-3, **LARGE_SCENE),
    "aerial": scene_config("aerial", StreamedConfig, position_lr=8e-6, scaling_lr=2.5e-3, **LARGE_SCENE),
    "residence": scene_config("residence", StreamedConfig, position_lr=1.6e-5, scaling_lr=5e-3, **LARGE_SCENE),
    "sciart": scene_config("sciart", StreamedConfig, position_lr=1.6e-5, scaling_lr=5e-3, **LARGE_SCENE),
    "default": scene_config("default", StreamedConfig),
}

if __name__ == "__main__":
    main(CONFIGS, train, __doc__)
