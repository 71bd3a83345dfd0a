"""Ids of the rows that a view might see, without a scene."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MEAN_RUN = 50  # rows; in Morton order a view's rows come in runs


def runs_of_rows(n: int, visible: float, rng: np.random.Generator) -> Tensor:
    """Draw sorted ids: runs and the gaps between them have geometric lengths."""
    mean_gap = MEAN_RUN * (1 - visible) / visible
    count = int(2 * n / (MEAN_RUN + mean_gap)) + 10  # runs enough to pass n
    lengths = np.stack([rng.geometric(1 / mean_gap, count), rng.geometric(1 / MEAN_RUN, count)], 1)
    mask = np.repeat(np.tile([False, True], count), lengths.reshape(-1))[:n]
    return torch.from_numpy(np.flatnonzero(mask))


def random_rows(n: int, visible: float, rng: np.random.Generator) -> Tensor:
    """Draw sorted ids, each row with the same probability."""
    return torch.from_numpy(np.flatnonzero(rng.random(n) < visible))


KINDS = {"Morton runs": runs_of_rows, "random rows": random_rows}
