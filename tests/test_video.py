"""Flights past the cameras, and the videos that trainers make of them."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

import simple_trainer
import simple_trainer_hybrid_optimized_split
from configs import Config
from datasets.scene import load_scene
from datasets.synthetic import write_city_block
from datasets.trajectories import flight
from offload.culling.cameras import Cameras
from training import command_line, reporting
from training.video import record_flight


def random_poses(count: int) -> np.ndarray:
    poses = np.tile(np.eye(4), (count, 1, 1))
    poses[:, :3, :3] = Rotation.random(count, random_state=1).as_matrix()
    poses[:, :3, 3] = np.random.default_rng(1).normal(size=(count, 3)) * 5
    return poses


def test_a_flight_is_smooth_rigid_and_meets_its_keys():
    poses = random_poses(30)
    frames = flight(poses, 2001, num_keys=7)
    np.testing.assert_allclose(frames[[0, -1]], poses[[0, -1]], atol=1e-9)
    np.testing.assert_allclose(frames[:, :3, :3] @ frames[:, :3, :3].transpose(0, 2, 1), [np.eye(3)] * 2001, atol=1e-9)
    for key in np.linspace(0, 29, 7).round().astype(int):
        nearest = np.linalg.norm(frames[:, :3, 3] - poses[key, :3, 3], axis=1).argmin()
        np.testing.assert_allclose(frames[nearest], poses[key], atol=0.05)
    steps = np.linalg.norm(np.diff(frames[:, :3, 3], axis=0), axis=1)
    assert np.abs(np.diff(steps)).max() < 0.02 * steps.max()


@pytest.mark.parametrize("poses", [random_poses(1), np.repeat(random_poses(1), 3, axis=0), random_poses(2)])
def test_few_cameras_and_cameras_at_one_place(poses):
    frames = flight(poses, 10)
    assert np.isfinite(frames).all()
    np.testing.assert_allclose(frames[-1], poses[-1], atol=1e-9)


@pytest.fixture(scope="module")
def city_block(tmp_path_factory) -> Path:
    data_dir = tmp_path_factory.mktemp("data") / "city_block"
    write_city_block(data_dir, num_views=9, width=101, height=78, num_points=400)
    return data_dir


def train(monkeypatch, script, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["script", "default", "--device", "cpu", *map(str, arguments)])
    command_line.main(script.CONFIGS, script.train, "test")


def frames_of(path: Path) -> np.ndarray:
    return np.stack([frame for frame in imageio.get_reader(path)]).astype(int)  # noqa: C416 (its length is unknown)


@pytest.mark.slow
def test_videos_of_training_of_a_checkpoint_and_of_tiles_are_the_same(monkeypatch, city_block, tmp_path):
    record = reporting.record_flight
    monkeypatch.setattr(reporting, "record_flight", lambda *arguments: record(*arguments, num_frames=12))
    options = ("--data_dir", city_block, "--video")
    train(monkeypatch, simple_trainer, *options, "--max_steps", 30, "--result_dir", tmp_path / "gpu")
    whole = frames_of(tmp_path / "gpu/videos/flight_30.mp4")
    assert whole.shape == (12, 78, 100, 3)
    assert (whole[0] != whole[-1]).mean() > 0.1
    assert [path.name for path in (tmp_path / "gpu/videos").iterdir()] == ["flight_30.mp4"]

    split = (*options, "--ckpt", tmp_path / "gpu/ckpts/ckpt_30.pt", "--split_threshold", 0.1)
    train(monkeypatch, simple_trainer_hybrid_optimized_split, *split, "--result_dir", tmp_path / "split")
    assert np.abs(frames_of(tmp_path / "split/videos/flight_30.mp4") - whole).max() <= 2


def test_a_video_that_cannot_be_written_is_missed(monkeypatch, city_block, tmp_path, capsys):
    (tmp_path / "videos").write_text("in the way")
    options = ("--data_dir", city_block, "--video", "--max_steps", 2, "--result_dir", tmp_path)
    with pytest.raises(SystemExit, match="1"):
        train(monkeypatch, simple_trainer, *options)
    assert "Warning: The video of step 2 could not be written" in capsys.readouterr().out
    assert (tmp_path / "ckpts/ckpt_2.pt").is_file()


@pytest.mark.parametrize("fault", ["the end is missing", "ffmpeg ends"])
def test_a_video_that_is_cut_short_by_a_full_disk_is_missed(monkeypatch, city_block, tmp_path, capsys, fault):
    """What ffmpeg leaves of it then has the size of a video and is none; imageio does not look at that."""
    get_writer, record = imageio.get_writer, reporting.record_flight

    class Cut:
        def __init__(self, path, **options):
            self._path, self._writer = path, get_writer(path, **options)

        def append_data(self, frame):
            if fault == "ffmpeg ends":
                raise OSError("[Errno 32] Broken pipe\n\nFFMPEG COMMAND:\nffmpeg -y ...")
            self._writer.append_data(frame)

        def close(self):
            self._writer.close()
            os.truncate(self._path, self._path.stat().st_size // 2)

    monkeypatch.setattr(imageio, "get_writer", Cut)
    monkeypatch.setattr(reporting, "record_flight", lambda *arguments: record(*arguments, num_frames=12))
    options = ("--data_dir", city_block, "--video", "--max_steps", 2, "--result_dir", tmp_path)
    with pytest.raises(SystemExit, match="1"):
        train(monkeypatch, simple_trainer, *options)
    said = capsys.readouterr().out
    assert "Warning: The video of step 2 could not be written" in said
    assert "ffmpeg has not written all frames" in said
    assert "FFMPEG COMMAND" not in said
    assert list((tmp_path / "videos").iterdir()) == []

    monkeypatch.setattr(imageio, "get_writer", get_writer)  # there is room again
    train(monkeypatch, simple_trainer, *options, "--resume")
    assert len(frames_of(tmp_path / "videos/flight_2.mp4")) == 12


def test_no_flight_goes_to_a_camera_that_stands_far_off(city_block, tmp_path):
    scene = load_scene(city_block)
    camtoworlds, far = scene.camtoworlds.copy(), scene.train_ids[3]
    camtoworlds[far, :3, 3] += 3e5
    scene = replace(scene, camtoworlds=camtoworlds, far_ids=np.array([far]))
    seen: list[Cameras] = []

    def draw(cameras: Cameras) -> torch.Tensor:
        seen.append(cameras)
        return torch.zeros(1, cameras.height, cameras.width, 3)

    (tmp_path / "videos").mkdir()
    record_flight(scene, Config(), draw, tmp_path / "videos/flight.mp4", num_frames=20)
    assert len(seen) == 20
    assert max(torch.linalg.inv(cameras.viewmats)[0, :3, 3].norm().item() for cameras in seen) < 100
