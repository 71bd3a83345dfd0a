"""Writes a comparison of runs: comparison.md, comparison.json and comparison.html, which needs no network."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from comparing.pictures import AMPLIFIED, compared_views
from comparing.runs import FINISHED, Run
from reporting import charts
from reporting.figures import Figure, line_charts, shown_figures
from reporting.machine import sentence
from reporting.page import render_page
from training.files import write_file
from training.pose_files import FOLDER as POSES

NAME = "comparison"
NO_BREAK = "\u00a0"  # a space where no line ends


@dataclass(frozen=True)
class Comparison:
    """Hold what is reported."""

    title: str
    runs: Sequence[Run]
    command: str
    date: str
    machine: dict[str, object]  # where the report is made

    @property
    def first(self) -> Run:
        """Return the run that the others are compared with."""
        return self.runs[0]

    @property
    def figures(self) -> list[Figure]:
        """Return the columns of its table."""
        return shown_figures(run.figures for run in self.runs)


def ratio(run: Run, first: Run, key: str) -> float | None:
    """Return a figure over that of the first run; None where there is no sense in it."""
    value, reference = run.figures.get(key), first.figures.get(key)
    return None if value is None or not reference else value / reference


@dataclass(frozen=True)
class Difference:
    """Hold the difference of the mean of a figure over the held-out views to that of the first run."""

    mean: float
    standard_error: float | None  # as the views differ among each other; None where their figures are not known


def difference(run: Run, first: Run, key: str) -> Difference | None:
    """Return the difference; None where one of the runs has no such figure."""
    value, reference = run.figures.get(key), first.figures.get(key)
    if value is None or reference is None:
        return None
    of_views = [
        figures[key] - first.views[name][key]
        for name, figures in run.views.items()
        if key in figures and key in first.views.get(name, {})
    ]
    is_whole = 2 <= len(of_views) == len(run.views) == len(first.views)
    error = float(np.std(of_views, ddof=1)) / math.sqrt(len(of_views)) if is_whole else None
    return Difference(value - reference, error)


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write all three files; each replaces the one before only when it is complete."""
    texts = {"json": as_json(comparison), "md": as_markdown(comparison), "html": as_html(comparison)}
    paths = []
    for suffix, text in texts.items():
        paths.append(folder / f"{NAME}.{suffix}")
        write_file(paths[-1], text)
    return paths


def as_json(comparison: Comparison) -> str:
    runs = []
    for run in comparison.runs:
        content = {**asdict(run), "folder": str(run.folder)}
        content["pictures"] = {name: str(path) for name, path in run.pictures.items()}
        content["ratios"] = {figure.key: ratio(run, comparison.first, figure.key) for figure in comparison.figures}
        compared = [figure.key for figure in comparison.figures if figure.digits is not None]
        differences = {key: difference(run, comparison.first, key) for key in compared}
        content["differences"] = {key: each and asdict(each) for key, each in differences.items()}
        runs.append(content)
    content = {
        "title": comparison.title,
        "date": comparison.date,
        "command": comparison.command,
        "machine": comparison.machine,
        "complete": all(run.status == FINISHED for run in comparison.runs),
        "runs": runs,
    }
    return json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"


def _finite(value: object) -> object:
    """Return the same with null for what JSON has no number for, such as the loss of a run that has diverged."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cells(run: Run, comparison: Comparison) -> list[str]:
    """Return the texts of a run's figures, with its difference or ratio to the first run in brackets."""
    texts, first = [], comparison.first
    for figure in comparison.figures:
        value = run.figures.get(figure.key)
        if value is None:
            texts.append("-")
            continue
        text = figure.show(value)
        if run is not first:
            text += _compared(run, first, figure)
        texts.append(text)
    return texts


def _compared(run: Run, first: Run, figure: Figure) -> str:
    if figure.digits is None:
        times = ratio(run, first, figure.key)
        return "" if times is None else f" ({times:.2f}x)"
    found = difference(run, first, figure.key)
    if found is None or not math.isfinite(found.mean):  # as between pictures without any error
        return ""
    mean = round(found.mean, figure.digits) + 0.0  # and not -0
    error = "" if found.standard_error is None else f"{NO_BREAK}±{NO_BREAK}{found.standard_error:.{figure.digits}f}"
    return f" ({mean:+.{figure.digits}f}{error})"


def status_of(run: Run) -> str:
    return run.status if run.status == FINISHED or not run.steps else f"{run.status}, figures of step {run.steps}"


