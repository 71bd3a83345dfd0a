"""Which strategy the options choose."""

from __future__ import annotations

from dataclasses import replace

from configs import Config
from distributed.mesh import Ranks
from strategies.contract import Strategy
from strategies.default import DefaultStrategy
from strategies.mcmc import MCMCStrategy
from training import schedules


def strategy_of(cfg: Config, scene_scale: float, ranks: Ranks | None = None) -> Strategy:
    """Return the strategy that the options choose, as it is before the first step.

    Args:
        cfg: The options.
        scene_scale: Extent of the cameras in world units.
        ranks: That train together; None: there is this process only.
    """
    if cfg.strategy == "mcmc":
        views = cfg.batch_size * (1 if ranks is None else ranks.size)
        means_lr = schedules.means_lr_of_steps(replace(cfg, batch_size=views), scene_scale)
        return MCMCStrategy(cfg, means_lr, cfg.seed, schedules.noise_margin(scene_scale), ranks)
    # A target counts the refinements that are still to come: none comes after the last step.
    rules = replace(cfg, refine_stop_iter=min(cfg.refine_stop_iter, cfg.max_steps))
    return DefaultStrategy(rules, scene_scale, cfg.seed, ranks)
