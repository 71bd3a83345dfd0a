"""Reads what a run has written of itself: figures, curves and pictures in its result folder."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from configs import scaled
from reporting.charts import Curve
from training.event_log import read_scalars

# TensorBoard tags that become curves, by the keys of `reporting.figures.CHARTS`.
TAGS = {
    "loss": "train/loss",
    "num_GS": "train/num_GS",
    "psnr": "val/psnr",
    "device_allocated_GiB": "memory/device_allocated_GiB",
    "device_reserved_GiB": "memory/device_reserved_GiB",
    "host_GiB": "memory/host_GiB",
}
ELAPSED = "train/elapsed_seconds"  # the tag that tells how long training has taken, pauses left out
TRAIN_FIGURES = (
    "num_GS",
    "elapsed_seconds",
    "peak_device_bytes_allocated",
    "peak_device_bytes_reserved",
    "peak_host_bytes",
    "spared_host_bytes",
)
VAL_FIGURES = ("psnr", "ssim", "lpips")
# What runs have that train exposures, or correct poses (`training.pose_files`).
CORRECTED_FIGURES = ("cc_psnr", "cc_ssim", "cc_lpips", "aligned_psnr", "aligned_ssim", "aligned_lpips")
POSE_FIGURES = ("pose_turn_median", "pose_turn_largest", "pose_shift_median", "pose_shift_largest")
OF_VIEWS = VAL_FIGURES + CORRECTED_FIGURES


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Hold what was measured of a run; what is missing or damaged is empty."""

    steps: int = 0  # that the statistics are of
    is_whole: bool = False  # those of the last step are there, of training and of evaluation
    figures: dict[str, float | int | None] = field(default_factory=dict)  # as in the statistics, and ms_per_step
    stages_ms: dict[str, float] = field(default_factory=dict)
    staging_allocations: int | None = None
    curves: dict[str, Curve] = field(default_factory=dict)
    views: dict[str, dict[str, float]] = field(default_factory=dict)  # by held-out view: those of `OF_VIEWS`
    pictures: dict[str, Path] = field(default_factory=dict)  # by held-out view: photo and rendering side by side


def read_measured(folder: Path, last: int) -> Measured:
    """Return all that a result folder tells of a run.

    Args:
        folder: The result folder.
        last: The run's last step; statistics of later ones are of another run.
    """
    train_step, train = _latest(folder, "train", last)
    val_step, val = _latest(folder, "val", last)
    curves = _read_curves(folder)
    stages = train.get("stages_ms") or _mean_of_logged_stages(curves)
    return Measured(
        steps=max(train_step, val_step),
        is_whole=train_step == val_step == last,
        figures={
            **{key: train.get(key) for key in TRAIN_FIGURES},
            **{key: val.get(key) for key in VAL_FIGURES},
            **{key: val[key] for key in CORRECTED_FIGURES if key in val},
            **{key: train[key] for key in POSE_FIGURES if key in train},
            "num_GS": train.get("num_GS", val.get("num_GS")),
            "ms_per_step": sum(stages.values()) if stages else None,
        },
        stages_ms=stages,
        staging_allocations=train.get("staging_allocations"),
        curves={key: curves[tag] for key, tag in TAGS.items() if tag in curves},
        views={
            image["name"]: {key: image[key] for key in OF_VIEWS if image.get(key) is not None}
            for image in val.get("images", [])
        },
        pictures={
            image["name"]: path
            for index, image in enumerate(val.get("images", []))
            if (path := folder / "renders" / f"val_step{val_step}_{index:04d}.png").is_file()
        },
    )


def last_step(options: Mapping[str, Any]) -> int:
    """Return how many steps a run with these options (of cfg.yml) does."""
    return scaled("max_steps", options["max_steps"], options.get("steps_scaler", 1.0))


def read_options(folder: Path) -> dict[str, Any] | None:
    """Return cfg.yml; None where it is missing or damaged."""
    try:
        options = yaml.safe_load((folder / "cfg.yml").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return options if isinstance(options, dict) and "max_steps" in options else None


def _latest(folder: Path, kind: str, last: int) -> tuple[int, dict]:
    """Return the highest step up to `last` that has readable statistics, and those; step 0 where there are none."""
    steps = []
    for path in (folder / "stats").glob(f"{kind}_step*.json"):
        number = path.stem.removeprefix(f"{kind}_step")
        if number.isdecimal() and int(number) <= last:
            steps.append(int(number))
    for step in sorted(steps, reverse=True):
        content = read_json(folder / "stats" / f"{kind}_step{step}.json")
        if content is not None:
            return step, content
    return 0, {}


def _read_curves(folder: Path) -> dict[str, Curve]:
    """Return every scalar in tb/, by tag; of a run that was begun anew, what came before the step it began at."""
    logged = read_scalars(folder / "tb")
    clock = logged.get(ELAPSED, [])
    walls = [entry.wall_time for entry in clock]
    began = min((entry.wall_time for entries in logged.values() for entry in entries), default=0.0)

    def seconds(wall_time: float) -> float:
        if not clock:
            return wall_time - began
        after = bisect_right(walls, wall_time)
        nearest = min(clock[max(after - 1, 0) : after + 1], key=lambda entry: abs(entry.wall_time - wall_time))
        return max(nearest.value + wall_time - nearest.wall_time, 0.0)

    return {
        tag: Curve(
            steps=[entry.step for entry in entries],
            seconds=[seconds(entry.wall_time) for entry in entries],
            values=[entry.value for entry in entries],
        )
        for tag, entries in logged.items()
    }


def _mean_of_logged_stages(curves: Mapping[str, Curve]) -> dict[str, float]:
    prefix = "stages_ms/"
    return {
        tag.removeprefix(prefix): sum(curve.values) / len(curve.values)
        for tag, curve in curves.items()
        if tag.startswith(prefix)
    }


def read_json(path: Path) -> dict | None:
    """Return what a JSON file holds; None where the file is missing or was cut off while it was written."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
