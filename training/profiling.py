"""A trace of a few training steps, operation by operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule
from tqdm import tqdm

from training.files import replacing

SKIPPED_STEPS = 20  # before the trace: staging grows, kernels are compiled
WARM_UP_STEPS = 2  # traced and thrown away: the profiler itself starts


@contextmanager
def profiled_steps(num_steps: int, folder: Path, device: torch.device) -> Iterator[Callable[[], None]]:
    """Trace steps with torch.profiler, after a warm-up, on this thread and on the device.

    Args:
        num_steps: How many; with 0 nothing happens.
        folder: Receives trace.json in Chrome's format, which chrome://tracing and ui.perfetto.dev show.
        device: Where views are rendered.

    Yields:
        To be called after each step.
    """
    if num_steps == 0:
        yield lambda: None
        return

    def write(profiler: profile) -> None:
        path = folder / "trace.json"
        with replacing(path) as partial:
            profiler.export_chrome_trace(str(partial))
        tqdm.write(f"A trace of {num_steps} steps is in {path}.")

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    plan = schedule(skip_first=SKIPPED_STEPS, wait=0, warmup=WARM_UP_STEPS, active=num_steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write, acc_events=True) as profiler:
        yield profiler.step
