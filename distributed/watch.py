"""Ranks that end together: when one has come to its end, the others know within seconds, and one of them says why.

A rank watches, and is watched, from its arrival on: before all have met, while they read the dataset, and in training.
One that ends with a cause puts it on the board; the first one counts. A rank that is killed cannot: a thread of each
rank looks whether the others' processes live, those of other machines by their beats. A rank may then be waiting, in
a collective, for one that never comes. On the CPU that fails by itself, since connections are closed; a GPU waits for
ever. So a rank that does not leave by itself within a grace is ended by its thread.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Thread

from distributed.board import BoardGone
from distributed.mesh import Arrival, RanksParted, Terminated

LOOKS_EVERY = 0.5  # seconds
SILENT_FOR = 60.0  # seconds, in which another machine's rank must have given a beat
SUSPECTED_FOR = 10.0  # the same, once a collective has failed or torchrun ends this rank; also to arrive in
ARRIVE_WITHIN = 1800.0  # seconds between the first and the last, as torch.distributed has it
GRACE = 10.0  # seconds for a rank to leave by itself
CAUSED_WITHIN = 3.0  # seconds in which a rank's end is known that has made torchrun send SIGTERM to the others
ENDED = "ended"
_runs = itertools.count()
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

    def __init__(self, arrival: Arrival, last_words: Callable[[str], None]) -> None:
        """Begin; each rank does when it has arrived, and may find others that have not.

        Args:
            arrival: Of this rank.
            last_words: Tells people a sentence, in a thread, before this process is ended.
        """
        self.rank, self._size, self._board = arrival.rank, arrival.size, arrival.board
        self._last_words = last_words
        self._own = Process.own()
        # Notices of another run on this board are not ours: each process comes to its runs in the same order.
        self._run = f"run {next(_runs)}"
        self._processes = {self.rank: self._own}  # of ranks that have arrived
        self._beats = dict.fromkeys(range(self._size), (0, time.monotonic()))  # of each rank, and when it changed
        self._finished: set[int] = set()
        self._end: End | None = None
        self._is_leaving = False
        self._suspicious_since = math.inf
        self._closed = Event()
        self._board.post(f"{self._run} arrived {self.rank}", asdict(self._own))
        self._thread = Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()

    def wait_for_all(self) -> None:
        """Wait until all ranks have arrived, where a signal is heard: `torch.distributed`, which waits too, is deaf.

        Raises:
            RanksParted: One has ended, or does not come.
        """
        deadline = time.monotonic() + ARRIVE_WITHIN
        while len(self._processes) < self._size:
            if self._end is not None or time.monotonic() > deadline:
                raise RanksParted("not all ranks have arrived")
            time.sleep(LOOKS_EVERY / 10)
            with contextlib.suppress(BoardGone):  # of which the thread tells
                self._look_for_arrivals()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._thread.join()
        with contextlib.suppress(BoardGone):
            self._board.post(f"{self._run} finished {self.rank}", True)

    def end_by(self, sentence: str) -> End:
        """Say that this rank ends the run and why; returns the end that counts, which another may have come to before.

        This process is leaving from now on, and takes the time it needs.
        """
        self._is_leaving = True
        return self._post(End(self.rank, self.rank, sentence, is_gone=False))

    def end_by_others(self, error: Exception) -> End:
        """Return why others do not answer any more, when a collective has failed with an error, or SIGTERM has come.

        This process is leaving from now on.
        """
        self._is_leaving, self._suspicious_since = True, time.monotonic()
        is_terminated = isinstance(error, Terminated)  # which may be all there is
        patience = CAUSED_WITHIN if is_terminated else GRACE
        while self._end is None and self._thread.is_alive():
            if time.monotonic() > self._suspicious_since + patience + (0 if self._is_certain() else SUSPECTED_FOR):
                break
            time.sleep(LOOKS_EVERY / 5)
        return self._end or self.end_by(str(error) if is_terminated else f"the ranks have parted ({error})")

    def all_stand_at(self, standing: list[int]) -> bool:
        """Return whether all ranks have come to the same place, named by numbers; each asks once, when it leaves.

        Ranks that are gone say nothing, and none is waited for once one is.
        """
        board, found = self._board, dict[int, list[int]]()
        with contextlib.suppress(BoardGone):
            board.post(f"{self._run} stands {self.rank}", standing)
            while len(found) < self._size and not self._gone():
                for rank in set(range(self._size)) - found.keys():
                    its_own = board.read(f"{self._run} stands {rank}")
                    if its_own is not None:
                        found[rank] = its_own
                time.sleep(LOOKS_EVERY / 10)
        return len(found) == self._size and all(its_own == standing for its_own in found.values())

    # ----------------------------------------------------------------------------------------------------- the thread

    def _look(self) -> None:
        beat, deadline = 0, 0.0
        while not self._closed.wait(LOOKS_EVERY):
            beat += 1
            try:
                self._board.post(f"{self._run} beat {self.rank}", beat)
                self._look_for_arrivals()
                end = self._end or self._read_end()
                gone = self._gone()
                if gone:
                    self._board.post(GONE, self._sentence_on(gone[0]))
                    end = end or self._post(End(gone[0], self.rank, self._sentence_on(gone[0]), is_gone=True))
            except BoardGone:
                end = self._end or End(0, self.rank, "torchrun or the process of rank 0 has ended", is_gone=True)
            if end is not None and self._end is None:
                self._end, deadline = end, time.monotonic() + GRACE
            if end is not None and not self._is_leaving and time.monotonic() > deadline and not self._closed.is_set():
                if end.told_by == self.rank:
                    self._last_words(end.sentence)
                os._exit(1)

    def _read_end(self) -> End | None:
        found = self._board.read(f"{self._run} {ENDED}")
        return None if found is None else End(**found)

    def _look_for_arrivals(self) -> None:
        for rank in set(range(self._size)) - self._processes.keys():
            process = self._board.read(f"{self._run} arrived {rank}")
            if process is not None:
                self._processes[rank] = Process(**process)

    def _sentence_on(self, rank: int) -> str:
        process = self._processes.get(rank)
        if process is None:
            return f"rank {rank} has not come to where the others met, as if it was killed"
        return f"rank {rank} (process {process.pid} on {process.host}) has ended without a word, as if it was killed"

    def _gone(self) -> list[int]:
        """Return the ranks whose processes have ended, but for those that had done all they should.

        Those of which that is known come before those that have not arrived.
        """
        missing = set(range(self._size)) - self._processes.keys()
        watched = sorted(self._processes.keys() - self._finished)
        gone = [rank for rank in watched if self._is_gone(rank, self._processes[rank])]
        return gone + (sorted(missing) if self._suspects(SUSPECTED_FOR) else [])

    def _is_certain(self) -> bool:
        """Return whether any rank that has ended is known within LOOKS_EVERY: all have arrived, on this machine."""
        processes = list(self._processes.values())  # the thread adds to them
        return len(processes) == self._size and all(process.machine == self._own.machine for process in processes)

    def _suspects(self, seconds: float = 0.0) -> bool:
        """Return whether this rank has cause to believe that another has ended, and has had it for so long."""
        return time.monotonic() > self._suspicious_since + seconds

    def _is_gone(self, rank: int, process: Process) -> bool:
        if process.machine == self._own.machine:
            is_gone = process.has_ended()
        else:
            beat, now = self._board.read(f"{self._run} beat {rank}") or 0, time.monotonic()
            if beat != self._beats[rank][0]:
                self._beats[rank] = beat, now
            is_gone = now - self._beats[rank][1] > (SUSPECTED_FOR if self._suspects() else SILENT_FOR)
        if is_gone and self._board.read(f"{self._run} finished {rank}"):
            self._finished.add(rank)
            return False
        return is_gone

    def _post(self, end: End) -> End:
        try:
            return End(**self._board.post_first(f"{self._run} {ENDED}", asdict(end)))
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
