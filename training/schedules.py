"""What changes over the steps or follows from the batch size."""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np

from configs import Config
from offload.adam.options import AdamOptions

SCALE_MARGIN = 1.1  # gsplat's, on the extent of the cameras: lengths in training are shares of the product
# Noise that culling ahead allows for, as a share of the scene scale: eight of Adam's largest first steps of means.
NOISE_MARGIN = 0.01
POSES_REST = 0.25  # share of the steps, at first, in which poses stay as they are given


def is_due(cfg: Config, steps_done: int, at: Collection[int]) -> bool:
    """Tell whether what belongs to certain steps, and to the last, is due.

    Args:
        cfg: Says how many steps there are.
        steps_done: So far.
        at: These steps, such as `cfg.eval_steps`.
    """
    return steps_done in at or steps_done >= cfg.max_steps


def adam_options(cfg: Config, scene_scale: float) -> AdamOptions:
    """Return how Adam updates the Gaussians of a run.

    Args:
        cfg: Options.
        scene_scale: Extent of the cameras in world units.
    """
    return AdamOptions(
        learning_rates(cfg, scene_scale),
        lambda step: means_lr(cfg, scene_scale, step),
        adam_betas(cfg.batch_size),
        displacement=noise_margin(scene_scale) if cfg.strategy == "mcmc" else 0.0,
    )


def noise_margin(scene_scale: float) -> float:
    """Return how far culling ahead lets noise move any coordinate of a mean, in world units as the scene scale."""
    return NOISE_MARGIN * scene_scale


def learning_rates(cfg: Config, scene_scale: float) -> dict[str, float]:
    """Return Adam's learning rate of each parameter tensor at step 0.

    They grow with the square root of the batch size (Grendel, arXiv 2406.18533, section 4.2).

    Args:
        cfg: Options.
        scene_scale: Extent of the cameras in world units.
    """
    per_view = {
        "means": cfg.position_lr * scene_scale,
        "scales": cfg.scaling_lr,
        "quats": cfg.quats_lr,
        "opacities": cfg.opacities_lr,
        "sh0": cfg.sh0_lr,
        "shN": cfg.shN_lr,
    }
    return {name: rate * math.sqrt(cfg.batch_size) for name, rate in per_view.items()}


def adam_betas(batch_size: int) -> tuple[float, float]:
    """Return Adam's decay rates, so that a batch forgets as much as its views one by one would (Grendel)."""
    return 0.9**batch_size, 0.999**batch_size


def means_lr(cfg: Config, scene_scale: float, step: int) -> float:
    """Return the learning rate of the means at a step from 0: exponential decay to 1 % at max_steps."""
    return learning_rates(cfg, scene_scale)["means"] * decay(cfg, step)


def decay(cfg: Config, step: int) -> float:
    """Return by which factor learning rates that decay have done so at a step from 0: to 1 % at max_steps."""
    return 0.01 ** (step / cfg.max_steps)


def pose_decay(cfg: Config, step: int) -> float:
    """Return by which factor the learning rate of poses has changed at a step from 0.

    It is 0 at first, while the Gaussians are too blurred to say where a camera stands, and then decays to 1 % at
    max_steps.
    """
    done = (step / cfg.max_steps - POSES_REST) / (1 - POSES_REST)
    return 0.01**done if done >= 0 else 0.0


def means_lr_of_steps(cfg: Config, scene_scale: float) -> np.ndarray:
    """Return the learning rate of the means at each step of a run, float64 [max_steps]."""
    return learning_rates(cfg, scene_scale)["means"] * 0.01 ** (np.arange(cfg.max_steps) / cfg.max_steps)


def sh_degree(cfg: Config, step: int) -> int:
    """Return the degree of the spherical harmonics used at a step from 0."""
    return min(step // cfg.sh_degree_interval, cfg.sh_degree)
