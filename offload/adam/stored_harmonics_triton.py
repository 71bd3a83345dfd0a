"""`offload/adam/stored_harmonics.py` as CUDA kernels in Triton, and Adam's step on such rows in float32.

A program has ROWS colours, and reads their rows in parts of 16 columns, as those of `packed_rows_triton.py` do, where
the step on packed ones is: all that it needs of them first, and a barrier keeps the compiler to that.

Memory traffic of a colour at degree 3: 192 bytes of a row with codes, 576 of one in float32, and some 40 of everything
else. A pass over 1.4 million of them is 0.08 or 0.21 ms at 4 TB/s.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.adam.codes_triton import PART, decode_moments, load_scales, part_of, with_part
from offload.adam.deferral import DeferralTables
from offload.adam.deferral_triton import adam_step, caught_up, decayed, decays_of
from offload.adam.harmonics import (
    CONSTANT,
    CUT_BELOW,
    LEAST_COLOR,
    SHORTEST_SQUARED,
    HarmonicsGradient,
    num_harmonics,
)
from offload.adam.harmonics_triton import arguments_of, harmonics_part, made_gradient, seen, slopes_part
from offload.adam.packed_rows_triton import (
    TILE,
    WARPS,
    decoded_values,
    load_parts,
    packed_words,
    skipped_part,
    store_parts,
    tables_of,
)
from offload.adam.stored_harmonics import StoredRows
from offload.store.layout import RowState

_PART = tl.constexpr(PART)
_CONSTANT = tl.constexpr(CONSTANT)
_SHORTEST_SQUARED = tl.constexpr(SHORTEST_SQUARED)
_CUT_BELOW, _LEAST_COLOR = tl.constexpr(CUT_BELOW), tl.constexpr(LEAST_COLOR)
ROWS = TILE // PART


def colors_of(
    others: StoredRows, sh0: Tensor, means: Tensor, camera_positions: Tensor, ids: Tensor, sh_degree: int
) -> Tensor:
    """Do as `offload.adam.stored_harmonics.colors_of`."""
    count = ids.shape[0]
    colors = means.new_empty(count, 3)
    if count:
        with torch.cuda.device_of(ids):
            _colors_kernel[(-(-count // ROWS),)](
                means, camera_positions.contiguous(), ids, *_arguments(others), sh0, sh0.stride(0), colors, count,
                **_shape(others, sh_degree),
            )  # fmt: skip
    return colors


def gradients_of(
    others: StoredRows,
    means: Tensor,
    camera_positions: Tensor,
    ids: Tensor,
    colors: Tensor,
    v_colors: Tensor,
    sh_degree: int,
) -> tuple[Tensor, Tensor]:
    """Do as `offload.adam.stored_harmonics.gradients_of`."""
    both, count = means.new_zeros(2, means.shape[0], 3), ids.shape[0]  # one tensor, which is cleared at once
    v_sh0, v_means = both[0], both[1]
    if count:
        with torch.cuda.device_of(ids):
            _gradients_kernel[(-(-count // ROWS),)](
                means, camera_positions.contiguous(), ids, *_arguments(others), colors, v_colors.contiguous(), v_sh0,
                v_means, count, **_shape(others, sh_degree),
            )  # fmt: skip
    return v_sh0[:, None], v_means


def step(ids: Tensor, last_step: Tensor, made: HarmonicsGradient, rows: RowState, tables: DeferralTables) -> None:
    """Do as `offload.adam.rows.step_host_rows` without values, for rows in float32."""
    before = tables.skipped(previous=True)
    if tables.schedules > 2:
        raise ValueError(f"rows of harmonics have one schedule or two, and not {tables.schedules}")
    with torch.cuda.device_of(ids):
        _step_kernel[(-(-ids.shape[0] // ROWS),)](
            *rows.tensors(),
            ids,
            last_step,
            *arguments_of(made),
            *tables_of(before),
            tables.rates[0],
            tables.rates[-1],
            tables.decays,
            tables.decays.shape[1],
            tables.step,
            1 - tables.betas[0],
            1 - tables.betas[1],
            tables.eps,
            ids.shape[0],
            SCHEDULES=tables.schedules,
            HARMONICS=num_harmonics(made.sh_degree),
            COLUMNS=tables.columns,
            ROWS=ROWS,
            num_warps=WARPS,
        )


def _arguments(others: StoredRows) -> tuple[Tensor | float | int | None, ...]:
    skipped = others.skipped
    if skipped is None:
        return others.rows.parameters, None, None, others.places, None, None, None, 0, 0.0, 0.0
    rows = (packed_words(others.rows), None, None) if _has_codes(others) else others.rows.tensors()
    return *rows, others.places, others.last_step, *tables_of(skipped), skipped.reach


def _has_codes(others: StoredRows) -> bool:
    return len(others.rows.moments) == 1


def _shape(others: StoredRows, sh_degree: int) -> dict[str, int]:
    """Return the shape of a tile and the kind of rows, by the names of the kernels' arguments."""
    columns = others.rows.parameters.shape[1]
    schedules = 0 if others.skipped is None else len(others.skipped.multipliers)
    kind = {"BEFORE": 3 if others.has_constant else 0, "CODES": int(_has_codes(others))}
    shape = {"SCHEDULES": schedules, "HARMONICS": num_harmonics(sh_degree), "COLUMNS": columns, "ROWS": ROWS}
    return {**shape, **kind, "num_warps": WARPS}


