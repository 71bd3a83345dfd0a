"""How a Gaussian lies in rows: its parameters form two groups, and each group's values stand side by side in a row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

GROUP_NAMES = ("geometry", "appearance")
Moments = Literal["float32", "bfloat16"]
LAST_STEP_BYTES = 4  # of the step of a row's last update
COPY_ROWS = 1 << 20  # copied at once when rows are filled


def group_shapes(group: str, sh_degree: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of one Gaussian's values of each parameter of a group, in the order of their columns."""
    if group == "geometry":
        return {"means": (3,), "scales": (3,), "quats": (4,), "opacities": ()}
    return {"sh0": (1, 3), "shN": ((sh_degree + 1) ** 2 - 1, 3)}


def group_columns(group: str, sh_degree: int) -> dict[str, slice]:
    """Return the columns of each parameter in a group's rows."""
    columns, first = {}, 0
    for name, shape in group_shapes(group, sh_degree).items():
        columns[name] = slice(first, first + math.prod(shape))
        first = columns[name].stop
    return columns


def num_columns(group: str, sh_degree: int, pad_to_cache_line: bool = False) -> int:
    """Count the columns of a group's rows: geometry fills 48 bytes, appearance whole cache lines of 64 bytes.

    With `pad_to_cache_line` geometry fills a line as well, of which it uses the first 48 bytes.
    """
    values = sum(math.prod(shape) for shape in group_shapes(group, sh_degree).values())
    multiple = 4 if group == "geometry" and not pad_to_cache_line else 16
    return -(-values // multiple) * multiple


def row_bytes(group: str, sh_degree: int, moments: Moments = "float32", pad_to_cache_line: bool = False) -> int:
    """Count the bytes of host memory that a store of a group takes for each Gaussian.

    While the store changes, it takes up to `host_store.PEAK` times as much.
    """
    value_bytes = 4 + (8 if moments == "float32" else 4)  # of a parameter and two moments
    return num_columns(group, sh_degree, pad_to_cache_line) * value_bytes + LAST_STEP_BYTES


@dataclass(frozen=True)
class RowLayout:
    """Which columns of a group's rows hold which parameter."""

    shapes: dict[str, tuple[int, ...]]  # of one Gaussian's values
    columns: dict[str, slice]
    num_columns: int  # that optimizers work on; rows in memory may have more, which are zero

    @classmethod
    def of(cls, group: str, sh_degree: int) -> RowLayout:
        """Return the layout of a group."""
        return cls(group_shapes(group, sh_degree), group_columns(group, sh_degree), num_columns(group, sh_degree))

    def named(self, rows: Tensor) -> dict[str, Tensor]:
        """Name the parameters in rows [M, columns] of values, moments or gradients: views of the rows."""
        # In one operation: the backward pass of each slice would make a gradient of whole rows.
        widths = [columns.stop - columns.start for columns in self.columns.values()]
        parts = rows.split_with_sizes([*widths, rows.shape[1] - sum(widths)], dim=1)
        return {name: part.view(len(rows), *self.shapes[name]) for name, part in zip(self.columns, parts, strict=False)}

    def fill(self, rows: Tensor, parameters: Mapping[str, Tensor]) -> None:
        """Write parameters [N, ...], on any device, into rows [N, columns], block by block."""
        for name, stored in self.named(rows).items():
            for first in range(0, len(rows), COPY_ROWS):
                stored[first : first + COPY_ROWS] = parameters[name][first : first + COPY_ROWS].detach()

    def to_render(self, rows: Tensor) -> dict[str, Tensor]:
        """Name rows [M, columns] as rendering takes them: sh0 and shN are one `colors` [M, K, 3]; views of the rows."""
        if "sh0" not in self.shapes:
            return self.named(rows)
        num_values = self.columns["shN"].stop
        return {"colors": rows[:, :num_values].view(len(rows), num_values // 3, 3)}


@dataclass(frozen=True)
class RowState:
    """Parameters and Adam moments of rows, 32-bit words [rows, columns] each, contiguous.

    Rows on the host may have more columns than those on the device; the others are zero.
    """

    parameters: Tensor  # float32
    moments: tuple[Tensor, ...]  # the first and the second, float32; or int32 pairs (`offload/adam/bfloat16.py`);
    # or none, where they are left on the host

    def __getitem__(self, rows: slice) -> RowState:
        return RowState(self.parameters[rows], tuple(moment[rows] for moment in self.moments))

    @property
    def exp_avg(self) -> Tensor:
        """Return the first moments [rows, columns]: a view of the rows."""
        return self._moment(0)

    @property
    def exp_avg_sq(self) -> Tensor:
        """Return the second moments [rows, columns]: a view of the rows."""
        return self._moment(1)

    def _moment(self, index: int) -> Tensor:
        if len(self.moments) == 2:
            return self.moments[index]
        return self.moments[0].view(torch.bfloat16)[:, index::2]  # bfloat16

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the parameters and the one or two tensors of moments."""
        return self.parameters, *self.moments

    def new_empty(self, rows: int, device: torch.device) -> RowState:
        """Allocate space for rows like these."""
        parameters, *moments = (tensor.new_empty(rows, tensor.shape[1], device=device) for tensor in self.tensors())
        return RowState(parameters, tuple(moments))
