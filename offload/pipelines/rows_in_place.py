"""Rows of a group that a device reads where they are, in its own memory or pinned on the host, and updates there."""

from __future__ import annotations

import torch
from torch import Tensor

from offload.adam.harmonics import HarmonicsGradient
from offload.backends import kernels_for
from offload.pipelines.groups import RowGroup, chunks_of
from offload.store.layout import RowState


class RowsInPlace:
    """Reads, steps and catches up rows of a group in its store, all on the current stream."""

    def __init__(self, group: RowGroup, device: torch.device) -> None:
        """
        Args:
            group: The rows; packed ones, and only to be read, where the host has them.
            device: That reads and updates them.
        """
        self._group = group
        self._device = device
        self._kernels = kernels_for(device, "offload.adam.rows")

    def read(self, ids: Tensor) -> Tensor:
        """Return copies of the current values of rows [V, columns]; the store is left as it is.

        Args:
            ids: int64 [V] on any device.
        """
        ids, store, adam = ids.to(self._device), self._group.store, self._group.adam
        out = torch.empty(len(ids), adam.columns, device=self._device)
        self._kernels.fetch_rows(store.rows, ids, ids, store.last_step, None, RowState(out, ()), adam)
        return out

    def step(self, ids: Tensor, values: Tensor | None, gradients: Tensor | HarmonicsGradient) -> None:
        """Take Adam's step, which has begun, on rows; whoever listens is told of their new values, where it has some.

        Args:
            ids: int64 [V] on the device, the rows.
            values: [V, columns], as they were before it; receives the new ones. None: they are read once more, of
                packed rows or where the gradient is made.
            gradients: [V, columns], or what they are made of.
        """
        group = self._group
        with group.store.changing(ids) as rows:
            self._kernels.step_stored_rows(values, ids, group.store.last_step, gradients, rows, group.adam)
        if group.on_step is not None and values is not None:
            group.on_step(ids, values, lambda: rows.moments[0][ids])

    def catch_up(self, ids: Tensor | None) -> None:
        """Let a store on the device hold the current values of rows, so that others may read and change them.

        Args:
            ids: int64 [M] on any device, each once, the rows; None: all. Others keep the steps they have skipped.
        """
        store, adam = self._group.store, self._group.adam
        chosen = None if ids is None else ids.to(self._device)
        with store.changing(ids) as rows:
            for first, last in chunks_of(store.num_gaussians if chosen is None else len(chosen)):
                chunk = torch.arange(first, last, device=self._device) if chosen is None else chosen[first:last]
                stale = chunk[store.last_step[chunk] < adam.step]
                values = self.read(stale)
                self._kernels.step_stored_rows(values, stale, store.last_step, None, rows, adam)
