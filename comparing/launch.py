"""Runs trainer scripts one after the other, each in a fresh process, and says how each of them ended."""

from __future__ import annotations

import ctypes
import datetime
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from io import BufferedReader
from pathlib import Path
from types import FrameType
from typing import cast

from comparing.runs import (
    LAUNCH,
    Launch,
    differing_options,
    is_finished,
    read_options,
    write_launch,
)
from configs import Config
from datasets.model_choice import load_sparse_model
from errors import InputError, heard_signals
from option_words import field_of, option_groups, unknown_option, without_options
from reporting.machine import describe_machine
from trainers import TRAINERS, Trainer
from training.command_line import check_scene, parse
from training.ending import FAILED, FINISHED, INTERRUPTED, OUT_OF_MEMORY, Ending, forget_ending, read_ending
from training.files import open_new
from training.folder_lock import check_free
from training.options import check_options
from training.results import check_result_dir, holds_run, remove_run
from training.run import check_device
from training.streams import Unbreakable

PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None)  # loaded here: between fork and exec nothing may wait for a lock
_BAR = re.compile(rb"\d%\|.*\|")  # tqdm's; the last of a bar ends the line


@dataclass(frozen=True)
class Plan:
    """Hold a run that is wanted, from its beginning."""

    name: str
    folder: Path
    arguments: tuple[str, ...]  # of the Python interpreter
    cfg: Config
    checkpoint: Path | None = None  # that it goes on from; None: it begins anew

    @property
    def command(self) -> str:
        return shlex.join(["python", *self.arguments])


def plan(
    scene: str, names: Sequence[str], result_dir: Path, passed_on: Sequence[str], own_options: Sequence[str] = ()
) -> list[Plan]:
    """Return the runs of some trainers with one scene and the same options.

    Args:
        scene: As the trainer scripts take it.
        names: Keys of `TRAINERS`; results go to folders of these names.
        result_dir: Where those folders are.
        passed_on: Options for the trainers. One that only some trainers have is given to those.
        own_options: Names of those of the program itself, which a misspelt one may mean.

    Raises:
        InputError: A trainer, the scene or an option is unknown, a value cannot be read, or results would lie in a
            dataset's photos.
    """
    unknown = [name for name in names if name not in TRAINERS]
    if unknown or not names:
        found = unknown[0] if unknown else "nothing"
        raise InputError(f"--trainers names {found}: choose from {', '.join(TRAINERS)}.")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"--trainers names {twice} more than once: name each trainer once.")
    check_scene(scene, TRAINERS[names[0]].load().CONFIGS)
    first, *groups = option_groups(passed_on)
    if first:
        raise InputError(f"{first[0]!r} belongs to no option: name the scene first, then options.")
    known = set().union(*(_known_options(TRAINERS[name], scene) for name in names))
    for word in (group[0].partition("=")[0] for group in groups):
        if not word.startswith("--") or field_of(word) not in known:
            see = f"`python {TRAINERS[names[0]].path.name} {scene} --help`"
            of_all = sorted({*known, *own_options})
            raise InputError(unknown_option(word, of_all, "this script, nor of the trainers that it starts", see))
    plans = [_plan_of(name, scene, result_dir, groups) for name in names]
    for wanted in plans:
        _check_choice(wanted, scene)
    return plans


def _check_choice(wanted: Plan, scene: str) -> None:
    """Refuse options that choose among the trainers of a script: figures would stand under the name of another.

    Raises:
        InputError: They are given.
    """
    trainer = TRAINERS[wanted.name]
    meant = replace(trainer.load().CONFIGS[scene], **trainer.options)
    choosing = {name for entry in TRAINERS.values() if entry.script == trainer.script for name in entry.options}
    for name in sorted(choosing):
        given = getattr(wanted.cfg, name)
        if given != getattr(meant, name):
            raise InputError(
                f"--{name} {given} makes another trainer of {wanted.name}, under its name: leave it out, and choose "
                "with --trainers."
            )


def finished_beside(plans: Sequence[Plan], scene: str, result_dir: Path, passed_on: Sequence[str]) -> list[Plan]:
    """Return the runs of other trainers that lie in the same folder and are finished, with the same options.

    Args:
        plans: Those that are wanted.
        scene: As for `plan`, which has checked it.
        result_dir: As for `plan`.
        passed_on: As for `plan`.
    """
    groups = option_groups(passed_on)[1:]
    others = [
        name for name in TRAINERS if name not in {wanted.name for wanted in plans} and holds_run(result_dir / name)
    ]
    found = (_plan_of(name, scene, result_dir, groups) for name in others)
    return [run for run in found if is_finished(run.folder, run.cfg)]


