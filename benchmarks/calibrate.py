"""Which of the streamed and the optimized trainer will be faster on this machine, from what its memory and link can do.

    python -m benchmarks.calibrate [--num_gaussians 18000000] [--visible 0.08]

Takes less than a minute. Measures pinned copies, the streamed trainer's kernels over pinned rows, and the optimized
trainer's Adam kernels over host memory; the trainers print the verdict when they start.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro

from errors import InputError
from offload.adam.deferral import DeferralTables
from offload.adam.host import DeferredAdam
from offload.backends import kernels_for
from offload.pipelines.lanes import Lane
from offload.store.layout import RowState
from offload.store.memory import HostArray
from training.calibration import (
    OPTIMIZED_HOST_BYTES,
    STREAMED_LINK_BYTES,
    Speeds,
    machine_name,
    save_verdict,
    verdict,
)

COLUMNS = 48
MOST_ROWS = 4_000_000  # 2.3 GB with moments, beyond any cache
MEMORY_SHARE = 0.125  # of the host's, at most
MEASURED_VISIBLE = 0.08
RUN = 512  # rows; in Morton order a view's rows come in such runs
VIEWS = 4  # that take turns
STEPS_BEFORE = 1000
COPY_BYTES = 1 << 28
REPEATS = 9


@dataclass
class Options:
    num_gaussians: int = 18_000_000
    """Gaussians of the scene to say something about."""
    visible: float = 0.08
    """Share of them that a view sees."""


class Rows:
    """Rows in host memory with their moments, and views that need some of them."""

    def __init__(self, num_rows: int, *, pin: bool) -> None:
        self._arrays = [HostArray(COLUMNS, max_rows=num_rows, pin=pin) for _ in range(3)]
        for array, value in zip(self._arrays, (0.1, 1e-3, 1e-5), strict=True):
            array.resize(num_rows)
            array.tensor.fill_(value)
        parameters, *moments = (array.tensor for array in self._arrays)
        self.state = RowState(parameters, tuple(moments))
        self.last_step = torch.full((num_rows,), STEPS_BEFORE - 12, dtype=torch.int32)
        distance = round(RUN / MEASURED_VISIBLE)
        starts = torch.arange(0, num_rows - distance, distance)[:, None]
        shifts = [distance * view // VIEWS for view in range(VIEWS)]
        self.views = [(starts + shift + torch.arange(RUN)).flatten() for shift in shifts]  # [V] each, sorted

    @property
    def num_visible(self) -> int:
        return len(self.views[0])


def finish(device: torch.device) -> None:
    """Wait for everything that a device has been given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(work: Callable[[int], None], device: torch.device) -> float:
    """Time work that is told the number of its turn, until the device is done."""
    seconds = []
    for turn in range(2 + REPEATS):
        begin = time.perf_counter()
        work(turn)
        finish(device)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[2:])


def host_speed(rows: Rows) -> float:
    """Measure the bytes per second that forwarding one view's rows and committing another's reads and writes."""
    adam = DeferredAdam(torch.ones(1, COLUMNS))
    for _ in range(STEPS_BEFORE):
        adam.begin_step([1e-3])
    arrays = [HostArray(COLUMNS, max_rows=rows.num_visible) for _ in range(2)]
    for array in arrays:
        array.resize(rows.num_visible)
    gradients, out = (array.tensor.fill_(1e-3) for array in arrays)
    state = rows.state, rows.last_step

    def work(turn: int) -> None:
        adam.begin_step([1e-3])
        adam.forward(*state, rows.views[(turn + 1) % VIEWS], out)
        adam.commit(*state, rows.views[turn % VIEWS], gradients)

    return OPTIMIZED_HOST_BYTES * rows.num_visible / median_seconds(work, torch.device("cpu"))


def copy_speeds(device: torch.device) -> tuple[float, float]:
    """Measure the bytes per second of pinned copies: to the device, and both ways at once."""
    pin = device.type == "cuda"
    hosts = [torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=pin) for _ in range(2)]
    devices = [torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device) for _ in range(2)]
    lanes = [Lane.new(device) for _ in range(2)]
    finish(device)

    def upload(turn: int) -> None:
        with lanes[0]:
            devices[0].copy_(hosts[0], non_blocking=True)

    def both(turn: int) -> None:
        upload(turn)
        with lanes[1]:
            hosts[1].copy_(devices[1], non_blocking=True)

    return COPY_BYTES / median_seconds(upload, device), 2 * COPY_BYTES / median_seconds(both, device)


def row_speed(rows: Rows, device: torch.device) -> float:
    """Measure the bytes per second of fetching one view's rows while another's are written back, both together."""
    kernels = kernels_for(device, "offload.adam.rows")
    tables = DeferralTables(torch.ones(1, COLUMNS), (0.9, 0.999), 1e-15, device)
    for _ in range(STEPS_BEFORE):
        tables.begin_step([1e-3])
    views, last_step = [ids.to(device) for ids in rows.views], rows.last_step.to(device)
    fetched, updated = (rows.state.new_empty(rows.num_visible, device) for _ in range(2))
    fetching, writing = Lane.new(device), Lane.new(device)
    finish(device)

    def work(turn: int) -> None:
        with fetching:
            ids = views[turn % VIEWS]
            kernels.fetch_rows(rows.state, ids, ids, last_step, None, fetched, tables)
        with writing:
            kernels.write_rows(updated, views[(turn + 1) % VIEWS], None, rows.state)

    return STREAMED_LINK_BYTES * rows.num_visible / median_seconds(work, device)


def measure(device: torch.device, num_rows: int) -> Speeds:
    """Measure the speeds of this machine.

    Args:
        device: The GPU, or the CPU where there is none.
        num_rows: Rows of the host memory to measure on.
    """
    rows = Rows(num_rows, pin=device.type == "cuda")
    host = host_speed(rows)
    if device.type != "cuda":
        return Speeds(host)
    one_way, both_ways = copy_speeds(device)
    return Speeds(host, one_way, both_ways, row_speed(rows, device))


def rows_that_fit() -> int:
    """Make rows to measure on."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(MOST_ROWS, int(MEMORY_SHARE * memory / (3 * 4 * COLUMNS)))


def main(options: Options) -> None:
    """Measure, print and keep the verdict.

    Raises:
        InputError: Options that cannot be.
    """
    if options.num_gaussians < 1 or not 0 < options.visible <= 1:
        raise InputError("--num_gaussians must be at least 1, and --visible above 0 and at most 1.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    speeds = measure(device, rows_that_fit())
    print(f"Adam over rows in host memory: {speeds.host / 1e9:.1f} GB/s read and written")
    if device.type != "cuda":
        print("torch finds no CUDA GPU here: there is no link, and nothing to stream.")
        return
    print(f"Pinned copies: {speeds.copies / 1e9:.1f} GB/s to the GPU, {speeds.copies_both_ways / 1e9:.1f} both ways")
    print(f"Rows read and written by the GPU at once: {speeds.rows_both_ways / 1e9:.1f} GB/s")
    print(verdict(speeds, options.num_gaussians, options.visible))
    try:
        print(f"Kept in {save_verdict(machine_name(device), speeds, options.num_gaussians, options.visible)}")
    except (OSError, RuntimeError) as error:
        print(f"Warning: the verdict could not be kept ({error}); the trainers will not print it.", file=sys.stderr)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
