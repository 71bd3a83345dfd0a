"""Time of culling by geometry on the CPU, and a Markdown table of it.

    python -m benchmarks.culling [--num_gaussians 18000000] [--views 16] [--quick]

On the synthetic aerial scene: our native culling, with bounds of blocks and testing every row; and torch on the same
cores, testing every Gaussian whole, and in the two stages that serve on the device.
With a GPU also the latter there, for which the floor does not hold.
The floor is what must be read and written (bounds, rows of blocks that hold a visible Gaussian, ids) at the bandwidth
of a large copy.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor

from benchmarks.aerial_scene import aerial_cameras, aerial_geometry
from benchmarks.machine import processor
from offload import _native, culling
from offload.culling import BlockBounds, Cameras, visible_ids, visible_ids_on_device
from offload.threads import num_threads

ROW_BYTES, BOUNDS_BYTES, ID_BYTES = 48, 32, 8


@dataclass
class Options:
    num_gaussians: int = 18_000_000
    views: int = 16
    """cameras of the scene to cull for"""
    torch_views: int = 4
    """of these, cameras for the torch versions, which are slow"""
    quick: bool = False
    """a small scene and few views: does it run"""


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a 512 MiB copy."""
    source = torch.zeros(2**27)
    destination = torch.zeros_like(source)
    return 2 * source.nbytes / statistics.median(milliseconds(lambda _: destination.copy_(source), range(7))) * 1e3


def milliseconds(function: Callable, arguments) -> list[float]:
    """One time per argument, after a first run to warm up."""
    times = []
    for argument in [arguments[0], *arguments]:
        start = time.perf_counter()
        function(argument)
        times.append((time.perf_counter() - start) * 1e3)
    return times[1:]


def describe(samples: list[float]) -> str:
    return f"{statistics.median(samples):.2f} ({min(samples):.2f} to {max(samples):.2f})"


def geometry_rows(parameters: dict[str, Tensor]) -> Tensor:
    """[N, 12] as the host store keeps them."""
    rows = torch.zeros(len(parameters["means"]), 12)
    rows[:, 0:3] = parameters["means"]
    rows[:, 3:6] = parameters["scales"]
    rows[:, 6:10] = parameters["quats"]
    rows[:, 10] = parameters["opacities"]
    return rows


def whole_test_of_every_row(tensors: list[Tensor], cameras: Cameras) -> Tensor:
    """Visible ids by the whole test of every Gaussian, a million at a time."""
    (view,) = culling._views(cameras, None)
    drawn = [
        view.may_be_drawn(*(t[part] for t in tensors))
        for part in culling._chunks(len(tensors[0]), culling._WHOLE_CHUNK)
    ]
    return torch.cat(drawn).nonzero().squeeze(1)


def main(options: Options) -> None:
    if options.quick:
        options.num_gaussians, options.views, options.torch_views = 200_000, 3, 2
    n = options.num_gaussians
    torch.set_num_threads(num_threads())
    generator = torch.Generator().manual_seed(0)
    parameters = aerial_geometry(n, generator)
    scene = aerial_cameras(generator)
    cameras = [
        Cameras(scene.viewmats[i : i + 1], scene.Ks[i : i + 1], scene.width, scene.height, near_plane=scene.near_plane)
        for i in range(options.views)
    ]
    tensors = [parameters[name] for name in ("means", "scales", "quats", "opacities")]
    geometry = geometry_rows(parameters)
    bounds, no_bounds = BlockBounds(geometry), BlockBounds(geometry)
    no_bounds.bounds.fill_(float("nan"))  # such blocks are never skipped
    out = torch.zeros(n, dtype=torch.int64)

    visible = [visible_ids(geometry, bounds, camera).clone() for camera in cameras]
    for camera, ids in zip(cameras[: options.torch_views], visible, strict=False):
        in_stages = visible_ids_on_device(*tensors, camera)
        differing = set(ids.tolist()) ^ set(in_stages.tolist())
        assert len(differing) <= 1e-5 * n, f"native and torch differ in {len(differing)} Gaussians"
    blocks = [len(torch.unique_consecutive(ids // _native.BLOCK_ROWS)) for ids in visible]
    seen = [len(ids) for ids in visible]
    touched = [BOUNDS_BYTES * len(bounds.bounds) + ROW_BYTES * _native.BLOCK_ROWS * b + ID_BYTES * v
               for b, v in zip(blocks, seen, strict=True)]  # fmt: skip

    def mean(values: list[int]) -> float:
        return sum(values) / len(values)

    few = cameras[: options.torch_views]
    rows = [
        ("native, bounds of blocks", mean(touched), lambda c: visible_ids(geometry, bounds, c, out=out), cameras),
        ("native, every row", ROW_BYTES * n, lambda c: visible_ids(geometry, no_bounds, c, out=out), cameras),
        ("torch, two stages", 44 * n, lambda c: visible_ids_on_device(*tensors, c), few),
        ("torch, every Gaussian", 44 * n, lambda c: whole_test_of_every_row(tensors, c), few),
        ("bounds of the blocks of the visible rows", ROW_BYTES * _native.BLOCK_ROWS * mean(blocks),
         lambda ids: bounds.update(geometry, ids), visible),
        ("bounds of all blocks", ROW_BYTES * n, lambda _: bounds.rebuild(geometry), range(3)),
    ]  # fmt: skip
    if torch.cuda.is_available():
        on_gpu = [t.cuda() for t in tensors]

        def cull_on_gpu(camera: Cameras) -> None:
            visible_ids_on_device(*on_gpu, camera)
            torch.cuda.synchronize()

        rows.insert(3, ("torch, two stages, on the GPU", 44 * n, cull_on_gpu, cameras))
    bandwidth = copy_bandwidth()
    measured = {name: milliseconds(function, arguments) for name, _, function, arguments in rows}
    print(f"{processor()}, {num_threads()} threads, Python {platform.python_version()}, torch {torch.__version__}")
    print(f"copy: {bandwidth / 1e9:.1f} GB/s (read and written)")
    print(
        f"{n} Gaussians, {options.views} views; visible {mean(seen) / n:.1%} ({min(seen) / n:.1%} to "
        f"{max(seen) / n:.1%}); blocks that hold a visible one {mean(blocks) / len(bounds.bounds):.1%}\n"
    )
    print("| ms per view, median (range) | time | bytes | floor | torch, every Gaussian / this |")
    print("|---|---|---|---|---|")
    slowest = statistics.median(measured["torch, every Gaussian"])
    for name, size, _, _ in rows:
        ratio = f"{slowest / statistics.median(measured[name]):.1f}" if not name.startswith("bounds of") else ""
        print(f"| {name} | {describe(measured[name])} | {size / 1e6:.1f} MB | {size / bandwidth * 1e3:.2f} | {ratio} |")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
