"""Deferred Adam in plain torch: the readable counterpart of the native kernels, slow and in any precision.

The mathematics are those in `offload/adam/deferral.py`, written as they stand there: C_t(s) is kept for every s and
renewed entirely at each step.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from offload.store.layout import RowState


class ReferenceAdam:
    """The interface of `DeferredAdam`; rows may be of any floating type, unchecked.

    Args:
        multipliers: [schedules, columns], betas, eps: as for `DeferredAdam`.
    """

    def __init__(self, multipliers: Tensor, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-15) -> None:
        self.multipliers = multipliers.to(torch.float64)
        self.betas = betas
        self.eps = eps
        self.step = 0
        self._before = torch.zeros(1, len(multipliers), dtype=torch.float64)  # [t, schedules] C_{t-1}(s), s < t
        self._after = self._before  # [t + 1, schedules] C_t(s), s <= t
        self._rates = self._before[0] @ self.multipliers  # [columns] step size of step t

    def begin_step(self, learning_rates: Sequence[float]) -> None:
        self.step += 1
        t, (b1, b2) = self.step, self.betas
        rates = torch.tensor(learning_rates, dtype=torch.float64) * (math.sqrt(1 - b2**t) / (1 - b1**t))
        last_steps = torch.arange(t, dtype=torch.float64)  # s
        self._before = self._after
        after = self._before + (b1 / math.sqrt(b2)) ** (t - last_steps)[:, None] * rates
        self._after = torch.cat([after, torch.zeros(1, len(rates), dtype=torch.float64)])  # C_t(t) = 0
        self._rates = rates @ self.multipliers

    def commit(self, rows, last_step, ids, gradients, *, gradient_rows=None) -> None:
        ids = torch.arange(len(last_step)) if ids is None else ids
        state = rows.tensors()
        values = self._updated(rows, last_step, ids, _select(gradients, gradient_rows))
        for tensor, value in zip(state, values, strict=True):
            tensor[ids] = value
        last_step[ids] = self.step

    def forward(self, rows, last_step, ids, out, gradients=None, *, out_rows=None) -> None:
        ids = torch.arange(len(last_step)) if ids is None else ids
        values, _, _ = self._updated(rows, last_step, ids, gradients)
        out[slice(None) if out_rows is None else out_rows] = values

    def commit_and_forward(self, rows, last_step, ids, gradients, out, *, gradient_rows=None) -> None:
        self.commit(rows, last_step, ids, gradients, gradient_rows=gradient_rows)
        self.forward(rows, last_step, ids, out)

    def dense(self, rows, gradients) -> None:
        last_step = torch.full((len(gradients),), self.step - 1, dtype=torch.int32)
        self.commit(rows, last_step, None, gradients)

    def _updated(
        self, rows: RowState, last_step: Tensor, ids: Tensor, gradients: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Parameters and moments of rows after step t, each [V, columns]."""
        b1, b2 = self.betas
        eps = self.eps * math.sqrt(1 - b2**self.step)
        w, m, v = (tensor[ids] for tensor in rows.tensors())
        last_steps = last_step[ids].long()
        skipped = (self._after if gradients is None else self._before)[last_steps] @ self.multipliers  # [V, columns]
        decay = (self.step - last_steps).to(torch.float64)[:, None]  # steps
        w = w - (skipped * (m / (v.sqrt() + eps))).to(w.dtype)
        m = m * (b1**decay).to(w.dtype)
        v = v * (b2**decay).to(w.dtype)
        if gradients is not None:
            m = m + (1 - b1) * gradients
            v = v + (1 - b2) * gradients**2
            w = w - (self._rates * (m / (v.sqrt() + eps))).to(w.dtype)
        return w, m, v


def _select(gradients: Tensor | None, rows: Tensor | None) -> Tensor | None:
    return gradients if gradients is None or rows is None else gradients[rows]
