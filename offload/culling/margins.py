"""How far Adam can move geometry, which culling ahead of its steps must allow for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from offload.adam.deferral import largest_step
from offload.adam.options import AdamOptions
from offload.culling.bounds import Drift
from offload.culling.cameras import Margin
from offload.store.layout import group_columns

_ROUNDING = 1.01  # what float32 arithmetic adds to the exact bounds
# What rounding at random adds to m / sqrt(v) at most, where both are bfloat16: m up, and v down, by a last bit.
_ROUNDED_RATIO = (1 + 2**-7) / math.sqrt(1 - 2**-7)


def largest_rounded_step(betas: tuple[float, float]) -> float:
    """Bound the change by one Adam step as `largest_step` does, where moments are rounded to bfloat16 after each.

    If |m| / sqrt(v) is at most R before they are rounded, it is at most k R after it, and by Cauchy-Schwarz at most
    sqrt((b1 k R)^2 / b2 + (1 - b1)^2 / (1 - b2)) after the next step. So R is where both are the same, if it is
    anywhere; the bound holds for what is stored, k R, as well.
    """
    b1, b2 = betas
    kept = (b1 * _ROUNDED_RATIO) ** 2 / b2
    return _ROUNDED_RATIO * (1 - b1) / math.sqrt((1 - b2) * (1 - kept)) if kept < 1 else math.inf


def largest_drift(betas: tuple[float, float], step: float) -> float:
    """Bound the change of a parameter by all steps without gradient that follow one, in the same units.

    Args:
        betas: Adam's decay rates.
        step: The bound of one step.
    """
    b1, b2 = betas
    ratio = b1 / math.sqrt(b2)
    return step * ratio / (1 - ratio)


def largest_correction(betas: tuple[float, float], step: int) -> float:
    """Bound the factor sqrt(1 - b2^t) / (1 - b1^t) by which bias correction changes the steps t = 1 to `step`.

    It falls first, from 0.32 at the usual betas, and then rises to 1: its logarithm's derivative by t is
    d2 / (exp(d2 t) - 1) / 2 - d1 / (exp(d1 t) - 1), with di = -ln(bi), whose first term outgrows the second once.
    """
    b1, b2 = betas
    return max(math.sqrt(1 - b2**t) / (1 - b1**t) for t in (1, max(step, 1)))


def margin_of(change: float, learning_rates: Mapping[str, float]) -> Margin:
    """Return how far geometry moves at most.

    Args:
        change: Bound for any parameter, in units of its learning rate.
        learning_rates: Of means, scales, quats and opacities, at their largest.
    """
    names = group_columns("geometry", sh_degree=0)
    return Margin(**{name: _ROUNDING * change * learning_rates[name] for name in names})


def drift_after(adam: AdamOptions, steps_done: int) -> Drift:
    """Return how far means drift by the steps that rows skip, where the last one that they did not was the next.

    Learning rates never grow (`AdamOptions`), and moments are bfloat16.

    Args:
        adam: How geometry is updated.
        steps_done: Steps of Adam before that one, or fewer.
    """
    return Drift(drift_per_ratio(adam, steps_done), largest_rounded_step(adam.betas))


def drift_per_ratio(adam: AdamOptions, steps_done: int) -> float:
    """Return `Drift.per_ratio` of what `drift_after` says."""
    return _ROUNDING * largest_drift(adam.betas, 1.0) * adam.means_lr(steps_done)


def margin_ahead(
    adam: AdamOptions, steps_done: int, *, lagging: bool, rounded: bool = False, know_drifts: bool = False
) -> Margin:
    """Return how far geometry may be from what culling reads when the step after the present one renders it.

    Args:
        adam: How geometry is updated.
        steps_done: Steps of Adam before the present one.
        lagging: Whether what culling reads lacks the steps that rows have skipped.
        rounded: Whether the moments of geometry are bfloat16.
        know_drifts: Whether what culls knows how far the means of its rows lag behind at most (`drift_after`).
    """
    step = largest_rounded_step(adam.betas) if rounded else largest_step(adam.betas)
    drift, correction = largest_drift(adam.betas, step), largest_correction(adam.betas, steps_done + 1)
    margin = margin_of((step + (drift if lagging else 0.0)) * correction, adam.learning_rates)
    if lagging and know_drifts:
        own = margin_of(step * correction, adam.learning_rates)
        margin = replace(margin, means=own.means, drift_correction=correction)
    return replace(margin, means=margin.means + adam.displacement)
