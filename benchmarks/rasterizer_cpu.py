"""The CPU rasterizer, against the same blend in plain torch.

    python -m benchmarks.rasterizer_cpu [--gaussians 100000] [--width 320] [--height 240] [--quick]

Both blends start from the same projected Gaussians and colours; the torch version goes tile by tile, vectorized over
the pixels and Gaussians of a tile, with autograd. A third line times the whole of `rasterize`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.command_line import BenchmarkOptions, run
from benchmarks.report import Report, spread
from benchmarks.timing import Clock, Spread
from offload.backends import num_threads
from rendering.cpu_rasterizer import blend_pairs
from rendering.projection import Projection, project
from rendering.rasterize import rasterize
from reporting.numbers import number

TILE = 16  # pixels
MAX_ALPHA, MIN_ALPHA, MIN_TRANSMITTANCE = 0.999, 1 / 255, 1e-4


@dataclass
class Options(BenchmarkOptions):
    gaussians: int = 100_000
    """Random ones, in a box before the camera."""
    width: int = 320
    """Width of the picture in pixels."""
    height: int = 240
    """Height of the picture in pixels."""
    repeats: int = 15
    """Timed runs of the native rasterizer."""
    torch_repeats: int = 3
    """Timed runs of the torch blend, which is slow."""


def random_gaussians(n: int) -> list[Tensor]:
    """Make means, quats, scales, opacities and spherical harmonics of degree 3 in a box before the camera."""
    generator = torch.Generator().manual_seed(0)
    means = torch.rand(n, 3, generator=generator) * torch.tensor([4.0, 3.0, 4.0]) + torch.tensor([-2.0, -1.5, 2.0])
    quats = torch.randn(n, 4, generator=generator)
    scales = torch.exp(0.5 * torch.randn(n, 3, generator=generator) - 4)
    opacities = torch.rand(n, generator=generator)
    coeffs = 0.3 * torch.randn(n, 16, 3, generator=generator)
    return [t.requires_grad_() for t in (means, quats, scales, opacities, coeffs)]


def torch_blend(projected: Projection, colors: Tensor, width: int, height: int) -> Tensor:
    """Render the image [H, W, 3] of projected Gaussians: for each tile all its Gaussians at all its pixels."""
    means2d, conics, opacities, radii = projected.means2d, projected.conics, projected.opacities, projected.radii
    order = torch.argsort(projected.depths)
    low, high = (means2d - radii).detach(), (means2d + radii).detach()
    rows = []
    for y in range(0, height, TILE):
        tiles = []
        for x in range(0, width, TILE):
            w, h = min(TILE, width - x), min(TILE, height - y)
            meets = (high[order, 0] > x) & (low[order, 0] < x + w) & (high[order, 1] > y) & (low[order, 1] < y + h)
            ids = order[meets]  # [n]
            py, px = torch.meshgrid(torch.arange(y, y + h) + 0.5, torch.arange(x, x + w) + 0.5, indexing="ij")
            dx, dy = means2d[ids, :1] - px.reshape(1, -1), means2d[ids, 1:] - py.reshape(1, -1)  # [n, pixels]
            a, b, c = conics[ids, :, None].unbind(1)
            sigma = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
            alpha = (opacities[ids, None] * torch.exp(-sigma)).clamp(max=MAX_ALPHA)
            alpha = torch.where((alpha >= MIN_ALPHA) & (sigma >= 0), alpha, 0)
            after = torch.cumprod(1 - alpha, 0)
            before = torch.cat([torch.ones_like(after[:1]), after[:-1]])
            weights = torch.where(after > MIN_TRANSMITTANCE, alpha * before, 0)
            tiles.append((weights.T @ colors[ids]).reshape(h, w, -1))
        rows.append(torch.cat(tiles, 1))
    return torch.cat(rows)


def milliseconds(repeats: int, forward: Callable[[], tuple[Tensor, list[Tensor]]], weights: Tensor) -> list[Spread]:
    """Time the forward pass, the backward pass and both, after one run to warm up."""
    clock, marks = Clock(), []
    for _ in range(repeats + 1):
        start = clock.mark()
        image, inputs = forward()
        middle = clock.mark()
        torch.autograd.grad(image, inputs, weights)
        marks.append((start, middle, clock.mark()))
    return [
        Spread.of([clock.milliseconds(times[first], times[last]) for times in marks[1:]])
        for first, last in ((0, 1), (1, 2), (0, 2))
    ]


def main(options: Options) -> None:
    if options.quick:
        options.gaussians, options.width, options.height, options.repeats, options.torch_repeats = (
            10_000,
            160,
            120,
            5,
            1,
        )
    torch.set_num_threads(num_threads())
    width, height = options.width, options.height
    gaussians = random_gaussians(options.gaussians)
    viewmats = torch.eye(4)[None]
    K = torch.tensor([[[0.875 * width, 0, width / 2], [0, 0.875 * width, height / 2], [0, 0, 1]]])
    weights = torch.randn(1, height, width, 3, generator=torch.Generator().manual_seed(1))

    def whole() -> tuple[Tensor, list[Tensor]]:
        return rasterize(*gaussians, viewmats, K, width, height, sh_degree=3)[0], gaussians

    with torch.no_grad():
        seen = project(
            *gaussians[:4], viewmats, K, width, height, near_plane=0.01, far_plane=1e10, radius_clip=0.0, eps2d=0.3,
            antialiased=False,
        )  # fmt: skip
    colors = torch.rand(len(seen.gaussian_ids), 3, generator=torch.Generator().manual_seed(2))
    leaves = [t.clone().requires_grad_() for t in (seen.means2d, seen.conics, seen.opacities, colors)]
    *rows, colors = leaves
    seen = replace(seen, means2d=rows[0], conics=rows[1], opacities=rows[2])

    def native() -> tuple[Tensor, list[Tensor]]:
        return blend_pairs(seen, colors, None, 1, width, height, absgrad=False)[0], leaves

    def plain_torch() -> tuple[Tensor, list[Tensor]]:
        return torch_blend(seen, colors, width, height)[None], leaves

    difference = (native()[0] - plain_torch()[0]).abs().max()
    timed = {
        "plain torch, blend": milliseconds(options.torch_repeats, plain_torch, weights),
        "native, blend": milliseconds(options.repeats, native, weights),
        "native, rasterize: projection, harmonics, blend": milliseconds(options.repeats, whole, weights),
    }
    visible, radius = len(seen.gaussian_ids), seen.radii.float().mean()
    report = Report("rasterizer_cpu", "The CPU rasterizer", options)
    report.say(
        f"{options.gaussians:,} Gaussians, {visible:,} visible, mean radius {radius:.1f} pixels, {width}x{height} "
        f"pixels. Largest difference of the two blends: {difference:.1e}."
    )
    columns = {"work": str, **dict.fromkeys(("forward", "backward", "total"), spread), "plain torch / this": number}
    table = report.table("Milliseconds, median (10 %, 90 %):", columns)
    slowest = timed["plain torch, blend"][2].median
    for name, times in timed.items():
        table.add(name, *times, None if "rasterize" in name else slowest / times[2].median)
    report.write()


if __name__ == "__main__":
    run(main, Options, __doc__)
