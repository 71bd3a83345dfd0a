"""`offload/adam/rows.py` as CUDA kernels in Triton, which read and write pinned host memory directly.

Rows are seen as a sequence of 16-byte vectors, VECTORS to a row, and a tile is TILE consecutive vectors [TILE, 4]:
every thread moves whole vectors, and a warp's 32 of them touch whole lines of 64 bytes, which writes over PCIe must
(rows of 196 bytes took 8 times as long as rows of 192). What a row needs beside its values (id, last step, table
entries) is loaded once per vector; the caches of the device serve that. Rows that lie packed, as in a compact store,
have kernels of their own, in `packed_rows_triton.py`.

Kernels that cross PCIe run on a few thread blocks, which loop over the tiles. That is enough to fill the link, and
leaves room for a kernel in the other direction and for rendering; kernels with a full grid would take turns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.adam import packed_rows_triton as packed_rows
from offload.adam import stored_harmonics_triton as stored_harmonics
from offload.adam.bfloat16 import seed_of
from offload.adam.bfloat16_triton import pack, random_bits, unpack
from offload.adam.deferral import DeferralTables, SkippedSteps
from offload.adam.deferral_triton import adam_step, caught_up, decayed, decays_of
from offload.adam.harmonics import HarmonicsGradient
from offload.adam.packed_rows_triton import is_wanted
from offload.adam.rows import catch_up_rows
from offload.store.layout import PackedRows, ResidentRows, RowState

# catch_up_rows is torch
__all__ = [
    "catch_up_rows",
    "fetch_dated_rows",
    "fetch_rows",
    "move_rows",
    "read_packed_rows",
    "step_host_rows",
    "step_rows",
    "step_stored_rows",
    "step_view_rows",
    "write_packed_rows",
    "write_rows",
]

# By benchmarks/streamed_steps.py on an H200. More blocks that write fill the link no better, but what they have under
# way stands before the memory traffic of everything else on the device.
FETCH_BLOCKS = 64  # of a kernel that reads over PCIe
READ_BLOCKS = 32  # of one that only copies what it reads
WRITE_BLOCKS = 8  # of one that writes
STEP_BLOCKS = 32  # of one that reads and writes, while nothing is rendered; 16 to 128 differ less than two runs do
LINK_TILE = 256  # 16-byte vectors, of both
LINK_WARPS = 8
TILE = 512  # of kernels that stay on the device
WARPS = 8


def fetch_rows(
    source: RowState,
    places: Tensor,
    ids: Tensor,
    last_step: Tensor,
    wanted: Tensor | None,
    out: RowState,
    tables: DeferralTables,
) -> None:
    """Do as `offload.adam.rows.fetch_rows`."""
    _fetch(source, places, ids, last_step, wanted, out, tables)


def fetch_dated_rows(
    source: RowState,
    places: Tensor | None,
    last_step: Tensor,
    wanted: Tensor | None,
    out: RowState,
    tables: DeferralTables | SkippedSteps,
) -> None:
    """Do as `offload.adam.rows.fetch_dated_rows`."""
    _fetch(source, places, None, last_step, wanted, out, tables)


def step_rows(rows: RowState, ids: Tensor, last_step: Tensor, gradients: Tensor, tables: DeferralTables) -> None:
    """Do as `offload.adam.rows.step_rows`."""
    if len(ids) == 0:
        return
    _step(rows, ids, last_step, gradients, tables)
    last_step.index_fill_(0, ids, tables.step)  # when all threads of a row have read it


def step_host_rows(
    parameters: Tensor | None,
    ids: Tensor,
    last_step: Tensor,
    gradients: Tensor | HarmonicsGradient | None,
    host: RowState,
    tables: DeferralTables,
) -> None:
    """Do as `offload.adam.rows.step_host_rows`."""
    if len(ids) == 0:
        return
    if parameters is None and isinstance(gradients, HarmonicsGradient):
        stored_harmonics.step(ids, last_step, gradients, host, tables)
        return
    if parameters is None or isinstance(gradients, HarmonicsGradient):
        raise TypeError("in float32 gradients are made of rows without values, and of no others")
    count, columns = parameters.shape
    host_columns = host.parameters.shape[1]
    step, num_vectors = tables.step_sizes(), count * host_columns // 4
    with torch.cuda.device_of(parameters):
        _step_host_kernel[(_grid(num_vectors, host, STEP_BLOCKS),)](
            parameters,
            ids,
            last_step,
            None if gradients is None else gradients.contiguous(),
            *_arrays(host),
            step.sizes,
            tables.decays,
            tables.decays.shape[1],
            tables.step if gradients is not None else tables.step + 1,  # of which the kernel decays all but the last
            seed_of(tables.step),
            1 - step.betas[0],
            1 - step.betas[1],
            step.eps,
            num_vectors,
            VECTORS=columns // 4,
            HOST_VECTORS=host_columns // 4,
            TILE=LINK_TILE,
            num_warps=LINK_WARPS,
        )


def step_stored_rows(
    values: Tensor | None,
    ids: Tensor,
    last_step: Tensor,
    gradients: Tensor | HarmonicsGradient | None,
    rows: RowState,
    tables: DeferralTables,
) -> None:
    """Do as `offload.adam.rows.step_stored_rows`."""
    if ids.shape[0] == 0:
        return
    if packed_rows.takes(rows):
        packed_rows.step(values, ids, last_step, gradients, rows, tables, in_order=False)
        return
    step_host_rows(values, ids, last_step[ids], gradients, rows, tables)
    last_step.index_fill_(0, ids, tables.step)  # a row may lie in two tiles


def step_view_rows(
    values: Tensor | None,
    ids: Tensor,
    last_step: Tensor,
    gradients: Tensor | HarmonicsGradient | None,
    rows: RowState,
    tables: DeferralTables,
) -> None:
    """Do as `offload.adam.rows.step_view_rows`."""
    if ids.shape[0]:
        packed_rows.step(values, ids, last_step, gradients, rows, tables, in_order=True)


def read_packed_rows(
    host: Sequence[PackedRows],
    ids: Tensor,
    wanted: Tensor | None,
    view: Sequence[PackedRows],
    residents: ResidentRows | None = None,
) -> None:
    """Do as `offload.adam.rows.read_packed_rows`."""
    packed_rows.copy(host, view, ids, wanted, residents, READ_BLOCKS, to_view=True)


def write_packed_rows(
    view: Sequence[PackedRows],
    ids: Tensor,
    wanted: Tensor | None,
    host: Sequence[PackedRows],
    residents: ResidentRows | None = None,
) -> None:
    """Do as `offload.adam.rows.write_packed_rows`."""
    packed_rows.copy(view, host, ids, wanted, residents, WRITE_BLOCKS, to_view=False)


def move_rows(rows: RowState, sources: Tensor, out: RowState) -> None:
    """Do as `offload.adam.rows.move_rows`."""
    count, columns = out.parameters.shape
    if columns % 4:
        raise ValueError(f"rows move in vectors of four columns, which {columns} are not")
    if count == 0:
        return
    num_vectors = count * columns // 4
    with torch.cuda.device_of(sources):
        _move_kernel[(triton.cdiv(num_vectors, TILE),)](
            *_arrays(rows),
            sources,
            *_arrays(out),
            num_vectors,
            VECTORS=columns // 4,
            TILE=TILE,
            num_warps=WARPS,
        )


def write_rows(rows: RowState, ids: Tensor, wanted: Tensor | None, host: RowState) -> None:
    """Do as `offload.adam.rows.write_rows`."""
    columns = rows.parameters.shape[1]
    if len(ids) == 0:
        return
    num_vectors = len(ids) * columns // 4
    with torch.cuda.device_of(ids):
        _write_kernel[(_grid(num_vectors, host, WRITE_BLOCKS),)](
            *_arrays(rows),
            ids,
            wanted,
            *_arrays(host),
            num_vectors,
            VECTORS=columns // 4,
            TILE=LINK_TILE,
            num_warps=LINK_WARPS,
        )


def _fetch(
    source: RowState,
    places: Tensor | None,
    ids: Tensor | None,
    last_step: Tensor,
    wanted: Tensor | None,
    out: RowState,
    tables: DeferralTables | SkippedSteps,
) -> None:
    """Launch a kernel; `last_step` [N] is looked up by ids [V], or without them that of these rows, [V].

    Raises:
        TypeError: There are no places of rows that are not packed.
    """
    if last_step.shape[0] == 0 or (places is not None and places.shape[0] == 0):
        return
    if packed_rows.takes(source):
        packed_rows.fetch(source, places, ids, last_step, wanted, out, tables, FETCH_BLOCKS)
        return
    if places is None:
        raise TypeError("packed rows alone are fetched in the order in which they lie")
    schedules, columns = tables.multipliers.shape
    num_vectors = len(places) * columns // 4
    with torch.cuda.device_of(places):
        _fetch_kernel[(_grid(num_vectors, source, FETCH_BLOCKS),)](
            *_arrays(source),
            places,
            ids,
            last_step,
            wanted,
            *_arrays(out),
            tables.sums,
            tables.multipliers,
            tables.sums.shape[1],
            tables.eps,
            num_vectors,
            VECTORS=columns // 4,
            SOURCE_VECTORS=source.parameters.shape[1] // 4,
            SCHEDULES=schedules,
            TILE=LINK_TILE,
            num_warps=LINK_WARPS,
        )


def _step(rows: RowState, ids: Tensor, last_step: Tensor, gradients: Tensor, tables: DeferralTables) -> None:
    """Launch the kernel; `last_step` stays."""
    count, columns = gradients.shape
    step, num_vectors = tables.step_sizes(), count * columns // 4
    with torch.cuda.device_of(gradients):
        _step_kernel[(triton.cdiv(num_vectors, TILE),)](
            *_arrays(rows),
            ids,
            last_step,
            gradients.contiguous(),
            step.sizes,
            tables.decays,
            tables.decays.shape[1],
            tables.step,
            seed_of(tables.step),
            1 - step.betas[0],
            1 - step.betas[1],
            step.eps,
            num_vectors,
            VECTORS=columns // 4,
            TILE=TILE,
            num_warps=WARPS,
        )


def _grid(num_vectors: int, other: RowState, blocks: int) -> int:
    """Count the thread blocks that loop over the tiles, where the other side is the host."""
    tiles = triton.cdiv(num_vectors, LINK_TILE)
    return tiles if other.parameters.is_cuda else min(tiles, blocks)


def _arrays(rows: RowState) -> tuple[Tensor | None, ...]:
    """Return parameters and two tensors of moments, None where there are fewer.

    Raises:
        ValueError: Rows do not lie one after another.
    """
    tensors = rows.tensors()
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError("rows must be contiguous, or packed with their moments")
    return *tensors, *[None] * (3 - len(tensors))


@triton.jit
def _unpack(words1, words2, second):
    """Return both moments in float32; where there is no second tensor, words are pairs."""
    if second is None:
        m, v = unpack(words1)
    else:
        m = words1
        v = words2
    return m, v


@triton.jit
def _load_moments(first, second, offsets, mask):
    """Load the words of both moments; the same twice where pairs lie in one tensor."""
    words1 = tl.load(first + offsets, mask=mask, other=0)
    words2 = words1
    if second is not None:
        words2 = tl.load(second + offsets, mask=mask, other=0)
    return words1, words2


@triton.jit
def _copy(parameters, first, second, there, out_parameters, out_first, out_second, here, mask):
    """Copy rows, moments and all where there are any; everything is read before anything is written."""
    w = tl.load(parameters + there, mask=mask, other=0)
    if first is not None:
        words1, words2 = _load_moments(first, second, there, mask)
    tl.store(out_parameters + here, w, mask=mask)
    if first is not None:
        tl.store(out_first + here, words1, mask=mask)
    if second is not None:
        tl.store(out_second + here, words2, mask=mask)


@triton.jit(do_not_specialize=["capacity", "num_vectors"])
def _fetch_kernel(
    parameters,  # [rows, SOURCE_VECTORS * 4] on the host or on the device, as the next two
    first_moment,  # or both as pairs
    second_moment,  # or None
    places,  # [V]
    ids,  # [V], or None
    last_step,  # [N]; without ids [V]
    wanted,  # [V] or None
    out_parameters,  # [V, columns]
    out_first,  # [V, columns] or None
    out_second,  # [V, columns] or None
    sums,  # [SCHEDULES, capacity] float64
    multipliers,  # [SCHEDULES, columns]
    capacity,
    eps,
    num_vectors,  # V * VECTORS
    VECTORS: tl.constexpr,
    SOURCE_VECTORS: tl.constexpr,
    SCHEDULES: tl.constexpr,
    TILE: tl.constexpr,
):
    lane = tl.arange(0, 4)[None, :]
    for first in range(tl.program_id(0) * TILE, num_vectors, tl.num_programs(0) * TILE):
        vector = first + tl.arange(0, TILE)
        row, part = vector // VECTORS, vector % VECTORS
        fetched = is_wanted(wanted, row, vector < num_vectors)
        place = tl.load(places + row, mask=fetched, other=0)
        here = vector[:, None].to(tl.int64) * 4 + lane
        there = (place * SOURCE_VECTORS + part)[:, None] * 4 + lane
        words1, words2 = _load_moments(first_moment, second_moment, there, fetched[:, None])
        w = tl.load(parameters + there, mask=fetched[:, None], other=0)

        if ids is None:
            last = tl.load(last_step + row, mask=fetched, other=0)
        else:
            last = tl.load(last_step + tl.load(ids + row, mask=fetched, other=0), mask=fetched, other=0)
        skipped = tl.zeros([TILE, 4], tl.float32)
        for schedule in tl.static_range(SCHEDULES):
            total = tl.load(sums + schedule * capacity + last, mask=fetched, other=0.0).to(tl.float32)
            rates = tl.load(multipliers + schedule * VECTORS * 4 + part[:, None] * 4 + lane)
            skipped += total[:, None] * rates
        m, v = _unpack(words1, words2, second_moment)
        tl.store(out_parameters + here, caught_up(w, m, v, skipped, eps), mask=fetched[:, None])
        if out_first is not None:
            tl.store(out_first + here, words1, mask=fetched[:, None])
        if out_second is not None:
            tl.store(out_second + here, words2, mask=fetched[:, None])


@triton.jit(do_not_specialize=["capacity", "step", "seed", "num_vectors"])
def _step_kernel(
    parameters,  # [V, columns], as the next two
    first_moment,  # or both as pairs
    second_moment,  # or None
    ids,  # [V]
    last_step,  # [N]
    gradients,  # [V, columns]
    sizes,  # [columns]
    decays,  # [2, capacity] float64
    capacity,
    step,
    seed,
    gradient_weight,  # 1 - b1
    square_weight,  # 1 - b2
    eps,
    num_vectors,  # V * VECTORS
    VECTORS: tl.constexpr,
    TILE: tl.constexpr,
):
    vector = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row, part = vector // VECTORS, vector % VECTORS
    inside = vector < num_vectors
    lane = tl.arange(0, 4)[None, :]
    here = vector[:, None].to(tl.int64) * 4 + lane
    column = part[:, None] * 4 + lane
    g = tl.load(gradients + here, mask=inside[:, None], other=0.0)
    w = tl.load(parameters + here, mask=inside[:, None], other=0.0)
    words1, words2 = _load_moments(first_moment, second_moment, here, inside[:, None])
    m, v = _unpack(words1, words2, second_moment)
    size = tl.load(sizes + column)

    row_id = tl.load(ids + row, mask=inside, other=0)
    skipped = step - 1 - tl.load(last_step + row_id, mask=inside, other=0)
    decay1, near, rest = decays_of(decays, capacity, skipped, inside)
    m, v = decayed(m, v, decay1, near, rest)
    w, m, v = adam_step(w, m, v, g, size, gradient_weight, square_weight, eps)
    tl.store(parameters + here, w, mask=inside[:, None])
    if second_moment is None:
        random = random_bits(row_id[:, None] * (VECTORS * 4) + column, seed)
        tl.store(first_moment + here, pack(m, v, random), mask=inside[:, None])
    else:
        tl.store(first_moment + here, m, mask=inside[:, None])
        tl.store(second_moment + here, v, mask=inside[:, None])


@triton.jit(do_not_specialize=["capacity", "step", "seed", "num_vectors"])
def _step_host_kernel(
    parameters,  # [V, VECTORS * 4]
    ids,  # [V]
    last_step,  # [V]
    gradients,  # [V, VECTORS * 4] or None
    host_parameters,  # [N, HOST_VECTORS * 4] on the host, as the next two
    host_first,  # or both as pairs
    host_second,  # or None
    sizes,  # [VECTORS * 4]
    decays,  # [2, capacity] float64
    capacity,
    step,
    seed,
    gradient_weight,  # 1 - b1
    square_weight,  # 1 - b2
    eps,
    num_vectors,  # V * HOST_VECTORS
    VECTORS: tl.constexpr,
    HOST_VECTORS: tl.constexpr,
    TILE: tl.constexpr,
):
    lane = tl.arange(0, 4)[None, :]
    for first in range(tl.program_id(0) * TILE, num_vectors, tl.num_programs(0) * TILE):
        vector = first + tl.arange(0, TILE)
        row, part = vector // HOST_VECTORS, vector % HOST_VECTORS
        inside = vector < num_vectors
        used = (inside & (part < VECTORS))[:, None]  # the others of a row fill its last line, and stay zero
        row_id = tl.load(ids + row, mask=inside, other=0)
        here = (row.to(tl.int64) * VECTORS + part)[:, None] * 4 + lane
        there = (row_id * HOST_VECTORS + part)[:, None] * 4 + lane
        column = part[:, None] * 4 + lane
        words1, words2 = _load_moments(host_first, host_second, there, inside[:, None])
        w = tl.load(parameters + here, mask=used, other=0.0)
        m, v = _unpack(words1, words2, host_second)
        skipped = step - 1 - tl.load(last_step + row, mask=inside, other=0)
        decay1, near, rest = decays_of(decays, capacity, skipped, inside)
        m, v = decayed(m, v, decay1, near, rest)
        if gradients is not None:
            g = tl.load(gradients + here, mask=used, other=0.0)
            size = tl.load(sizes + column, mask=used, other=0.0)
            w, m, v = adam_step(w, m, v, g, size, gradient_weight, square_weight, eps)
            tl.store(parameters + here, w, mask=used)
        tl.store(host_parameters + there, w, mask=inside[:, None])
        if host_second is None:
            random = random_bits(row_id[:, None] * (VECTORS * 4) + column, seed)
            tl.store(host_first + there, pack(m, v, random), mask=inside[:, None])
        else:
            tl.store(host_first + there, m, mask=inside[:, None])
            tl.store(host_second + there, v, mask=inside[:, None])


@triton.jit(do_not_specialize=["num_vectors"])
def _move_kernel(
    parameters,  # [V, columns], as the next two
    first_moment,  # or None
    second_moment,  # or None
    sources,  # [W]
    out_parameters,  # [W, columns], as the next two
    out_first,  # or None
    out_second,  # or None
    num_vectors,  # W * VECTORS
    VECTORS: tl.constexpr,
    TILE: tl.constexpr,
):
    vector = tl.program_id(0) * TILE + tl.arange(0, TILE)
    lane = tl.arange(0, 4)[None, :]
    source = tl.load(sources + vector // VECTORS, mask=vector < num_vectors, other=-1)
    here = vector[:, None].to(tl.int64) * 4 + lane
    there = (source * VECTORS + vector % VECTORS)[:, None] * 4 + lane
    moved = (source >= 0)[:, None]
    _copy(parameters, first_moment, second_moment, there, out_parameters, out_first, out_second, here, moved)


@triton.jit(do_not_specialize=["num_vectors"])
def _write_kernel(
    parameters,  # [V, columns], as the next two
    first_moment,
    second_moment,  # or None
    ids,  # [V]
    wanted,  # [V] or None
    out_parameters,  # [N, columns] on the host, as the next two
    out_first,
    out_second,  # or None
    num_vectors,  # V * VECTORS
    VECTORS: tl.constexpr,
    TILE: tl.constexpr,
):
    lane = tl.arange(0, 4)[None, :]
    for first in range(tl.program_id(0) * TILE, num_vectors, tl.num_programs(0) * TILE):
        vector = first + tl.arange(0, TILE)
        row, part = vector // VECTORS, vector % VECTORS
        written = is_wanted(wanted, row, vector < num_vectors)
        row_id = tl.load(ids + row, mask=written, other=0)
        here = vector[:, None].to(tl.int64) * 4 + lane
        there = (row_id * VECTORS + part)[:, None] * 4 + lane
        _copy(
            parameters, first_moment, second_moment, here, out_parameters, out_first, out_second, there,
            written[:, None],
        )  # fmt: skip
