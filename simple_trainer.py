"""GPU-only 3D Gaussian Splatting: all Gaussians and their Adam moments live on the device.

    python simple_trainer.py SCENE --data_dir D --result_dir R [--adam deferred] [--state compact]

Dense Adam visits every Gaussian at each step, although all but those in view have a gradient of zero. With --adam
deferred a step culls first, reads and writes the rows in view alone, and there are no gradients of others; what a row
has skipped is applied at once, exactly, when it is seen again. The model is the same up to float rounding. With --state
compact as well a Gaussian takes half the memory, rounded at random.

The training loop is `train`; the options of each scene stand at the end of this file, to be edited.
"""

from dataclasses import dataclass
from typing import Literal

import startup  # noqa: F401, before torch is imported
from configs import Config, StateOptions, scenes
from offload.models.deferred import DeferredGaussians
from offload.models.device import DeviceGaussians
from rendering.losses import photometric_loss
from training.command_line import main
from training.depth_loss import with_depth_loss
from training.run import TrainingRun
from training.views import render


@dataclass
class DeviceOptions(StateOptions):
    """Choose which rows Adam visits, and the form they have."""

    adam: Literal["dense", "deferred"] = "dense"
    """Whether each step visits every Gaussian, or those in view alone: a quarter less memory, and the same model."""


@dataclass
class DeviceConfig(DeviceOptions, Config):
    """Train a 3D Gaussian Splatting model of a COLMAP scene, all of it on the device."""


def train(run: TrainingRun[DeviceConfig]) -> None:
    """Train on the scene of a run, or evaluate its --ckpt.

    Raises:
        InputError: The input cannot be used; nothing has been trained.
        TrainingStopped: Training cannot go on; a checkpoint has been saved.
    """
    cfg = run.cfg
    deferred = cfg.adam == "deferred"
    gaussians: DeferredGaussians | DeviceGaussians
    if deferred:
        gaussians = DeferredGaussians(run.initial_gaussians(), run.adam, device=run.device, state=cfg.state)
    else:
        gaussians = DeviceGaussians(run.initial_gaussians(), run.adam, device=run.device)
    strategy = run.new_strategy()

    for step, view in run.steps(gaussians, strategy):
        # All Gaussians are on the device; the rasterizer finds those in view, or culling has where Adam is deferred.
        rows = gaussians.fetch(view.cameras, run.sh_degree)
        strays = strategy.strays(step, gaussians, gaussians.ids, rows) if deferred else None
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
        if run.upcoming is not None:
            gaussians.prefetch(run.upcoming.cameras, strays)  # culled behind the backward pass where Adam is deferred
        run.mark("backward")

        # Dense Adam visits every Gaussian; outside the rows that were drawn all gradients are zero.
        ids = gaussians.ids if deferred else None  # None: all were given to the rasterizer
        strategy.before_update(step, rows, info, gaussians, ids)
        gaussians.update(info["gaussian_ids"])
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
    DeviceConfig,
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
