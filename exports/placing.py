"""Where an export is written until it is complete: a folder of its own beside its place, such as garden.sog.unfinished.

A model and the file beside it, which says how to come back to the dataset's coordinates, are one export: where a model
has its name, the other file is there, too, and is its own. What a killed export leaves lies in its folder, but for a
file beside a model that has not come; the next export of that name removes both.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datasets.cache import is_writable
from datasets.places import check_outside_datasets
from errors import InputError, reason
from exports.formats import PLY, format_of
from exports.streamed import INDEX
from training.folder_lock import FolderLock, FolderTaken

UNFINISHED = ".unfinished"  # ending of the folder
LOCK = "export.lock"  # in it: held while the export lives, and says for ever whose folder this is
PLACED = "placed.json"  # in it: a copy of the file beside, from when that may have been placed


def side_file(to: Path) -> Path:
    """Return where the way back to the dataset's coordinates is written."""
    if to.name == INDEX:
        return to.with_name("input.json")
    return to.with_suffix(".json") if format_of(to) is PLY else to.with_name(to.name + ".json")


def check_target(to: Path) -> None:
    """Refuse a name that is taken, or for which there is no folder that may be written; what a killed export left goes.

    Raises:
        InputError: With the remedy.
    """
    target = _target(to)
    if target == Path("."):
        raise InputError(f"--to {to} names no folder: name one that is made, as in garden/{INDEX}.")
    check_outside_datasets("--to", to)
    folder = target.resolve().parent
    if not folder.is_dir():
        is_there = "is a file: choose another" if folder.exists() else "does not exist: make it, or choose another"
        raise InputError(f"--to {to}: the folder {folder} {is_there}.")
    if os.path.lexists(_unfinished(to)):
        _remove_left(to)
    for path in (target, side_file(to)):
        if os.path.lexists(path):
            raise InputError(_taken(to, path))
    try:
        if not is_writable(folder):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        _unfinished(to).mkdir()
        _unfinished(to).rmdir()
    except OSError as error:
        raise InputError(unwritable(to, error)) from error


def unwritable(to: Path, error: OSError) -> str:
    """Return the sentence for a place that the system does not let be written."""
    return f"--to {to} cannot be written ({error.strerror or reason(error)}): choose another place."


def _taken(to: Path, path: Path) -> str:
    """Return the sentence for a path that is there already; nobody is told to remove a folder with things of his."""
    if to.name == INDEX:
        if not path.is_dir() or os.path.lexists(to):
            return f"--to {to}: {path} is there already: name another folder, which is made."
        return f"--to {to}: the folder {path} is there already: name a new one, as in {path / 'garden' / INDEX}."
    if path == to:
        return f"--to {to} is there already: remove it, or choose another name."
    return f"--to {to}: {path}, which would come beside it, is there already: move it away, or choose another name."


@contextmanager
def placing(to: Path) -> Iterator[Path]:
    """Yield the path to write an export to; in the end it and the file beside it, if there is one, take their places.

    Args:
        to: The place, which `check_target` has found free. What is yielded has the same name.

    Raises:
        OSError: Something cannot be written, or another program has taken the name; nothing has changed then.
    """
    folder = _unfinished(to)
    folder.mkdir()
    lock = FolderLock(folder, LOCK)
    try:
        yield folder / to.relative_to(_target(to).parent)
        _place(folder, to)
    finally:
        with contextlib.suppress(OSError):  # the next export of this name tries again
            _clear(folder, to, lock)


def _target(to: Path) -> Path:
    """Return what appears when an export is complete: the file, or the folder of levels of detail."""
    return to.parent if to.name == INDEX else to


def _unfinished(to: Path) -> Path:
    return _target(to).with_name(_target(to).name + UNFINISHED)


def _place(folder: Path, to: Path) -> None:
    target, beside = _target(to), side_file(to)
    for path in (target, beside):
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, f"{path} has appeared meanwhile")
    if to.name != INDEX and (folder / beside.name).exists():  # in a folder of levels it lies within
        shutil.copyfile(folder / beside.name, folder / PLACED)
        os.rename(folder / beside.name, beside)
    os.rename(folder / target.name, target)


def _remove_left(to: Path) -> None:
    """Remove what a killed export has left, and nothing else.

    Raises:
        InputError: The folder is none of an export, or of one that still writes.
    """
    folder = _unfinished(to)
    try:
        is_ours = folder.is_dir() and not folder.is_symlink() and _may_be_left(folder)
        if not is_ours:
            raise InputError(
                f"--to {to}: {folder}, where it would be written, is there and was not made by an export: rename it, "
                "or choose another name."
            )
        _clear(folder, to, FolderLock(folder, LOCK))
    except FolderTaken as error:
        raise InputError(
            f"--to {to} is being written by another export: wait for its end, or choose another name."
        ) from error
    except OSError as error:
        raise InputError(
            f"--to {to}: {folder}, which a stopped export has left, cannot be removed ({reason(error)}): remove it, or "
            "choose another name."
        ) from error
    print(f"What a stopped export to {to} has left is removed.")


def _may_be_left(folder: Path) -> bool:
    """Return whether a folder is an export's: one that was killed at once has left an empty one."""
    names = os.listdir(folder)
    return not names or LOCK in names


def _clear(folder: Path, to: Path, lock: FolderLock) -> None:
    """Remove the folder of an export, and the file beside its place if the model has not come after it."""
    beside = side_file(to)
    model_waits = (folder / _target(to).name).exists() and not (folder / beside.name).exists()
    if model_waits and _are_alike(folder / PLACED, beside):
        beside.unlink()
    for path in folder.iterdir():
        if path.name != LOCK:  # which goes last: without it the folder would be nobody's
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    lock.release(remove=True)
    folder.rmdir()


def _are_alike(first: Path, second: Path) -> bool:
    return first.is_file() and second.is_file() and first.read_bytes() == second.read_bytes()
