"""Checkpoints that several processes write together: each its part, and the first the file that joins them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from distributed.board import BoardGone
from distributed.mesh import Ranks
from distributed.watch import GONE
from errors import InputError
from offload.store.contract import RowStore
from training.checkpoint_writing import PartialCheckpoint, write_joining_file
from training.checkpoints import Checkpoint, files_of_parts

ASKED_EVERY = 0.02  # seconds, while others write their parts


class JointCheckpoint:
    """Write this rank's part of a checkpoint; as `PartialCheckpoint`, for which it stands where there are ranks.

    Every rank says on the board that its part is on disk. Rank 0 then writes the file that names the parts, and says
    so; until then there is no checkpoint. A rank that fails says that, and all remove their parts.
    """

    def __init__(
        self,
        path: Path,
        checkpoint: Checkpoint,
        copied_before_change: Mapping[str, RowStore] | None,
        ranks: Ranks,
        notice: str,
    ) -> None:
        """Begin the part; as `PartialCheckpoint`.

        Args:
            path: Of the file that will join the parts.
            checkpoint: What this rank's part will hold.
            copied_before_change: As for `PartialCheckpoint`.
            ranks: All of which save, with the same path, steps and sequence.
            notice: What begins the names of its notices, which no other folder has.

        Raises:
            OSError: The part cannot be written; the others hear of it.
        """
        self.path = path
        self._ranks = ranks
        self._notice = f"{notice} {checkpoint.sequence}"
        self._whole = replace(checkpoint, state={}, part=None)
        file = path.with_name(f"{path.stem}.{checkpoint.sequence}.{ranks.rank + 1}of{ranks.size}.part")
        with self._failure_is_told():
            self._part = PartialCheckpoint(file, checkpoint, copied_before_change)

    @property
    def longest_wait(self) -> float:
        """Return the seconds that a change of rows has waited at most until they were copied."""
        return self._part.longest_wait

    def copy_all(self) -> None:
        """Copy what has not been copied, as fast as it can be; errors are left to `publish`."""
        self._part.copy_all()

    def publish(self) -> None:
        """Complete the part; rank 0 then waits for those of the others and joins them, and all wait for that.

        Raises:
            OSError: A part, or the file that joins them, is not on disk; a file that had the name is as it was.
        """
        try:
            with self._failure_is_told():
                self._part.publish()
                self._ranks.board.post(f"{self._notice} part {self._ranks.rank}", self._identity())
                if self._ranks.leads:
                    self._join()
                    self._ranks.board.post(self._notice, "joined")
            while self._ranks.board.read(self._notice) is None:
                self._check_others()
                time.sleep(ASKED_EVERY)
        except BaseException:
            self._part.path.unlink(missing_ok=True)
            raise

    def _join(self) -> None:
        parts: list[dict[str, Any]] = []
        while len(parts) < self._ranks.size:
            found = self._ranks.board.read(f"{self._notice} part {len(parts)}")
            if found is None:
                self._check_others()
                time.sleep(ASKED_EVERY)
            else:
                parts.append(found)
        replaced = set(_files_of_parts(self.path)) - {self.path.parent / part["file"] for part in parts}
        write_joining_file(self.path, self._whole, parts)
        for file in replaced:
            file.unlink(missing_ok=True)

    def _identity(self) -> dict[str, Any]:
        return {"file": self._part.path.name, **self._part.identity}

    @contextlib.contextmanager
    def _failure_is_told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            with contextlib.suppress(BoardGone):
                self._ranks.board.post_first(f"{self._notice} failed", f"rank {self._ranks.rank}: {error}")
            raise

    def _check_others(self) -> None:
        failed = self._ranks.board.read(f"{self._notice} failed") or self._ranks.board.read(GONE)
        if failed is not None:
            raise OSError(failed)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint: first its file, so that there never is one without its parts, then the parts."""
    parts = _files_of_parts(path)
    path.unlink(missing_ok=True)
    for part in parts:
        part.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what runs that were killed while they wrote have left: files without a name, parts of no checkpoint."""
    for file in [*folder.glob("ckpt_*.pt.partial"), *folder.glob("ckpt_*.part.partial")]:
        file.unlink(missing_ok=True)
    joined = {part for file in folder.glob("ckpt_*.pt") for part in _files_of_parts(file)}
    for file in set(folder.glob("ckpt_*.part")) - joined:
        file.unlink(missing_ok=True)


def _files_of_parts(path: Path) -> list[Path]:
    """Return the files that a checkpoint names; none where there is none that can be read."""
    try:
        return files_of_parts(path)
    except InputError:
        return []
