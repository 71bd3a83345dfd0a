"""What a worker thread does behind the rendering, before the main thread needs it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

from offload.pipelines.times import OffloadTimes

Result = TypeVar("Result")


class WorkAhead(Generic[Result]):
    """One thread, which does one thing after another, and the work that it has been given last."""

    def __init__(self, times: OffloadTimes, device: torch.device) -> None:
        """
        Args:
            times: Receives how long the main thread waits, as "wait_for_worker".
            device: Where the thread gives work to streams, a GPU or the CPU.
        """
        # A new thread has the first GPU: leaving a stream of another one there makes a context on it, which takes
        # hundreds of megabytes of it for each process.
        on_gpu = device.type == "cuda" and device.index is not None
        initializer = functools.partial(torch.cuda.set_device, device) if on_gpu else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="offload", initializer=initializer)
        self._times = times
        self._work: Future[Result] | None = None
        self._before: Future[None] | None = None

    def begin_before(self, work: Callable[[], None]) -> None:
        """Give the idle thread something to do already before `begin` does."""
        self._before = self._thread.submit(work)

    def finish_before(self) -> None:
        """Wait until that is done, on whichever thread. Raises its error once."""
        before, self._before = self._before, None
        if before is not None:
            with self._times.on_host("wait_for_worker"):
                error = before.exception()
            if error is not None:
                raise error

    def begin(self, work: Callable[..., Result], *arguments: object) -> None:
        """Give the thread something to do."""
        self._work = self._thread.submit(work, *arguments)

    @property
    def is_under_way(self) -> bool:
        """Tell whether `result` would wait."""
        return self._work is not None and not self._work.done()

    def result(self) -> Result | None:
        """Return what has been done, once it has; None where nothing was begun. Raises the thread's error once."""
        if self._work is None:
            return None
        try:
            with self._times.on_host("wait_for_worker"):
                return self._work.result()
        except BaseException:
            self._work = None
            raise

    def forget(self) -> None:
        """Go on as if nothing had been begun; what is under way ends by itself."""
        self._work = None
