"""What a device does with rows that live in pinned host memory, in plain torch.

`offload/adam/rows_triton.py` has the same functions as CUDA kernels, but for `settle_rows`, which no step needs. The
mathematics of skipped steps is explained in `offload/adam/host.py`.

A row that has skipped steps has its parameters caught up when it is fetched. Its moments stay as they were after its
last update until the next one, which decays them: so they are rounded once per update, and reading rounds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offload.adam.bfloat16 import pack, random_bits, unpack
from offload.adam.deferral import CatchUpTables, adam_step, caught_up, decayed

STEP_ROWS = 1 << 12  # updated at once; what that takes, moments in float32 and their changes, stays small


@dataclass(frozen=True)
class RowState:
    """Rows and their Adam moments, 32-bit words [rows, columns] each, contiguous; columns are a multiple of 4.

    Rows on the host may have more columns than those on the device; the others are zero.
    """

    parameters: Tensor  # float32
    moments: tuple[Tensor, ...]  # the first and the second, float32; or int32 pairs (`offload/adam/bfloat16.py`);
    # or none, where they are left on the host

    def __getitem__(self, rows: slice) -> RowState:
        return RowState(self.parameters[rows], tuple(moment[rows] for moment in self.moments))

    def tensors(self) -> tuple[Tensor, ...]:
        return self.parameters, *self.moments

    def new_empty(self, rows: int, device: torch.device) -> RowState:
        """Space for rows like these."""
        parameters, *moments = (tensor.new_empty(rows, tensor.shape[1], device=device) for tensor in self.tensors())
        return RowState(parameters, tuple(moments))


def fetch_rows(
    source: RowState,
    places: Tensor,
    ids: Tensor | None,
    stamps: Tensor,
    wanted: Tensor | None,
    out: RowState,
    tables: CatchUpTables,
) -> None:
    """Copy rows and apply to their parameters the steps that they have skipped.

    Args:
        source: Rows in pinned memory or on the device.
        places: [V] int64 on the device, which of them.
        ids: [V] int64 on the device, which Gaussians they are; None: `stamps` are those of these rows.
        stamps: [N] int32 on the device, the step of each Gaussian's last update; [V] without `ids`.
        wanted: [V] bool; rows of `out` where it is False are left alone. None: all are wanted.
        out: V rows on the device: the values after step `tables.step`, and the moments, where it has any, after the
            last update.
        tables: Of the skipped steps.
    """
    chosen = _chosen(wanted)
    places = places[chosen]
    moments = [moment[places, : tables.columns] for moment in source.moments]
    stamps = stamps[chosen] if ids is None else stamps[ids[chosen]]
    w = source.parameters[places, : tables.columns]
    out.parameters[chosen] = caught_up(w, *_moments(moments), stamps, tables)
    for moment, fetched in zip(out.moments, moments, strict=False):
        moment[chosen] = fetched


def step_rows(rows: RowState, ids: Tensor, stamps: Tensor, gradients: Tensor, tables: CatchUpTables) -> None:
    """Adam's step `tables.step` in place, and the decay of the moments in the steps skipped before.

    Args:
        rows: V rows on the device, as `fetch_rows` gives them.
        ids: [V] int64 on the device, which Gaussians they are.
        stamps: [N] int32 on the device, the step of each Gaussian's last update; becomes the step.
        gradients: [V, columns].
        tables: After `begin_step`.
    """
    for first in range(0, len(ids), STEP_ROWS):
        chunk = slice(first, first + STEP_ROWS)
        block, block_ids = rows[chunk], ids[chunk]
        m, v = _stepped(block, stamps[block_ids], gradients[chunk], tables)
        _store_moments(block, m, v, block_ids, tables.step)
    stamps[ids] = tables.step


def step_host_rows(
    parameters: Tensor, ids: Tensor, stamps: Tensor, gradients: Tensor | None, host: RowState, tables: CatchUpTables
) -> None:
    """`step_rows` of rows whose moments are on the host: they are read there, and all of a row is written there.

    Args:
        parameters: [V, columns] on the device, as `fetch_rows` gives them; receives the new values.
        ids: [V] int64 on the device, the rows of the host that they are.
        stamps: [V] int32 on the device, the step of each row's last update; stays.
        gradients: [V, columns]. None: there are none, and moments are brought to the step of the parameters.
        host: N rows, pinned; the values in it are as old as the moments.
        tables: As for `step_rows`, or `settle_rows` without gradients.
    """
    rows = RowState(parameters, tuple(moment[ids, : tables.columns] for moment in host.moments))
    if gradients is None:
        m, v = decayed(*_moments(rows.moments), tables.step - stamps, tables)
    else:
        m, v = _stepped(rows, stamps, gradients, tables)
    _store_moments(rows, m, v, ids, tables.step)
    write_rows(rows, ids, None, host)


def settle_rows(rows: RowState, ids: Tensor, stamps: Tensor, tables: CatchUpTables) -> None:
    """Bring the moments of fetched rows to the step of their parameters, without a gradient; as `step_rows`."""
    m, v = decayed(*_moments(rows.moments), tables.step - stamps[ids], tables)
    _store_moments(rows, m, v, ids, tables.step)
    stamps[ids] = tables.step


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


def write_rows(rows: RowState, ids: Tensor, wanted: Tensor | None, host: RowState) -> None:
    """Copy rows from the device to the host.

    Args:
        rows: V rows on the device.
        ids: [V] int64 on the device, the rows of the host that they are.
        wanted: [V] bool; where it is False nothing is written. None: all are wanted.
        host: N rows, pinned.
    """
    chosen = _chosen(wanted)
    ids = ids[chosen]
    for tensor, destination in zip(rows.tensors(), host.tensors(), strict=True):
        destination[ids, : tensor.shape[1]] = tensor[chosen]


def _chosen(wanted: Tensor | None) -> Tensor | slice:
    return slice(None) if wanted is None else wanted.nonzero().squeeze(1)


def _moments(stored: tuple[Tensor, ...] | list[Tensor]) -> tuple[Tensor, Tensor]:
    """Both moments in float32."""
    return (stored[0], stored[1]) if len(stored) == 2 else unpack(stored[0])


def _stepped(rows: RowState, stamps: Tensor, gradients: Tensor, tables: CatchUpTables) -> tuple[Tensor, Tensor]:
    """Adam's step `tables.step` on parameters in place; both moments [V, columns] float32 after it."""
    step = tables.step_sizes()
    m, v = decayed(*_moments(rows.moments), tables.step - 1 - stamps, tables)
    adam_step(rows.parameters, m, v, gradients, step.sizes, step)
    return m, v


def _store_moments(rows: RowState, m: Tensor, v: Tensor, ids: Tensor, step: int) -> None:
    if len(rows.moments) == 2:
        rows.moments[0].copy_(m)
        rows.moments[1].copy_(v)
    else:
        rows.moments[0].copy_(pack(m, v, random_bits(ids, m.shape[1], step)))
