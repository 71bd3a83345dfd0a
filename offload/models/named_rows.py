"""Rows of geometry in a compact state, named and activated for rendering, whose gradients come back as one.

Operation by operation, rendering would copy the columns of means and quats, compute scales and opacities, and go back
through each of these by itself: eight kernels, and as many nodes of autograd, each of which takes a GPU longer to be
given than to do. Here one kernel goes forward, and one back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from offload.backends import kernels_for
from offload.store.layout import RowLayout


class NamedRows(dict[str, Any]):
    """Holds rows [V, ...] of parameters by name, and what rendering takes of some of them, where it has been made.

    Attributes:
        activated: `scales` [V, 3], standard deviations, and `opacities` [V] in 0..1; or nothing.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__(parameters)
        self.activated: dict[str, Tensor] = {}


def named_rows(layout: RowLayout, rows: Tensor) -> NamedRows:
    """Name the parameters in rows [V, 16] of geometry in a compact state, and activate them.

    Means and quats are copies, which stay as they are where the rows change; all others are views of the rows.
    """
    *parameters, scales, opacities = _Named.apply(rows, layout)
    named = NamedRows(dict(zip(layout.columns, parameters, strict=True)))
    named.activated = {"scales": scales, "opacities": opacities}
    return named


class _Named(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, layout: RowLayout) -> tuple[Tensor, ...]:
        means, quats, scales, opacities = kernels_for(rows.device, __name__).activated(rows)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(scales, opacities)
        named = {**layout.named(rows), "means": means, "quats": quats}
        return *named.values(), scales, opacities

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        given = next((gradient for gradient in gradients if gradient is not None), None)
        if given is None:
            return None, None
        return kernels_for(given.device, __name__).joined(gradients, *ctx.saved_tensors), None


def activated(rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return of rows [V, 16] means [V, 3], quats [V, 4], standard deviations [V, 3] and opacities [V] in 0..1.

    None of them is a view of the rows.
    """
    layout = RowLayout.of("geometry", 0, "compact")
    named = layout.named(rows)
    return named["means"].clone(), named["quats"].clone(), torch.exp(named["scales"]), torch.sigmoid(named["opacities"])


def joined(gradients: Sequence[Tensor | None], scales: Tensor, opacities: Tensor) -> Tensor:
    """Return the gradient of rows [V, 16].

    Args:
        gradients: Of the five parameters, in the order of their columns, and of activated scales and opacities; None is
            zero.
        scales: [V, 3], as `activated` has returned them.
        opacities: [V], the same.
    """
    *of_parameters, v_scales, v_opacities = gradients
    layout = RowLayout.of("geometry", 0, "compact")
    parts = dict(zip(layout.columns, of_parameters, strict=True))
    if v_scales is not None:
        parts["scales"] = _sum(parts["scales"], v_scales * scales)
    if v_opacities is not None:
        parts["opacities"] = _sum(parts["opacities"], torch.ops.aten.sigmoid_backward(v_opacities, opacities))
    count = len(scales)
    widths = {name: columns.stop - columns.start for name, columns in layout.columns.items()}
    return join(
        [
            scales.new_zeros(count, widths[name]) if part is None else part.reshape(count, widths[name])
            for name, part in parts.items()
        ],
        layout.num_columns,
    )


def _sum(one: Tensor | None, other: Tensor) -> Tensor:
    return other if one is None else one + other


def join(parts: Sequence[Tensor], columns: int) -> Tensor:
    """Lay tensors [V, ...] side by side, and zeros behind them, in rows [V, columns]."""
    beyond = columns - sum(part.shape[1] for part in parts)
    return torch.cat([*parts, parts[0].new_zeros(len(parts[0]), beyond)], dim=1)
