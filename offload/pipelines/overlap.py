"""Which rows the views before have that the next one needs; here in torch.

`offload/pipelines/overlap_triton.py` has the same function for CUDA, in one kernel: where views are small, launching is
what takes time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from offload.pipelines.groups import positions_among


class Overlap(NamedTuple):
    """Say where each row of the next view comes from: the present view, the one before that, or the host."""

    sources: Tensor  # [V] int64, where it is in the present view; -1 where it is not
    moved: Tensor  # [V] bool, whether it is there
    places: Tensor  # [V] int64, where those that are not are in the view before; -1 where they are not
    nearby: Tensor  # [V] bool, whether they are there
    on_host: Tensor  # [V] bool, whether it is in neither
    leaving: Tensor  # [V of the present view] bool, which rows of that the next one does not need


def overlap(ids: Tensor, present: Tensor, previous: Tensor, num_moved: Tensor) -> Overlap:
    """Find the rows that views have in common.

    Args:
        ids: int64 [V], sorted and unique, of the next view.
        present: The same of the present view.
        previous: The same of the view before that; empty where its rows are not on the device.
        num_moved: int64 scalar, to which the number of rows that are moved is added.
    """
    sources, places = positions_among(present, ids), positions_among(previous, ids)
    moved = sources >= 0
    places = torch.where(moved, -1, places)
    nearby = places >= 0
    num_moved += moved.sum()
    return Overlap(sources, moved, places, nearby, ~moved & ~nearby, positions_among(ids, present) < 0)
