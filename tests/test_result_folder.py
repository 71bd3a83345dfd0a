"""A run's own folder: no step, and no result of another run, is lost, whatever becomes of the folder or the output."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import compare
import simple_trainer
import simple_trainer_hybrid_streamed
from tests.interrupted_runs import interrupt_after, run_script, saved
from tests.training_scripts import slow_but
from tests.waiting import HANGS_AFTER, wait_until
from training.checkpoints import load_checkpoint
from training.ending import Ending, read_ending
from training.files import open_new, write_file
from training.folder_lock import FolderLock, check_free
from training.run import TrainingRun
from training.streams import unbreakable_output

ROOT = Path(__file__).parents[1]
SMALL = ("--max_steps", 12, "--save_every", 0, "--num_workers", 1)
VIDEO = ("--video", "--video_seconds", 0.1)


def run_in_shell(command: str, data_dir: Path, result_dir: Path, *options: object, **arguments) -> subprocess.Popen:
    """Start a shell that runs a script, for which `command` says SCRIPT, in a session of its own."""
    words = [sys.executable, "simple_trainer.py", "default", "--data_dir", data_dir, "--result_dir", result_dir]
    words += ["--device", "cpu", *options]
    script = " ".join(map(str, words))
    return subprocess.Popen(
        ["bash", "-c", command.replace("SCRIPT", script)],
        cwd=ROOT,
        start_new_session=True,
        text=True,
        **arguments,
    )


def on_step(monkeypatch, number: int, act) -> None:
    """Do something as soon as so many steps are done."""
    after_step = TrainingRun.after_step

    def acted(self, step: int, *arguments: object) -> None:
        if step + 1 == number:
            act()
        after_step(self, step, *arguments)

    monkeypatch.setattr(TrainingRun, "after_step", acted)


# ------------------------------------------------------------------------------------------------ output and signals


@pytest.mark.slow
@pytest.mark.parametrize(
    "output",
    [
        pytest.param("SCRIPT 2>&1 | head -c 300", id="reader goes away"),
        pytest.param("SCRIPT > /dev/full 2>&1", id="full log"),
        pytest.param("SCRIPT >&- 2>&-", id="closed"),
    ],
)
def test_output_that_cannot_be_written_costs_no_step(city_block, tmp_path, output):
    process = run_in_shell(
        f"set -o pipefail; {output}",
        city_block,
        tmp_path / "é",
        *SMALL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert process.wait(HANGS_AFTER) == 0
    assert saved(tmp_path / "é", 12).can_resume
    assert (tmp_path / "é/stats/val_step12.json").is_file()


def test_text_that_cannot_be_written_is_dropped_and_later_text_is_not():
    code = (
        "import os, sys; from training.streams import unbreakable_output\n"
        "with unbreakable_output():\n"
        "    print('caf\\u00e9'); print('x' * 10**6, flush=True)\n"
        "    open(sys.argv[1], 'w').write('went on')"
    )
    read, write = os.pipe()
    os.close(read)
    said = Path(os.devnull)
    for sink in (write, os.open("/dev/full", os.O_WRONLY)):
        result = subprocess.run(
            [sys.executable, "-c", code, str(said)], stdout=sink, stderr=subprocess.PIPE, cwd=ROOT, check=False
        )
        assert (result.returncode, result.stderr) == (0, b"")


def test_characters_without_a_code_are_escaped(tmp_path, monkeypatch):
    path = tmp_path / "log"
    with open(path, "w", encoding="ascii") as log, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", log)
        with unbreakable_output():
            print("ply/é.ply")
    assert path.read_text() == "ply/\\xe9.ply\n"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_closed_terminal_saves(monkeypatch, city_block, tmp_path, number):
    interrupt_after(monkeypatch, 7, number=number)
    assert run_script(monkeypatch, simple_trainer, city_block, tmp_path, *SMALL) == 0
    assert saved(tmp_path, 7).can_resume
    assert read_ending(tmp_path).status == "interrupted"


@pytest.mark.parametrize(
    ("moment", "said"),
    slow_but(
        ("while the page is written",),
        [
            pytest.param(
                "training.command_line.write_report",
                "Stopped at once; saved {}/ckpt_7.pt",
                id="while the page is written",
            ),
            pytest.param(
                "training.run.TrainingRun._give_back", "Stopped at once; saved {}/ckpt_7.pt", id="while it is closed"
            ),
            pytest.param(
                "training.run.TrainingRun._tell_interrupted",
                "Stopped at once; saved {}/ckpt_7.pt",
                id="when it is saved",
            ),
            pytest.param(
                "training.saving.Saving.at_the_end",
                "Stopped at once, without saving what came after {}/ckpt_6.pt",
                id="before it is saved",
            ),
        ],
    ),
)
def test_a_second_ctrl_c_says_what_stands(monkeypatch, city_block, tmp_path, capsys, moment, said):
    """Whenever it comes, in ended.json as on the screen."""
    has_come = []

    def stop(*arguments: object) -> None:
        if not has_come:
            has_come.append(True)
            raise KeyboardInterrupt

    interrupt_after(monkeypatch, 7)
    with monkeypatch.context() as patch:
        patch.setattr(moment, stop)
        options = (*SMALL, "--save_every", 3)
        assert run_script(patch, simple_trainer, city_block, tmp_path, *options) == 130
    assert has_come
    said = said.format(tmp_path / "ckpts")
    assert capsys.readouterr().err.splitlines()[-1] == said
    assert read_ending(tmp_path) == Ending("interrupted", said)


@pytest.mark.slow
def test_without_a_checkpoint_a_second_ctrl_c_says_that_nothing_is_saved(monkeypatch, city_block, tmp_path):
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    interrupt_after(monkeypatch, 7)
    monkeypatch.setattr("training.saving.Saving.at_the_end", stop)
    assert run_script(monkeypatch, simple_trainer, city_block, tmp_path, *SMALL) == 130
    assert read_ending(tmp_path) == Ending("interrupted", "Stopped at once, without saving.")


@pytest.mark.slow
def test_nohup_is_heeded(monkeypatch, city_block, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        interrupt_after(monkeypatch, 7, number=signal.SIGHUP)
        assert run_script(monkeypatch, simple_trainer, city_block, tmp_path, *SMALL) == 0
        assert saved(tmp_path, 12).can_resume
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a child of its parent's death")
def test_the_trainer_of_a_killed_compare_saves_and_ends(city_block, tmp_path):
    options = ["--data_dir", city_block, "--result_dir", tmp_path, "--device", "cpu", "--max_steps", 100_000]
    options += ["--log_every", 5, "--eval_steps", 5, "--save_every", 0, "--trainers", "gpu_only"]
    words = [sys.executable, "compare.py", "demo", *map(str, options)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    folder = tmp_path / "gpu_only"
    wait_until((folder / "stats/val_step5.json").is_file)
    process.kill()
    process.wait()
    wait_until(lambda: read_ending(folder) is not None)
    assert read_ending(folder).status == "interrupted"
    (checkpoint,) = (folder / "ckpts").glob("*.pt")
    assert load_checkpoint(checkpoint).steps >= 5
    check_free(folder)


def test_ctrl_c_while_modules_load_is_no_traceback(tmp_path):
    code = "import startup, os, signal; os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(9)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (-signal.SIGINT, "Stopped.\n")


# ------------------------------------------------------------------------------------------------ a folder that goes


@pytest.mark.parametrize(
    "script", [pytest.param(simple_trainer, marks=pytest.mark.slow), simple_trainer_hybrid_streamed]
)
def test_a_removed_folder_is_made_again(monkeypatch, city_block, tmp_path, capsys, script):
    folder = tmp_path / "run"
    on_step(monkeypatch, 7, lambda: shutil.rmtree(folder))
    assert run_script(monkeypatch, script, city_block, folder, *SMALL) == 0
    assert f"Warning: {folder} has been removed or renamed" in capsys.readouterr().out
    assert saved(folder, 7).can_resume  # at once: it is the only one
    assert saved(folder, 12).can_resume
    assert (folder / "cfg.yml").is_file()
    assert (folder / "stats/val_step12.json").is_file()
    assert read_ending(folder).status == "finished"


@pytest.mark.slow
def test_a_renamed_folder_loses_nothing(monkeypatch, city_block, tmp_path):
    folder, moved = tmp_path / "run", tmp_path / "moved"

    def rename() -> None:
        wait_until((folder / "ckpts/ckpt_5.pt").is_file)  # which is written while training goes on
        folder.rename(moved)

    on_step(monkeypatch, 7, rename)
    options = ("--max_steps", 12, "--save_every", 5, "--num_workers", 1)
    assert run_script(monkeypatch, simple_trainer, city_block, folder, *options) == 0
    assert saved(moved, 5).can_resume
    assert saved(folder, 12).can_resume


@pytest.mark.slow
def test_a_folder_that_is_another_run_s_meanwhile_is_left_to_it(monkeypatch, city_block, tmp_path):
    folder, locks = tmp_path / "run", []

    def replace() -> None:
        folder.rename(tmp_path / "moved")
        folder.mkdir()
        locks.append(FolderLock(folder))

    on_step(monkeypatch, 7, replace)
    assert run_script(monkeypatch, simple_trainer, city_block, folder, *SMALL) == 0
    locks[0].release()
    assert [path.name for path in folder.iterdir()] == [".lock"]
    assert saved(tmp_path / f"run_{os.getpid()}", 12).can_resume


@pytest.mark.slow
def test_a_folder_that_goes_with_the_last_step_is_saved_to(monkeypatch, city_block, tmp_path):
    """Also where it is removed after the last look at it."""
    after_step = TrainingRun.after_step

    def removed_at_the_end(self, step: int, *arguments: object) -> None:
        after_step(self, step, *arguments)
        if step + 1 == 12:
            self.saving._checkpoints.wait()
            shutil.rmtree(tmp_path / "run")
            self.saving._saved_steps = -1  # as where the disk had not taken it

    monkeypatch.setattr(TrainingRun, "after_step", removed_at_the_end)
    assert run_script(monkeypatch, simple_trainer, city_block, tmp_path / "run", *SMALL) == 0
    assert saved(tmp_path / "run", 12).can_resume


# ------------------------------------------------------------------------------------------------ what is not replaced


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, city_block) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert run_script(patch, simple_trainer, city_block, folder, *SMALL) == 0
    return folder


@pytest.mark.parametrize(
    "options",
    [
        ("--max_steps", 20),
        ("--data_dir", "/typo", "--resume"),
        ("--data_dir", "/typo", "--force"),
        ("--max_steps", 20, "--resume", "--sh_degree", 1),
        ("--max_steps", 20, "--force", "--resume"),
        ("--ckpt", "nowhere.pt"),
        ("--max_steps", 20, "--force", "--position_lr", "nan"),
    ],
    ids=str,
)
def test_a_refused_command_changes_nothing(monkeypatch, city_block, finished, capsys, options):
    before = contents(finished)
    assert run_script(monkeypatch, simple_trainer, city_block, finished, *options) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert contents(finished) == before


def test_a_refused_command_leaves_no_folders(monkeypatch, city_block, tmp_path):
    assert run_script(monkeypatch, simple_trainer, Path("/typo"), tmp_path / "run") == 2
    assert not (tmp_path / "run").exists()


def test_the_same_command_again_wants_resume_or_force(monkeypatch, city_block, finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "notes.txt").write_text("mine")
    assert run_script(monkeypatch, simple_trainer, city_block, folder, *SMALL) == 2
    said = capsys.readouterr().err
    assert str(folder) in said
    assert "--resume" in said
    assert "--force" in said
    assert run_script(monkeypatch, simple_trainer, city_block, folder, "--max_steps", 5, "--force") == 0
    assert [path.name for path in (folder / "ckpts").iterdir()] == ["ckpt_5.pt"]
    assert not list(folder.glob("*/*12*.json"))
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_folder_without_results_is_nobody_s(monkeypatch, city_block, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "cfg.yml").write_text("of a run that was killed before it saved")
    (tmp_path / "ckpts").mkdir()
    (tmp_path / "ckpts/ckpt_3.pt.partial").write_bytes(b"half")
    assert run_script(monkeypatch, simple_trainer, city_block, tmp_path, *SMALL) == 0
    assert [path.name for path in (tmp_path / "ckpts").iterdir()] == ["ckpt_12.pt"]


@pytest.mark.slow
def test_two_runs_in_one_folder(monkeypatch, city_block, tmp_path, capsys):
    lock = FolderLock(tmp_path)
    for options in (SMALL, (*SMALL, "--resume"), (*SMALL, "--force")):
        assert run_script(monkeypatch, simple_trainer, city_block, tmp_path, *options) == 2
        said = capsys.readouterr().err
        assert f"{tmp_path} is in use by another run (process {os.getpid()} on " in said
    assert read_ending(tmp_path) is None
    monkeypatch.setattr(
        sys, "argv", ["compare.py", "default", "--result_dir", str(tmp_path.parent), "--trainers", "gpu_only"]
    )
    (tmp_path.parent / "gpu_only").symlink_to(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        compare.main()
    lock.release()
    assert run_script(monkeypatch, simple_trainer, city_block, tmp_path, *SMALL) == 0


def test_a_killed_run_leaves_no_lock(tmp_path):
    code = "import sys, pathlib, os; from training.folder_lock import FolderLock\n"
    code += "lock = FolderLock(pathlib.Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False)
    assert (tmp_path / ".lock").is_file()
    FolderLock(tmp_path).release()


# ------------------------------------------------------------------------------------------------ planted links


@pytest.mark.slow
def test_planted_links_are_not_followed(monkeypatch, city_block, tmp_path):
    treasure = tmp_path / "treasure"
    treasure.write_text("mine")
    folder = tmp_path / "run"
    names = ["cfg.yml", "ended.json", ".lock", "stats/train_step12.json", "stats/val_step12.json"]
    names += ["ckpts/ckpt_12.pt", "ckpts/ckpt_12.pt.partial", "ply/point_cloud_12.ply"]
    names += ["renders/val_step12_0000.png", "videos/flight_12.mp4", "report.html"]
    names += [str(Path(name).with_name("partial_" + Path(name).name)) for name in names]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(treasure)
    assert run_script(monkeypatch, simple_trainer, city_block, folder, *SMALL, "--force", *VIDEO) == 0
    assert treasure.read_text() == "mine"
    for name in names[:11]:
        assert not (folder / name).is_symlink(), name
    assert saved(folder, 12).can_resume


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path, other = tmp_path / "a.json", tmp_path / "b"
    other.write_text("mine")
    write_file(path, "one")
    (tmp_path / "partial_a.json").hardlink_to(other)
    with pytest.raises(TypeError):
        write_file(path, 5)
    assert path.read_text() == "one"
    assert other.read_text() == "mine"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "b"]
    path.unlink()
    path.symlink_to(other)
    os.close(open_new(path))
    assert other.read_text() == "mine"


# ------------------------------------------------------------------------------------------------ the end


def test_resume_makes_what_is_missing(monkeypatch, city_block, finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = {name: (folder / name).read_bytes() for name in ("ply/point_cloud_12.ply", "cfg.yml")}
    psnr = json.loads((folder / "stats/val_step12.json").read_text())["psnr"]
    for name in ("ply/point_cloud_12.ply", "stats/val_step12.json", "stats/train_step12.json"):
        (folder / name).unlink()
    assert run_script(monkeypatch, simple_trainer, city_block, folder, *SMALL, "--resume", *VIDEO) == 0
    assert "All 12 steps are done" in capsys.readouterr().out
    assert json.loads((folder / "stats/val_step12.json").read_text())["psnr"] == pytest.approx(psnr, rel=1e-6)
    assert json.loads((folder / "stats/train_step12.json").read_text())["num_GS"] == 600
    assert (folder / "videos/flight_12.mp4").is_file()
    for name, content in before.items():
        assert (folder / name).read_bytes() == content
    after = contents(folder)
    assert run_script(monkeypatch, simple_trainer, city_block, folder, *SMALL, "--resume", *VIDEO) == 0
    written = {name for name, content in contents(folder).items() if after.get(name) != content}
    assert all(any(part in name for part in ("ended.json", "report.html", "tfevents")) for name in written)


def test_a_log_that_cannot_be_begun_is_one_sentence(monkeypatch, city_block, tmp_path, capsys):
    """On a disk that has just become full."""

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.results.EventLog", full)
    assert run_script(monkeypatch, simple_trainer, city_block, tmp_path / "run", "--max_steps", 2) == 2
    error = capsys.readouterr().err
    assert "cannot be written (No space left on device): choose another --result_dir" in error
    assert "Traceback" not in error


def test_an_evaluation_that_cannot_be_written_is_said(monkeypatch, city_block, finished, tmp_path, capsys):
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.results.ResultFolder.save_statistics", full)
    options = ("--ckpt", finished / "ckpts/ckpt_12.pt")
    assert run_script(monkeypatch, simple_trainer, city_block, tmp_path, *options) == 1
    assert "The evaluation of step 12 ([Errno 28] No space left on device)" in capsys.readouterr().err.splitlines()[-1]
