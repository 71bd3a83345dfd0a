"""The state of N Gaussians and their optimizer by name, as one trainer leaves it and any other continues from it.

    step_count                      []         int64, steps of Adam so far
    parameters/NAME                 [N, ...]   float32, of means, scales, quats, opacities, sh0 and shN
    exp_avg/NAME, exp_avg_sq/NAME   [N, ...]   Adam's moments, float32; or bfloat16, where a trainer keeps them so

A trainer that defers steps adds, for each group of parameters ("geometry", "appearance") that it defers,

    last_step/GROUP                 [N]        int32, the step of each row's last update
    deferral/GROUP/...              small      the tables (`DeferralTables.tables`), with which the rows are caught up

and rows of such a group stand as they were after their last update. Without these a group's rows are current.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from offload.adam.deferral import DeferralTables
from offload.adam.host import DeferredAdam
from offload.store.layout import GROUP_NAMES, RowState, group_columns, num_columns

State = Mapping[str, Tensor]


class DeferredPlace(Protocol):
    """Holds rows of one group and the step of each one's last update."""

    @property
    def last_step(self) -> Tensor: ...

    def arrays_by_name(self) -> dict[str, Tensor]: ...


ARRAYS = ("parameters", "exp_avg", "exp_avg_sq")
MOST_MEMORY = 0.999  # of b1 / sqrt(b2): the tables that follow a step are some 30,000 steps long then
BLOCK_ROWS = 1 << 18  # rows that are copied at once


def sh_degree_of(state: State) -> int:
    """Return the degree of the spherical harmonics."""
    return round((state["parameters/shN"].shape[1] + 1) ** 0.5) - 1


def is_deferred(state: State, group: str) -> bool:
    """Tell whether rows of a group may lag behind."""
    return f"last_step/{group}" in state


def check_state(state: State) -> None:
    """Refuse a state that could not be used, such as one from a file of unknown origin.

    Raises:
        ValueError, KeyError: Something is missing or does not fit the rest.
    """
    num_gaussians, degree = len(state["parameters/means"]), sh_degree_of(state)
    for group in GROUP_NAMES:
        if not is_deferred(state, group):
            continue
        tables, last_step = deferral_tables(state, group), state[f"last_step/{group}"]
        b1, b2 = tables["betas"].tolist()
        if not (0 <= b1 < MOST_MEMORY * b2**0.5 < 1):
            raise ValueError("betas")
        if tables["multipliers"].ndim != 2 or tables["multipliers"].shape[1] != num_columns(group, degree):
            raise ValueError("multipliers")
        DeferredAdam.from_tables(tables)
        if last_step.shape != (num_gaussians,) or last_step.dtype != torch.int32:
            raise ValueError("last_step")
        if int(last_step.min()) < 0 or int(last_step.max()) > int(state["step_count"]):
            raise ValueError("last_step")
    ids = state.get("upcoming/ids", torch.zeros(0, dtype=torch.int64))
    if ids.dtype != torch.int64 or ids.ndim != 1 or bool((ids[1:] <= ids[:-1]).any()):
        raise ValueError("upcoming/ids")
    if len(ids) > 0 and (int(ids[0]) < 0 or int(ids[-1]) >= num_gaussians):
        raise ValueError("upcoming/ids")
    if "upcoming/tiles" in state:
        rows, counts = state["upcoming/rows"], state["upcoming/counts"]
        if rows.dtype != torch.int64 or counts.dtype != torch.int64 or state["upcoming/tiles"].shape[1:] != (5,):
            raise ValueError("upcoming/tiles")
        if int(counts.sum()) != len(rows) or (len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(ids)):
            raise ValueError("upcoming/rows")


def current_values(state: State) -> dict[str, Tensor]:
    """Return the six parameters [N, ...] with all steps applied; those that never lag behind are not copied."""
    values = {}
    for group in GROUP_NAMES:
        for name in group_columns(group, sh_degree_of(state)):
            values[name] = state[f"parameters/{name}"]
            if is_deferred(state, group):
                values[name] = torch.empty_like(values[name])
                for rows, block in current_rows(state, name):
                    values[name][rows] = block["parameters"]
    return values


def current_rows(state: State, name: str) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    """Give a parameter and its moments with all steps applied, block by block.

    Args:
        state: It stands after `step_count` steps.
        name: The parameter.

    Yields:
        Which rows, and of each of `ARRAYS` the values [M, ...]; copies where steps were deferred.
    """
    group, columns = _place_of(state, name)
    adam = None
    if is_deferred(state, group):
        adam = DeferredAdam.from_tables(deferral_tables(state, group), columns)
    for first in range(0, len(state[f"parameters/{name}"]), BLOCK_ROWS):
        rows = slice(first, first + BLOCK_ROWS)
        block = {array: state[f"{array}/{name}"][rows] for array in ARRAYS}
        if adam is not None:
            block = {array: torch.empty(value.shape).copy_(value) for array, value in block.items()}  # float32
            parameters, *moments = (value.view(len(value), -1) for value in block.values())
            last_step = state[f"last_step/{group}"][rows].clone()
            stale = (last_step < adam.step).nonzero().squeeze(1)
            adam.commit(RowState(parameters, tuple(moments)), last_step, stale, None)
        yield rows, block


def deferral_tables(state: State, group: str) -> dict[str, Tensor]:
    """Pick out the tables that a trainer has added for a group that it defers."""
    prefix = f"deferral/{group}/"
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def copy_blocks(target: Tensor, source: Tensor) -> None:
    """Copy rows in blocks, so that what lies between a file and a device stays small."""
    for first in range(0, len(target), BLOCK_ROWS):
        rows = slice(first, first + BLOCK_ROWS)
        target[rows] = source[rows].to(target.device)


def copy_current(targets: Mapping[str, Tensor], state: State) -> None:
    """Copy parameters and moments with all steps applied.

    Args:
        targets: Where they go, under the names of the state.
        state: Where they come from.
    """
    for name in {key.partition("/")[2] for key in targets}:
        for rows, block in current_rows(state, name):
            for array, values in block.items():
                target = targets[f"{array}/{name}"]
                target[rows] = values.to(target.device)


def load_deferred(place: DeferredPlace, group: str, adam: DeferralTables, state: State) -> None:
    """Fill what holds one group, whose steps are deferred.

    Where the same optimizer goes on, rows may keep lagging behind; else they are caught up with the tables that they
    were trained with.
    """
    stored, tables = place.arrays_by_name(), deferral_tables(state, group)
    if is_deferred(state, group) and adam.matches(tables):
        for key, rows in stored.items():
            copy_blocks(rows, state[key])
        place.last_step.copy_(state[f"last_step/{group}"])
        adam.load_state(tables)
    else:
        copy_current(stored, state)
        place.last_step.fill_(int(state["step_count"]))
        adam.load_state({"step_count": state["step_count"]})


def _place_of(state: State, name: str) -> tuple[str, slice]:
    for group in GROUP_NAMES:
        columns = group_columns(group, sh_degree_of(state))
        if name in columns:
            return group, columns[name]
    raise KeyError(name)
