"""Rows of geometry in a compact state, named and activated for rendering, whose gradients come back as one.

Operation by operation, rendering would copy the columns of means and quats, compute scales and opacities, and go back
through each of these by itself: eight kernels, and as many nodes of autograd, each of which takes a GPU longer to be
given than to do. Here one kernel goes forward, and one back.

What rendering takes are copies, 56 bytes a row. So nobody need hold the rows of 64 bytes that these are made of, and
their leaf may have no memory (`leaf_without_values` of `offload/pipelines/groups.py`): log scales and logit opacities,
which regularizers and noise alone ask for, are read once more then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from offload.backends import kernels_for
from offload.store.layout import RowLayout


class NamedRows(MutableMapping[str, Any]):
    """Holds rows [V, ...] of parameters by name, and what rendering takes of some of them, where it has been made.

    Attributes:
        activated: `scales` [V, 3], standard deviations, and `opacities` [V] in 0..1; or nothing.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._values: dict[str, Any] = dict(parameters)
        self._logs: Callable[[], tuple[Tensor, Tensor]] | None = None  # makes the values that are None
        self.activated: dict[str, Tensor] = {}

    def take(self, layout: RowLayout, leaf: Tensor, read: Callable[[], Tensor]) -> None:
        """Take the parameters in rows [V, 16] of geometry in a compact state, and activate them: all of it copies.

        Args:
            layout: Of the rows.
            leaf: [V, 16], which receives their gradient.
            read: Returns the rows, without a gradient; until these are changed.
        """
        means, quats, sh0, scales, opacities, both_logs = _Named.apply(leaf, read)
        self._values |= {"means": means, "scales": None, "quats": quats, "opacities": None, "sh0": sh0}
        self._logs = lambda: _Logs.apply(both_logs, layout, read)
        self.activated = {"scales": scales, "opacities": opacities}

    def __getitem__(self, name: str) -> Any:
        value = self._values[name]
        if value is None and self._logs is not None:
            with torch.enable_grad():  # whoever asks first may want no gradient, and others do
                both, self._logs = self._logs(), None
            for key, made in zip(("scales", "opacities"), both, strict=True):
                if key in self._values and self._values[key] is None:
                    self._values[key] = made
            value = self._values[name]
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __setitem__(self, name: str, value: Any) -> None:
        self._values[name] = value

    def __delitem__(self, name: str) -> None:
        del self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class _Named(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, leaf: Tensor, read: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        means, quats, sh0, scales, opacities = kernels_for(leaf.device, __name__).activated(read())
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(scales, opacities)
        # [V, 4], of which nobody looks at the values: through it comes the gradient of what `_Logs` returns.
        both_logs = means.new_empty(1, 1).expand(len(means), 4)
        return means, quats, sh0, scales, opacities, both_logs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        given = next((gradient for gradient in gradients if gradient is not None), None)
        if given is None:
            return None, None
        v_means, v_quats, v_sh0, v_scales, v_opacities, v_logs = gradients
        v_log_scales, v_logits = (None, None) if v_logs is None else (v_logs[:, :3], v_logs[:, 3])
        parts = (v_means, v_log_scales, v_quats, v_logits, v_sh0, v_scales, v_opacities)
        return kernels_for(given.device, __name__).joined(parts, *ctx.saved_tensors), None


class _Logs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both_logs: Tensor, layout: RowLayout, read: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        named = layout.named(read())
        return named["scales"].clone(), named["opacities"].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v_log_scales: Tensor, v_logits: Tensor) -> tuple[Tensor, None, None]:
        return torch.cat([v_log_scales, v_logits[:, None]], dim=1), None, None


def activated(rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return of rows [V, 16] means [V, 3], quats [V, 4], sh0 [V, 1, 3], standard deviations [V, 3] and opacities [V].

    None of them is a view of the rows; opacities are in 0..1.
    """
    named = RowLayout.of("geometry", 0, "compact").named(rows)
    means, quats, sh0 = (named[name].clone() for name in ("means", "quats", "sh0"))
    return means, quats, sh0, torch.exp(named["scales"]), torch.sigmoid(named["opacities"])


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
