"""`offload/row_kernels.py` as CUDA kernels in Triton, which read and write pinned host memory directly.

Rows are seen as a sequence of 16-byte vectors, VECTORS to a row, and a tile is TILE consecutive vectors [TILE, 4]:
every thread moves whole vectors, and a warp's 32 of them touch whole lines of 64 bytes, which writes over PCIe must
(rows of 196 bytes took 8 times as long as rows of 192). What a row needs beside its values (id, stamp, table entries)
is loaded once per vector; the caches of the device serve that.

Kernels that cross PCIe run on BLOCKS thread blocks, which loop over the tiles. That is enough to fill the link, and
leaves room for a kernel in the other direction and for rendering; kernels with a full grid would take turns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.catch_up import CatchUpTables, StepSizes
from offload.row_kernels import RowState

BLOCKS = 64  # of a kernel that crosses PCIe
TILE = 1024  # 16-byte vectors
WARPS = 8


def fetch_rows(
    host: RowState, stamps: Tensor, ids: Tensor, wanted: Tensor | None, out: RowState, tables: CatchUpTables
) -> None:
    """As `offload.row_kernels.fetch_rows`."""
    _fetch(host, stamps, ids, wanted, out.tensors(), tables)


def read_rows(host: RowState, stamps: Tensor, ids: Tensor, out: Tensor, tables: CatchUpTables) -> None:
    """As `offload.row_kernels.read_rows`."""
    _fetch(host, stamps, ids, None, (out, None, None), tables)


def _fetch(
    host: RowState,
    stamps: Tensor,
    ids: Tensor,
    wanted: Tensor | None,
    out: tuple[Tensor, Tensor | None, Tensor | None],
    tables: CatchUpTables,
) -> None:
    if len(ids) == 0:
        return
    schedules, columns = tables.multipliers.shape
    with torch.cuda.device_of(ids):
        _fetch_kernel[(BLOCKS,)](
            *host.tensors(),
            stamps,
            ids,
            wanted,
            *out,
            tables.sums,
            tables.decays,
            tables.multipliers,
            tables.sums.shape[1],
            tables.step,
            tables.eps,
            len(ids) * columns // 4,
            VECTORS=columns // 4,
            SCHEDULES=schedules,
            TILE=TILE,
            num_warps=WARPS,
        )


def step_rows(rows: RowState, gradients: Tensor, step: StepSizes) -> None:
    """As `offload.row_kernels.step_rows`."""
    count, columns = gradients.shape
    if count == 0:
        return
    num_vectors = count * columns // 4
    with torch.cuda.device_of(gradients):
        _step_kernel[(triton.cdiv(num_vectors, TILE),)](
            *rows.tensors(),
            gradients.contiguous(),
            step.sizes,
            1 - step.betas[0],
            1 - step.betas[1],
            step.eps,
            num_vectors,
            VECTORS=columns // 4,
            TILE=TILE,
            num_warps=WARPS,
        )


def move_rows(rows: RowState, sources: Tensor, out: RowState) -> None:
    """As `offload.row_kernels.move_rows`."""
    count, columns = out.parameters.shape
    if count == 0:
        return
    num_vectors = count * columns // 4
    with torch.cuda.device_of(sources):
        _move_kernel[(triton.cdiv(num_vectors, TILE),)](
            *rows.tensors(), sources, *out.tensors(), num_vectors, VECTORS=columns // 4, TILE=TILE, num_warps=WARPS
        )


def write_rows(rows: RowState, ids: Tensor, wanted: Tensor | None, host: RowState, stamps: Tensor, step: int) -> None:
    """As `offload.row_kernels.write_rows`."""
    columns = rows.parameters.shape[1]
    if len(ids) == 0:
        return
    with torch.cuda.device_of(ids):
        _write_kernel[(BLOCKS,)](
            *rows.tensors(),
            ids,
            wanted,
            *host.tensors(),
            stamps,
            step,
            len(ids) * columns // 4,
            VECTORS=columns // 4,
            TILE=TILE,
            num_warps=WARPS,
        )


@triton.jit(do_not_specialize=["capacity", "step", "num_vectors"])
def _fetch_kernel(
    parameters,  # [N, columns] on the host, as the next two
    exp_avg,
    exp_avg_sq,
    stamps,  # [N]
    ids,  # [V]
    wanted,  # [V] or None
    out_parameters,  # [V, columns]
    out_exp_avg,  # [V, columns] or None, as the next
    out_exp_avg_sq,
    sums,  # [SCHEDULES, capacity] float64
    decays,  # [2, capacity] float64
    multipliers,  # [SCHEDULES, columns]
    capacity,
    step,
    eps,
    num_vectors,  # V * VECTORS
    VECTORS: tl.constexpr,
    SCHEDULES: tl.constexpr,
    TILE: tl.constexpr,
):
    lane = tl.arange(0, 4)[None, :]
    for first in range(tl.program_id(0) * TILE, num_vectors, tl.num_programs(0) * TILE):
        vector = first + tl.arange(0, TILE)
        row, part = vector // VECTORS, vector % VECTORS
        fetched = _is_wanted(wanted, row, vector < num_vectors)
        row_id = tl.load(ids + row, mask=fetched, other=0)
        here = vector[:, None] * 4 + lane
        there = (row_id * VECTORS + part)[:, None] * 4 + lane
        m = tl.load(exp_avg + there, mask=fetched[:, None], other=0.0)
        v = tl.load(exp_avg_sq + there, mask=fetched[:, None], other=0.0)
        w = tl.load(parameters + there, mask=fetched[:, None], other=0.0)

        stamp = tl.load(stamps + row_id, mask=fetched, other=0)
        skipped = tl.zeros([TILE, 4], tl.float32)
        for schedule in tl.static_range(SCHEDULES):
            total = tl.load(sums + schedule * capacity + stamp, mask=fetched, other=0.0).to(tl.float32)
            rates = tl.load(multipliers + schedule * VECTORS * 4 + part[:, None] * 4 + lane)
            skipped += total[:, None] * rates
        tl.store(out_parameters + here, w - skipped * (m / (tl.sqrt(v) + eps)), mask=fetched[:, None])
        if out_exp_avg is not None:
            decay1 = tl.load(decays + (step - stamp), mask=fetched, other=0.0).to(tl.float32)
            decay2 = tl.load(decays + capacity + (step - stamp), mask=fetched, other=0.0)
            # b2 in float32 is off by 1e-8, and 1000 steps remember it: the rest is added on top.
            near = decay2.to(tl.float32)
            rest = (decay2 - near.to(tl.float64)).to(tl.float32)
            tl.store(out_exp_avg + here, m * decay1[:, None], mask=fetched[:, None])
            tl.store(out_exp_avg_sq + here, v * near[:, None] + v * rest[:, None], mask=fetched[:, None])


@triton.jit(do_not_specialize=["num_vectors"])
def _step_kernel(
    parameters,  # [V, columns], as the next three
    exp_avg,
    exp_avg_sq,
    gradients,
    sizes,  # [columns]
    gradient_weight,  # 1 - b1
    square_weight,  # 1 - b2
    eps,
    num_vectors,
    VECTORS: tl.constexpr,
    TILE: tl.constexpr,
):
    vector = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = (vector < num_vectors)[:, None]
    lane = tl.arange(0, 4)[None, :]
    here = vector[:, None] * 4 + lane
    g = tl.load(gradients + here, mask=inside, other=0.0)
    m = tl.load(exp_avg + here, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq + here, mask=inside, other=0.0)
    w = tl.load(parameters + here, mask=inside, other=0.0)
    size = tl.load(sizes + (vector % VECTORS)[:, None] * 4 + lane)
    m += gradient_weight * (g - m)
    v += square_weight * (g * g - v)
    w -= size * (m / (tl.sqrt(v) + eps))
    tl.store(exp_avg + here, m, mask=inside)
    tl.store(exp_avg_sq + here, v, mask=inside)
    tl.store(parameters + here, w, mask=inside)


@triton.jit(do_not_specialize=["num_vectors"])
def _move_kernel(
    parameters,  # [V, columns], as the next two
    exp_avg,
    exp_avg_sq,
    sources,  # [W]
    out_parameters,  # [W, columns], as the next two
    out_exp_avg,
    out_exp_avg_sq,
    num_vectors,  # W * VECTORS
    VECTORS: tl.constexpr,
    TILE: tl.constexpr,
):
    vector = tl.program_id(0) * TILE + tl.arange(0, TILE)
    lane = tl.arange(0, 4)[None, :]
    source = tl.load(sources + vector // VECTORS, mask=vector < num_vectors, other=-1)
    moved = (source >= 0)[:, None]
    here = vector[:, None] * 4 + lane
    there = (source * VECTORS + vector % VECTORS)[:, None] * 4 + lane
    tl.store(out_parameters + here, tl.load(parameters + there, mask=moved), mask=moved)
    tl.store(out_exp_avg + here, tl.load(exp_avg + there, mask=moved), mask=moved)
    tl.store(out_exp_avg_sq + here, tl.load(exp_avg_sq + there, mask=moved), mask=moved)


@triton.jit(do_not_specialize=["step", "num_vectors"])
def _write_kernel(
    parameters,  # [V, columns], as the next two
    exp_avg,
    exp_avg_sq,
    ids,  # [V]
    wanted,  # [V] or None
    out_parameters,  # [N, columns] on the host, as the next two
    out_exp_avg,
    out_exp_avg_sq,
    stamps,  # [N]
    step,
    num_vectors,  # V * VECTORS
    VECTORS: tl.constexpr,
    TILE: tl.constexpr,
):
    lane = tl.arange(0, 4)[None, :]
    for first in range(tl.program_id(0) * TILE, num_vectors, tl.num_programs(0) * TILE):
        vector = first + tl.arange(0, TILE)
        row, part = vector // VECTORS, vector % VECTORS
        written = _is_wanted(wanted, row, vector < num_vectors)
        row_id = tl.load(ids + row, mask=written, other=0)
        here = vector[:, None] * 4 + lane
        there = (row_id * VECTORS + part)[:, None] * 4 + lane
        w = tl.load(parameters + here, mask=written[:, None])
        m = tl.load(exp_avg + here, mask=written[:, None])
        v = tl.load(exp_avg_sq + here, mask=written[:, None])
        tl.store(out_parameters + there, w, mask=written[:, None])
        tl.store(out_exp_avg + there, m, mask=written[:, None])
        tl.store(out_exp_avg_sq + there, v, mask=written[:, None])
        tl.store(stamps + row_id, step, mask=written & (part == 0))


@triton.jit
def _is_wanted(wanted, row, inside):
    """Which rows of the tile to move: those inside, and where `wanted` says so."""
    if wanted is not None:
        inside = inside & (tl.load(wanted + row, mask=inside, other=0) != 0)
    return inside
