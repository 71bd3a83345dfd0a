"""Where derived files live, and small .npz files that remember what was learned about other files."""

import hashlib
import math
import os
import stat
import zipfile
from pathlib import Path
from typing import Any

import numpy as np


def is_writable(folder: Path) -> bool:
    """Tell whether new files may be put into `folder`.

    The mode bits are asked as well as the system: root may write into a folder that its owner has made
    read-only, and must not.
    """
    any_write_bit = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
    return folder.is_dir() and bool(folder.stat().st_mode & any_write_bit) and os.access(folder, os.W_OK)


def user_cache_dir(data_dir: Path) -> Path:
    """Return the folder that stands in for a dataset folder that cannot be written to (not created here)."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    digest = hashlib.sha256(str(data_dir.resolve()).encode()).hexdigest()[:16]
    return Path(root) / "gaussian-offload" / digest


def fingerprint(paths: list[Path]) -> np.ndarray:
    """Return the size in bytes and time of last change in nanoseconds of each file, [n, 2] int64."""
    return np.array([(s.st_size, s.st_mtime_ns) for s in map(os.stat, paths)], np.int64).reshape(-1, 2)


def read_npz(path: Path) -> dict[str, np.ndarray] | None:
    """Read the arrays of an .npz file; None where it is absent or damaged, since a cache can always be rebuilt.

    Nothing in it is unpickled, and no array is allocated that the file is too small to hold.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if sum(info.file_size for info in members.values()) > path.stat().st_size:
                return None
            return {name: _read_member(archive, info) for name, info in members.items()}
    except Exception:  # zipfile, zlib, struct and numpy each have errors of their own for damaged files
        return None


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    if info.compress_type != zipfile.ZIP_STORED:  # write_npz compresses nothing; a small file stays small
        raise ValueError
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        if math.prod(shape) * dtype.itemsize != info.file_size - file.tell():
            raise ValueError
    with archive.open(info) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an .npz file that is whole or absent; a full disk is no reason to stop, so errors are ignored."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    contents: dict[str, Any] = dict(arrays)  # the stubs know of no names but their own
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            np.savez(file, **contents)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)


class CacheFile:
    """Keep one .npz beside the files that it describes.

    It is in the user's cache where that folder is read-only, or not of the dataset: as of a run that wrote a model.
    """

    def __init__(self, folder: Path, data_dir: Path, name: str):
        self._beside = folder / name
        self._is_inside = folder.is_relative_to(data_dir)
        inside = folder.relative_to(data_dir) if self._is_inside else Path()
        self._in_user_cache = user_cache_dir(data_dir if self._is_inside else folder) / inside / name

    def read(self) -> list[dict[str, np.ndarray]]:
        """Return what can be read, the file beside the data first; the caller checks that it still holds."""
        found = (read_npz(path) for path in (self._beside, self._in_user_cache))
        return [arrays for arrays in found if arrays is not None]

    def write(self, arrays: dict[str, np.ndarray]) -> None:
        is_beside = self._is_inside and is_writable(self._beside.parent)
        write_npz(self._beside if is_beside else self._in_user_cache, arrays)
