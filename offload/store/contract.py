"""What models, pipelines and checkpoints ask of a store: rows of one group of parameters, with Adam's moments.

`HostStore` keeps them in host memory and `DeviceStore` in a device's own; the verbs are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from offload.store.growth import Growth
from offload.store.layout import RowLayout, RowState


class RowStore(Protocol):
    """Holds N rows of one group, their moments and the step of each row's last update.

    The verbs that change rows work on stored values: skipped steps of the rows at hand must have been caught up. Rows
    that are new or overwritten get moments of zero and `step` as their last step.

    Whoever writes rows does it inside of `changing`, and so do the verbs. Views and tensors handed out stay valid until
    the number of rows changes.
    """

    layout: RowLayout  # which columns hold which parameter
    sh_degree: int
    step: int  # the last step of the next rows that are added or overwritten
    before_change: Callable[[Tensor | None], None] | None
    """Is called with the ids (int64 [M] on the host; None: all) of rows that are about to change."""
    on_change: Callable[[Tensor | None], None] | None
    """Is called with the ids of rows that have changed, on the device where they were written from."""

    @property
    def num_gaussians(self) -> int:
        """Return N."""

    @property
    def device(self) -> torch.device:
        """Return where the rows are."""

    @property
    def rows(self) -> RowState:
        """Return all rows; views of the memory, which may be written inside of `changing` only."""

    @property
    def packed(self) -> Tensor:
        """Return all rows of a compact store as words, int32 [N, words]; written as `rows`."""

    @property
    def last_step(self) -> Tensor:
        """Return the step of each row's last update, [N] int32 where the rows are; 0 before the first one."""

    def changing(self, ids: Tensor | None) -> AbstractContextManager[RowState]:
        """Change rows: it gives all rows, of which those of `ids` may be written until it is left.

        Where a device writes them, it is entered before that is begun, and left when it has been done, or begun if
        nobody listens to `on_change`. It is not left, and nobody told, where an error has ended the change.

        Args:
            ids: int64 [M] on any device, the rows; None: all of them.
        """

    def read(self, name: str, ids: Tensor | None = None) -> Tensor:
        """Return the stored values [N, ...] of one parameter, a view of the rows; or copies of those of rows [M]."""

    def arrays_by_name(self) -> dict[str, Tensor]:
        """Return views of the stored parameters and moments, under the names of `offload.adam.state`."""

    def append_blank(self, count: int) -> None:
        """Append so many rows whose values and moments are written next."""

    def append_copies(self, ids: Tensor) -> None:
        """Append a copy of each of these rows [M]; the copies start without Adam moments."""

    def truncate(self, num_gaussians: int) -> None:
        """Keep only the first rows, also where appending has failed half-way."""

    def overwrite(self, ids: Tensor, values: Mapping[str, Tensor], *, leaves_moments: bool = False) -> None:
        """Give these rows [M] new values; all their moments become zero, named or not, unless they are left.

        Names of parameters that the store does not hold are passed over.
        """

    def relocate(self, source_ids: Tensor, target_ids: Tensor) -> None:
        """Copy rows [M] onto other rows [M], whose moments become zero. No row is a source and a target."""

    def keep(self, ids: Tensor) -> None:
        """Keep only these rows [M], in this order."""

    def clamp_opacities(self, max_logit: float) -> None:
        """Lower every logit opacity to at most this, and forget the moments of all opacities; of geometry only."""

    def growth(self, num_new: int) -> dict[torch.device, Growth]:
        """Count the bytes of memory that appending this many Gaussians takes."""
