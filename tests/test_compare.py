"""compare.py: all trainers in fresh processes, and reports that say what the run folders say, whatever happened."""

import dataclasses
import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
import yaml

import compare
import simple_trainer
import simple_trainer_hybrid_optimized
import simple_trainer_hybrid_optimized_split
from comparing import launch as launching
from comparing.launch import Interruption, Plan, check_nothing_is_lost, launch, plan
from comparing.runs import (
    LAUNCH,
    differing_options,
    is_complete,
    is_finished,
    read_run,
    write_launch,
)
from configs import Config
from errors import InputError, NotEnoughMemory, TrainingStopped
from reporting import charts
from reporting.charts import Curve
from tests.waiting import HANGS_AFTER, wait_until
from trainers import TRAINERS
from training import command_line
from training.checkpoint_writing import save_checkpoint
from training.checkpoints import Checkpoint
from training.ending import ENDED, Ending, read_ending, write_ending
from training.event_log import read_scalars
from training.gaussians import initial_gaussians
from training.measured import TRAIN_FIGURES, VAL_FIGURES

pytestmark = pytest.mark.charts
ROOT = Path(compare.__file__).parent


def run_compare(monkeypatch, *arguments: object) -> int:
    """compare.py in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        compare.main()
    return stop.value.code


def report_of(folder: Path) -> dict:
    """comparison.json, when the page and the Markdown tell the same and need nothing from outside."""
    content = json.loads((folder / "comparison.json").read_text())
    page, markdown = (folder / "comparison.html").read_text(), (folder / "comparison.md").read_text()
    assert not re.search(r'(src|href)="(?!data:|#)|(src|href)=[^"]|url\((?!#)|@import', page)
    for run in content["runs"]:
        assert f"| {run['name']} | {run['status']}" in markdown
        assert f">{run['status']}" in page
        assert run["command"] in markdown
    assert not list(folder.glob("*.partial"))
    return content


@pytest.mark.slow
def test_every_script_on_the_demo_scene(monkeypatch, city_block, tmp_path, capsys):
    """One trainer of each; all are what it runs unless it is told otherwise."""
    assert compare.Options.trainers == tuple(TRAINERS)
    first_of_script: dict[str, str] = {}
    for name, way in TRAINERS.items():
        first_of_script.setdefault(way.script, name)
    names = list(first_of_script.values())
    options = ("demo", "--data_dir", city_block, "--result_dir", tmp_path, "--device", "cpu", "--max_steps", 40)
    options = (*options, "--log_every", 10, "--eval_steps", 20, "--trainers", *names)
    assert run_compare(monkeypatch, *options) == 0
    report = report_of(tmp_path)
    assert report["complete"]
    assert [run["name"] for run in report["runs"]] == names
    first = report["runs"][0]
    for run in report["runs"]:
        folder = tmp_path / run["name"]
        train = json.loads((folder / "stats/train_step40.json").read_text())
        val = json.loads((folder / "stats/val_step40.json").read_text())
        assert run["figures"] == {
            **{key: train[key] for key in TRAIN_FIGURES},
            **{key: val[key] for key in VAL_FIGURES},
            "ms_per_step": sum(train["stages_ms"].values()),
        }
        assert run["stages_ms"] == train["stages_ms"]
        assert run["options"] == yaml.safe_load((folder / "cfg.yml").read_text())
        assert run["curves"]["loss"]["steps"] == list(range(10, 41, 10))
        assert run["curves"]["psnr"]["steps"] == [20, 40]
        assert run["curves"]["psnr"]["values"][-1] == pytest.approx(val["psnr"], rel=1e-6)
        assert all(second >= 0 for second in run["curves"]["loss"]["seconds"])
        assert run["ratios"]["psnr"] == run["figures"]["psnr"] / first["figures"]["psnr"]
        assert run["figures"]["psnr"] == pytest.approx(first["figures"]["psnr"], abs=0.1)
    assert first["ratios"]["ms_per_step"] == 1.0
    printed = capsys.readouterr().out
    assert all(f"] {name}: finished, PSNR" in printed for name in names)

    # Finished runs are not repeated, and not replaced by runs with other options.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/stats/*")}
    assert run_compare(monkeypatch, *options) == 0
    assert run_compare(monkeypatch, *options, "--seed", 1) == 2
    assert "seed 42 instead of 1" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/stats/*")} == before

    # Two of the folders, from another report.
    runs = (tmp_path / "gpu_only", tmp_path / "baseline")
    assert run_compare(monkeypatch, "--runs", *runs, "--result_dir", tmp_path / "again") == 0
    again = report_of(tmp_path / "again")["runs"]
    named = {run["name"]: run["figures"] for run in report["runs"]}
    assert [run["figures"] for run in again] == [named["gpu_only"], named["baseline"]]


@pytest.mark.slow
def test_a_failure_and_ctrl_c_leave_a_correct_partial_report(monkeypatch, city_block, tmp_path):
    (tmp_path / "gpu_only").mkdir()
    (tmp_path / "gpu_only" / "tb").write_text("a file where the trainer needs a folder")
    options = ["demo", "--data_dir", city_block, "--result_dir", tmp_path, "--device", "cpu", "--max_steps", 300]
    options += ["--eval_steps", 5, "--log_every", 5]
    process = subprocess.Popen(
        [sys.executable, "compare.py", *map(str, options), "--trainers", "gpu_only", "optimized", "baseline"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    evaluated = tmp_path / "optimized/stats/val_step5.json"
    wait_until(lambda: evaluated.is_file() or process.poll() is not None)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group of processes
    printed, _ = process.communicate(timeout=HANGS_AFTER)
    assert process.returncode == 130, printed

    report = report_of(tmp_path)
    assert not report["complete"]
    failed, interrupted, waiting = report["runs"]
    assert failed["status"] == "failed"
    assert "gpu_only cannot be written" in failed["message"]
    assert failed["figures"] == {}
    assert interrupted["status"] == "interrupted"
    assert "Interrupted after" in interrupted["message"]
    assert interrupted["steps"] == 5
    assert interrupted["figures"]["psnr"] == json.loads(evaluated.read_text())["psnr"]
    assert interrupted["figures"]["elapsed_seconds"] is None
    assert interrupted["curves"]["loss"]["steps"][0] == 5
    assert waiting["status"] == "not run"
    assert not (tmp_path / "baseline").exists()

    # The same command continues it, and evaluates it where only that is missing.
    steps_done = int(re.search(r"after (\d+) steps", interrupted["message"])[1])
    assert run_compare(monkeypatch, *options, "--trainers", "optimized") == 0
    (continued,) = report_of(tmp_path)["runs"]
    assert continued["status"] == "finished"
    assert f"Resuming after {steps_done} steps" in (tmp_path / "optimized/log.txt").read_text()
    assert continued["curves"]["loss"]["steps"] == list(range(5, 301, 5))
    seconds = continued["curves"]["loss"]["seconds"]
    assert seconds == sorted(seconds)
    # The statistics were taken after the last loss was logged, in float32, and before their file was written, whose
    # time may lag.
    logged = read_scalars(tmp_path / "optimized/tb")["train/loss"][-1].wall_time
    written = (tmp_path / "optimized/stats/train_step300.json").stat().st_mtime
    assert -1e-3 <= continued["figures"]["elapsed_seconds"] - seconds[-1] <= written - logged + 0.1
    (tmp_path / "optimized/stats/val_step300.json").unlink()
    assert run_compare(monkeypatch, *options, "--trainers", "optimized") == 0
    (evaluated_again,) = report_of(tmp_path)["runs"]
    # A checkpoint's rows are all current, so culling needs no margin for those that lag behind, and finds fewer rows
    # than it did beside training. exp() rounds by where a number stands among them: by as much may quality differ.
    for key, value in continued["figures"].items():
        tolerance = 1e-6 if key in VAL_FIGURES else 0
        expected = None if value is None else pytest.approx(value, rel=tolerance, abs=0)  # LPIPS may be missing
        assert evaluated_again["figures"][key] == expected, key


# ------------------------------------------------------------------------------------------------- single parts


def planned(folder: Path, code: str) -> Plan:
    """A run of a few lines of Python in place of a trainer."""
    return Plan("fake", folder, ("-c", code), simple_trainer.CONFIGS["default"])


def ended(tmp_path, code: str) -> tuple[str, str]:
    with Interruption() as interruption:
        result = launch(planned(tmp_path, code), interruption, lambda line: None)
    assert json.loads((tmp_path / LAUNCH).read_text())["status"] == result.status
    return result.status, result.message


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        ("import sys; sys.exit('no interpreter would run this')", "failed", "no interpreter would run this"),
        ("import os; os.kill(os.getpid(), 9)", "out of memory", "Killed by the system"),
        ("import os; os.kill(os.getpid(), 2)", "interrupted", "KeyboardInterrupt"),
        ("import os; os.kill(os.getpid(), 15)", "interrupted", ""),
        ("print('out of memory')", "failed", "out of memory"),
    ],
    ids=lambda value: value[:40],
)
def test_how_a_program_ended_that_does_not_say_it(tmp_path, code, status, message):
    write_ending(tmp_path, Ending("finished"))  # of the run before
    found, said = ended(tmp_path, code)
    assert (found, said[: len(message)]) == (status, message)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "exit_code", "status"),
    [
        (Ending("failed", "Error: no such file"), 2, "failed"),
        (Ending("out of memory", "Stopped: Device memory ran out after 5 steps"), 1, "out of memory"),
        (Ending("interrupted", "Interrupted after 3 steps; saved a.pt"), 0, "interrupted"),
        (Ending("finished"), 0, "failed"),  # its statistics are not there
    ],
)
def test_how_a_trainer_says_that_it_ended(tmp_path, ending, exit_code, status):
    code = (
        "import sys, pathlib; from training.ending import *; print('train: 3%|##   | 3/100'); "
        f"write_ending(pathlib.Path({str(tmp_path)!r}), {ending}); sys.exit({exit_code})"
    )
    found, said = ended(tmp_path, code)
    assert (found, ending.message in said) == (status, True)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError("no room"), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (NotEnoughMemory("Training 9 Gaussians takes 3 GiB, and 2 GiB are free: free memory."), "out of memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "out of memory"),
        (RuntimeError("a defect"), "failed"),
        (InputError("data/x does not exist: give another --data_dir."), "failed"),
        (ValueError("a defect"), "failed"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value,
)
def test_a_trainer_says_how_it_ended(monkeypatch, tmp_path, capsys, error, status):
    """Also where the error that the user sees was raised because of another."""
    for raised in (error, caused_by(error)):
        monkeypatch.setattr("sys.argv", ["script.py", "default", "--result_dir", str(tmp_path)])
        monkeypatch.setattr(command_line, "TrainingRun", mock.Mock(side_effect=raised))
        is_defect = not isinstance(raised, InputError | TrainingStopped) and status == "failed"
        with pytest.raises(type(raised) if is_defect else SystemExit):
            command_line.main(simple_trainer.CONFIGS, simple_trainer.train, "test")
        ending = read_ending(tmp_path)
        assert ending.status == status
        assert str(raised).removeprefix("[Errno 12] ").rstrip(".") in ending.message
        said = capsys.readouterr().err
        assert said == ("" if is_defect else f"{ending.message}\n")
        (tmp_path / ENDED).unlink()


def test_how_a_run_ended_is_told_with_the_run(monkeypatch, tmp_path):
    """So that a copy of the file, or one of many in an archive, can be told from others."""
    folder, elsewhere = tmp_path / "a run", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["script.py", "default", "--result_dir", "a run"])
    write_ending(Path("a run"), Ending("failed", "Error: no such file"))
    (folder / ENDED).rename(elsewhere / ENDED)
    said = json.loads((elsewhere / ENDED).read_text())
    assert (said["folder"], said["started_in"]) == (str(folder), str(tmp_path))
    assert said["command"].endswith("script.py default --result_dir 'a run'")
    assert read_ending(elsewhere) == Ending("failed", "Error: no such file")
    (elsewhere / ENDED).write_text('{"status": "finished", "message": ""}')  # as before the run was told
    assert read_ending(elsewhere) == Ending("finished")
    (elsewhere / ENDED).write_text('{"status": "finished"}')
    assert read_ending(elsewhere) is None


def caused_by(error: Exception) -> TrainingStopped:
    try:
        raise TrainingStopped("Training has stopped; the Gaussians are saved.") from error
    except TrainingStopped as stopped:
        return stopped


def test_progress_is_shown_and_kept_out_of_the_log(tmp_path):
    code = "print('\\rtrain:  1%|  | 1/2\\rtrain: 2%|# | 2/2\\nStep 2: PSNR 20 dB', end='')"
    shown = []
    with Interruption() as interruption:
        launch(planned(tmp_path, code), interruption, shown.append)
    assert shown == ["train:  1%|  | 1/2", "train: 2%|# | 2/2", "Step 2: PSNR 20 dB"]
    assert (tmp_path / "log.txt").read_text() == "Step 2: PSNR 20 dB\n"


@pytest.mark.parametrize("init", [["--init_ckpt", "a.ply"], ["--init-ckpt=a.ply"]])
def test_a_run_that_began_from_a_model_goes_on_without_it(tmp_path, init):
    """Which --resume excludes; its cfg.yml still says what it began from."""
    cfg = dataclasses.replace(simple_trainer.CONFIGS["default"], init_ckpt="a.ply")
    wanted = Plan("fake", tmp_path, ("-c", "import sys; print(sys.argv[1:])", "default", *init, "--seed", "3"), cfg)
    anew, going_on = ["default", *init, "--seed", "3"], ["default", "--seed", "3", "--resume"]
    (tmp_path / "ckpts").mkdir()
    for expected in (anew, anew, going_on):  # the second time nothing has been saved yet to go on from
        if expected is going_on:
            (tmp_path / "ckpts" / "ckpt_2.pt").touch()
        with Interruption() as interruption:
            launch(wanted, interruption, print)
        assert (tmp_path / "log.txt").read_text() == f"{expected}\n"
        (tmp_path / "cfg.yml").write_text(yaml.safe_dump({"max_steps": cfg.max_steps, "init_ckpt": "a.ply"}))


def test_a_trainer_is_told_once_of_each_ctrl_c(tmp_path):
    code = """
