"""Rows of compact stores on the host that pass through the device to be stepped, chunk by chunk.

Nothing is rendered meanwhile. Two lanes take turns, so that rows of one chunk come while those of another go. Kernels
that step rows where they lie on the host would take twice the time: their reads of codes are too short for the link
(16 GB/s of rows of harmonics, where copies make 50 in each direction; H200).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import ModuleType

import torch
from torch import Tensor

from offload.adam.harmonics import HarmonicsGradient
from offload.pipelines.groups import RowGroup, chunks_of, step_packed
from offload.pipelines.lanes import Lane
from offload.store.layout import PackedRows


class PassingRows:
    """Steps rows that stay on the host, for the current lane, which waits for them."""

    def __init__(
        self, groups: Mapping[str, RowGroup], device: torch.device, kernels: ModuleType, lanes: Sequence[Lane]
    ) -> None:
        """
        Args:
            groups: In compact stores.
            device: That steps them.
            kernels: As of `offload.adam.rows`.
            lanes: That take turns; they have nothing else to do then.
        """
        self._groups = groups
        self._device = device
        self._kernels = kernels
        self._lanes = lanes
        self._spaces: list[dict[str, PackedRows]] = []  # of each lane, for a chunk

    def make_space(self, count: int) -> None:
        """Take the memory that the next step on so many rows needs, before anything is changed."""
        most = max((last - first for first, last in chunks_of(count)), default=0)
        self._spaces = [
            {name: group.new_packed(most, self._device) for name, group in self._groups.items()} for _ in self._lanes
        ]

    def step(
        self, ids: Tensor, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor | HarmonicsGradient]
    ) -> None:
        """Take Adam's step, which has begun, in the space that has been made.

        Args:
            ids: int64 [V] on the device, sorted.
            values: group -> [V, columns], as rows were before it; receive the new ones. Of groups that have none here
                they are read once more.
            gradients: group -> [V, columns], or what they are made of.
        """
        compute, (spaces, self._spaces) = Lane.current(self._device), (self._spaces, [])
        with ExitStack() as changes:
            for group in self._groups.values():
                changes.enter_context(group.store.changing(ids))
            begun = compute.record()
            for number, (first, last) in enumerate(chunks_of(ids.shape[0])):
                turn, rows = number % len(self._lanes), slice(first, last)
                values_here = {name: each[rows] for name, each in values.items()}
                gradients_here = {name: each[rows] for name, each in gradients.items()}
                with self._lanes[turn] as lane:
                    lane.wait(begun)
                    self._pass(ids[rows], values_here, gradients_here, spaces[turn])
            compute.wait(*(lane.record() for lane in self._lanes))
        for lane in self._lanes:
            lane.uses(ids)  # which none of them, nor the current one, may have made

    def _pass(
        self,
        ids: Tensor,
        values: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor | HarmonicsGradient],
        space: Mapping[str, PackedRows],
    ) -> None:
        """Read, step and write rows on the current lane, which has the space to itself."""
        stored = [group.packed for group in self._groups.values()]
        here = {name: (words[: ids.shape[0]], last_step[: ids.shape[0]]) for name, (words, last_step) in space.items()}
        self._kernels.read_packed_rows(stored, ids, None, list(here.values()))
        for name, packed in here.items():
            step_packed(self._groups[name], name, packed, ids, values.get(name), gradients[name], self._kernels)
        self._kernels.write_packed_rows(list(here.values()), ids, None, stored)
