"""Device memory of this process: a bound that torch's allocator keeps, and peaks of stretches of work."""

from __future__ import annotations

import torch

_highest = {"allocated": 0, "reserved": 0}  # bytes, in the stretches that have ended
_bound: int | None = None  # bytes


def bound_memory(num_bytes: int, device: torch.device) -> None:
    """Let torch take at most this much device memory; what needs more raises OutOfMemoryError."""
    global _bound
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(num_bytes / total, 1.0))  # refuses a device without index
        _bound = num_bytes


def most_bytes(device: torch.device) -> int:
    """Count the bytes that torch may have allocated on a GPU at once: all that others leave, or the bound."""
    free, _ = torch.cuda.mem_get_info(device)
    most = free + torch.cuda.memory_reserved(device)
    return most if _bound is None else min(most, _bound)


def unallocated_bytes(device: torch.device) -> int:
    """Count the bytes that torch may still allocate on a GPU."""
    return max(most_bytes(device) - torch.cuda.memory_allocated(device), 0)


def begin_stretch(device: torch.device) -> int:
    """Begin a stretch of work whose peak `stretch_peak` gives; returns that of the one before."""
    peaks = _peaks(device)
    for kind, num_bytes in peaks.items():
        _highest[kind] = max(_highest[kind], num_bytes)
    torch.cuda.reset_peak_memory_stats(device)
    return peaks["allocated"]


def stretch_peak(device: torch.device) -> int:
    """Return the most bytes that were in use at once since the stretch began."""
    return _peaks(device)["allocated"]


def peak_memory(device: torch.device) -> dict[str, int]:
    """Return the most bytes that this process has had allocated, and that torch has reserved for it, at once."""
    return {kind: max(_highest[kind], peak) for kind, peak in _peaks(device).items()}


def _peaks(device: torch.device) -> dict[str, int]:
    """Return the peaks of the present stretch."""
    stats = torch.cuda.memory_stats_as_nested_dict(device)  # a tenth of the time that flat ones take
    return {kind: stats[f"{kind}_bytes"]["all"]["peak"] if stats else 0 for kind in _highest}
