"""Puts files where a dataset wants them without copying their content where that can be avoided."""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from errors import InputError, reason

_REMEDY = "make room there, make it writable, or name another folder"


def link_file(source: Path, target: Path) -> None:
    """Make `target` the file `source`: a hard link, else a symbolic link, else a copy. Done before, it stays.

    Raises InputError where `target` is another file, or cannot be written.
    """
    source = source.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(target):
            if not _same(source, target):
                raise InputError(f"{target} exists and is not {source}: move it away, or name another folder.")
            return
        for link in (os.link, os.symlink, _copy):
            try:
                link(source, target)
                return
            except OSError as error:
                failure = error
    except OSError as error:
        failure = error
    raise InputError(f"{target} cannot be written ({reason(failure)}): {_REMEDY}.") from failure


def write_whole(target: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file under another name, and give it its own when it is complete.

    Raises InputError where it cannot be written.
    """
    partial = target.with_name(f".{target.stem}.part{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        os.replace(partial, target)
    except OSError as error:
        raise InputError(f"{target} cannot be written ({reason(error)}): {_REMEDY}.") from error
    finally:
        with contextlib.suppress(OSError):  # no folder where it could be
            partial.unlink(missing_ok=True)


def _same(source: Path, target: Path) -> bool:
    if not target.exists():  # a symbolic link to what is gone
        return False
    if os.path.samefile(source, target):
        return True
    a, b = source.stat(), target.stat()  # a copy keeps the time
    return (a.st_size, a.st_mtime_ns) == (b.st_size, b.st_mtime_ns)


def _copy(source: Path, target: Path) -> None:
    write_whole(target, lambda partial: shutil.copy2(source, partial))
