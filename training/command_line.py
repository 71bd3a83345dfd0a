"""The command line of a trainer script: SCENE and options in, one sentence out where they cannot be used."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping

import tyro

from configs import AnyConfig, Config
from errors import InputError
from offload.errors import ParameterError
from training.densification import TrainingStopped


def main(configs: Mapping[str, Config], train: Callable[[Config, str], None], description: str) -> None:
    """Parse `SCENE [--option value ...]`, train, and exit.

    The exit code is 0 when training ended or was interrupted with a checkpoint, 1 when it had to stop (with a
    checkpoint), and 2 when something in the input cannot be used.

    Args:
        configs: The options of each scene, which the command line overrides.
        train: The training loop; takes the options and the name of the scene.
        description: Of the script, for --help.
    """
    try:
        scene, cfg = parse(configs, sys.argv[1:], description)
        train(cfg, scene)
    except InputError as error:
        sentence = error.of_options() if isinstance(error, ParameterError) else error
        print(f"Error: {sentence}", file=sys.stderr)
        sys.exit(2)
    except TrainingStopped as error:
        print(f"Stopped: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("Stopped at once, without saving.", file=sys.stderr)
        sys.exit(130)


def resume_command() -> str:
    """The command that continues this run, to be copied into a shell in the same folder."""
    return _command(sys.argv)


def smaller_command() -> str:
    """The command that continues this run in the trainer that needs the next less device memory."""
    script, *arguments = sys.argv
    folder, name = os.path.split(script)
    with_geometry = ("simple_trainer_hybrid_optimized.py", "simple_trainer_hybrid_streamed.py")
    if name == "simple_trainer.py":
        name = "simple_trainer_hybrid_optimized.py"
    elif name in with_geometry and not re.search(r"--geometry[ =]host", " ".join(arguments)):
        arguments = [*arguments, "--geometry", "host"]  # the last one given counts
    else:
        name = "simple_trainer_hybrid_optimized_split.py"
        arguments = _without("--moments", arguments)  # which it does not have
    return _command([os.path.join(folder, name), *arguments])


def _without(option: str, arguments: list[str]) -> list[str]:
    """These arguments but for an option and its value."""
    is_value = [False, *(argument == option for argument in arguments)]
    return [
        argument
        for argument, skipped in zip(arguments, is_value, strict=False)
        if not skipped and argument.split("=")[0] != option
    ]


def _command(script_and_arguments: list[str]) -> str:
    arguments = [argument for argument in script_and_arguments if argument != "--resume"]
    return shlex.join([_interpreter(), *arguments, "--resume"])


def _interpreter() -> str:
    """How a shell calls the Python that runs this."""
    found = shutil.which("python")
    return "python" if found and os.path.dirname(found) == os.path.dirname(sys.executable) else sys.executable


def parse(configs: Mapping[str, AnyConfig], arguments: list[str], description: str) -> tuple[str, AnyConfig]:
    """The scene and its options, from `SCENE [--option value ...]`; exits where an option cannot be read.

    Raises:
        InputError: The scene is unknown.
    """
    if arguments and not arguments[0].startswith("-") and arguments[0] not in configs:
        raise InputError(f"Scene {arguments[0]!r} is unknown: choose one of {', '.join(configs)}.")
    cfg = tyro.extras.overridable_config_cli(
        {name: (f"Options of scene {name}.", config) for name, config in configs.items()},
        args=arguments,
        description=description,
    )
    return arguments[0], cfg
