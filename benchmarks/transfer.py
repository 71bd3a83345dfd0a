"""Rows between host and device: pinned copies, gathers by the CPU, and kernels that read pinned rows directly.

    python -m benchmarks.transfer [--num_gaussians 18000000] [--visible 0.08] [--quick]

An offloading trainer needs V of N rows of appearance, 192 bytes each, at every step. Either the CPU gathers them into
staging memory and a copy takes them to the device, or a kernel reads them where they are. The floor of gathering is a
large copy on the host, and that of everything that crosses the link one pinned copy. Without a GPU only the CPU's part
is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.command_line import BenchmarkOptions, run
from benchmarks.numbers import megabytes, percent
from benchmarks.report import Report, spread
from benchmarks.timing import Case, Spread, copy_bandwidth, time_in_turns
from benchmarks.visible_rows import KINDS
from offload.backends import num_threads
from offload.store.memory import HostArray
from reporting.numbers import number

COLUMNS = 48
ROW_BYTES, ID_BYTES = 4 * COLUMNS, 8
COPY_BYTES = 2**28


@dataclass
class Options(BenchmarkOptions):
    num_gaussians: int = 4_000_000
    """Rows on the host, 192 bytes each."""
    visible: float = 0.08
    """Share of the rows that a step needs."""
    repeats: int = 9
    """Timed turns."""


@dataclass(frozen=True)
class Measured:
    name: str
    time: Spread  # ms
    num_bytes: float
    floor: float  # bytes per ms


def pinned_rows(num_rows: int) -> tuple[Tensor, HostArray]:
    """Make rows [num_rows, 48] as the store has them, pinned where there is a GPU. The array keeps the memory."""
    array = HostArray(COLUMNS, max_rows=num_rows, pin=True)
    array.resize(num_rows)
    return array.tensor, array


def gathers_by_cpu(rows: Tensor, ids: dict[str, Tensor], repeats: int) -> list[Measured]:
    """Make cases of rows that are copied into consecutive memory and back."""
    most = max(map(len, ids.values()))
    staging, _array = pinned_rows(most)
    cases, num_bytes = {}, {}
    for kind, chosen in ids.items():
        part = staging[: len(chosen)]
        gather = Case(lambda chosen=chosen, part=part: torch.index_select(rows, 0, chosen, out=part))
        scatter = Case(lambda chosen=chosen, part=part: rows.index_copy_(0, chosen, part))
        for name, case in (("gather", gather), ("scatter", scatter)):
            cases[f"{name} by the CPU, {kind}"] = case
            num_bytes[f"{name} by the CPU, {kind}"] = len(chosen) * (2 * ROW_BYTES + ID_BYTES)
    floor = copy_bandwidth() / 1e3
    return [Measured(name, time, num_bytes[name], floor) for name, time in time_in_turns(cases, repeats).items()]


def copies_over_link(device: torch.device, repeats: int) -> list[Measured]:
    """Make cases of large pinned copies to the device, from it, and both at once."""
    up, down = (torch.zeros(COPY_BYTES // 4, pin_memory=True) for _ in range(2))
    up_device, down_device = torch.zeros_like(up, device=device), torch.zeros_like(down, device=device)
    streams = [torch.cuda.Stream(device), torch.cuda.Stream(device)]

    def both() -> None:
        current = torch.cuda.current_stream(device)
        copies = ((up_device, up), (down, down_device))
        for stream, (target, source) in zip(streams, copies, strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)
        for stream in streams:
            current.wait_stream(stream)

    cases = {
        "pinned copy to the device": Case(lambda: up_device.copy_(up, non_blocking=True)),
        "pinned copy to the host": Case(lambda: down.copy_(down_device, non_blocking=True)),
        "both copies at once": Case(both),
    }
    times = time_in_turns(cases, repeats, warmup=2, device=device)
    one_way = up.nbytes / times["pinned copy to the device"].median
    return [
        Measured(name, time, (2 if name.startswith("both") else 1) * up.nbytes, one_way) for name, time in times.items()
    ]


def kernels_over_link(
    rows: Tensor, ids: dict[str, Tensor], device: torch.device, repeats: int, one_way: float
) -> list[Measured]:
    """Make cases of kernels on the device that read and write pinned rows where they are."""
    from benchmarks import row_access

    cases, num_bytes = {}, {}
    for kind, chosen in ids.items():
        on_device, values = chosen.to(device), torch.zeros(len(chosen), COLUMNS, device=device)
        read = Case(lambda chosen=on_device, values=values: row_access.gather(rows, chosen, values))
        write = Case(lambda chosen=on_device, values=values: row_access.scatter(values, chosen, rows))
        for name, case in ((f"kernel reads pinned rows, {kind}", read), (f"kernel writes pinned rows, {kind}", write)):
            cases[name], num_bytes[name] = case, len(chosen) * ROW_BYTES
    times = time_in_turns(cases, repeats, warmup=2, device=device)
    return [Measured(name, time, num_bytes[name], one_way) for name, time in times.items()]


def main(options: Options) -> None:
    if options.quick:
        options.num_gaussians, options.repeats = 400_000, 3
    torch.set_num_threads(num_threads())
    n = options.num_gaussians
    rows, _array = pinned_rows(n)
    rows.normal_()
    ids = {kind: choose(n, options.visible, np.random.default_rng(0)) for kind, choose in KINDS.items()}
    report = Report("transfer", "Rows between host and device", options)
    report.say(f"{options.visible:.0%} of {n:,} rows of {ROW_BYTES} bytes; {options.repeats} turns.")
    found = gathers_by_cpu(rows, ids, options.repeats)
    if torch.cuda.is_available():
        device = torch.device("cuda")
        copies = copies_over_link(device, options.repeats)
        found += copies + kernels_over_link(rows, ids, device, options.repeats, copies[0].floor)
    else:
        report.say("No GPU: copies over the link and kernels that read pinned rows are left out.")
    columns = {
        "work": str,
        "ms, median (10 %, 90 %)": spread,
        "MB": megabytes,
        "GB/s": number,
        "floor, ms": number,
        "floor / this": percent,
    }
    table = report.table("Bytes read and written on the host, or over the link:", columns)
    for each in found:
        floor = each.num_bytes / each.floor
        table.add(
            each.name,
            each.time,
            each.num_bytes,
            each.num_bytes / each.time.median / 1e6,
            floor,
            floor / each.time.median,
        )
    report.write()


if __name__ == "__main__":
    run(main, Options, __doc__)
