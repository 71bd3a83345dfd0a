"""Exports in processes that kill themselves at a moment, for tests of what they leave behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path

import torch

import export

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink")


def kill_export(options: export.Options, moment: int) -> bool:
    """Export in another process, which is killed just before its change number `moment`, from 0, of files.

    Returns whether it was killed; False says that it ended before.
    """
    context = multiprocessing.get_context("forkserver")  # imports once, and has no threads that a fork would lose
    context.set_forkserver_preload(["export", "training.run"])
    process = context.Process(target=_export, args=(options, moment), daemon=True)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), "its output says what happened"
    return process.exitcode != 0


def _export(options: export.Options, moment: int) -> None:
    torch.set_num_threads(1)
    seen = 0

    def count(event: str, arguments: tuple) -> None:
        nonlocal seen
        if _changes(event, arguments, options.to.parent.parent):
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(count)
    export.export(options)


def _changes(event: str, arguments: tuple, folder: Path) -> bool:
    """Return whether this is the change of a file: of a name, or the opening of one that is written."""
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    names = [str(name) for name in arguments if isinstance(name, (str, os.PathLike))]
    # What removes a tree names files within an open folder by their last part alone.
    is_here = any(name.startswith(str(folder)) or "/" not in name for name in names[:1])
    return (bool(writes) or event in CHANGES) and is_here
