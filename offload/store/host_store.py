"""Gaussians and their Adam moments in host memory, changed in place by densification."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from offload.backends import native, num_threads
from offload.store.memory import HostArray

GROUP_NAMES = ("geometry", "appearance")
Moments = Literal["float32", "bfloat16"]
STAMP_BYTES = 4
PEAK = 1.1  # host memory at most, while the store grows or is re-ordered, over that of the grown store
COPY_ROWS = 1 << 20  # rows converted at once when the store is filled


class GrowingPlace(Protocol):
    """Holds parameters of Gaussians."""

    def growth_bytes(self, num_new: int) -> dict[torch.device, int]: ...


def group_shapes(group: str, sh_degree: int) -> dict[str, tuple[int, ...]]:
    """Shape of one Gaussian's values of each parameter of a group, in the order of their columns."""
    if group == "geometry":
        return {"means": (3,), "scales": (3,), "quats": (4,), "opacities": ()}
    return {"sh0": (1, 3), "shN": ((sh_degree + 1) ** 2 - 1, 3)}


def group_columns(group: str, sh_degree: int) -> dict[str, slice]:
    """Columns of each parameter in a group's rows."""
    columns, first = {}, 0
    for name, shape in group_shapes(group, sh_degree).items():
        columns[name] = slice(first, first + math.prod(shape))
        first = columns[name].stop
    return columns


