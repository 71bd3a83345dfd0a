"""Streams of work on a device that wait for each other; on the CPU, where everything happens in order, nothing."""

from __future__ import annotations

import torch
from torch import Tensor


class Lane:
    """A CUDA stream, current in a `with` block; or, without a GPU, nothing."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self.stream = stream

    @staticmethod
    def new(device: torch.device) -> Lane:
        """Make a stream whose kernels are placed before those of the default stream."""
        return Lane(torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None)

    @staticmethod
    def current(device: torch.device) -> Lane:
        """Return the stream that is current on this thread."""
        return Lane(torch.cuda.current_stream(device) if device.type == "cuda" else None)

    def __enter__(self) -> Lane:
        # Not `torch.cuda.stream`, which looks twice in Python which device is current.
        if self.stream is not None:
            self._outer = torch.cuda.current_stream(self.stream.device)
            torch.cuda.set_stream(self.stream)
        return self

    def __exit__(self, *error: object) -> None:
        if self.stream is not None:
            torch.cuda.set_stream(self._outer)

    def wait(self, *events: torch.cuda.Event | None) -> None:
        """Let the work given from now on wait for events; None has happened."""
        if self.stream is not None:
            for event in events:
                if event is not None:
                    self.stream.wait_event(event)

    def record(self) -> torch.cuda.Event | None:
        """Return the event that everything given so far is done."""
        return None if self.stream is None else self.stream.record_event()

    def finish(self) -> None:
        """Wait, on the calling thread, until everything given so far is done."""
        if self.stream is not None:
            self.stream.synchronize()

    def uses(self, *tensors: Tensor) -> None:
        """Keep the memory of tensors that another lane has made until the work given here is done.

        It is kept, once freed, until all is done that was given here before that, so to say it once of each memory
        is enough. Memory of the host belongs to no lane, and is passed over.
        """
        if self.stream is not None:
            for tensor in tensors:
                if tensor.is_cuda:
                    tensor.record_stream(self.stream)
