"""What machine and which versions measured something."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from offload.backends import num_threads

PACKAGES = ("torch", "gsplat", "triton", "numpy")


def describe_machine() -> dict[str, Any]:
    """Return names, sizes (bytes) and versions, for JSON; None for what is not there. Takes no memory on the GPU."""
    return {
        "processor": processor(),
        "threads": num_threads(),
        "host_memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        **(describe_gpu() if torch.cuda.is_available() else dict.fromkeys(("gpu", "device_memory_bytes", "driver"))),
        "cuda": torch.version.cuda,
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
        "commit": commit(),
    }


def describe_gpu() -> dict[str, object]:
    """Return name, memory in bytes and driver of the first GPU that this process may use.

    By nvidia-smi where it is there: torch would set up a context, which takes memory from the runs to be measured.
    """
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0] or "0"
    query = ("--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")
    found = _output("nvidia-smi", "-i", index, *query).split(", ")
    if len(found) != 3 or not found[1].isdecimal():
        properties = torch.cuda.get_device_properties(0)
        return {"gpu": properties.name, "device_memory_bytes": properties.total_memory, "driver": None}
    return {"gpu": found[0], "device_memory_bytes": int(found[1]) * 2**20, "driver": found[2]}


def sentence(machine: Mapping[str, Any]) -> str:
    """Return a machine in one line of text."""
    parts = [f"{machine['processor']}, {machine['threads']} threads, {machine['host_memory_bytes'] / 1e9:.0f} GB"]
    if machine["gpu"]:
        memory = machine["device_memory_bytes"] / 1e9
        parts.append(f"{machine['gpu']}, {memory:.0f} GB, driver {machine['driver']}, CUDA {machine['cuda']}")
    versions = {"Python": machine["python"], **{package: machine[package] for package in PACKAGES}}
    parts.append(", ".join(f"{name} {version}" for name, version in versions.items() if version))
    return "; ".join([*parts, f"commit {machine['commit']}"])


def processor() -> str:
    """Return the CPU's name."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@cache  # of what runs, whatever lies here later; a run asks after each evaluation
def commit() -> str:
    """Return the commit of this source tree, marked where files differ from it."""
    here = ("git", "-C", str(Path(__file__).parent))
    changed = _output(*here, "status", "--porcelain", "--untracked-files=no")
    return (_output(*here, "rev-parse", "--short=12", "HEAD") or "unknown") + (" with changes" if changed else "")


def _output(*command: str) -> str:
    """Return what a program prints; nothing where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
