"""What computes: the compiled kernels, and how many threads they use."""

from __future__ import annotations

import os

from native import offload as native

__all__ = ["native", "num_threads"]


def num_threads() -> int:
    """Count the cores that this process may use, or read OMP_NUM_THREADS."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # "4,2" is 4 at the outermost level
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
