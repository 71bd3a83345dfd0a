"""Packed rows of geometry, tight or not, for tests that compare them or put them into the other form."""

from __future__ import annotations

import torch
from torch import Tensor

USED = 14  # columns with values, and pairs of moments


def same_rows(actual: Tensor, expected: Tensor) -> bool:
    """Tell whether rows [N, words] are the same bit for bit, and nothing but zeros is in columns of one alone."""
    halves, others = (rows.reshape(len(rows), 2, rows.shape[1] // 2) for rows in (actual.cpu(), expected.cpu()))
    unused = halves[..., USED:].any() or others[..., USED:].any()
    return not unused and torch.equal(halves[..., :USED], others[..., :USED])


def in_other_form(rows: Tensor) -> Tensor:
    """Return a copy of rows of 32 words as 28, or of 28 as 32."""
    columns = rows.shape[1] // 2
    values, moments = rows[:, :USED], rows[:, columns : columns + USED]
    none = rows.new_zeros(len(rows), 2 if columns == USED else 0)
    return torch.cat([values, none, moments, none], dim=1)
