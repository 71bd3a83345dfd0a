"""What a device does with the rows of a store, in pinned host memory or on the device, in plain torch.

`offload/adam/rows_triton.py` has the same functions as CUDA kernels, but for `catch_up_rows`, which no step needs. The
mathematics of skipped steps is explained in `offload/adam/deferral.py`.

A row that has skipped steps has its parameters caught up when it is fetched. Its moments stay as they were after its
last update until the next one, which decays them: so they are rounded once per update, and reading rounds nothing.

Rows lie in one of two ways. Parameters and moments may have tensors of their own, float32 or pairs of moments: then
both are fetched, stepped on the device by `step_rows` and written back; or the parameters are fetched alone, and
`step_host_rows` reads and writes the moments where they are.

Rows of a compact store are packed (`offload.store.layout.packed_rows`), and stay so wherever they are. They are copied
between a store and a view (`read_packed_rows`, `write_packed_rows`) and moved from view to view (`move_rows` of their
words). What is fetched of them is their values alone, float32: caught up, not rounded. They are stepped where they lie,
in a store (`step_stored_rows`) or in a view (`step_view_rows`), and values with codes become what a float16 holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from offload.adam.bfloat16 import pack, random_bits, unpack
from offload.adam.codes import decode_moments, encode_moments, random_fractions, round_to_half
from offload.adam.deferral import DeferralTables, SkippedSteps, adam_step, caught_up, decayed
from offload.adam.harmonics import HarmonicsGradient
from offload.store.layout import PackedRows, ResidentRows, RowState

STEP_ROWS = 1 << 12  # updated at once; what that takes, moments in float32 and their changes, stays small


def fetch_rows(
    source: RowState,
    places: Tensor,
    ids: Tensor,
    last_step: Tensor,
    wanted: Tensor | None,
    out: RowState,
    tables: DeferralTables,
) -> None:
    """Copy rows and apply to their parameters the steps that they have skipped.

    Args:
        source: Rows in pinned memory or on the device, of either kind.
        places: [V] int64 on the device, which of them.
        ids: [V] int64 on the device, which Gaussians they are.
        last_step: [N] int32 on the device, the step of each Gaussian's last update.
        wanted: [V] bool; rows of `out` where it is False are left alone. None: all are wanted.
        out: V rows on the device: the values after step `tables.step`; and the moments after the last update, where it
            has any, which it has not of packed rows.
        tables: Of the skipped steps.
    """
    fetch_dated_rows(source, places, last_step[ids], wanted, out, tables)


def fetch_dated_rows(
    source: RowState,
    places: Tensor | None,
    last_step: Tensor,
    wanted: Tensor | None,
    out: RowState,
    tables: DeferralTables | SkippedSteps,
) -> None:
    """Do as `fetch_rows` where the step of the last update is known row by row.

    Args:
        source, wanted, out, tables: As for `fetch_rows`.
        places: As there; None: V packed rows of a view, in its order.
        last_step: [V] int32 on the device, of these rows.
    """
    chosen = _chosen(wanted)
    taken = chosen if places is None else places[chosen]
    w, *moments = (_with_columns(tensor[taken], tables.columns) for tensor in source.tensors())
    out.parameters[chosen] = caught_up(w.float(), *float_moments(moments, tables.reach), last_step[chosen], tables)
    for moment, fetched in zip(out.moments, moments, strict=False):
        moment[chosen] = fetched


def step_rows(rows: RowState, ids: Tensor, last_step: Tensor, gradients: Tensor, tables: DeferralTables) -> None:
    """Apply Adam's step `tables.step` in place, and the decay of the moments in the steps skipped before.

    Args:
        rows: V rows on the device, as `fetch_rows` gives them, with moments.
        ids: [V] int64 on the device, which Gaussians they are.
        last_step: [N] int32 on the device, the step of each Gaussian's last update; becomes the step.
        gradients: [V, columns].
        tables: After `begin_step`.
    """
    for first in range(0, len(ids), STEP_ROWS):
        chunk = slice(first, first + STEP_ROWS)
        block_ids = ids[chunk]
        _update(rows[chunk], block_ids, last_step[block_ids], gradients[chunk], tables)
    last_step[ids] = tables.step


def step_host_rows(
    parameters: Tensor | None,
    ids: Tensor,
    last_step: Tensor,
    gradients: Tensor | HarmonicsGradient | None,
    host: RowState,
    tables: DeferralTables,
) -> None:
    """Step rows whose moments are on the host: they are read there, and all of a row is written there.

    Args:
        parameters: [V, columns] on the device, as `fetch_rows` gives them; receives the new values. None: they are read
            once more, where gradients are made.
        ids: [V] int64 on the device, the rows of the host that they are.
        last_step: [V] int32 on the device, the step of each row's last update; stays.
        gradients: [V, columns]; or what they are made of, where rows have no values here. None: there are none, and
            moments are brought to the step of the parameters.
        host: N rows, pinned or on the device, not packed; the values in it are as old as the moments.
        tables: As for `step_rows`; without gradients as for `catch_up_rows`.
    """
    if parameters is None:
        parameters = _before_step(host, ids, last_step, tables)
    rows = RowState(parameters, tuple(_with_columns(moment[ids], tables.columns) for moment in host.moments))
    _update(rows, ids, last_step, gradients, tables)
    for tensor, destination in zip(rows.tensors(), host.tensors(), strict=True):
        columns = min(tables.columns, destination.shape[1])
        destination[ids, :columns] = tensor[:, :columns].to(destination.dtype)


def step_stored_rows(
    values: Tensor | None,
    ids: Tensor,
    last_step: Tensor,
    gradients: Tensor | HarmonicsGradient | None,
    rows: RowState,
    tables: DeferralTables,
) -> None:
    """Step rows of a store on the device, and date them.

    Args:
        values: As `parameters` of `step_host_rows`; None: of packed rows, too, they are read once more.
        ids: [V] int64 on the device, which rows, each once.
        last_step: [N] int32 on the device, the step of each row's last update; becomes the step.
        gradients: As there; of packed rows they may be made where there are values, too.
        rows: N rows of either kind.
        tables: As there.
    """
    step_host_rows(values, ids, last_step[ids], gradients, rows, tables)
    last_step[ids] = tables.step


def step_view_rows(
    values: Tensor | None,
    ids: Tensor,
    last_step: Tensor,
    gradients: Tensor | HarmonicsGradient | None,
    rows: RowState,
    tables: DeferralTables,
) -> None:
    """Step rows of a view that lie packed and in its order.

    Args:
        values: [V, columns] on the device, as `fetch_dated_rows` gives them; receives the new values. None: they are
            read once more.
        ids: [V] int64 on the device, which Gaussians they are.
        last_step: [V] int32 on the device, the step of each row's last update; becomes the step.
        gradients: [V, columns], or what they are made of. None: there are none, and moments are brought to the step of
            the values.
        rows: V packed rows on the device.
        tables: As for `step_rows`; without gradients as for `catch_up_rows`.
    """
    if values is None:
        values = _before_step(rows, None, last_step, tables)
    state = RowState(values, tuple(_with_columns(moment.clone(), tables.columns) for moment in rows.moments))
    _update(state, ids, last_step, gradients, tables)
    for tensor, destination in zip(state.tensors(), rows.tensors(), strict=True):
        destination.copy_(tensor[:, : destination.shape[1]])
    last_step.fill_(tables.step)


def read_packed_rows(
    host: Sequence[PackedRows],
    ids: Tensor,
    wanted: Tensor | None,
    view: Sequence[PackedRows],
    residents: ResidentRows | None = None,
) -> None:
    """Copy packed rows, and the steps of their last updates, from compact stores, or another view, to a view.

    Args:
        host: N rows of one group or both, pinned or on the device.
        ids: [V] int64 on the device, which rows.
        wanted: [V] bool; where it is False nothing is read. None: all are wanted.
        view: V rows of the same groups on the device.
        residents: Rows of the same groups that are read from there in place of the stores.

    Raises:
        ValueError: Rows are tight, which are not copied.
    """
    check_whole(host, view)
    if residents is not None:
        places, here, wanted = _among(residents, ids, wanted)
        residents.moved[0] += here.sum()
        read_packed_rows(residents.rows, places, here, view)
    chosen = _chosen(wanted)
    for (stored, stored_last_step), (words, last_step) in zip(host, view, strict=True):
        words[chosen], last_step[chosen] = stored[ids[chosen]], stored_last_step[ids[chosen]]


def write_packed_rows(
    view: Sequence[PackedRows],
    ids: Tensor,
    wanted: Tensor | None,
    host: Sequence[PackedRows],
    residents: ResidentRows | None = None,
) -> None:
    """Copy packed rows, and the steps of their last updates, from a view to compact stores, or another view.

    Args:
        view, ids, host: As for `read_packed_rows`.
        wanted: [V] bool; where it is False nothing is written. None: all are wanted.
        residents: Rows of the same groups that are written there in place of the stores.

    Raises:
        ValueError: As for `read_packed_rows`.
    """
    check_whole(view, host)
    if residents is not None:
        places, here, wanted = _among(residents, ids, wanted)
        residents.moved[1] += here.sum()
        write_packed_rows(view, places, here, residents.rows)
    chosen = _chosen(wanted)
    for (stored, stored_last_step), (words, last_step) in zip(host, view, strict=True):
        stored[ids[chosen]], stored_last_step[ids[chosen]] = words[chosen], last_step[chosen]


def catch_up_rows(rows: RowState, ids: Tensor, last_step: Tensor, tables: DeferralTables) -> None:
    """Bring the moments of fetched rows to the step of their parameters, without a gradient, as `step_rows` does."""
    _catch_up(rows, ids, last_step[ids], tables)
    last_step[ids] = tables.step


def move_rows(rows: RowState, sources: Tensor, out: RowState) -> None:
    """Copy rows from one place on the device to another.

    Args:
        rows: V rows, with or without moments; packed ones as their words, for parameters.
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
        host: N rows of the same columns, pinned.
    """
    chosen = _chosen(wanted)
    ids = ids[chosen]
    for tensor, destination in zip(rows.tensors(), host.tensors(), strict=True):
        destination[ids] = tensor[chosen]


def check_whole(source: Sequence[PackedRows], target: Sequence[PackedRows]) -> None:
    """Refuse to copy packed rows that are tight, or as others than they are.

    Raises:
        ValueError: They are.
    """
    for (words, _), (out, _) in zip(source, target, strict=True):
        if words.shape[1] != out.shape[1] or words.shape[1] % 16:
            raise ValueError(f"rows of {words.shape[1]} words cannot be copied as rows of {out.shape[1]}")


def _before_step(rows: RowState, places: Tensor | None, last_step: Tensor, tables: DeferralTables) -> Tensor:
    """Return the values [V, columns] that rows had before step `tables.step` began."""
    values = torch.empty(len(last_step), tables.columns, device=last_step.device)
    fetch_dated_rows(rows, places, last_step, None, RowState(values, ()), tables.skipped(previous=True))
    return values


def _among(residents: ResidentRows, ids: Tensor, wanted: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Find rows [V] among the residents: where they are, which of the wanted ones are there, and which are not."""
    places = residents.places[ids].long()
    here, elsewhere = places >= 0, places < 0
    return (places, here, elsewhere) if wanted is None else (places, here & wanted, elsewhere & wanted)


