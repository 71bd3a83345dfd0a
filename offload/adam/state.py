"""The state of N Gaussians and their optimizer by name, as one trainer leaves it and any other continues from it.

    step_count                      []         int64, steps of Adam so far
    parameters/NAME                 [N, ...]   float32, of means, scales, quats, opacities, sh0 and shN
    exp_avg/NAME, exp_avg_sq/NAME   [N, ...]   Adam's moments, float32; or bfloat16, where a trainer keeps them so

A trainer that defers steps adds, for each group of parameters ("geometry", "appearance") that it defers,

    last_step/GROUP                 [N]        int32, the step of each row's last update
    deferral/GROUP/...              small      the tables (`DeferralTables.tables`), with which the rows are caught up

and rows of such a group stand as they were after their last update. Without these a group's rows are current.

Readers ask of what has N rows for its shape, its dtype and slices of rows only, so that it may lie in several files.

A compact state has, in place of parameters and moments, the rows of its groups as they are stored, all deferred:

    packed/GROUP                    [N, words] int32, as `offload.store.layout.packed_rows`; geometry may be tight
    packed/sh_degree                []         int64
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol, cast

import torch
from torch import Tensor

from offload.adam.bfloat16 import random_bits
from offload.adam.deferral import DeferralTables, LearningRates, largest_step
from offload.adam.host import DeferredAdam
from offload.adam.rows import float_moments, store_moments
from offload.store.layout import (
    GROUP_NAMES,
    RowLayout,
    RowState,
    StateFormat,
    group_columns,
    group_shapes,
    num_columns,
    packed_rows,
    with_words,
)

State = Mapping[str, Tensor]


class DeferredPlace(Protocol):
    """Holds rows of one group and the step of each one's last update."""

    @property
    def last_step(self) -> Tensor: ...

    def arrays_by_name(self) -> dict[str, Tensor]: ...


class PackedPlace(DeferredPlace, Protocol):
    """Holds rows of one group, and may be compact."""

    @property
    def layout(self) -> RowLayout: ...

    @property
    def rows(self) -> RowState: ...


ARRAYS = ("parameters", "exp_avg", "exp_avg_sq")
PACKED_GEOMETRY = "packed/geometry"  # the name of rows that are tight, or not
MOST_MEMORY = 0.999  # of b1 / sqrt(b2): the tables that follow a step are some 30,000 steps long then
BLOCK_ROWS = 1 << 18  # rows that are copied at once


def format_of(state: Mapping[str, object]) -> StateFormat:
    """Return the form of its rows, as the names of its tensors tell it."""
    return "compact" if PACKED_GEOMETRY in state else "float32"


def num_gaussians_of(state: State) -> int:
    """Return N."""
    return len(state[PACKED_GEOMETRY if format_of(state) == "compact" else "parameters/means"])


def sh_degree_of(state: State) -> int:
    """Return the degree of the spherical harmonics."""
    if format_of(state) == "compact":
        return int(state["packed/sh_degree"])
    return round((state["parameters/shN"].shape[1] + 1) ** 0.5) - 1


def names_of_rows(state: State) -> list[str]:
    """Return the names of the tensors that have a row of each Gaussian."""
    packed = [f"packed/{group}" for group in GROUP_NAMES]
    return [name for name in state if name in packed or name.partition("/")[0] in (*ARRAYS, "last_step")]


def stored_values(state: State, name: str) -> Tensor:
    """Return a parameter [N, ...] as it is stored: before the steps that rows have skipped; not copied."""
    if format_of(state) == "float32":
        return state[f"parameters/{name}"][:]
    group, _ = _place_of(state, name)
    rows = packed_rows(state[f"packed/{group}"][:], group)
    return RowLayout.of(group, sh_degree_of(state), "compact").named(rows.parameters)[name]


def is_deferred(state: State, group: str) -> bool:
    """Tell whether rows of a group may lag behind."""
    return f"last_step/{group}" in state


