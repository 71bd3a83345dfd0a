"""`offload/adam/stored_harmonics.py` as CUDA kernels in Triton, and Adam's step on such rows in float32.

A program has ROWS colours, and reads their rows in parts of 16 columns, as those of `packed_rows_triton.py` do, where
the step on packed ones is: all that it needs of them first, and a barrier keeps the compiler to that.

Memory traffic of a colour at degree 3: 192 bytes of a row with codes, 576 of one in float32, and some 80 of everything
else, slopes among them. A pass over 1.4 million of them is 0.09 or 0.23 ms at 4 TB/s, and their gradients 0.03.
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
COLORS = 256  # whose gradients a program computes


def colors_of(
    others: StoredRows, sh0: Tensor, means: Tensor, camera_positions: Tensor, ids: Tensor, sh_degree: int
) -> tuple[Tensor, Tensor | None]:
    """Do as `offload.adam.stored_harmonics.colors_of`."""
    count = ids.shape[0]
    colors = means.new_empty(count, 3)
    slopes = means.new_empty(count, 3, 3) if num_harmonics(sh_degree) else None
    if count:
        with torch.cuda.device_of(ids):
            _colors_kernel[(-(-count // ROWS),)](
                means, camera_positions.contiguous(), ids, *_arguments(others), sh0, sh0.stride(0), colors, slopes,
                count, **_shape(others, sh_degree),
            )  # fmt: skip
    return colors, slopes


def gradients_of(
    num_rows: int, ids: Tensor, colors: Tensor, slopes: Tensor | None, v_colors: Tensor
) -> tuple[Tensor, Tensor]:
    """Do as `offload.adam.stored_harmonics.gradients_of`."""
    both, count = colors.new_zeros(2, num_rows, 3), ids.shape[0]  # one tensor, which is cleared at once
    if count:
        with torch.cuda.device_of(ids):
            _gradients_kernel[(-(-count // COLORS),)](
                ids, colors, slopes, v_colors.contiguous(), both, num_rows, count, COLORS=COLORS
            )
    return both[0][:, None], both[1]


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


@triton.jit
def _sums(
    c0, c1, c2, x, y, z,
    AXIS: tl.constexpr, HARMONICS: tl.constexpr, BEFORE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum up coefficients times their harmonics, or times the derivatives of these by x, y or z (AXIS 0 to 2).

    Args:
        c0, c1, c2: Parts of the coefficients, [ROWS, 16].
        x, y, z: Of directions, [ROWS, 1].

    Returns:
        Three colours, [ROWS].
    """
    lane = tl.arange(0, _PART)[None, :]
    reds, greens, blues = x * tl.zeros_like(lane), x * tl.zeros_like(lane), x * tl.zeros_like(lane)
    for part in tl.static_range(COLUMNS // _PART):
        if part * _PART < 3 * HARMONICS + BEFORE:
            if AXIS < 0:
                basis = harmonics_part(x, y, z, part * _PART - BEFORE, HARMONICS)
            else:
                basis = slopes_part(x, y, z, part * _PART - BEFORE, HARMONICS, AXIS)
            terms = part_of(c0, c1, c2, part) * basis
            reds += _of_color(terms, lane, part, 0)
            greens += _of_color(terms, lane, part, 1)
            blues += _of_color(terms, lane, part, 2)
    return tl.sum(reds, axis=1), tl.sum(greens, axis=1), tl.sum(blues, axis=1)


@triton.jit
def _store_slope(to, by_x, by_y, by_z, x, y, z, inverse, inside):
    """Store the slopes [ROWS] of a colour by means, of those by the direction d / |d|: what points along d is lost."""
    by_x, by_y, by_z = by_x[:, None] * _CONSTANT, by_y[:, None] * _CONSTANT, by_z[:, None] * _CONSTANT
    along = by_x * x + by_y * y + by_z * z
    tl.store(to, (by_x - along * x) * inverse, mask=inside[:, None])
    tl.store(to + 1, (by_y - along * y) * inverse, mask=inside[:, None])
    tl.store(to + 2, (by_z - along * z) * inverse, mask=inside[:, None])


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
    slopes,  # [M, 3, 3], by colours and means; None of degree 0
    num_rows,  # M
    SCHEDULES: tl.constexpr,
    HARMONICS: tl.constexpr,  # in use, without the constant one
    BEFORE: tl.constexpr,  # columns of the constant one, before the others: 0 or 3
    CODES: tl.constexpr,  # whether rows are packed
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    number, x, y, z, inverse = _seen(means, camera_position, ids, row, inside)
    of_constant = sh0 + number * sh0_stride
    red = tl.load(of_constant, mask=inside, other=0.0)
    green = tl.load(of_constant + 1, mask=inside, other=0.0)
    blue = tl.load(of_constant + 2, mask=inside, other=0.0)
    if BEFORE + HARMONICS > 0:
        last, scale0, scale1, scale2, w0, w1, w2, m0, m1, m2, v0, v1, v2 = _load(
            rows, exp_avg, exp_avg_sq, places, last_step, number, inside, HARMONICS, BEFORE, CODES, COLUMNS
        )  # fmt: skip
        c0, c1, c2 = 0.0, 0.0, 0.0
        for part in tl.static_range(COLUMNS // _PART):
            if part * _PART < 3 * HARMONICS + BEFORE:
                w, m, v = part_of(w0, w1, w2, part), part_of(m0, m1, m2, part), part_of(v0, v1, v2, part)
                w = _current(
                    w, m, v, last, inside, scale0, scale1, scale2, sums, multipliers, capacity, eps, reach,
                    part, SCHEDULES, CODES, COLUMNS,
                )  # fmt: skip
                c0, c1, c2 = with_part(c0, c1, c2, w, part)
        reds, greens, blues = _sums(c0, c1, c2, x, y, z, -1, HARMONICS, BEFORE, COLUMNS)
        red, green, blue = red + reds, green + greens, blue + blues
        if HARMONICS > 0:
            red_x, green_x, blue_x = _sums(c0, c1, c2, x, y, z, 0, HARMONICS, BEFORE, COLUMNS)
            red_y, green_y, blue_y = _sums(c0, c1, c2, x, y, z, 1, HARMONICS, BEFORE, COLUMNS)
            red_z, green_z, blue_z = _sums(c0, c1, c2, x, y, z, 2, HARMONICS, BEFORE, COLUMNS)
            to = slopes + (row.to(tl.int64) * 9)[:, None]
            _store_slope(to, red_x, red_y, red_z, x, y, z, inverse, inside)
            _store_slope(to + 3, green_x, green_y, green_z, x, y, z, inverse, inside)
            _store_slope(to + 6, blue_x, blue_y, blue_z, x, y, z, inverse, inside)
    red, green, blue = red * _CONSTANT + 0.5, green * _CONSTANT + 0.5, blue * _CONSTANT + 0.5
    tl.store(colors + row * 3, tl.where(red > _CUT_BELOW, tl.maximum(red, _LEAST_COLOR), 0.0), mask=inside)
    tl.store(colors + row * 3 + 1, tl.where(green > _CUT_BELOW, tl.maximum(green, _LEAST_COLOR), 0.0), mask=inside)
    tl.store(colors + row * 3 + 2, tl.where(blue > _CUT_BELOW, tl.maximum(blue, _LEAST_COLOR), 0.0), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "count"], do_not_specialize_on_alignment=["ids"])
def _gradients_kernel(
    ids,  # [M]
    colors,  # [M, 3], zero where they were cut
    slopes,  # [M, 3, 3], or None
    v_colors,  # [M, 3]
    gradients,  # [2, V, 3], of sh0 and of means
    num_rows,  # V
    count,  # M
    COLORS: tl.constexpr,
):
    row = tl.program_id(0) * COLORS + tl.arange(0, COLORS)
    inside = row < count
    # One camera sees a row once, so nobody adds to the same one.
    v_sh0 = gradients + tl.load(ids + row, mask=inside, other=0) * 3
    v_means = v_sh0 + num_rows.to(tl.int64) * 3
    v_x, v_y, v_z = tl.zeros((COLORS,), tl.float32), tl.zeros((COLORS,), tl.float32), tl.zeros((COLORS,), tl.float32)
    for channel in tl.static_range(3):
        is_drawn = tl.load(colors + row * 3 + channel, mask=inside, other=0.0) > 0.0
        v_color = tl.where(is_drawn, tl.load(v_colors + row * 3 + channel, mask=inside, other=0.0), 0.0)
        tl.store(v_sh0 + channel, v_color * _CONSTANT, mask=inside)
        if slopes is not None:
            slope = slopes + row.to(tl.int64) * 9 + channel * 3
            v_x += v_color * tl.load(slope, mask=inside, other=0.0)
            v_y += v_color * tl.load(slope + 1, mask=inside, other=0.0)
            v_z += v_color * tl.load(slope + 2, mask=inside, other=0.0)
    if slopes is not None:
        tl.store(v_means, v_x, mask=inside)
        tl.store(v_means + 1, v_y, mask=inside)
        tl.store(v_means + 2, v_z, mask=inside)


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