def _with_columns(rows: Tensor, columns: int) -> Tensor:
    """Return so many columns of rows: the first ones, or, where rows have fewer, zeros behind theirs."""
    lacking = columns - rows.shape[1]
    return pad(rows, (0, lacking)) if lacking > 0 else rows[:, :columns]


def _chosen(wanted: Tensor | None) -> Tensor | slice:
    return slice(None) if wanted is None else wanted.nonzero().squeeze(1)


def _update(
    rows: RowState,
    ids: Tensor,
    last_step: Tensor,
    gradients: Tensor | HarmonicsGradient | None,
    tables: DeferralTables,
) -> None:
    """Step rows in place; without gradients bring their moments to the step of their parameters."""
    if gradients is None:
        _catch_up(rows, ids, last_step, tables)
    else:
        if isinstance(gradients, HarmonicsGradient):
            gradients = gradients.dense(tables.columns)
        _store(rows, *_stepped(rows, last_step, gradients, tables), ids, tables)


def _stepped(rows: RowState, last_step: Tensor, gradients: Tensor, tables: DeferralTables) -> tuple[Tensor, Tensor]:
    """Apply Adam's step `tables.step` to parameters in place; return both moments [V, columns] float32 after it."""
    step = tables.step_sizes()
    m, v = decayed(*float_moments(rows.moments, tables.reach), tables.step - 1 - last_step, tables)
    adam_step(rows.parameters, m, v, gradients, step.sizes, step)
    return m, v


