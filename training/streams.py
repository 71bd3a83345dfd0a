"""Standard output and errors that never end a run: what cannot be said is dropped."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

GONE = (errno.EPIPE, errno.EIO, errno.EBADF)  # a reader that has ended, a terminal that was closed


class Unbreakable:
    """Pass text on to a stream; where that does not take it, go on as if it did."""

    def __init__(self, stream: TextIO) -> None:
        """
        Args:
            stream: A pipe, a terminal or a log, which may be gone or full.
        """
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text; characters that the stream has no code for are escaped."""
        try:
            self._stream.write(text)
        except UnicodeError:
            encoding = self._stream.encoding
            self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError, RuntimeError) as error:  # closed; a signal's handler that came into another write
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Have the text written."""
        try:
            self._stream.flush()
        except (OSError, ValueError, RuntimeError) as error:
            self._lose(error)

    def end(self) -> None:
        """Flush; where that fails, let Python's own flush at its exit go nowhere, which would be an exit code."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._point_nowhere()

    def _lose(self, error: Exception) -> None:
        if isinstance(error, OSError) and error.errno in GONE:
            self._point_nowhere()

    def _point_nowhere(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # a stream without a file
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Silent:
    """Drop what is said; its stream is there for last words."""

    def __init__(self, stream: TextIO) -> None:
        """
        Args:
            stream: That is kept still.
        """
        self.stream = stream

    def write(self, text: str) -> int:
        """Drop text."""
        return len(text)

    def flush(self) -> None:
        """Do nothing."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def loud(stream: TextIO) -> TextIO:
    """Return a stream that people see, also where this one is silent."""
    return stream.stream if isinstance(stream, Silent) else stream


@contextlib.contextmanager
def silent_output(*, silent: bool) -> Iterator[None]:
    """Drop what is printed meanwhile, by whomever, but for last words (`loud`); where it is not to be, do nothing."""
    before: Any = sys.stdout, sys.stderr
    if silent:
        sys.stdout, sys.stderr = cast(TextIO, Silent(before[0])), cast(TextIO, Silent(before[1]))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


@contextlib.contextmanager
def unbreakable_output() -> Iterator[None]:
    """Let nothing that is printed meanwhile, by whomever, raise an error: a lost line is not worth a run."""
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as opened:
        for name, stream in zip(("stdout", "stderr"), before, strict=True):
            if stream is None:  # closed by the shell, as with >&-
                stream = opened.enter_context(open(os.devnull, "w"))
            setattr(sys, name, Unbreakable(stream))
            opened.callback(getattr(sys, name).end)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
