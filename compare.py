"""Trains a scene in several ways, one after the other, and shows the difference.

    python compare.py SCENE --data_dir D --result_dir R [--trainers gpu_only optimized ...] [--any_option ...]
    python compare.py --runs results/a results/b [--result_dir R]

Each trainer (trainers.py) runs in a fresh process and writes to its own folder in R; options that compare.py does not
have are passed on to all of them. comparison.md, comparison.json and comparison.html are written to R after each
trainer. What every trainer would refuse is refused before the first of them starts; a trainer that fails is reported,
and the rest go on. The same command again leaves runs that are finished as they are, and continues the others. With
other --trainers, finished runs of the same options stay in the report.
"""

from __future__ import annotations

import datetime
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import tyro

import startup  # noqa: F401, before torch is imported
from comparing.launch import (
    Interruption,
    Plan,
    check_free_folders,
    check_nothing_is_lost,
    check_one_can_start,
    finished_beside,
    launch,
    plan,
)
from comparing.report import Comparison, write
from comparing.runs import (
    FINISHED,
    Run,
    check_one_scene,
    differing_options,
    is_finished,
    read_launch,
    read_options,
    read_run,
)
from distributed.mesh import refuse_several
from errors import InputError, refusing
from option_words import parse_own
from reporting.figures import FIGURES
from reporting.machine import describe_machine
from trainers import TRAINERS
from training.streams import unbreakable_output


@dataclass
class Options:
    scene: tyro.conf.Positional[str] = ""
    """A scene of the trainer scripts, such as demo or default."""
    result_dir: Path = Path("results/comparison")
    """Folder of the report, and of one result folder for each trainer."""
    trainers: tuple[str, ...] = tuple(TRAINERS)
    """Which trainers, in this order; ratios are to the first."""
    force: bool = False
    """Begin all runs anew, also those that are finished or had other options; their folders are emptied."""
    runs: tuple[Path, ...] = ()
    """Compare these result folders, and train nothing."""


def main() -> None:
    """Compare runs, or train and compare.

    The exit code is 0 when all runs have finished, 1 when one has not, 2 for bad input, and 130 after Ctrl-C.
    """
    with refusing():
        refuse_several("compare.py starts each trainer")
        options, passed_on = parse_own(Options, __doc__)
    with unbreakable_output():
        _main(options, passed_on)


def _main(options: Options, passed_on: Sequence[str]) -> None:
    try:
        with refusing():
            sys.exit(compare_runs(options, passed_on) if options.runs else train_all(options, passed_on))
    except KeyboardInterrupt:  # before the first trainer has been started
        sys.exit(130)


def compare_runs(options: Options, passed_on: Sequence[str]) -> int:
    """Report on result folders that are there.

    Raises:
        InputError: Options that only training has a use for, a folder without a run, or runs of several scenes.
    """
    if options.scene or passed_on:
        raise InputError(f"--runs trains nothing, so {options.scene or passed_on[0]} has no use: leave it out.")
    names = [path.resolve().name for path in options.runs]
    if len(set(names)) < len(names):
        names = [str(path) for path in options.runs]
    runs = [read_run(name, path) for name, path in zip(names, options.runs, strict=True)]
    check_one_scene(runs)
    for run in runs:
        print(f"{run.name}: {outcome(run)}")
    report(f"Comparison of {', '.join(names)}", runs, options.result_dir)
    return 0


def train_all(options: Options, passed_on: Sequence[str]) -> int:
    """Train a scene in all wanted ways, and report after each.

    Raises:
        InputError: Options that cannot be used; nothing has been started.
    """
    own = [item.name for item in fields(Options) if item.name != "scene"]
    plans = plan(options.scene, options.trainers, options.result_dir, passed_on, own)
    check_free_folders(plans)
    if not options.force:
        check_nothing_is_lost(plans)
    check_one_can_start(
        [wanted for wanted in plans if options.force or not is_finished(wanted.folder, wanted.cfg)], options.scene
    )
    beside = finished_beside(plans, options.scene, options.result_dir, passed_on)
    if beside:
        print(
            f"The report also shows what has finished with the same options: {', '.join(run.name for run in beside)}."
        )
    title, shown = f"Comparison of trainers on {options.scene}", [*plans, *beside]
    report(title, [result_of(each) for each in shown], options.result_dir)  # or learn at once that it cannot be
    with Interruption() as interruption:
        for number, wanted in enumerate(plans, start=1):
            head = f"[{number}/{len(plans)}] {wanted.name}: "
            if is_finished(wanted.folder, wanted.cfg) and not options.force:
                print(f"{head}{outcome(result_of(wanted))}, before", flush=True)
            elif not interruption.requested:
                launch(wanted, interruption, partial(show_progress, head=head), anew=options.force)
                show_progress("")
                print(head + outcome(result_of(wanted)), flush=True)
                report(title, [result_of(each) for each in shown], options.result_dir)
    print(f"See {options.result_dir / 'comparison.html'}")
    if interruption.requested:
        return 130
    return 0 if all(is_finished(each.folder, each.cfg) for each in plans) else 1


def report(title: str, runs: Sequence[Run], result_dir: Path) -> None:
    """Write the three files.

    Raises:
        InputError: They cannot be written.
    """
    comparison = Comparison(
        title=title,
        runs=runs,
        command=shlex.join(["python", *sys.argv]),
        date=datetime.datetime.now().isoformat(" ", "minutes"),
        machine=describe_machine(),
    )
    try:
        write(comparison, result_dir)
    except OSError as error:
        raise InputError(f"{result_dir} cannot be written ({error.strerror}): choose another --result_dir.") from error


def result_of(wanted: Plan) -> Run:
    """Return what there is of a wanted run in its folder."""
    options, launched = read_options(wanted.folder), read_launch(wanted.folder)
    if options is not None and not differing_options(options, wanted.cfg):
        run = read_run(wanted.name, wanted.folder)
        return replace(run, command=run.command or wanted.command)
    run = Run(wanted.name, wanted.folder, command=wanted.command)
    if launched is None or not launched.command.startswith(wanted.command):
        return run
    return replace(run, status=launched.status, message=launched.message, machine=launched.machine)


def outcome(run: Run) -> str:
    """Return a run in a few words."""
    if run.status != FINISHED:
        return f"{run.status}. {run.message}".strip()
    values = ((figure, run.figures.get(figure.key)) for figure in FIGURES)
    return ", ".join([run.status, *(f"{figure.title} {figure.show(value)}" for figure, value in values if value)])


def show_progress(line: str, head: str = "") -> None:
    """Replace the last line of a terminal; nothing where the output goes elsewhere."""
    if sys.stdout.isatty():
        print("\r\x1b[K" + (head + line)[: shutil.get_terminal_size().columns - 1], end="", flush=True)


if __name__ == "__main__":
    main()
