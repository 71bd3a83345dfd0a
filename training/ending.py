"""How a run ended, said for programs that started it: ended.json in its result folder."""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from errors import NotEnoughMemory, reason
from training.commands import given_command, started_in
from training.files import write_file
from training.memory_estimate import Memory

ENDED = "ended.json"
FINISHED, INTERRUPTED, FAILED, OUT_OF_MEMORY = "finished", "interrupted", "failed", "out of memory"
NOT_BEGUN = "Stopped before anything was done."  # by Ctrl-C


@dataclass(frozen=True)
class Ending:
    """Hold how a run ended: one of the four words above, and the sentence that the user was told."""

    status: str
    message: str = ""


def ending_of(error: BaseException, message: str) -> Ending:
    """Return the ending that an error makes, with the sentence that the user is told.

    Memory ran out where the error, or one that it was raised from, says so.
    """
    ran_out = memory_that_ran_out(error) or any(isinstance(each, NotEnoughMemory) for each in _causes(error))
    return Ending(OUT_OF_MEMORY if ran_out else FAILED, message)


def memory_that_ran_out(error: BaseException) -> Memory | None:
    """Return which memory ran out, where an error, or one that it was raised from, says so; None where none does."""
    for each in _causes(error):
        if isinstance(each, torch.OutOfMemoryError):
            return "device"
        is_of_torch = isinstance(each, RuntimeError) and "can't allocate memory" in str(each)
        if isinstance(each, MemoryError) or is_of_torch or (isinstance(each, OSError) and each.errno == errno.ENOMEM):
            return "host"
    return None


def without_memory(error: BaseException, what_helps: Callable[[Memory], str] = lambda memory: "free some of it") -> str:
    """Return the sentence for an error before anything was trained where memory ran out; empty for any other.

    Args:
        error: It.
        what_helps: Returns what to change where a memory ran out; without it no trainer is known.
    """
    ran_out = memory_that_ran_out(error)
    if ran_out is None:
        return ""
    return f"{ran_out.capitalize()} memory ran out ({reason(error)}): {what_helps(ran_out)}."


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Give an error, and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def write_ending(folder: Path, ending: Ending) -> None:
    """Write ended.json into a folder that exists; a disk that does not take it changes nothing else.

    For whoever finds the file elsewhere it says of which run it is, too: the result folder as a whole path (`folder`),
    the command that started the run, and where that was given, since paths in command and message count from there.
    """
    with contextlib.suppress(OSError):
        if folder.is_dir():
            of_run = {"folder": str(folder.resolve()), "command": given_command(), "started_in": started_in()}
            write_file(folder / ENDED, json.dumps({**asdict(ending), **of_run}, indent=2) + "\n")


def forget_ending(folder: Path) -> None:
    """Remove ended.json of the run before: one that is killed leaves none."""
    with contextlib.suppress(OSError):
        (folder / ENDED).unlink(missing_ok=True)


def read_ending(folder: Path) -> Ending | None:
    """Return what ended.json says; None where it is missing or damaged, as after a kill."""
    try:
        said = json.loads((folder / ENDED).read_text())
        return Ending(said["status"], said["message"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
