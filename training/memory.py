"""How much memory there is, and how much was used."""

from __future__ import annotations

import os
import re
import resource
import sys

import torch

from datasets.free_memory import free_bytes
from errors import InputError, counted
from offload.device_memory import peak_memory, unallocated_bytes

UNITS = "units are B, KB, MB, GB, TB (powers of 1000) and KiB, MiB, GiB, TiB (of 1024)"


def limit_fragmentation() -> None:
    """Let torch's CUDA allocator grow its segments; call it before the first allocation on the device.

    Every view sees another number of Gaussians, so with fixed segments the memory reserved grows to a multiple of
    the memory in use (49.8 GB reserved for 3.0 GB in use after 7,000 steps on 165 aerial photos).
    """
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def available_bytes(device: torch.device) -> int:
    """Return the memory in bytes that this process can still take on a device; on the CPU, of the machine."""
    if device.type == "cuda":
        return unallocated_bytes(device)
    return free_bytes()


def peak_bytes(device: torch.device) -> dict[str, int]:
    """Return the peaks of this process so far: device memory allocated and reserved by torch, and host memory."""
    peaks = peak_memory(device) if device.type == "cuda" else {"allocated": 0, "reserved": 0}
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return {
        "device_allocated": peaks["allocated"],
        "device_reserved": peaks["reserved"],
        "host": resident if sys.platform == "darwin" else resident * 1024,
    }


def allocated_bytes(device: torch.device) -> int:
    """Return the device memory in bytes that tensors take now; after a view it should be what it was before."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def parse_bytes(text: str, option: str) -> int:
    """Return the number of bytes that a text such as '6GiB', '800 MB' or '2.5e9' says; without a unit it is in bytes.

    Args:
        text: A number and a unit: B, KB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (of 1024), in any case.
        option: Where it was given.

    Raises:
        InputError: The text is something else, not above 0, or so few bytes that a unit is missing.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*(?:([kmgt]?)(i?)b)?\s*", text.lower())
    number, prefix, binary = match.groups(default="") if match else ("", "", "")
    try:
        num_bytes = int(float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix or " "))
    except (ValueError, OverflowError):
        num_bytes = 0
    if num_bytes <= 0 or (binary and not prefix):
        raise InputError(f"{option} is {text!r}, but must be a size such as 6GiB, 800MB or 6442450944: {UNITS}.")
    if num_bytes < 1024 and not text.strip().lower().endswith("b"):
        raise InputError(f"{option} is {text.strip()}, which is {counted(num_bytes, 'byte')}: give a unit; {UNITS}.")
    return num_bytes
