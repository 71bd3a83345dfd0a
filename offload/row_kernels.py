"""What a device does with rows that live in pinned host memory, in plain torch.

`offload/row_kernels_triton.py` has the same four functions as CUDA kernels. The mathematics of skipped steps is
explained in `offload/adam.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offload.catch_up import CatchUpTables, StepSizes


@dataclass(frozen=True)
class RowState:
    """Rows and their Adam moments, float32 [rows, columns] each, contiguous; columns are a multiple of 4."""

    parameters: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    def __getitem__(self, rows: slice) -> RowState:
        return RowState(self.parameters[rows], self.exp_avg[rows], self.exp_avg_sq[rows])

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.parameters, self.exp_avg, self.exp_avg_sq


def fetch_rows(
    host: RowState, stamps: Tensor, ids: Tensor, wanted: Tensor | None, out: RowState, tables: CatchUpTables
) -> None:
    """Copy rows from the host to the device and apply the steps that they have skipped.

    Args:
        host: N rows, pinned.
        stamps: [N] int32 on the device, the step of each row's last update.
        ids: [V] int64 on the device, which rows.
        wanted: [V] bool; rows of `out` where it is False are left alone. None: all are wanted.
        out: V rows on the device: the values after step `tables.step`.
        tables: Of the skipped steps.
    """
    places = _places(wanted, len(ids), ids.device)
    ids = ids[places]
    w, m, v = (tensor[ids] for tensor in host.tensors())
    old = stamps[ids].long()  # [M]
    skipped = tables.sums[:, old].float().T @ tables.multipliers  # [M, columns]
    decays = tables.decays[:, tables.step - old]  # [2, M] float64
    out.parameters[places] = w - skipped * (m / (v.sqrt() + tables.eps))
    out.exp_avg[places] = m * decays[0].float()[:, None]
    out.exp_avg_sq[places] = (v * decays[1][:, None]).float()


def read_rows(host: RowState, stamps: Tensor, ids: Tensor, out: Tensor, tables: CatchUpTables) -> None:
    """As `fetch_rows`, of all ids, without the moments: `out` [V, columns] receives the parameters."""
    fetch_rows(host, stamps, ids, None, RowState(out, torch.empty_like(out), torch.empty_like(out)), tables)


def step_rows(rows: RowState, gradients: Tensor, step: StepSizes) -> None:
    """One Adam step in place.

    Args:
        rows: V rows on the device, as they are after the step before.
        gradients: [V, columns].
        step: Its sizes.
    """
    # Written as a change, so that 1 - b, not b, is rounded to float32: v would remember that for 1000 steps.
    rows.exp_avg.add_(gradients - rows.exp_avg, alpha=1 - step.betas[0])
    rows.exp_avg_sq.add_(gradients.square() - rows.exp_avg_sq, alpha=1 - step.betas[1])
    rows.parameters.sub_(step.sizes * (rows.exp_avg / (rows.exp_avg_sq.sqrt() + step.eps)))


def move_rows(rows: RowState, sources: Tensor, out: RowState) -> None:
    """Copy rows from one place on the device to another.

    Args:
        rows: V rows.
        sources: [W] int64: out[i] = rows[sources[i]], where that is not negative.
        out: W rows.
    """
    places = (sources >= 0).nonzero().squeeze(1)
    for tensor, destination in zip(rows.tensors(), out.tensors(), strict=True):
        destination[places] = tensor[sources[places]]


def write_rows(rows: RowState, ids: Tensor, wanted: Tensor | None, host: RowState, stamps: Tensor, step: int) -> None:
    """Copy rows from the device to the host, and stamp them.

    Args:
        rows: V rows on the device, as they are after `step`.
        ids: [V] int64 on the device, the rows of the host that they are.
        wanted: [V] bool; where it is False nothing is written. None: all are wanted.
        host: N rows, pinned.
        stamps: [N] int32 on the device.
        step: The stamp.
    """
    places = _places(wanted, len(ids), ids.device)
    ids = ids[places]
    for tensor, destination in zip(rows.tensors(), host.tensors(), strict=True):
        destination[ids] = tensor[places]
    stamps[ids] = step


def _places(wanted: Tensor | None, count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device) if wanted is None else wanted.nonzero().squeeze(1)
