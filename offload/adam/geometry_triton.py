"""`offload/adam/geometry.py` as CUDA kernels in Triton, which read and write only the rows that they are given.

A program visits BLOCK rows, whose step and table entries it looks up once. One launch does all parameters: where few
rows are in view, launching takes longer than the work.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.adam.deferral import DeferralTables, StepSizes
from offload.adam.deferral_triton import adam_step, caught_up, decayed, decays_of, skipped_sizes
from offload.adam.geometry import COLUMNS, GeometryState

BLOCK = 256  # rows
# First columns of these parameters in the optimizer's tables.
SCALES, QUATS, OPACITIES = (tl.constexpr(COLUMNS[name].start) for name in ("scales", "quats", "opacities"))


def gather_rows(state: GeometryState, ids: Tensor, tables: DeferralTables) -> dict[str, Tensor]:
    """Do as `offload.adam.geometry.gather_rows`."""
    values = {name: value.new_empty(len(ids), *value.shape[1:]) for name, value in state.parameters.items()}
    if len(ids):
        with torch.cuda.device_of(ids):
            _gather_kernel[(triton.cdiv(len(ids), BLOCK),)](
                *_arrays(state),
                *(values[name] for name in COLUMNS),
                ids,
                state.last_step,
                *_tables(tables),
                tables.eps,
                len(ids),
                *tables.multipliers.shape,
                BLOCK=BLOCK,
            )
    return values


def step_rows(
    state: GeometryState, ids: Tensor, gradients: Mapping[str, Tensor], tables: DeferralTables, step: StepSizes
) -> None:
    """Do as `offload.adam.geometry.step_rows`."""
    if len(ids) == 0:
        return
    with torch.cuda.device_of(ids):
        _step_kernel[(triton.cdiv(len(ids), BLOCK),)](
            *_arrays(state),
            *(gradients[name].contiguous() for name in COLUMNS),
            ids,
            state.last_step,
            *_tables(tables),
            tables.eps,
            tables.decays,
            tables.step,
            step.sizes,
            1 - step.betas[0],
            1 - step.betas[1],
            step.eps,
            len(ids),
            *tables.multipliers.shape,
            BLOCK=BLOCK,
        )
    state.last_step.index_fill_(0, ids, tables.step + 1)  # when all threads have read it


def _arrays(state: GeometryState) -> list[Tensor]:
    """Return each parameter and its moments."""
    return [array[name] for name in COLUMNS for array in (state.parameters, state.exp_avg, state.exp_avg_sq)]


def _tables(tables: DeferralTables) -> tuple[Tensor, Tensor, int]:
    return tables.sums, tables.multipliers, tables.sums.shape[1]


@triton.jit
def _rows(ids, num_rows, BLOCK: tl.constexpr):
    """Return a program's rows [BLOCK] int64, which of them there are, and which Gaussians they are."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    return row, inside, tl.load(ids + row, mask=inside, other=0)


