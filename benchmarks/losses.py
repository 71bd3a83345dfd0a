"""Time of the photometric loss against plain autograd: `python -m benchmarks.losses`, a Markdown table.

The floor is what the Triton kernels must move, 11 pictures' worth of float32 (forward reads 2 pictures and
writes 3 maps, backward reads those 5 and writes 1), at the bandwidth of a large copy on the same device.
"""

import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from rendering.losses import photometric_loss
from rendering.ssim import C1, C2, WINDOW, WINDOW_SIZE

SIZES = [(320, 240), (800, 533), (1600, 1066)]  # px, width x height
SSIM_LAMBDA = 0.2
FLOOR_BYTES_PER_PIXEL = 11 * 3 * 4


def plain_loss(rendered: Tensor, target: Tensor) -> Tensor:
    """The same loss in the way it is usually written: five 11x11 depthwise convolutions and autograd."""
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


class Clock:
    """Marks points in time: CUDA events on a GPU, the host's clock elsewhere."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.filler = torch.rand(4096, 4096, device=device) if self.on_gpu else None

    def give_head_start(self) -> None:
        """Keeps the GPU busy for some ms, so that what follows is queued up and no launch is waited for."""
        if self.on_gpu:
            torch.mm(self.filler, self.filler)

    def mark(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start, end) -> float:
        if not self.on_gpu:
            return (end - start) * 1e3
        end.synchronize()
        return start.elapsed_time(end)


def measure(
    loss: Callable[[Tensor, Tensor], Tensor], size: tuple[int, int], device: str, repeats: int
) -> dict[str, list[float]]:
    """Milliseconds of the forward pass, the backward pass and both, one entry per repeat."""
    width, height = size
    torch.manual_seed(0)
    target = torch.rand(1, height, width, 3, device=device)
    rendered = (target + 0.1 * torch.randn_like(target)).clamp(0, 1).requires_grad_()
    clock = Clock(device)
    times = {"forward": [], "backward": [], "total": []}
    for repeat in range(repeats + 5):
        clock.give_head_start()
        start = clock.mark()
        value = loss(rendered, target)
        middle = clock.mark()
        torch.autograd.grad(value, rendered)
        end = clock.mark()
        if repeat >= 5:  # the first ones compile kernels and fill the allocator's cache
            times["forward"].append(clock.milliseconds(start, middle))
            times["backward"].append(clock.milliseconds(middle, end))
            times["total"].append(clock.milliseconds(start, end))
    return times


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read and written, of a 256 MiB copy."""
    source = torch.zeros(2**26, device=device)
    destination = torch.zeros_like(source)
    clock = Clock(device)
    times = []
    for _ in range(10):
        clock.give_head_start()
        start = clock.mark()
        destination.copy_(source)
        times.append(clock.milliseconds(start, clock.mark()))
    return 2 * source.nbytes / (statistics.median(times) * 1e-3)


def describe(samples: list[float]) -> str:
    """Median (10th to 90th percentile)."""
    deciles = statistics.quantiles(samples, n=10)
    return f"{statistics.median(samples):.3f} ({deciles[0]:.3f}-{deciles[-1]:.3f})"


def describe_machine(device: str) -> str:
    if device == "cuda":
        import triton

        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def main(repeats: int = 50) -> None:
    """Prints the table for the GPU if there is one, for the CPU otherwise.

    Args:
        repeats: measured passes per size and implementation.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bandwidth = copy_bandwidth(device)
    print(f"{describe_machine(device)}, Python {platform.python_version()}; copy {bandwidth / 1e9:.0f} GB/s.")
    print(f"Milliseconds, median (10th-90th percentile) of {repeats}.\n")
    print("| picture | loss | forward | backward | total | floor |")
    print("|---|---|---|---|---|---|")
    for size in SIZES:
        floor = size[0] * size[1] * FLOOR_BYTES_PER_PIXEL / bandwidth * 1e3
        for name, loss in (("ours", our_loss), ("plain torch", plain_loss)):
            times = measure(loss, size, device, repeats)
            cells = " | ".join(describe(times[stage]) for stage in ("forward", "backward", "total"))
            print(f"| {size[0]}x{size[1]} | {name} | {cells} | {floor:.3f} |")


if __name__ == "__main__":
    tyro.cli(main)
