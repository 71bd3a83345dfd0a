"""A run that was interrupted and resumed gives, bit for bit on the CPU, what one that never stopped gives."""

import functools
import json
import random
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch

import simple_trainer
import simple_trainer_hybrid_optimized
import simple_trainer_hybrid_optimized_split
import simple_trainer_hybrid_streamed
from datasets.synthetic import write_city_block
from offload.adam.state import current_rows
from tests.interrupted_runs import (
    DENSIFYING,
    FLOAT32_SCRIPTS,
    SCRIPTS,
    STEPS,
    assert_same_state,
    interrupt_after,
    run_script,
    saved,
)
from tests.training_scripts import MCMC, differences
from training.ply import load_ply

pytestmark = pytest.mark.usefixtures("anisotropic_gaussians")

ROUNDED = [
    pytest.param(
        simple_trainer_hybrid_streamed, ("--moments", "bfloat16", "--geometry", place), id=f"bfloat16, {place}"
    )
    for place in ("device", "host")
]
COMPACT = [
    pytest.param(simple_trainer_hybrid_streamed, ("--state", "compact", "--geometry", place), id=f"compact, {place}")
    for place in ("device", "host")
]
COMPACT += [
    pytest.param(simple_trainer_hybrid_optimized, ("--state", "compact"), id="optimized, compact"),
    pytest.param(
        simple_trainer_hybrid_optimized_split, ("--state", "compact", "--split_threshold", 0.5), id="split, compact"
    ),
]
HOST = ("--geometry", "host")


@pytest.fixture(scope="module")
def city_block(tmp_path_factory) -> Path:
    data_dir = tmp_path_factory.mktemp("data") / "city_block"
    write_city_block(data_dir, num_views=16, width=130, height=40, num_points=600)
    return data_dir


ARRANGED = pytest.param(simple_trainer_hybrid_streamed, ("--view_window", 5), id="streamed, views arranged")


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--max_gaussians", "--target_gaussians"])
def test_a_bound_below_the_model_that_is_resumed_is_told_of(monkeypatch, capsys, city_block, tmp_path, option):
    options = ("--refine_start_iter", 0, "--refine_every", 1, "--grow_grad2d", 0, "--prune_opa", 1e-6)
    assert run_script(monkeypatch, simple_trainer, city_block, tmp_path, "--max_steps", 1) == 0
    capsys.readouterr()
    more = ("--max_steps", 3, "--resume", *options, option, 400)
    assert run_script(monkeypatch, simple_trainer, city_block, tmp_path, *more) == 0
    said = capsys.readouterr().out
    assert said.count(f"{option} 400") == 1
    assert f"These are more than {option} 400: none are added, and none are removed" in said
    assert "growth" not in said
    assert len(saved(tmp_path, 3).gaussians["means"]) == 600


@pytest.mark.slow
def test_numbers_that_have_changed_are_told_with_commas(monkeypatch, capsys, city_block, tmp_path):
    common = ("--max_gaussians", 12_000, "--test_every", 8)
    assert run_script(monkeypatch, simple_trainer, city_block, tmp_path, "--max_steps", 1, *common) == 0
    more = ("--max_steps", 2, "--resume", "--max_gaussians", 9000, "--position_lr", 1e-3, "--absgrad")
    capsys.readouterr()
    assert run_script(monkeypatch, simple_trainer, city_block, tmp_path, *more) == 0
    told = {line for line in capsys.readouterr().out.splitlines() if " is now " in line}
    assert told == {
        "--max_steps is now 2; it was 1.",
        "--max_gaussians is now 9,000; it was 12,000.",
        "--position_lr is now 0.001; it was 0.00016.",
        "--absgrad is now True; it was False.",
    }


@pytest.mark.slow
def test_another_strategy_is_told_with_the_regularizers_that_it_brings(monkeypatch, capsys, city_block, tmp_path):
    """And without options that it makes no use of."""

    def told(*options: object) -> list[str]:
        assert run_script(monkeypatch, simple_trainer, city_block, tmp_path, *options) == 0
        return [line for line in capsys.readouterr().out.splitlines() if " is now " in line and "max_steps" not in line]

    mcmc = ("--strategy", "mcmc", "--max_gaussians", 900)
    assert told("--max_steps", 1, "--target_gaussians", 600, "--grow_grad2d", 1e-4) == []
    assert sorted(told("--max_steps", 2, "--resume", *mcmc, "--noise_lr", 7.0)) == [
        "--max_gaussians is now 900; it was 0.",
        "--noise_lr is now 7.0; it was 500000.0.",
        "--opacity_reg is now 0.01; it was 0.0.",
        "--scale_reg is now 0.01; it was 0.0.",
        "--strategy is now mcmc; it was default.",
    ]
    given = ("--opacity_reg", 0.01, "--scale_reg", 0.5, "--noise_lr", 7.0)
    assert told("--max_steps", 3, "--resume", *mcmc, *given) == ["--scale_reg is now 0.5; it was 0.01."]
    assert sorted(told("--max_steps", 4, "--resume", "--opacity_reg", 0.2, "--grow_grad2d", 1e-3)) == [
        "--grow_grad2d is now 0.001; it was 0.0002.",
        "--max_gaussians is now 0; it was 900.",
        "--opacity_reg is now 0.2; it was 0.01.",
        "--scale_reg is now 0.0; it was 0.5.",
        "--strategy is now default; it was mcmc.",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("script", "place"), [*SCRIPTS, *ROUNDED, *COMPACT, ARRANGED])
