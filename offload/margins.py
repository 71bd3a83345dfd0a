"""How far Adam can move geometry, which culling ahead of its steps must allow for."""

from __future__ import annotations

import math
from collections.abc import Mapping

from offload.culling import Margin
from offload.device_geometry import GEOMETRY

_ROUNDING = 1.01  # what float32 arithmetic adds to the exact bounds


def largest_step(betas: tuple[float, float]) -> float:
    """Largest change of a parameter by one Adam step, in units of the learning rate.

    By Cauchy-Schwarz on the sums of gradients in both moments:
    |m| / sqrt(v) <= (1 - b1) / sqrt(1 - b2) / sqrt(1 - b1^2 / b2).
    """
    b1, b2 = betas
    return (1 - b1) / math.sqrt((1 - b2) * (1 - b1**2 / b2))


def largest_drift(betas: tuple[float, float]) -> float:
    """Largest change of a parameter by all steps without gradient that follow one, in units of the learning rate."""
    b1, b2 = betas
    ratio = b1 / math.sqrt(b2)
    return largest_step(betas) * ratio / (1 - ratio)


def margin_of(change: float, learning_rates: Mapping[str, float]) -> Margin:
    """What geometry moves at most.

    Args:
        change: Of any parameter, in units of its learning rate.
        learning_rates: Of means, scales, quats and opacities, at their largest.
    """
    return Margin(**{name: _ROUNDING * change * learning_rates[name] for name in GEOMETRY})
