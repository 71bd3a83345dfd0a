"""Naive host offloading: everything lives in host memory, and the CPU visits every Gaussian at every step.

    python simple_trainer_hybrid_baseline.py SCENE --data_dir D --result_dir R [--any_option ...]

The yardstick for simple_trainer_hybrid_optimized.py: the least device memory that is easily had, and the time it
costs. Transfers are pinned and Adam is one fused native pass. The model is that of simple_trainer.py.

The training loop is `train`; the options of each scene stand at the end of this file, to be edited.
"""

import startup  # noqa: F401, before torch is imported
from configs import Config, scenes
from offload.models.baseline import BaselineGaussians
from rendering.losses import photometric_loss
from training.command_line import main
from training.depth_loss import with_depth_loss
from training.run import TrainingRun
from training.views import render


def train(run: TrainingRun[Config]) -> None:
    """Train on the scene of a run, or evaluate its --ckpt.

    Raises:
        InputError: The input cannot be used; nothing has been trained.
        TrainingStopped: Training cannot go on; a checkpoint has been saved.
    """
    cfg = run.cfg
    gaussians = BaselineGaussians(
        run.initial_gaussians(), run.adam, device=run.device, max_gaussians=cfg.most_gaussians
    )
    strategy = run.new_strategy()

    for step, view in run.steps(gaussians, strategy):
        # Every Gaussian is tested against the cameras; the rows in view are gathered and sent to the device.
        rows = gaussians.fetch(view.cameras, run.sh_degree)
        run.mark("fetch")

        cameras = run.modules.cameras(view)
        colors, info = render(
            rows, cameras, cfg, sh_degree=run.sh_degree, backgrounds=run.backgrounds(view), ranks=run.ranks
        )
        colors = run.modules.exposed(colors, view)
        run.mark("render")

        loss = photometric_loss(colors, view.photos, ssim_lambda=cfg.ssim_lambda, masks=view.masks)
        loss = with_depth_loss(loss, info, view, run.depth_weight)
        loss = strategy.regularized(loss, rows, info)
        del colors  # whose memory the gradients need
        loss.backward()
        run.mark("backward")

        # The gradients come back, and Adam visits every Gaussian.
        ids = gaussians.ids
        strategy.before_update(step, rows, info, gaussians, ids)
        gaussians.update()
        run.mark("update")

        strategy.after_step(step, info, gaussians, ids)
        run.mark("densify")

        run.after_step(step, loss)
        del rows, info, loss  # each keeps what the next view needs memory for


# ----------------------------------------------------------------------------------------------------------------------
# Options of each scene; edit them here. What is not named has the default of configs.py.
#
# Larger models come from lower thresholds. The ladder (grow_grad2d, grow_scale3d):
#   (2e-4, 0.01)  (1.5e-4, 0.005)  (1.3e-4, 0.003)  (1e-4, 0.002)  (8e-5, 0.0016)
# ----------------------------------------------------------------------------------------------------------------------
DEMO = dict(sh_degree_interval=500, refine_start_iter=200, refine_stop_iter=1200, max_gaussians=40_000)
LARGE = dict(max_steps=200_000, grow_grad2d=2e-4, grow_scale3d=0.01, refine_stop_iter=15_000)

CONFIGS = scenes(
    Config,
    demo=dict(DEMO, max_steps=2000, eval_steps=[500, 2000]),
    rubble=dict(LARGE, position_lr=1.6e-5, scaling_lr=5e-3),
    building=dict(LARGE, position_lr=8e-6, scaling_lr=2.5e-3),
    sztu=dict(LARGE, position_lr=1.6e-5, scaling_lr=5e-3),
    lfls=dict(LARGE, position_lr=1.6e-5, scaling_lr=5e-3),
    sziit=dict(LARGE, position_lr=1.6e-5, scaling_lr=5e-3),
    aerial=dict(LARGE, position_lr=8e-6, scaling_lr=2.5e-3),
    residence=dict(LARGE, position_lr=1.6e-5, scaling_lr=5e-3),
    sciart=dict(LARGE, position_lr=1.6e-5, scaling_lr=5e-3),
    default={},
)

if __name__ == "__main__":
    main(CONFIGS, train, __doc__)
