"""Options: what values they may have, and what --help says of them."""

from __future__ import annotations

import importlib
import math
import re
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import get_type_hints
from unittest.mock import Mock

import pytest
import yaml

import simple_trainer
import simple_trainer_hybrid_optimized_split
import simple_trainer_hybrid_streamed
from configs import Config
from errors import InputError
from trainers import TRAINERS
from training import command_line, run
from training.command_line import groups_of, parse
from training.commands import arguments_of
from training.options import RANGES, check_options, in_effect
from training.report import options_given
from training.results import ResultFolder

ROOT = Path(__file__).parents[1]
SCRIPTS = [importlib.import_module(path.stem) for path in sorted(ROOT.glob("simple_trainer*.py"))]
LISTS = {list[int], list[int] | None}
NUMBERS = {int, float, float | None, *LISTS}


OTHERS = ("optimized", "optimized_split", "streamed")


def train(monkeypatch, script, *arguments: object) -> int:
    """Run a script in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        command_line.main(script.CONFIGS, script.train, "test")
    return stop.value.code


def numbers_of(config: type[Config]) -> set[str]:
    return {name for name, kind in get_type_hints(config).items() if kind in NUMBERS}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_number_has_a_range_and_every_scene_keeps_it(script):
    assert numbers_of(type(script.CONFIGS["default"])) <= RANGES.keys()
    for config in script.CONFIGS.values():
        check_options(config)


def test_every_range_is_of_an_option():
    assert set.union(*(numbers_of(type(script.CONFIGS["default"])) for script in SCRIPTS)) == RANGES.keys()


@pytest.mark.parametrize("name", RANGES)
def test_numbers_out_of_range_are_refused(name):
    scripts = {
        "split_threshold": simple_trainer_hybrid_optimized_split,
        "resident_share": simple_trainer_hybrid_streamed,
    }
    script = scripts.get(name, simple_trainer)
    default, kind = script.CONFIGS["default"], get_type_hints(type(script.CONFIGS["default"]))[name]
    wrong = [-2, RANGES[name].high + 1] if kind is int or kind in LISTS else [math.nan, math.inf, -math.inf, -1.0, 1e31]
    for value in wrong:
        cfg = replace(default, **{name: [value] if kind in LISTS else value})
        shown = re.escape(f"{value:,}" if isinstance(value, int) else str(value))
        bounds = r"(at least|above) \S+ and (at most|below) \S+"
        with pytest.raises(InputError, match=rf"^--{name} is {shown}, but must be {bounds}( \([^\n]*\))?\.$"):
            check_options(cfg)


def test_nothing_is_loaded_before_options_are_looked_at(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "load_dataset", lambda *_, **__: pytest.fail("loaded"))
    results = tmp_path / "results"
    assert train(monkeypatch, simple_trainer, "default", "--position_lr=nan", "--result_dir", results) == 2
    assert capsys.readouterr().err == "Error: --position_lr is nan, but must be at least 0 and at most 10.\n"
    assert not results.exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--near_plane", 5, "--far_plane", 2], "--near_plane is 5.0 and --far_plane 2.0"),
        (["--steps_scaler", 1e-5, "--max_steps", 100], "--steps_scaler 1e-05 makes 0 of the 100 steps of --max_steps"),
        (["--refine_every", 0], "--refine_every is 0, but must be at least 1 and at most 1,000,000,000,000."),
        (["--reset_every", 0], "--reset_every is 0, but must be at least 1 and at most 1,000,000,000,000."),
        (
            ["--sh_degree_interval", 0],
            "--sh_degree_interval is 0, but must be at least 1 and at most 1,000,000,000,000.",
        ),
        (
            ["--target_gaussians", 10**13],
            "--target_gaussians is 10,000,000,000,000, but must be at least 0 and at most 1,000,000,000,000 ",
        ),
        (["--noise_lr", "1e30"], "--noise_lr is 1e+30, but must be at least 0 and at most 1e+12."),
        (["--seed", -1], "--seed is -1, but must be at least 0"),
        (["--num_workers", 100_000], "--num_workers is 100,000, but must be at least 0 and at most 256"),
        (["--position_lr", "1e30"], "--position_lr is 1e+30, but must be at least 0 and at most 10."),
        (["--init_scale", "nan"], "--init_scale is nan, but must be above 0 and at most 1,000."),
        (["--ssim_lambda", 2], "--ssim_lambda is 2.0, but must be at least 0 and at most 1."),
        (["--max_steps", 10, "--profile", 5], "--profile is 5, but must leave 22 of the 10 steps of --max_steps"),
        (["--save_every", "soon"], "--save_every is 'soon', but must be steps"),
        (
            ["--shares", "0", "1"],
            "--shares is 0, but must be at least 1 and at most 1,000 (every rank holds some; ",
        ),
        (["--strategy", "mcmc"], "--strategy mcmc grows to a bound: give --max_gaussians"),
        (
            ["--strategy", "mcmc", "--target_gaussians", 9],
            "--target_gaussians is of --strategy default: mcmc grows to --max_gaussians, give that in its place.",
        ),
        (
            ["--target_gaussians", 900, "--max_gaussians", 800],
            "--target_gaussians 900 and --max_gaussians 800, given or the scene's own, both say "
            "where growth ends: give --max_gaussians 0 too, or no target.",
        ),
        (["--ckpt", "a.pt", "--resume"], "--ckpt evaluates a checkpoint and --resume trains on"),
    ],
)
def test_the_sentence_names_option_value_and_range(options, sentence):
    _, cfg = parse(simple_trainer.CONFIGS, ["default", *map(str, options)], "")
    with pytest.raises(InputError, match=re.escape(sentence)):
        check_options(cfg)


def test_residents_are_of_a_compact_state():
    cfg = simple_trainer_hybrid_streamed.CONFIGS["default"]
    check_options(replace(cfg, state="compact", resident_share=0.2))
    with pytest.raises(InputError, match="--resident_share is of --state compact: give that, too"):
        check_options(replace(cfg, resident_share=0.2))


def test_rules_that_mcmc_makes_no_use_of_are_named_before_anything_is_loaded(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "load_dataset", Mock(side_effect=InputError("Here it would be loaded.")))
    common = ("default", "--device", "cpu", "--result_dir", tmp_path, "--max_gaussians", 900, "--refine_every", 50)
    others = ("--absgrad", "--grow_grad2d", 8e-4, "--reset_every", 3000)  # the last is as it is by itself
    said = []
    for options in (("--strategy", "mcmc"), ("--strategy", "mcmc", *others), others):
        assert train(monkeypatch, simple_trainer, *common, *options) == 2
        said.append(capsys.readouterr().out)
    sentence = "--strategy mcmc makes no use of --grow_grad2d, --absgrad: such rules are of --strategy default.\n"
    assert said == ["", sentence, ""]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_help_is_in_groups_and_has_a_sentence_for_every_option(monkeypatch, capsys, script):
    monkeypatch.setenv("COLUMNS", "100")  # wider ones are set in two columns
    assert train(monkeypatch, script, "default", "--help") == 0
    printed = capsys.readouterr().out
    _, *sections = re.split(r"^\W+ ([\w-]+) options \W+$", printed.split(" options ", 1)[1], flags=re.MULTILINE)
    config = type(script.CONFIGS["default"])
    own = ["this-script"] if len(fields(config)) > len(fields(Config)) else []
    assert sections[::2] == ["data", "run", "optimization", "densification", "model", *own]
    for section, group in zip(sections[1::2], groups_of(config).values(), strict=True):
        text = " ".join(re.sub(r"^\W (.*) \W$", r"\1", line) for line in section.splitlines())
        text = " ".join(text.split())
        for item in fields(group):
            option = ("--no-" if isinstance(item.default, bool) else "--") + item.name.replace("_", "-")
            said = re.split(rf"{option} ", text, maxsplit=1)[1].split("(default: ")[0]
            assert re.search(r"\w+ \w+.*\. $", said), f"{option} {said}"


def test_help_says_how_a_target_and_a_bound_go_together(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    assert train(monkeypatch, simple_trainer, "demo", "--help") == 0
    text = " ".join(re.sub(r"[^\w .;,:%()-]", "", capsys.readouterr().out).split())
    bound, target = (text.split(f"--{name}-gaussians ", 1)[1].split("(default: ")[0] for name in ("max", "target"))
    assert "0 sets no bound, as target_gaussians wants it." in bound
    assert "With strategy default let growth end within 5 % of this many Gaussians" in target
    assert "It excludes max_gaussians: give that as 0 where the scene has one of its own, as demo has." in target
    _, cfg = parse(simple_trainer.CONFIGS, ["demo", "--target_gaussians", "30000"], "")
    with pytest.raises(InputError, match=r"--max_gaussians 40,000, .*: give --max_gaussians 0 too, or no target\.$"):
        check_options(cfg)
    check_options(replace(cfg, max_gaussians=0))


@pytest.mark.parametrize("words", [["--state=compact"], ["--state", "compact"]])
def test_an_option_of_other_scripts_is_told_as_such(monkeypatch, capsys, words):
    baseline = TRAINERS["baseline"].load()
    assert train(monkeypatch, baseline, "default", *words) == 2
    scripts = ", ".join(f"simple_trainer{kind}.py" for kind in ("", *(f"_hybrid_{each}" for each in OTHERS)))
    assert capsys.readouterr().err == (
        f"Error: --state is an option of {scripts}, and not of this script: leave it out.\n"
    )
    assert train(monkeypatch, baseline, "default", "--stat", "compact") == 2  # of no script
    assert "Unrecognized" in capsys.readouterr().err


NONE_IS_NONE = {"viewer", "device_memory_budget"}  # options that follow from no other: None says that there is none


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_what_held_is_written_where_nothing_was_given(script, tmp_path):
    for given, weight in (({"strategy": "mcmc", "max_gaussians": 9}, 0.01), ({}, 0.0), ({"opacity_reg": 0.5}, 0.0)):
        cfg = replace(script.CONFIGS["default"], result_dir=str(tmp_path), **given)
        results = ResultFolder(cfg)
        results.begin(0)
        results.close()
        written = yaml.safe_load((tmp_path / "cfg.yml").read_text())
        assert {name for name, value in written.items() if value is None} <= NONE_IS_NONE
        assert (written["opacity_reg"], written["scale_reg"]) == (given.get("opacity_reg", weight), weight)
        assert written.get("split_threshold", 0.3) == 0.3
        assert list(written) == [item.name for item in fields(cfg)]


def test_a_budget_leaves_the_threshold_out():
    cfg = replace(simple_trainer_hybrid_optimized_split.CONFIGS["default"], device_memory_budget="6GiB")
    assert in_effect(asdict(cfg))["split_threshold"] is None


def test_the_report_names_what_a_strategy_brings():
    assert options_given(Config(strategy="mcmc")) == [
        ("strategy", "mcmc", "default"), ("opacity_reg", 0.01, 0.0), ("scale_reg", 0.01, 0.0)
    ]  # fmt: skip


def test_every_option_is_in_one_group():
    for script in SCRIPTS:
        config = type(script.CONFIGS["default"])
        names = [item.name for group in groups_of(config).values() for item in fields(group)]
        assert sorted(names) == sorted(item.name for item in fields(config))


def test_options_that_are_written_down_are_read_again():
    script = simple_trainer_hybrid_streamed
    words = ["--geometry", "host", "--antialiased", "--eval_steps", "3", "5", "--position_lr", "1e-05", "--ckpt", "a b"]
    _, cfg = parse(script.CONFIGS, ["rubble", *words], "")
    written = arguments_of(cfg, script.CONFIGS["rubble"])
    assert sorted(written) == sorted(words)
    assert parse(script.CONFIGS, ["rubble", *written], "")[1] == cfg


def test_address_space_is_for_what_growth_can_reach():
    """A target needs no more than twice its number, where a system reserves less than memory could hold."""
    assert (Config().most_gaussians, Config(max_gaussians=7).most_gaussians) == (0, 7)
    assert Config(target_gaussians=7).most_gaussians == 14
