"""Culling by geometry: visible ids of a camera, natively and with torch.

    python -m benchmarks.culling [--num_gaussians 18000000] [--views 16] [--quick]

On the synthetic aerial scene: our native culling, with bounds of blocks and testing every row; the culling of geometry
on a device, on the same cores and, with a GPU, there, for which the floor does not hold; and torch on the same cores,
testing every Gaussian whole.
The floor is what must be read and written (bounds, rows of blocks that hold a visible Gaussian, ids) at the bandwidth
of a large copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.aerial_scene import aerial_cameras, aerial_geometry, geometry_rows, one_by_one
from benchmarks.command_line import BenchmarkOptions, run
from benchmarks.numbers import megabytes
from benchmarks.report import Report, spread
from benchmarks.timing import Case, copy_bandwidth, time_in_turns
from offload.adam.deferral import DeferralTables
from offload.adam.geometry import GeometryState
from offload.backends import kernels_for, native, num_threads
from offload.culling.cameras import Cameras, Margin
from offload.culling.native import BlockBounds, visible_ids
from reporting.numbers import number
from tests.oracles.culling import visible_ids_by_the_whole_test

ROW_BYTES, BOUNDS_BYTES, ID_BYTES = 48, 32, 8


@dataclass
class Options(BenchmarkOptions):
    num_gaussians: int = 18_000_000
    """Size of the scene."""
    views: int = 16
    """Cameras of the scene to cull for."""
    torch_views: int = 4
    """How many of these cameras the torch versions, which are slow, are given."""


def culling_on(device: torch.device, parameters: Mapping[str, Tensor]) -> Callable[[Cameras], Tensor]:
    """Return the culling of geometry that lies on a device, of which no row lags behind."""
    values = {name: parameters[name].to(device) for name in ("means", "scales", "quats", "opacities")}
    moments = [{name: torch.zeros_like(value) for name, value in values.items()} for _ in range(2)]
    last_step = torch.zeros(len(values["means"]), dtype=torch.int32, device=device)
    state = GeometryState(values, *moments, last_step)
    tables = DeferralTables(torch.ones(1, 12), (0.9, 0.999), 1e-15, device)
    kernels = kernels_for(device, "offload.culling.kernels")
    return lambda cameras: kernels.visible_ids(state, tables, cameras, Margin(), Margin())


def over(arguments: Sequence, work: Callable[[object], object]) -> Case:
    """Work on one argument after the other, another at each turn."""
    state = {"turn": -1}

    def prepare() -> None:
        state["turn"] += 1

    return Case(lambda: work(arguments[state["turn"] % len(arguments)]), prepare)


def mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)


def main(options: Options) -> None:
    if options.quick:
        options.num_gaussians, options.views, options.torch_views = 200_000, 3, 2
    n = options.num_gaussians
    torch.set_num_threads(num_threads())
    parameters = aerial_geometry(n, torch.Generator().manual_seed(0))
    cameras = one_by_one(aerial_cameras(0))[: options.views]
    few = cameras[: options.torch_views]
    tensors = [parameters[name] for name in ("means", "scales", "quats", "opacities")]
    on_cpu = culling_on(torch.device("cpu"), parameters)
    geometry = geometry_rows(parameters)
    bounds, no_bounds = BlockBounds(geometry), BlockBounds(geometry)
    no_bounds.bounds.fill_(float("nan"))  # such blocks are never skipped
    out = torch.zeros(n, dtype=torch.int64)

    visible = [visible_ids(geometry, bounds, camera).clone() for camera in cameras]
    for camera, ids in zip(few, visible, strict=False):
        for others in (on_cpu(camera), visible_ids_by_the_whole_test(*tensors, camera)):
            differing = len(set(ids.tolist()) ^ set(others.tolist()))
            if differing > 1e-5 * n:
                raise RuntimeError(f"two ways of culling differ in {differing} Gaussians")
    blocks = [len(torch.unique_consecutive(ids // native.BLOCK_ROWS)) for ids in visible]
    touched = BOUNDS_BYTES * len(bounds.bounds) + ROW_BYTES * native.BLOCK_ROWS * mean(blocks)
    rows_of_blocks = ROW_BYTES * native.BLOCK_ROWS * mean(blocks)

    fast = {
        "native, bounds of blocks": over(cameras, lambda c: visible_ids(geometry, bounds, c, out=out)),
        "native, every row": over(cameras, lambda c: visible_ids(geometry, no_bounds, c, out=out)),
        "bounds of the blocks of the visible rows": over(visible, lambda ids: bounds.update(geometry, ids)),
        "bounds of all blocks": Case(lambda: bounds.rebuild(geometry)),
    }
    slow = {
        "geometry of a device, here the CPU": over(few, on_cpu),
        "torch, every Gaussian": over(few, lambda c: visible_ids_by_the_whole_test(*tensors, c)),
    }
    times = {**time_in_turns(fast, options.views), **time_in_turns(slow, options.torch_views)}
    if torch.cuda.is_available():
        gpu = torch.device("cuda")
        case = over(cameras, culling_on(gpu, parameters))
        times |= time_in_turns({"geometry of a device, on the GPU": case}, options.views, device=gpu)
    moved = {
        "native, bounds of blocks": touched + ID_BYTES * mean([len(ids) for ids in visible]),
        "native, every row": ROW_BYTES * n,
        "bounds of the blocks of the visible rows": rows_of_blocks,
        "bounds of all blocks": ROW_BYTES * n,
    }

    report = Report("culling", "Culling by geometry: milliseconds per view", options)
    bandwidth = copy_bandwidth()
    shares = [len(ids) / n for ids in visible]
    report.say(
        f"{n:,} Gaussians, {options.views} views; visible {mean(shares):.1%} ({min(shares):.1%} to {max(shares):.1%}); "
        f"blocks that hold a visible one {mean(blocks) / len(bounds.bounds):.1%}. "
        f"Large copy on the host, read and written: {bandwidth / 1e9:.1f} GB/s."
    )
    columns = {
        "work": str,
        "ms, median (10 %, 90 %)": spread,
        "MB": megabytes,
        "floor, ms": number,
        "torch, every Gaussian / this": number,
    }
    table = report.table("Time per view, and the bytes that it must move:", columns)
    slowest = times["torch, every Gaussian"].median
    for name, time in times.items():
        num_bytes = moved.get(name, 44 * n)
        ratio = None if name.startswith("bounds of") else slowest / time.median
        table.add(name, time, num_bytes, None if "GPU" in name else 1e3 * num_bytes / bandwidth, ratio)
    report.write()


if __name__ == "__main__":
    run(main, Options, __doc__)
