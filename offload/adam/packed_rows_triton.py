"""What `rows_triton.py` does with the rows of a compact store, which lie packed there, and in a view.

Kernels that decode and code see rows in parts of 16 columns, [ROWS, 16] (`codes_triton.py`), four of them to a thread:
no lane idles, floats move in vectors of 16 bytes and codes of 8, each part fills whole sectors of 32 bytes, and threads
exchange nothing but the largest of a degree. What a tile needs is loaded before any of it is worked on; the barriers
after that are for the compiler, which would else put loads off. Tight rows, those of geometry in a store on the device,
move in vectors of 8 bytes, and lanes beyond their columns idle. Rows on the host are read and written so too, where a
view has no space on the device; others cross the link by `copy`, as vectors of 16 bytes in whole lines of 64. Neither
are tight.

Decoded values are float32 and in an array of their own, [V, COLUMNS]; moments are never anywhere but in packed rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.adam.bfloat16 import seed_of
from offload.adam.bfloat16_triton import pack, random_bits, unpack
from offload.adam.codes_triton import (
    PART,
    decode_moments,
    encode_moments,
    load_scales,
    part_of,
    round_to_half,
    with_part,
)
from offload.adam.deferral import DeferralTables, SkippedSteps
from offload.adam.deferral_triton import adam_step, caught_up, decayed, decays_of
from offload.adam.harmonics import HarmonicsGradient, num_harmonics
from offload.adam.harmonics_triton import NOTHING, arguments_of, made_gradient, seen
from offload.adam.rows import check_whole
from offload.store.layout import PackedRows, PackedState, ResidentRows, RowState

COPIED_ROWS = 256  # at once by a thread block that only copies
COPY_TILE = 1024  # 16-byte vectors of these under way: four to a thread
NONE = None, None  # no other group
COPY_WARPS = 8
WARPS = 4  # of the other kernels: a thread has some 100 registers, which leave room for 20 warps of 4, for 16 of 8
TILE = 4 * 32 * WARPS  # columns of a part: four to a thread, or arrays of other types are laid out in other ways
_PART = tl.constexpr(PART)
# What begins anywhere in an array, since views and their parts do. A kernel that made use of where it happens to begin
# would be compiled once more, for a second, in the midst of training.
UNALIGNED = ["source_steps", "target_steps", "other_source_steps", "other_target_steps", "ids", "wanted"]


def takes(rows: RowState) -> bool:
    """Tell whether rows are for these kernels: those that are packed, and those with codes, which must be."""
    if isinstance(rows, PackedState):
        return True
    return len(rows.moments) == 1 and (rows.moments[0].dtype == torch.int16 or _in_one_memory(rows))


def fetch(
    source: RowState,
    places: Tensor | None,
    ids: Tensor | None,
    last_step: Tensor,
    wanted: Tensor | None,
    out: RowState,
    tables: DeferralTables | SkippedSteps,
    blocks: int,
) -> None:
    """Do as `offload.adam.rows.fetch_rows`; without ids as `fetch_dated_rows`.

    Raises:
        ValueError: Moments are wanted, or rows are not packed.
    """
    if out.moments:
        raise ValueError("packed rows are fetched without their moments")
    schedules, columns = tables.multipliers.shape
    count, words = (last_step if places is None else places).shape[0], packed_words(source)
    with torch.cuda.device_of(out.parameters):
        _fetch_kernel[(_grid(count, words, blocks),)](
            words,
            places,
            ids,
            last_step,
            wanted,
            out.parameters,
            tables.sums,
            tables.multipliers,
            tables.sums.shape[1],
            tables.eps,
            tables.reach,
            count,
            SCHEDULES=schedules,
            **_tile(columns, words),
        )


def step(
    values: Tensor | None,
    ids: Tensor,
    last_step: Tensor,
    gradients: Tensor | HarmonicsGradient | None,
    rows: RowState,
    tables: DeferralTables,
    *,
    in_order: bool,
) -> None:
    """Do as `offload.adam.rows.step_stored_rows`, or as `step_view_rows`; what need not change is not written.

    Args:
        values, ids, last_step, gradients, tables: As for these functions.
        rows: Packed.
        in_order: Whether rows are a view's, in its order, as for the latter; or lie by ids.
    """
    count, schedules = ids.shape[0], tables.schedules
    if schedules > 2:
        raise ValueError(f"packed rows have one schedule or two, and not {schedules}")
    made = gradients if isinstance(gradients, HarmonicsGradient) else None
    before, words = None if values is not None else tables.skipped(previous=True), packed_words(rows)
    with torch.cuda.device_of(ids):
        _step_kernel[(-(-count // (TILE // PART)),)](
            values,
            *((None, 0, 0.0) if before is None else (before.sums, before.sums.shape[1], before.eps)),
            ids,
            last_step,
            gradients.contiguous() if isinstance(gradients, Tensor) else None,
            *(NOTHING if made is None else arguments_of(made)),
            words,
            tables.multipliers,
            tables.rates[0],
            tables.rates[-1],
            tables.decays,
            tables.decays.shape[1],
            tables.step if gradients is not None else tables.step + 1,  # of which the kernel decays all but the last
            seed_of(tables.step),
            1 - tables.betas[0],
            1 - tables.betas[1],
            tables.eps,
            tables.reach,
            count,
            HARMONICS=0 if made is None else num_harmonics(made.sh_degree),
            IN_ORDER=in_order,
            SCHEDULES=schedules,
            **_tile(tables.columns, words),
        )


def copy(
    source: Sequence[PackedRows],
    target: Sequence[PackedRows],
    ids: Tensor,
    wanted: Tensor | None,
    residents: ResidentRows | None,
    blocks: int,
    *,
    to_view: bool,
) -> None:
    """Copy rows `ids` of one group or both to or from the rows of a view, which are in order.

    Args:
        source, target: Rows of the groups, and the steps of their last updates.
        ids, wanted, residents: As for `offload.adam.rows.read_packed_rows`.
        blocks: Thread blocks, which loop over the tiles, where rows cross the link.
        to_view: Whether the view is the target.

    Raises:
        ValueError: Rows are tight.
    """
    check_whole(source, target)
    count = ids.shape[0]
    if count == 0:
        return
    if wanted is None:  # or that kernel would be compiled when a view is first written whole, late in training
        wanted = torch.ones(count, dtype=torch.bool, device=ids.device)
    (words, steps), (out, out_steps) = source[0], target[0]
    (other_words, other_steps), (other_out, other_out_steps) = (source[1], target[1]) if source[1:] else (NONE, NONE)
    places = moved = None
    (near, near_steps), (other_near, other_near_steps) = NONE, NONE
    if residents is not None:
        places, moved = residents.places, residents.moved[0 if to_view else 1 :]
        near, near_steps = residents.rows[0]
        other_near, other_near_steps = residents.rows[1] if source[1:] else NONE
    tiles, stays = -(-count // COPIED_ROWS), words.is_cuda and out.is_cuda
    with torch.cuda.device_of(ids):
        _copy_kernel[(tiles if stays else min(tiles, blocks),)](
            words, steps, out, out_steps, other_words, other_steps, other_out, other_out_steps, ids, wanted, count,
            places, near, near_steps, other_near, other_near_steps, moved,
            TO_VIEW=to_view, VECTORS=words.shape[1] // 4,
            OTHER_VECTORS=0 if other_words is None else other_words.shape[1] // 4,
            ROWS=COPIED_ROWS, TILE=COPY_TILE, num_warps=COPY_WARPS,
        )  # fmt: skip


def packed_words(rows: RowState) -> Tensor:
    """Return the parameters as integers, behind each row of which its moments lie.

    Raises:
        ValueError: They lie elsewhere.
    """
    if isinstance(rows, PackedState):
        return rows.integers
    parameters, moments = rows.parameters, rows.moments[0]
    half_row, pitch = (size * parameters.element_size() for size in (parameters.shape[1], parameters.stride(0)))
    if moments.data_ptr() - parameters.data_ptr() != half_row or pitch != 2 * half_row:
        raise ValueError("parameters and moments of a packed row must lie side by side, and rows one after another")
    return parameters.view(moments.dtype)


def tables_of(skipped: SkippedSteps) -> tuple[Tensor, Tensor, int, float]:
    """Return what kernels take of it."""
    return skipped.sums, skipped.multipliers, skipped.sums.shape[1], skipped.eps


def _tile(columns: int, words: Tensor) -> dict[str, int]:
    """Return the shape of a tile and the kind of moments, by the names of the kernels' arguments."""
    return {
        "COLUMNS": columns,
        "STORED": words.shape[1] // 2,
        "ROWS": TILE // PART,
        "CODES": words.dtype == torch.int16,
        "num_warps": WARPS,
    }


