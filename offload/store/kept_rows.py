"""Rows of tensors that live on a device which may be full."""

from __future__ import annotations

import torch
from torch import Tensor


def kept_rows(value: Tensor, ids: Tensor) -> Tensor:
    """Return these rows [M] of a tensor, in this order; where memory is short, in place of its first rows.

    So that rows can be removed from one tensor after the other without the fear that it stops half-way.
    """
    try:
        return value[ids]
    except torch.cuda.OutOfMemoryError:
        kept = value[: len(ids)]
        kept.copy_(value.cpu()[ids.cpu()])
        return kept
