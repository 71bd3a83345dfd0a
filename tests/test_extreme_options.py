"""Legal options at their extremes: whatever a run writes can be resumed, evaluated and exported."""

from pathlib import Path

import pytest
import torch

import simple_trainer
import simple_trainer_hybrid_optimized
import simple_trainer_hybrid_streamed
from datasets.synthetic import write_city_block
from tests.interrupted_runs import SCRIPTS, assert_same_state, run_script, saved
from tests.training_scripts import slow_but
from training.ply import load_ply

COMMON = (
    *("--max_steps", 8, "--save_steps", 4, "--refine_start_iter", 1, "--refine_every", 3, "--refine_stop_iter", 8),
    *("--reset_every", 5, "--sh_degree_interval", 2, "--grow_grad2d", 1e-5, "--num_workers", 1),
)
EXTREMES = [
    *(pytest.param(*trainer.values, ("--sh_degree", 0), id=f"no harmonics, {trainer.id}") for trainer in SCRIPTS),
    pytest.param(
        simple_trainer_hybrid_streamed, ("--moments", "bfloat16"), ("--sh_degree", 0), id="no harmonics, bfloat16"
    ),
    *(
        pytest.param(script, (), options, id=name)
        for script in (simple_trainer_hybrid_optimized, simple_trainer_hybrid_streamed)
        for name, options in {
            "one degree": ("--sh_degree", 1),
            "two degrees": ("--sh_degree", 2),
            "fewer Gaussians than points": ("--max_gaussians", 150),
            "one Gaussian": ("--max_gaussians", 1, "--refine_start_iter", 1000),
            "more views a step than there are": ("--batch_size", 9),
            "more views in a window than there are": ("--view_window", 1000),
            "harmonics that are never used": ("--sh_degree_interval", 10**6),
        }.items()
    ),
    pytest.param(simple_trainer, (), ("--prune_opa", 0.49, "--init_opacity", 0.499), id="nearly all pruned"),
]
QUICK = ("no harmonics, streamed",)


@pytest.fixture(scope="module")
def city_block(tmp_path_factory) -> Path:
    data_dir = tmp_path_factory.mktemp("a folder (with blanks)") / "city block, ä"
    write_city_block(data_dir, num_views=9, width=48, height=32, num_points=200)
    return data_dir


@pytest.mark.parametrize(("script", "place", "options"), slow_but(QUICK, EXTREMES))
def test_what_is_written_can_be_read(monkeypatch, city_block, tmp_path, capsys, script, place, options):
    result_dir, options = tmp_path / "results (with blanks), ä", (*COMMON, *place, *options)
    assert run_script(monkeypatch, script, city_block, result_dir, *options) == 0
    whole = saved(result_dir, 8)
    exported = load_ply(result_dir / "ply/point_cloud_8.ply")
    for name, value in whole.gaussians.items():
        assert exported[name].shape == value.shape
        torch.testing.assert_close(exported[name], value, rtol=1e-5, atol=1e-6)

    (result_dir / "ckpts/ckpt_8.pt").unlink()
    capsys.readouterr()
    assert run_script(monkeypatch, script, city_block, result_dir, *options, "--resume") == 0
    assert "Resuming after 4 steps" in capsys.readouterr().out
    assert_same_state(saved(result_dir, 8), whole)

    evaluate = (*options, "--ckpt", result_dir / "ckpts/ckpt_8.pt")
    assert run_script(monkeypatch, script, city_block, tmp_path / "evaluated", *evaluate) == 0
    count = len(whole.gaussians["means"])  # of one, or of some hundreds
    assert f" ms per view, {count} Gaussian{'' if count == 1 else 's'}\n" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"no checkpoint"])
def test_checkpoints_that_cannot_be_read_are_never_trained_over(monkeypatch, city_block, tmp_path, capsys, content):
    files = [tmp_path / f"ckpts/ckpt_{steps}.pt" for steps in (4, 8)]
    files[0].parent.mkdir()
    for file in files:
        file.write_bytes(content)
    assert run_script(monkeypatch, simple_trainer, city_block, tmp_path, *COMMON, "--resume") == 2
    captured = capsys.readouterr()
    assert "Training cannot go on from any checkpoint in" in captured.err
    assert captured.out.count("Skipped: ") == 2
    assert [file.read_bytes() for file in files] == [content, content]
    assert sorted((tmp_path / "ckpts").iterdir()) == files


def test_a_checkpoint_of_a_newer_version_is_never_trained_over(monkeypatch, city_block, tmp_path, capsys):
    """Although there is an older one that can be read."""
    assert run_script(monkeypatch, simple_trainer, city_block, tmp_path, *COMMON) == 0
    newest = tmp_path / "ckpts/ckpt_8.pt"
    newest.unlink()
    torch.save({"version": 99}, newest)
    content = newest.read_bytes()
    assert run_script(monkeypatch, simple_trainer, city_block, tmp_path, *COMMON, "--resume") == 2
    assert "newer version" in capsys.readouterr().err
    assert newest.read_bytes() == content


def test_resume_begins_where_nothing_has_been_written(monkeypatch, city_block, tmp_path, capsys):
    assert run_script(monkeypatch, simple_trainer, city_block, tmp_path, *COMMON, "--resume") == 0
    assert "training starts from the beginning" in capsys.readouterr().out