@triton.jit
def _load_current(
    parameters, first_moment, second_moment, row_id, last, inside, sums, multipliers, capacity, eps,
    SCHEDULES: tl.constexpr, NUM_COLUMNS: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Compute the values [BLOCK, LANES] of one parameter of Gaussians after the skipped steps.

    Returned with them are moments as they were before these steps, where they lie, and which there are. The parameter
    has one rate, that of the first of `multipliers`.
    """
    sizes = skipped_sizes(sums, multipliers, capacity, last, inside, SCHEDULES, NUM_COLUMNS)
    lane = tl.arange(0, LANES)[None, :]
    used = inside[:, None] & (lane < WIDTH)
    at = row_id[:, None] * WIDTH + lane
    w = tl.load(parameters + at, mask=used, other=0.0)
    m = tl.load(first_moment + at, mask=used, other=0.0)
    v = tl.load(second_moment + at, mask=used, other=0.0)
    return caught_up(w, m, v, sizes[:, None], eps), m, v, at, lane, used


@triton.jit
def _gather(
    parameters, first_moment, second_moment, out, row, row_id, last, inside, sums, multipliers, capacity, eps,
    SCHEDULES: tl.constexpr, NUM_COLUMNS: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    w, _m, _v, _at, lane, used = _load_current(
        parameters, first_moment, second_moment, row_id, last, inside, sums, multipliers, capacity, eps,
        SCHEDULES, NUM_COLUMNS, WIDTH, LANES,
    )  # fmt: skip
    tl.store(out + row[:, None] * WIDTH + lane, w, mask=used)


@triton.jit(do_not_specialize=["capacity", "num_rows"])  # or each new kind of number would compile it again
def _gather_kernel(
    means, means_m, means_v, scales, scales_m, scales_v, quats, quats_m, quats_v, opacities, opacities_m, opacities_v,
    out_means, out_scales, out_quats, out_opacities,  # [V, ...]
    ids,  # [V]
    last_step,  # [N]
    sums,  # [SCHEDULES, capacity] float64
    multipliers,  # [SCHEDULES, NUM_COLUMNS]
    capacity,
    eps,
    num_rows,  # V
    SCHEDULES: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, inside, row_id = _rows(ids, num_rows, BLOCK)
    last = tl.load(last_step + row_id, mask=inside, other=0)
    _gather(
        means, means_m, means_v, out_means, row, row_id, last, inside,
        sums, multipliers, capacity, eps, SCHEDULES, NUM_COLUMNS, 3, 4,
    )  # fmt: skip
    _gather(
        scales, scales_m, scales_v, out_scales, row, row_id, last, inside,
        sums, multipliers + SCALES, capacity, eps, SCHEDULES, NUM_COLUMNS, 3, 4,
    )  # fmt: skip
    _gather(
        quats, quats_m, quats_v, out_quats, row, row_id, last, inside,
        sums, multipliers + QUATS, capacity, eps, SCHEDULES, NUM_COLUMNS, 4, 4,
    )  # fmt: skip
    _gather(
        opacities, opacities_m, opacities_v, out_opacities, row, row_id, last, inside,
        sums, multipliers + OPACITIES, capacity, eps, SCHEDULES, NUM_COLUMNS, 1, 1,
    )  # fmt: skip


@triton.jit
def _step(
    parameters, first_moment, second_moment, gradients, row, row_id, last, inside,
    sums, multipliers, capacity, eps, decays, skipped, sizes, gradient_weight, square_weight, new_eps,
    SCHEDULES: tl.constexpr, NUM_COLUMNS: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    w, m, v, at, lane, used = _load_current(
        parameters, first_moment, second_moment, row_id, last, inside, sums, multipliers, capacity, eps,
        SCHEDULES, NUM_COLUMNS, WIDTH, LANES,
    )  # fmt: skip
    decay1, near, rest = decays_of(decays, capacity, skipped, inside)
    m, v = decayed(m, v, decay1, near, rest)
    g = tl.load(gradients + row[:, None] * WIDTH + lane, mask=used, other=0.0)
    w, m, v = adam_step(w, m, v, g, tl.load(sizes), gradient_weight, square_weight, new_eps)
    tl.store(first_moment + at, m, mask=used)
    tl.store(second_moment + at, v, mask=used)
    tl.store(parameters + at, w, mask=used)


@triton.jit(do_not_specialize=["capacity", "before", "num_rows"])
def _step_kernel(
    means, means_m, means_v, scales, scales_m, scales_v, quats, quats_m, quats_v, opacities, opacities_m, opacities_v,
    v_means, v_scales, v_quats, v_opacities,  # [V, ...], their gradients
    ids,  # [V]
    last_step,  # [N]
    sums,  # [SCHEDULES, capacity] float64
    multipliers,  # [SCHEDULES, NUM_COLUMNS]
    capacity,
    eps,
    decays,  # [2, capacity] float64
    before,  # the step before
    sizes,  # [NUM_COLUMNS]
    gradient_weight,  # 1 - b1
    square_weight,  # 1 - b2
    new_eps,
    num_rows,  # V
    SCHEDULES: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, inside, row_id = _rows(ids, num_rows, BLOCK)
    last = tl.load(last_step + row_id, mask=inside, other=0)
    skipped = before - last
    _step(
        means, means_m, means_v, v_means, row, row_id, last, inside,
        sums, multipliers, capacity, eps, decays, skipped, sizes,
        gradient_weight, square_weight, new_eps, SCHEDULES, NUM_COLUMNS, 3, 4,
    )  # fmt: skip
    _step(
        scales, scales_m, scales_v, v_scales, row, row_id, last, inside,
        sums, multipliers + SCALES, capacity, eps, decays, skipped, sizes + SCALES,
        gradient_weight, square_weight, new_eps, SCHEDULES, NUM_COLUMNS, 3, 4,
    )  # fmt: skip
    _step(
        quats, quats_m, quats_v, v_quats, row, row_id, last, inside,
        sums, multipliers + QUATS, capacity, eps, decays, skipped, sizes + QUATS,
        gradient_weight, square_weight, new_eps, SCHEDULES, NUM_COLUMNS, 4, 4,
    )  # fmt: skip
    _step(
        opacities, opacities_m, opacities_v, v_opacities, row, row_id, last, inside,
        sums, multipliers + OPACITIES, capacity, eps, decays, skipped, sizes + OPACITIES,
        gradient_weight, square_weight, new_eps, SCHEDULES, NUM_COLUMNS, 1, 1,
    )  # fmt: skip
