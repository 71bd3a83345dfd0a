"""Checkpoints of several processes: whole or not there, continued by any number of them, and by one end for all."""

import errno
import functools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from plyfile import PlyData
from scipy.optimize import linear_sum_assignment

from configs import Config
from datasets.scene import load_scene
from distributed.levelling import HeldTwice
from distributed.mesh import Ranks, RanksParted, Terminated
from distributed.watch import End, Process, Watch
from errors import DamagedError, InputError
from exports.source import open_source
from offload.adam.state import names_of_rows
from tests.interrupted_runs import assert_same_state
from tests.rank_groups import StayingRanks, run_in_group
from tests.ranked_scripts import ScriptGroup, options_for
from tests.training_scripts import anisotropic_start, differences
from tests.waiting import HANGS_AFTER
from trainers import TRAINERS
from training.agreement import check_same_dataset, check_same_options
from training.checkpoint_folder import CheckpointFolder
from training.checkpoints import Checkpoint, Part, load_checkpoint, peek_checkpoint
from training.command_line import main
from training.ending import Ending, read_ending
from training.joined_rows import JoinedRows, Runs, whole
from training.joint_run import JointRun, told_once

pytestmark = pytest.mark.slow  # several processes each

STEPS = (
    *("--refine_start_iter", 8, "--refine_every", 8, "--refine_stop_iter", 30, "--reset_every", 1000),
    *("--grow_grad2d", 4e-4, "--sh_degree_interval", 15, "--save_every", 0, "--eval_steps", 1000),
)
BOUND = 1e-4
TO_32 = ("--max_steps", 32, "--resume", "--timelapse", 4, "--eval_steps", 24, "--ply_steps", 24)
# Options, by the strategy's name in checkpoints; with mcmc most rows are owed noise, and some are dead.
STRATEGIES: dict[str, tuple[object, ...]] = {
    "densification": (),
    "mcmc": ("--strategy", "mcmc", "--max_gaussians", 700, "--init_opacity", 0.05, "--prune_opa", 0.045),
}


