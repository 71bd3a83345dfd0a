"""What is known of pairs of a camera and a Gaussian, side by side in rows that travel, and taken apart again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pack(columns: Sequence[Tensor], places: Tensor | None, spoiled: Tensor | None = None) -> Tensor:
    """Lay the columns of pairs side by side.

    Args:
        columns: [P] or [P, w] each, at most six, of the first one's kind or of integers that it can hold exactly, as
            float32 does up to 2^24.
        places: int64 [P], the row of each pair, of which each is one pair's; None: they are in order.
        spoiled: uint8 scalar, zero, which becomes 1 if some value is not finite; None: nobody asks.

    Returns:
        Rows [P, D], of the first one's kind.
    """
    rows = torch.cat([_as_matrix(column).to(columns[0].dtype) for column in columns], dim=1)
    if spoiled is not None:
        spoiled.copy_(~rows.isfinite().all())
    return rows if places is None else torch.empty_like(rows).index_copy_(0, places, rows)


def unpack(
    rows: Tensor,
    columns: Sequence[Tensor],
    places: Tensor | None,
    divisor: float | None = None,
    spoiled: Tensor | None = None,
) -> None:
    """Write the rows of pairs to their columns.

    Args:
        rows: [P, D].
        columns: As for `pack`, contiguous; they are written.
        places: As for `pack`.
        divisor: What values are divided by.
        spoiled: uint8 scalar; where it is not zero all values become NaN.
    """
    if places is not None:
        rows = rows.index_select(0, places)
    if divisor is not None:
        rows = rows / divisor
    if spoiled is not None:
        rows = rows.masked_fill(spoiled.bool(), torch.nan)
    widths = [_as_matrix(column).shape[1] for column in columns]
    for column, values in zip(columns, rows.split(widths, dim=1), strict=True):
        _as_matrix(column).copy_(values)


def _as_matrix(column: Tensor) -> Tensor:
    return column if column.ndim == 2 else column[:, None]