def check_state(state: State) -> None:
    """Refuse a state that could not be used, such as one from a file of unknown origin.

    Raises:
        ValueError, KeyError: Something is missing or does not fit the rest.
    """
    num_gaussians, degree, its_format = num_gaussians_of(state), sh_degree_of(state), format_of(state)
    for group in GROUP_NAMES:
        if not is_deferred(state, group):
            if its_format == "compact":
                raise ValueError("last_step")
            continue
        tables, last_step = deferral_tables(state, group), state[f"last_step/{group}"]
        b1, b2 = tables["betas"].tolist()
        if not (0 <= b1 < MOST_MEMORY * b2**0.5 < 1):
            raise ValueError("betas")
        if tables["multipliers"].ndim != 2 or tables["multipliers"].shape[1] != num_columns(group, degree, its_format):
            raise ValueError("multipliers")
        DeferredAdam.from_tables(tables)
        if last_step.shape != (num_gaussians,) or last_step.dtype != torch.int32:
            raise ValueError("last_step")
        if num_gaussians and (int(last_step.min()) < 0 or int(last_step.max()) > int(state["step_count"])):
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
        together = state.get("upcoming/together", torch.ones_like(counts))
        if together.dtype != torch.int64 or len(together) != len(counts) or bool((together < 1).any()):
            raise ValueError("upcoming/together")
        if int(together.sum()) != len(state["upcoming/tiles"]):
            raise ValueError("upcoming/tiles")
        if int(counts.sum()) != len(rows) or (len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(ids)):
            raise ValueError("upcoming/rows")


def current_values(state: State) -> dict[str, Tensor]:
    """Return the six parameters [N, ...] with all steps applied; those that never lag behind are not copied."""
    values = {}
    for name in (name for group in GROUP_NAMES for name in group_shapes(group, sh_degree_of(state))):
        values[name] = stored_values(state, name)
        if is_deferred(state, _place_of(state, name)[0]):
            values[name] = torch.empty(values[name].shape)
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
    values = CurrentValues(state)
    for first in range(0, num_gaussians_of(state), BLOCK_ROWS):
        rows = slice(first, first + BLOCK_ROWS)
        yield rows, values.block(name, rows)


class CurrentValues:
    """Reads rows of a state with all steps applied, wherever they lie."""

    def __init__(self, state: State) -> None:
        """
        Args:
            state: It stands after `step_count` steps.
        """
        self._state = state
        self._adams: dict[str, DeferredAdam] = {}  # by parameter; their tables are made once

    def parameter(self, name: str, rows: slice | Tensor) -> Tensor:
        """Return some rows [M, ...] of a parameter, float32."""
        if not is_deferred(self._state, _place_of(self._state, name)[0]):
            return stored_values(self._state, name)[rows]
        return self.block(name, rows)["parameters"]

    def block(self, name: str, rows: slice | Tensor) -> dict[str, Tensor]:
        """Return some rows [M, ...] of a parameter and its moments, by `ARRAYS`; copies where steps were deferred."""
        block = _float_block(self._state, name, rows)
        group, columns = _place_of(self._state, name)
        if not is_deferred(self._state, group):
            return block
        if name not in self._adams:
            self._adams[name] = DeferredAdam.from_tables(deferral_tables(self._state, group), columns)
        adam = self._adams[name]
        # Not -1 columns, which no rows would leave open; opacities have no axis of them.
        parameters, *moments = (value.view(len(value), value.shape[1:].numel()) for value in block.values())
        last_step = self._state[f"last_step/{group}"][rows].clone()
        stale = (last_step < adam.step).nonzero().squeeze(1)
        adam.commit(RowState(parameters, tuple(moments)), last_step, stale, None)
        return block


