"""Balls around single Gaussians, by which a device culls: those of rows that it does not hold, or of rows it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch import Tensor

from offload.backends import kernels_for
from offload.culling.bounds import Drift, balls_of
from offload.culling.cameras import Cameras, Margin
from offload.store.contract import RowStore
from offload.store.growth import Growth
from offload.store.layout import RowState


class Balls:
    """Holds a ball around each of N Gaussians: the mean, the largest scale and the opacity, 20 bytes."""

    BYTES = 20  # of a Gaussian
    know_drifts: ClassVar[bool] = False  # so that margins allow for it, and rows lack moments

    def __init__(self, device: torch.device) -> None:
        """
        Args:
            device: Where they are.
        """
        self._device = device
        self._visible = kernels_for(device, "offload.culling.kernels").visible_balls
        self._follow = kernels_for(device, "offload.culling.bounds").follow_balls
        self._balls = torch.empty(5, 0, device=device)  # x, y, z, the largest log scale, the logit opacity

    def rebuild(self, num_rows: int, rows: Iterator[tuple[RowState, Drift]]) -> None:
        """Take the geometry of all Gaussians.

        Args:
            num_rows: N.
            rows: All rows in order, on the device, some at a time, without moments; and how far their means drift,
                which is of no account, since margins allow for it.
        """
        self._balls = torch.empty(5, num_rows, device=self._device)
        first = 0
        for some, _ in rows:
            last = first + len(some.parameters)
            self._balls[:, first:last] = balls_of(some.parameters)
            first = last

    def follow(self, ids: Tensor, values: Tensor, moments: Callable[[], Tensor], drift: Drift) -> None:
        """Take new geometry [V, columns] of Gaussians [V]."""
        self._follow(self._balls, ids, values)

    def visible_ids(self, cameras: Cameras, margin: Margin) -> Tensor:
        """Find the sorted ids, int64 [V], of what cameras may draw after moving as far as the margin; waits."""
        return self._visible(self._balls, cameras, margin)

    def whole(self, ids: Tensor) -> Tensor:
        """Return ids: each has a ball."""
        return ids

    def growth(self, num_new: int) -> dict[torch.device, Growth]:
        """Count the bytes of memory that so many Gaussians more take: all stand twice while they are made anew."""
        return {self._balls.device: Growth(self.BYTES * num_new, self._balls.nbytes)}


class BallsOfStore:
    """Culls by the balls around rows of a store on the device, which are made of these when they are asked for."""

    BYTES = 0  # of a Gaussian
    know_drifts: ClassVar[bool] = False

    def __init__(self, store: RowStore) -> None:
        """
        Args:
            store: Of the group "geometry", on the device.
        """
        self._store = store
        self._visible = kernels_for(store.device, "offload.culling.kernels").visible_rows

    def rebuild(self, num_rows: int, rows: Iterator[tuple[RowState, Drift]]) -> None:
        """Do nothing: the store has the rows."""

    def follow(self, ids: Tensor, values: Tensor, moments: Callable[[], Tensor], drift: Drift) -> None:
        """Do nothing: the store has the rows."""

    def visible_ids(self, cameras: Cameras, margin: Margin) -> Tensor:
        """Find the sorted ids, int64 [V], of what cameras may draw after moving as far as the margin; waits."""
        return self._visible(self._store.rows.parameters, cameras, margin)

    def whole(self, ids: Tensor) -> Tensor:
        """Return ids: each has a ball."""
        return ids

    def growth(self, num_new: int) -> dict[torch.device, Growth]:
        """Return nothing: the store has the rows."""
        return {}
