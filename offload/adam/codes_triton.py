"""`offload/adam/codes.py` for kernels in Triton, and what `rows_triton.py` does with rows whose moments are codes.

A tile is ROWS whole rows, since a block's scale is the largest of its roots: [ROWS, LANES], of which a row uses its
first COLUMNS lanes. Values and codes of a packed row, which lie side by side, are read in one access and written in
one, [ROWS, 2, LANES] of 16 bits: every thread moves 16 bytes, and a warp whole lines of 64 bytes, also the line in
which the values of a row end and its codes begin.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.adam import codes
from offload.adam.bfloat16 import seed_of
from offload.adam.bfloat16_triton import random_bits
from offload.adam.deferral import DeferralTables
from offload.adam.deferral_triton import adam_step, caught_up, decayed
from offload.store.layout import HALF_MAX, RowState

TILE = 2048  # lanes, so that each thread has 16 bytes of its codes
WARPS = 8

_HALF_MAX = tl.constexpr(HALF_MAX)
_OCTAVE_STEPS, _STEP_UP = tl.constexpr(codes.OCTAVE_STEPS), tl.constexpr(codes.STEP_UP)
_LARGEST_ROOT, _LARGEST_RATIO = tl.constexpr(codes.LARGEST_ROOT), tl.constexpr(codes.LARGEST_RATIO)
_SMALLEST_SHARE = tl.constexpr(2.0 ** -(codes.LARGEST_ROOT // codes.OCTAVE_STEPS + 2))  # below that of the first code
_SECOND_HASH = tl.constexpr(codes.SECOND_HASH)


def has_codes(rows: RowState) -> bool:
    """Tell whether the moments of rows are codes."""
    return bool(rows.moments) and rows.moments[0].dtype == torch.int16


def fetch(
    source: RowState,
    places: Tensor,
    ids: Tensor | None,
    last_step: Tensor,
    wanted: Tensor | None,
    out: RowState,
    tables: DeferralTables,
    blocks: int,
) -> None:
    """Do as `offload.adam.rows.fetch_rows`; without ids as `fetch_dated_rows`."""
    schedules, columns = tables.multipliers.shape
    with torch.cuda.device_of(places):
        _fetch_kernel[(_grid(len(places), columns, source, blocks),)](
            *_memory(source),
            places,
            ids,
            last_step,
            wanted,
            out.parameters,
            out.moments[0] if out.moments else None,
            tables.sums,
            tables.multipliers,
            tables.sums.shape[1],
            tables.eps,
            tables.reach,
            len(places),
            SCHEDULES=schedules,
            **_tile(columns),
        )


def step(rows: RowState, ids: Tensor, last_step: Tensor, gradients: Tensor, tables: DeferralTables) -> None:
    """Do as `offload.adam.rows.step_rows`, but leave `last_step`, which other threads may not have read yet."""
    sizes, (count, columns) = tables.step_sizes(), gradients.shape
    with torch.cuda.device_of(gradients):
        _step_kernel[(_grid(count, columns, rows, 0),)](
            *rows.tensors(),
            ids,
            last_step,
            gradients.contiguous(),
            sizes.sizes,
            tables.decays,
            tables.decays.shape[1],
            tables.step,
            seed_of(tables.step),
            1 - sizes.betas[0],
            1 - sizes.betas[1],
            sizes.eps,
            tables.reach,
            count,
            **_tile(columns),
        )


def step_host(
    parameters: Tensor,
    ids: Tensor,
    last_step: Tensor,
    gradients: Tensor | None,
    host: RowState,
    tables: DeferralTables,
    blocks: int,
) -> None:
    """Do as `offload.adam.rows.step_host_rows`; without gradients rows that do not lag are not written."""
    sizes, (count, columns) = tables.step_sizes(), parameters.shape
    with torch.cuda.device_of(parameters):
        _step_host_kernel[(_grid(count, columns, host, blocks),)](
            parameters,
            ids,
            last_step,
            None if gradients is None else gradients.contiguous(),
            _packed(host),
            sizes.sizes,
            tables.decays,
            tables.decays.shape[1],
            tables.step if gradients is not None else tables.step + 1,  # of which the kernel decays all but the last
            seed_of(tables.step),
            1 - sizes.betas[0],
            1 - sizes.betas[1],
            sizes.eps,
            tables.reach,
            count,
            **_tile(columns),
        )


def move(rows: RowState, sources: Tensor, out: RowState) -> None:
    """Do as `offload.adam.rows.move_rows`."""
    count, columns = out.parameters.shape
    with torch.cuda.device_of(sources):
        _move_kernel[(_grid(count, columns, rows, 0),)](
            *rows.tensors(), sources, *out.tensors(), count, **_tile(columns)
        )


def write(rows: RowState, ids: Tensor, wanted: Tensor | None, host: RowState, blocks: int) -> None:
    """Do as `offload.adam.rows.write_rows`, with values that a float16 holds."""
    columns = rows.parameters.shape[1]
    with torch.cuda.device_of(ids):
        _write_kernel[(_grid(len(ids), columns, host, blocks),)](
            *rows.tensors(), ids, wanted, _packed(host), len(ids), **_tile(columns)
        )


def _tile(columns: int) -> dict[str, int]:
    """Return the shape of a tile, by the names of the kernels' arguments."""
    lanes = triton.next_power_of_2(columns)
    return {"COLUMNS": columns, "LANES": lanes, "ROWS": TILE // lanes, "num_warps": WARPS}


def _grid(count: int, columns: int, other: RowState, blocks: int) -> int:
    """Count the thread blocks: one a tile, or where the other side is the host so many, which loop over the tiles."""
    tiles = triton.cdiv(count, TILE // triton.next_power_of_2(columns))
    return tiles if other.parameters.is_cuda else min(tiles, blocks or tiles)


def _memory(rows: RowState) -> tuple[Tensor, Tensor | None]:
    """Return values and codes; or packed rows and None, where values are float16."""
    if rows.parameters.dtype == torch.float16:
        return _packed(rows), None
    return rows.parameters, rows.moments[0]


def _packed(rows: RowState) -> Tensor:
    """Return the first halves of packed rows as 16-bit words, behind each of which its codes lie.

    Raises:
        ValueError: They lie elsewhere.
    """
    values, moments = rows.parameters, rows.moments[0]
    num_bytes = values.shape[1] * values.element_size()
    if moments.data_ptr() - values.data_ptr() != num_bytes or 2 * num_bytes != values.stride(0) * values.element_size():
        raise ValueError("values and codes of a packed row must lie side by side, and rows one after another")
    return values.view(torch.int16)


@triton.jit
def round_to_half(w, random):
    """Do as `codes.round_to_half`, with the random bits (uint32) themselves."""
    size = tl.abs(w)
    exponent = tl.maximum(size.to(tl.int32, bitcast=True) >> 23, 127 - 14)
    spacing = ((exponent - 10) << 23).to(tl.float32, bitcast=True)
    over_spacing = ((254 - (exponent - 10)) << 23).to(tl.float32, bitcast=True)
    fraction = (random & 0x1FFF).to(tl.float32) * (1.0 / (1 << 13))
    rounded = tl.floor(size * over_spacing + fraction) * spacing
    rounded = tl.where(rounded > _HALF_MAX, _HALF_MAX, rounded)  # not `minimum`, which would hide what is not a number
    return tl.where(w.to(tl.int32, bitcast=True) < 0, -rounded, rounded)


@triton.jit
def encode_moments(m, v, reach, random, COLUMNS: tl.constexpr, LANES: tl.constexpr):
    """Do as `codes.encode_moments`, with moments [ROWS, LANES] and random bits in uint32."""
    DEGREE: tl.constexpr = COLUMNS // 16
    VALUES: tl.constexpr = 3 * ((DEGREE + 1) * (DEGREE + 1) - 1)
    lane = tl.arange(0, LANES)[None, :]
    roots = tl.sqrt(v)
    scale = tl.zeros_like(v)
    scale_codes = tl.zeros_like(v).to(tl.int32)
    for number in tl.static_range(DEGREE):
        block = _in_block(lane, number)
        largest = tl.max(tl.where(block, roots, 0.0), axis=1)  # [ROWS]
        bits = (largest.to(tl.int32, bitcast=True) + 0xFFFF) & -65536  # rounded upwards
        scale = tl.where(block, bits.to(tl.float32, bitcast=True)[:, None], scale)
        scale_codes = tl.where(lane == VALUES + number, (bits >> 16)[:, None], scale_codes)
    second = _encode_roots(roots, scale, (random >> 16).to(tl.float32) * (1.0 / (1 << 16)))
    root = scale * _relative_root(second)
    other = (random * tl.full([1], _SECOND_HASH, tl.uint32)) >> 16
    first = _encode_ratios(m, reach * root, other.to(tl.float32) * (1.0 / (1 << 16)))
    return tl.where(lane < VALUES, (second << 8) | first, scale_codes).to(tl.int16)


@triton.jit
def decode_moments(words, reach, COLUMNS: tl.constexpr, LANES: tl.constexpr):
    """Do as `codes.decode_moments`, with codes int16 [ROWS, LANES]."""
    DEGREE: tl.constexpr = COLUMNS // 16
    VALUES: tl.constexpr = 3 * ((DEGREE + 1) * (DEGREE + 1) - 1)
    lane = tl.arange(0, LANES)[None, :]
    words = words.to(tl.int32) & 0xFFFF
    scale = tl.zeros_like(words).to(tl.float32)
    for number in tl.static_range(DEGREE):
        bits = tl.sum(tl.where(lane == VALUES + number, words, 0), axis=1) << 16  # [ROWS]
        scale = tl.where(_in_block(lane, number), bits.to(tl.float32, bitcast=True)[:, None], scale)
    root = scale * _relative_root(words >> 8)
    ratio = (words & 0x7F).to(tl.float32) / _LARGEST_RATIO
    m = ratio * ratio * (reach * root)
    return tl.where((words & 0x80) != 0, -m, m), root * root


@triton.jit
def _in_block(lane, number: tl.constexpr):
    """Tell which columns are those of the degree `number` + 1."""
    first: tl.constexpr = 3 * ((number + 1) * (number + 1) - 1)
    last: tl.constexpr = 3 * ((number + 2) * (number + 2) - 1)
    return (lane >= first) & (lane < last)


@triton.jit
def _relative_root(code):
    """Compute the root of a second moment's code over its scale."""
    root = tl.exp2((code - _LARGEST_ROOT).to(tl.float32) * (1.0 / _OCTAVE_STEPS))
    return tl.where(code > 0, root, 0.0)


@triton.jit
def _encode_roots(roots, scale, fraction):
    """Return k, with the second moment right on average."""
    share = roots / tl.where(scale > 0, scale, 1.0)  # 0 ... 1
    octaves = tl.log2(tl.maximum(share, _SMALLEST_SHARE))
    lower = tl.maximum(tl.floor(octaves * _OCTAVE_STEPS + _LARGEST_ROOT).to(tl.int32), 1)
    lower = tl.minimum(lower, _LARGEST_ROOT)
    over = share / _relative_root(lower)
    goes_up = fraction * _STEP_UP < over * over - 1
    return tl.where(share > 0, tl.minimum(lower + goes_up.to(tl.int32), _LARGEST_ROOT), 0)


@triton.jit
def _encode_ratios(m, largest, fraction):
    """Return sign and c, with the first moment right on average; c is zero where `largest` is."""
    share = tl.where(largest > 0, tl.abs(m) / tl.where(largest > 0, largest, 1.0), 0.0)
    share = tl.minimum(share, 1.0) * (_LARGEST_RATIO * _LARGEST_RATIO)
    lower = tl.floor(tl.sqrt(share))
    goes_up = fraction * (2 * lower + 1) < share - lower * lower
    code = tl.minimum(lower.to(tl.int32) + goes_up.to(tl.int32), _LARGEST_RATIO)
    return code | tl.where(m.to(tl.int32, bitcast=True) < 0, 0x80, 0)


@triton.jit
def _places(row, mask, COLUMNS: tl.constexpr, LANES: tl.constexpr):
    """Return where the values of rows [ROWS] lie that are not packed, [ROWS, LANES], and which there are."""
    lane = tl.arange(0, LANES)[None, :]
    return row.to(tl.int64)[:, None] * COLUMNS + lane, mask[:, None] & (lane < COLUMNS)


@triton.jit
def _packed_places(row, mask, COLUMNS: tl.constexpr, LANES: tl.constexpr):
    """Return where values and codes of packed rows [ROWS] lie, [ROWS, 2, LANES], and which there are."""
    half, lane = tl.arange(0, 2)[None, :, None], tl.arange(0, LANES)[None, None, :]
    at = row.to(tl.int64)[:, None, None] * (2 * COLUMNS) + half * COLUMNS + lane
    return at, mask[:, None, None] & (lane < COLUMNS)


@triton.jit
def _load(parameters, words, row, mask, COLUMNS: tl.constexpr, LANES: tl.constexpr):
    """Load values, float32, and codes, int16, of rows [ROWS]; `words` is None where they are packed."""
    if words is None:
        at, used = _packed_places(row, mask, COLUMNS, LANES)
        values, loaded = tl.split(tl.permute(tl.load(parameters + at, mask=used, other=0), (0, 2, 1)))
        w = values.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        at, used = _places(row, mask, COLUMNS, LANES)
        w = tl.load(parameters + at, mask=used, other=0.0)
        loaded = tl.load(words + at, mask=used, other=0)
    return w, loaded


@triton.jit
def _store_packed(packed, row, mask, w, words, COLUMNS: tl.constexpr, LANES: tl.constexpr):
    """Store values that a float16 holds, and codes; the columns without values as well."""
    at, used = _packed_places(row, mask, COLUMNS, LANES)
    values = w.to(tl.float16).to(tl.int16, bitcast=True)
    tl.store(packed + at, tl.permute(tl.join(values, words), (0, 2, 1)), mask=used)


@triton.jit
def _is_wanted(wanted, row, inside):
    """Tell which rows of the tile to move: those inside, and where `wanted` says so."""
    if wanted is not None:
        inside = inside & (tl.load(wanted + row, mask=inside, other=0) != 0)
    return inside


@triton.jit(do_not_specialize=["capacity", "num_rows"])
def _fetch_kernel(
    parameters,  # [rows, COLUMNS]; or packed rows [rows, 2 * COLUMNS]
    words,  # [rows, COLUMNS] or None
    places,  # [V]
    ids,  # [V], or None
    last_step,  # [N]; without ids [V]
    wanted,  # [V] or None
    out_parameters,  # [V, COLUMNS]
    out_words,  # [V, COLUMNS] or None
    sums,  # [SCHEDULES, capacity] float64
    multipliers,  # [SCHEDULES, COLUMNS]
    capacity,
    eps,
    reach,
    num_rows,  # V
    SCHEDULES: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
):
    lane = tl.arange(0, LANES)
    for first in range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        fetched = _is_wanted(wanted, row, row < num_rows)
        place = tl.load(places + row, mask=fetched, other=0)
        w, loaded = _load(parameters, words, place, fetched, COLUMNS, LANES)
        if ids is None:
            last = tl.load(last_step + row, mask=fetched, other=0)
        else:
            last = tl.load(last_step + tl.load(ids + row, mask=fetched, other=0), mask=fetched, other=0)
        skipped = tl.zeros([ROWS, LANES], tl.float32)
        for schedule in tl.static_range(SCHEDULES):
            total = tl.load(sums + schedule * capacity + last, mask=fetched, other=0.0).to(tl.float32)
            rates = tl.load(multipliers + schedule * COLUMNS + lane, mask=lane < COLUMNS, other=0.0)
            skipped += total[:, None] * rates[None, :]
        m, v = decode_moments(loaded, reach, COLUMNS, LANES)
        here, used = _places(row, fetched, COLUMNS, LANES)
        tl.store(out_parameters + here, caught_up(w, m, v, skipped, eps), mask=used)
        if out_words is not None:
            tl.store(out_words + here, loaded, mask=used)


@triton.jit(do_not_specialize=["capacity", "step", "seed", "num_rows"])
def _step_kernel(
    parameters,  # [V, COLUMNS]
    words,  # [V, COLUMNS]
    ids,  # [V]
    last_step,  # [N]
    gradients,  # [V, COLUMNS]
    sizes,  # [COLUMNS]
    decays,  # [2, capacity] float64
    capacity,
    step,
    seed,
    gradient_weight,  # 1 - b1
    square_weight,  # 1 - b2
    eps,
    reach,
    num_rows,  # V
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
):
    lane = tl.arange(0, LANES)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    here, used = _places(row, inside, COLUMNS, LANES)
    w, loaded = _load(parameters, words, row, inside, COLUMNS, LANES)
    g = tl.load(gradients + here, mask=used, other=0.0)
    size = tl.load(sizes + lane, mask=lane < COLUMNS, other=0.0)[None, :]
    row_id = tl.load(ids + row, mask=inside, other=0)
    skipped = step - 1 - tl.load(last_step + row_id, mask=inside, other=0)

    m, v = decode_moments(loaded, reach, COLUMNS, LANES)
    m, v = decayed(m, v, decays, capacity, skipped, inside)
    w, m, v = adam_step(w, m, v, g, size, gradient_weight, square_weight, eps)
    random = random_bits(row_id[:, None] * COLUMNS + lane[None, :], seed)
    tl.store(parameters + here, round_to_half(w, random), mask=used)
    tl.store(words + here, encode_moments(m, v, reach, random, COLUMNS, LANES), mask=used)


@triton.jit(do_not_specialize=["capacity", "step", "seed", "num_rows"])
def _step_host_kernel(
    parameters,  # [V, COLUMNS]
    ids,  # [V]
    last_step,  # [V]
    gradients,  # [V, COLUMNS] or None
    packed,  # [N, 2 * COLUMNS] on the host
    sizes,  # [COLUMNS]
    decays,  # [2, capacity] float64
    capacity,
    step,
    seed,
    gradient_weight,  # 1 - b1
    square_weight,  # 1 - b2
    eps,
    reach,
    num_rows,  # V
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
):
    lane = tl.arange(0, LANES)
    for first in range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        changed = row < num_rows
        row_id = tl.load(ids + row, mask=changed, other=0)
        skipped = step - 1 - tl.load(last_step + row, mask=changed, other=0)
        if gradients is None:
            changed = changed & (skipped > 0)
        there = (row_id * (2 * COLUMNS) + COLUMNS)[:, None] + lane[None, :]  # of the codes
        here, used = _places(row, changed, COLUMNS, LANES)
        loaded = tl.load(packed + there, mask=used, other=0)
        w = tl.load(parameters + here, mask=used, other=0.0)
        m, v = decode_moments(loaded, reach, COLUMNS, LANES)
        m, v = decayed(m, v, decays, capacity, skipped, changed)
        if gradients is not None:
            g = tl.load(gradients + here, mask=used, other=0.0)
            size = tl.load(sizes + lane, mask=lane < COLUMNS, other=0.0)[None, :]
            w, m, v = adam_step(w, m, v, g, size, gradient_weight, square_weight, eps)
        random = random_bits(row_id[:, None] * COLUMNS + lane[None, :], seed)
        w = round_to_half(w, random)
        tl.store(parameters + here, w, mask=used)
        _store_packed(
            packed, row_id, changed, w, encode_moments(m, v, reach, random, COLUMNS, LANES), COLUMNS, LANES
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def _move_kernel(
    parameters,  # [V, COLUMNS]
    words,  # [V, COLUMNS]
    sources,  # [W]
    out_parameters,  # [W, COLUMNS]
    out_words,  # [W, COLUMNS]
    num_rows,  # W
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    source = tl.load(sources + row, mask=row < num_rows, other=-1)
    w, loaded = _load(parameters, words, source, source >= 0, COLUMNS, LANES)
    here, used = _places(row, source >= 0, COLUMNS, LANES)
    tl.store(out_parameters + here, w, mask=used)
    tl.store(out_words + here, loaded, mask=used)


@triton.jit(do_not_specialize=["num_rows"])
def _write_kernel(
    parameters,  # [V, COLUMNS]
    words,  # [V, COLUMNS]
    ids,  # [V]
    wanted,  # [V] or None
    packed,  # [N, 2 * COLUMNS] on the host
    num_rows,  # V
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
):
    for first in range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        written = _is_wanted(wanted, row, row < num_rows)
        row_id = tl.load(ids + row, mask=written, other=0)
        w, loaded = _load(parameters, words, row, written, COLUMNS, LANES)
        _store_packed(packed, row_id, written, w, loaded, COLUMNS, LANES)
