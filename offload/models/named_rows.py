"""Rows of several parameters side by side, named for rendering, whose gradients come back as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from offload.backends import kernels_for
from offload.store.layout import RowLayout


def named_rows(layout: RowLayout, rows: Tensor) -> dict[str, Tensor]:
    """Name the parameters in rows [V, columns]: views of the rows, whose gradients are joined by one kernel.

    Autograd would join them as it joins any tensors along their short side, which takes ten times as long.
    """
    widths = tuple(columns.stop - columns.start for columns in layout.columns.values())
    parts = _Parts.apply(rows, widths, tuple(layout.shapes[name] for name in layout.columns))
    return dict(zip(layout.columns, parts, strict=True))


class _Parts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, rows: Tensor, widths: tuple[int, ...], shapes: tuple[tuple[int, ...], ...]
    ) -> tuple[Tensor, ...]:
        ctx.widths, ctx.shape = widths, rows.shape  # type: ignore[attr-defined]
        ctx.set_materialize_grads(False)
        count, columns = rows.shape
        parts = rows.split_with_sizes([*widths, columns - sum(widths)], dim=1)
        # Shaped here, or autograd would go back through each of these views by itself.
        return tuple(part.view(count, *shape) for part, shape in zip(parts, shapes, strict=False))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        given = next((gradient for gradient in gradients if gradient is not None), None)
        if given is None:
            return None, None, None
        (count, columns), widths = ctx.shape, ctx.widths  # type: ignore[attr-defined]
        parts = [
            given.new_zeros(count, width) if gradient is None else gradient.reshape(count, width)
            for gradient, width in zip(gradients, widths, strict=True)
        ]
        return kernels_for(given.device, __name__).join(parts, columns), None, None


def join(parts: Sequence[Tensor], columns: int) -> Tensor:
    """Lay tensors [V, ...] side by side, and zeros behind them, in rows [V, columns]."""
    beyond = columns - sum(part.shape[1] for part in parts)
    return torch.cat([*parts, parts[0].new_zeros(len(parts[0]), beyond)], dim=1)