import os, signal, threading, time
told = threading.Event()
def tell(number, frame):
    print("told", flush=True)
    told.set()
signal.signal(signal.SIGINT, tell)
os.kill(os.getppid(), signal.SIGINT)
told.wait()
time.sleep(0.5)  # for a second time
"""
    before = signal.getsignal(signal.SIGINT)  # not the default one where a shell has started this in the background
    with Interruption() as interruption:
        launch(planned(tmp_path, code), interruption, lambda line: None)
    assert interruption.requested
    assert (tmp_path / "log.txt").read_text() == "told\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_nohup_is_heeded(tmp_path):
    code = "import os, signal; os.kill(os.getppid(), signal.SIGHUP)"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            launch(planned(tmp_path, code), interruption, lambda line: None)
        assert not interruption.requested
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("moment", ["before", "meanwhile", "after"])
def test_a_trainer_that_begins_as_ctrl_c_comes_is_told_once(moment):
    class Beginning:
        told = 0

        def poll(self) -> None:
            return None

        def send_signal(self, number: int) -> None:
            self.told += 1

    class Processes(set):
        def add(self, process: Beginning) -> None:
            super().add(process)
            if moment == "meanwhile":
                interruption.request(signal.SIGINT)

    interruption, process = Interruption(), Beginning()
    interruption.processes = Processes()
    if moment == "before":
        interruption.request(signal.SIGINT)
    interruption.add(process)
    if moment == "after":
        interruption.request(signal.SIGINT)
    assert process.told == 1


def test_options_go_to_the_trainers_that_have_them(tmp_path):
    names = ("gpu_only", "optimized", "optimized_geometry_on_host")
    passed_on = ["--max_steps", "7", "--test_every", "-1", "--test_after", "3", "--geometry", "device", "--antialiased"]
    gpu_only, optimized, on_host = plan("default", names, tmp_path, passed_on)
    assert isinstance(optimized.cfg, simple_trainer_hybrid_optimized.HybridConfig)
    assert (optimized.cfg.geometry, on_host.cfg.geometry) == ("device", "host")
    for each in (gpu_only, optimized, on_host):
        assert (each.cfg.max_steps, each.cfg.test_every, each.cfg.antialiased) == (7, -1, True)
        assert Path(each.cfg.result_dir) == tmp_path / each.name
        assert str(tmp_path / each.name) in each.command
    assert "--geometry" not in gpu_only.arguments


NO_SCENE = "Error: No scene is named: begin with one of demo, "  # as the trainers say


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere",), "Scene 'nowhere' is unknown"),
        (("demo", "--trainers", "fastest"), "--trainers names fastest"),
        (("demo", "--trainers", "gpu_only", "--geometry", "host"), "--geometry is no option"),
        (("demo", "--ckpt", "a.pt"), "--ckpt evaluates"),
        (("demo", "--max_stepss", "5"), "--max_stepss is no option"),
        (("demo", "--runs", "."), "--runs trains nothing"),
        (("--runs", "."), "has no readable cfg.yml"),
        ((), NO_SCENE),
        (("--data_dir", "data/garden"), NO_SCENE),
        (("--data_dir", "data/garden", "default", "--trainers", "gpu_only"), NO_SCENE),
        (("demo", "--trainers", "gpu_only", "gpu_only"), "--trainers names gpu_only more than once"),
        (("demo", "--resume"), "--resume is for a trainer: leave it out"),
        (("demo", "--new_photos"), "--new_photos goes on with one run: give it to that trainer, with --resume"),
        (
            ("demo", "--absgrd"),
            "--absgrd is no option of this script, nor of the trainers that it starts: give --absgr",
        ),
        (
            ("demo", "--forc"),
            "that it starts: give --force, if that is meant, or see `python simple_trainer.py demo --h",
        ),
        (("demo", "--trainers"), "--trainers names nothing"),
        (("demo", "--force", "true"), "'true' belongs to no option"),
        (("demo", "--max_steps", "1.5"), "--max_steps is '1.5', but must be a whole number"),
        (
            ("demo", "-max_steps", "5"),
            "-max_steps is no option of this script, nor of the trainers that it starts: give --max_s",
        ),
        # What is refused in the words of the trainers, of which each would be started to say so:
        (("demo", "--position_lr", "nan"), "Error: --position_lr is nan, but must be at least 0 and at most 10.\n"),
        (("demo", "--strategy", "mcmc", "--max_gaussians", "0"), "--strategy mcmc grows to a bound: give --max_g"),
        (("default", "--data_dir", "nowhere"), "Error: nowhere does not exist or is no folder: name a "),
        (("default", "--data_dir", "docs"), "Error: docs holds no COLMAP model"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence(monkeypatch, tmp_path, capsys, arguments, said):
    monkeypatch.setattr(compare, "launch", lambda *_, **__: pytest.fail("a trainer was started"))
    monkeypatch.chdir(ROOT)
    assert run_compare(monkeypatch, *arguments, "--result_dir", tmp_path) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_missing_gpu_is_told_before_the_first_trainer_starts(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compare, "launch", lambda *_, **__: pytest.fail("a trainer was started"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_compare(monkeypatch, "demo", "--device", "cuda", "--result_dir", tmp_path) == 2
    assert capsys.readouterr().err == (
        "Error: --device cuda was given, but torch finds no CUDA GPU: use --device cpu or auto.\n"
    )
    assert not list(tmp_path.iterdir())


def test_what_one_trainer_refuses_keeps_no_other_from_its_start(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(compare, "launch", lambda wanted, *_, **__: started.append(wanted.name))
    both = ("--trainers", "streamed", "streamed_compact")
    options = ("demo", *both, "--resident_share", 0.5, "--result_dir", tmp_path)  # which compact rows alone have
    assert run_compare(monkeypatch, *options) == 1
    assert started == ["streamed", "streamed_compact"]


@pytest.mark.parametrize(
    ("trainers", "option", "value"),
    [
        (("gpu_only_compact", "optimized"), "state", "compact"),
        (("gpu_only",), "state", "compact"),  # with dense Adam, which no trainer has
        (("streamed",), "moments", "bfloat16"),
        (("optimized_compact",), "geometry", "host"),
    ],
)
def test_an_option_that_makes_another_trainer_is_refused(monkeypatch, tmp_path, capsys, trainers, option, value):
    """Or what is compared would be two runs of one trainer, under two names."""
    monkeypatch.setattr(compare, "launch", lambda *_, **__: pytest.fail("was started"))
    options = ("demo", "--trainers", *trainers, f"--{option}", value, "--result_dir", tmp_path)
    assert run_compare(monkeypatch, *options) == 2
    assert f"--{option} {value} makes another trainer of {trainers[-1]}, under its name: " in capsys.readouterr().err


def test_finished_runs_are_compared_without_their_dataset(monkeypatch, tmp_path):
    nowhere = str(tmp_path / "nowhere")
    write_run(tmp_path / "results/gpu_only", data_dir=nowhere)
    options = ("default", "--trainers", "gpu_only", "--data_dir", nowhere, "--result_dir", tmp_path / "results")
    assert run_compare(monkeypatch, *options, "--max_steps", 30) == 0
    assert run_compare(monkeypatch, *options, "--max_steps", 30, "--force") == 2


def test_finished_runs_of_other_trainers_stay_in_the_report(monkeypatch, tmp_path, capsys):
    """Those of the same options, and no others."""
    data_dir = str(tmp_path / "nowhere")
    for name, options in (("gpu_only", {}), ("gpu_only_compact", {"seed": 7}), ("baseline", {}), ("split", {})):
        write_run(tmp_path / "results" / name, data_dir=data_dir, **options)
    (tmp_path / "results/split/stats/val_step30.json").unlink()
    options = ("default", "--data_dir", data_dir, "--result_dir", tmp_path / "results", "--max_steps", 30)
    for named, other in (("gpu_only", "baseline"), ("baseline", "gpu_only")):
        assert run_compare(monkeypatch, *options, "--trainers", named) == 0
        report = report_of(tmp_path / "results")
        assert [(run["name"], run["status"]) for run in report["runs"]] == [(named, "finished"), (other, "finished")]
        assert f"The report also shows what has finished with the same options: {other}.\n" in capsys.readouterr().out


def test_results_beside_photos_are_refused(monkeypatch, city_block, tmp_path, capsys):
    monkeypatch.setattr(compare, "launch", lambda *_, **__: pytest.fail("a trainer was started"))
    (tmp_path / "scene").mkdir()
    (tmp_path / "scene/images").symlink_to(city_block / "images")
    (tmp_path / "scene/sparse").symlink_to(city_block / "sparse")
    options = ("default", "--data_dir", tmp_path / "scene", "--result_dir")
    assert run_compare(monkeypatch, *options, city_block / "images/compared") == 2
    assert capsys.readouterr().err.startswith(f"Error: --result_dir {city_block}/images/compared would write into ")
    assert not (city_block / "images/compared").exists()


def test_a_cfg_yml_that_says_nothing_of_regularizers_is_of_those_that_held():
    """As older versions wrote it; now it holds what held."""
    cfg = Config(strategy="mcmc", max_gaussians=9)
    older = dataclasses.asdict(cfg)
    assert older["opacity_reg"] is None
    now = {**older, "opacity_reg": 0.01, "scale_reg": 0.01}
    for there in (older, now):
        assert differing_options(there, cfg) == {}
        assert differing_options(there, dataclasses.replace(cfg, opacity_reg=0.01)) == {}
        assert differing_options(there, dataclasses.replace(cfg, opacity_reg=0.5)) == {"opacity_reg": (0.01, 0.5)}
    split = simple_trainer_hybrid_optimized_split.CONFIGS["default"]
    older = dataclasses.asdict(split)
    assert older["split_threshold"] is None
    assert differing_options(older, dataclasses.replace(split, split_threshold=0.3)) == {}


def write_run(folder: Path, *, steps: int = 30, **options: object) -> Plan:
    """A result folder as a trainer writes it, with two statistics."""
    cfg = Config(max_steps=steps, result_dir=str(folder), **options)
    (folder / "stats").mkdir(parents=True)
    (folder / "renders").mkdir()
    (folder / "cfg.yml").write_text(yaml.safe_dump(dataclasses.asdict(cfg)))
    for step in (10, steps):
        train = {"num_GS": 5, "elapsed_seconds": 2.0 * step, "peak_host_bytes": 10**9, "stages_ms": {"render": 1.5}}
        images = [{"name": f"{name}.png", "psnr": 20.0 + factor * step} for name, factor in (("a", 0.9), ("b", 1.1))]
        val = {"num_GS": 5, "psnr": 20.0 + step, "ssim": 0.5, "lpips": None, "images": images}
        for kind, content in (("train", train), ("val", val)):
            (folder / f"stats/{kind}_step{step}.json").write_text(json.dumps(content))
    for index in range(2):
        picture = np.full((6, 16, 3), 100 + index, np.uint8)
        imageio.imwrite(folder / f"renders/val_step{steps}_{index:04d}.png", picture)
    return Plan(folder.name, folder, ("-c", "pass"), cfg)


def test_processes_of_torchrun_start_no_trainers(monkeypatch, tmp_path, capsys):
    """Each would start all of them, which would take each other for their ranks."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["compare.py", "demo", "--result_dir", str(tmp_path / "results")])
    with pytest.raises(SystemExit) as ended:
        compare.main()
    assert ended.value.code == 2
    assert "start it without torchrun" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_what_finished_means(tmp_path):
    done = write_run(tmp_path / "run")
    assert is_finished(done.folder, done.cfg)
    other = write_run(tmp_path / "other", seed=7)
    assert not is_finished(done.folder, other.cfg)
    with pytest.raises(InputError, match="seed 42 instead of 7"):
        check_nothing_is_lost([Plan("run", done.folder, (), other.cfg)])

    # A run that began after the statistics were written has not finished yet.
    later = time.time() + 100
    os.utime(done.folder / "cfg.yml", (later, later))
    assert not is_complete(done.folder)

    # Copied folders have other times, but a launch that compare.py has seen finish stays finished; and a run that it
    # has seen interrupted may have been continued by hand.
    launched = launching.Launch("python", "finished", "", 0, "", {})
    write_launch(done.folder, launched)
    assert is_complete(done.folder)
    write_launch(other.folder, dataclasses.replace(launched, status="interrupted"))
    assert is_complete(other.folder)

    for name in ("train_step30.json", "val_step30.json"):
        damaged = write_run(tmp_path / name)
        (damaged.folder / "stats" / name).write_text('{"psnr": 2')
        assert not is_complete(damaged.folder)
        (damaged.folder / "stats" / name).unlink()
        assert not is_complete(damaged.folder)
    for path in (damaged.folder / "stats").glob("train_*"):
        path.unlink()
    check_nothing_is_lost([Plan("run", damaged.folder, (), other.cfg)])


