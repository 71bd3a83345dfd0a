"""Naive host offloading: everything lives in host memory, and the CPU visits every Gaussian at every step.

    python simple_trainer_hybrid_baseline.py SCENE --data_dir D --result_dir R [--any_option ...]

The yardstick for simple_trainer_hybrid_optimized.py: the least device memory that is easily had, and the time it
costs. Transfers are pinned and Adam is one fused native pass. The model is that of simple_trainer.py.

The training loop is `train`; the hyperparameters of each scene stand at the end of this file, to be edited.
"""

import os

# Read by OpenMP when torch loads: threads sleep between parallel loops. Spinning, they take the cores that the next
# loop of another library, and the threads that read pictures, need at that moment.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from torch import Tensor

from configs import Config, scene_config
from offload.culling.cameras import Cameras
from offload.models.baseline import BaselineGaussians
from rendering.losses import photometric_loss
from training import memory_estimate, schedules
from training.command_line import main
from training.densification import Densification
from training.run import TrainingRun
from training.views import render


def train(cfg: Config, scene_name: str) -> None:
    """Train on one scene, or evaluate `cfg.ckpt` on it.

    Raises:
        InputError: The input cannot be used; nothing has been trained.
        TrainingStopped: Training cannot go on; a checkpoint has been saved.
    """
    with TrainingRun(cfg, scene_name) as run:
        cfg = run.cfg
        run.check_memory(memory_estimate.baseline(cfg.sh_degree))
        gaussians = BaselineGaussians(
            run.initial_gaussians(),
            schedules.adam_options(cfg, run.scene_scale),
            device=run.device,
            max_gaussians=cfg.max_gaussians,
        )
        densification = Densification(cfg, run.scene_scale, cfg.seed)

        def draw(cameras: Cameras) -> Tensor:
            return render(gaussians.read_view(cameras), cameras, cfg, sh_degree=cfg.sh_degree)[0]

        if cfg.ckpt:
            run.evaluate_checkpoint(draw, gaussians)
            return

        for step, view in run.steps(gaussians, densification, draw):
            # Every Gaussian is tested against the cameras; the rows in view are gathered and sent to the device.
            rows = gaussians.fetch(view.cameras)
            run.times.mark("fetch")

            sh_degree = schedules.sh_degree(cfg, step)
            colors, info = render(rows, view.cameras, cfg, sh_degree=sh_degree, backgrounds=run.backgrounds(view))
            run.times.mark("render")

            loss = photometric_loss(colors, view.images, ssim_lambda=cfg.ssim_lambda, masks=view.masks)
            loss.backward()
            run.times.mark("backward")

            # The gradients come back, and Adam visits every Gaussian.
            gaussians.update()
            run.times.mark("update")

            ids = gaussians.ids.to(run.device)
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
        max_steps=2000,
        eval_steps=[500, 2000],
        save_steps=[2000],
        ply_steps=[2000],
        sh_degree_interval=500,
        refine_start_iter=200,
        refine_stop_iter=1200,
        max_gaussians=40_000,
    ),
    "rubble": scene_config("rubble", position_lr=1.6e-5, scaling_lr=5e-3, **LARGE_SCENE),
    "building": scene_config("building", position_lr=8e-6, scaling_lr=2.5e-3, **LARGE_SCENE),
    "sztu": scene_config("sztu", position_lr=1.6e-5, scaling_lr=5e-3, **LARGE_SCENE),
    "lfls": scene_config("lfls", position_lr=1.6e-5, scaling_lr=5e-3, **LARGE_SCENE),
    "sziit": scene_config("sziit", position_lr=1.6e-5, scaling_lr=5e-3, **LARGE_SCENE),
    "aerial": scene_config("aerial", position_lr=8e-6, scaling_lr=2.5e-3, **LARGE_SCENE),
    "residence": scene_config("residence", position_lr=1.6e-5, scaling_lr=5e-3, **LARGE_SCENE),
    "sciart": scene_config("sciart", position_lr=1.6e-5, scaling_lr=5e-3, **LARGE_SCENE),
    "default": scene_config("default"),
}

if __name__ == "__main__":
    main(CONFIGS, train, __doc__)
