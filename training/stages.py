"""How long each stage of a step takes, without waiting for the device."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch

from training.per_step import PerStep


class StageTimes:
    """Divide the time line of the device (of this thread, on the CPU) into named stages.

    Call `start` where a step begins and `mark(name)` where each of its stages ends. On CUDA the marks are
    events on the current stream; they are read only in `mean_milliseconds`, which waits for the last of them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []  # not read yet: events of CUDA, or seconds
        self._totals: dict[str, float] = defaultdict(float)  # milliseconds of each stage in all steps so far
        self._num_steps = 0
        self._per_step = PerStep()

    def start(self) -> None:
        """Begin a step."""
        self.mark("")

    def mark(self, name: str) -> None:
        """End the stage of this name, which began at the mark before."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append((name, event))
        else:
            self._marks.append((name, time.perf_counter()))

    def mean_milliseconds(self, reader: str = "") -> dict[str, float]:
        """Return the mean time of each stage over the steps since this reader's last call, in the order of the step.

        Args:
            reader: Who asks; each reader is told of every step once.
        """
        self._read_marks()
        return self._per_step.means(reader, self._num_steps, self._totals)

    def _read_marks(self) -> None:
        if self._cuda and self._marks:
            self._marks[-1][1].synchronize()
        self._num_steps += sum(name == "" for name, _ in self._marks)
        for (_, begin), (name, end) in zip(self._marks, self._marks[1:], strict=False):
            if name:
                self._totals[name] += begin.elapsed_time(end) if self._cuda else 1000.0 * (end - begin)
        self._marks.clear()
