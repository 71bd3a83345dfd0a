"""Host offloading for fast links: appearance, or everything, lives in host memory, and the device itself updates it.

    python simple_trainer_hybrid_streamed.py SCENE --data_dir D --result_dir R [--state compact] [--geometry host]

The rows that a view needs are read by the device from pinned host memory, moments and all, while the view before is
rendered; steps that they have skipped are caught up on the way. After the backward pass the device applies Adam, hands
rows that the next view needs too on to it, and writes the others back while that is rendered. With --geometry host
moments stay on the host, where the device updates them after the backward pass, and a view's parameters alone are on
the device: its memory then depends on the largest views, and not on the number of Gaussians. The CPU moves no row. The
model is that of simple_trainer.py up to float rounding.

The training loop is `train`; the options of each scene stand at the end of this file, to be edited.
"""

from dataclasses import dataclass
from typing import Literal

from tqdm import tqdm

import startup  # noqa: F401, before torch is imported
from configs import Config, HostOptions, StateOptions, scenes
from offload.models.streamed import StreamedGaussians
from rendering.losses import photometric_loss
from training.command_line import main
from training.depth_loss import with_depth_loss
from training.run import TrainingRun
from training.views import render


@dataclass
class StreamedOptions(StateOptions, HostOptions):
    """Choose what lies in host memory, and how."""

    moments: Literal["float32", "bfloat16"] = "float32"
    """Precision of the appearance's moments; bfloat16, rounded at random, is a third less to move."""
    resident_share: float = 0.0
    """With --state compact: share of all Gaussians that stay on the GPU, those that views show most often; with 1 all
    are there alone, until they have grown too many."""


@dataclass
class StreamedConfig(StreamedOptions, Config):
    """Train a 3D Gaussian Splatting model of a COLMAP scene, in host memory, updated by the GPU."""


def train(run: TrainingRun[StreamedConfig]) -> None:
    """Train on the scene of a run, or evaluate its --ckpt.

    Raises:
        InputError: The input cannot be used; nothing has been trained.
        TrainingStopped: Training cannot go on; a checkpoint has been saved.
    """
    cfg = run.cfg
    gaussians = StreamedGaussians(
        run.initial_gaussians(),
        run.adam,
        device=run.device,
        geometry=cfg.geometry,
        moments=cfg.moments,
        state=cfg.state,
        max_gaussians=cfg.most_gaussians,
        resident_share=cfg.resident_share,
        tell=tqdm.write,
    )
    strategy = run.new_strategy()

    for step, view in run.steps(gaussians, strategy):
        # The rows of this view are on the device already, but for the first one and after densification.
        rows = gaussians.fetch(view.cameras, run.sh_degree)
        run.mark("fetch")

        # Behind the rendering the next view's rows come from the host, and those of the last one go there.
        if run.upcoming is not None:
            gaussians.prefetch(run.upcoming.cameras, strategy.strays(step, gaussians, gaussians.ids, rows))
        run.mark("cull")

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

        # Adam by the device; rows that the next view needs too stay there, the others are written to the host.
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
    StreamedConfig,
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
