"""Rows between pinned host memory and the device: GB/s of the streamed trainer's kernels, by their shape.

    python -m benchmarks.streamed_rows [--num_gaussians 18000000] [--moments bfloat16] [--fetch_blocks 16 64] [--quick]

The rows are those that a view of the aerial scene needs, in Morton order. Fetching reads parameters and moments, 576
bytes a row (384 with moments in bfloat16), and applies skipped steps; writing back writes as many. Beside them: large
copies by the copy engines, and copies of runs of rows, one call each. GB/s are 10^9 bytes per second over the link,
both ways together. Kernels that work on device memory share the device's crossbar with those that cross the link, so
the last column is the time that Adam on the geometry of the view takes beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch

from benchmarks.aerial_scene import aerial_cameras, aerial_geometry, one_by_one
from benchmarks.command_line import BenchmarkOptions, run
from benchmarks.numbers import count
from benchmarks.report import Report, spread
from benchmarks.timing import Case, Clock, Spread, time_in_turns
from errors import InputError
from offload.adam.deferral import DeferralTables
from offload.adam.options import AdamOptions
from offload.culling.cameras import Margin
from offload.models.geometry_device import GEOMETRY, DeviceGeometry
from offload.pipelines.lanes import Lane
from offload.store.layout import Moments, RowState
from offload.store.memory import HostArray
from reporting.numbers import number

COLUMNS = 48
STEPS_BEFORE = 1000
COPY_BYTES = 1 << 28


@dataclass
class Options(BenchmarkOptions):
    num_gaussians: int = 18_000_000
    """Rows in host memory."""
    moments: Moments = "float32"
    """Precision of the Adam moments in them."""
    fetch_blocks: tuple[int, ...] = (16, 64, 256)
    """Thread blocks of the kernel that reads over the link."""
    write_blocks: tuple[int, ...] = (8, 16, 64)
    """Thread blocks of the kernel that writes."""
    tiles: tuple[int, ...] = (256, 1024)
    """16-byte vectors that a block moves at a time."""
    warps: tuple[int, ...] = (8,)
    """Warps in a block."""
    repeats: int = 9
    """Timed turns."""


def device_geometry(num_gaussians: int, device: torch.device) -> DeviceGeometry:
    """Make the geometry of an aerial scene with its moments, on the device."""
    parameters = aerial_geometry(num_gaussians, torch.Generator().manual_seed(0))
    adam = AdamOptions(dict.fromkeys(GEOMETRY, 0.0), lambda step: 0.0, (0.9, 0.999))
    return DeviceGeometry(parameters, adam, device=device)


def host_rows(num_rows: int, moments: Moments) -> tuple[RowState, list[HostArray]]:
    """Make rows in pinned memory that is touched by all cores and registered in parts, as the store does it."""
    dtypes = [torch.float32] * 3 if moments == "float32" else [torch.float32, torch.int32]
    arrays = [HostArray(COLUMNS, max_rows=num_rows, dtype=dtype, pin=True) for dtype in dtypes]
    for array in arrays:
        array.resize(num_rows)
    parameters, *rest = (array.tensor for array in arrays)
    return RowState(parameters, tuple(rest)), arrays


def together(*works: Callable[[], None]) -> Callable[[], None]:
    """Work on lanes of their own, which the current lane waits for."""
    device = torch.device("cuda")
    lanes = [Lane.new(device) for _ in works]

    def work() -> None:
        current = Lane.current(device)
        begin = current.record()
        for lane, each in zip(lanes, works, strict=True):
            with lane:
                lane.wait(begin)
                each()
            current.wait(lane.record())

    return work


def time_beside(work: Callable[[], None], others: Callable[[], None], repeats: int) -> Spread:
    """Time, in milliseconds, work that begins together with others that take longer."""
    device = torch.device("cuda")
    lane, current, clock, samples = Lane.new(device), Lane.current(device), Clock(device), []
    for _ in range(2 + repeats):
        clock.give_head_start()
        with lane:
            lane.wait(current.record())
            begin = clock.mark()
            work()
            end = clock.mark()
        others()
        torch.cuda.synchronize()
        samples.append(clock.milliseconds(begin, end))
    return Spread.of(samples[2:])


def copy_in_runs(source: torch.Tensor, destination: torch.Tensor, rows: int) -> Callable[[], None]:
    """Copy consecutive rows, by one call for each run."""
    pairs = list(zip(source.split(rows), destination.split(rows), strict=True))

    def work() -> None:
        for host, device in pairs:
            device.copy_(host, non_blocking=True)

    return work


def main(options: Options) -> None:
    if not torch.cuda.is_available():
        raise InputError("This measures the link between host and GPU, and torch finds no CUDA GPU.")
    from offload.adam import rows_triton as kernels

    device = torch.device("cuda")
    if options.quick:
        options.num_gaussians, options.repeats = 1_000_000, 3
        options.fetch_blocks, options.write_blocks, options.tiles = (64,), (64,), (256,)
    host, _arrays = host_rows(options.num_gaussians, options.moments)
    row_bytes = 4 * COLUMNS * len(host.tensors())
    geometry = device_geometry(options.num_gaussians, device)
    ids = geometry.visible_ids(one_by_one(aerial_cameras(seed=0))[0], Margin(), Margin())
    num_rows = len(ids)
    num_runs = int((ids.diff() != 1).sum()) + 1
    report = Report("streamed_rows", "Rows between pinned host memory and the device", options)
    report.say(
        f"{num_rows:,} of {options.num_gaussians:,} rows are visible, in {num_runs:,} runs; {row_bytes} bytes a row "
        "each way."
    )

    last_step = torch.randint(0, STEPS_BEFORE, (options.num_gaussians,), dtype=torch.int32, device=device)
    fetched, updated = (host.new_empty(num_rows, device) for _ in range(2))
    for tensor in (*fetched.tensors(), *updated.tensors()):
        tensor.zero_()
    tables = DeferralTables(torch.ones(1, COLUMNS), (0.9, 0.999), 1e-15, device)
    for _ in range(STEPS_BEFORE):
        tables.begin_step([1e-3])
    places = torch.arange(num_rows, device=device)
    gradients = torch.zeros(num_rows, COLUMNS, device=device)
    geometry_gradients = geometry.gather(ids)

    def fetch() -> None:
        kernels.fetch_rows(host, ids, ids, last_step, None, fetched, tables)

    def write() -> None:
        kernels.write_rows(updated, ids, None, host)

    def update_geometry() -> None:
        geometry.update(ids, geometry_gradients)

    up, down = (torch.empty(2, COPY_BYTES // 8, dtype=torch.float32, pin_memory=True) for _ in range(2))
    up_device, down_device = torch.zeros_like(up, device=device), torch.zeros_like(down, device=device)

    def upload() -> None:
        up_device.copy_(up, non_blocking=True)

    def download() -> None:
        down.copy_(down_device, non_blocking=True)

    columns = {"work": str, "ms": spread, "GB over the link": lambda x: number(x / 1e9), "GB/s": number}
    table = report.table("Copies, and work on the device:", columns)
    run_source = torch.empty(COPY_BYTES // (4 * COLUMNS), COLUMNS, pin_memory=True)
    run_target = torch.empty_like(run_source, device=device)
    cases = {
        "copy to the device": (upload, up.nbytes),
        "copy to the host": (download, up.nbytes),
        "both copies at once": (together(upload, download), 2 * up.nbytes),
        "Adam on the rows of a view": (lambda: kernels.step_rows(fetched, ids, last_step, gradients, tables), 0),
        "Adam on the geometry of a view": (update_geometry, 0),
        "move all rows of a view": (lambda: kernels.move_rows(fetched, places, updated), 0),
    }
    for rows in (64, 512, 4096):
        cases[f"copy to the device in runs of {rows} rows"] = (
            copy_in_runs(run_source, run_target, rows),
            run_source.nbytes,
        )
    times = time_in_turns(
        {name: Case(work) for name, (work, _) in cases.items()}, options.repeats, warmup=2, device=device
    )
    for name, (_, moved) in cases.items():
        table.add(name, times[name], moved, moved / times[name].median / 1e6)

    columns = {
        "vectors": count, "warps": count, "fetch blocks": count, "write blocks": count,
        "fetch, ms": spread, "GB/s, fetch": number, "write back, ms": spread, "GB/s, write back": number,
        "both at once, ms": spread, "GB/s": number,
        "Adam on the geometry beside both, ms": spread,
    }  # fmt: skip
    table = report.table("Kernels that read and write pinned rows:", columns)
    moved = num_rows * row_bytes
    shapes = product(options.tiles, options.warps, options.fetch_blocks, options.write_blocks)
    for kernels.LINK_TILE, kernels.LINK_WARPS, kernels.FETCH_BLOCKS, kernels.WRITE_BLOCKS in shapes:
        cases = {"fetch": Case(fetch), "write": Case(write), "both": Case(together(fetch, write))}
        times = time_in_turns(cases, options.repeats, warmup=2, device=device)
        cells = []
        for name, directions in (("fetch", 1), ("write", 1), ("both", 2)):
            cells += [times[name], directions * moved / times[name].median / 1e6]
        beside = time_beside(update_geometry, together(fetch, write), options.repeats)
        table.add(kernels.LINK_TILE, kernels.LINK_WARPS, kernels.FETCH_BLOCKS, kernels.WRITE_BLOCKS, *cells, beside)
    report.write()


if __name__ == "__main__":
    run(main, Options, __doc__)