@triton.jit
def _seen(means, camera_position, ids, row, inside):
    """Return which rows colours [ROWS] are made of, int64, and the unit vectors and distances to them, [ROWS, 1]."""
    number = tl.load(ids + row, mask=inside, other=0)
    x = tl.load(means + number * 3, mask=inside, other=0.0) - tl.load(camera_position)
    y = tl.load(means + number * 3 + 1, mask=inside, other=0.0) - tl.load(camera_position + 1)
    z = tl.load(means + number * 3 + 2, mask=inside, other=0.0) - tl.load(camera_position + 2)
    inverse = 1.0 / tl.sqrt(tl.maximum(x * x + y * y + z * z, _SHORTEST_SQUARED))
    return number, (x * inverse)[:, None], (y * inverse)[:, None], (z * inverse)[:, None], inverse[:, None]


@triton.jit
def _load(
    rows, exp_avg, exp_avg_sq, places, last_step, number, inside,
    HARMONICS: tl.constexpr, BEFORE: tl.constexpr, CODES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Load all that is used of rows [ROWS] of a view, before any of it is worked on.

    Returns:
        Their last steps [ROWS]; the scales of rows with codes; and parts [ROWS, 16] of parameters and of both moments:
        as integers, parameters and codes, where there are codes.
    """
    lane, used = tl.arange(0, _PART)[None, :], inside[:, None]
    place = number
    if places is not None:
        place = tl.load(places + number, mask=inside, other=0)
    last = place  # which nothing reads
    if last_step is not None:
        last = tl.load(last_step + place, mask=inside, other=0)
    scale0, scale1, scale2 = 0.0, 0.0, 0.0
    if CODES:
        there = rows + place * (2 * COLUMNS)
        scale0, scale1, scale2 = load_scales(there + COLUMNS, inside, COLUMNS)
        w0, w1, w2 = load_parts(there[:, None] + lane, used, BEFORE + 3 * HARMONICS)
        m0, m1, m2 = load_parts(there[:, None] + (COLUMNS + lane), used, BEFORE + 3 * HARMONICS)
        v0, v1, v2 = m0, m1, m2
    else:
        at = (place * COLUMNS)[:, None] + lane
        w0, w1, w2 = load_parts(rows + at, used, BEFORE + 3 * HARMONICS)
        m0, m1, m2, v0, v1, v2 = w0, w1, w2, w0, w1, w2
        if exp_avg is not None:
            m0, m1, m2 = load_parts(exp_avg + at, used, BEFORE + 3 * HARMONICS)
            v0, v1, v2 = load_parts(exp_avg_sq + at, used, BEFORE + 3 * HARMONICS)
    tl.debug_barrier()
    return last, scale0, scale1, scale2, w0, w1, w2, m0, m1, m2, v0, v1, v2


@triton.jit
def _current(
    w, m, v, last, inside, scale0, scale1, scale2, sums, multipliers, capacity, eps, reach,
    part: tl.constexpr, SCHEDULES: tl.constexpr, CODES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute a part of the current values of rows from what `_load` gives; without schedules they are that."""
    if CODES:
        w = decoded_values(w, True)
        m, v = decode_moments(m, scale0, scale1, scale2, reach, part, COLUMNS)
    if SCHEDULES > 0:
        w = caught_up(w, m, v, skipped_part(sums, multipliers, capacity, last, inside, part, SCHEDULES, COLUMNS), eps)
    return w


@triton.jit
def _of_color(values, lane, part: tl.constexpr, COLOR: tl.constexpr):
    """Return the columns [ROWS, 16] of one colour, and zeros: column 3k + c is of the colour c."""
    channel = (lane + part * _PART) % 3
    return tl.where(channel == COLOR, values, 0.0)


@triton.jit(do_not_specialize=["capacity", "num_rows"], do_not_specialize_on_alignment=["last_step", "ids"])
def _colors_kernel(
    means, camera_position,  # [V, 3], [1, 3]
    ids,  # [M]
    # int16 [rows, 2 * COLUMNS], packed; or float32 [rows, COLUMNS], as both moments. Packed rows have no others, and
    # current ones none; those have no last step and no tables either.
    rows, exp_avg, exp_avg_sq,
    places,  # [V] or None
    last_step,  # [rows]
    sums,  # [SCHEDULES, capacity] float64
    multipliers,  # [SCHEDULES, COLUMNS]
    capacity, eps, reach,
    sh0, sh0_stride,  # [V, 3]
    colors,  # [M, 3]
    num_rows,  # M
    SCHEDULES: tl.constexpr,
    HARMONICS: tl.constexpr,  # in use, without the constant one
    BEFORE: tl.constexpr,  # columns of the constant one, before the others: 0 or 3
    CODES: tl.constexpr,  # whether rows are packed
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, _PART)[None, :]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    number, x, y, z, _ = _seen(means, camera_position, ids, row, inside)
    of_constant = sh0 + number * sh0_stride
    red = tl.load(of_constant, mask=inside, other=0.0)
    green = tl.load(of_constant + 1, mask=inside, other=0.0)
    blue = tl.load(of_constant + 2, mask=inside, other=0.0)
    if BEFORE + HARMONICS > 0:
        last, scale0, scale1, scale2, w0, w1, w2, m0, m1, m2, v0, v1, v2 = _load(
            rows, exp_avg, exp_avg_sq, places, last_step, number, inside, HARMONICS, BEFORE, CODES, COLUMNS
        )  # fmt: skip
        reds, greens, blues = x * tl.zeros_like(lane), x * tl.zeros_like(lane), x * tl.zeros_like(lane)
        for part in tl.static_range(COLUMNS // _PART):
            if part * _PART < 3 * HARMONICS + BEFORE:
                w, m, v = part_of(w0, w1, w2, part), part_of(m0, m1, m2, part), part_of(v0, v1, v2, part)
                w = _current(
                    w, m, v, last, inside, scale0, scale1, scale2, sums, multipliers, capacity, eps, reach,
                    part, SCHEDULES, CODES, COLUMNS,
                )  # fmt: skip
                terms = w * harmonics_part(x, y, z, part * _PART - BEFORE, HARMONICS)
                reds += _of_color(terms, lane, part, 0)
                greens += _of_color(terms, lane, part, 1)
                blues += _of_color(terms, lane, part, 2)
        red, green, blue = red + tl.sum(reds, axis=1), green + tl.sum(greens, axis=1), blue + tl.sum(blues, axis=1)
    red, green, blue = red * _CONSTANT + 0.5, green * _CONSTANT + 0.5, blue * _CONSTANT + 0.5
    tl.store(colors + row * 3, tl.where(red > _CUT_BELOW, tl.maximum(red, _LEAST_COLOR), 0.0), mask=inside)
    tl.store(colors + row * 3 + 1, tl.where(green > _CUT_BELOW, tl.maximum(green, _LEAST_COLOR), 0.0), mask=inside)
    tl.store(colors + row * 3 + 2, tl.where(blue > _CUT_BELOW, tl.maximum(blue, _LEAST_COLOR), 0.0), mask=inside)


@triton.jit
def _constant_gradient(color, v_color, inside):
    """Load gradients [ROWS] of the constant harmonic in one channel, by those of colours; zero where these were cut."""
    is_drawn = tl.load(color, mask=inside, other=0.0) > 0.0
    return tl.where(is_drawn, tl.load(v_color, mask=inside, other=0.0), 0.0) * _CONSTANT


@triton.jit(do_not_specialize=["capacity", "num_rows"], do_not_specialize_on_alignment=["last_step", "ids"])
def _gradients_kernel(
    means, camera_position, ids, rows, exp_avg, exp_avg_sq, places, last_step, sums, multipliers, capacity, eps, reach,
    colors, v_colors,  # [M, 3], the first zero where they were cut
    v_sh0, v_means,  # [V, 3]
    num_rows,  # M
    SCHEDULES: tl.constexpr, HARMONICS: tl.constexpr, BEFORE: tl.constexpr, CODES: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, _PART)[None, :]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    number, x, y, z, inverse = _seen(means, camera_position, ids, row, inside)
    red = _constant_gradient(colors + row * 3, v_colors + row * 3, inside)
    green = _constant_gradient(colors + row * 3 + 1, v_colors + row * 3 + 1, inside)
    blue = _constant_gradient(colors + row * 3 + 2, v_colors + row * 3 + 2, inside)
    if HARMONICS > 0:
        last, scale0, scale1, scale2, w0, w1, w2, m0, m1, m2, v0, v1, v2 = _load(
            rows, exp_avg, exp_avg_sq, places, last_step, number, inside, HARMONICS, BEFORE, CODES, COLUMNS
        )  # fmt: skip
        v_xs, v_ys, v_zs = x * tl.zeros_like(lane), x * tl.zeros_like(lane), x * tl.zeros_like(lane)
        for part in tl.static_range(COLUMNS // _PART):
            if part * _PART < 3 * HARMONICS + BEFORE:
                w, m, v = part_of(w0, w1, w2, part), part_of(m0, m1, m2, part), part_of(v0, v1, v2, part)
                w = _current(
                    w, m, v, last, inside, scale0, scale1, scale2, sums, multipliers, capacity, eps, reach,
                    part, SCHEDULES, CODES, COLUMNS,
                )  # fmt: skip
                channel = (lane + part * _PART) % 3
                w = w * tl.where(channel == 0, red[:, None], tl.where(channel == 1, green[:, None], blue[:, None]))
                v_xs += w * slopes_part(x, y, z, part * _PART - BEFORE, HARMONICS, 0)
                v_ys += w * slopes_part(x, y, z, part * _PART - BEFORE, HARMONICS, 1)
                v_zs += w * slopes_part(x, y, z, part * _PART - BEFORE, HARMONICS, 2)
        v_x, v_y, v_z = tl.sum(v_xs, axis=1)[:, None], tl.sum(v_ys, axis=1)[:, None], tl.sum(v_zs, axis=1)[:, None]
        # Through d / |d|: what points along d is lost. One camera sees a row once, so nobody adds to the same one.
        along = v_x * x + v_y * y + v_z * z
        to = v_means + (number * 3)[:, None]
        tl.store(to, (v_x - along * x) * inverse, mask=inside[:, None])
        tl.store(to + 1, (v_y - along * y) * inverse, mask=inside[:, None])
        tl.store(to + 2, (v_z - along * z) * inverse, mask=inside[:, None])
    tl.store(v_sh0 + number * 3, red, mask=inside)
    tl.store(v_sh0 + number * 3 + 1, green, mask=inside)
    tl.store(v_sh0 + number * 3 + 2, blue, mask=inside)


@triton.jit(
    do_not_specialize=["sums_capacity", "capacity", "step", "num_rows"],
    do_not_specialize_on_alignment=["last_step", "ids"],
)
def _step_kernel(
    rows, exp_avg, exp_avg_sq,  # [N, COLUMNS], of which the first three are the constant harmonic's
    ids,  # [V]
    last_step,  # [V]
    means, means_stride, constant, constant_stride, at_x, at_y, at_z,  # as `harmonics_triton.arguments_of` gives them
    sums,  # [SCHEDULES, sums_capacity] float64, of the steps before this one
    multipliers,  # [SCHEDULES, COLUMNS]
    sums_capacity,
    eps_before,
    rate,  # of the first schedule
    other_rate,  # of the second, where there is one
    decays,  # [2, capacity] float64
    capacity,
    step,
    gradient_weight,  # 1 - b1
    square_weight,  # 1 - b2
    eps,
    num_rows,  # V
    SCHEDULES: tl.constexpr, HARMONICS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, _PART)[None, :]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    place, last = tl.load(ids + row, mask=inside, other=0), tl.load(last_step + row, mask=inside, other=0)
    at, used = (place * COLUMNS)[:, None] + lane, inside[:, None]
    w0, w1, w2 = load_parts(rows + at, used, COLUMNS)
    m0, m1, m2 = load_parts(exp_avg + at, used, COLUMNS)
    v0, v1, v2 = load_parts(exp_avg_sq + at, used, COLUMNS)
    x, y, z, red, green, blue = seen(means, means_stride, constant, constant_stride, at_x, at_y, at_z, row, inside)
    decay1, near, rest = decays_of(decays, capacity, step - 1 - last, inside)
    tl.debug_barrier()
    for part in tl.static_range(COLUMNS // _PART):
        w, m, v = part_of(w0, w1, w2, part), part_of(m0, m1, m2, part), part_of(v0, v1, v2, part)
        w = caught_up(
            w, m, v, skipped_part(sums, multipliers, sums_capacity, last, inside, part, SCHEDULES, COLUMNS), eps_before
        )
        m, v = decayed(m, v, decay1, near, rest)
        gradient = made_gradient(x, y, z, red, green, blue, part * _PART - 3, HARMONICS)
        size = tl.load(multipliers + part * _PART + lane) * rate
        if SCHEDULES == 2:
            size = tl.fma(tl.load(multipliers + COLUMNS + part * _PART + lane), other_rate, size)
        w, m, v = adam_step(w, m, v, gradient, size, gradient_weight, square_weight, eps)
        w0, w1, w2 = with_part(w0, w1, w2, w, part)
        m0, m1, m2 = with_part(m0, m1, m2, m, part)
        v0, v1, v2 = with_part(v0, v1, v2, v, part)
    store_parts(rows + at, w0, w1, w2, used, COLUMNS)
    store_parts(exp_avg + at, m0, m1, m2, used, COLUMNS)
    store_parts(exp_avg_sq + at, v0, v1, v2, used, COLUMNS)
