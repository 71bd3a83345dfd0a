"""How long host, link and worker thread are busy behind the rendering, without waiting for any of them."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from offload.pipelines.lanes import Lane


class OffloadTimes:
    """Adds up named stretches of work of several threads and streams, which run beside each other.

    Their times are not parts of one whole: a stretch of the worker may lie behind the rendering and cost nothing.
    """

    def __init__(self) -> None:
        self._totals: dict[str, float] = defaultdict(float)  # milliseconds
        self._copies: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()  # begin and end, not read yet
        self._lock = threading.Lock()

    @contextmanager
    def on_host(self, name: str) -> Iterator[None]:
        """Time what the calling thread does within."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            milliseconds = 1000 * (time.perf_counter() - begin)
            with self._lock:
                self._totals[name] += milliseconds

    @contextmanager
    def on_stream(self, name: str) -> Iterator[None]:
        """Time what the current CUDA stream is given within."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        yield
        end.record()
        with self._lock:
            self._copies.append((name, begin, end))
            self._read_finished()  # so that no more wait here than are on their way

    def on_lane(self, name: str, lane: Lane) -> AbstractContextManager[None]:
        """Time what a lane, which is current, is given within; without a GPU nothing."""
        return nullcontext() if lane.stream is None else self.on_stream(name)

    def milliseconds(self) -> dict[str, float]:
        """Return the totals so far by name; what streams have not finished comes next time."""
        with self._lock:
            self._read_finished()
            return dict(sorted(self._totals.items()))

    def _read_finished(self) -> None:
        for _ in range(len(self._copies)):
            name, begin, end = self._copies.popleft()
            if end.query():
                self._totals[name] += begin.elapsed_time(end)
            else:
                self._copies.append((name, begin, end))
