"""Paths that come from files of strangers, and those of the photos in a folder."""

import os
from pathlib import Path, PurePosixPath

from datasets.image_files import PHOTO_SUFFIXES

_LONGEST_NAME = 255  # bytes, of a file on Linux


def stays_inside(name: str) -> bool:
    """Tell whether a path is relative, leads no level up, and can be the path of a file."""
    parts = PurePosixPath(name).parts
    if not parts or parts[0] == "/" or ".." in parts or any(c in name for c in "\0\n\r"):
        return False
    return all(len(part.encode(errors="surrogatepass")) <= _LONGEST_NAME for part in parts)


def refuse_unreadable(error: OSError) -> None:
    """Raise what `os.walk` would pass over, where a folder may not be read."""
    if isinstance(error, PermissionError):
        raise error


def photo_names(folder: Path) -> set[str]:
    """Return the names, relative to a folder, of all files in it that are pictures by their suffix.

    Raises:
        PermissionError: The folder, or one in it, may not be read.
    """
    found = set()
    for place, subfolders, files in os.walk(folder, onerror=refuse_unreadable):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        relative = Path(place).relative_to(folder)
        pictures = (name for name in files if not name.startswith(".") and Path(name).suffix.lower() in PHOTO_SUFFIXES)
        found |= {(relative / name).as_posix() for name in pictures}
    return found
