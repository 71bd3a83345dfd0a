"""What a long day brings: after each fault nothing saved is lost, a sentence names it, and resuming works."""

import errno
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import wait
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import simple_trainer
import simple_trainer_hybrid_optimized
import trainers as entries
from errors import InputError
from offload.pipelines.forwarded import ForwardedPipeline
from tests import fault_trials
from tests.interrupted_runs import DENSIFYING, SCRIPTS, assert_same_state, interrupt_after, run_script, saved
from training import checkpoint_folder, command_line
from training.checkpoint_folder import CheckpointFolder, SaveSchedule
from training.checkpoints import Checkpoint, load_checkpoint
from training.commands import smaller_command
from training.run import TrainingRun
from training.views import View


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory, city_block) -> dict[str, Checkpoint]:
    """The last checkpoints of runs that nothing has disturbed; filled as they are needed."""
    return {}


def undisturbed(whole_runs, city_block, tmp_path, script, place) -> Checkpoint:
    key = script.__name__ + str(place)
    if key not in whole_runs:
        with pytest.MonkeyPatch.context() as patch:
            assert run_script(patch, script, city_block, tmp_path / "undisturbed", *DENSIFYING, *place) == 0
        whole_runs[key] = saved(tmp_path / "undisturbed")
    return whole_runs[key]


def last_error(capsys) -> str:
    return capsys.readouterr().err.splitlines()[-1]


# ------------------------------------------------------------------------------------------------ signals, schedule


def test_sigterm_stops_like_ctrl_c_and_prints_the_command_to_continue(monkeypatch, city_block, tmp_path, capsys):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7, number=signal.SIGTERM)
        assert run_script(patch, simple_trainer, city_block, tmp_path / "a b", "--max_steps", 20) == 0
    lines = capsys.readouterr().out.splitlines()
    command = shlex.split(lines[lines.index("Continue with:") + 1])
    assert saved(tmp_path / "a b", 7).can_resume
    assert command[1:3] == ["simple_trainer.py", "default"]
    assert command[-1] == "--resume"
    assert run_script(monkeypatch, simple_trainer, city_block, tmp_path / "a b", *command[3:][6:]) == 0
    assert "Resuming after 7 steps" in capsys.readouterr().out


def test_a_second_ctrl_c_stops_at_once(monkeypatch, city_block, tmp_path):
    after_step = TrainingRun.after_step

    def press_twice(self, step: int, *arguments: object) -> None:
        if step == 9:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        after_step(self, step, *arguments)

    monkeypatch.setattr(TrainingRun, "after_step", press_twice)
    options = ("--max_steps", 1000, "--save_every", 9)
    assert run_script(monkeypatch, simple_trainer, city_block, tmp_path, *options) == 130
    assert [path.name for path in (tmp_path / "ckpts").iterdir()] == ["ckpt_9.pt"]


def test_save_every_and_keep(monkeypatch, city_block, tmp_path):
    """Periodic checkpoints make room for newer ones; those that were asked for by number stay."""
    options = ("--max_steps", 30, "--save_steps", 8, "--save_every", 4, "--keep", 2)
    assert run_script(monkeypatch, simple_trainer, city_block, tmp_path, *options) == 0
    assert {path.name for path in (tmp_path / "ckpts").iterdir()} == {f"ckpt_{n}.pt" for n in (8, 24, 28, 30)}


@pytest.mark.parametrize("every", ["", "x", "15 minutes", "-3", "1.5h"])
def test_save_every_is_steps_or_time(every):
    with pytest.raises(InputError, match="--save_every"):
        SaveSchedule(every)


def test_saving_by_time_does_not_notice_a_clock_that_jumps(monkeypatch):
    seconds = [1000.0]
    schedule = SaveSchedule("15m", clock=lambda: seconds[0])
    due = []
    for _ in range(40):
        seconds[0] += 60
        due.append(schedule.is_due(1))
    assert [minute for minute, is_due in enumerate(due, 1) if is_due] == [15, 30]
    schedule = SaveSchedule("1h")  # with its own clock
    monkeypatch.setattr(time, "time", lambda: 1e12)
    assert not schedule.is_due(1)


