"""Visible ids of cameras, from rows of geometry on the host.

Culling, here as in `offload/culling/kernels.py`, answers for gsplat's projection (1.5.3): a Gaussian is drawn where its
depth lies between the planes, its opacity (times the compensation of Mip-Splatting when antialiased) is at least 1/255,
and a rectangle around its centre meets the picture, of radii ceil(extent * sqrt(cov + eps2d)) with
extent = min(3.33, sqrt(2 ln(255 opacity))). None that is drawn is ever left out: every bound allows for float rounding,
in the rasterizer and here, and for the margin. What is returned in excess is a matter of that rounding, far below one
percent without a margin.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from offload.backends import native, num_threads
from offload.culling.cameras import Cameras, Margin, pack


class BlockBounds:
    """Bound blocks of consecutive geometry rows, so that most of a large scene is culled without reading it.

    In Morton order a block is small. The bounds take 32 bytes for each block of 256 rows; the space that `visible_ids`
    works in is kept here too.
    """

    def __init__(self, geometry: Tensor) -> None:
        """
        Args:
            geometry: [N, 12] float32 on the CPU, or these columns of wider rows: means 3, log scales 3, quats 4, logit
                opacities 1, unused 1.
        """
        self.rebuild(geometry)

    def rebuild(self, geometry: Tensor) -> None:
        """Bound all blocks anew, for any number of rows: after densification, or when all rows have moved."""
        blocks = -(-len(geometry) // native.BLOCK_ROWS)
        self.rows = len(geometry)
        self.bounds = torch.empty(blocks, 8)  # low 3, high 3 of the means; largest scale; unused
        self.bits = torch.empty(blocks * native.BLOCK_WORDS, dtype=torch.int64)  # one per row
        self.chunk_ends = torch.empty(-(-blocks // native.CHUNK_BLOCKS), dtype=torch.int64)
        native.compute_bounds(_array(geometry), self.bounds.numpy(), num_threads())

    def update(self, geometry: Tensor, ids: Tensor) -> None:
        """Bound the blocks of rows that have moved.

        Args:
            geometry: As before.
            ids: Sorted int64 [V], the rows.
        """
        self.check(geometry)
        if len(ids) and not 0 <= ids[0] <= ids[-1] < self.rows:
            raise ValueError(f"ids reach from {ids[0]} to {ids[-1]}, but there are {self.rows} rows")
        native.compute_bounds_of(_array(geometry), ids.numpy(), self.bounds.numpy(), num_threads())

    def check(self, geometry: Tensor) -> None:
        """Raise ValueError where these are bounds of another number of rows."""
        if len(geometry) != self.rows:
            raise ValueError(f"{len(geometry)} rows of geometry, but bounds of {self.rows}; rebuild them")


def _array(geometry: Tensor) -> np.ndarray:
    return geometry.detach().numpy()


def visible_ids(
    geometry: Tensor,
    bounds: BlockBounds,
    cameras: Cameras,
    margin: Margin | None = None,
    out: Tensor | None = None,
    *,
    pin: bool = False,
) -> Tensor:
    """Find the rows that any of the cameras may draw, on the CPU, in parallel.

    Args:
        geometry: As for `BlockBounds`.
        bounds: Of the same rows.
        cameras: The pictures to be drawn.
        margin: How much the rows may still move.
        out: int64 [M] to write the ids to, M large enough; without it memory is allocated.
        pin: Allocate memory that a GPU copies from without waiting; torch keeps it for the next call.

    Returns:
        Sorted int64 [V]; the first V of `out`, where given.

    Raises:
        ValueError: bounds of another number of rows, or `out` too small.
    """
    bounds.check(geometry)
    threads = num_threads()
    work = (bounds.bits.numpy(), bounds.chunk_ends.numpy())
    packed = pack(cameras, margin or Margin())
    count = native.mark_visible(_array(geometry), bounds.bounds.numpy(), packed, *work, threads)
    if out is None:
        out = torch.empty(count, dtype=torch.int64, pin_memory=pin)
    elif len(out) < count:
        raise ValueError(f"{count} Gaussians are visible, but `out` holds {len(out)}")
    ids = out[:count]
    native.write_marked(*work, ids.numpy(), threads)
    return ids