def test_an_interrupted_run_is_bit_equal(monkeypatch, city_block, tmp_path, script, place):
    options = (*DENSIFYING, "--keep", 0, *place)
    assert run_script(monkeypatch, script, city_block, tmp_path / "whole", *options) == 0
    stops = [*sorted(random.Random(script.__name__ + str(place)).sample(range(1, STEPS), 4)), 30, 31, 50]
    interrupt_after(monkeypatch, *stops)
    for _ in stops:
        assert run_script(monkeypatch, script, city_block, tmp_path / "parts", *options, "--resume") == 0
    assert run_script(monkeypatch, script, city_block, tmp_path / "parts", *options, "--resume") == 0
    assert len(saved(tmp_path / "whole").gaussians["means"]) > 700
    assert_same_state(saved(tmp_path / "parts"), saved(tmp_path / "whole"))
    if script is simple_trainer_hybrid_optimized_split:
        assert any("upcoming/tiles" in saved(tmp_path / "parts", stop).state for stop in stops)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options"),
    [
        pytest.param(simple_trainer, ("--adam", "deferred", *MCMC), id="gpu-only, deferred, mcmc"),
        pytest.param(simple_trainer_hybrid_streamed, (*HOST, "--state", "compact", *MCMC), id="compact, host, mcmc"),
        pytest.param(simple_trainer_hybrid_optimized, ("--state", "compact", *MCMC), id="optimized, compact, mcmc"),
        pytest.param(simple_trainer_hybrid_optimized_split, (*HOST, "--split_threshold", 0.5, *MCMC), id="split, mcmc"),
        pytest.param(simple_trainer_hybrid_optimized, ("--target_gaussians", 900, "--scale_reg", 0.1), id="target"),
    ],
)
def test_an_interrupted_run_of_other_strategies_is_bit_equal(monkeypatch, city_block, tmp_path, script, options):
    options = (*DENSIFYING, *options, "--keep", 0)
    assert run_script(monkeypatch, script, city_block, tmp_path / "whole", *options) == 0
    interrupt_after(monkeypatch, 17, 31)
    for _ in range(3):
        assert run_script(monkeypatch, script, city_block, tmp_path / "parts", *options, "--resume") == 0
    assert_same_state(saved(tmp_path / "parts"), saved(tmp_path / "whole"))
    num_gaussians = len(saved(tmp_path / "whole").gaussians["means"])
    assert abs(num_gaussians - 900) <= 45 if "--target_gaussians" in options else num_gaussians > 700


@pytest.mark.slow
def test_another_strategy_goes_on(monkeypatch, city_block, tmp_path):
    """Its state begins anew: mcmc owes no noise of the steps before, and default has no statistics."""
    options = ("--keep", 0, *DENSIFYING, "--max_gaussians", 700)
    interrupt_after(monkeypatch, 15, 32)
    for strategy in ("default", "mcmc", "default"):
        given = (*options, "--strategy", strategy, "--resume")
        assert run_script(monkeypatch, simple_trainer_hybrid_streamed, city_block, tmp_path, *given) == 0
    assert (saved(tmp_path, 32).state["mcmc/owed_from"] >= 15).all()
    assert "mcmc/owed_from" not in saved(tmp_path).state


@pytest.mark.slow
def test_saving_changes_nothing(monkeypatch, city_block, tmp_path):
    script, options = simple_trainer_hybrid_optimized, (*DENSIFYING, "--geometry", "host")
    assert run_script(monkeypatch, script, city_block, tmp_path / "plain", *options) == 0
    options = (*options, "--save_every", 3, "--keep", 0)
    assert run_script(monkeypatch, script, city_block, tmp_path / "saving", *options) == 0
    assert len(list((tmp_path / "saving/ckpts").iterdir())) == STEPS // 3
    assert_same_state(saved(tmp_path / "saving"), saved(tmp_path / "plain"))


UNDISTURBED = ("--max_steps", 21, "--save_steps", 20, "--refine_start_iter", 1000, "--num_workers", 1)
SHOWN = ("--eval_steps", 20, "--ply_steps", 20, "--timelapse", 20)