def test_an_option_that_an_older_version_did_not_have_was_at_its_default(tmp_path):
    done = write_run(tmp_path / "run")
    options = yaml.safe_load((done.folder / "cfg.yml").read_text())
    del options["near_plane"]
    (done.folder / "cfg.yml").write_text(yaml.safe_dump(options))
    later = time.time() + 100
    for file in (done.folder / "stats").iterdir():
        os.utime(file, (later, later))
    assert is_finished(done.folder, done.cfg)
    done.cfg.near_plane = 0.5
    assert not is_finished(done.folder, done.cfg)


def test_a_damaged_folder_gives_what_is_left(tmp_path):
    folder = write_run(tmp_path / "run").folder
    (folder / "stats/train_step30.json").write_text("")
    (folder / "renders/val_step30_0000.png").unlink()
    (folder / "tb").mkdir()
    (folder / "tb/events.out.tfevents.1").write_bytes(b"not a log")
    (folder / "stats/val_step40.json").write_text('{"psnr": 99.0}')  # of an earlier, longer run
    run = read_run("run", folder)
    assert (run.status, run.steps) == ("unfinished", 30)
    assert run.figures["psnr"] == 50.0
    assert run.figures["elapsed_seconds"] == 20.0
    assert list(run.pictures) == ["b.png"]
    assert run.curves == {}


