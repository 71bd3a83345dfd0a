"""How much memory of this machine a process can still take."""

from __future__ import annotations

import math
import os
from pathlib import Path


def free_bytes() -> int:
    """Return the bytes of host memory that this process can still take."""
    return int(min(_machine_bytes(), _container_bytes()))


def _machine_bytes() -> int:
    try:
        with open("/proc/meminfo") as meminfo:
            for line in meminfo:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _container_bytes() -> float:
    """Return what the limit of this process's container leaves (cgroup v2); infinite where there is none."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = (folder / "memory.max").read_text(), int((folder / "memory.current").read_text())
        cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())["inactive_file"]
        return int(limit) - used + int(cached)
    except (OSError, ValueError, KeyError):  # no such files, or a limit of "max"
        return math.inf