def _catch_up(rows: RowState, ids: Tensor, last_step: Tensor, tables: DeferralTables) -> None:
    """Bring moments from `last_step` [V] to step `tables.step`, where parameters are; rows that do not lag stay."""
    lag = (last_step < tables.step).nonzero().squeeze(1)
    lagging = RowState(rows.parameters[lag], tuple(moment[lag] for moment in rows.moments))
    moments = decayed(*float_moments(lagging.moments, tables.reach), tables.step - last_step[lag], tables)
    _store(lagging, *moments, ids[lag], tables)
    for tensor, changed in zip(rows.tensors(), lagging.tensors(), strict=True):
        tensor[lag] = changed


def _store(rows: RowState, m: Tensor, v: Tensor, ids: Tensor, tables: DeferralTables) -> None:
    store_moments(rows, m, v, random_bits(ids, m.shape[1], tables.step), tables.reach)


def float_moments(stored: Sequence[Tensor], reach: float) -> tuple[Tensor, Tensor]:
    """Return both moments in float32, from the form that `RowState` has them in.

    Args:
        stored: `RowState.moments`.
        reach: `largest_step` of Adam's betas.
    """
    if len(stored) == 2:
        return stored[0], stored[1]
    return decode_moments(stored[0], reach) if stored[0].dtype == torch.int16 else unpack(stored[0])


def store_moments(rows: RowState, m: Tensor, v: Tensor, random: Tensor, reach: float) -> None:
    """Keep moments in the form that rows have, in place; with codes, values become what a float16 holds.

    Args:
        rows: [V, columns].
        m, v: float32 [V, columns].
        random: int64 [V, columns], 32 random bits each.
        reach: `largest_step` of Adam's betas.
    """
    if len(rows.moments) == 2:
        rows.moments[0].copy_(m)
        rows.moments[1].copy_(v)
    elif rows.moments[0].dtype == torch.int16:
        rows.parameters.copy_(round_to_half(rows.parameters, random_fractions(random)[0]))
        rows.moments[0].copy_(encode_moments(m, v, reach, random))
    else:
        rows.moments[0].copy_(pack(m, v, random))
