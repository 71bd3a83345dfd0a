"""The checkpoints of one result folder: which one is the newest, when the next is due, and which are dropped."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

from distributed.mesh import Ranks
from errors import DamagedError, InputError
from offload.store.contract import RowStore
from option_words import whole_number
from training.checkpoint_parts import JointCheckpoint, remove_checkpoint, remove_unfinished
from training.checkpoint_writing import PartialCheckpoint
from training.checkpoints import Checkpoint, load_checkpoint, peek_checkpoint

SECONDS = {"s": 1, "m": 60, "h": 3600}


class SaveSchedule:
    """Say when a periodic checkpoint is due: after a number of steps, or of seconds on a clock that never jumps."""

    def __init__(self, every: str, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            every: Steps ("500") or time ("90s", "15m", "2h"); "0" for never.
            clock: Seconds from any beginning.

        Raises:
            InputError: It is neither.
        """
        number = every.strip()
        unit = number[-1:] if number[-1:] in SECONDS else ""
        try:
            amount = whole_number(number.removesuffix(unit))
        except ValueError:
            amount = -1
        if amount < 0:
            raise InputError(
                f"--save_every is {every!r}, but must be steps, such as 500, or time, such as 90s, 15m or 2h."
            )
        self._steps = 0 if unit else amount
        self._seconds = amount * SECONDS[unit] if unit else 0
        self._clock = clock
        self._last = clock()

    def is_due(self, steps_done: int) -> bool:
        """Return whether to save after so many steps; where it goes by time, the next interval begins now."""
        if self._seconds == 0:
            return self._steps > 0 and steps_done % self._steps == 0
        now = self._clock()
        if now - self._last < self._seconds:
            return False
        self._last = now
        return True


