"""Paths that come from files of strangers."""

from pathlib import PurePosixPath

_LONGEST_NAME = 255  # bytes, of a file on Linux


def stays_inside(name: str) -> bool:
    """Tell whether a path is relative, leads no level up, and can be the path of a file."""
    parts = PurePosixPath(name).parts
    if not parts or parts[0] == "/" or ".." in parts or any(c in name for c in "\0\n\r"):
        return False
    return all(len(part.encode(errors="surrogatepass")) <= _LONGEST_NAME for part in parts)
