"""Learning rates of a group's columns, as DeferredAdam takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from offload.store import Group


def schedules_of(
    group: Group, learning_rates: Mapping[str, float], means_lr: Callable[[int], float]
) -> tuple[Tensor, Callable[[int], list[float]]]:
    """Multipliers [schedules, columns] of a group, and the schedules' learning rates at a step from 1.

    Args:
        group: Of a host store.
        learning_rates: Of each parameter; all but that of the means are constant.
        means_lr: The means' learning rate at a step from 0.
    """
    constant = torch.zeros(group.num_columns)  # [columns]
    for parameter, columns in group.columns.items():
        constant[columns] = learning_rates[parameter]
    if "means" not in group.columns:
        return constant[None], lambda step: [1.0]
    decaying = torch.zeros_like(constant)
    decaying[group.columns["means"]] = 1.0
    constant[group.columns["means"]] = 0.0
    return torch.stack([constant, decaying]), lambda step: [1.0, means_lr(step - 1)]