def as_markdown(comparison: Comparison) -> str:
    heads = ["run", "status", "steps", *(figure.title for figure in comparison.figures)]
    lines = [f"# {_markdown(comparison.title)}", "", comparison.date, ""]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for run in comparison.runs:
        steps = f"{run.steps:,}" if run.steps else "-"
        row = [_markdown(run.name), status_of(run), steps, *cells(run, comparison)]
        lines.append(f"| {' | '.join(row)} |")
    lines += ["", EXPLANATION]
    for run in comparison.runs:
        if run.message:
            lines += ["", f"{_markdown(run.name)}: {run.status}. {_markdown(run.message)}"]
    for line in corrected_poses(comparison):
        lines += ["", _markdown(line)]
    stages = {run.name: run.stages_ms for run in comparison.runs if run.stages_ms}
    if stages:
        names = list(charts.stage_colors(stages.values()))
        lines += ["", "Mean milliseconds of each stage of a step:", ""]
        lines += [f"| run | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        for name, times in stages.items():
            values = (f"{times[stage]:.2f}" if stage in times else "" for stage in names)
            lines.append(f"| {_markdown(name)} | {' | '.join(values)} |")
    lines += ["", "## Machine", "", *(f"{_markdown(machine)}\n" for machine in machines(comparison))]
    commands = [comparison.command]
    for run in comparison.runs:
        if run.command:
            commands += [f"# {' '.join(run.name.split())}", run.command]
    fence = "`" * max(3, *(1 + len(ticks) for ticks in re.findall("`+", "\n".join(commands))), 3)
    lines += ["## Commands", "", f"{fence}bash", *commands, fence]
    return "\n".join(lines) + "\n"


def _markdown(text: str) -> str:
    """Return a name or sentence as Markdown that shows it as it is, on one line and in one cell of a table."""
    line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*\[\]|#~]|(?<!\w)_|_(?!\w))", r"\\\1", line)


EXPLANATION = (
    "In brackets: the difference to the first run for PSNR, SSIM and LPIPS, the ratio to it for all else. After ± "
    "stands the standard error of that difference, from how it varies over the held-out views: twice as much may be "
    "chance, and two runs of one trainer on a GPU differ too. Wall time runs from the start of training to its "
    "statistics, evaluations included. Time per step is the mean of the steps since the statistics before, without "
    "evaluation and saving. Memory is the peak of the process."
)


def corrected_poses(comparison: Comparison) -> list[str]:
    """Return where the cameras are that runs have corrected, one sentence per run."""
    return [
        f"{run.name}: the corrected cameras are in {run.folder / POSES}."
        for run in comparison.runs
        if run.figures.get("pose_turn_median") is not None
    ]


def machines(comparison: Comparison) -> list[str]:
    """Return where the runs were made, one sentence per machine; runs started by hand do not say."""
    found: dict[str, list[str]] = {}
    for run in comparison.runs:
        if run.machine:
            found.setdefault(sentence(run.machine), []).append(run.name)
    if len(found) == 1 and sum(map(len, found.values())) == len(comparison.runs):
        return [f"{machine}." for machine in found]
    unknown = [run.name for run in comparison.runs if not run.machine and run.options]
    return [
        *(f"{', '.join(names)}: {machine}." for machine, names in found.items()),
        *([f"Not recorded: {', '.join(unknown)}."] if unknown else []),
        f"This report: {sentence(comparison.machine)}.",
    ]


def as_html(comparison: Comparison) -> str:
    runs = [
        {
            "run": run,
            "color": charts.color(index),
            "status": status_of(run),
            "cells": list(zip([figure.title for figure in comparison.figures], cells(run, comparison), strict=True)),
        }
        for index, run in enumerate(comparison.runs)
    ]
    stages = charts.stage_colors(run.stages_ms for run in comparison.runs)
    return render_page(
        Path(__file__).parent / "page.html",
        comparison=comparison,
        runs=runs,
        finished=FINISHED,
        figures=comparison.figures,
        explanation=EXPLANATION,
        poses=corrected_poses(comparison),
        charts=line_charts([run.curves for run in comparison.runs], compared=True),
        stages=stages,
        stage_chart=charts.stage_bars({run.name: run.stages_ms for run in comparison.runs}, stages),
        views=compared_views(comparison.runs),
        amplified=AMPLIFIED,
        options=differing(comparison.runs),
        machines=machines(comparison),
    )


def differing(runs: Sequence[Run]) -> dict[str, list[object]]:
    """Return the options that are not the same in all runs, with each run's value ('' where it has none)."""
    names = dict.fromkeys(name for run in runs for name in run.options)
    values = {name: [run.options.get(name, "") for run in runs] for name in names if name != "result_dir"}
    return {name: each for name, each in values.items() if any(value != each[0] for value in each)}
