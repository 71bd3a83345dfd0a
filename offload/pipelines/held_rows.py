"""Rows of a view that are decoded some at a time, and whose gradient is made so, too.

Of a large view neither the values nor the gradient of the appearance are whole on the device at any time: whoever
renders it asks for the coefficients of a block when it has a use for them, and leaves what makes their gradient when
the block is stepped. A view of few rows, of which it would cost launches and save little, has tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from offload.store.layout import RowLayout

WHOLE_ROWS = 1 << 19  # of the largest view that has tensors: 100 MB of values, and as many of gradients
BLOCK_ROWS = 1 << 18  # of a block


class HeldRows:
    """Holds V rows of the group "appearance"; `rendering/held_colors.py` says what is asked of it.

    Attributes:
        grad: What all gradients are made of, or None: there are none. Where it is set to zero they are zero.
    """

    def __init__(self, count: int, layout: RowLayout, decode: Callable[[slice], Tensor]) -> None:
        """
        Args:
            count: V.
            layout: Of the rows.
            decode: Gives the values [n, columns] of a block.
        """
        self.grad: Tensor | None = None
        self._count = count
        self._layout = layout
        self._decode = decode
        self._gradient: Callable[[slice], Tensor] | None = None

    def blocks(self) -> list[slice]:
        """Return the rows that are decoded together, block after block."""
        return [slice(first, min(first + BLOCK_ROWS, self._count)) for first in range(0, self._count, BLOCK_ROWS)]

    def values(self, rows: slice) -> Tensor:
        """Decode the values [n, columns] of a block."""
        return self._decode(rows)

    def coefficients(self, rows: slice) -> Tensor:
        """Decode the harmonics [n, K - 1, 3] of a block."""
        return self._layout.to_render(self._decode(rows))["shN"]

    def owe(self, v_colors: Tensor, gradient: Callable[[slice], Tensor]) -> None:
        """Take what makes the gradient.

        Args:
            v_colors: Becomes `grad`.
            gradient: Makes the gradient of `coefficients`, of a block.

        Raises:
            RuntimeError: There is some already.
        """
        if self.grad is not None:
            raise RuntimeError("a view of this many rows can be rendered with gradients once in a step")
        self.grad, self._gradient = v_colors, gradient

    def gradient(self, rows: slice) -> Tensor:
        """Make the gradient [n, columns] of the values of a block; zero where nothing was drawn."""
        count, columns = rows.stop - rows.start, self._layout.num_columns
        if self.grad is None or self._gradient is None:
            return torch.zeros_like(self._decode(rows))
        found = self._gradient(rows).reshape(count, -1)
        return torch.nn.functional.pad(found, (0, columns - found.shape[1])) if found.shape[1] < columns else found
