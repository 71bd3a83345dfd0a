"""How Adam is to update Gaussians: the one thing that every model of them is given beside its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class AdamOptions:
    """Hold the learning rates, decay rates and epsilon of Adam for the six parameters of Gaussians.

    Args:
        learning_rates: The rate of each parameter by name at step 0. All but that of the means are constant.
        means_lr: Gives the means' learning rate at a step, counted from 0. It never grows: culling ahead relies on it.
        betas: The decay rates of the first and second moment.
        eps: What is added to the root of the second moment.
        displacement: How far `displace` may move means so that culling ahead finds what is drawn, in world units.
    """

    learning_rates: Mapping[str, float]
    means_lr: Callable[[int], float]
    betas: tuple[float, float]
    eps: float = 1e-15
    displacement: float = 0.0