class CheckpointFolder:
    """Write checkpoints one after the other and keep the newest of the periodic ones.

    A thread copies what `save` has left to it, waits for the disk and then gives the file its name. So the newest file
    under its name is always complete.
    """

    def __init__(self, path: Path, *, keep: int, ranks: Ranks | None = None) -> None:
        """
        Args:
            path: Of the folder, which exists.
            keep: How many periodic checkpoints stay; 0 for all.
            ranks: Of whom each has a part of the model; then all ranks call `newest_valid` and `save` alike.
        """
        self.path = path
        self._ranks = ranks
        self._notice = ""
        self._longest_stall = 0.0  # seconds; but for the last checkpoint's copies
        self._keep = keep
        self._periodic: list[Path] = []  # oldest first, those that may be dropped
        self._publisher = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-publisher")
        self._partial: PartialCheckpoint | JointCheckpoint | None = None  # the last one
        self._publishing: Future[None] | None = None  # the same
        self._failure: Exception | None = None  # of the last file, not told yet
        self._sequence = max((checkpoint.sequence for _, checkpoint in self._readable()), default=0)
        if ranks is not None:
            self._sequence, self._notice = ranks.broadcast((self._sequence, f"checkpoint {uuid.uuid4().hex}"))

    def newest_valid(self, say: Callable[[str], None]) -> Checkpoint | None:
        """Return the checkpoint to go on from, compared with its checksums; None where the folder holds none at all.

        Args:
            say: Takes a sentence on each file that is passed over for an older one.

        Raises:
            InputError: There are checkpoints, but none to go on from, or one of a newer version of this suite: whoever
                went on all the same would write over them.
            PermissionError: One may not be read: it may be the newest.
        """
        skipped = 0
        for error in map(_peek, self._files()):
            if isinstance(error, DamagedError):
                say(f"Skipped: {error}")
                skipped += 1
            elif isinstance(error, (InputError, PermissionError)):
                raise error
        found = sorted(self._readable(), key=lambda found: (found[1].sequence, found[1].steps))
        candidates = [(file, peeked.can_resume, peeked.periodic) for file, peeked in found]
        if self._ranks is not None:
            candidates = self._ranks.broadcast(candidates)
        while candidates:
            file, can_resume, _ = candidates[-1]
            try:
                if not can_resume:
                    raise DamagedError(f"{file} was written by an earlier version, without what resuming needs.")
                checkpoint = self._load(file)
            except DamagedError as error:
                say(f"Skipped: {error}")
                skipped += 1
                candidates.pop()
                continue
            self._periodic = [path for path, _, periodic in candidates if periodic]
            return checkpoint
        if skipped > 0:
            raise InputError(
                f"Training cannot go on from any checkpoint in {self.path} ({skipped} found), and a new run would "
                "write over them: to begin anew, move them away or give another --result_dir."
            )
        return None

    @property
    def longest_stall(self) -> float:
        """Return the longest wait of training in seconds: for `save`, or for rows to be copied before a change."""
        return max(self._longest_stall, 0.0 if self._partial is None else self._partial.longest_wait)

    def save(self, checkpoint: Checkpoint, copied_before_change: Mapping[str, RowStore] | None = None) -> Path:
        """Begin to copy a checkpoint into a file; its name appears when it is on disk.

        Args:
            checkpoint: What to save. Its tensors may change afterwards.
            copied_before_change: As for `PartialCheckpoint`: tensors copied in the background, and their stores.

        Raises:
            OSError: It cannot be written.
        """
        begin = time.perf_counter()
        self._finish()
        self._longest_stall = self.longest_stall
        self._sequence += 1
        path, checkpoint = self.path / f"ckpt_{checkpoint.steps}.pt", replace(checkpoint, sequence=self._sequence)
        self._partial = (
            PartialCheckpoint(path, checkpoint, copied_before_change)
            if self._ranks is None
            else JointCheckpoint(path, checkpoint, copied_before_change, self._ranks, self._notice)
        )
        self._failure = None
        self._publishing = self._publisher.submit(self._publish, self._partial, checkpoint.periodic)
        self._longest_stall = max(self._longest_stall, time.perf_counter() - begin)
        return path

    def wait(self) -> Exception | None:
        """Wait until the last checkpoint is on disk; returns why it cannot be, told once."""
        self._finish()
        return self.failure()

    def failure(self) -> Exception | None:
        """Return why the last checkpoint did not reach the disk, as far as that is known already; told once."""
        failure, self._failure = self._failure, None
        return failure

    def close(self) -> None:
        """Let the thread end; what is being written is written to its end."""
        self._finish()
        self._publisher.shutdown(wait=True)

    def remove_unfinished(self) -> None:
        """Remove what runs that were killed while they wrote have left."""
        remove_unfinished(self.path)

    def _load(self, file: Path) -> Checkpoint:
        """Read a checkpoint; of several ranks each compares a share of it with its checksums, for all.

        Raises:
            DamagedError: It is not what was written, as some rank has found.
        """
        if self._ranks is None:
            return load_checkpoint(file)
        checkpoint, failure = None, None
        try:
            checkpoint = load_checkpoint(file, share=(self._ranks.rank, self._ranks.size))
        except InputError as error:
            failure = str(error)
        failures = [found for found in self._ranks.gather(failure) if found is not None]
        if checkpoint is None or failures:
            raise DamagedError(failures[0])
        return checkpoint

    def _finish(self) -> None:
        """Wait for the last checkpoint."""
        if self._publishing is not None and self._partial is not None:
            self._partial.copy_all()
            wait([self._publishing])

    def _publish(self, partial: PartialCheckpoint | JointCheckpoint, periodic: bool) -> None:
        try:
            partial.publish()
        except Exception as error:  # whatever it is: the checkpoint is not there
            self._failure = error
            return
        self._periodic = [path for path in self._periodic if path != partial.path]
        if not periodic:
            return
        self._periodic.append(partial.path)
        while 0 < self._keep < len(self._periodic):
            dropped = self._periodic.pop(0)
            if self._ranks is None or self._ranks.leads:
                remove_checkpoint(dropped)

    def _files(self) -> list[Path]:
        names = os.listdir(self.path) if self.path.is_dir() else []  # `glob` passes over what may not be read
        files = (self.path / name for name in names)
        return sorted(file for file in files if file.match("ckpt_*.pt") and file.is_file())

    def _readable(self) -> list[tuple[Path, Checkpoint]]:
        found = ((file, _peek(file)) for file in self._files())
        return [(file, checkpoint) for file, checkpoint in found if isinstance(checkpoint, Checkpoint)]


def _peek(file: Path) -> Checkpoint | InputError | PermissionError:
    try:
        return peek_checkpoint(file)
    except (InputError, PermissionError) as error:
        return error