def test_runs_that_differ_in_everything_are_reported(monkeypatch, tmp_path):
    first, second = write_run(tmp_path / "one/run"), write_run(tmp_path / "two/run", steps=20, seed=3)
    imageio.imwrite(second.folder / "renders/val_step20_0000.png", np.zeros((3, 8, 3), np.uint8))  # another scale
    (second.folder / "renders/val_step20_0001.png").write_bytes(b"damaged")
    assert run_compare(monkeypatch, "--runs", first.folder, second.folder, "--result_dir", tmp_path / "report") == 0
    runs = json.loads((tmp_path / "report/comparison.json").read_text())["runs"]
    assert [run["name"] for run in runs] == [str(first.folder), str(second.folder)]
    assert runs[1]["ratios"]["psnr"] == 40.0 / 50.0
    assert runs[1]["ratios"]["lpips"] is None
    page = (tmp_path / "report/comparison.html").read_text()
    assert "<td>seed</td><td>42</td><td>3</td>" in page
    # One view is 9 dB worse and the other 11: 10 in the mean, give or take (2 / sqrt(2)) / sqrt(2).
    assert "(-10.00\u00a0±\u00a01.00)" in page
    assert runs[1]["differences"]["psnr"] == pytest.approx({"mean": -10.0, "standard_error": 1.0})
    assert runs[1]["differences"]["lpips"] is None


