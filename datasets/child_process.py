"""Runs what pycolmap computes in a process of its own, which may be ended at any time.

pycolmap does not survive an exception of Python while it works, as Ctrl-C makes one, and a fault in it ends the whole
process. The database that a step writes survives both.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from errors import reason

_PAUSE = 0.5  # seconds between two looks at what has been done
_LOOKS_SHARE = 0.05  # of the time goes at most into looking
_PR_SET_PDEATHSIG = 1  # of prctl: the signal that Linux sends when the parent ends


def nothing() -> None:
    """Do nothing."""


def run_in_child(work: Callable[..., None], *arguments: object, look: Callable[[], None] = nothing) -> None:
    """Call a function of a module in a new process, and wait for it.

    Args:
        work: The function.
        arguments: Its arguments, which can be pickled, or belong to `multiprocessing`.
        look: Is called again and again meanwhile, and at the end.

    Raises:
        RuntimeError: It raised an exception, or the process ended before it was through.
        BaseException: What `look` or a signal raises, once the process has ended.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(sender, os.getpid(), work, arguments), daemon=True)
    of_ctrl_c = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: a terminal sends it to the child as well
    try:
        child.start()
    finally:
        signal.signal(signal.SIGINT, of_ctrl_c)
    sender.close()
    try:
        pause = _PAUSE
        while True:
            child.join(pause)
            if not child.is_alive():
                break
            began = time.perf_counter()
            look()
            pause = max(_PAUSE, (time.perf_counter() - began) / _LOOKS_SHARE)
        look()
    finally:
        if child.is_alive():
            child.kill()
        child.join()
    try:
        failure = receiver.recv()
    except EOFError:
        number = -(child.exitcode or 0)
        how = f"signal {signal.Signals(number).name}" if number > 0 else f"exit code {child.exitcode}"
        raise RuntimeError(f"its process ended by {how}") from None
    finally:
        receiver.close()
    if failure:
        raise RuntimeError(failure)


def _work(sender: Connection, parent: int, work: Callable[..., None], arguments: tuple[object, ...]) -> None:
    """Call the function in the child, and send what went wrong, or an empty text."""
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # pycolmap would print its stack; the parent gets them too, and kills
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended before
            return
    try:
        work(*arguments)
    except Exception as error:  # of pycolmap, of whatever kind: the parent says it in one sentence
        sender.send(reason(error))
    else:
        sender.send("")
