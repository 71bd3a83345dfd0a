"""Options: what values they may have, and what --help says of them."""

from __future__ import annotations

import importlib
import itertools
import math
import re
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import get_type_hints
from unittest.mock import Mock

import pytest
import yaml

import compare
import export
import simple_trainer
import simple_trainer_hybrid_optimized_split
import simple_trainer_hybrid_streamed
import view
from configs import MCMC_REGULARIZER, SPLIT_THRESHOLD, Config, in_effect
from datasets import prepare, reconstruct
from errors import InputError
from option_words import parse as read_options
from option_words import whole_number, written_out
from trainers import TRAINERS
from training import command_line, run
from training.checkpoint_folder import SaveSchedule
from training.command_line import groups_of, parse
from training.commands import arguments_of
from training.options import RANGES, check_options
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


@pytest.mark.parametrize(
    ("given", "owner"),
    [
        ({"new_photos": True}, {"resume": True}),
        ({"viewer_host": "0.0.0.0"}, {"viewer": [80]}),
        ({"trajectory": "orbit"}, {"video": True}),
        ({"video_seconds": 1.0}, {"video": True}),
        ({"video_size": [64, 64]}, {"video": True}),
        ({"video_depth": True}, {"video": True}),
        ({"noise_lr": 1.0}, {"strategy": "mcmc", "max_gaussians": 900}),
        ({"depth_lambda": 2.0}, {"depth_loss": True}),
        ({"pose_opt_lr": 1e-3}, {"pose_opt": True}),
        ({"pose_opt_reg": 2.0}, {"pose_opt": True}),
        ({"resident_share": 0.2}, {"state": "compact"}),
    ],
    ids=str,
)
def test_an_option_without_the_one_that_it_belongs_to_is_refused(given, owner):
    cfg = simple_trainer_hybrid_streamed.CONFIGS["default"]
    (name,), (option, value), *_ = given, *owner.items()
    said = f"--{option} {value}" if isinstance(value, str) else f"--{option}"
    with pytest.raises(InputError, match=f"^--{name} is of {said}: give that, too.$"):
        check_options(replace(cfg, **given))
    check_options(replace(cfg, **given, **owner))
    check_options(replace(cfg, **owner))