def test_pictures_without_any_error_have_no_difference(monkeypatch, tmp_path):
    """Of black photos with nothing before them, say, whose PSNR is infinite."""
    runs = [write_run(tmp_path / name) for name in ("first", "second")]
    for run in runs:
        file = run.folder / "stats/val_step30.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"psnr": math.inf}))
    assert run_compare(monkeypatch, "--runs", *(run.folder for run in runs), "--result_dir", tmp_path / "report") == 0
    text = (tmp_path / "report/comparison.md").read_text()
    assert text.count("| inf dB |") == 2
    assert "nan" not in text


def test_corrected_colours_and_poses_are_compared_where_a_run_has_them(monkeypatch, tmp_path):
    first, second = write_run(tmp_path / "first"), write_run(tmp_path / "second")
    for kind, more in (("val", {"cc_psnr": 60.5}), ("train", {"pose_turn_median": 0.25, "pose_shift_largest": 1.5})):
        file = second.folder / f"stats/{kind}_step30.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | more))
    for folders, are_shown in (((first, second), True), ((first, first), False)):
        report = tmp_path / f"report_{are_shown}"
        assert run_compare(monkeypatch, "--runs", *(f.folder for f in folders), "--result_dir", report) == 0
        text = (report / "comparison.md").read_text()
        heads, *rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][:3]
        assert ("PSNR, corrected colours" in heads) == are_shown
        assert ("poses turned, median" in heads) == are_shown
        assert "SSIM, corrected colours" not in heads
        for name in ("comparison.md", "comparison.html"):
            said = (report / name).read_text().replace("\\", "")
            assert (f"second: the corrected cameras are in {second.folder}/poses." in said) == are_shown
        if are_shown:
            found = {head: row for head, *row in zip(heads, *rows, strict=True)}
            assert found["PSNR, corrected colours"] == ["-", "60.50 dB"]
            assert found["poses turned, median"] == ["-", "0.250 degrees"]
            assert "<th>PSNR, corrected colours</th>" in (report / "comparison.html").read_text()