@pytest.mark.slow
def test_the_newest_checkpoint_does_not_depend_on_the_clock(monkeypatch, city_block, tmp_path, capsys):
    options = ("--max_steps", 12, "--save_every", 4)
    assert run_script(monkeypatch, simple_trainer, city_block, tmp_path, *options) == 0
    for step, age in ((4, 0), (8, 3600), (12, 86400)):  # the clock was set back more and more
        os.utime(tmp_path / f"ckpts/ckpt_{step}.pt", (1e9 - age, 1e9 - age))
    # A new run in the same folder supersedes the old one, although its numbers are smaller.
    assert run_script(monkeypatch, simple_trainer, city_block, tmp_path, "--max_steps", 5, "--force") == 0
    capsys.readouterr()
    assert run_script(monkeypatch, simple_trainer, city_block, tmp_path, "--max_steps", 6, "--resume") == 0
    assert "Resuming after 5 steps" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ disks and files


def damage_last_byte(content: bytearray) -> None:
    content[-1] ^= 1


def damage_a_tensor(content: bytearray) -> None:
    content[len(content) // 2] ^= 1


def truncate(content: bytearray) -> None:
    del content[len(content) * 2 // 3 :]


def leave_nothing(content: bytearray) -> None:
    content.clear()


@pytest.mark.slow
@pytest.mark.parametrize("damage", [damage_last_byte, damage_a_tensor, truncate, leave_nothing])
def test_a_damaged_checkpoint_is_named_and_skipped(monkeypatch, city_block, tmp_path, capsys, damage):
    options = ("--max_steps", 12, "--save_every", 5, "--keep", 0)
    assert run_script(monkeypatch, simple_trainer, city_block, tmp_path, *options) == 0
    newest = tmp_path / "ckpts/ckpt_12.pt"
    before = saved(tmp_path, 12)
    content = bytearray(newest.read_bytes())
    damage(content)
    newest.unlink()
    newest.write_bytes(content)
    capsys.readouterr()
    assert run_script(monkeypatch, simple_trainer, city_block, tmp_path, *options, "--resume") == 0
    printed = capsys.readouterr().out
    assert any(line.startswith("Skipped: ") and "ckpt_12.pt" in line for line in printed.splitlines())
    assert "Resuming after 10 steps" in printed
    assert_same_state(saved(tmp_path, 12), before)


@pytest.mark.slow
def test_every_flipped_bit_is_found(monkeypatch, city_block, tmp_path):
    assert run_script(monkeypatch, simple_trainer, city_block, tmp_path, "--max_steps", 2) == 0
    path = tmp_path / "ckpts/ckpt_2.pt"
    content = path.read_bytes()
    path.unlink()
    state = load_checkpoint_of(path, content).state
    padding = sum(-tensor.nbytes % 64 for tensor in state.values())
    generator = torch.Generator().manual_seed(0)
    unnoticed = 0
    for position in torch.randint(len(content), (200,), generator=generator).tolist():
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        try:
            load_checkpoint_of(path, bytes(damaged))
            unnoticed += 1
        except InputError:
            pass
    assert unnoticed <= max(2, 400 * padding // len(content))  # between tensors nothing is stored


def load_checkpoint_of(path: Path, content: bytes) -> Checkpoint:
    path.unlink(missing_ok=True)  # a file that is mapped must not be changed
    path.write_bytes(content)
    return load_checkpoint(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("pwrite", OSError(28, "No space left on device")),
        ("fsync", OSError(5, "Input/output error")),
        ("open", OSError(30, "Read-only file system")),
    ],
    ids=["full disk", "failing disk", "read-only"],
)
def test_a_disk_that_fails_for_a_while_costs_no_training(monkeypatch, city_block, tmp_path, capsys, call, error):
    original, options = getattr(os, call), (*DENSIFYING, "--save_every", 10, "--keep", 0)
    failing = [False]

    def fails_for_a_while(*arguments: object) -> object:
        if failing[0] and (call != "open" or str(arguments[0]).endswith(".partial")):
            raise error
        return original(*arguments)

    after_step = TrainingRun.after_step

    def fail_from_20_to_40(self, step: int, *arguments: object) -> None:
        failing[0] = 20 <= step + 1 < 40
        after_step(self, step, *arguments)
        publishing = self.results.checkpoints._publishing
        wait([publishing] if publishing else [])

    monkeypatch.setattr(os, call, fails_for_a_while)
    monkeypatch.setattr(TrainingRun, "after_step", fail_from_20_to_40)
    assert run_script(monkeypatch, simple_trainer, city_block, tmp_path, *options) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if error.strerror in line]
    assert len(warnings) == 2
    assert {path.name for path in (tmp_path / "ckpts").iterdir()} == {f"ckpt_{n}.pt" for n in (10, 40, 50, 60)}


@pytest.mark.slow
def test_a_disk_that_stays_full_is_said_at_the_end(monkeypatch, city_block, tmp_path, capsys):
    save = checkpoint_folder.PartialCheckpoint

    def full_after_10(path: Path, checkpoint: Checkpoint, *guarded: object) -> object:
        if checkpoint.steps > 10:
            raise OSError(28, "No space left on device")
        return save(path, checkpoint, *guarded)

    options = ("--max_steps", 30, "--save_every", 10)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_folder, "PartialCheckpoint", full_after_10)
        assert run_script(patch, simple_trainer, city_block, tmp_path, *options) == 1
    message = last_error(capsys)
    assert message.startswith("Stopped: The Gaussians after 30 steps could not be saved")
    assert "No space left on device" in message
    assert message.endswith("--resume")
    assert run_script(monkeypatch, simple_trainer, city_block, tmp_path, *options, "--resume") == 0
    assert "Resuming after 10 steps" in capsys.readouterr().out


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    folder = tmp_path / "small_disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount file systems")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # checkpoints may still be mapped


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # pictures that are closed once more
def test_a_disk_that_is_really_full(monkeypatch, city_block, small_disk, capsys):
    """600 Gaussians fit, but not those that they become."""
    options = (*DENSIFYING, "--save_every", 5)
    assert run_script(monkeypatch, simple_trainer, city_block, small_disk, *options) == 1
    output = capsys.readouterr()
    assert "No space left on device" in output.out
    assert output.err.splitlines()[-1].startswith("Stopped: The Gaussians after 60 steps could not be saved")
    kept = sorted(load_checkpoint(path).steps for path in (small_disk / "ckpts").iterdir())
    assert kept
    options = ("--max_steps", kept[-1] + 1, "--resume")
    assert run_script(monkeypatch, simple_trainer, city_block, small_disk, *options) in (0, 1)
    assert f"Resuming after {kept[-1]} steps" in capsys.readouterr().out


