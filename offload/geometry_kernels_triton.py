"""`offload/geometry_kernels.py` as CUDA kernels in Triton, which read and write only the rows that they are given.

One launch for each parameter; a program visits BLOCK rows, whose step and table entries it looks up once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.catch_up import CatchUpTables
from offload.geometry_kernels import COLUMNS, GeometryState
from offload.row_kernels_triton import decayed

BLOCK = 256  # rows


def gather_rows(state: GeometryState, ids: Tensor, tables: CatchUpTables) -> dict[str, Tensor]:
    """As `offload.geometry_kernels.gather_rows`."""
    values = {name: value.new_empty(len(ids), *value.shape[1:]) for name, value in state.parameters.items()}
    if len(ids) == 0:
        return values
    schedules, columns = tables.multipliers.shape
    with torch.cuda.device_of(ids):
        for name, value in values.items():
            _gather_kernel[(triton.cdiv(len(ids), BLOCK),)](
                state.parameters[name],
                state.exp_avg[name],
                state.exp_avg_sq[name],
                ids,
                state.last_step,
                tables.sums,
                tables.multipliers[:, COLUMNS[name].start :],
                value,
                tables.sums.shape[1],
                tables.eps,
                len(ids),
                SCHEDULES=schedules,
                NUM_COLUMNS=columns,
                **_shape(value),
            )
    return values


def step_rows(
    state: GeometryState,
    ids: Tensor,
    values: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    tables: CatchUpTables,
) -> None:
    """As `offload.geometry_kernels.step_rows`."""
    if len(ids) == 0:
        return
    step = tables.step_sizes()
    with torch.cuda.device_of(ids):
        for name, value in values.items():
            _step_kernel[(triton.cdiv(len(ids), BLOCK),)](
                state.parameters[name],
                state.exp_avg[name],
                state.exp_avg_sq[name],
                ids,
                state.last_step,
                value,
                gradients[name].contiguous(),
                step.sizes[COLUMNS[name].start :],
                tables.decays,
                tables.decays.shape[1],
                tables.step,
                1 - step.betas[0],
                1 - step.betas[1],
                step.eps,
                len(ids),
                **_shape(value),
            )
    state.last_step.index_fill_(0, ids, tables.step)  # when all parameters of a row have read it


def _shape(rows: Tensor) -> dict[str, int]:
    width = math.prod(rows.shape[1:])
    return {"WIDTH": width, "LANES": triton.next_power_of_2(width), "BLOCK": BLOCK}


@triton.jit(do_not_specialize=["capacity", "num_rows"])  # or each new kind of number would compile it again
def _gather_kernel(
    parameters,  # [N, WIDTH], as the next two
    first_moment,
    second_moment,
    ids,  # [V]
    stamps,  # [N]
    sums,  # [SCHEDULES, capacity] float64
    multipliers,  # [SCHEDULES, NUM_COLUMNS], from the parameter's first column on; it has one rate
    out,  # [V, WIDTH]
    capacity,
    eps,
    num_rows,  # V
    SCHEDULES: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,  # WIDTH and more, a power of 2
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    row_id = tl.load(ids + row, mask=inside, other=0)
    stamp = tl.load(stamps + row_id, mask=inside, other=0)
    skipped = tl.zeros([BLOCK], tl.float32)
    for schedule in tl.static_range(SCHEDULES):
        total = tl.load(sums + schedule * capacity + stamp, mask=inside, other=0.0).to(tl.float32)
        skipped += total * tl.load(multipliers + schedule * NUM_COLUMNS)
    lane = tl.arange(0, LANES)[None, :]
    used = inside[:, None] & (lane < WIDTH)
    there = row_id[:, None] * WIDTH + lane
    w = tl.load(parameters + there, mask=used, other=0.0)
    m = tl.load(first_moment + there, mask=used, other=0.0)
    v = tl.load(second_moment + there, mask=used, other=0.0)
    tl.store(out + row[:, None] * WIDTH + lane, w - skipped[:, None] * (m / (tl.sqrt(v) + eps)), mask=used)


@triton.jit(do_not_specialize=["capacity", "step", "num_rows"])
def _step_kernel(
    parameters,  # [N, WIDTH], as the next two
    first_moment,
    second_moment,
    ids,  # [V]
    stamps,  # [N]
    values,  # [V, WIDTH], after the step before
    gradients,  # [V, WIDTH]
    sizes,  # from the parameter's first column on; it has one
    decays,  # [2, capacity] float64
    capacity,
    step,
    gradient_weight,  # 1 - b1
    square_weight,  # 1 - b2
    eps,
    num_rows,  # V
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,  # WIDTH and more, a power of 2
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    row_id = tl.load(ids + row, mask=inside, other=0)
    skipped = step - 1 - tl.load(stamps + row_id, mask=inside, other=0)
    lane = tl.arange(0, LANES)[None, :]
    used = inside[:, None] & (lane < WIDTH)
    here, there = row[:, None] * WIDTH + lane, row_id[:, None] * WIDTH + lane
    m = tl.load(first_moment + there, mask=used, other=0.0)
    v = tl.load(second_moment + there, mask=used, other=0.0)
    m, v = decayed(m, v, decays, capacity, skipped, inside)
    g = tl.load(gradients + here, mask=used, other=0.0)
    w = tl.load(values + here, mask=used, other=0.0)
    m += gradient_weight * (g - m)
    v += square_weight * (g * g - v)
    w -= tl.load(sizes) * (m / (tl.sqrt(v) + eps))
    tl.store(first_moment + there, m, mask=used)
    tl.store(second_moment + there, v, mask=used)
    tl.store(parameters + there, w, mask=used)
