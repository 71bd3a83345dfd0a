"""Morton order: neighbours in space become neighbours in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from offload.backends import native, num_threads

CELLS = 1 << 21  # along each axis; three times 21 bits fill a code
SAMPLE = 20_000
OUTLIERS = 0.01  # share of points on either side of an axis that may lie outside the cells


def morton_order(means: Tensor) -> Tensor:
    """Order of points along a Morton curve through cubic cells.

    The cells span the bulk of the points; a few that are far away fall into the outermost cells, and do not make
    the cells of all others coarse.

    Args:
        means: [N, 3] float32 positions in world units; a strided view will do.

    Returns:
        [N] int64 permutation: `means[order]` is sorted. Points in one cell stay in their order.
    """
    means = means.detach().cpu()
    order = torch.empty(len(means), dtype=torch.int64)
    sample = means[:: len(means) // SAMPLE + 1]
    sample = sample[sample.isfinite().all(dim=1)].double().sort(dim=0).values  # [S, 3]
    if len(sample) == 0:
        return torch.arange(len(means))
    outside = int(OUTLIERS * len(sample))
    lower, upper = sample[outside], sample[len(sample) - 1 - outside]  # [3]
    margin = 0.5 * (upper - lower).max()
    lower, upper = torch.maximum(lower - margin, sample[0]), torch.minimum(upper + margin, sample[-1])
    extent = float((upper - lower).max())
    cells_per_unit = CELLS / extent if extent > 0 else 0.0
    native.morton_order(means.numpy(), lower.tolist(), cells_per_unit, order.numpy(), num_threads())
    return order