@pytest.mark.slow
def test_a_folder_that_is_really_made_read_only(monkeypatch, city_block, small_disk, capsys):
    after_step, ckpts = TrainingRun.after_step, str(small_disk / "ckpts")

    def remount(self, step: int, *arguments: object) -> None:
        if step + 1 == 13:
            self.results.checkpoints.wait()
            subprocess.run(["mount", "--bind", ckpts, ckpts], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", ckpts], check=True)
        after_step(self, step, *arguments)

    options = ("--max_steps", 30, "--refine_start_iter", 100, "--save_every", 5, "--keep", 2)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "after_step", remount)
        assert run_script(patch, simple_trainer, city_block, small_disk, *options) == 1
    assert "Read-only file system" in capsys.readouterr().out
    subprocess.run(["umount", "--lazy", ckpts], check=True)
    assert sorted(load_checkpoint(path).steps for path in (small_disk / "ckpts").iterdir()) == [5, 10]
    assert run_script(monkeypatch, simple_trainer, city_block, small_disk, *options, "--resume") == 0
    assert "Resuming after 10 steps" in capsys.readouterr().out


def test_results_that_cannot_be_written_cost_no_training(monkeypatch, city_block, tmp_path, capsys):
    def fail(*arguments: object) -> None:
        raise OSError(30, "Read-only file system")

    for name in ("save_ply", "save_statistics", "save_rendering"):
        monkeypatch.setattr(f"training.results.ResultFolder.{name}", fail)
    monkeypatch.setattr("training.event_log.EventLog.add_scalar", fail)
    assert run_script(monkeypatch, simple_trainer, city_block, tmp_path, "--max_steps", 20, "--log_every", 10) == 1
    said = capsys.readouterr()
    for what in ("The PLY file of step 20", "The evaluation of step 20", "The statistics of step 20"):
        assert f"Warning: {what} could not be written" in said.out
        assert what in said.err.splitlines()[-1]
    assert "Warning: The log could not be written" in said.out
    assert "The log" not in said.err
    assert saved(tmp_path, 20).can_resume


