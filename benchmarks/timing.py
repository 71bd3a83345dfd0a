"""How long things take: medians and spread, on the host's clock or on the GPU's."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Spread:
    """Median and 10th and 90th percentile of repeated measurements."""

    median: float
    low: float
    high: float
    count: int

    @staticmethod
    def of(samples: Sequence[float]) -> Spread:
        low, median, high = np.percentile(samples, (10, 50, 90))
        return Spread(float(median), float(low), float(high), len(samples))


@dataclass(frozen=True)
class Case:
    """Work to be timed, and what has to be done before each time, which is not timed."""

    work: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


class Clock:
    """Marks points in time: by CUDA events on a GPU, by the host's clock elsewhere."""

    def __init__(self, device: torch.device = CPU) -> None:
        self._on_gpu = device.type == "cuda"
        self._device = device
        self._filler: torch.Tensor | None = None  # not made where only `mark` is used: it takes 67 MB

    def give_head_start(self) -> None:
        """Keep the GPU busy for some ms, so that what follows is queued up and no launch is waited for."""
        if self._on_gpu:
            if self._filler is None:
                self._filler = torch.rand(4096, 4096, device=self._device)
            torch.mm(self._filler, self._filler)

    def mark(self) -> torch.cuda.Event | float:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def milliseconds(self, begin: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
        if not self._on_gpu:
            return 1e3 * (end - begin)
        end.synchronize()
        return begin.elapsed_time(end)


def time_in_turns(
    cases: Mapping[str, Case], repeats: int, *, warmup: int = 1, device: torch.device = CPU
) -> dict[str, Spread]:
    """Time each case in milliseconds. The cases take turns, so that other work on the machine meets each alike.

    Args:
        cases: By name.
        repeats: Timed turns.
        warmup: Turns before them.
        device: Whose clock measures.
    """
    clock = Clock(device)
    samples: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(warmup + repeats):
        for name, case in cases.items():
            case.prepare()
            clock.give_head_start()
            begin = clock.mark()
            case.work()
            samples[name].append(clock.milliseconds(begin, clock.mark()))
    return {name: Spread.of(values[warmup:]) for name, values in samples.items()}


def copy_bandwidth(device: torch.device = CPU, num_bytes: int = 2**29) -> float:
    """Measure the bytes per second, read and written, of a large copy, which memory-bound work is held against."""
    source = torch.zeros(num_bytes // 4, device=device)
    destination = torch.zeros_like(source)
    times = time_in_turns({"copy": Case(lambda: destination.copy_(source))}, 9, warmup=2, device=device)
    return 2 * source.nbytes / (1e-3 * times["copy"].median)


def upload_bandwidth(device: torch.device, num_bytes: int = 2**29) -> float:
    """Measure the bytes per second of a large copy from pinned memory to a GPU."""
    source = torch.zeros(num_bytes // 4, pin_memory=True)
    destination = torch.empty_like(source, device=device)
    copy = Case(lambda: destination.copy_(source, non_blocking=True))
    return source.nbytes / (1e-3 * time_in_turns({"copy": copy}, 9, warmup=2, device=device)["copy"].median)
