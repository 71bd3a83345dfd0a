"""What a device does with rows of geometry that lie in its own memory, in plain torch.

`offload/adam/geometry_triton.py` has the same functions as CUDA kernels, but for `catch_up_rows`, which no step needs.
The mathematics of skipped steps is explained in `offload/adam/deferral.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from offload.adam.deferral import DeferralTables, StepSizes, adam_step, caught_up, decayed
from offload.store.layout import group_columns

COLUMNS = group_columns("geometry", sh_degree=0)  # of each parameter in the optimizer's tables


@dataclass
class GeometryState:
    """Geometry and its Adam moments as they were after each row's last update."""

    parameters: dict[str, Tensor]  # means [N, 3], scales [N, 3] (log), quats [N, 4], opacities [N] (logit)
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    last_step: Tensor  # [N] int32, the step of that update

    def flat_rows(self, name: str, ids: Tensor) -> list[Tensor]:
        """Copy the rows of a parameter and its moments, each [M, width]."""
        return [flat(array[name][ids]) for array in (self.parameters, self.exp_avg, self.exp_avg_sq)]

    def put_rows(self, name: str, ids: Tensor, *values: Tensor) -> None:
        """Put back what `flat_rows` has copied."""
        for array, rows in zip((self.parameters, self.exp_avg, self.exp_avg_sq), values, strict=True):
            array[name][ids] = rows.view(len(ids), *array[name].shape[1:])


def gather_rows(state: GeometryState, ids: Tensor, tables: DeferralTables) -> dict[str, Tensor]:
    """Copy the parameters of rows as they are after step `tables.step`.

    Args:
        state: Of N rows.
        ids: [V] int64, which of them.
        tables: Of the skipped steps.
    """
    last_step = state.last_step[ids]
    values = {}
    for name, columns in COLUMNS.items():
        w, m, v = state.flat_rows(name, ids)
        shape = len(ids), *state.parameters[name].shape[1:]
        values[name] = caught_up(w, m, v, last_step, tables, columns).view(shape)
    return values


def step_rows(
    state: GeometryState, ids: Tensor, gradients: Mapping[str, Tensor], tables: DeferralTables, step: StepSizes
) -> None:
    """Apply all steps that rows have skipped, and then step `tables.step` + 1 of Adam, in place.

    Args:
        state: Of N rows.
        ids: [V] int64, the rows that have a gradient, each once.
        gradients: Of their parameters, as `gather_rows` gives those.
        tables: Of the skipped steps; the new one has not begun yet.
        step: Of the new one.
    """
    last_step = state.last_step[ids]
    for name, columns in COLUMNS.items():
        w, m, v = state.flat_rows(name, ids)
        w = caught_up(w, m, v, last_step, tables, columns)
        m, v = decayed(m, v, tables.step - last_step, tables)
        adam_step(w, m, v, flat(gradients[name]), step.sizes[columns], step)
        state.put_rows(name, ids, w, m, v)
    state.last_step[ids] = tables.step + 1


def catch_up_rows(state: GeometryState, ids: Tensor, tables: DeferralTables) -> None:
    """Bring rows [M], each of them once, to step `tables.step`."""
    last_step = state.last_step[ids]
    for name, columns in COLUMNS.items():
        w, m, v = state.flat_rows(name, ids)
        state.put_rows(
            name, ids, caught_up(w, m, v, last_step, tables, columns), *decayed(m, v, tables.step - last_step, tables)
        )
    state.last_step[ids] = tables.step


def flat(values: Tensor) -> Tensor:
    """Return [M, width] of [M, ...]."""
    return values.reshape(len(values), math.prod(values.shape[1:]))