def test_what_a_killed_run_has_left_is_removed(tmp_path):
    (tmp_path / "ckpt_10.pt.partial").write_bytes(b"half")
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.remove_unfinished()
    assert not list(tmp_path.iterdir())
    folder.close()


# ------------------------------------------------------------------------------------------------ numbers


@pytest.mark.slow
@pytest.mark.parametrize(("script", "place"), SCRIPTS)
def test_a_pixel_that_is_not_a_number_is_skipped(monkeypatch, city_block, tmp_path, capsys, script, place):
    spoil_pictures(monkeypatch, {7: float("nan"), 8: float("inf"), 22: float("-inf")})
    assert run_script(monkeypatch, script, city_block, tmp_path, *DENSIFYING, *place) == 0
    state = saved(tmp_path).state
    assert all(tensor.isfinite().all() for tensor in state.values() if tensor.is_floating_point())
    assert "Warning: 2 steps so far" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("script", "place"), SCRIPTS)
def test_a_gradient_that_stays_not_finite_stops_training(monkeypatch, city_block, tmp_path, capsys, script, place):
    with monkeypatch.context() as patch:
        spoil_pictures(patch, dict.fromkeys(range(13, 1000), float("nan")))
        assert run_script(patch, script, city_block, tmp_path, *DENSIFYING, *place) == 1
    message = last_error(capsys)
    assert message.startswith("Stopped: The gradients of the last")
    (path,) = (tmp_path / "ckpts").iterdir()
    checkpoint = load_checkpoint(path)
    assert str(path) in message
    assert all(tensor.isfinite().all() for tensor in checkpoint.state.values() if tensor.is_floating_point())
    assert run_script(monkeypatch, script, city_block, tmp_path, *DENSIFYING, *place, "--resume") == 0


def spoil_pictures(monkeypatch, values: dict[int, float]) -> None:
    """Put values into a pixel of the pictures that are loaded with these numbers."""
    from_batch, loaded = View.from_batch, [0]

    def spoiled(batch, cfg, device) -> View:
        view = from_batch(batch, cfg, device)
        if loaded[0] in values:
            view = replace(view, photos=view.images)
            view.photos[0, 20, 30, 1] = values[loaded[0]]
        loaded[0] += 1
        return view

    monkeypatch.setattr(View, "from_batch", spoiled)


# ------------------------------------------------------------------------------------------------ memory and workers


@pytest.mark.cuda
@pytest.mark.parametrize(("script", "place"), SCRIPTS[:-1])
def test_device_memory_that_really_runs_out(monkeypatch, city_block, tmp_path, capsys, script, place):
    from_batch, loaded = View.from_batch, [0]

    def full(batch, cfg, device) -> View:
        loaded[0] += 1
        if loaded[0] == 20:
            torch.cuda.empty_cache()
            taken = torch.cuda.memory_reserved() / torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(taken)
            torch.empty(torch.cuda.memory_reserved() - torch.cuda.memory_allocated() + 1, device=device)
        return from_batch(batch, cfg, device)

    with monkeypatch.context() as patch:
        patch.setattr(View, "from_batch", full)
        try:
            assert train_on_gpu(patch, script, city_block, tmp_path, *DENSIFYING, *place) == 1
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    assert "Device memory ran out" in last_error(capsys)
    assert train_on_gpu(monkeypatch, script, city_block, tmp_path, *DENSIFYING, *place, "--resume") == 0
    assert saved(tmp_path).steps == 60


