"""How much memory of this machine a process can still take, and who gives some back where others need it."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Protocol
from weakref import WeakSet

# Memory that only saves time is at most one part in so many of what all else leaves, itself included.
SPARED_PART = 8


class Sparing(Protocol):
    """Holds memory that only saves time."""

    @property
    def spared_bytes(self) -> int:
        """Count the bytes that it would give up."""

    def give_up(self) -> None:
        """Give them up, for good."""


_sparing: WeakSet[Sparing] = WeakSet()


def spares(holder: Sparing) -> None:
    """Let `give_up_for` know of one who holds memory that only saves time."""
    _sparing.add(holder)


def spared_bytes() -> int:
    """Count the bytes that this process holds to save time."""
    return sum(holder.spared_bytes for holder in _sparing)


def give_up_for(needed: int, processes: int = 1) -> None:
    """Have memory that only saves time given up, unless it is little beside what so many more bytes leave free.

    It is called by the thread that uses what is held.

    Args:
        needed: Bytes that processes of this machine are about to take, together.
        processes: How many share it, each of which may hold as much.
    """
    held = processes * spared_bytes()
    if held > 0 and not leaves_enough(held, needed):
        for holder in list(_sparing):
            if holder.spared_bytes > 0:
                holder.give_up()


def leaves_enough(held: int, needed: int = 0) -> bool:
    """Return whether bytes that are held to save time are little beside what is free once `needed` more are taken."""
    return (SPARED_PART - 1) * held <= free_bytes() - needed


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