def test_names_of_folders_cannot_break_the_page(monkeypatch, tmp_path):
    names = ("<script>alert(1)", "a | b", "`c` *d* [e](f)\n# g", "_h_")
    folders = [write_run(tmp_path / name).folder for name in names]
    assert run_compare(monkeypatch, "--runs", *folders, "--result_dir", tmp_path / "report") == 0
    assert "<script>" not in (tmp_path / "report/comparison.html").read_text()
    text, _, commands = (tmp_path / "report/comparison.md").read_text().partition("## Commands")
    assert "<script>" not in text
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert [re.split(r"(?<!\\) \| ", line)[0] for line in table[1:5]] == [
        "| &lt;script>alert(1)",
        "| a \\| b",
        "| \\`c\\` \\*d\\* \\[e\\](f) \\# g",
        "| \\_h\\_",
    ]
    assert len({line.count(" | ") for line in table[:5]}) == 1
    fence = re.search("`+bash", commands)[0].removesuffix("bash")
    assert commands.count(fence) == 2


@pytest.mark.parametrize("has_checkpoints", [True, False])
def test_runs_of_other_scenes_are_not_compared(monkeypatch, tmp_path, capsys, has_checkpoints):
    first, moved, other = (write_run(tmp_path / name, data_dir=f"/data/{name}").folder for name in ("a", "b", "c"))
    if has_checkpoints:
        for folder, scale in ((first, 2.0), (moved, 2.0), (other, 3.0)):
            transform = np.diag([scale, scale, scale, 1.0])
            start = initial_gaussians(
                np.eye(4, 3), np.zeros((4, 3), np.uint8), sh_degree=1, init_opacity=0.1, init_scale=1.0, seed=0
            )
            state = {f"parameters/{name}": value for name, value in start.items()}
            (folder / "ckpts").mkdir()
            save_checkpoint(folder / "ckpts/ckpt_30.pt", Checkpoint(30, transform, state))
    report = ("--result_dir", tmp_path / "report")
    assert run_compare(monkeypatch, "--runs", first, moved, *report) == (0 if has_checkpoints else 2)
    capsys.readouterr()
    assert run_compare(monkeypatch, "--runs", first, other, *report) == 2
    assert f"{first} was trained on /data/a and {other} on /data/c" in capsys.readouterr().err


