"""Reads result folders of training runs: what they were asked to do, how far they came, and what they measured."""

from __future__ import annotations

import contextlib
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from configs import Config
from errors import InputError
from training.checkpoints import peek_checkpoint
from training.ending import FINISHED
from training.files import write_file

NOT_RUN = "not run"
LAUNCH = "launch.json"  # what compare.py knows of a run that it started

# TensorBoard tags that become curves, by the name the report gives them.
CURVES = {
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
)
VAL_FIGURES = ("psnr", "ssim", "lpips")
NO_OTHER_RUN = ("result_dir", "resume", "force", "save_every", "keep")  # options that make no run another one


@dataclass(frozen=True)
class Launch:
    """Hold how compare.py started a run, and how that ended."""

    command: str
    status: str
    message: str
    exit_code: int
    date: str
    machine: dict[str, object]


@dataclass(frozen=True)
class Curve:
    """Hold a value over the steps, and over the seconds that training has taken."""

    steps: list[int]
    seconds: list[float]
    values: list[float]


@dataclass(frozen=True)
class Run:
    """Hold one result folder."""

    name: str
    folder: Path
    status: str = NOT_RUN
    message: str = ""  # why it did not finish
    command: str = ""  # empty where it is not known
    machine: dict[str, object] | None = None
    options: dict[str, object] = field(default_factory=dict)  # cfg.yml
    steps: int = 0  # that the statistics are of
    figures: dict[str, float | int | None] = field(default_factory=dict)  # as in the statistics, and ms_per_step
    stages_ms: dict[str, float] = field(default_factory=dict)
    staging_allocations: int | None = None
    curves: dict[str, Curve] = field(default_factory=dict)
    views: dict[str, dict[str, float]] = field(default_factory=dict)  # by test view: psnr, ssim, lpips
    pictures: dict[str, Path] = field(default_factory=dict)  # by test view: photo and rendering side by side


def last_step(options: Mapping[str, Any]) -> int:
    """Return how many steps a run with these options (of cfg.yml) does."""
    return int(options["max_steps"] * options.get("steps_scaler", 1.0))


def is_complete(folder: Path) -> bool:
    """Return whether the folder holds the whole of the run that wrote its cfg.yml.

    The statistics of the last step must be there, and be that run's: compare.py has seen it finish, or they are newer
    than cfg.yml, which every run writes when it starts.
    """
    options = read_options(folder)
    if options is None:
        return False
    files = [folder / "stats" / f"{kind}_step{last_step(options)}.json" for kind in ("train", "val")]
    if any(_read_json(file) is None for file in files):
        return False
    launch = read_launch(folder)
    if launch is not None and launch.status == FINISHED:
        return True
    began = (folder / "cfg.yml").stat().st_mtime_ns
    return all(file.stat().st_mtime_ns >= began for file in files)


def is_finished(folder: Path, cfg: Config) -> bool:
    """Tell whether the folder holds the whole of a run with these options."""
    options = read_options(folder)
    return options is not None and is_complete(folder) and not differing_options(options, cfg)


def differing_options(options: Mapping[str, object], cfg: Config) -> dict[str, tuple[object, object]]:
    """Return the options of a cfg.yml that are not those asked for, with both values.

    `NO_OTHER_RUN` do not count, and what an older version wrote nothing of was as its default is now.
    """
    wanted, default = (yaml.safe_load(yaml.safe_dump(asdict(values))) for values in (cfg, type(cfg)()))
    there = {**default, **options}
    names = sorted(there.keys() - set(NO_OTHER_RUN))
    return {name: (there[name], wanted.get(name)) for name in names if there[name] != wanted.get(name)}


