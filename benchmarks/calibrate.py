"""Which trainer, with which options, is the fastest on this machine that fits into its memory.

    python -m benchmarks.calibrate [--num_gaussians 18000000] [--visible 0.08] [--device_memory 24GB]

Takes about a minute. Measures pinned copies, the streamed trainer's kernels over pinned rows, plain and compact ones,
the optimized trainer's Adam kernels over host memory, copies on the GPU, and rendering. Every trainer prints the
verdict when it starts on a GPU. What a step takes is that of its slowest part, as all may overlap.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.aerial_scene import HEIGHT, WIDTH, aerial_scene, geometry_rows, one_by_one
from benchmarks.timing import copy_bandwidth
from configs import Config
from errors import InputError, refusing
from offload.adam.deferral import DeferralTables
from offload.adam.harmonics import HarmonicsGradient
from offload.adam.host import DeferredAdam
from offload.backends import kernels_for
from offload.culling.cameras import Cameras
from offload.culling.native import BlockBounds, visible_ids
from offload.pipelines.lanes import Lane
from offload.store.layout import GROUP_NAMES, PackedRows, RowState, packed_rows, packed_words
from offload.store.memory import HostArray
from option_words import parse
from trainers import HARMONICS_MADE_COMMIT
from training.calibration import Scene, Speeds, machine_name, save_verdict, verdict
from training.memory import available_bytes, parse_bytes
from training.views import render

COLUMNS = 48
SH_DEGREE = 3
ADAM_BYTES = (4 + 7) * 4 * COLUMNS  # of host memory, to forward a row and to commit one
STREAMED_BYTES = 2 * 3 * 4 * COLUMNS  # of a row with its moments, both ways
RENDERED = (100_000, 4_000_000)  # Gaussians of the aerial scene, of which one view is rendered
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
    """Share of them that a view sees; of the largest view, for what fits."""
    width: int = WIDTH
    """Of the pictures, in pixels."""
    height: int = HEIGHT
    """The same."""
    device_memory: str = ""
    """GPU memory that training may take, such as 24GB; else what this GPU has."""
    host_memory: str = ""
    """The same of the host."""


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


def adam_in_training() -> DeferredAdam:
    """Make the optimizer of rows in host memory, as it is after some steps."""
    adam = DeferredAdam(torch.ones(1, COLUMNS))
    for _ in range(STEPS_BEFORE):
        adam.begin_step([1e-3])
    return adam


def host_speed(rows: Rows) -> float:
    """Measure the bytes per second that forwarding one view's rows and committing another's reads and writes."""
    adam = adam_in_training()
    arrays = [HostArray(COLUMNS, max_rows=rows.num_visible) for _ in range(2)]
    for array in arrays:
        array.resize(rows.num_visible)
    gradients, out = (array.tensor.fill_(1e-3) for array in arrays)
    state = rows.state, rows.last_step

    def work(turn: int) -> None:
        adam.begin_step([1e-3])
        adam.forward(*state, rows.views[(turn + 1) % VIEWS], out)
        adam.commit(*state, rows.views[turn % VIEWS], gradients)

    return ADAM_BYTES * rows.num_visible / median_seconds(work, torch.device("cpu"))


def packed_host_speed(num_rows: int, views: Sequence[Tensor]) -> float:
    """Measure the bytes per second that committing a view's compact harmonics reads and writes, with made gradients.

    Args:
        num_rows: In host memory.
        views: int64 [V] each, the rows of views that take turns.
    """
    adam = adam_in_training()
    words = HostArray(packed_words("appearance", SH_DEGREE), max_rows=num_rows, dtype=torch.int32)
    words.resize(num_rows)
    state = packed_rows(words.tensor, "appearance")
    last_step = torch.full((num_rows,), STEPS_BEFORE - 12, dtype=torch.int32)
    seen = torch.randn(len(views[0]), 6, generator=torch.Generator().manual_seed(0))
    made = HarmonicsGradient(seen[:, :3], seen[:, 3:], (0.0, 0.0, 0.0), SH_DEGREE)

    def work(turn: int) -> None:
        adam.begin_step([1e-3])
        adam.commit(state, last_step, views[turn % VIEWS], made)

    return HARMONICS_MADE_COMMIT * len(views[0]) / median_seconds(work, torch.device("cpu"))


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

    return STREAMED_BYTES * rows.num_visible / median_seconds(work, device)


def packed_speed(num_rows: int, views: Sequence[Tensor], device: torch.device) -> float:
    """Measure the bytes per second of fetching one view's compact rows while another's are written, both together.

    Args:
        num_rows: In host memory.
        views: int64 [V] each, the rows of views that take turns.
        device: Whose kernels move them.
    """
    kernels = kernels_for(device, "offload.adam.rows")
    pin = device.type == "cuda"
    # Of each group words and the step of each row's last update; kept, since they own the memory.
    arrays = [
        HostArray(columns, max_rows=num_rows, dtype=torch.int32, pin=pin)
        for group in GROUP_NAMES
        for columns in (packed_words(group, SH_DEGREE), 1)
    ]
    for array in arrays:
        array.resize(num_rows)
    stored = _packed(array.tensor for array in arrays)
    on_device = [
        _packed(torch.zeros(len(views[0]), array.tensor.shape[1], dtype=torch.int32, device=device) for array in arrays)
        for _ in range(2)
    ]
    ids = [view.to(device) for view in views]
    fetching, writing = Lane.new(device), Lane.new(device)
    finish(device)

    def work(turn: int) -> None:
        with fetching:
            kernels.read_packed_rows(stored, ids[turn % VIEWS], None, on_device[0])
        with writing:
            kernels.write_packed_rows(on_device[1], ids[(turn + 1) % VIEWS], None, stored)

    row_bytes = sum(array.tensor.shape[1] * 4 for array in arrays)
    return 2 * row_bytes * len(views[0]) / median_seconds(work, device)


def _packed(tensors: Iterable[Tensor]) -> list[PackedRows]:
    """Return the words and the last steps of each group in pairs."""
    every = list(tensors)
    return [(words, last_step[:, 0]) for words, last_step in zip(every[::2], every[1::2], strict=True)]


def rendering_seconds(device: torch.device) -> tuple[float, float]:
    """Measure rendering and its backward pass: the seconds of a view that sees nothing, and more for each Gaussian.

    The former are those that launching takes. A GPU is busy for less in both views, so the latter are of its own time.
    """
    seconds, busy, visible = [], [], []
    for num_gaussians in RENDERED:
        parameters, cameras = aerial_scene(num_gaussians, seed=0)
        camera, geometry = one_by_one(cameras)[0], geometry_rows(parameters)
        ids = visible_ids(geometry, BlockBounds(geometry), camera)
        rows = {name: value[ids].to(device).requires_grad_() for name, value in parameters.items()}

        def work(turn: int, rows: dict[str, Tensor] = rows, camera: Cameras = camera) -> None:
            colors, _ = render(rows, camera, Config(), sh_degree=SH_DEGREE)
            colors.sum().backward()

        seconds.append(median_seconds(work, device))
        busy.append(seconds[-1] if device.type != "cuda" else busy_seconds(work, device))
        visible.append(len(ids))
    each = max((busy[1] - busy[0]) / (visible[1] - visible[0]), 0.0)
    return max(seconds[0] - each * visible[0], 0.0), each


def busy_seconds(work: Callable[[int], None], device: torch.device) -> float:
    """Measure how long a GPU is busy with work, in the mean of some turns."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for turn in range(REPEATS):
            work(turn)
        finish(device)
    return 1e-6 * sum(event.self_device_time_total for event in profile.key_averages()) / REPEATS


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
    packed, host_packed = packed_speed(num_rows, rows.views, device), packed_host_speed(num_rows, rows.views)
    of_rows, on_device = (row_speed(rows, device), packed), copy_bandwidth(device)
    return Speeds(host, *copy_speeds(device), *of_rows, on_device, *rendering_seconds(device), host_packed)


