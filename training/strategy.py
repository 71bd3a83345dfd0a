"""Which strategy the options choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

from configs import Config, DensificationRules
from distributed.mesh import Ranks
from strategies.contract import Strategy
from strategies.default import DefaultStrategy
from strategies.mcmc import MCMCStrategy
from training import schedules

# Rules that mcmc makes no use of. A scene of a script may have its own, so that they are named and not refused.
ONLY_OF_DEFAULT = frozenset(
    (
        *("grow_grad2d", "grow_scale3d", "grow_scale2d", "prune_scale3d", "prune_scale2d", "refine_scale2d_stop_iter"),
        *("reset_every", "pause_refine_after_reset", "absgrad", "revised_opacity"),
    )
)


ONLY_OF = {"mcmc": frozenset({"noise_lr"}), "default": ONLY_OF_DEFAULT | {"target_gaussians"}}


def has_effect(name: str, strategy: str) -> bool:
    """Return whether a strategy makes use of an option."""
    return not any(name in names for other, names in ONLY_OF.items() if other != strategy)


def unused_rules(cfg: DensificationRules) -> str:
    """Return a sentence that names the rules which are set and which the strategy makes no use of; empty for none."""
    if cfg.strategy == "default":
        return ""
    unused = [
        f"--{item.name}"
        for item in fields(DensificationRules)
        if item.name in ONLY_OF_DEFAULT and getattr(cfg, item.name) != item.default
    ]
    named = ", ".join(unused)
    return f"--strategy mcmc makes no use of {named}: such rules are of --strategy default." if unused else ""


def ends_of_growth(cfg: Config) -> str:
    """Name the option that ends growth, the earlier of both; both where they are equal."""
    end = min(cfg.max_steps, cfg.refine_stop_iter)
    return named([name for name in ("max_steps", "refine_stop_iter") if getattr(cfg, name) == end])


def named(names: Sequence[str]) -> str:
    """Return options as a part of a sentence."""
    return " and ".join(f"--{name}" for name in names)


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
    return DefaultStrategy(rules, scene_scale, cfg.seed, ranks, ends_of_growth(cfg))
