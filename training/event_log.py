"""The log of a run in tb/, for TensorBoard: scalars and pictures, each in its file as soon as it is logged.

`torch.utils.tensorboard.SummaryWriter` hands entries to a thread over a queue. What is in the queue is lost where a run
is killed, and closing waits for the thread, for ever where Ctrl-C has come between the two. Entries are few, and small.

A file is a sequence of records: length (uint64) and its checksum, an event (protocol buffer) and its checksum.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from training.files import open_new

FILES = "events.out.tfevents.*"  # TensorBoard reads them in the order of their names
HEADER = struct.Struct("<QI")
CHECKSUM = struct.Struct("<I")


@dataclass(frozen=True)
class Entry:
    """Hold a scalar of the log, and when it was written."""

    step: int
    wall_time: float  # seconds since 1970
    value: float


class EventLog:
    """Write a file of tb/."""

    def __init__(self, folder: Path, first_step: int | None = None) -> None:
        """
        Args:
            folder: tb/ of a run; it is made.
            first_step: What earlier files hold of this step and later ones is not shown any more; None: all of it is.

        Raises:
            OSError: The file cannot be written.
        """
        name = FILES.replace("*", f"{time.time_ns() // 1000}.{socket.gethostname()}.{os.getpid()}")
        self._file: int | None = open_new(folder / name)
        self._end = 0  # bytes that are whole records
        self._write(Event(file_version="brain.Event:2"))
        if first_step is not None:
            self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Log a number.

        Args:
            tag: It is called in TensorBoard; what is before a slash is its group.
            value: The number.
            step: How many steps are done.

        Raises:
            OSError: It cannot be written; what was logged before is as it was.
        """
        self._write(Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=float(value))])))

    def add_picture(self, tag: str, pixels: np.ndarray, step: int) -> None:
        """Log a picture [H, W, 3] uint8, as JPEG: checksums of larger files take seconds; otherwise as `add_scalar`."""
        height, width, channels = pixels.shape
        content = imageio.imwrite("<bytes>", pixels, extension=".jpg", quality=95)
        picture = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=content)
        self._write(Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, image=picture)])))

    def close(self) -> None:
        """Close the file; what is logged afterwards goes nowhere."""
        if self._file is not None:
            file, self._file = self._file, None
            os.close(file)

    def _write(self, event: Event) -> None:
        if self._file is None:
            return
        event.wall_time = time.time()
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        checksums = [CHECKSUM.pack(masked_crc32c(part)) for part in (length, content)]
        left = memoryview(b"".join([length, checksums[0], content, checksums[1]]))
        end = self._end
        try:
            while left:
                written = os.pwrite(self._file, left, end)
                left, end = left[written:], end + written
            self._end = end
        except BaseException:  # a full disk, or Ctrl-C: behind half a record nothing can be read
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise


def read_scalars(folder: Path) -> dict[str, list[Entry]]:
    """Return every scalar in tb/ by its tag, in the order in which they were logged; what is damaged is left out.

    Of a run that was resumed, what an earlier file holds of steps that were done once more is left out, too.

    Args:
        folder: tb/ of a run, also of one that goes on; it may be missing.
    """
    found: dict[str, list[Entry]] = {}
    for path in sorted(folder.glob(FILES)):
        for event in _events(path):
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                found = {tag: [entry for entry in each if entry.step < event.step] for tag, each in found.items()}
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag, []).append(Entry(event.step, event.wall_time, value.simple_value))
    return {tag: entries for tag, entries in found.items() if entries}


def _events(path: Path) -> Iterator[Event]:
    """Yield the events of a file, as far as it can be read."""
    with contextlib.suppress(OSError, DecodeError), path.open("rb") as file:
        while len(header := file.read(HEADER.size)) == HEADER.size:
            length, checksum = HEADER.unpack(header)
            if masked_crc32c(header[: -CHECKSUM.size]) != checksum:
                return
            content = file.read(length)
            if len(file.read(CHECKSUM.size)) < CHECKSUM.size:  # cut off, or not written to its end so far
                return
            yield Event.FromString(content)  # whose checksum takes a second for a few pictures