def test_what_is_left_in_a_folder_before_a_trainer_starts(tmp_path):
    same, other = write_run(tmp_path / "same"), write_run(tmp_path / "other", seed=7)
    code = "import sys; print(' '.join(sys.argv[1:]))"

    def start(folder: Path, *, anew: bool = False) -> tuple[str, bool]:
        """What the trainer was called with, and whether statistics of the run before were left."""
        wanted = Plan(folder.name, folder, ("-c", code), same.cfg)
        with Interruption() as interruption:
            launch(wanted, interruption, lambda line: None, anew=anew)
        return (folder / "log.txt").read_text().strip(), (folder / "stats/train_step10.json").is_file()

    assert start(same.folder) == ("--resume", True)
    (same.folder / "ckpts").mkdir()
    (same.folder / "ckpts/ckpt_30.pt").touch()
    assert start(same.folder) == ("--resume", True)
    assert start(other.folder) == ("", False)
    assert start(same.folder, anew=True) == ("", False)


@pytest.mark.slow
def test_force_begins_finished_runs_anew(monkeypatch, city_block, tmp_path):
    started = []

    def launch_nothing(wanted, interruption, show, *, anew):
        started.append((wanted.name, anew))

    monkeypatch.setattr(compare, "launch", launch_nothing)
    for name in ("gpu_only", "baseline"):
        write_run(tmp_path / name, data_dir=str(city_block))
    options = ("default", "--data_dir", city_block, "--result_dir", tmp_path, "--max_steps", 30)
    options = (*options, "--trainers", "gpu_only", "baseline")
    assert run_compare(monkeypatch, *options) == 0
    assert started == []
    assert run_compare(monkeypatch, *options, "--seed", 5) == 2
    assert started == []
    assert run_compare(monkeypatch, *options, "--force") == 0
    assert run_compare(monkeypatch, *options, "--seed", 5, "--force") == 1
    assert started == [("gpu_only", True), ("baseline", True)] * 2


def test_a_run_that_has_diverged_is_valid_json(monkeypatch, tmp_path):
    folder = write_run(tmp_path / "run").folder
    statistics = folder / "stats/val_step30.json"
    statistics.write_text(statistics.read_text().replace("50.0", "NaN"))
    assert run_compare(monkeypatch, "--runs", folder, "--result_dir", tmp_path / "report") == 0
    text = (tmp_path / "report/comparison.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["runs"][0]["figures"]["psnr"] is None
    assert "nan dB" in (tmp_path / "report/comparison.md").read_text()


def test_a_difference_of_rounding_does_not_fill_a_chart():
    curves = [Curve([100, 200], [1.0, 2.0], [value, value]) for value in (0.1436300, 0.1436301)]
    drawn = charts.line_chart(curves, "training loss", over="steps")
    ticks = [float(text) for text in re.findall(r"<text[^>]*>(-?[0-9.]+)</text>", drawn.replace("\u2212", "-"))]
    values = [tick for tick in ticks if tick < 1]
    assert max(values) - min(values) > 0.004
    assert "currentColor" in drawn
    assert charts.line_chart([None, None], "PSNR", over="steps") is None
