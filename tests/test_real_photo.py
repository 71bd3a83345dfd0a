"""A real photo, one that matplotlib brings along, is read, scaled down and learned; all other pictures are made up."""

import json
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest

import simple_trainer
from tests.small_scene import camera, write_scene
from tests.training_scripts import train

PHOTO = Path(matplotlib.get_data_path()) / "sample_data/grace_hopper.jpg"
WIDTH, HEIGHT = 512, 600


@pytest.mark.slow
@pytest.mark.skipif(not PHOTO.is_file(), reason="this matplotlib comes without its photo")
def test_a_real_photo_is_learned(monkeypatch, tmp_path):
    """Five cameras a hand's breadth apart show the same photo, six world units before them."""
    poses = np.tile(np.eye(3, 4), (5, 1, 1))
    poses[:, :, 3] = [[-3 + 0.02 * (i - 2), 2, 1 + 0.02 * (i % 2)] for i in range(5)]
    names = [f"{i}.jpg" for i in range(5)]
    cameras = [camera(params=(600, 600, WIDTH / 2, HEIGHT / 2), size=(WIDTH, HEIGHT))]
    data_dir = write_scene(tmp_path / "data", names, cameras, num_points=800, write_pictures=False, poses=poses)
    (data_dir / "images").mkdir()
    for name in names:
        shutil.copy(PHOTO, data_dir / "images" / name)

    options = ("--data_factor", 4, "--test_every", 5, "--max_steps", 200, "--eval_steps", 1)
    train(monkeypatch, simple_trainer, data_dir, tmp_path / "results", *options, "--refine_start_iter", 10**6)
    quality = {step: json.loads((tmp_path / f"results/stats/val_step{step}.json").read_text()) for step in (1, 200)}
    assert quality[200]["psnr"] > quality[1]["psnr"] + 3
    assert quality[200]["ssim"] > quality[1]["ssim"] + 0.1