def rows_that_fit() -> int:
    """Make rows to measure on."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(MOST_ROWS, int(MEMORY_SHARE * memory / (3 * 4 * COLUMNS)))


def scene_of(options: Options, device: torch.device) -> Scene:
    """Return the scene to say something about.

    Raises:
        InputError: Options that cannot be.
    """
    if options.num_gaussians < 1 or not 0 < options.visible <= 1 or min(options.width, options.height) < 1:
        raise InputError(
            "--num_gaussians, --width and --height must be at least 1, and --visible above 0 and at most 1."
        )
    memory = [
        parse_bytes(text, option) if text else available_bytes(place)
        for text, option, place in (
            (options.device_memory, "--device_memory", device),
            (options.host_memory, "--host_memory", torch.device("cpu")),
        )
    ]
    return Scene(options.num_gaussians, options.visible, options.width * options.height, *memory)


def main(options: Options) -> None:
    """Measure, print and keep the verdict.

    Raises:
        InputError: Options that cannot be.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scene = scene_of(options, device)
    speeds = measure(device, rows_that_fit())
    compact = f", over compact ones {speeds.host_packed / 1e9:.1f} GB/s" if speeds.host_packed else ""
    print(f"Adam over rows in host memory: {speeds.host / 1e9:.1f} GB/s read and written{compact}")
    if device.type != "cuda":
        print("torch finds no CUDA GPU here: there is no link, and nothing to stream.")
        return
    print(f"Pinned copies: {speeds.copies / 1e9:.1f} GB/s to the GPU, {speeds.copies_both_ways / 1e9:.1f} both ways")
    rows, packed = speeds.rows_both_ways / 1e9, speeds.packed_both_ways / 1e9
    print(f"Rows read and written by the GPU at once: {rows:.1f} GB/s, compact ones {packed:.1f} GB/s")
    print(
        f"On the GPU: copies {speeds.device / 1e9:.0f} GB/s read and written; rendering and its backward pass "
        f"{1e3 * speeds.launching:.2f} ms, and {1e9 * speeds.rendering:.2f} ms for a million Gaussians in view"
    )
    print(verdict(speeds, scene))
    try:
        print(f"Kept in {save_verdict(machine_name(device) or '', speeds, scene)}")
    except (OSError, RuntimeError) as error:
        print(f"Warning: the verdict could not be kept ({error}); the trainers will not print it.", file=sys.stderr)


if __name__ == "__main__":
    with refusing():
        main(parse(Options, __doc__))
