"""All errors that people see: each message is one sentence that names what is at fault and the remedy.

InputError            the input cannot be used; exit code 2, no traceback
  NotEnoughMemory     it needs more memory than there is
  DamagedError        a checkpoint is not what was written
  Unreadable          a file or folder may not be read, or entered
TrainingStopped       training cannot go on; exit code 1
  NotSaved            and what was trained last could not be saved
  EndedElsewhere      another of the processes that train together has said why

offload/errors.py adds those that name a parameter, which the command line calls by its option.
"""

import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType


class InputError(Exception):
    """Say in one sentence which file, option or machine cannot be used, and what to do.

    Scripts print the sentence without a traceback and exit with code 2. Where a trainer raises it before its first
    step, nothing has been trained; an error of the input that comes later ends training as `TrainingStopped`.
    """

    def __str__(self) -> str:
        """Return the sentence as one line, whatever the names and words are that it quotes out of files."""
        return printable(super().__str__())


class NotEnoughMemory(InputError):
    """Say in one sentence what does not fit into which memory, and what to do."""


class DamagedError(InputError):
    """Say that a checkpoint is incomplete or is not what was written."""


class Unreadable(InputError):
    """Say that a file or folder may not be read: of whatever reads one its PermissionError becomes this."""


class TrainingStopped(Exception):
    """Say in one sentence why training cannot go on, and where the Gaussians are saved; scripts exit with code 1."""

    def __init__(self, sentence: str = "", remedy: Mapping[str, str] = MappingProxyType({})) -> None:
        """
        Args:
            sentence: For the user.
            remedy: Values of options with which to go on, where those that were given have ended training.
        """
        super().__init__(sentence)
        self.remedy = remedy


class NotSaved(TrainingStopped):
    """Say that training has come to an end that could not be saved, and which checkpoint there is before it."""


class EndedElsewhere(TrainingStopped):
    """Say that another rank tells people why training has ended; this process says nothing and exits with code 1."""


@contextmanager
def refusing() -> Iterator[None]:
    """End the process with exit code 2 and one sentence where something in the input cannot be used."""
    try:
        with telling_unreadable():
            yield
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def telling_unreadable() -> Iterator[None]:
    """Say in one sentence which file or folder may not be read.

    Whoever calls the errors of a reader something else, as a damaged file, lets a PermissionError pass to here.

    Raises:
        Unreadable: In place of a PermissionError of reading; one of writing stays what it is.
    """
    try:
        yield
    except PermissionError as error:
        path = None if error.filename is None else unreadable(os.fsdecode(error.filename))
        if path is None:
            raise
        raise Unreadable(f"{path} may not be read: change its permissions.") from error


@contextmanager
def read_as(
    path: object, what: str, remedy: str = "", faults: tuple[type[Exception], ...] = (Exception,)
) -> Iterator[None]:
    """Say in one sentence that a file is not what it should be.

    Args:
        path: Of the file, as it is called in the sentence.
        what: What it should be.
        remedy: What to do.
        faults: Errors that its reader raises; by default all, where libraries have errors of their own.

    Raises:
        InputError: In place of these.
        PermissionError: The file may not be read: that is `telling_unreadable`'s.
    """
    try:
        yield
    except PermissionError:
        raise
    except faults as error:
        so = f": {remedy}" if remedy else ""
        raise InputError(f"{path} cannot be read as {what} ({reason(error)}){so}.") from error


def unreadable(path: Path | str) -> Path | None:
    """Return what must be allowed for a path to be read: a folder above it, or itself; None where nothing must."""
    path = Path(path)
    for folder in reversed(path.parents):
        try:
            os.stat(os.path.join(folder, "."))  # which whoever may not enter it may not
        except PermissionError:
            return folder
        except OSError:
            return None
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        if path.is_dir():
            os.stat(os.path.join(path, "."))
    except PermissionError:
        return path
    except OSError:
        pass
    return None


def heard_signals() -> list[signal.Signals]:
    """Return what asks a program to end: Ctrl-C, SIGTERM, and a closed terminal unless nohup has it ignored."""
    heard = [signal.SIGINT, signal.SIGTERM]
    return heard if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [*heard, signal.SIGHUP]


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt at Ctrl-C, SIGTERM and a closed terminal, so that what is half done is cleared away.

    A second of them ends the process at once, without a traceback, also while Python ends.
    """
    before = {number: signal.getsignal(number) for number in heard_signals()}
    has_come = False

    def stop(number: int, stack: object) -> None:
        nonlocal has_come
        has_come = True
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        raise KeyboardInterrupt

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        if not has_come:
            for number, handler in before.items():
                signal.signal(number, handler)


def reason(error: BaseException) -> str:
    """Return what a library says of a failure as a part of such a sentence: one printable line, 200 characters."""
    words = re.sub(r"^\[Errno \d+\] ", "", " ".join(str(error).split()))
    return printable(words[:200]).rstrip(" .:") or type(error).__name__


def printable(text: str) -> str:
    """Return a text with question marks in place of line ends and what else cannot be printed."""
    return "".join(c if c.isprintable() else "?" for c in text)


def counted(count: int, noun: str) -> str:
    """Return a number and what it counts as a part of such a sentence: "1 photo", "2,000 photos"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def format_bytes(num_bytes: float) -> str:
    """Return bytes in the largest fitting binary unit, as a part of such a sentence: "3.20 GiB"."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"
