"""The command line of a trainer script: SCENE and options in, one sentence out where they cannot be used."""

from __future__ import annotations

import inspect
import os
import socket
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, make_dataclass
from pathlib import Path
from typing import Any

import tyro

from configs import (
    AnyConfig,
    Config,
    DataOptions,
    DensificationRules,
    ModelOptions,
    OptimizationOptions,
    RunOptions,
)
from distributed.mesh import is_first_of_machine, is_one_of_several, leave, let_first_tell
from errors import EndedElsewhere, InputError, TrainingStopped, telling_unreadable
from offload.errors import sentence_of
from option_words import asks_for_help, field_of, is_option, written_out
from trainers import TRAINERS, trainer_of
from training.ending import (
    FINISHED,
    INTERRUPTED,
    NOT_BEGUN,
    Ending,
    ending_of,
    read_ending,
    without_memory,
    write_ending,
)
from training.folder_lock import FolderTaken
from training.report import say_where, write_report
from training.results import check_result_dir, folder_of
from training.run import TrainingRun
from training.streams import silent_output, unbreakable_output

# The groups of --help in their order, by what they are called there; the options of a script alone come last.
GROUPS: dict[str, type] = {
    "data": DataOptions,
    "run": RunOptions,
    "optimization": OptimizationOptions,
    "densification": DensificationRules,
    "model": ModelOptions,
}
OWN_GROUP = "this_script"


def main(configs: Mapping[str, AnyConfig], train: Callable[[TrainingRun[AnyConfig]], None], description: str) -> None:
    """Parse `SCENE [--option value ...]`, train, and exit.

    The exit code is 0 when training ended or was interrupted with a checkpoint, 1 when it had to stop (with a
    checkpoint), 2 when something in the input cannot be used, and 130 after a second Ctrl-C. ended.json in the result
    folder says the same to programs (`training.ending`).

    Args:
        configs: The options of each scene, which the command line overrides.
        train: The training loop, in the file of its script.
        description: Of the script, for --help.
    """
    with unbreakable_output():
        try:
            _main(configs, train, description)
        finally:
            leave()  # when all is said: NCCL may wait for ranks that are gone


def _main(configs: Mapping[str, AnyConfig], train: Callable[[TrainingRun[AnyConfig]], None], description: str) -> None:
    folder: Path | None = None
    run: TrainingRun[AnyConfig] | None = None
    try:
        with silent_output(silent=not is_first_of_machine()):  # all read the same command
            try:
                scene, cfg = parse(configs, sys.argv[1:], description)
                with telling_unreadable():
                    check_result_dir(cfg)
            except (InputError, SystemExit):
                let_first_tell()
                raise
        with telling_unreadable():
            folder = folder_of(cfg)
        trainer = trainer_of(Path(inspect.getfile(train)).stem, cfg)
        with TrainingRun(cfg, scene, trainer) as run:
            train(run)
        if run.speaks:
            _conclude(run, run.ending)
        return
    except FolderTaken as error:  # what lies there is another run's
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    except InputError as error:
        ending, exit_code = ending_of(error, f"Error: {_of_rank(sentence_of(error))}"), 2
    except EndedElsewhere:
        sys.exit(1)
    except TrainingStopped as error:
        ending, exit_code = ending_of(error, f"Stopped: {_of_rank(str(error))}"), 1
    except KeyboardInterrupt as error:
        if not str(error) and not is_first_of_machine():  # before the ranks could agree on who tells
            sys.exit(130)
        ending, exit_code = Ending(INTERRUPTED, str(error) or (NOT_BEGUN if run is None else run.standing)), 130
    except Exception as error:
        told = without_memory(error)
        if not told:  # a defect: whoever mends it wants to see where
            _write_ending(folder, run, ending_of(error, f"{type(error).__name__}: {error}"))
            raise
        ending, exit_code = ending_of(error, f"Stopped: {_of_rank(told)}"), 1
    _write_ending(folder, run, ending)
    if folder is not None or is_first_of_machine():
        print(ending.message, file=sys.stderr)
    sys.exit(exit_code)


