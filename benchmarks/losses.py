"""The photometric loss, against the same by convolutions and autograd.

    python -m benchmarks.losses [--repeats 50] [--quick]

The floor is what the Triton kernels must move, 11 pictures' worth of float32 (forward reads 2 pictures and
writes 3 maps, backward reads those 5 and writes 1), at the bandwidth of a large copy on the same device.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.command_line import BenchmarkOptions, run
from benchmarks.report import Report, spread
from benchmarks.timing import Clock, Spread, copy_bandwidth
from rendering.losses import photometric_loss
from rendering.ssim import C1, C2, WINDOW, WINDOW_SIZE
from reporting.numbers import number

SIZES = [(320, 240), (800, 533), (1600, 1066)]  # px, width x height
SSIM_LAMBDA = 0.2
FLOOR_BYTES_PER_PIXEL = 13 * 3 * 4


@dataclass
class Options(BenchmarkOptions):
    repeats: int = 50
    """Timed passes per size and implementation."""


def plain_loss(rendered: Tensor, target: Tensor) -> Tensor:
    """Compute the same loss as it is usually written: five 11x11 depthwise convolutions and autograd."""
    window = torch.tensor(WINDOW, device=rendered.device)
    window = torch.outer(window, window).expand(3, 1, WINDOW_SIZE, WINDOW_SIZE)
    x, y = rendered.permute(0, 3, 1, 2), target.permute(0, 3, 1, 2)

    def blur(planes: Tensor) -> Tensor:
        return F.conv2d(planes, window, groups=3)

    mu1, mu2 = blur(x), blur(y)
    s1, s2, s12 = blur(x * x) - mu1**2, blur(y * y) - mu2**2, blur(x * y) - mu1 * mu2
    ssim = (2 * mu1 * mu2 + C1) * (2 * s12 + C2) / ((mu1**2 + mu2**2 + C1) * (s1 + s2 + C2))
    return (1 - SSIM_LAMBDA) * (x - y).abs().mean() + SSIM_LAMBDA * (1 - ssim.mean())


def our_loss(rendered: Tensor, target: Tensor) -> Tensor:
    return photometric_loss(rendered, target, ssim_lambda=SSIM_LAMBDA)


def measure(
    loss: Callable[[Tensor, Tensor], Tensor], size: tuple[int, int], device: torch.device, repeats: int
) -> list[Spread]:
    """Time the forward pass, the backward pass and both in milliseconds."""
    width, height = size
    torch.manual_seed(0)
    target = torch.rand(1, height, width, 3, device=device)
    rendered = (target + 0.1 * torch.randn_like(target)).clamp(0, 1).requires_grad_()
    clock = Clock(device)
    marks = []
    for _ in range(repeats + 5):
        clock.give_head_start()
        start = clock.mark()
        value = loss(rendered, target)
        middle = clock.mark()
        torch.autograd.grad(value, rendered)
        marks.append((start, middle, clock.mark()))
    marks = marks[5:]  # the first ones compile kernels and fill the allocator's cache
    return [
        Spread.of([clock.milliseconds(times[first], times[last]) for times in marks])
        for first, last in ((0, 1), (1, 2), (0, 2))
    ]


def main(options: Options) -> None:
    sizes, repeats = (SIZES[:1], 5) if options.quick else (SIZES, options.repeats)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bandwidth = copy_bandwidth(device)
    report = Report("losses", "The photometric loss", options)
    report.say(f"On {device.type}; large copy there, read and written: {bandwidth / 1e9:.0f} GB/s; {repeats} passes.")
    columns = {"picture": str, "loss": str, **dict.fromkeys(("forward", "backward", "total"), spread), "floor": number}
    table = report.table("Milliseconds, median (10 %, 90 %):", columns)
    for width, height in sizes:
        floor = 1e3 * width * height * FLOOR_BYTES_PER_PIXEL / bandwidth
        for name, loss in (("ours", our_loss), ("plain torch", plain_loss)):
            table.add(f"{width}x{height}", name, *measure(loss, (width, height), device, repeats), floor)
    report.write()


if __name__ == "__main__":
    run(main, Options, __doc__)