def _plan_of(name: str, scene: str, result_dir: Path, groups: Sequence[Sequence[str]]) -> Plan:
    """Return the run of one trainer.

    Args:
        name: Key of `TRAINERS`.
        scene: As for `plan`.
        result_dir: As for `plan`.
        groups: Options with their values, of which it takes those that it has.

    Raises:
        InputError: It cannot be wanted of compare.py.
    """
    trainer, folder = TRAINERS[name], result_dir / name
    known = _known_options(trainer, scene)
    options = [word for group in groups if field_of(group[0]) in known for word in group]
    arguments = [scene, *options, *trainer.arguments, "--result_dir", str(folder)]
    _, cfg = parse(trainer.load().CONFIGS, arguments, trainer.path.name)
    if cfg.ckpt:
        raise InputError("--ckpt evaluates a checkpoint, and compare.py trains: leave it out.")
    if cfg.new_photos:
        raise InputError(
            "--new_photos goes on with one run: give it to that trainer, with --resume, or give --force in its place, "
            "which trains all of them on the photos that there are now."
        )
    if cfg.resume:
        raise InputError(
            "--resume is for a trainer: leave it out, since compare.py goes on by itself with what it finds."
        )
    check_result_dir(replace(cfg, result_dir=str(result_dir)))
    return Plan(name, folder, (os.path.relpath(trainer.path), *arguments), cfg)


def check_free_folders(plans: Sequence[Plan]) -> None:
    """Refuse to begin where a run of another process goes on.

    Raises:
        InputError: Naming the folder and the process.
    """
    for wanted in plans:
        check_free(wanted.folder)


def check_one_can_start(plans: Sequence[Plan], scene: str) -> None:
    """Refuse what each trainer would refuse, before the first is started: options, the device, the dataset's model.

    Args:
        plans: Those that are to be started.
        scene: What is trained on; the demo's dataset is made by the first trainer.

    Raises:
        InputError: In the words of the first trainer.
    """
    refused = []
    for wanted in plans:
        try:
            check_options(wanted.cfg)
            check_device(wanted.cfg.device)
        except InputError as error:
            refused.append(error)
    if refused and len(refused) == len(plans):
        raise refused[0]
    datasets = {(wanted.cfg.data_dir, wanted.cfg.model_dir) for wanted in plans if scene != "demo"}
    for data_dir, model_dir in datasets:  # one: the trainers have it of the command
        load_sparse_model(Path(data_dir), model_dir)


def check_nothing_is_lost(plans: Sequence[Plan]) -> None:
    """Refuse to replace runs that had other options.

    Raises:
        InputError: Naming the folder and the options.
    """
    for wanted in plans:
        options = read_options(wanted.folder)
        if not holds_run(wanted.folder):
            continue
        if options is None:
            raise InputError(
                f"{wanted.folder} holds a run whose cfg.yml cannot be read: choose another --result_dir, or give "
                "--force to replace it."
            )
        differences = differing_options(options, wanted.cfg)
        if differences:
            said = ", ".join(f"{name} {there} instead of {asked}" for name, (there, asked) in differences.items())
            raise InputError(
                f"{wanted.folder} holds a run with other options ({said}): choose another --result_dir, or give "
                "--force to replace it."
            )


def _known_options(trainer: Trainer, scene: str) -> set[str]:
    names = {item.name for item in fields(trainer.load().CONFIGS[scene])}
    return names | {f"no_{name}" for name in names}  # tyro's way to switch an option off


