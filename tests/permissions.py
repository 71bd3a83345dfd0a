"""Files and folders that may not be read, also where tests run as root, who may read everything."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_VERSION_3 = 0x20080522  # of Linux's capability interface
_READS_ALL = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


@contextmanager
def forbidden(path: Path) -> Iterator[None]:
    """Let nobody read a file, or enter a folder, this thread and those that it starts included."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_VERSION_3, 0)
    rights = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, of capabilities 0 to 31 and from 32 on
    assert libc.capget(header, rights) == 0
    before, mode = rights[0], path.stat().st_mode
    path.chmod(0)
    try:
        rights[0] = before & ~_READS_ALL
        assert libc.capset(header, rights) == 0, os.strerror(ctypes.get_errno())
        yield
    finally:
        rights[0] = before
        libc.capset(header, rights)
        path.chmod(mode)
