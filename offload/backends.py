"""What computes: the compiled kernels and how many threads they use; and, on CUDA, Triton's kernels in their place.

This is the one place that chooses. Functions that a GPU has kernels for stand in pairs of modules: `rows.py` computes
on the CPU and `rows_triton.py`, beside it, has functions of the same names and arguments for CUDA.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import torch

from native import offload as native

__all__ = ["kernels_for", "native", "num_threads"]


def kernels_for(device: torch.device, module: str) -> ModuleType:
    """Return the module whose functions compute where tensors are.

    Args:
        device: Of the tensors.
        module: The full name of the one for the CPU, whose twin for CUDA has `_triton` behind it. Triton, which only
            CUDA builds of torch bring, is imported with the twin and not before.
    """
    return importlib.import_module(f"{module}_triton" if _takes_triton(device) else module)


def _takes_triton(device: torch.device) -> bool:
    return device.type == "cuda"


def num_threads() -> int:
    """Count the cores that this process may use, or read OMP_NUM_THREADS, which `startup` sets for ranks."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # "4,2" is 4 at the outermost level
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
