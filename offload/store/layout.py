"""How a Gaussian lies in rows: its parameters form two groups, and each group's values stand side by side in a row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

GROUP_NAMES = ("geometry", "appearance")
Moments = Literal["float32", "bfloat16"]
StateFormat = Literal["float32", "compact"]
PackedRows = tuple[torch.Tensor, torch.Tensor]  # words int32 [rows, words]; the step of each row's last update [rows]
HALF_MAX = 65504.0  # the largest float16
TIGHT_WORDS = 28  # of a tight row: 14 values of geometry, and as many pairs of moments
LAST_STEP_BYTES = 4  # of the step of a row's last update
COPY_ROWS = 1 << 16  # copied at once when rows are filled; float16 takes 270 bytes more of each meanwhile


def group_shapes(group: str, sh_degree: int, state: StateFormat = "float32") -> dict[str, tuple[int, ...]]:
    """Return the shape of one Gaussian's values of each parameter of a group, in the order of their columns.

    In a compact state the constant colour goes with geometry, whose values are kept whole.
    """
    geometry: dict[str, tuple[int, ...]] = {"means": (3,), "scales": (3,), "quats": (4,), "opacities": ()}
    constant, others = {"sh0": (1, 3)}, {"shN": ((sh_degree + 1) ** 2 - 1, 3)}
    if state == "compact":
        return {**geometry, **constant} if group == "geometry" else {**others}
    return geometry if group == "geometry" else {**constant, **others}


def group_columns(group: str, sh_degree: int, state: StateFormat = "float32") -> dict[str, slice]:
    """Return the columns of each parameter in a group's rows."""
    columns, first = {}, 0
    for name, shape in group_shapes(group, sh_degree, state).items():
        columns[name] = slice(first, first + math.prod(shape))
        first = columns[name].stop
    return columns


