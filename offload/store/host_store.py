"""A group of the Gaussians' parameters and their Adam moments in host memory, changed in place by densification."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from offload.backends import native, num_threads
from offload.store.growth import Growth
from offload.store.layout import (
    Moments,
    RowState,
    StateFormat,
    num_columns,
    packed_rows,
    packed_words,
    row_bytes,
)
from offload.store.memory import HostArray
from offload.store.stored_rows import StoredRows

PEAK = 1.1  # host memory at most, while the store grows or is re-ordered, over that of the grown store


class HostStore(StoredRows):
    """One group of the Gaussians' parameters, with Adam moments and the step of each row's last update.

    Bytes of host memory per Gaussian at SH degree 3: appearance 48 columns x 3 arrays x 4 bytes = 576 and 4 of
    `last_step`; geometry 12 x 3 x 4 = 144 and 4; 728 in two stores. Up to 1/64 more is taken when a store grows, and up
    to 3/64 more stay when it shrinks. With moments in bfloat16 it is two thirds of that; with `pad_to_cache_line`
    geometry is 16 x 3 x 4 = 192. In a compact state it is 192 and 128 (`offload.store.layout.packed_rows`).

    The operations are those of `offload.models.device.DeviceGaussians`, with the same results row for row. They work on
    stored values: deferred steps of the rows at hand must have been caught up. Rows that are new or overwritten get
    moments of zero and `step` as their last step, which the trainer keeps at the number of steps done.

    Whoever writes rows does it inside of `changing`, and so do the operations: it tells who copies rows in the
    background before they change, and who derives something from them afterwards.

    Views and tensors handed out stay valid until the number of rows changes.

    Attributes:
        layout: Which columns hold which parameter.
        max_rows: Bound of growth.
        step: The last step of the next rows that are added or overwritten.
        before_change: Is called with the ids (int64 [M] on the host; None: all) of rows that are about to change.
        on_change: Is called with the ids of rows that have changed, on the device where they were written from.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        group: str,
        *,
        moments: Moments = "float32",
        state: StateFormat = "float32",
        max_gaussians: int = 0,
        pin: bool = False,
        pad_to_cache_line: bool = False,
    ) -> None:
        """
        Args:
            parameters: means [N, 3], scales [N, 3], quats [N, 4], opacities [N], sh0 [N, 1, 3] and shN [N, K - 1, 3]
                on any device. They are read in blocks: no second copy of them is made on the way.
            group: Which of them to hold: "geometry" or "appearance".
            moments: The precision of their Adam moments, where the state is float32.
            state: The form of rows.
            max_gaussians: Bound of growth; 0 allows what the machine's memory could hold.
            pin: Whether the memory is pinned where there is a GPU.
            pad_to_cache_line: Whether rows of geometry fill whole cache lines, for a device that writes them.

        Raises:
            ParameterError: Memory that cannot be had.
        """
        super().__init__(group, parameters, state)
        num_gaussians = len(parameters["means"])
        self._row_bytes = row_bytes(group, self.sh_degree, moments, state, pad_to_cache_line=pad_to_cache_line)
        self.max_rows = max(num_gaussians, max_gaussians or _physical_bytes() // self._row_bytes)
        columns = num_columns(group, self.sh_degree, state, pad_to_cache_line=pad_to_cache_line)

        def array(dtype: torch.dtype, columns: int = columns) -> HostArray:
            return HostArray(columns, max_rows=self.max_rows, dtype=dtype, pin=pin)

        # What rows are kept in: an array each of parameters and moments; or one of whole rows, where they are packed.
        if state == "compact":
            self._values = [array(torch.int32, packed_words(group, self.sh_degree))]
        else:
            dtypes = (torch.float32, torch.float32) if moments == "float32" else (torch.int32,)
            self._values = [array(dtype) for dtype in (torch.float32, *dtypes)]
        self._last_step = array(torch.int32, columns=1)
        self._resize(num_gaussians)
        self.layout.fill(self.rows.parameters, parameters)

    @property
    def num_gaussians(self) -> int:
        return self._last_step.rows

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def last_step(self) -> Tensor:
        """Return the step of each row's last update, [N] int32; 0 before the first one."""
        return self._last_step.tensor[:, 0]

    @property
    def rows(self) -> RowState:
        """Return all rows; views of the memory, which may be written inside of `changing` only."""
        if self.layout.state == "compact":
            return packed_rows(self._values[0].tensor, self._group)
        parameters, *moments = (array.tensor for array in self._values)
        return RowState(parameters, tuple(moments))

    @property
    def packed(self) -> Tensor:
        """Return all rows of a compact store as words, int32 [N, words]; written as `rows`."""
        return self._values[0].tensor

    def append_blank(self, count: int) -> None:
        """Append so many rows whose values and moments are written next."""
        with self.changing(None):
            num_before = self.num_gaussians
            self._resize(num_before + count)
            self.last_step[num_before:] = self.step

    def append_copies(self, ids: Tensor) -> None:
        """Append a copy of each of these rows [M]; the copies start without Adam moments."""
        ids = self._ids_here(ids)
        with self.changing(None):
            num_before = self.num_gaussians
            self._resize(num_before + len(ids))
            native.append_rows(_words(self._values[0]), ids.numpy(), num_before, num_threads())
            if self.layout.state == "compact":
                self.rows.moments[0][num_before:] = 0  # which were appended with the values
            self.last_step[num_before:] = self.step

    def truncate(self, num_gaussians: int) -> None:
        """Keep only the first rows."""
        with self.changing(None):
            self._resize(num_gaussians)

    def relocate(self, source_ids: Tensor, target_ids: Tensor) -> None:
        """Copy rows [M] onto other rows [M], whose moments become zero. No row is a source and a target."""
        source_ids, target_ids = self._ids_here(source_ids), self._ids_here(target_ids)
        check_relocation(source_ids, target_ids)
        with self.changing(target_ids):
            native.copy_rows(_words(self._values[0]), source_ids.numpy(), target_ids.numpy(), num_threads())
            self._forget(target_ids)

    def keep(self, ids: Tensor) -> None:
        """Keep only these rows [M], in this order."""
        ids = self._ids_here(ids)
        ascends = bool((ids[1:] > ids[:-1]).all())
        if not ascends:  # all rows are put into an order in which those that go are the last
            goes = torch.ones(self.num_gaussians, dtype=torch.bool)
            goes[ids] = False
            order = torch.cat([ids, goes.nonzero().squeeze(1)])
            if len(order) > self.num_gaussians:
                raise ValueError("a row can be kept only once")
        with self.changing(None):
            if ascends:
                for array in self._arrays:
                    native.compact_rows(_words(array), ids.numpy(), num_threads())
            else:
                self._permute(order)
            for array in self._arrays:
                array.resize(len(ids))

    def growth(self, num_new: int) -> dict[torch.device, Growth]:
        """Count the bytes of memory that appending this many Gaussians takes, re-ordering included."""
        grown = (self.num_gaussians + num_new) * self._row_bytes
        return {torch.device("cpu"): Growth(num_new * self._row_bytes, int(PEAK * grown) - grown)}

    @property
    def _arrays(self) -> list[HostArray]:
        return [*self._values, self._last_step]

    def _resize(self, num_gaussians: int) -> None:
        """Give all arrays this many rows, or leave them all as they are."""
        num_before = self.num_gaussians
        try:
            for array in self._arrays:
                array.resize(num_gaussians)
        except Exception:
            for array in self._arrays:
                array.resize(num_before)
            raise

    def _permute(self, order: Tensor) -> None:
        permutation = native.Permutation(order.numpy(), num_threads())
        for array in self._arrays:
            permutation.apply(_words(array))

    def _ids_here(self, ids: Tensor) -> Tensor:
        """Return row numbers [M] as the native code takes them, which does not look where it writes."""
        ids = ids.detach().to("cpu", torch.int64).contiguous()
        if len(ids) == 0:
            return ids
        lowest, highest = (int(end) for end in ids.aminmax())
        if lowest < 0 or highest >= self.num_gaussians:
            raise IndexError(f"rows {lowest} to {highest} of {self.num_gaussians}")
        return ids


def check_relocation(source_ids: Tensor, target_ids: Tensor) -> None:
    """Check that rows can be copied onto others in any order; sources may repeat.

    Raises:
        ValueError: There are not as many of both, a target repeats, or a row is a source and a target.
    """
    if source_ids.shape != target_ids.shape:
        raise ValueError(f"{len(source_ids)} rows cannot be copied onto {len(target_ids)}: each target has one source.")
    targets = target_ids.unique()
    if len(targets) < len(target_ids):
        raise ValueError("A row cannot be the target of several copies: name each target once.")
    if bool(torch.isin(targets, source_ids).any()):
        raise ValueError("A row cannot be the source and the target of copies: choose other targets.")


def _words(array: HostArray) -> np.ndarray:
    """Return all rows as 32-bit words [N, columns], which is what the native code moves."""
    return array.tensor.view(torch.int32).numpy()


def _physical_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