def _float_block(state: State, name: str, rows: slice | Tensor) -> dict[str, Tensor]:
    """Return some rows of a parameter and its moments as they are stored; float32 copies where steps were deferred."""
    group, columns = _place_of(state, name)
    if format_of(state) == "float32":
        block = {array: state[f"{array}/{name}"][rows] for array in ARRAYS}
        if is_deferred(state, group):
            block = {array: torch.empty(value.shape).copy_(value) for array, value in block.items()}
        return block
    packed = packed_rows(state[f"packed/{group}"][rows], group)
    reach = largest_step(tuple(deferral_tables(state, group)["betas"].tolist()))
    shape = group_shapes(group, sh_degree_of(state), "compact")[name]
    values = [packed.parameters, *float_moments(packed.moments, reach)]
    return {
        array: torch.empty(len(value), *shape).copy_(value[:, columns].reshape(len(value), *shape))
        for array, value in zip(ARRAYS, values, strict=True)
    }


def deferral_tables(state: State, group: str) -> dict[str, Tensor]:
    """Pick out the tables that a trainer has added for a group that it defers."""
    prefix = f"deferral/{group}/"
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def copy_blocks(target: Tensor, source: Tensor) -> None:
    """Copy rows in blocks, so that what lies between a file and a device stays small; packed ones in either form."""
    for first in range(0, len(target), BLOCK_ROWS):
        rows = slice(first, first + BLOCK_ROWS)
        block = source[rows].to(target.device)
        target[rows] = with_words(block, target.shape[1]) if block.shape[1:] != target.shape[1:] else block


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


def named_tables(group: str, adam: DeferralTables) -> dict[str, Tensor]:
    """Return the tables that rows of a group are caught up with, named as `deferral_tables` finds them in a state."""
    return {f"deferral/{group}/{key}": table for key, table in adam.tables().items()}


def load_deferred(
    place: DeferredPlace, group: str, adam: DeferralTables, learning_rates: LearningRates, state: State
) -> None:
    """Fill what holds one group, whose steps are deferred.

    Where the same optimizer goes on, and its rates have not fallen, rows may keep lagging behind; else they are caught
    up with the tables that they were trained with.

    Args:
        place: What is filled.
        group: Its name.
        adam: Goes on with its steps.
        learning_rates: With these.
        state: Of as many Gaussians as the place has.
    """
    stored, tables = place.arrays_by_name(), deferral_tables(state, group)
    is_the_same = is_deferred(state, group) and adam.matches(tables) and all(key in state for key in stored)
    if is_the_same and adam.rates_have_not_fallen(tables, learning_rates):
        for key, rows in stored.items():
            copy_blocks(rows, state[key])
        copy_blocks(place.last_step, state[f"last_step/{group}"])
        adam.load_state(tables)
        return
    if f"packed/{group}" in stored:
        _pack_current(cast(PackedPlace, place), adam.reach, state)
    else:
        copy_current(stored, state)
    place.last_step.fill_(int(state["step_count"]))
    adam.load_state({"step_count": state["step_count"]})


def _pack_current(place: PackedPlace, reach: float, state: State) -> None:
    """Fill a compact place with parameters and moments with all steps applied."""
    columns = place.layout.num_columns  # of which random bits are counted, whether rows are tight or not
    blocks = {name: current_rows(state, name) for name in place.layout.columns}
    for found in zip(*blocks.values(), strict=True):
        rows, count = found[0][0], len(found[0][1]["parameters"])
        w, m, v = (torch.zeros(count, columns) for _ in ARRAYS)
        for where, (_, block) in zip(place.layout.columns.values(), found, strict=True):
            for values, array in ((w, "parameters"), (m, "exp_avg"), (v, "exp_avg_sq")):
                values[:, where] = block[array].reshape(count, -1)
        stored, first = place.rows[rows], rows.start
        packed = RowState(w, tuple(torch.empty(count, columns, dtype=moment.dtype) for moment in stored.moments))
        random = random_bits(torch.arange(first, first + count), columns, int(state["step_count"]))
        store_moments(packed, m, v, random, reach)
        for tensor, values in zip(stored.tensors(), packed.tensors(), strict=True):
            tensor.copy_(values[:, : tensor.shape[1]])


def _place_of(state: State, name: str) -> tuple[str, slice]:
    for group in GROUP_NAMES:
        columns = group_columns(group, sh_degree_of(state), format_of(state))
        if name in columns:
            return group, columns[name]
    raise KeyError(name)