def train_on_gpu(monkeypatch, script, data_dir: Path, result_dir: Path, *options: object) -> int:
    return run_script(monkeypatch, script, data_dir, result_dir, *options, "--device", "cuda")


@pytest.mark.slow
@pytest.mark.parametrize(("script", "place"), SCRIPTS[:-1])  # the last one splits the view instead
def test_a_step_that_device_memory_cannot_hold_is_undone(
    monkeypatch, city_block, tmp_path, capsys, whole_runs, script, place
):
    """What is saved is the state before the step: resumed, the run is the one that was never disturbed."""
    with monkeypatch.context() as patch:
        fail_at_call(patch, script, "photometric_loss", 33)
        assert run_script(patch, script, city_block, tmp_path / "parts", *DENSIFYING, *place) == 1
    message = last_error(capsys)
    assert message.startswith("Stopped: Device memory ran out after 32 steps")
    assert "ckpt_32.pt" in message
    command = shlex.split(message.split("Continue with: ")[1])
    smaller = [("--geometry", "host"), ("--adam", "deferred")]  # of the same script
    if command[1] == f"{script.__name__}.py":
        assert any(words in pairwise(command) and f": give {' '.join(words)}." in message for words in smaller)
    else:
        assert f": use {command[1]}" in message
    assert run_script(monkeypatch, script, city_block, tmp_path / "parts", *DENSIFYING, *place, "--resume") == 0
    assert_same_state(saved(tmp_path / "parts"), undisturbed(whole_runs, city_block, tmp_path, script, place))


