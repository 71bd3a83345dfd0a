"""Learning rates of a group's columns, as DeferredAdam takes them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from offload.adam.options import AdamOptions
from offload.store.layout import StateFormat, group_columns, num_columns


def schedules_of(
    group: str, sh_degree: int, adam: AdamOptions, state: StateFormat = "float32"
) -> tuple[Tensor, Callable[[int], list[float]]]:
    """Return multipliers [schedules, columns] of a group, and the schedules' learning rates at a step from 1.

    Args:
        group: "geometry" or "appearance".
        sh_degree: Degree of the spherical harmonics.
        adam: The learning rates.
        state: The form of rows.
    """
    columns = group_columns(group, sh_degree, state)
    constant = torch.zeros(num_columns(group, sh_degree, state))  # [columns]
    for parameter, places in columns.items():
        constant[places] = adam.learning_rates[parameter]
    if "means" not in columns:
        return constant[None], lambda step: [1.0]
    decaying = torch.zeros_like(constant)
    decaying[columns["means"]] = 1.0
    constant[columns["means"]] = 0.0
    return torch.stack([constant, decaying]), lambda step: [1.0, adam.means_lr(step - 1)]