@pytest.fixture(scope="module")
def undisturbed(city_block, tmp_path_factory):
    """Of a trainer, the folder of a run of 21 steps that has saved after 20 of them."""

    @functools.cache
    def run(script: ModuleType, place: tuple) -> Path:
        folder = tmp_path_factory.mktemp("undisturbed")
        with pytest.MonkeyPatch.context() as monkeypatch:
            assert run_script(monkeypatch, script, city_block, folder, *UNDISTURBED, *SHOWN, *place) == 0
        return folder

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("after_script", "after_place"), FLOAT32_SCRIPTS)
@pytest.mark.parametrize(("before_script", "before_place"), [SCRIPTS[0], SCRIPTS[1], SCRIPTS[4], SCRIPTS[5]])
def test_another_trainer_goes_on(
    monkeypatch, city_block, tmp_path, undisturbed, before_script, before_place, after_script, after_place
):
    """Its first step after the change gives what the first trainer's would have given, up to rounding."""
    whole = undisturbed(before_script, before_place)
    (tmp_path / "ckpts").mkdir()
    shutil.copy(whole / "ckpts/ckpt_20.pt", tmp_path / "ckpts")
    options = (*UNDISTURBED, "--max_gaussians", 700, "--resume", *after_place)
    assert run_script(monkeypatch, after_script, city_block, tmp_path, *options) == 0
    expected, actual = saved(whole, 21), saved(tmp_path, 21)
    for name, value in expected.gaussians.items():
        assert torch.allclose(actual.gaussians[name], value, rtol=1e-5, atol=1e-6), name
    current = (next(current_rows(checkpoint.state, "sh0"))[1] for checkpoint in (expected, actual))
    moments, other_moments = (rows["exp_avg"] for rows in current)
    assert (moments - other_moments).norm() < 1e-5 * moments.norm()


@pytest.mark.slow
@pytest.mark.parametrize(("script", "place"), SCRIPTS)
def test_what_a_kill_has_left_out_after_a_checkpoint_is_made_up_for(
    monkeypatch, city_block, tmp_path, undisturbed, script, place
):
    """Before training goes on, which it does as if nothing had been missing."""
    whole = undisturbed(script, place)
    (tmp_path / "ckpts").mkdir()
    shutil.copy(whole / "ckpts/ckpt_20.pt", tmp_path / "ckpts")
    options = (*UNDISTURBED, *SHOWN, *place, "--resume")
    assert run_script(monkeypatch, script, city_block, tmp_path, *options) == 0
    expected, actual = (json.loads((folder / "stats/val_step20.json").read_text()) for folder in (whole, tmp_path))
    for key in ("num_GS", "psnr", "ssim"):
        assert actual[key] == expected[key]
    assert json.loads((tmp_path / "stats/train_step20.json").read_text())["num_GS"] == expected["num_GS"]
    assert (tmp_path / "ply/point_cloud_20.ply").read_bytes() == (whole / "ply/point_cloud_20.ply").read_bytes()
    assert (tmp_path / "videos/timelapse/step_000000020.jpg").is_file()
    assert_same_state(saved(tmp_path, 21), saved(whole, 21))


@pytest.mark.slow
def test_what_is_there_or_not_asked_for_is_not_made(monkeypatch, city_block, tmp_path, undisturbed):
    shutil.copytree(undisturbed(simple_trainer, ()), tmp_path, dirs_exist_ok=True)
    (tmp_path / "ckpts/ckpt_21.pt").unlink()
    (tmp_path / "ply/point_cloud_20.ply").unlink()
    before = (tmp_path / "stats/val_step20.json").stat().st_mtime_ns
    options = (*UNDISTURBED, "--eval_steps", 20, "--resume")
    assert run_script(monkeypatch, simple_trainer, city_block, tmp_path, *options) == 0
    assert (tmp_path / "stats/val_step20.json").stat().st_mtime_ns == before
    assert not (tmp_path / "ply/point_cloud_20.ply").exists()


def test_a_deferred_checkpoint_holds_current_values(monkeypatch, city_block, tmp_path):
    """What --ckpt evaluates is what the PLY file holds, although rows in the file lag behind."""
    options = ("--max_steps", 12, "--geometry", "host", "--refine_start_iter", 1000)
    assert run_script(monkeypatch, simple_trainer_hybrid_optimized, city_block, tmp_path, *options) == 0
    exported, checkpoint = load_ply(tmp_path / "ply/point_cloud_12.ply"), saved(tmp_path, 12)
    assert (checkpoint.state["last_step/appearance"] < 12).any()
    assert not torch.equal(checkpoint.state["parameters/sh0"], exported["sh0"])
    for name, value in checkpoint.gaussians.items():
        assert torch.allclose(value, exported[name], rtol=1e-6, atol=1e-7), name


@pytest.mark.cuda
@pytest.mark.parametrize(("script", "place"), SCRIPTS)
def test_an_interrupted_run_on_the_gpu_is_the_same_up_to_rounding(monkeypatch, city_block, tmp_path, script, place):
    """As far as two undisturbed runs are the same: the rasterizer adds in any order."""
    options = ("--max_steps", 40, "--refine_start_iter", 10**6, "--sh_degree_interval", 10, "--device", "cuda", *place)
    assert run_script(monkeypatch, script, city_block, tmp_path / "whole", *options) == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 13, 27)
        for _ in range(3):
            assert run_script(patch, script, city_block, tmp_path / "parts", *options, "--resume") == 0
    found = differences(saved(tmp_path / "parts", 40).gaussians, saved(tmp_path / "whole", 40).gaussians)
    assert max(found.values()) < 1e-4, found
