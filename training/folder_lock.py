"""One run in a folder: a lock that ends with the process that holds it, whatever ends that."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from pathlib import Path

from errors import InputError

LOCK = ".lock"


class FolderTaken(InputError):
    """Say that a result folder is another run's; nothing in it may be changed."""


class FolderLock:
    """Hold a folder for this process; the file says by whom it is held, and may stay when it no longer is."""

    def __init__(self, folder: Path, name: str = LOCK) -> None:
        """
        Args:
            folder: That exists.
            name: Of the file in it.

        Raises:
            FolderTaken: Another process holds it.
            OSError: The file cannot be written.
        """
        self._path = folder / name
        if self._path.is_symlink():
            self._path.unlink()
        self._take(folder)
        while not self.is_in_place():  # whoever held it has just removed it
            os.close(self._file)
            self._take(folder)
        with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def _take(self, folder: Path) -> None:
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._file, 200, 0).decode(errors="replace").strip()
            os.close(self._file)
            raise FolderTaken(
                f"{folder} is in use by another run ({holder or 'which has just begun'}): wait for its end, or give "
                "another --result_dir."
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # a file system without locks
                raise

    def is_in_place(self) -> bool:
        """Return whether the folder is still the one that was locked: not removed, renamed or replaced."""
        with contextlib.suppress(OSError):
            return os.path.samestat(os.stat(self._path), os.fstat(self._file))
        return False

    def release(self, *, remove: bool = False) -> None:
        """Give the folder back.

        Args:
            remove: Whether the file goes, too, if it is still this one.
        """
        if remove and self.is_in_place():
            self._path.unlink(missing_ok=True)
        os.close(self._file)


def check_free(folder: Path) -> None:
    """Refuse a folder that a run holds just now; one that does not exist is free.

    Raises:
        FolderTaken: With the process.
    """
    if (folder / LOCK).is_file():
        with contextlib.suppress(OSError):
            FolderLock(folder).release()
