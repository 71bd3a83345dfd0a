"""Whether growth can come to the number of Gaussians that was asked for, and what to change where it cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from configs import Config
from errors import counted
from training.checkpoints import MAX_STEPS
from training.strategy import ends_of_growth, named, strategy_of

ENDS = (("max_steps",), ("refine_stop_iter",), ("max_steps", "refine_stop_iter"))  # each way to let growth go on
LOWERED = {"refine_every": 1, "refine_start_iter": 0, "pause_refine_after_reset": 0}  # to where most is refined


@dataclass(frozen=True)
class Shortfall:
    """Hold where growth ends that cannot come to what was asked for, and as parts of a sentence why, and what helps."""

    reached: int
    cause: str
    remedy: str


def shortfall(cfg: Config, steps_done: int, num_gaussians: int, wanted: int) -> Shortfall | None:
    """Return what growth lacks that cannot come to a number of Gaussians; None where it can.

    Args:
        cfg: The options, with `steps_scaler` applied.
        steps_done: So far.
        num_gaussians: That there are after them, at all ranks.
        wanted: How many there are to be.
    """

    def end(**changes: Any) -> int:
        strategy = strategy_of(replace(cfg, **changes), scene_scale=1.0)  # whose heading is the same in any scale
        return strategy.heading(steps_done - 1, num_gaussians) or num_gaussians

    reached = end()
    if reached >= wanted:
        return None
    return Shortfall(reached, _cause(cfg, end, num_gaussians), _remedy(end, wanted))


def _cause(cfg: Config, end: Callable[..., int], num_gaussians: int) -> str:
    reached = end()
    if reached > num_gaussians and cfg.strategy == "mcmc":
        return "a refinement adds 5 %"
    if reached > num_gaussians:
        return "a refinement at most doubles them"
    if end(**_far(ENDS[-1]), **LOWERED) == num_gaussians:
        return f"5 % of {counted(num_gaussians, 'Gaussian')} is less than one"
    if end(pause_refine_after_reset=0) > num_gaussians:
        return f"--pause_refine_after_reset {cfg.pause_refine_after_reset:,} leaves no refinement"
    return f"no refinement comes before {ends_of_growth(cfg)}"


def _remedy(end: Callable[..., int], wanted: int) -> str:
    """Return the changes each of which leads to what is wanted by itself, where any does."""
    raised = [names for names in ENDS if end(**_far(names)) >= wanted][:1]
    lowered = [name for name, least in LOWERED.items() if end(**{name: least}) >= wanted]
    ways = [f"raise {named(names)}" for names in raised]
    if lowered:
        ways.append("lower " + " or ".join(f"--{name}" for name in lowered))
    if ways:
        return ", or ".join(ways)
    if end(**_far(ENDS[-1]), pause_refine_after_reset=0) >= wanted:
        return f"raise {named(ENDS[-1])}, and lower --pause_refine_after_reset"
    return "begin with more points, or take --strategy default"


def _far(names: tuple[str, ...]) -> dict[str, int]:
    """Return these options with the most steps that any run has."""
    return dict.fromkeys(names, MAX_STEPS)
