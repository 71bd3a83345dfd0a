"""Every command that the documents name is one that its program takes, and those for the demo scene run."""

from __future__ import annotations

import contextlib
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import compare
import export
import view
from benchmarks import quality
from comparing.launch import plan
from datasets import prepare, reconstruct
from errors import InputError
from option_words import parse, parse_own
from trainers import TRAINERS
from training import command_line

ROOT = Path(compare.__file__).parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
SCRIPTS = {trainer.path.name: trainer for trainer in TRAINERS.values()}
OWN_PARSERS = ("tests.fault_trials", "tests.fuzz_readers", "tests.measured_memory", "tests.data.make_gsplat_golden")


def commands_of(text: str) -> list[str]:
    """Find commands that call Python, in fenced blocks and in inline code, without those with a gap, `...` or NAME."""
    text = text.replace("\\\n", " ")
    lines = [line for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    inline = re.findall(r"`(python [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    commands = [part.strip() for line in (*lines, *inline) for part in line.split("&&")]
    commands = [command for command in commands if command.startswith("python ")]
    return [" ".join(command.split()) for command in commands if not re.search(r"\.\.\.|NAME", command)]


COMMANDS = sorted({command for document in DOCUMENTS for command in commands_of(document.read_text())})
ON_THE_DEMO = [command for command in COMMANDS if re.match(r"python simple_trainer\w*\.py demo\b", command)]
DEMO_COMMANDS = list({command.split()[1]: command for command in ON_THE_DEMO}.values())  # the last one of each script


def check_command(command: str, results: Path) -> None:
    """Parse a command as its program does; what the program would do with its options is not begun."""
    program, *arguments = shlex.split(command, comments=True)[1:]
    if program == "-m":
        program, *arguments = arguments
    if program in SCRIPTS:
        command_line.parse(SCRIPTS[program].load().CONFIGS, arguments, "test")
    elif program == "compare.py":
        options, passed_on = parse_own(compare.Options, words=arguments)
        if options.runs:
            assert not passed_on, command
        else:
            plan(options.scene, options.trainers, results, passed_on)
    elif program == "export.py":
        export._check(parse(export.Options, words=arguments))
    elif program == "view.py":
        parse(view.Options, words=arguments)
    elif program == "datasets.prepare":
        prepare._parse(arguments)
    elif program == "benchmarks.quality":  # passes options on to the trainers
        options, passed_on = quality.parse(arguments)
        plan("default", options.trainers, results, passed_on)
    elif program == "datasets.reconstruct":
        reconstruct._check_options(reconstruct._parse(arguments))
    elif program.startswith("benchmarks."):
        parse(importlib.import_module(program).Options, words=arguments)
    elif program not in ("benchmarks", *OWN_PARSERS):
        pytest.fail(f"{command!r} calls {program}, of which this test does not know how it reads its options")


def anchors_of(text: str) -> set[str]:
    """Name the headings of a page as links to them do: in lower case, without punctuation, words joined by hyphens."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_what_the_documents_link_to_is_there():
    for document in DOCUMENTS:
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", document.read_text()):
            name, _, anchor = link.partition("#")
            target = (document.parent / name).resolve() if name else document
            assert target.exists(), (document.name, link)
            if anchor:
                assert anchor in anchors_of(target.read_text()), (document.name, link)


def test_the_documents_name_commands():
    assert len(COMMANDS) >= 10
    assert DEMO_COMMANDS


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_documents_is_one_that_its_program_takes(command, tmp_path):
    with pytest.raises(SystemExit, match=r"^0$") if "--help" in command else contextlib.nullcontext():
        check_command(command, tmp_path)


@pytest.mark.parametrize(
    "command",
    [
        "python simple_trainer.py nowhere",
        "python simple_trainer.py demo --max_stepss 5",
        "python simple_trainer.py demo --max_steps many",
        "python simple_trainer_hybrid_optimized.py demo --geometry moon",
        "python view.py",
        "python compare.py demo --max_stepss 5",
        "python compare.py demo --trainers fastest",
        "python export.py ckpt.pt --to model.obj",
        "python export.py ckpt.pt --to model.spz --plain",
        "python -m benchmarks.train_step --stepss 5",
        "python -m benchmarks.quality --data_dirr data",
        "python -m benchmarks.nothing",
        "python -m datasets.prepare nowhere",
        "python unknown.py",
    ],
)
def test_a_wrong_command_would_be_noticed(command, tmp_path):
    with pytest.raises((InputError, SystemExit, ModuleNotFoundError, pytest.fail.Exception)):
        check_command(command, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("command", DEMO_COMMANDS)
def test_the_demo_runs_as_the_documents_say(command, city_block, tmp_path):
    """With few steps on small pictures, from a folder where nothing else is."""
    script, *arguments = shlex.split(command, comments=True)[1:]
    few = ["--max_steps", "5", "--device", "cpu", "--data_dir", city_block, "--result_dir", tmp_path / "results"]
    if "--target_gaussians" in arguments:  # to be reached in so few steps, or it would be refused
        few += ["--target_gaussians", "700", "--refine_start_iter", "0", "--refine_every", "1"]
    run = [sys.executable, ROOT / script, *arguments, *few]
    ended = subprocess.run(list(map(str, run)), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "results/stats/val_step5.json").is_file()
