"""A rectangle of a picture."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Region(NamedTuple):
    """Name the pixels x to x + width, y to y + height of a picture."""

    x: int
    y: int
    width: int
    height: int

    def relative(self, means2d: Tensor) -> Tensor:
        """Take positions [nnz, 2] in pixels of the picture to pixels from this region's corner; differentiable."""
        if self.x == self.y == 0:
            return means2d
        return means2d - means2d.new_tensor([self.x, self.y])
