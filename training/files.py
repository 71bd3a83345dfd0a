"""Output files: complete or not there, and never written through a link that lies under their name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def open_new(path: Path) -> int:
    """Create a file and return its descriptor, for reading and writing.

    What lay under the name before is removed: where that was a link, what it points to stays as it is. Folders above
    are made, since a run's may have been removed while it trains.

    Raises:
        OSError: It cannot be created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of an empty file, which takes its place in the end; where an error comes, nothing has changed.

    Args:
        path: Of the final file. The other one lies beside it and has the same suffix.

    Raises:
        OSError: The file cannot be written.
    """
    partial = path.with_name("partial_" + path.name)
    os.close(open_new(partial))
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a whole file, in place of one that is there.

    Raises:
        OSError: It cannot be written; one that was there is as it was.
    """
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def result_folder_of(path: Path) -> Path:
    """Return the result folder in which a checkpoint or PLY file lies, if it lies in one."""
    return Path(os.path.abspath(path)).parent.parent
