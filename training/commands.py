"""Commands that go on with a run, to be copied into a shell in the same folder."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import MappingProxyType

from configs import Config
from distributed.mesh import is_one_of_several, local_ranks
from option_words import without_options
from trainers import Smaller

MEETING_PORT = 29500  # the default of torch.distributed, where a machine has no reason for another


def started_in() -> str:
    """Return the folder where this run was started, in which commands can be given; empty where it is removed."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return ""


def given_command() -> str:
    """Return the command that started this run."""
    return shlex.join([*_launcher(), *sys.argv])


def train_command(changes: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return the command that begins this run anew: that which started it, without --resume, --new_photos and --force.

    Args:
        changes: Values of options in place of those that were given.
    """
    return shlex.join([*_launcher(), *_words("resume", "new_photos", "force", *changes), *_given(changes)])


def script_command(name: str, *arguments: str) -> str:
    """Return the command that starts another script of the suite, from where this run was started."""
    return shlex.join([_interpreter(), _as_typed(Path(__file__).parents[1] / name), *arguments])


def resume_command(changes: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return the command that continues this run: the one that started it, and --resume; else as `train_command`."""
    return _command([*_words("resume", "force", "init_ckpt", *changes), *_given(changes)])


def evaluate_command(checkpoint: Path, changes: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return the command that evaluates a checkpoint with the options of this run; else as `train_command`."""
    beginning = ("resume", "new_photos", "force", "init_ckpt", "ckpt")
    words = _words(*beginning, "timelapse", "profile", "viewer", "viewer_host", *changes)
    return shlex.join([_interpreter(), *words, *_given(changes), "--ckpt", str(checkpoint)])


def _words(*without: str) -> list[str]:
    """Return the words of the command line that started this run, without these options and their values."""
    return without_options(sys.argv, without)


def _given(options: Mapping[str, str]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", value.replace(" ", ""))]


def smaller_command(smaller: Smaller, scene: str, cfg: Config) -> str:
    """Return the command that continues a run where it needs less memory.

    Args:
        smaller: The other script, and options that it needs.
        scene: What is trained on.
        cfg: The options that were given; those that the other trainer does not have are left out.
    """
    options = replace(smaller.cfg(cfg, scene), resume=False, force=False, init_ckpt="")
    arguments = arguments_of(options, smaller.trainer.load().CONFIGS[scene])
    return _command([_as_typed(smaller.trainer.path), scene, *arguments])


def arguments_of(cfg: Config, default: Config) -> list[str]:
    """Return the words of a command line that make these options from a scene's."""
    words = []
    for item in fields(cfg):
        value = getattr(cfg, item.name)
        if value == getattr(default, item.name):
            continue
        if isinstance(value, bool):
            words.append(f"--{item.name}" if value else f"--no-{item.name}")
        else:
            words += [f"--{item.name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def _command(script_and_arguments: list[str]) -> str:
    return shlex.join([*_launcher(), *script_and_arguments, "--resume"])


def _launcher() -> list[str]:
    """Return how a script is started as this one was: by Python, or by torchrun."""
    interpreter = _interpreter()
    if not is_one_of_several():
        return [interpreter]
    torchrun = ["torchrun"] if shutil.which("torchrun") else [interpreter, "-m", "torch.distributed.run"]
    return [*torchrun, *(_words_of_torchrun() or _options_for_torchrun())]


def _words_of_torchrun() -> list[str]:
    """Return the options of the torchrun that has started this process; none where they cannot be seen."""
    try:
        words = os.fsdecode(Path(f"/proc/{os.getppid()}/cmdline").read_bytes()).split("\0")[:-1]
    except OSError:
        return []
    names = [place for place, word in enumerate(words) if Path(word).name in ("torchrun", "torch.distributed.run")]
    is_seen = names and words[-len(sys.argv) :] == sys.argv
    return words[names[0] + 1 : -len(sys.argv)] if is_seen else []


def _options_for_torchrun() -> list[str]:
    """Return options with which torchrun starts as many processes as there are."""
    processes, machines = str(local_ranks()), int(os.environ.get("GROUP_WORLD_SIZE") or "1")
    if machines == 1:
        return ["--standalone", "--nproc_per_node", processes]
    meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{os.environ.get('MASTER_ADDR', 'HOST')}:{MEETING_PORT}"]
    return ["--nnodes", str(machines), "--nproc_per_node", processes, *meeting]


def _interpreter() -> str:
    """Return how a shell calls the Python that runs this."""
    found = shutil.which("python")
    is_on_path = found and os.path.dirname(found) == os.path.dirname(sys.executable)
    return "python" if is_on_path else _as_typed(Path(sys.executable))


def _as_typed(path: Path) -> str:
    """Return how a person names a file where this run was started: from there, where it lies below."""
    folder = started_in()
    return str(path.relative_to(folder) if folder and path.is_relative_to(folder) else path)