def _grid(count: int, words: Tensor, blocks: int) -> int:
    """Count the thread blocks: one for each tile, or as many as loop over the tiles where rows are on the host."""
    tiles = -(-count // (TILE // PART))
    return tiles if words.is_cuda else min(tiles, blocks)


def _in_one_memory(rows: RowState) -> bool:
    return rows.parameters.untyped_storage().data_ptr() == rows.moments[0].untyped_storage().data_ptr()


@triton.jit
def load_parts(rows, mask, COLUMNS: tl.constexpr):
    """Load the first COLUMNS of rows that begin at `rows` [ROWS, 16], in parts; further ones are what the first is."""
    part0 = tl.load(rows, mask=mask, other=0)
    part1, part2 = part0, part0
    if COLUMNS > _PART:
        part1 = tl.load(rows + _PART, mask=mask, other=0)
    if COLUMNS > 2 * _PART:
        part2 = tl.load(rows + 2 * _PART, mask=mask, other=0)
    return part0, part1, part2


@triton.jit
def store_parts(rows, part0, part1, part2, mask, COLUMNS: tl.constexpr):
    for part in tl.static_range(COLUMNS // _PART):
        tl.store(rows + part * _PART, part_of(part0, part1, part2, part), mask=mask)


@triton.jit
def decoded_values(words, CODES: tl.constexpr):
    """Return the parameters that packed rows hold as integers, in float32."""
    return words.to(tl.float16, bitcast=True).to(tl.float32) if CODES else words.to(tl.float32, bitcast=True)


@triton.jit
def _coded_values(w, CODES: tl.constexpr):
    """Do the reverse, of values that a float16 holds where there are codes."""
    return w.to(tl.float16).to(tl.int16, bitcast=True) if CODES else w.to(tl.int32, bitcast=True)


@triton.jit
def _load_scales(codes, mask, COLUMNS: tl.constexpr, CODES: tl.constexpr):
    scale0, scale1, scale2 = 0.0, 0.0, 0.0
    if CODES:
        scale0, scale1, scale2 = load_scales(codes, mask, COLUMNS)
    return scale0, scale1, scale2


@triton.jit
def _decoded_moments(
    words, scale0, scale1, scale2, reach, part: tl.constexpr, COLUMNS: tl.constexpr, CODES: tl.constexpr
):
    """Return a part of both moments in float32, from codes or pairs."""
    if CODES:
        m, v = decode_moments(words, scale0, scale1, scale2, reach, part, COLUMNS)
    else:
        m, v = unpack(words)
    return m, v


@triton.jit
def _coded_moments(
    m0, m1, m2, v0, v1, v2, random0, random1, random2, reach, COLUMNS: tl.constexpr, CODES: tl.constexpr
):
    """Return the words of both moments, in parts."""
    if CODES:
        words0, words1, words2 = encode_moments(
            m0, m1, m2, v0, v1, v2, random0, random1, random2, reach, COLUMNS
        )  # fmt: skip
    else:
        tl.static_assert(COLUMNS == _PART)
        words0 = pack(m0, v0, random0)
        words1, words2 = words0, words0
    return words0, words1, words2


@triton.jit
def skipped_part(
    sums, multipliers, capacity, last, mask, part: tl.constexpr, SCHEDULES: tl.constexpr, COLUMNS: tl.constexpr
):
    """Sum up C_t(s) of a part's columns, [ROWS, 16], of rows with these last steps [ROWS]."""
    lane = tl.arange(0, _PART)[None, :]
    skipped = last[:, None] * (lane * 0.0)
    for schedule in tl.static_range(SCHEDULES):
        total = tl.load(sums + schedule * capacity + last, mask=mask, other=0.0).to(tl.float32)
        skipped += total[:, None] * tl.load(multipliers + (schedule * COLUMNS + part * _PART) + lane)
    return skipped


@triton.jit
def _stored(mask, lane, STORED: tl.constexpr, COLUMNS: tl.constexpr):
    """Narrow the mask of rows [ROWS, 1] to the columns that they have in memory; further ones are zero."""
    if STORED < COLUMNS:
        tl.static_assert(COLUMNS == _PART)
        mask = mask & (lane < STORED)
    return mask


@triton.jit
def is_wanted(wanted, row, inside):
    """Tell which rows of the tile to move: those inside, and where `wanted` says so."""
    if wanted is not None:
        inside = inside & (tl.load(wanted + row, mask=inside, other=0) != 0)
    return inside


@triton.jit(do_not_specialize=["capacity", "num_rows"], do_not_specialize_on_alignment=["last_step"])
def _fetch_kernel(
    packed,  # [rows, 2 * STORED] on the host or on the device
    places,  # [V]; None: in order
    ids,  # [V], or None
    last_step,  # [N]; without ids [V]
    wanted,  # [V] or None
    out,  # [V, COLUMNS]
    sums,  # [SCHEDULES, capacity] float64
    multipliers,  # [SCHEDULES, COLUMNS]
    capacity,
    eps,
    reach,
    num_rows,  # V
    SCHEDULES: tl.constexpr,
    COLUMNS: tl.constexpr,
    STORED: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
):
    lane = tl.arange(0, _PART)[None, :]
    for first in range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        fetched = is_wanted(wanted, row, row < num_rows)
        place = row.to(tl.int64)
        if places is not None:
            place = tl.load(places + row, mask=fetched, other=0)
        there = packed + place * (2 * STORED)
        if ids is None:
            last = tl.load(last_step + row, mask=fetched, other=0)
        else:
            last = tl.load(last_step + tl.load(ids + row, mask=fetched, other=0), mask=fetched, other=0)
        used = fetched[:, None]
        stored = _stored(used, lane, STORED, COLUMNS)
        scale0, scale1, scale2 = _load_scales(there + STORED, fetched, COLUMNS, CODES)
        words0, words1, words2 = load_parts(there[:, None] + (STORED + lane), stored, COLUMNS)
        values0, values1, values2 = load_parts(there[:, None] + lane, stored, COLUMNS)
        tl.debug_barrier()
        out0, out1, out2 = 0.0, 0.0, 0.0
        for part in tl.static_range(COLUMNS // _PART):
            w, words = part_of(values0, values1, values2, part), part_of(words0, words1, words2, part)
            m, v = _decoded_moments(words, scale0, scale1, scale2, reach, part, COLUMNS, CODES)
            skipped = skipped_part(sums, multipliers, capacity, last, fetched, part, SCHEDULES, COLUMNS)
            w = caught_up(decoded_values(w, CODES), m, v, skipped, eps)
            out0, out1, out2 = with_part(out0, out1, out2, w, part)
        here = (row.to(tl.int64) * COLUMNS)[:, None] + lane
        store_parts(out + here, out0, out1, out2, used, COLUMNS)


@triton.jit(
    do_not_specialize=["sums_capacity", "capacity", "step", "seed", "num_rows"],
    do_not_specialize_on_alignment=["last_step"],
)
def _step_kernel(
    values,  # [V, COLUMNS]; None: they are decoded, and caught up by these
    sums,  # [SCHEDULES, sums_capacity] float64, of the steps before this one
    sums_capacity,
    eps_before,
    ids,  # [V]
    last_step,  # [N], by ids; or IN_ORDER, [V]
    gradients,  # [V, COLUMNS] or None
    means,  # [V, 3], or None: they are made of this and of what comes up to at_z (`harmonics_triton.seen`)
    means_stride,
    constant,
    constant_stride,
    at_x,
    at_y,
    at_z,
    packed,  # [N, 2 * STORED] on the host or on the device; or a view's, [V, 2 * STORED]
    multipliers,  # [SCHEDULES, COLUMNS]
    rate,  # of the first schedule
    other_rate,  # of the second, where there is one
    decays,  # [2, capacity] float64
    capacity,
    step,
    seed,
    gradient_weight,  # 1 - b1
    square_weight,  # 1 - b2
    eps,
    reach,
    num_rows,  # V
    HARMONICS: tl.constexpr,
    IN_ORDER: tl.constexpr,
    SCHEDULES: tl.constexpr,
    COLUMNS: tl.constexpr,
    STORED: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
):
    lane = tl.arange(0, _PART)[None, :]
    # No loop over tiles: from one, what lanes have in common would be taken out, and a third more registers with it.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    changed = row < num_rows
    row_id = tl.load(ids + row, mask=changed, other=0)
    place = row.to(tl.int64) if IN_ORDER else row_id
    last = tl.load(last_step + place, mask=changed, other=0)
    skipped = step - 1 - last
    reached = step
    if gradients is None and means is None:
        changed = changed & (skipped > 0)
        reached = step - 1
    here = (row.to(tl.int64) * COLUMNS)[:, None] + lane
    there, used = packed + place * (2 * STORED), changed[:, None]
    stored = _stored(used, lane, STORED, COLUMNS)
    if values is None:
        w0, w1, w2 = load_parts(there[:, None] + lane, stored, COLUMNS)
        w0, w1, w2 = decoded_values(w0, CODES), decoded_values(w1, CODES), decoded_values(w2, CODES)
    else:
        w0, w1, w2 = load_parts(values + here, used, COLUMNS)
    g0, g1, g2 = w0, w1, w2
    if gradients is not None:
        g0, g1, g2 = load_parts(gradients + here, used, COLUMNS)
    if means is not None:
        x, y, z, red, green, blue = seen(means, means_stride, constant, constant_stride, at_x, at_y, at_z, row, changed)
    tl.debug_barrier()
    words0, words1, words2 = load_parts(there[:, None] + (STORED + lane), stored, COLUMNS)
    scale0, scale1, scale2 = _load_scales(there + STORED, changed, COLUMNS, CODES)
    decay1, near, rest = decays_of(decays, capacity, skipped, changed)
    if means is not None:  # while words are under way
        g0 = made_gradient(x, y, z, red, green, blue, 0, HARMONICS)
        g1 = made_gradient(x, y, z, red, green, blue, _PART, HARMONICS)
        g2 = made_gradient(x, y, z, red, green, blue, 2 * _PART, HARMONICS)
    tl.debug_barrier()
    tl.store(last_step + place, reached, mask=changed)  # which all threads have read: a tile has whole rows
    m0, m1, m2 = w0, w0, w0
    v0, v1, v2 = w0, w0, w0
    random0, random1, random2 = w0, w0, w0
    for part in tl.static_range(COLUMNS // _PART):
        w, g, words = part_of(w0, w1, w2, part), part_of(g0, g1, g2, part), part_of(words0, words1, words2, part)
        m, v = _decoded_moments(words, scale0, scale1, scale2, reach, part, COLUMNS, CODES)
        if values is None:
            sizes_skipped = skipped_part(sums, multipliers, sums_capacity, last, changed, part, SCHEDULES, COLUMNS)
            w = caught_up(w, m, v, sizes_skipped, eps_before)
        m, v = decayed(m, v, decay1, near, rest)
        if gradients is not None or means is not None:
            size = tl.load(multipliers + part * _PART + lane) * rate
            if SCHEDULES == 2:
                size = tl.fma(tl.load(multipliers + COLUMNS + part * _PART + lane), other_rate, size)
            w, m, v = adam_step(w, m, v, g, size, gradient_weight, square_weight, eps)
        random = random_bits(row_id[:, None] * COLUMNS + part * _PART + lane, seed)
        if CODES:
            w = round_to_half(w, random)
        w0, w1, w2 = with_part(w0, w1, w2, w, part)
        m0, m1, m2 = with_part(m0, m1, m2, m, part)
        v0, v1, v2 = with_part(v0, v1, v2, v, part)
        random0, random1, random2 = with_part(random0, random1, random2, random, part)
    if values is not None:
        store_parts(values + here, w0, w1, w2, used, COLUMNS)
    there = there[:, None] + lane
    w0, w1, w2 = _coded_values(w0, CODES), _coded_values(w1, CODES), _coded_values(w2, CODES)
    store_parts(there, w0, w1, w2, stored, COLUMNS)
    words0, words1, words2 = _coded_moments(
        m0, m1, m2, v0, v1, v2, random0, random1, random2, reach, COLUMNS, CODES
    )  # fmt: skip
    moments = there + STORED
    if STORED < COLUMNS:
        # They are aligned to 8 bytes, and not to 16; told so, the compiler would have threads exchange columns for this
        # store. The mask keeps it from storing more than two of them at once, whatever it is told.
        moments = tl.multiple_of(moments, [16, 16])
    store_parts(moments, words0, words1, words2, stored, COLUMNS)


@triton.jit
def _copy_words(
    source, target, near, places, ids, wanted, first_row, num_rows,
    TO_VIEW: tl.constexpr, VECTORS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Copy ROWS rows from `first_row` on of a view, as 16-byte vectors, TILE at a time."""
    lane = tl.arange(0, 4)[None, :]
    for part in tl.static_range(ROWS * VECTORS // TILE):
        vector = part * TILE + tl.arange(0, TILE)
        row, column = first_row + vector // VECTORS, vector % VECTORS
        copied = is_wanted(wanted, row, row < num_rows)
        row_id = tl.load(ids + row, mask=copied, other=0)
        here = (row.to(tl.int64) * VECTORS + column)[:, None] * 4 + lane
        there = (row_id * VECTORS + column)[:, None] * 4 + lane
        nearby, resident = here, copied[:, None]  # which nobody looks at
        if places is not None:
            place = tl.load(places + row_id, mask=copied, other=-1).to(tl.int64)
            nearby, resident = (place * VECTORS + column)[:, None] * 4 + lane, (place >= 0)[:, None]
        _copy_between(source, target, near, here, there, nearby, copied[:, None], resident, TO_VIEW)


@triton.jit
def _copy_steps(source, target, near, row, row_id, place, copied, TO_VIEW: tl.constexpr):
    _copy_between(source, target, near, row, row_id, place, copied, place >= 0, TO_VIEW)


@triton.jit
def _copy_between(source, target, near, here, there, nearby, copied, resident, TO_VIEW: tl.constexpr):
    """Copy what lies `here` in a view, and `there`; or, where it is resident, `nearby`."""
    far = copied
    if near is not None:
        far = copied & ~resident
    if TO_VIEW:
        values = tl.load(source + there, mask=far, other=0)
        if near is not None:
            values = tl.where(resident, tl.load(near + nearby, mask=resident, other=0), values)
        tl.store(target + here, values, mask=copied)
    else:
        values = tl.load(source + here, mask=copied, other=0)
        if near is not None:
            tl.store(near + nearby, values, mask=resident)
        tl.store(target + there, values, mask=far)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=UNALIGNED)
def _copy_kernel(
    source, source_steps, target, target_steps,  # of a group: int32 [rows, VECTORS * 4], [rows]
    other_source, other_source_steps, other_target, other_target_steps,  # of another, or None
    ids,  # [V], of the side that is not a view
    wanted,  # [V]
    num_rows,  # V
    places,  # int32 [N], where rows of that side are among the residents, or -1; or None, as all below
    near, near_steps,  # residents of the group: int32 [R, VECTORS * 4], [R]
    other_near, other_near_steps,  # of the other group
    moved,  # int64 [1], counts residents
    TO_VIEW: tl.constexpr,
    VECTORS: tl.constexpr,
    OTHER_VECTORS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    for first in range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        copied = is_wanted(wanted, row, row < num_rows)
        row_id = tl.load(ids + row, mask=copied, other=0)
        place = row_id  # which nobody looks at
        if places is not None:
            place = tl.load(places + row_id, mask=copied, other=-1).to(tl.int64)
            tl.atomic_add(moved, tl.sum((place >= 0).to(tl.int64)))
        _copy_words(source, target, near, places, ids, wanted, first, num_rows, TO_VIEW, VECTORS, ROWS, TILE)
        _copy_steps(source_steps, target_steps, near_steps, row, row_id, place, copied, TO_VIEW)
        if OTHER_VECTORS > 0:
            _copy_words(
                other_source, other_target, other_near, places, ids, wanted, first, num_rows,
                TO_VIEW, OTHER_VECTORS, ROWS, TILE,
            )  # fmt: skip
            _copy_steps(
                other_source_steps, other_target_steps, other_near_steps, row, row_id, place, copied, TO_VIEW
            )  # fmt: skip