def smooth_noise(means: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Noise that follows from the rows, whoever holds them and in whichever order."""
    return torch.stack([torch.sin(30 * means), torch.cos(30 * means)])


def train(ranks: Ranks | None, data_dir: Path, result_dir: Path, *options: object, trainer: str = "streamed") -> None:
    """Train with a script in this process, as one of the ranks."""
    way = TRAINERS[trainer]
    script = way.load()
    staying = None if ranks is None else StayingRanks(**vars(ranks))
    arguments = (*options_for(data_dir, result_dir), *STEPS, *options, *way.arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.joint_run.arrive", lambda *given: staying)
        patch.setattr("training.command_line.leave", lambda: None)
        patch.setattr("training.beginning.initial_gaussians", anisotropic_start)
        patch.setattr("strategies.ops.noise_of_halves", smooth_noise)
        patch.setattr("training.reporting.load_lpips", lambda net, device: None)
        patch.setattr("sys.argv", [f"{way.script}.py", "default", *map(str, arguments)])
        main(script.CONFIGS, script.train, "")


def go_on(ranks: Ranks, data_dir: Path, result_dir: Path) -> None:
    train(ranks, data_dir, result_dir, *TO_32, "--save_every", 4, "--keep", 1)


def stop_and_go_on(ranks: Ranks, data_dir: Path, result_dir: Path, trainer: str, strategy: str) -> None:
    """Train 16 steps, and the last of them once more from the checkpoint before."""
    options = ("--max_steps", 16, "--save_steps", 10, *STRATEGIES[strategy])
    train(ranks, data_dir, result_dir, *options, trainer=trainer)
    ranks.barrier()
    if ranks.leads:
        shutil.copytree(result_dir, result_dir.with_name("undisturbed"))
        (result_dir / "ckpts/ckpt_16.pt").unlink()
    ranks.barrier()
    train(ranks, data_dir, result_dir, *options, "--resume", trainer=trainer)


def differ(ranks: Ranks, data_dir: Path, folder: Path) -> list[str]:
    """What this rank says where it has other options, or another dataset, than the other."""
    said = []
    own_dir = folder / f"data_{ranks.rank}"
    shutil.copytree(data_dir, own_dir)
    for change in (lambda: None, lambda: add_a_byte(own_dir / "images/03.png")):
        if ranks.rank == 1:
            change()
        try:
            check_same_dataset(ranks, load_scene(own_dir))
            said.append("")
        except InputError as error:
            said.append(str(error))
    scripts = ["simple_trainer.py", "simple_trainer_hybrid_streamed.py"]
    configs = [TRAINERS[name].load().CONFIGS["default"] for name in ("gpu_only", "streamed")]
    with pytest.raises(InputError) as options:
        check_same_options(ranks, scripts[0], Config(seed=ranks.rank, num_workers=ranks.rank))
    with pytest.raises(InputError) as script:
        check_same_options(ranks, scripts[ranks.rank], configs[ranks.rank])
    return [*said, str(options.value), str(script.value)]


def add_a_byte(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"0")


def fail_to_save(ranks: Ranks, folder: Path) -> list[str]:
    """What two checkpoints come to, of which the second rank cannot write the first."""
    checkpoints, found = CheckpointFolder(folder, keep=0, ranks=ranks), []
    state = load_checkpoint(folder.parent / "one/ckpts/ckpt_16.pt").state
    for failing in (1, 2):
        with pytest.MonkeyPatch.context() as patch:
            if ranks.rank == failing:
                patch.setattr("training.checkpoint_writing._seal", disk_is_full)
            part = Part(ranks.rank, ranks.size, names_of_rows(state))
            checkpoints.save(Checkpoint(16, np.eye(4), state, part=part))
            found.append(repr(checkpoints.wait()))
        ranks.barrier()
        found.append(" ".join(sorted(file.name for file in folder.iterdir())))
        ranks.barrier()
    checkpoints.close()
    return found


def disk_is_full(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, "no room for a test")


@pytest.fixture(scope="module")
def found() -> dict[str, list[Any]]:
    """What the cases of two ranks have found, beside the runs."""
    return {}


@pytest.fixture(scope="module")
def runs(city_block, tmp_path_factory, found) -> Path:
    """A folder with runs that several processes have done: several, by 3, 1 and 2 of them, and the same by one process,
    whose batches are as large; stopped and undisturbed."""
    folder = tmp_path_factory.mktemp("runs")
    several = folder / "several"
    train_by_one(folder, city_block)
    cases: dict[str, Callable[[Ranks], Any]] = {
        "train": functools.partial(train_to_16, data_dir=city_block, result_dir=several)
    }
    run_in_group(3, cases, tmp_path_factory.mktemp("three"))
    train(None, city_block, several, "--max_steps", 24, "--resume")
    shutil.copytree(several, folder / "joined")
    for result in ("stats/val_step24.json", "ply/point_cloud_24.ply"):  # as if it was killed before these
        (several / result).unlink()
    cases = {
        "go on": functools.partial(go_on, data_dir=city_block, result_dir=several),
        **{
            f"stop, {name}": functools.partial(
                stop_and_go_on,
                data_dir=city_block,
                result_dir=folder / name / "stopped",
                trainer="optimized",
                strategy=name,
            )
            for name in STRATEGIES
        },
        "differ": functools.partial(differ, data_dir=city_block, folder=tmp_path_factory.mktemp("differ")),
        "fail": functools.partial(fail_to_save, folder=folder / "failed"),
    }
    (folder / "failed").mkdir()
    found.update(run_in_group(2, cases, tmp_path_factory.mktemp("two")))
    return folder


def train_by_one(folder: Path, city_block: Path) -> None:
    """The same by one process, whose batches are as large as those of all ranks."""
    one = folder / "one"
    for size, options in ((3, ("--max_steps", 16)), (1, ("--max_steps", 24, "--resume")), (2, TO_32)):
        train(None, city_block, one, *options, "--batch_size", size)


def train_to_16(ranks: Ranks, data_dir: Path, result_dir: Path) -> None:
    train(ranks, data_dir, result_dir, "--max_steps", 16)


@pytest.mark.parametrize("steps", [16, 24, 32])
def test_a_run_by_3_then_1_then_2_processes_is_that_of_one(runs, steps):
    actual, expected = (
        load_checkpoint(runs / name / f"ckpts/ckpt_{steps}.pt").gaussians for name in ("several", "one")
    )
    assert len(actual["means"]) == len(expected["means"])
    mine, its = linear_sum_assignment(torch.cdist(actual["means"], expected["means"]))  # rows may be anywhere
    found = differences({n: v[mine] for n, v in actual.items()}, {n: v[its] for n, v in expected.items()})
    assert max(found.values()) < BOUND, found


@pytest.mark.parametrize(("strategy", "gathered"), [("densification", "grad2d"), ("mcmc", "owed_from")])
def test_the_same_ranks_continue_bit_by_bit(runs, strategy, gathered):
    stopped, undisturbed = (
        load_checkpoint(runs / strategy / name / "ckpts/ckpt_16.pt") for name in ("stopped", "undisturbed")
    )
    for part, expected in zip(stopped.parts, undisturbed.parts, strict=True):
        assert_same_state(part, expected)
    for statistics in (f"{strategy}/{gathered}", "parameters/means"):
        rows = [len(part.state[statistics]) for part in stopped.parts]
        assert min(rows) > 0
        assert len(stopped.state[statistics]) == sum(rows)


def test_one_file_makes_a_checkpoint_and_goes_first(runs):
    """Of periodic checkpoints one was to stay; parts have gone with the others."""
    names = sorted(file.name for file in (runs / "several/ckpts").iterdir())
    wholes = [name for name in names if name.endswith(".pt")]
    assert wholes == ["ckpt_16.pt", "ckpt_24.pt", "ckpt_28.pt", "ckpt_32.pt"]
    counts = {name: sum(part.startswith(name.removesuffix("pt")) for part in names) - 1 for name in wholes}
    assert counts == {"ckpt_16.pt": 3, "ckpt_24.pt": 0, "ckpt_28.pt": 2, "ckpt_32.pt": 2}


# By 3 ranks, of whom one draws a view that does not count; by 2, which make up for what one process has left; and by 2.
@pytest.mark.parametrize("steps", [16, 24, 32])
def test_results_are_those_of_the_whole_model(runs, city_block, tmp_path, steps):
    """One PLY file with all rows in the order of the parts, one evaluation that says what one process says."""
    folder = runs / "several"
    file = folder / f"ckpts/ckpt_{steps}.pt"
    vertex = PlyData.read(folder / f"ply/point_cloud_{steps}.ply")["vertex"]
    means = np.stack([vertex[axis] for axis in "xyz"], axis=1)
    expected = load_checkpoint(file).gaussians["means"].numpy()
    if steps == 24:  # one process has written it, and two the PLY file
        means, expected = (rows[np.lexsort(rows.T)] for rows in (means, expected))
    assert np.array_equal(means, expected)
    train(None, city_block, tmp_path, "--ckpt", file)
    ours, alone = (json.loads((path / f"stats/val_step{steps}.json").read_text()) for path in (folder, tmp_path))
    assert [image["name"] for image in ours["images"]] == [image["name"] for image in alone["images"]]
    for key in ("psnr", "ssim"):
        assert ours[key] == pytest.approx(alone[key], rel=1e-4)
    assert ours["num_GS"] == alone["num_GS"] == len(means)
    assert json.loads((folder / "ended.json").read_text())["status"] == "finished"


def test_a_timelapse_shows_the_gaussians_of_all_ranks(runs):
    frames, alone = (sorted((runs / name / "videos/timelapse").iterdir()) for name in ("several", "one"))
    assert [file.name for file in frames] == [file.name for file in alone]
    assert [int(file.stem.removeprefix("step_")) for file in frames] == [24, 28, 32]
    for file, other in zip(frames, alone, strict=True):
        shown, expected = (imageio.imread(each).astype(float) for each in (file, other))
        assert np.abs(shown - expected).mean() < 0.5  # of 255
        assert expected.std() > 10
    assert (runs / "several/videos/timelapse.mp4").stat().st_size > 0


def test_exports_read_rows_of_all_parts_in_any_order(runs):
    checkpoint = runs / "several/ckpts/ckpt_32.pt"
    source, expected = open_source(checkpoint), load_checkpoint(checkpoint).gaussians
    order = torch.randperm(source.num_gaussians, generator=torch.Generator().manual_seed(0))
    for name, values in expected.items():
        assert torch.equal(source.parameter(name, order), values[order])


def test_a_damaged_or_missing_part_is_found_and_the_checkpoint_before_is_taken(runs, tmp_path):
    def newest(damage: Callable[[Path], None]) -> tuple[int, list[str]]:
        folder, said = tmp_path / damage.__name__, []
        shutil.copytree(runs / "several/ckpts", folder)
        (part,) = folder.glob("ckpt_32.*.2of2.part")
        damage(part)
        with pytest.raises(DamagedError, match="ckpt_32"):
            load_checkpoint(folder / "ckpt_32.pt")
        checkpoints = CheckpointFolder(folder, keep=0)
        found = checkpoints.newest_valid(said.append)
        checkpoints.close()
        return found.steps, said

    def flip(part: Path) -> None:
        content = bytearray(part.read_bytes())
        content[len(content) // 2] ^= 1
        part.write_bytes(content)

    def another(part: Path) -> None:
        (older,) = part.parent.glob("ckpt_28.*.2of2.part")
        shutil.copy(older, part)

    def cut(part: Path) -> None:
        os.truncate(part, part.stat().st_size - 9)

    damaged = r"Skipped: .*/ckpt_32\.pt has a damaged part, ckpt_32\..*\.2of2\.part: copy that one again .*"
    for damage, told in {
        flip: damaged, cut: damaged, another: ".*written with another.*", Path.unlink: ".*lacks its part.*"
    }.items():  # fmt: skip
        steps, said = newest(damage)
        assert (steps, len(said)) == (28, 1)
        assert re.fullmatch(told, said[0])


def test_a_part_that_cannot_be_written_leaves_no_checkpoint(runs, found):
    for failure, left, second, names in found["fail"]:
        assert "no room for a test" in failure
        assert (left, second) == ("", "None")
        assert names == "ckpt_16.2.1of2.part ckpt_16.2.2of2.part ckpt_16.pt"
    whole_model, half = load_checkpoint(runs / "failed/ckpt_16.pt"), load_checkpoint(runs / "one/ckpts/ckpt_16.pt")
    assert torch.equal(whole_model.gaussians["means"], half.gaussians["means"].repeat(2, 1))


def test_ranks_with_other_options_or_photos_are_refused_at_all_of_them(runs, found):
    for alike, photos, options, script in found["differ"]:
        assert alike == ""
        assert re.fullmatch(r"rank 1 .* and rank 0 .* differ in the sizes of the files of photos in .*", photos)
        assert re.fullmatch(r"rank 1 .* and rank 0 .* differ in --seed \(1 instead of 0\): .*", options)
        assert re.fullmatch(
            r"rank 1 .* differ in the script that they run \(simple_trainer_hybrid_streamed\.py instead of "
            r"simple_trainer\.py\): .*",
            script,
        )


def test_what_a_killed_save_leaves_is_removed(runs, tmp_path):
    shutil.copytree(runs / "several/ckpts", tmp_path / "ckpts")
    before = set((tmp_path / "ckpts").iterdir())
    for name in ("ckpt_33.9.1of2.part", "ckpt_33.9.2of2.part.partial", "ckpt_33.pt.partial"):
        (tmp_path / "ckpts" / name).write_bytes(b"1")
    checkpoints = CheckpointFolder(tmp_path / "ckpts", keep=0)
    checkpoints.remove_unfinished()
    checkpoints.close()
    assert set((tmp_path / "ckpts").iterdir()) == before


def test_a_part_is_not_taken_for_a_model(runs):
    (part,) = (runs / "several/ckpts").glob("ckpt_32.*.1of2.part")
    with pytest.raises(InputError, match=r"one of the 2 parts .* ckpt_32\.pt"):
        load_checkpoint(part)
    assert len(peek_checkpoint(part.with_name("ckpt_32.pt")).parts) == 2


def test_joined_rows_are_read_like_a_tensor():
    rows = torch.arange(60).view(20, 3)
    parts = [rows[:7], rows[7:7], rows[7:19], rows[19:]]
    joined = JoinedRows(parts, Runs.of_all([len(part) for part in parts]))
    generator = np.random.default_rng(0)
    for _ in range(50):
        first, last = sorted(generator.integers(0, 25, 2).tolist())
        assert torch.equal(joined[first:last], rows[first:last])
        ids = np.flatnonzero(generator.random(20) < 0.6)
        assert torch.equal(whole(joined.picked(ids)), rows[ids])
        numbers = torch.from_numpy(generator.integers(0, 20, first))
        assert torch.equal(joined[numbers], rows[numbers])
        numbers = torch.from_numpy(generator.permutation(len(ids)))
        assert torch.equal(joined.picked(ids)[numbers], rows[ids][numbers])
    assert joined.shape == rows.shape


# ------------------------------------------------------------------------------------------------ one end for all


def ends(city_block: Path, result_dir: Path, fault: str, *more: object) -> tuple[list[tuple[int, str]], int]:
    """How two ranks end, of whom the second meets a fault, and the steps of the newest checkpoint they leave."""
    options = options_for(city_block, result_dir, "--max_steps", 1000, "--save_every", 4, *STEPS[:4], *more)
    found = ScriptGroup(2, "streamed", options, {1: fault}).ends()
    checkpoints = CheckpointFolder(result_dir / "ckpts", keep=0)
    newest = checkpoints.newest_valid(print)
    checkpoints.close()
    return found, newest.steps


def sentences(ended: list[tuple[int, str]], beginning: str) -> list[str]:
    lines = [line for _, output in ended for line in output.splitlines()]
    return [line for line in lines if line.startswith(beginning)]


def test_a_killed_rank_ends_the_others_with_a_sentence(city_block, tmp_path):
    ended, steps = ends(city_block, tmp_path, "kill@7")
    assert [code for code, _ in ended] == [1, -9]
    (sentence,) = sentences(ended, "Stopped: ")
    assert "rank 1 (process" in sentence
    assert sentence.endswith("--resume")
    assert steps == 4
    assert read_ending(tmp_path) == Ending("failed", sentence)


def test_a_rank_that_is_killed_before_it_trains_ends_the_others_with_a_sentence(city_block, tmp_path):
    """By SIGTERM torchrun would end them, too, before they say it."""
    options = options_for(city_block, tmp_path / "results", "--max_steps", 9)
    group = ScriptGroup(2, "streamed", options, {0: "patient", 1: "early_kill"})
    group.end_as_torchrun_does()
    ended = group.ends()
    assert [code for code, _ in ended] == [1, -9]
    (sentence,) = sentences(ended, "Stopped: ")
    assert re.fullmatch(r"Stopped: rank 1 \(process .*\) has ended without a word, as if it was killed\.", sentence)
    assert "Traceback" not in ended[0][1]
    assert not (tmp_path / "results").exists()  # nothing has begun there


def test_sigterm_from_outside_before_the_first_step_is_told_once(city_block, tmp_path):
    options = options_for(city_block, tmp_path / "results", "--max_steps", 9)
    ended = ScriptGroup(2, "streamed", options, {0: "terminate", 1: "terminate"}).ends()
    assert [code for code, _ in ended] == [1, 1]
    (sentence,) = sentences(ended, "Stopped: ")
    assert re.fullmatch(r"Stopped: rank \d \(.*\): SIGTERM has come before the first step\.", sentence)
    assert not any("Traceback" in output for _, output in ended)


def test_what_would_fit_is_told_of_the_rank_with_the_least_room(city_block, tmp_path):
    """Both have the same memory."""
    ended = ScriptGroup(2, "streamed", options_for(city_block, tmp_path, "--max_steps", 1, "--shares", 1, 9)).ends()
    assert [code for code, _ in ended] == [0, 0]
    assert sentences(ended, "For a rank that holds") == ["For a rank that holds 90 % of the Gaussians:"]
    assert len(sentences(ended, "Memory for ")) == len(sentences(ended, "About ")) == 1


def test_an_error_that_the_first_does_not_tell_is_told_by_who_has_it(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("distributed.mesh.TELLS_WITHIN", 0)
    with pytest.raises(InputError, match="only here"), told_once(InputError):
        raise InputError("only here")


def test_what_two_ranks_hold_is_not_saved(monkeypatch):
    monkeypatch.setattr("training.joint_run.signal.signal", lambda *_: None)
    joint = JointRun(Config(), torch.device("cpu"))
    joint._watch = SimpleNamespace(rank=0, end_by=lambda sentence: End(0, 0, sentence, is_gone=False))
    stopped = joint.stopped(HeldTwice("Held twice."), "Held twice.", "python x.py", pytest.fail, pytest.fail)
    assert str(stopped) == "Held twice. Continue with: python x.py"


class Notices(dict):
    """A board that nobody else sees."""

    read = dict.get

    def post(self, name: str, value: Any) -> None:
        self[name] = value

    def post_first(self, name: str, value: Any) -> Any:
        return self.setdefault(name, value)


@pytest.mark.parametrize("error", [RanksParted("a line is closed"), Terminated("SIGTERM has come")])
@pytest.mark.parametrize(
    ("arrived", "told"),
    [
        ({}, "rank 0 has not come to where the others met, as if it was killed"),
        ({2: True}, "rank 0 has not come to where the others met, as if it was killed"),
        ({2: False}, r"rank 2 \(process 1 on there\) has ended without a word, as if it was killed"),
    ],
)
def test_a_rank_that_is_missing_before_all_have_met_is_named(monkeypatch, error, arrived, told):
    """The one of three that asks is rank 1; who has come and ended is more certain than who has not come."""
    monkeypatch.setattr("distributed.watch.LOOKS_EVERY", 0.02)
    monkeypatch.setattr("distributed.watch.SUSPECTED_FOR", 0.2)
    monkeypatch.setattr("distributed.watch.CAUSED_WITHIN", HANGS_AFTER)
    monkeypatch.setattr("distributed.watch._runs", count())
    notices = Notices()
    for rank, lives in arrived.items():
        process = Process.own() if lives else replace(Process.own(), host="there", pid=1, started="never")
        notices[f"run 0 arrived {rank}"] = asdict(process)
    with Watch(SimpleNamespace(rank=1, size=3, board=notices), print) as watch:
        end = watch.end_by_others(error)
    assert "run 0 arrived 1" in notices
    assert re.fullmatch(told, end.sentence)
    assert end.told_by == 1


@pytest.mark.parametrize(
    ("fault", "steps", "status", "told"),
    [
        ("picture@7", 5, "failed", "rank 1 .*: photos/7.png cannot be decoded"),
        ("unfinished@7", 7, "out of memory", "rank 1 .*: Host memory ran out after 7 steps"),
        ("late_error@7", 6, "out of memory", "rank 1 .*: Host memory ran out after 6 steps"),
    ],
)
def test_an_error_at_one_rank_saves_all_and_is_told_once(city_block, tmp_path, fault, steps, status, told):
    ended, saved = ends(city_block, tmp_path, fault, "--background", "sky", "--exposure", "affine")
    assert [code for code, _ in ended] == [1, 1]
    (sentence,) = sentences(ended, "Stopped: ")
    assert re.search(told, sentence)
    assert f"The Gaussians are saved in {tmp_path}/ckpts/ckpt_{steps}.pt" in sentence
    assert saved == steps
    first, second = (part.state for part in load_checkpoint(tmp_path / f"ckpts/ckpt_{steps}.pt").parts)
    for module in ("sky", "affine"):
        assert first[f"{module}/step_count"] == steps
        assert torch.equal(first[f"{module}/rows"], second[f"{module}/rows"])
        assert first[f"{module}/rows"].std() > 0
    assert read_ending(tmp_path) == Ending(status, sentence)


def test_a_rank_that_cannot_write_its_last_part_is_told_once(city_block, tmp_path):
    options = options_for(city_block, tmp_path, "--max_steps", 2, "--save_every", 0)
    ended = ScriptGroup(2, "streamed", options, {1: "full"}).ends()
    assert [code for code, _ in ended] == [1, 1]
    (sentence,) = sentences(ended, "Stopped: ")
    assert sentence.count("The Gaussians after 2 steps could not be saved in") == 1
    assert re.search(r"rank 1\b.*no room for a test\)", sentence)  # whoever tells
    assert sentence.endswith("--resume")
    assert read_ending(tmp_path) == Ending("failed", sentence)
    assert not any("training goes on" in output for _, output in ended)
    assert not list((tmp_path / "ckpts").iterdir())


@pytest.mark.parametrize("wrong", [("--save_every", "xyz"), ("--no_such_option",)])
def test_a_wrong_option_is_told_by_the_first_although_another_process_is_sooner(tmp_path, wrong):
    """torchrun ends all as soon as one has left."""
    options = options_for(tmp_path, tmp_path / "results", *wrong)
    group = ScriptGroup(2, "gpu_only", options, {0: "slow", 1: "patient"})
    group.end_as_torchrun_does()
    (first, told), (_, silent) = group.ends()
    assert first == 2
    assert wrong[0] in told
    assert wrong[0] not in silent


@pytest.mark.parametrize("wrong", [("--max_steps", "-1"), ("--data_dir", "nowhere")])
def test_the_group_is_left_when_all_is_told(monkeypatch, capsys, city_block, tmp_path, wrong):
    """NCCL may wait for ranks that are gone."""
    monkeypatch.setattr("training.command_line.leave", lambda: print("left", file=sys.stderr))
    arguments = options_for(city_block, tmp_path, *wrong)
    monkeypatch.setattr("sys.argv", ["script", "default", *map(str, arguments)])
    script = TRAINERS["gpu_only"].load()
    with pytest.raises(SystemExit):
        main(script.CONFIGS, script.train, "")
    said = capsys.readouterr().err
    assert "Error: " in said
    assert said.endswith("left\n")


def test_ctrl_c_in_an_evaluation_is_told_once(runs, city_block, tmp_path):
    checkpoint = runs / "several/ckpts/ckpt_32.pt"
    options = options_for(city_block, tmp_path, "--ckpt", checkpoint, "--test_every", 4)
    ended = ScriptGroup(2, "streamed", options, {0: "stop@2", 1: "stop@2"}).ends()
    assert sorted(code for code, _ in ended) == [1, 130]  # who says it says that it was interrupted
    assert sentences(ended, "Stopped") == ["Stopped: the evaluation is not complete (2 of 4 views)."]
    assert json.loads((tmp_path / "ended.json").read_text())["status"] == "interrupted"


@pytest.mark.parametrize("rank", [0, 1])
def test_ctrl_c_before_ranks_have_met_is_told_by_the_first(monkeypatch, capsys, rank):
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setattr("training.command_line.parse", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main({}, interrupted, "")
    assert stopped.value.code == 130
    assert capsys.readouterr().err == ("" if rank else "Stopped before anything was done.\n")


def test_ctrl_c_at_one_rank_ends_all_after_the_same_step(city_block, tmp_path):
    ended, steps = ends(city_block, tmp_path, "interrupt@7", "--timelapse", 2)
    assert [code for code, _ in ended] == [0, 0]
    (sentence,) = sentences(ended, "The timelapse")
    assert sentence == "The timelapse was left after 0 of 4 frames: --resume makes it anew."
    assert [path.name for path in (tmp_path / "videos").iterdir()] == ["timelapse"]  # the frames
    (sentence,) = sentences(ended, "Interrupted after")
    assert sentence == f"Interrupted after 7 steps; saved {tmp_path}/ckpts/ckpt_7.pt"
    assert steps == 7


def test_ctrl_c_in_the_last_step_leaves_the_timelapse(city_block, tmp_path):
    options = options_for(city_block, tmp_path, "--max_steps", 4, "--timelapse", 1)
    ended = ScriptGroup(2, "streamed", options, {0: "interrupt@4"}).ends()
    assert [code for code, _ in ended] == [0, 0]
    (sentence,) = sentences(ended, "The timelapse")
    assert sentence == "The timelapse was left after 0 of 4 frames: --resume makes it anew."
    (sentence,) = sentences(ended, "Interrupted after")
    assert sentence == f"Interrupted after 4 steps; saved {tmp_path}/ckpts/ckpt_4.pt"
    assert json.loads((tmp_path / "ended.json").read_text())["status"] == "interrupted"
    ended = ScriptGroup(2, "streamed", (*options, "--resume"), {}).ends()
    assert sentences(ended, "The timelapse") == ["The timelapse shows 4 frames, 2 a second, in 2.0 s."]
    assert (tmp_path / "videos/timelapse.mp4").stat().st_size > 0


def test_ctrl_c_at_one_rank_ends_a_video_between_frames(city_block, tmp_path):
    options = options_for(city_block, tmp_path, "--max_steps", 2, "--video", "--video_seconds", 0.4)
    ended = ScriptGroup(2, "gpu_only", options, {1: "frame@3"}).ends()
    assert [code for code, _ in ended] == [0, 0]
    (sentence,) = sentences(ended, "The video was left")
    assert sentence == "The video was left after 4 of 12 frames: --resume makes it anew."
    (sentence,) = sentences(ended, "Interrupted after")
    assert sentence == f"Interrupted after 2 steps; saved {tmp_path}/ckpts/ckpt_2.pt"
    assert not list((tmp_path / "videos").iterdir())
    assert json.loads((tmp_path / "ended.json").read_text())["status"] == "interrupted"
