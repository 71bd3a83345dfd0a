"""Reads result folders of training runs: what they were asked to do, how far they came, and what they measured."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from configs import Config, in_effect
from errors import InputError
from training.checkpoints import peek_checkpoint
from training.ending import FINISHED
from training.files import write_file
from training.measured import Measured, last_step, read_json, read_measured, read_options
from training.roles import OF_NO_OTHER_RUN

NOT_RUN = "not run"
LAUNCH = "launch.json"  # what compare.py knows of a run that it started


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
class Run(Measured):
    """Hold one result folder."""

    name: str
    folder: Path
    status: str = NOT_RUN
    message: str = ""  # why it did not finish
    command: str = ""  # empty where it is not known
    machine: dict[str, object] | None = None
    options: dict[str, object] = field(default_factory=dict)  # in effect, of cfg.yml


def is_complete(folder: Path) -> bool:
    """Return whether the folder holds the whole of the run that wrote its cfg.yml.

    The statistics of the last step must be there, and be that run's: compare.py has seen it finish, or they are newer
    than cfg.yml, which every run writes when it starts.
    """
    options = read_options(folder)
    if options is None:
        return False
    files = [folder / "stats" / f"{kind}_step{last_step(options)}.json" for kind in ("train", "val")]
    if any(read_json(file) is None for file in files):
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

    `OF_NO_OTHER_RUN` do not count, and what an older version wrote nothing of was as its default is now.
    """
    wanted, there = in_effect(asdict(cfg)), in_effect({**asdict(type(cfg)()), **options})
    names = sorted(there.keys() - set(OF_NO_OTHER_RUN))
    return {name: (there[name], wanted.get(name)) for name in names if there[name] != wanted.get(name)}


def read_launch(folder: Path) -> Launch | None:
    content = read_json(folder / LAUNCH)
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
    measured = read_measured(folder, last_step(options))
    # A folder that was copied keeps no times, so here the last step's statistics are enough.
    return Run(
        name=name,
        folder=folder,
        status=FINISHED if measured.is_whole else launch.status,
        message="" if measured.is_whole else launch.message,
        command=launch.command,
        machine=launch.machine or None,
        options=in_effect(options),
        **vars(measured),
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