def num_columns(group: str, sh_degree: int, state: StateFormat = "float32", *, pad_to_cache_line: bool = False) -> int:
    """Count the columns of a group's rows: geometry fills 48 bytes, appearance whole cache lines of 64 bytes.

    With `pad_to_cache_line` geometry fills a line as well, of which it uses the first 48 bytes. In a compact state both
    groups have 16 columns or a multiple of them, and the appearance one for the scale of each degree
    (`offload/adam/codes.py`).
    """
    values = sum(math.prod(shape) for shape in group_shapes(group, sh_degree, state).values())
    if state == "compact":
        return max(1, -(-(values + (0 if group == "geometry" else sh_degree)) // 16)) * 16
    multiple = 4 if group == "geometry" and not pad_to_cache_line else 16
    return -(-values // multiple) * multiple


def row_bytes(
    group: str,
    sh_degree: int,
    moments: Moments = "float32",
    state: StateFormat = "float32",
    *,
    pad_to_cache_line: bool = False,
    tight: bool = False,
) -> int:
    """Count the bytes of memory that a store of a group takes for each Gaussian.

    While a store on the host changes, it takes up to `host_store.PEAK` times as much.
    """
    if state == "compact":
        return 4 * packed_words(group, sh_degree, tight=tight) + LAST_STEP_BYTES
    value_bytes = 4 + (8 if moments == "float32" else 4)  # of a parameter and two moments
    return num_columns(group, sh_degree, pad_to_cache_line=pad_to_cache_line) * value_bytes + LAST_STEP_BYTES


def compact_bytes(sh_degree: int, *, tight: bool = False) -> int:
    """Count the bytes of a Gaussian's rows of both groups in a compact state: 328 at SH degree 3, or 312 if tight."""
    return sum(row_bytes(group, sh_degree, state="compact", tight=tight) for group in GROUP_NAMES)


@dataclass(frozen=True)
class RowLayout:
    """Which columns of a group's rows hold which parameter."""

    shapes: dict[str, tuple[int, ...]]  # of one Gaussian's values
    columns: dict[str, slice]
    num_columns: int  # that optimizers work on; rows in memory may have more, which are zero, or be tight
    state: StateFormat = "float32"  # the form of rows

    @classmethod
    def of(cls, group: str, sh_degree: int, state: StateFormat = "float32") -> RowLayout:
        """Return the layout of a group."""
        of_group = group, sh_degree, state
        return cls(group_shapes(*of_group), group_columns(*of_group), num_columns(*of_group), state)

    @property
    def has_constant(self) -> bool:
        """Tell whether rows begin with the constant harmonic."""
        return next(iter(self.columns), None) == "sh0"

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
                stored[first : first + COPY_ROWS] = storable(parameters[name][first : first + COPY_ROWS], stored)

    def to_render(self, rows: Tensor) -> dict[str, Tensor]:
        """Name rows [M, columns] as rendering takes them: views of the rows.

        Where sh0 and shN lie side by side they are one `colors` [M, K, 3]. Where shN is alone and rows are as long as
        whole coefficients it is all of them, [M, columns / 3, 3], whose last one no degree uses: its gradient is that
        of the rows then, and need not be copied there.
        """
        if "shN" not in self.shapes:
            return self.named(rows)
        num_values = self.columns["shN"].stop
        if "sh0" in self.shapes:
            return {"colors": rows[:, :num_values].view(len(rows), num_values // 3, 3)}
        if rows.shape[1] % 3:
            return self.named(rows)
        return {"shN": rows.view(len(rows), rows.shape[1] // 3, 3)}  # also where there are no rows


@dataclass(frozen=True)
class RowState:
    """Parameters and Adam moments of rows, [rows, columns] each; the values of a row are contiguous.

    Rows in a store may have more columns than those of a view; the others are zero. In a compact store parameters and
    moments of a row lie side by side (`packed_rows`), and tight rows lack columns that are zero.

    Attributes:
        parameters: float32; or float16, in the appearance of a compact store.
        moments: The first and the second, float32; or both in one tensor, as pairs (int32, `offload/adam/bfloat16.py`)
            or as codes (int16, `offload/adam/codes.py`); or none, where they are left on the host.
    """

    parameters: Tensor
    moments: tuple[Tensor, ...]

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

    @property
    def moments_bytes(self) -> int:
        """Count the bytes of a row's moments."""
        return sum(moment.shape[1] * moment.element_size() for moment in self.moments)

    @property
    def row_bytes(self) -> int:
        """Count the bytes of a row."""
        return self.parameters.shape[1] * self.parameters.element_size() + self.moments_bytes

    def new_empty(self, rows: int, device: torch.device) -> RowState:
        """Allocate space for rows like these, each tensor by itself."""
        parameters, *moments = (tensor.new_empty(rows, tensor.shape[1], device=device) for tensor in self.tensors())
        return RowState(parameters, tuple(moments))


class PackedState(RowState):
    """Holds the rows of a group in a compact store, whose parameters and moments lie side by side.

    Its attributes are views of the words, made when they are asked for: a kernel takes `integers` alone.
    """

    def __init__(self, words: torch.Tensor, has_codes: bool) -> None:
        """
        Args:
            words: int32 [N, words], contiguous.
            has_codes: Whether moments are codes, and parameters float16; or pairs, and float32.
        """
        self.__dict__.update(words=words, has_codes=has_codes)

    words: torch.Tensor
    has_codes: bool

    @cached_property
    def integers(self) -> torch.Tensor:
        """Return the rows [N, 2 * columns] as integers: int16 where there are codes, or int32."""
        return self.words.view(torch.int16) if self.has_codes else self.words

    @cached_property
    def parameters(self) -> torch.Tensor:
        return self.words.view(torch.float16 if self.has_codes else torch.float32)[:, : self.integers.shape[1] // 2]

    @cached_property
    def moments(self) -> tuple[torch.Tensor, ...]:
        return (self.integers[:, self.integers.shape[1] // 2 :],)


@dataclass(frozen=True)
class ResidentRows:
    """Rows of compact stores that lie on the device, and are read and written there in place of the stores."""

    places: torch.Tensor  # int32 [N] on the device, where each Gaussian is among `rows`; -1 where it is not
    rows: list[PackedRows]  # of each group, R of them
    moved: torch.Tensor  # int64 [2], how many rows have been read and written here; whoever does so counts


def storable(values: Tensor, stored: Tensor) -> Tensor:
    """Return values in the number format of a store; those beyond the range of float16 become the largest."""
    values = values.detach()
    return (values.clamp(-HALF_MAX, HALF_MAX) if stored.dtype == torch.float16 else values).to(stored)


def packed_words(group: str, sh_degree: int, *, tight: bool = False) -> int:
    """Count the 32-bit words of a group's rows in a compact store.

    Args:
        group: "geometry" or "appearance".
        sh_degree: Degree of the spherical harmonics.
        tight: Whether rows of geometry lack the columns that are zero; those of the appearance are the same.
    """
    if group == "geometry":
        return TIGHT_WORDS if tight else 2 * num_columns(group, sh_degree, "compact")
    return num_columns(group, sh_degree, "compact")


def packed_rows(words: Tensor, group: str) -> PackedState:
    """Return the rows of a group in a compact store, whose parameters and moments lie side by side.

        geometry    128 bytes: 16 columns of float32, and as many pairs of moments in bfloat16;
                    tight, on the device, 112: 14 columns, and as many pairs
        appearance  192 bytes (at degree 3): 48 columns of float16, and as many of codes

    Args:
        words: int32 [N, words], contiguous.
        group: "geometry" or "appearance".

    Returns:
        Views of the words.
    """
    return PackedState(words, has_codes=group != "geometry")


def with_words(rows: Tensor, num_words: int) -> Tensor:
    """Return packed rows [M, words] in so many words: those of geometry may become tight, or cease to be.

    Raises:
        ValueError: They have no such form.
    """
    if rows.shape[1] == num_words:
        return rows
    if {rows.shape[1], num_words} != {TIGHT_WORDS, packed_words("geometry", 0)}:
        raise ValueError(f"packed rows of {rows.shape[1]} words cannot have {num_words}")
    halves = rows.view(len(rows), 2, rows.shape[1] // 2)
    return pad(halves, (0, num_words // 2 - halves.shape[2])).view(len(rows), num_words)  # less than none cuts off
