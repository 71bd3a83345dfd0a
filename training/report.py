"""The page about a run in its result folder, and the last lines that it prints: where things are, how to see them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from configs import Config, in_effect
from reporting import charts
from reporting.figures import FIGURES, line_charts
from reporting.machine import describe_machine, sentence
from reporting.page import render_page
from reporting.pictures import Picture, data_uri, halves
from training.commands import evaluate_command, resume_command, script_command, started_in, train_command
from training.ending import FINISHED, INTERRUPTED, Ending
from training.files import write_file
from training.measured import Measured, read_measured
from training.model_files import not_held
from training.pose_files import FOLDER as POSES
from training.pose_files import steps_of
from training.timelapse import FRAMES, VIDEO
from training.video import NAMES

if TYPE_CHECKING:
    from training.run import TrainingRun

NAME = "report.html"
MOST_VIEWS = 6  # held-out views in the page


@dataclass(frozen=True)
class HeldOut:
    """Hold a held-out view: its photo, and what the model draws."""

    name: str
    figures: str
    photo: Picture
    rendering: Picture


def write_report(run: TrainingRun, ending: Ending | None) -> None:
    """Write report.html of what there is of a run so far.

    Args:
        run: Whose result folder it is.
        ending: How it has ended; None while it goes on.
    """
    with run.results.missed_if_unwritable("The report", was_asked_for=False):
        try:
            page = _page(run, ending)
        except (ValueError, TypeError, KeyError, ArithmeticError) as error:  # as of statistics that somebody has edited
            tqdm.write(f"Warning: the report could not be made of what lies in {run.results.path} ({error!r}).")
            return
        write_file(run.results.path / NAME, page)


def _page(run: TrainingRun, ending: Ending | None) -> str:
    folder = run.results.path
    measured = read_measured(folder, run.last_step)
    stages = charts.stage_colors([measured.stages_ms])
    found = findings(folder, _steps_had(run), run.cfg.background)
    return render_page(
        Path(__file__).parent / "report.html",
        title=f"{run.scene_name}: {folder.name}",
        date=datetime.now().isoformat(" ", "minutes"),
        status=_status(run, ending),
        is_problem=ending is not None and ending.status not in (FINISHED, INTERRUPTED),
        message="" if ending is None else ending.message,
        figures=[(each.title, each.show(value)) for each in FIGURES if (value := measured.figures.get(each.key))],
        figures_step=measured.steps,
        charts=line_charts([measured.curves], compared=False),
        stages=stages,
        stage_chart=charts.stage_bars({f"{measured.steps} steps": measured.stages_ms}, stages),
        views=held_out(measured),
        used=run.said_of_input,
        options=options_given(run.given),
        started_in=started_in() and shlex.quote(started_in()),
        commands=commands(run),
        files=[(what, path.relative_to(folder), how) for what, path, how in found if path.name != NAME],
        machine=sentence(describe_machine()),
    )


def _status(run: TrainingRun, ending: Ending | None) -> str:
    steps = f"{run.model.steps_done:,} of {run.cfg.max_steps:,} steps"
    if run.cfg.ckpt:
        return f"evaluated, {run.cfg.ckpt}"
    return f"{'in training' if ending is None else ending.status}, {steps}"


def _steps_had(run: TrainingRun) -> int:
    """Count the steps that the model has had."""
    return run.last_step if run.cfg.ckpt else run.model.steps_done


def held_out(measured: Measured) -> list[HeldOut]:
    """Return some held-out views, evenly from all of them."""
    names = list(measured.pictures)
    chosen = np.unique(np.linspace(0, len(names) - 1, MOST_VIEWS).round().astype(int))[: len(names)]
    views = []
    for name in (names[index] for index in chosen):
        pair = halves(measured.pictures[name])
        if pair is None:
            continue
        shown = {figure.key: figure for figure in FIGURES}
        figures = ", ".join(f"{shown[key].title} {shown[key].show(x)}" for key, x in measured.views[name].items())
        photo, rendering = (Picture(what, data_uri(half)) for what, half in zip(("photo", "model"), pair, strict=True))
        views.append(HeldOut(name, figures, photo, rendering))
    return views


def options_given(cfg: Config) -> list[tuple[str, object, object]]:
    """Return the options that differ from the defaults: name, value, default."""
    given, default = (in_effect(asdict(each)) for each in (cfg, type(cfg)()))
    return [(name, value, default[name]) for name, value in given.items() if value != default[name]]


def commands(run: TrainingRun) -> list[tuple[str, str]]:
    """Return commands that belong to a run, each with what it does."""
    found = []
    if not run.cfg.ckpt:
        found.append(("train it anew (give another --result_dir)", train_command(run.remedy)))
        found.append(("go on with it", resume_command(run.remedy)))
    newest = Path(run.cfg.ckpt) if run.cfg.ckpt else _newest((run.results.path / "ckpts").glob("ckpt_*.pt"))
    if newest is not None:
        found.append(("evaluate it", evaluate_command(newest, run.remedy)))
        found.append(("look at it", script_command("view.py", str(newest))))
        target = run.results.path / "model.sog"
        found.append(("take it away", script_command("export.py", str(newest), "--to", str(target))))
    return found


def findings(folder: Path, steps: int, background: str) -> list[tuple[str, Path, str]]:
    """Return what there is to look at in a result folder: what it is, where, and how to look at it.

    Args:
        folder: The result folder.
        steps: That the model has had. What a run before has left there of another step is called so.
        background: That it is trained before, as the option.
    """
    videos = [file for name in NAMES for file in (folder / "videos").glob(f"{name}_*.mp4")]
    models, pictures = (folder / "ply").glob("point_cloud_*.ply"), (folder / "renders").glob("val_step*_*.png")
    posed = steps_of(folder)
    timelapse = folder / VIDEO
    made = timelapse.stat().st_mtime_ns if timelapse.is_file() else 0
    frames = (frame for frame in (folder / FRAMES).glob("step_*.jpg") if frame.stat().st_mtime_ns <= made)  # it shows
    model, picture, video, frame = (_newest(files) for files in (models, pictures, videos, frames))
    behind = not_held(background)
    lacks = f"; trained before {behind}, which it does not hold" if behind else ""
    newest = {
        "Model": (model, f"for viewers of Gaussian splats, or view.py{lacks}", _unless(steps, model)),
        "Pictures": (folder / "renders", "held-out photos, each beside what the model draws", _unless(steps, picture)),
        "Video": (video, "", _unless(steps, video)),
        "Timelapse": (timelapse, "of the training", _unless(steps, frame, "up to")),
        "Poses": (
            None if posed is None else folder / POSES,
            f"cameras of step {posed}, corrected where trained on",
            "",
        ),
        "Report": (folder / NAME, "for a browser", ""),
    }
    return [
        (what, path, ", ".join(filter(None, (how, of_step))))
        for what, (path, how, of_step) in newest.items()
        if path is not None and (path.is_file() or (path.is_dir() and any(path.iterdir())))
    ]


def _unless(steps: int, file: Path | None, of: str = "of") -> str:
    """Return of which step a file is, by the number in its name; nothing where it is of the model's own."""
    number = None if file is None else re.search(r"\d+", file.stem)
    return "" if number is None or int(number[0]) == steps else f"{of} step {int(number[0])}"


def say_where(run: TrainingRun) -> None:
    """Print where the results of a run are, and how to look at them."""
    found = findings(run.results.path, _steps_had(run), run.cfg.background)
    widest = max((len(what) for what, _, _ in found), default=0)
    for what, path, how in found:
        tqdm.write(f"{what + ':':{widest + 1}} {path}{f'  ({how})' if how else ''}")


def _newest(paths: Iterable[Path]) -> Path | None:
    """Return the file that was written last; None where there is none."""
    return max(paths, key=lambda path: path.stat().st_mtime_ns, default=None)