class Interruption:
    """Tell the trainers that run what asks this program to end (`errors.heard_signals`), and remember it.

    A trainer has a session of its own, so that it is told once: it ends its step and saves. At a second Ctrl-C it
    stops at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self.processes: set[subprocess.Popen] = set()
        self._untold: set[subprocess.Popen] = set()

    def __enter__(self) -> Interruption:
        self._before = {number: signal.signal(number, self._on_signal) for number in heard_signals()}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.request(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    def request(self, number: signal.Signals) -> None:
        """Tell all trainers that run to end, by this signal."""
        self.requested = True
        for process in list(self.processes):
            self._untold.discard(process)
            if process.poll() is None:
                process.send_signal(number)

    def add(self, process: subprocess.Popen) -> None:
        """Tell a trainer that has just begun of what is requested from now on, and of what has been before."""
        self._untold.add(process)
        self.processes.add(process)
        if self.requested and process in self._untold:  # else it has been told in the midst of these lines
            process.send_signal(signal.SIGINT)
        self._untold.discard(process)


def launch(wanted: Plan, interruption: Interruption, show: Callable[[str], None], *, anew: bool = False) -> Launch:
    """Run a trainer to its end; everything it prints but its progress goes to log.txt in its result folder.

    Several threads may do so at the same time.

    Args:
        wanted: What to run. An unfinished run with the same options is continued from its last checkpoint; after
            its last step it makes what is missing.
        interruption: Told of the process.
        show: Called with each line of progress.
        anew: Whether to begin anew in any case.
    """
    options = read_options(wanted.folder)
    arguments = list(wanted.arguments)
    # Without a checkpoint, as after a crash, --resume would begin from the photos' points in place of --init_ckpt.
    is_lost = bool(wanted.cfg.init_ckpt) and not any((wanted.folder / "ckpts").glob("ckpt_*.pt"))
    if anew or options is None or is_lost or differing_options(options, wanted.cfg):
        remove_run(wanted.folder)
        if wanted.checkpoint is not None:
            (wanted.folder / "ckpts").mkdir(parents=True, exist_ok=True)
            (wanted.folder / "ckpts" / "ckpt_0.pt").symlink_to(wanted.checkpoint.resolve())
            arguments += ["--resume"]
    else:
        arguments = [*without_options(arguments, ["init_ckpt"]), "--resume"]
    (wanted.folder / LAUNCH).unlink(missing_ok=True)
    forget_ending(wanted.folder)  # a trainer that cannot start leaves it
    said = ""
    with os.fdopen(open_new(wanted.folder / "log.txt"), "w") as file:
        log = Unbreakable(file)  # a full disk costs the log alone
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        interruption.add(process)
        for line, is_progress in _lines(cast(BufferedReader, process.stdout)):
            show(line)
            if not is_progress:
                log.write(line + "\n")
                said = line.strip() or said
        exit_code = process.wait()
        log.end()
        interruption.processes.discard(process)
    ending = _ending(exit_code, said, read_ending(wanted.folder), whole=is_finished(wanted.folder, wanted.cfg))
    result = Launch(
        command=shlex.join(["python", *arguments]),
        status=ending.status,
        message=ending.message,
        exit_code=exit_code,
        date=datetime.datetime.now().isoformat(" ", "seconds"),
        machine=describe_machine(),
    )
    write_launch(wanted.folder, result)
    return result


def _end_with_parent() -> None:
    """Have Linux send this process SIGTERM when the one that started it dies: a trainer then saves, and ends."""
    if sys.platform == "linux":
        _LIBC.prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))


def _ending(exit_code: int, said: str, ending: Ending | None, *, whole: bool) -> Ending:
    """Return how a trainer ended.

    Args:
        exit_code: Of the process.
        said: The last line that it printed.
        ending: What it says itself; None where it did not come to that.
        whole: Whether all results are there.
    """
    if exit_code == 0 and whole:
        return Ending(FINISHED)
    if exit_code == -signal.SIGKILL:
        return Ending(OUT_OF_MEMORY, "Killed by the system, most likely since host memory ran out.")
    if ending is None:
        stopped = exit_code in (130, -signal.SIGINT, -signal.SIGTERM)
        return Ending(INTERRUPTED if stopped else FAILED, said)
    if ending.status == FINISHED:
        return Ending(FAILED, "It ended without the statistics of its last step; --force begins it anew.")
    return ending


def _lines(stream: BufferedReader) -> Iterator[tuple[str, bool]]:
    """Yield lines of a program, and whether each is one of a progress bar, which the next one overwrites."""
    rest = b""
    while chunk := stream.read1(65536):
        *parts, rest = re.split(rb"(\r\n|\n|\r)", rest + chunk)
        for text, end in zip(parts[::2], parts[1::2], strict=True):
            if text.strip():
                yield text.decode(errors="replace"), end == b"\r" or _BAR.search(text) is not None
    if rest:
        yield rest.decode(errors="replace"), False