def test_device_memory_that_runs_out_before_the_first_step_is_told_with_what_helps(
    monkeypatch, city_block, tmp_path, capsys
):
    with monkeypatch.context() as patch:
        fail_at_call(patch, simple_trainer, "photometric_loss", 1)
        assert run_script(patch, simple_trainer, city_block, tmp_path, "--adam", "deferred") == 1
    assert last_error(capsys) == (
        "Stopped: Device memory ran out (CUDA out of memory): use simple_trainer_hybrid_optimized.py, which needs less "
        "of it."
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [
        MemoryError("std::bad_alloc"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_host_memory_that_runs_out_is_told_as_such(monkeypatch, city_block, tmp_path, capsys, error):
    """In one line and without a traceback, before the first step and after some; resumed, the run goes on."""
    original, calls = simple_trainer.photometric_loss, [0]

    def fails(*arguments: object, **options: object) -> object:
        calls[0] += 1
        if calls[0] in (1, 5):
            raise error
        return original(*arguments, **options)

    options = ("--max_steps", 6)
    with monkeypatch.context() as patch:
        patch.setattr(simple_trainer, "photometric_loss", fails)
        assert run_script(patch, simple_trainer, city_block, tmp_path, *options) == 1
        first = capsys.readouterr().err
        assert run_script(patch, simple_trainer, city_block, tmp_path, *options, "--force") == 1
        later = capsys.readouterr().err
    assert "Traceback" not in first + later
    assert re.search(r"^Stopped: Host memory ran out \(.*\): free some of it\.$", first, re.M)
    message = later.splitlines()[-1]
    assert message.startswith("Stopped: Host memory ran out after 3 steps with 600 Gaussians: free some of it. The Ga")
    assert "ckpt_3.pt" in message
    assert run_script(monkeypatch, simple_trainer, city_block, tmp_path, *options, "--resume") == 0


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        (
            "gpu_only",
            [
                "simple_trainer --adam deferred",
                "optimized",
                "optimized --geometry host",
                "optimized_split --geometry host --split_threshold 0.04",
            ],
        ),
        ("baseline", ["optimized_split --geometry host --split_threshold 0.04"]),
        ("split", ["optimized_split --geometry host"]),
        (
            "streamed_bfloat16",
            [
                "streamed --geometry host --moments bfloat16",
                "optimized --geometry host",
                "optimized_split --geometry host --split_threshold 0.04",
            ],
        ),
    ],
)
def test_trainers_that_need_less_are_named_one_after_the_other(first, expected):
    trainer, seen = entries.TRAINERS[first], []
    words = ["demo", "--max_steps", "9", *trainer.arguments]
    while trainer is not None:
        _, cfg = command_line.parse(trainer.load().CONFIGS, words, "")
        assert entries.trainer_of(trainer.script, cfg).script == trainer.script
        lack = entries.Lack("device", share_in_view=0.08)
        smaller = entries.smaller_trainer(entries.trainer_of(trainer.script, cfg), cfg, lack)
        trainer = smaller and smaller.trainer
        if smaller is not None:
            script, *words = shlex.split(smaller_command(smaller, "demo", cfg))[1:-1]
            said = " ".join([Path(script).stem, *words]).replace("simple_trainer_hybrid_", "")
            seen.append(said.replace(" demo --max_steps 9", "").replace(" demo", "").replace(" --max_steps 9", ""))
            assert words[0] == "demo"
            assert words[words.index("--max_steps") + 1] == "9"
    assert seen == expected


def fail_at_call(monkeypatch, script, name: str, number: int) -> None:
    original, calls = getattr(script, name), [0]

    def fails(*arguments: object, **options: object) -> object:
        calls[0] += 1
        if calls[0] == number:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return original(*arguments, **options)

    monkeypatch.setattr(script, name, fails)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "error"),
    [("_prepare", torch.cuda.OutOfMemoryError("out of memory")), ("_upload_known", ValueError("a defect"))],
    ids=["before its step", "in its step"],
)
def test_a_worker_that_dies(monkeypatch, city_block, tmp_path, capsys, whole_runs, method, error):
    script, original, calls = simple_trainer_hybrid_optimized, getattr(ForwardedPipeline, method), [0]

    def dies(self, *arguments: object) -> object:
        calls[0] += 1
        if calls[0] == 25:
            raise error
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ForwardedPipeline, method, dies)
        assert run_script(patch, script, city_block, tmp_path / "parts", *DENSIFYING) == 1
    assert "The Gaussians are saved in" in last_error(capsys)
    assert run_script(monkeypatch, script, city_block, tmp_path / "parts", *DENSIFYING, "--resume") == 0
    assert_same_state(saved(tmp_path / "parts"), undisturbed(whole_runs, city_block, tmp_path, script, ()))


@pytest.mark.slow
def test_a_step_applied_in_part_is_not_saved(monkeypatch, city_block, tmp_path, capsys):
    """The checkpoint before it stays the newest one, and the message says so."""
    script, options = simple_trainer_hybrid_optimized, (*DENSIFYING, "--save_every", 10)
    update, calls = ForwardedPipeline._update_shared, [0]

    def fails_after_its_work(self, *arguments: object, **options: object) -> None:
        update(self, *arguments, **options)
        calls[0] += 1
        if calls[0] == 15:
            raise torch.cuda.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(ForwardedPipeline, "_update_shared", fails_after_its_work)
        assert run_script(patch, script, city_block, tmp_path, *options) == 1
    assert "could not be saved (the step had been applied in part)" in last_error(capsys)
    assert run_script(monkeypatch, script, city_block, tmp_path, *options, "--resume") == 0
    assert "Resuming after 10 steps" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ kill -9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "seed"),
    [("optimized_geometry_on_host", 1), ("streamed_compact", 171)],  # the latter is killed about checkpoints
)
def test_killed_runs_lose_nothing_that_was_saved(trainer, seed):
    """A short run of what `python -m tests.fault_trials` does at length."""
    report = fault_trials.kill_trials(trainer, kills=2, num_gaussians=1000, seed=seed)
    assert report.kills == 2
    assert report.lost == 0
    assert report.bit_equal