def _conclude(run: TrainingRun[AnyConfig], ending: Ending) -> None:
    """Write how a run ended, for programs and for people, and say where what it leaves is; nothing where it failed."""
    write_ending(run.results.path, ending)
    write_report(run, ending)
    if ending.status in (FINISHED, INTERRUPTED):
        say_where(run)


def _of_rank(sentence: str) -> str:
    """Return a sentence that begins with the rank that says it, where several processes train together."""
    is_said = not is_one_of_several() or sentence.startswith(("rank ", "The environment has "))
    return sentence if is_said else f"rank {os.environ.get('RANK', '0')} ({socket.gethostname()}): {sentence}"


def _write_ending(folder: Path | None, run: TrainingRun[AnyConfig] | None, ending: Ending) -> None:
    """Say how a run ended; one that was refused takes no place of another that says so of itself."""
    if run is not None and run.results.has_begun:
        _conclude(run, ending)
    elif folder is not None and read_ending(folder) is None:
        write_ending(folder, ending)


def parse(configs: Mapping[str, AnyConfig], arguments: list[str], description: str) -> tuple[str, AnyConfig]:
    """Return the scene and its options, from `SCENE [--option value ...]`; exit after --help.

    Raises:
        InputError: The scene is unknown, an option is one of other scripts or of none, or its value cannot be read.
    """
    (config_type,) = {type(config) for config in configs.values()}
    scene = arguments[0] if arguments and not is_option(arguments[0]) else ""
    if scene or not asks_for_help(arguments):
        check_scene(scene, configs)
    if not asks_for_help(arguments):
        words = arguments[1:]
        _refuse_options_of_others(config_type, words)
        arguments = [scene, *written_out(config_type, words, alone=True)]
    grouped_type = _grouped_type(config_type)
    grouped = tyro.extras.overridable_config_cli(
        {name: (f"Options of scene {name}.", _grouped(config, grouped_type)) for name, config in configs.items()},
        args=arguments,
        description=description,
    )
    options = {name: value for group in vars(grouped).values() for name, value in vars(group).items()}
    return arguments[0], config_type(**options)


def check_scene(scene: str, configs: Collection[str]) -> None:
    """Refuse a command that names none of the scenes that there are.

    Args:
        scene: The first word of the command; empty where that is an option, or missing.
        configs: The names of the scenes.

    Raises:
        InputError: With these names.
    """
    if not scene:
        raise InputError(f"No scene is named: begin with one of {', '.join(configs)}, and give options behind it.")
    if scene not in configs:
        raise InputError(f"Scene {scene!r} is unknown: choose one of {', '.join(configs)}.")


def _refuse_options_of_others(config_type: type[Config], words: list[str]) -> None:
    """Say of an option that this script lacks which ones have it.

    Raises:
        InputError: There is one.
    """
    own = {item.name for item in fields(config_type)}
    for name in (field_of(word) for word in words if is_option(word)):
        if name.removeprefix("no_") in own:  # where no other script need be loaded
            continue
        scripts = {each.path.name: each.load().CONFIGS["default"] for each in TRAINERS.values()}
        having = sorted(script for script, config in scripts.items() if name in {item.name for item in fields(config)})
        if having:
            raise InputError(f"--{name} is an option of {', '.join(having)}, and not of this script: leave it out.")


def groups_of(config: type[Config]) -> dict[str, type]:
    """Return the groups of --help: the classes that declare a trainer's options, the script's own last."""
    own = [base for base in config.__bases__ if not issubclass(base, Config)] if config is not Config else []
    return {**GROUPS, OWN_GROUP: own[0]} if own else GROUPS


def _grouped(config: Config, grouped_type: type) -> Any:
    """Return the same options as an object of groups, which tyro shows one after the other."""
    groups = groups_of(type(config))
    values = {
        title: group(**{item.name: getattr(config, item.name) for item in fields(group)})
        for title, group in groups.items()
    }
    return grouped_type(**values)


def _grouped_type(config: type[Config]) -> type:
    flat = tyro.conf.OmitArgPrefixes
    return make_dataclass("Options", [(title, flat[group]) for title, group in groups_of(config).items()])
