"""What models ask of a pipeline, which brings rows of views to the device and takes their gradients back.

Each pipeline moves rows in its own way, and the verbs are the same. The order in which they may be called is that of
`offload/models/contract.py`, which models enforce.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from offload.adam.harmonics import HarmonicsGradient
from offload.adam.stored_harmonics import StoredRows
from offload.culling.cameras import Cameras
from offload.store.layout import group_columns

MEANS = group_columns("geometry", sh_degree=0)["means"]  # columns of a row of geometry, in every form


class FetchedRows(Protocol):
    """Hold the rows of a view on the device."""

    @property
    def ids(self) -> Tensor:
        """Return which Gaussians they are, int64 [V] on the device, sorted."""

    @property
    def values(self) -> dict[str, Tensor]:
        """Return the rows of each group, [V, columns], leaves that receive gradients; none once these are taken in.

        Those of geometry have no values of their own where the pipeline `ReadsPresent`.
        """


@dataclass(frozen=True)
class Displacement:
    """Hold how far means of some rows move together with a step of Adam.

    Adam's steps do not depend on the values of parameters, so that it makes no difference whether these are added to
    before or after one, or to a row that lags behind.
    """

    rows: Tensor  # int64 [D], each once
    offsets: Tensor  # float32 [D, 3] in world units

    def add_to(self, means: Tensor) -> None:
        """Add the offsets to means [N, 3] of which these are rows, in place."""
        rows = self.rows.to(means.device)
        means[rows] = means[rows] + self.offsets.to(means.device)


@dataclass(frozen=True)
class Counters:
    """Hold what has been counted since training began; None is what a model has nothing to count of.

    Attributes:
        staging_allocations: How often space for rows of views has been allocated; constant in the steady state.
        milliseconds: How long worker thread, copies, and waiting for them have taken, by name. They run beside each
            other and beside the rendering, so these times do not add up to a step.
        traffic: Rows that views have fetched, retained and written; `rows_in_place`, those of views that stayed on the
            host; and `link_bytes`, the bytes of rows that have travelled between host and device both ways.
    """

    staging_allocations: int | None = None
    milliseconds: dict[str, float] | None = None
    traffic: dict[str, int] | None = None


class Pipeline(Protocol):
    """Moves the rows of groups between their stores and the device."""

    last_step_in_store: ClassVar[bool]  # whether the stores know at any time when their rows were updated last

    def fetch(self, cameras: Cameras) -> FetchedRows:
        """Return the rows of a view, with the values they have after the last step."""

    def prefetch(self, cameras: Cameras) -> None:
        """Find the rows of the next view and let them travel, while the present one is rendered."""

    def update(self) -> None:
        """Take Adam's step on the gradients of the rows that `fetch` gave."""

    def displace(self, displacement: Displacement) -> None:
        """Move means of rows of the present view with the update that comes next; geometry is among the rows."""

    def geometry_moved(self) -> None:
        """Note that geometry which stays on the device has taken its step as well, so that it may be culled."""

    def finish(self) -> None:
        """Wait until the stores hold everything. Rows that were fetched ahead stay good."""

    def forget_upcoming(self) -> None:
        """Drop what is known of the next view, since rows will be changed."""

    def read(self, name: str, ids: Tensor) -> Tensor:
        """Return copies of the current values of rows [V, columns] of a group; the store is left as it is.

        Args:
            name: Of the group.
            ids: int64 [V] on any device.
        """

    def catch_up(self, name: str, ids: Tensor | None) -> None:
        """Let the store of a group hold the current values of rows, so that others may read and change them.

        What was fetched ahead is dropped.

        Args:
            name: Of the group.
            ids: int64 [M] on any device, sorted, the rows; None: all. Others keep the steps they have skipped.
        """

    def last_step(self, name: str) -> Tensor:
        """Return the step of each row's last update in a group, [N] int32; after `finish`."""

    def state(self) -> dict[str, Tensor]:
        """Return what is known of the next view, as `offload.adam.state` names it; between steps."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the next view from a state, or none, where it has none; the stores have been filled from it.

        Culling anew might find other rows. The picture would be the same, but a row that is committed with a gradient
        of zero rounds differently from one that is deferred.
        """

    def undo_step(self, steps_done: int) -> None:
        """Forget the step after so many, which an error has ended; the next one begins with the same view.

        Raises:
            RuntimeError: Gradients have reached some rows already.
        """

    def counters(self) -> Counters:
        """Return what has been counted so far; waits for what counts on the device."""


@runtime_checkable
class FetchesStored(Pipeline, Protocol):
    """What a pipeline is that can leave rows of a view as they are stored."""

    def fetch_stored(self, cameras: Cameras, name: str) -> tuple[FetchedRows, StoredRows]:
        """Do as `fetch`, but for one group, whose rows have no values: return them as they are stored."""

    def update(self, made: HarmonicsGradient | None = None) -> None:
        """Take Adam's step on the gradients of the rows that `fetch` or `fetch_stored` gave.

        Args:
            made: What the gradient of the rows without values is made of, where there are some.
        """


@runtime_checkable
class ReadsPresent(Pipeline, Protocol):
    """What a pipeline is that leaves geometry of a view as it is stored, in a compact state, and reads it on demand."""

    def read_present(self, name: str) -> Tensor:
        """Return the values [V, columns] of a group's rows in the present view; between `fetch` and `update`.

        Raises:
            RuntimeError: There is none: no view has been fetched, or its rows have been updated.
        """


def upcoming_ids_of(state: Mapping[str, Tensor], device: torch.device) -> Tensor | None:
    """Return a copy of the rows [V] that the next view needs, int64 on a device; None where a state has none."""
    ids = state.get("upcoming/ids")
    return None if ids is None else ids.to(device, copy=True)


View = TypeVar("View")


def fetched(view: View | None) -> View:
    """Return the present view of a pipeline.

    Raises:
        RuntimeError: None has been fetched.
    """
    if view is None:
        raise RuntimeError("No view has been fetched.")
    return view
