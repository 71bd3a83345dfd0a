"""What a machine's speeds mean for the offloading trainers, and where the last finding is kept.

`python -m benchmarks.calibrate` measures the speeds.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

# Bytes that a step moves for a visible row of 48 float32. The optimized trainer's CPU reads parameters and moments and
# writes the value to forward a row, and reads those and the gradient and writes three to commit it; value and gradient
# cross the link. A streamed row crosses the link with its moments, both ways.
OPTIMIZED_HOST_BYTES = (4 + 7) * 192
OPTIMIZED_LINK_BYTES = 2 * 192
STREAMED_LINK_BYTES = 2 * 3 * 192

# Rendering takes a part of the device's and the host's time that is not known here. On an H200 with 4 and with 18
# million Gaussians it moved the measured ratio of the two trainers by up to 1.5 from that of their transfers; it also
# narrows any difference.
DECISIVE = 1.5


@dataclass(frozen=True)
class Speeds:
    """Hold bytes per second of a machine; zero where there is no GPU."""

    host: float  # that Adam's forward and commit kernels read and write
    copies: float = 0.0  # pinned copies one way
    copies_both_ways: float = 0.0  # both together
    rows_both_ways: float = 0.0  # kernels of the device that read and write pinned rows at once, both together


@dataclass(frozen=True)
class Prediction:
    """Hold the milliseconds that a step's transfers take at least; rendering is not in it."""

    optimized_host: float  # of the CPU, moving rows
    optimized_link: float  # beside it
    streamed: float

    @property
    def optimized(self) -> float:
        return max(self.optimized_host, self.optimized_link)


def predict(speeds: Speeds, num_visible: float) -> Prediction:
    """Return what the transfers of a step take whose view sees so many rows.

    Args:
        speeds: Of a machine with a GPU.
        num_visible: V.
    """
    return Prediction(
        optimized_host=1e3 * OPTIMIZED_HOST_BYTES * num_visible / speeds.host,
        optimized_link=1e3 * OPTIMIZED_LINK_BYTES * num_visible / speeds.copies_both_ways,
        streamed=1e3 * STREAMED_LINK_BYTES * num_visible / speeds.rows_both_ways,
    )


def verdict(speeds: Speeds, num_gaussians: int, visible: float) -> str:
    """Return which trainer will be faster, by how much and why, in two sentences.

    Args:
        speeds: Of a machine with a GPU.
        num_gaussians: N.
        visible: Share of them that a view sees.
    """
    num_visible = visible * num_gaussians
    found = predict(speeds, num_visible)
    streamed = _moving(STREAMED_LINK_BYTES * num_visible, "over the link", speeds.rows_both_ways)
    optimized = _moving(OPTIMIZED_HOST_BYTES * num_visible, "through the host's memory", speeds.host)
    if found.optimized_link > found.optimized_host:
        optimized = _moving(OPTIMIZED_LINK_BYTES * num_visible, "over the link", speeds.copies_both_ways)
    transfers = (
        f"With {num_gaussians:,} Gaussians, {100 * visible:g} % of them visible and geometry on the GPU, the "
        f"transfers of a step take {found.streamed:.1f} ms in the streamed trainer ({streamed}) and "
        f"{found.optimized:.1f} ms in the optimized one ({optimized})"
    )
    ratio = found.optimized / found.streamed
    if 1 / DECISIVE < ratio < DECISIVE:
        return f"{transfers}. That is too near to name one: rendering, which runs beside them, decides."
    faster = "streamed" if ratio > 1 else "optimized"
    difference = abs(found.optimized - found.streamed)
    return f"{transfers}. The {faster} trainer will be faster, by up to {difference:.1f} ms a step."


def _moving(num_bytes: float, where: str, speed: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB {where} at {speed / 1e9:.0f} GB/s"


# --------------------------------------------------------------------------------------------------- the last one


def machine_name(device: torch.device) -> str | None:
    """Return the name of this GPU in this host; None for a CPU."""
    return f"{torch.cuda.get_device_name(device)} in {platform.node()}" if device.type == "cuda" else None


def cache_file() -> Path:
    """Return where verdicts are kept."""
    folder = os.environ.get("XDG_CACHE_HOME")
    return (Path(folder) if folder else Path.home() / ".cache") / "gaussian-offload" / "calibration.json"


def save_verdict(machine: str, speeds: Speeds, num_gaussians: int, visible: float) -> Path:
    """Keep what has been found for a machine, beside what is known of others.

    Raises:
        OSError: The file cannot be written.
    """
    path = cache_file()
    found = {
        "date": datetime.date.today().isoformat(),
        "bytes_per_second": asdict(speeds),
        "num_gaussians": num_gaussians,
        "visible": visible,
        "verdict": verdict(speeds, num_gaussians, visible),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps({**_saved(), machine: found}, indent=1) + "\n")
    unfinished.replace(path)
    return path


def print_last_verdict(device: torch.device) -> None:
    """Say in one line what was found when this machine was calibrated; nothing where it was not."""
    with contextlib.suppress(KeyError, TypeError):  # never calibrated, or a file that is none of ours
        found = _saved()[machine_name(device) or ""]
        print(f"Calibrated on {found['date']}: {found['verdict']}")


def _saved() -> dict[str, dict]:
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # no file, not JSON, no home
        saved = json.loads(cache_file().read_text())
        return saved if isinstance(saved, dict) else {}
    return {}
