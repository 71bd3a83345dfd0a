"""Saving while training goes on: what it takes of memory, and that the files hold what one moment had."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.aerial_scene import aerial_scene
from tests.aerial_training import KINDS, gaussians_of, rows_of, train_on_random_gradients, views_of
from tests.resident_memory import resident_bytes
from training.ply import load_ply, save_ply

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_a_ply_file_written_block_by_block_is_that_of_all_rows_at_once(monkeypatch, tmp_path, kind):
    parameters, cameras = aerial_scene(5000, seed=0)
    gaussians = gaussians_of(kind, parameters, CPU)
    train_on_random_gradients(gaussians, views_of(cameras), range(8))
    all_rows = {name: value.clone() for name, value in gaussians.rows(0, 5000).items()}
    save_ply(tmp_path / "once.ply", rows_of(all_rows), 5000, np.eye(4))
    monkeypatch.setattr("training.ply.MOST_ROWS", 999)
    save_ply(tmp_path / "blocks.ply", gaussians.rows, 5000, np.eye(4))
    assert (tmp_path / "blocks.ply").read_bytes() == (tmp_path / "once.ply").read_bytes()
    assert torch.equal(load_ply(tmp_path / "blocks.ply")["shN"], all_rows["shN"])
    if kind.startswith(("geometry", "streamed")):
        assert not torch.equal(gaussians.state()["parameters/shN"], all_rows["shN"])  # some rows lag behind


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("kind", KINDS)
def test_writing_a_ply_file_takes_little_memory(tmp_path, kind):
    """At most 5 % of the model."""
    num_gaussians = 300_000
    parameters, cameras = aerial_scene(num_gaussians, seed=0)
    gaussians = gaussians_of(kind, parameters, CPU)
    train_on_random_gradients(gaussians, views_of(cameras), range(2))
    save_ply(tmp_path / "a.ply", gaussians.rows, 1000, np.eye(4))  # threads have their stacks from now on
    model_bytes = sum(value.nbytes for value in gaussians.state().values())
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident_bytes("VmRSS")
    save_ply(tmp_path / "a.ply", gaussians.rows, num_gaussians, np.eye(4))
    assert resident_bytes("VmHWM") - before < 0.05 * model_bytes
