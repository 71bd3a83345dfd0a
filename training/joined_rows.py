"""Rows of one model that lie apart, in the parts of a checkpoint, read as if they were one tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from offload.adam.state import PACKED_GEOMETRY
from offload.store.layout import TIGHT_WORDS, with_words


@dataclass(frozen=True)
class Runs:
    """Say where rows are found: run after run of consecutive rows of a part."""

    parts: np.ndarray  # [R] which part
    firsts: np.ndarray  # [R] its first row there
    starts: np.ndarray  # [R + 1] its first row here; the last is the number of rows

    @staticmethod
    def of_all(counts: Sequence[int]) -> Runs:
        """Return all rows of parts with so many rows each, in the order of the parts."""
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return Runs(np.arange(len(counts)), np.zeros(len(counts), np.int64), starts)

    def picked(self, ids: np.ndarray) -> Runs:
        """Return some of these rows, by their increasing numbers int64 [M]."""
        run_of_ids, places = self._runs_of(ids)
        follows = (np.diff(run_of_ids) == 0) & (np.diff(ids) == 1)
        begins = np.concatenate([[True], ~follows])[: len(ids)].nonzero()[0]
        return Runs(self.parts[run_of_ids[begins]], places[begins], np.append(begins, len(ids)))

    def places_of(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return in which part [M] and at which of its rows [M] some of these rows lie, by numbers [M] in any order."""
        run_of_ids, places = self._runs_of(ids)
        return self.parts[run_of_ids], places

    def _runs_of(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the run [M] that each row lies in, and its row [M] in the part."""
        run_of_ids = np.searchsorted(self.starts, ids, side="right") - 1
        return run_of_ids, self.firsts[run_of_ids] + ids - self.starts[run_of_ids]


class TightRows:
    """Stand for packed rows of geometry [N, words] as tight ones, which they may be; `JoinedRows` reads them so."""

    def __init__(self, rows: Tensor) -> None:
        """
        Args:
            rows: int32 [N, words].
        """
        self._rows = rows
        self.dtype = rows.dtype
        self.shape = torch.Size([len(rows), TIGHT_WORDS])

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """Return a slice, or rows by their numbers int64 [M]."""
        return with_words(self._rows[rows], self.shape[1])


class JoinedRows:
    """Stand for a tensor [N, ...] whose rows lie in the parts' tensors; what is read of it is a copy.

    It has of a tensor what readers of a state ask for rows: their shape, dtype and number, slices of them, and rows by
    their numbers. So the whole, which may be larger than memory, is never made.
    """

    def __init__(self, tensors: Sequence[Tensor | TightRows], runs: Runs) -> None:
        """
        Args:
            tensors: Of each part, of one dtype, whose shapes differ in the number of rows alone.
            runs: Which rows of them.

        Raises:
            ValueError: The tensors do not fit together.
        """
        if len({(tensor.dtype, tensor.shape[1:]) for tensor in tensors}) > 1:
            raise ValueError("the parts' rows differ in shape")
        self._tensors, self._runs = tensors, runs
        self.dtype = tensors[0].dtype
        self.shape = torch.Size([int(runs.starts[-1]), *tensors[0].shape[1:]])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """Return a slice, or rows by their numbers int64 [M], from 0, in any order."""
        if isinstance(rows, Tensor):
            return self._numbered(rows.numpy())
        first, last, step = rows.indices(len(self))
        if step != 1:
            raise ValueError("rows are read one after the other")
        result = torch.empty(max(last - first, 0), *self.shape[1:], dtype=self.dtype)
        starts, next_row = self._runs.starts, first
        run = int(np.searchsorted(starts, first, side="right")) - 1
        while next_row < last:
            end = min(int(starts[run + 1]), last)
            place = int(self._runs.firsts[run]) + next_row - int(starts[run])
            source = self._tensors[self._runs.parts[run]][place : place + end - next_row]
            result[next_row - first : end - first] = source
            next_row, run = end, run + 1
        return result

    def _numbered(self, ids: np.ndarray) -> Tensor:
        parts, places = self._runs.places_of(ids)
        result = torch.empty(len(ids), *self.shape[1:], dtype=self.dtype)
        for part in np.unique(parts):
            here = np.flatnonzero(parts == part)
            result[torch.from_numpy(here)] = self._tensors[part][torch.from_numpy(places[here])]
        return result

    def picked(self, ids: np.ndarray) -> JoinedRows:
        """Return some of these rows, by their increasing numbers int64 [M]."""
        return JoinedRows(self._tensors, self._runs.picked(ids))


def whole(rows: Tensor | JoinedRows) -> Tensor:
    """Return all rows as one tensor, which is a copy where they lie apart."""
    return rows[:] if isinstance(rows, JoinedRows) else rows


def joined_state(states: Sequence[Mapping[str, Tensor]], of_rows: Sequence[str]) -> dict[str, Tensor]:
    """Return the state of a whole model from those of its parts.

    Args:
        states: Of each part.
        of_rows: The names of tensors that have a row of each Gaussian. Of the others all parts have the same, but for
            what each had fetched ahead ("upcoming/..."), which does not outlive its part.

    Raises:
        KeyError, ValueError: The parts do not fit together.
    """
    counts = {name: [len(state[name]) for state in states] for name in of_rows}
    if len({tuple(count) for count in counts.values()}) != 1:
        raise ValueError("the parts' tensors have different numbers of rows")
    runs = Runs.of_all(next(iter(counts.values())))
    of_parts: dict[str, Sequence[Tensor | TightRows]] = {name: [state[name] for state in states] for name in of_rows}
    if len({rows.shape[1:] for rows in of_parts.get(PACKED_GEOMETRY, [])}) > 1:  # some processes had it on the device
        of_parts[PACKED_GEOMETRY] = [TightRows(state[PACKED_GEOMETRY]) for state in states]
    # Readers of a state take slices of rows, which both give alike.
    rows = {name: cast(Tensor, JoinedRows(parts, runs)) for name, parts in of_parts.items()}
    others = {name: x for name, x in states[0].items() if name not in rows and not name.startswith("upcoming/")}
    return {**rows, **others}


def picked_state(state: Mapping[str, Tensor], of_rows: Sequence[str], ids: np.ndarray) -> dict[str, Tensor]:
    """Return the state of some Gaussians of a model, by their increasing numbers int64 [M]."""
    picked = {name: x for name, x in state.items() if not name.startswith("upcoming/")}
    for name in of_rows:
        rows = state[name]
        joined = rows if isinstance(rows, JoinedRows) else JoinedRows([rows], Runs.of_all([len(rows)]))
        picked[name] = cast(Tensor, joined.picked(ids))
    return picked