def read_options(folder: Path) -> dict[str, Any] | None:
    """Return cfg.yml; None where it is missing or damaged."""
    try:
        options = yaml.safe_load((folder / "cfg.yml").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return options if isinstance(options, dict) and "max_steps" in options else None


def read_launch(folder: Path) -> Launch | None:
    content = _read_json(folder / LAUNCH)
    try:
        return None if content is None else Launch(**content)
    except TypeError:
        return None


def write_launch(folder: Path, launch: Launch) -> None:
    write_file(folder / LAUNCH, json.dumps(asdict(launch), indent=2) + "\n")


def read_run(name: str, folder: Path) -> Run:
    """Return all that a result folder tells; what is missing or damaged stays empty.

    Raises:
        InputError: The folder is no result folder.
    """
    options = read_options(folder)
    if options is None:
        raise InputError(f"{folder} has no readable cfg.yml: give result folders of trainer scripts.")
    launch = read_launch(folder) or Launch("", "unfinished", "", 0, "", {})
    train_step, train = _latest(folder, "train", last_step(options))
    val_step, val = _latest(folder, "val", last_step(options))
    # A folder that was copied keeps no times, so here the last step's statistics are enough.
    finished = train_step == val_step == last_step(options)
    curves = _read_curves(folder)
    stages = train.get("stages_ms") or _mean_of_logged_stages(curves)
    return Run(
        name=name,
        folder=folder,
        status=FINISHED if finished else launch.status,
        message="" if finished else launch.message,
        command=launch.command,
        machine=launch.machine or None,
        options=options,
        steps=max(train_step, val_step),
        figures={
            **{key: train.get(key) for key in TRAIN_FIGURES},
            **{key: val.get(key) for key in VAL_FIGURES},
            "num_GS": train.get("num_GS", val.get("num_GS")),
            "ms_per_step": sum(stages.values()) if stages else None,
        },
        stages_ms=stages,
        staging_allocations=train.get("staging_allocations"),
        curves={key: curves[tag] for key, tag in CURVES.items() if tag in curves},
        views={
            image["name"]: {key: image[key] for key in VAL_FIGURES if image.get(key) is not None}
            for image in val.get("images", [])
        },
        pictures={
            image["name"]: path
            for index, image in enumerate(val.get("images", []))
            if (path := folder / "renders" / f"val_step{val_step}_{index:04d}.png").is_file()
        },
    )


def check_one_scene(runs: Sequence[Run]) -> None:
    """Refuse to compare runs of different scenes.

    Raises:
        InputError: Naming two of them.
    """
    for run in runs[1:]:
        if not _is_same_scene(runs[0], run):
            raise InputError(
                f"{runs[0].folder} was trained on {runs[0].options.get('data_dir')} and {run.folder} on "
                f"{run.options.get('data_dir')}: give runs of one scene."
            )


def _is_same_scene(run: Run, other: Run) -> bool:
    """Return whether two runs read one folder, or one dataset that lay in two: its transform tells."""
    folders = [Path(str(each.options.get("data_dir", ""))).expanduser().resolve() for each in (run, other)]
    if folders[0] == folders[1]:
        return True
    transform, others = _transform(run.folder), _transform(other.folder)
    return transform is not None and others is not None and np.allclose(transform, others, rtol=1e-4, atol=1e-6)


def _transform(folder: Path) -> np.ndarray | None:
    """Return the transform [4, 4] that a run's checkpoints hold; None where it has none that can be read."""
    for path in (folder / "ckpts").glob("ckpt_*.pt"):
        with contextlib.suppress(InputError):
            return peek_checkpoint(path).transform
    return None


def _latest(folder: Path, kind: str, last: int) -> tuple[int, dict]:
    """Return the highest step up to `last` that has readable statistics, and those; step 0 where there are none."""
    steps = []
    for path in (folder / "stats").glob(f"{kind}_step*.json"):
        number = path.stem.removeprefix(f"{kind}_step")
        if number.isdecimal() and int(number) <= last:
            steps.append(int(number))
    for step in sorted(steps, reverse=True):
        content = _read_json(folder / "stats" / f"{kind}_step{step}.json")
        if content is not None:
            return step, content
    return 0, {}


def _read_curves(folder: Path) -> dict[str, Curve]:
    """Return every scalar in tb/, by tag; of a run that was begun anew, what came before the step it began at."""
    if not any((folder / "tb").glob("*tfevents*")):
        return {}
    accumulator = EventAccumulator(str(folder / "tb"), size_guidance={SCALARS: 0})  # 0: all of them
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    clock = accumulator.Scalars(ELAPSED) if ELAPSED in tags else []
    walls = [event.wall_time for event in clock]

    def seconds(wall_time: float) -> float:
        if not clock:
            return wall_time - accumulator.FirstEventTimestamp()
        after = bisect_right(walls, wall_time)
        nearest = min(clock[max(after - 1, 0) : after + 1], key=lambda event: abs(event.wall_time - wall_time))
        return max(nearest.value + wall_time - nearest.wall_time, 0.0)

    curves = {}
    for tag in tags:
        events = accumulator.Scalars(tag)
        curves[tag] = Curve(
            steps=[event.step for event in events],
            seconds=[seconds(event.wall_time) for event in events],
            values=[event.value for event in events],
        )
    return curves


def _mean_of_logged_stages(curves: Mapping[str, Curve]) -> dict[str, float]:
    prefix = "stages_ms/"
    return {
        tag.removeprefix(prefix): sum(curve.values) / len(curve.values)
        for tag, curve in curves.items()
        if tag.startswith(prefix)
    }


def _read_json(path: Path) -> dict | None:
    """Return what a JSON file holds; None where the file is missing or was cut off while it was written."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
