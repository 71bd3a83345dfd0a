"""A group of the Gaussians' parameters and their Adam moments in a device's own memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from offload.store.growth import Growth
from offload.store.host_store import check_relocation
from offload.store.kept_rows import kept_rows
from offload.store.layout import RowState, StateFormat, packed_rows, packed_words, row_bytes
from offload.store.stored_rows import StoredRows


class DeviceStore(StoredRows):
    """One group of the Gaussians' parameters, with Adam moments and the step of each row's last update.

    Bytes of device memory per Gaussian at SH degree 3: appearance 48 columns x 3 arrays x 4 bytes = 576 and 4 of
    `last_step`, and no gradients. While rows are added or removed, one of the three arrays stands twice. In a compact
    state rows are whole, 192 bytes and 112 of geometry, which are tight (`offload.store.layout.packed_rows`).

    The verbs are those of `offload.store.contract.RowStore`. What changes rows does so on the current stream.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], group: str, *, device: torch.device, state: StateFormat = "float32"
    ) -> None:
        """
        Args:
            parameters: means [N, 3], scales [N, 3], quats [N, 4], opacities [N], sh0 [N, 1, 3] and shN [N, K - 1, 3]
                on any device. They are read in blocks: no second copy of them is made on the way.
            group: Which of them to hold: "geometry" or "appearance".
            device: Where.
            state: The form of rows.
        """
        super().__init__(group, parameters, state)
        self._row_bytes = row_bytes(group, self.sh_degree, state=state, tight=True)
        num_gaussians = len(parameters["means"])
        if state == "compact":  # whole rows
            words = packed_words(group, self.sh_degree, tight=True)
            self._arrays = [torch.zeros(num_gaussians, words, dtype=torch.int32, device=device)]
        else:  # parameters and both moments
            shape = num_gaussians, self.layout.num_columns
            self._arrays = [torch.zeros(shape, device=device) for _ in range(3)]
        self._last_step = torch.zeros(num_gaussians, dtype=torch.int32, device=device)
        self.layout.fill(self.rows.parameters, parameters)

    @property
    def num_gaussians(self) -> int:
        return len(self._last_step)

    @property
    def device(self) -> torch.device:
        return self._last_step.device

    @property
    def last_step(self) -> Tensor:
        """Return the step of each row's last update, [N] int32; 0 before the first one."""
        return self._last_step

    @property
    def rows(self) -> RowState:
        """Return all rows, which may be written inside of `changing` only."""
        if self.layout.state == "compact":
            return packed_rows(self._arrays[0], self._group)
        parameters, *moments = self._arrays
        return RowState(parameters, tuple(moments))

    @property
    def packed(self) -> Tensor:
        """Return all rows of a compact store as words, int32 [N, words]; written as `rows`."""
        return self._arrays[0]

    def append_blank(self, count: int) -> None:
        """Append so many rows whose values and moments are written next; as `append_copies` where memory runs out."""
        with self.changing(None):
            for index, array in enumerate(self._arrays):
                self._arrays[index] = _grown(array, count)
            self._last_step = torch.cat([self._last_step, self._last_step.new_full((count,), self.step)])

    def append_copies(self, ids: Tensor) -> None:
        """Append a copy of each of these rows [M]; the copies start without Adam moments.

        Where memory runs out, some arrays may have the new rows and others not, until `truncate` is called.
        """
        ids, num_before = self._ids_here(ids), self.num_gaussians
        with self.changing(None):
            for index, array in enumerate(self._arrays):
                grown = _grown(array, len(ids))
                if index == 0:
                    torch.index_select(array, 0, ids, out=grown[num_before:])
                self._arrays[index] = grown
            self._last_step = torch.cat([self._last_step, self._last_step.new_full((len(ids),), self.step)])
            if self.layout.state == "compact":
                self.rows.moments[0][num_before:] = 0  # which were appended with the values

    def truncate(self, num_gaussians: int) -> None:
        """Keep only the first rows, also where some arrays have them only, since appending has failed."""
        with self.changing(None):
            self._arrays = [array[:num_gaussians] for array in self._arrays]
            self._last_step = self._last_step[:num_gaussians]

    def relocate(self, source_ids: Tensor, target_ids: Tensor) -> None:
        """Copy rows [M] onto other rows [M], whose moments become zero. No row is a source and a target."""
        check_relocation(source_ids, target_ids)
        source_ids, target_ids = self._ids_here(source_ids), self._ids_here(target_ids)
        with self.changing(target_ids) as rows:
            rows.parameters[target_ids] = rows.parameters[source_ids]
            self._forget(target_ids)

    def keep(self, ids: Tensor) -> None:
        """Keep only these rows [M], in this order."""
        ids = self._ids_here(ids)
        with self.changing(None):
            for index in range(len(self._arrays)):
                self._arrays[index] = kept_rows(self._arrays[index], ids)
            self._last_step = kept_rows(self._last_step, ids)

    def growth(self, num_new: int) -> dict[torch.device, Growth]:
        """Count the bytes of memory that appending this many Gaussians takes: one array stands twice meanwhile."""
        return {self.device: Growth(num_new * self._row_bytes, self._arrays[0].nbytes)}

    def _ids_here(self, ids: Tensor) -> Tensor:
        return ids.to(self.device)


def _grown(array: Tensor, count: int) -> Tensor:
    """Return a copy of an array [N, columns] with so many rows of zeros more."""
    grown = array.new_zeros(len(array) + count, array.shape[1])
    grown[: len(array)] = array
    return grown