@pytest.mark.parametrize("given", [{"timelapse": 9}, {"profile": 5}, {"new_photos": True}], ids=str)
def test_what_is_of_a_training_is_refused_where_a_checkpoint_is_evaluated(given):
    (name,) = given
    with pytest.raises(InputError, match=f"^--{name} is of a training, and --ckpt evaluates a model: leave it out.$"):
        check_options(Config(ckpt="a.pt", **given))


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
    assert "0 sets no bound, as --target_gaussians wants it." in bound
    assert "With strategy default let growth end within 5 % of this many Gaussians" in target
    assert "It excludes --max_gaussians: give that as 0 where the scene has one of its own, as demo has." in target
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
    assert capsys.readouterr().err == (
        "Error: --stat is no option of this script: give --strategy, if that is meant, or see --help.\n"
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_whole_numbers_are_read_as_people_write_them(script):
    hints = get_type_hints(type(script.CONFIGS["default"]))
    names = [name for name, kind in hints.items() if kind is int or kind in LISTS]
    assert {"max_steps", "target_gaussians", "seed", "eval_steps", "viewer"} <= {*names}
    written = {"1e6": 10**6, "1.5e6": 1_500_000, "30_000": 30_000, "7.0": 7, "-1e0": -1, "9007199254740993": 2**53 + 1}
    for word, number in written.items():
        for name in names:  # with the sign of equality, and without
            assert written_out(type(script.CONFIGS["default"]), ["--" + name, word]) == ["--" + name, str(number)]
            assert written_out(type(script.CONFIGS["default"]), [f"--{name}={word}"]) == [f"--{name}={number}"]
    of_names = dict(zip(names, itertools.cycle(written), strict=False))
    words = [word for name, value in of_names.items() for word in ("--" + name, value)]
    _, cfg = parse(script.CONFIGS, ["default", *words, "--eval-steps=1e3", "2_000"], "")
    for name, word in {**of_names, "eval_steps": ""}.items():
        wanted = [1000, 2000] if name == "eval_steps" else written[word] if hints[name] is int else [written[word]]
        assert getattr(cfg, name) == wanted
        assert type(getattr(cfg, name)) is type(wanted)


@pytest.mark.parametrize("word", ["1.5", "1e-3", "1M", "1,000", "x", "", "nan", "inf", "1e999999999", "1e-999999999"])
def test_what_is_no_whole_number_is_refused(word):
    with pytest.raises(ValueError, match=f"^{re.escape(word)}$"):
        whole_number(word)
    with pytest.raises(InputError, match=r"must be a whole number, such as 30000, 30_000 or 3e4\.$"):
        parse(simple_trainer.CONFIGS, ["default", f"--max_steps={word}"], "")


MISTAKES = (
    ("default --max_steps 1.5", "--max_steps is '1.5', but must be a whole number"),
    ("default --max_steps=", "--max_steps is '', but must be a whole number"),
    ("default --target_gaussians 1M", "--target_gaussians is '1M', but must be a whole number"),
    ("default --max_steps", "--max_steps has no value: give a whole number"),
    ("default --max_steps 5 6", "--max_steps takes one value, but '6' stands behind it: leave that out"),
    ("default --eval_steps 7000,30000", "--eval_steps is '7000,30000', but must be whole numbers with spaces"),
    ("default --video_size 640x480", "--video_size is '640x480', but must be a width and a height, such as 1280 720."),
    ("default --viewer on", "--viewer is 'on', but must be a port, such as 8080, or nothing."),
    ("default --viewer 8080 8081", "--viewer has 2 numbers, but must be one port, such as 8080."),
    ("default --result_dir=", "--result_dir is empty: name a folder, such as results/garden."),
    ("default --data_dir=", "--data_dir is empty: name a dataset's folder, such as data/garden."),
    ("default --position_lr 0,01", "--position_lr is '0,01', but must be a number, such as 0.5 or 1e-4."),
    ("default --opacity_reg small", "--opacity_reg is 'small', but must be a number"),
    ("default --data_factor", "--data_factor has no value: give a number"),
    ("default --strategy MCMC", "--strategy is 'MCMC', but must be default or mcmc."),
    ("default --device gpu", "--device is 'gpu', but must be auto, cuda or cpu."),
    ("default --background", "--background has no value: give black, white, random or sky."),
    ("default --resume true", "--resume takes no value, but 'true' stands behind it: give --resume or --no_resume"),
    ("default --no_resume=1", "--no_resume takes no value, but '1' stands behind it: give --resume or --no_resume"),
    ("default --data_dir my photos", "--data_dir takes one value, but 'photos' stands behind it"),
    ("default --data_dir --resume", "--data_dir has no value: give one, or --data_dir=-x where it begins with a dash."),
    ("default --max_step 5", "--max_step is no option of this script: give --max_steps, if that is meant"),
    ("default -max_steps 5", "-max_steps is no option of this script: give --max_steps, if that is meant"),
    ("default --no_max_steps", "--no_max_steps is no option of this script: give --max_steps, if that is meant"),
    ("default --quietly", "--quietly is no option of this script: leave it out, or see --help."),
    ("default 5", "'5' belongs to no option: leave it out, or name its option before it."),
    ("--max_steps 5", "No scene is named: begin with one of demo, "),
    ("", "No scene is named: begin with one of demo, "),
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_mistakes_are_told_in_one_sentence_with_a_remedy(monkeypatch, tmp_path, capsys, script):
    monkeypatch.chdir(tmp_path)
    for line, sentence in MISTAKES:
        assert train(monkeypatch, script, *line.split()) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith(f"Error: {sentence}")
        assert len(said.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_options_that_may_be_none_are_given_as_such():
    words = ["default", "--opacity_reg", "None", "--viewer", "None", "--device_memory_budget", "None"]
    _, cfg = parse(simple_trainer_hybrid_optimized_split.CONFIGS, words, "")
    assert (cfg.opacity_reg, cfg.viewer, cfg.device_memory_budget) == (None, None, None)


def test_other_programs_read_and_refuse_alike(monkeypatch, capsys, tmp_path):
    words = ["--to", "a.sog", "model.pt", "--max_gaussians", "1e6", "--unknown", "1e6"]
    assert written_out(export.Options, words) == ["model.pt", "--to", "a.sog", "--max_gaussians", "1000000", *words[5:]]
    assert written_out(export.Options, ["--max_gaussians", "x", "--help"]) == ["--max_gaussians", "x", "--help"]
    for program, line, said in (
        (export, "model.pt --to a.sog --max_gaussians many", "--max_gaussians is 'many', but must be a whole number"),
        (export, "model.pt --to a.sog --up x", "--up is 'x', but must be "),
        (view, "model.pt --port", "--port has no value: give a port, such as 8080."),
        (view, "model.pt --port http", "--port is 'http', but must be a port, such as 8080."),
        (export, "model.pt --to=", "--to is '', but must be the name of a file or folder."),
        (compare, "demo --result_dir=", "--result_dir is '', but must be the name of a file or folder."),
        (view, "model.pt --device gpu", "--device is 'gpu', but must be auto, cuda or cpu."),
        (export, "model.pt --to a.sog --device cpu", "--device is no option of this script: leave it out"),
        (export, "model.pt --to a.sog more.pt", "--to takes one value, but 'more.pt' stands behind it"),
        (export, "model.pt more.pt --to a.sog", "'more.pt' belongs to no option: leave it out"),
        (export, "model.pt", "--to is missing: give it, or see --help."),
        (export, "--to a.sog", "No model is named: begin with one"),
        (view, "--port 1", "No model is named: begin with one"),
        (view, "--model model.pt", "--model is no option of this script: leave it out"),
        (view, "model.pt --antialiased yes", "--antialiased takes no value, but 'yes' stands behind it"),
        (view, "--antialiased=yes model.pt", "--antialiased takes no value, but 'yes' stands behind it"),
        (compare, "demo --force=yes", "--force takes no value, but 'yes' stands behind it"),
        (prepare, "nowhere", "Argument DATASET: invalid choice: 'nowhere'"),
        (prepare, "rubble --source", "Argument --source: expected one argument: see --help."),
        (reconstruct, "photos --out=", "Argument --out: no file or folder is named: see --help."),
        (prepare, "rubble --data_dir=", "Argument --data_dir: no file or folder is named: see --help."),
        (reconstruct, "photos", "The following arguments are required: --out: see --help."),
    ):
        monkeypatch.setattr(sys, "argv", ["program.py", *line.split()])
        with pytest.raises(SystemExit) as stop:
            program.main()
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith(f"Error: {said}")
        assert len(error.splitlines()) == 1


def test_a_model_may_be_named_behind_options():
    for words in ("model.pt --to a.ply --plain", "--to a.ply model.pt --plain", "--plain model.pt --to=a.ply"):
        assert read_options(export.Options, words=words.split()) == export.Options(
            Path("model.pt"), Path("a.ply"), plain=True
        )


def test_periodic_checkpoints_are_counted_alike():
    schedule = SaveSchedule("1e3")
    assert [steps for steps in (500, 1000, 1500, 2000) if schedule.is_due(steps)] == [1000, 2000]
    for word in ("-5", "1.5", "1e-3m", "m", ""):
        with pytest.raises(InputError, match=r"--save_every is .* but must be steps"):
            SaveSchedule(word)


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


def test_help_names_what_holds_where_nothing_is_given(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    assert train(monkeypatch, simple_trainer_hybrid_optimized_split, "default", "--help") == 0
    text = " ".join(re.sub(r"[^\w .;,:%()-]", "", capsys.readouterr().out).split())
    for name, said in (
        ("opacity-reg", f"{MCMC_REGULARIZER} with mcmc and else 0 where nothing is given"),
        ("scale-reg", f"{MCMC_REGULARIZER} with mcmc and else 0 where nothing is given"),
        ("split-threshold", f"{SPLIT_THRESHOLD} where nothing is given"),
    ):
        assert said in text.split(f"--{name} ", 1)[1].split("(default: ")[0]


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