def num_columns(group: str, sh_degree: int, whole_lines: bool = False) -> int:
    """Columns of a group's rows: geometry fills 48 bytes, appearance whole cache lines of 64 bytes.

    With `whole_lines` geometry fills a line as well, of which it uses the first 48 bytes.
    """
    values = sum(math.prod(shape) for shape in group_shapes(group, sh_degree).values())
    multiple = 4 if group == "geometry" and not whole_lines else 16
    return -(-values // multiple) * multiple


def host_bytes(
    num_gaussians: int,
    sh_degree: int,
    groups: Sequence[str] = GROUP_NAMES,
    moments: Moments = "float32",
    whole_lines: bool = False,
) -> int:
    """Bytes that a store of this many Gaussians takes in host memory; while it changes, up to PEAK times as much."""
    value_bytes = 4 + (8 if moments == "float32" else 4)  # of a parameter and two moments
    columns = sum(num_columns(group, sh_degree, whole_lines) for group in groups)
    return num_gaussians * (columns * value_bytes + STAMP_BYTES)


@dataclass
class Group:
    """Parameters that lie side by side in one row, and their Adam moments, in arrays [N, columns] of 32-bit words."""

    columns: dict[str, slice]
    shapes: dict[str, tuple[int, ...]]  # of one Gaussian's values
    num_columns: int  # that optimizers work on; the arrays may have more, which are zero
    parameters: HostArray  # float32
    moments: tuple[HostArray, ...]  # the first and the second, float32; or int32 pairs (`offload/adam/bfloat16.py`)

    @property
    def arrays(self) -> tuple[HostArray, ...]:
        return self.parameters, *self.moments

    @property
    def exp_avg(self) -> Tensor:
        """The first moments [N, columns]: a view of the rows."""
        return self._moment(0)

    @property
    def exp_avg_sq(self) -> Tensor:
        """The second moments [N, columns]: a view of the rows."""
        return self._moment(1)

    def _moment(self, index: int) -> Tensor:
        if len(self.moments) == 2:
            return self.moments[index].tensor
        return self.moments[0].tensor.view(torch.bfloat16)[:, index::2]  # bfloat16

    def to_render(self, rows: Tensor) -> dict[str, Tensor]:
        """Views of rows [M, columns] as rendering takes them: sh0 and shN are one `colors` [M, K, 3]."""
        if "sh0" not in self.shapes:
            return self.named(rows)
        num_values = self.columns["shN"].stop
        return {"colors": rows[:, :num_values].view(len(rows), num_values // 3, 3)}

    def named(self, rows: Tensor) -> dict[str, Tensor]:
        """Views of rows [M, columns] of any of the three arrays, or of gradients laid out like them, by name."""
        # In one operation: the backward pass of each slice would make a gradient of whole rows.
        widths = [columns.stop - columns.start for columns in self.columns.values()]
        parts = rows.split_with_sizes([*widths, rows.shape[1] - sum(widths)], dim=1)
        return {name: part.view(len(rows), *self.shapes[name]) for name, part in zip(self.columns, parts, strict=False)}


class HostStore:
    """All or one group of the Gaussians' parameters, with moments and the steps of their last updates.

    Bytes of host memory per Gaussian at SH degree 3: appearance 48 columns x 3 arrays x 4 bytes = 576, geometry
    12 x 3 x 4 = 144, `last_step` 4; 724 in all. Up to 1/64 more is taken when the store grows. With moments in bfloat16
    it is two thirds of that; with `whole_lines` geometry is 16 x 3 x 4 = 192.

    The operations are those of `training.gaussians.DeviceGaussians`, with the same results row for row. They work on
    stored values: deferred steps of the rows at hand must have been caught up. Rows that are new or overwritten get
    moments of zero and the stamp `step`, which the trainer keeps at the number of steps done.

    Views and tensors handed out stay valid until the number of rows changes.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        *,
        groups: Sequence[str] = GROUP_NAMES,
        moments: Moments = "float32",
        max_gaussians: int = 0,
        pin: bool = False,
        whole_lines: bool = False,
    ) -> None:
        """
        Args:
            parameters: means [N, 3], scales [N, 3], quats [N, 4], opacities [N], sh0 [N, 1, 3] and shN [N, K - 1, 3]
                on any device. They are read in blocks: no second copy of them is made on the way.
            groups: Which of "geometry" and "appearance" to hold.
            moments: The precision of their Adam moments.
            max_gaussians: Bound of growth; 0 allows what the machine's memory could hold.
            pin: Whether the memory is pinned where there is a GPU.
            whole_lines: Whether rows of geometry fill whole cache lines, for a device that writes them.

        Raises:
            InputError: Memory that cannot be had.
        """
        self.step = 0
        self.before_change: Callable[[Tensor | None], None] | None = None  # called by `will_change`
        self.sh_degree = math.isqrt(parameters["shN"].shape[1] + 1) - 1
        num_gaussians = len(parameters["means"])
        self._row_bytes = host_bytes(1, self.sh_degree, groups, moments, whole_lines)
        max_rows = max(num_gaussians, max_gaussians or _physical_bytes() // self._row_bytes)
        self.groups = {
            group: _empty_group(
                group, self.sh_degree, num_columns(group, self.sh_degree, whole_lines), moments, max_rows, pin
            )
            for group in groups
        }
        self._stamps = HostArray(1, max_rows=max_rows, dtype=torch.int32, pin=pin)
        self._resize(num_gaussians)
        for name, stored in self.snapshot().items():
            for first in range(0, num_gaussians, COPY_ROWS):
                stored[first : first + COPY_ROWS] = parameters[name][first : first + COPY_ROWS].detach()

    @property
    def num_gaussians(self) -> int:
        return self._stamps.rows

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def last_step(self) -> Tensor:
        """Step of each row's last update, [N] int32; 0 before the first one."""
        return self._stamps.tensor[:, 0]

    def will_change(self, ids: Tensor | None) -> None:
        """Tell whoever reads the rows in the background that some will change now.

        The operations below tell it themselves; it is for those who change rows through views.

        Args:
            ids: int64 [M] on any device, the rows; None: all of them.
        """
        if self.before_change is not None:
            self.before_change(None if ids is None else ids.cpu())

    def snapshot(self) -> dict[str, Tensor]:
        """The stored parameters by name: views of the rows."""
        return {
            name: view for group in self.groups.values() for name, view in group.named(group.parameters.tensor).items()
        }

    def arrays_by_name(self) -> dict[str, Tensor]:
        """Views of the stored parameters and moments, under the names of `offload.adam.state`."""
        return {
            f"{array}/{name}": view
            for group in self.groups.values()
            for array, rows in (
                ("parameters", group.parameters.tensor),
                ("exp_avg", group.exp_avg),
                ("exp_avg_sq", group.exp_avg_sq),
            )
            for name, view in group.named(rows).items()
        }

    def read(self, name: str) -> Tensor:
        """The stored values of one parameter: a view of the rows."""
        return self.snapshot()[name]

    def append_copies(self, ids: Tensor) -> None:
        """Append a copy of each of these rows [M]; the copies start without Adam moments."""
        ids = self._checked(ids)
        self.will_change(None)
        num_before = self.num_gaussians
        self._resize(num_before + len(ids))
        for group in self.groups.values():
            native.append_rows(_words(group.parameters), ids.numpy(), num_before, num_threads())
        self.last_step[num_before:] = self.step

    def truncate(self, num_gaussians: int) -> None:
        """Keep only the first rows."""
        self.will_change(None)
        self._resize(num_gaussians)

    def overwrite(self, ids: Tensor, values: Mapping[str, Tensor]) -> None:
        """Give these rows [M] new values; all moments of the rows become zero, named or not.

        Names of parameters that the store does not hold are passed over.
        """
        ids = self._checked(ids)
        self.will_change(ids)
        for name, stored in self.snapshot().items():
            if name in values:
                stored[ids] = values[name].detach().to(stored)
        self._forget(ids)

    def relocate(self, source_ids: Tensor, target_ids: Tensor) -> None:
        """Copy rows [M] onto other rows [M], whose moments become zero. No row is a source and a target."""
        source_ids, target_ids = self._checked(source_ids), self._checked(target_ids)
        self.will_change(target_ids)
        for group in self.groups.values():
            native.copy_rows(_words(group.parameters), source_ids.numpy(), target_ids.numpy(), num_threads())
        self._forget(target_ids)

    def keep(self, ids: Tensor) -> None:
        """Keep only these rows [M], in this order."""
        ids = self._checked(ids)
        ascending = ids
        if not bool((ids[1:] > ids[:-1]).all()):
            ascending = ids.sort().values
            if not bool((ascending[1:] > ascending[:-1]).all()):
                raise ValueError("a row can be kept only once")
        self.will_change(None)
        for array in self._arrays:
            native.compact_rows(_words(array), ascending.numpy(), num_threads())
            array.resize(len(ids))
        if ascending is not ids:
            self.reorder(torch.searchsorted(ascending, ids))

    def reorder(self, order: Tensor) -> None:
        """Put the rows into this order [N]: row i becomes what row order[i] was."""
        order = self._checked(order)
        if len(order) != self.num_gaussians:
            raise ValueError(f"an order of {len(order)} rows for {self.num_gaussians}")
        self.will_change(None)
        permutation = native.Permutation(order.numpy(), num_threads())
        for array in self._arrays:
            permutation.apply(_words(array))

    def clamp_opacities(self, max_logit: float) -> None:
        """Lower every logit opacity to at most this, and forget the moments of all opacities."""
        self.will_change(None)
        geometry = self.groups["geometry"]
        geometry.named(geometry.parameters.tensor)["opacities"].clamp_(max=max_logit)
        for moment in (geometry.exp_avg, geometry.exp_avg_sq):
            geometry.named(moment)["opacities"].zero_()

    def growth_bytes(self, num_new: int) -> dict[torch.device, int]:
        """Memory in bytes that appending this many Gaussians takes at its peak, re-ordering included."""
        peak = int(PEAK * (self.num_gaussians + num_new) * self._row_bytes)
        return {self.device: peak - self.num_gaussians * self._row_bytes}

    @property
    def _arrays(self) -> list[HostArray]:
        return [array for group in self.groups.values() for array in group.arrays] + [self._stamps]

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

    def _forget(self, ids: Tensor) -> None:
        for group in self.groups.values():
            for moment in group.moments:
                moment.tensor.index_fill_(0, ids, 0)
        self.last_step.index_fill_(0, ids, self.step)

    def _checked(self, ids: Tensor) -> Tensor:
        """Row numbers as the native code takes them, which does not look where it writes."""
        ids = ids.detach().to("cpu", torch.int64).contiguous()
        if len(ids) == 0:
            return ids
        lowest, highest = (int(end) for end in ids.aminmax())
        if lowest < 0 or highest >= self.num_gaussians:
            raise IndexError(f"rows {lowest} to {highest} of {self.num_gaussians}")
        return ids


def _empty_group(group: str, sh_degree: int, columns: int, moments: Moments, max_rows: int, pin: bool) -> Group:
    def array(dtype: torch.dtype) -> HostArray:
        return HostArray(columns, max_rows=max_rows, dtype=dtype, pin=pin)

    dtypes = (torch.float32, torch.float32) if moments == "float32" else (torch.int32,)
    return Group(
        group_columns(group, sh_degree),
        group_shapes(group, sh_degree),
        num_columns(group, sh_degree),
        array(torch.float32),
        tuple(array(dtype) for dtype in dtypes),
    )


def _words(array: HostArray) -> np.ndarray:
    """All rows as 32-bit words [N, columns], which is what the native code moves."""
    return array.tensor.view(torch.int32).numpy()


def _physical_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def total_growth(places: Sequence[GrowingPlace], num_new: int) -> dict[torch.device, int]:
    """Memory in bytes of each device that appending so many Gaussians takes in all these places."""
    total: dict[torch.device, int] = {}
    for place in places:
        for device, needed in place.growth_bytes(num_new).items():
            total[device] = total.get(device, 0) + needed
    return total
