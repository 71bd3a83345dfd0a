"""Ranks that end together: when one has come to its end, the others know within seconds, and one of them says why.

A rank that ends with a cause puts it on the board; the first one counts. A rank that is killed cannot: a thread of each
rank looks whether the others' processes live, those of other machines by their beats. A rank may then be waiting, in
a collective, for one that never comes. On the CPU that fails by itself, since connections are closed; a GPU waits for
ever. So a rank that does not leave by itself within a grace is ended by its thread.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Thread

from distributed.board import BoardGone
from distributed.mesh import Ranks

LOOKS_EVERY = 0.5  # seconds
SILENT_FOR = 60.0  # seconds, in which another machine's rank must have given a beat
SUSPECTED_FOR = 10.0  # the same, once a collective has failed
GRACE = 10.0  # seconds for a rank to leave by itself
ENDED = "ended"
GONE = "gone"  # says which rank's process is no more; who waits for all ranks on the board looks at it


@dataclass(frozen=True)
class End:
    """Hold why the ranks come to an end."""

    rank: int  # the one that is the cause
    told_by: int  # the one that says so to people
    sentence: str
    is_gone: bool  # whether its process has ended


@dataclass(frozen=True)
class Process:
    """Name the process of a rank."""

    host: str
    pid: int
    started: str  # in ticks since its machine was, so that a later process of the same number is another one
    machine: str  # where process numbers mean the same

    @staticmethod
    def own() -> Process:
        """Return this process."""
        pid = os.getpid()
        machine = f"{_read('/proc/sys/kernel/random/boot_id')} {_namespace()}"
        return Process(socket.gethostname(), pid, _stat(pid)[1], machine)

    def has_ended(self) -> bool:
        """Return whether it has, asked on its machine."""
        state, started = _stat(self.pid)
        return state in ("", "Z", "X") or started != self.started


class Watch:
    """Watch the other ranks from a thread; used as a context manager, it tells them at the end that all is well."""

    def __init__(self, ranks: Ranks, last_words: Callable[[str], None]) -> None:
        """Begin; all ranks do.

        Args:
            ranks: That are watched.
            last_words: Tells people a sentence, in a thread, before this process is ended.
        """
        self._ranks = ranks
        self._last_words = last_words
        self._own = Process.own()
        self._run = ranks.broadcast(uuid.uuid4().hex)  # notices of another run on this board are not ours
        self._processes = ranks.gather(self._own)
        self._beats = dict.fromkeys(range(ranks.size), (0, time.monotonic()))  # of each rank, and when it changed
        self._finished: set[int] = set()
        self._end: End | None = None
        self._is_leaving = self._is_suspicious = False
        self._closed = Event()
        self._thread = Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()

    @property
    def rank(self) -> int:
        """Return which rank watches."""
        return self._ranks.rank

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._thread.join()
        with contextlib.suppress(BoardGone):
            self._ranks.board.post(f"{self._run} finished {self._ranks.rank}", True)

    def end_by(self, sentence: str) -> End:
        """Say that this rank ends the run and why; returns the end that counts, which another may have come to before.

        This process is leaving from now on, and takes the time it needs.
        """
        self._is_leaving = True
        rank = self._ranks.rank
        return self._post(End(rank, rank, sentence, is_gone=False))

    def end_by_others(self, error: Exception) -> End:
        """Return why others do not answer any more, when a collective has failed with an error.

        This process is leaving from now on.
        """
        self._is_leaving = self._is_suspicious = True
        deadline = time.monotonic() + SUSPECTED_FOR + GRACE
        while self._end is None and time.monotonic() < deadline and self._thread.is_alive():
            time.sleep(LOOKS_EVERY / 5)
        return self._end or self.end_by(f"the ranks have lost each other ({error})")

    def all_stand_at(self, steps_done: int) -> bool:
        """Return whether all ranks have come to the same number of steps; each asks once, when it leaves.

        Ranks that are gone say nothing, and none is waited for once one is.
        """
        board, found = self._ranks.board, dict[int, int]()
        with contextlib.suppress(BoardGone):
            board.post(f"{self._run} stands {self._ranks.rank}", steps_done)
            while len(found) < self._ranks.size and not self._gone():
                for rank in set(range(self._ranks.size)) - found.keys():
                    steps = board.read(f"{self._run} stands {rank}")
                    if steps is not None:
                        found[rank] = steps
                time.sleep(LOOKS_EVERY / 10)
        return len(found) == self._ranks.size and set(found.values()) == {steps_done}

    # ----------------------------------------------------------------------------------------------------- the thread

    def _look(self) -> None:
        beat, deadline = 0, 0.0
        while not self._closed.wait(LOOKS_EVERY):
            beat += 1
            try:
                self._ranks.board.post(f"{self._run} beat {self._ranks.rank}", beat)
                end = self._end or self._read_end()
                gone = self._gone()
                if gone:
                    self._ranks.board.post(GONE, self._sentence_on(gone[0]))
                    end = end or self._post(End(gone[0], self._ranks.rank, self._sentence_on(gone[0]), is_gone=True))
            except BoardGone:
                end = self._end or End(0, self._ranks.rank, "torchrun or the process of rank 0 has ended", is_gone=True)
            if end is not None and self._end is None:
                self._end, deadline = end, time.monotonic() + GRACE
            if end is not None and not self._is_leaving and time.monotonic() > deadline and not self._closed.is_set():
                if end.told_by == self._ranks.rank:
                    self._last_words(end.sentence)
                os._exit(1)

    def _read_end(self) -> End | None:
        found = self._ranks.board.read(f"{self._run} {ENDED}")
        return None if found is None else End(**found)

    def _sentence_on(self, rank: int) -> str:
        process = self._processes[rank]
        return f"rank {rank} (process {process.pid} on {process.host}) has ended without a word, as if it was killed"

    def _gone(self) -> list[int]:
        """Return the ranks whose processes have ended, but for those that had done all they should."""
        return [rank for rank in range(self._ranks.size) if rank not in self._finished and self._is_gone(rank)]

    def _is_gone(self, rank: int) -> bool:
        process = self._processes[rank]
        if process.machine == self._own.machine:
            is_gone = process.has_ended()
        else:
            beat, now = self._ranks.board.read(f"{self._run} beat {rank}") or 0, time.monotonic()
            if beat != self._beats[rank][0]:
                self._beats[rank] = beat, now
            is_gone = now - self._beats[rank][1] > (SUSPECTED_FOR if self._is_suspicious else SILENT_FOR)
        if is_gone and self._ranks.board.read(f"{self._run} finished {rank}"):
            self._finished.add(rank)
            return False
        return is_gone

    def _post(self, end: End) -> End:
        try:
            return End(**self._ranks.board.post_first(f"{self._run} {ENDED}", asdict(end)))
        except BoardGone:
            return end


def _stat(pid: int) -> tuple[str, str]:
    """Return the state of a process and when it was started; empty where there is none."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()  # behind its name, which may hold anything
    return (fields[0], fields[19]) if len(fields) > 19 else ("", "")


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""
