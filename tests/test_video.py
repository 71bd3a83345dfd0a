"""The videos that trainers make: a path through the scene, and the training itself."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch

import simple_trainer
import simple_trainer_hybrid_optimized_split
from configs import Config
from datasets.normalize import transform_cameras
from datasets.scene import load_scene
from datasets.synthetic import write_city_block
from offload.culling.cameras import Cameras
from training import command_line
from training.checkpoints import load_checkpoint
from training.timelapse import Timelapse, pace_of
from training.video import Lens, depth_colors, depth_span, even, poses_of, record_video, video_file, whole_video
from training.views import posed_cameras, render

VIDEO = ("--video", "--video_seconds", 0.4)  # 12 frames


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
    options = ("--data_dir", city_block, *VIDEO)
    train(monkeypatch, simple_trainer, *options, "--max_steps", 30, "--result_dir", tmp_path / "gpu")
    whole = frames_of(tmp_path / "gpu/videos/flight_30.mp4")
    assert whole.shape == (12, 78, 102, 3)  # of 101 columns the last one is there twice
    assert (whole[0] != whole[-1]).mean() > 0.1
    assert [path.name for path in (tmp_path / "gpu/videos").iterdir()] == ["flight_30.mp4"]

    split = (*options, "--ckpt", tmp_path / "gpu/ckpts/ckpt_30.pt", "--split_threshold", 0.1)
    train(monkeypatch, simple_trainer_hybrid_optimized_split, *split, "--result_dir", tmp_path / "split")
    assert np.abs(frames_of(tmp_path / "split/videos/flight_30.mp4") - whole).max() <= 2


def test_a_video_that_cannot_be_written_is_missed(monkeypatch, city_block, tmp_path, capsys):
    (tmp_path / "videos").write_text("in the way")
    options = ("--data_dir", city_block, *VIDEO, "--max_steps", 2, "--result_dir", tmp_path)
    with pytest.raises(SystemExit, match="1"):
        train(monkeypatch, simple_trainer, *options)
    assert "Warning: The video of step 2 could not be written" in capsys.readouterr().out
    assert (tmp_path / "ckpts/ckpt_2.pt").is_file()


@pytest.mark.parametrize("option", ["--video", "--timelapse=5"])
def test_a_video_that_nothing_can_write_is_refused_at_once(monkeypatch, city_block, tmp_path, capsys, option):
    def missing() -> str:
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr("training.options.get_ffmpeg_version", missing)
    monkeypatch.delenv("IMAGEIO_FFMPEG_EXE", raising=False)
    with pytest.raises(SystemExit, match="2"):
        train(monkeypatch, simple_trainer, "--data_dir", city_block, option, "--result_dir", tmp_path / "run")
    captured = capsys.readouterr()
    assert (
        f"{option.split('=')[0]} asks for a video, which ffmpeg writes, and there is none"
        in captured.out + captured.err
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [None, "no program"])
def test_an_ffmpeg_that_cannot_be_run_is_named(monkeypatch, city_block, tmp_path, capsys, content):
    ffmpeg = tmp_path / "ffmpeg"
    if content is not None:
        ffmpeg.write_text(content)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(ffmpeg))
    with pytest.raises(SystemExit, match="2"):
        train(monkeypatch, simple_trainer, "--data_dir", city_block, "--video", "--result_dir", tmp_path / "run")
    captured = capsys.readouterr()
    assert f"IMAGEIO_FFMPEG_EXE names {ffmpeg}, which cannot be run" in captured.out + captured.err


def test_training_is_kept_where_ffmpeg_has_gone(monkeypatch, city_block, tmp_path, capsys):
    class Gone:
        def __init__(self, path, **options):
            pass

        def append_data(self, frame):
            raise RuntimeError("No ffmpeg exe could be found.")

        def close(self):
            pass

    monkeypatch.setattr(imageio, "get_writer", Gone)
    options = ("--data_dir", city_block, "--timelapse", 1, "--max_steps", 2, "--result_dir", tmp_path)
    with pytest.raises(SystemExit, match="1"):
        train(monkeypatch, simple_trainer, *options)
    assert "Warning: The timelapse could not be written" in capsys.readouterr().out
    assert (tmp_path / "ckpts/ckpt_2.pt").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["the end is missing", "ffmpeg ends"])
def test_a_video_that_is_cut_short_by_a_full_disk_is_missed(monkeypatch, city_block, tmp_path, capsys, fault):
    """What ffmpeg leaves of it then has the size of a video and is none; imageio does not look at that."""
    get_writer = imageio.get_writer

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
    options = ("--data_dir", city_block, *VIDEO, "--max_steps", 2, "--result_dir", tmp_path)
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

    def draw(cameras: Cameras, *, depth: bool) -> torch.Tensor:
        seen.append(cameras)
        return torch.zeros(1, cameras.height, cameras.width, 3)

    (tmp_path / "videos").mkdir()
    record_video(scene, Config(video_seconds=1.0), draw, tmp_path / "videos/flight.mp4")
    assert len(seen) == 30
    assert max(torch.linalg.inv(cameras.viewmats)[0, :3, 3].norm().item() for cameras in seen) < 100


@pytest.mark.slow
def test_a_run_that_is_stopped_leaves_its_video_and_makes_it_when_resumed(monkeypatch, city_block, tmp_path, capsys):
    """Ctrl-C comes in the third frame, once more in the first one of the resumed run, and then not."""
    monkeypatch.setattr("training.reporting.load_lpips", lambda net, device: None)
    options = ("--data_dir", city_block, *VIDEO, "--max_steps", 2, "--result_dir", tmp_path)
    for stopped_at, resume in ((3, ()), (1, ("--resume",))):
        frames = count(1)

        def finished(frame: np.ndarray, stopped_at: int = stopped_at, frames: Iterator[int] = frames) -> np.ndarray:
            if next(frames) == stopped_at:
                os.kill(os.getpid(), signal.SIGINT)
            return even(frame)

        with monkeypatch.context() as patch:
            patch.setattr("training.video.even", finished)
            train(patch, simple_trainer, *options, *resume)
        output = capsys.readouterr().out
        assert f"The video was left after {stopped_at - 1} of 12 frames: --resume makes it anew." in output
        assert f"Interrupted after 2 steps; saved {tmp_path}/ckpts/ckpt_2.pt" in output
        assert json.loads((tmp_path / "ended.json").read_text())["status"] == "interrupted"
        assert not list((tmp_path / "videos").iterdir())
    train(monkeypatch, simple_trainer, *options, "--resume")
    assert len(frames_of(tmp_path / "videos/flight_2.mp4")) == 12


@pytest.mark.slow
def test_a_timelapse_is_left_between_frames_and_made_when_resumed(monkeypatch, city_block, tmp_path, capsys):
    """Ctrl-C comes before the third frame is added, once more before the second of a run that is over, and then not."""
    monkeypatch.setattr("training.reporting.load_lpips", lambda net, device: None)
    options = ("--data_dir", city_block, "--timelapse", 1, "--max_steps", 4, "--result_dir", tmp_path)
    for stopped_at, resume in ((3, ()), (2, ("--resume",))):
        frames = count(1)

        @contextmanager
        def stopped(*video: object, stopped_at: int = stopped_at, frames: Iterator[int] = frames) -> Iterator[object]:
            with whole_video(*video) as append:

                def appended(frame: np.ndarray) -> None:
                    append(frame)
                    if next(frames) == stopped_at - 1:
                        os.kill(os.getpid(), signal.SIGINT)

                yield appended

        with monkeypatch.context() as patch:
            patch.setattr("training.timelapse.whole_video", stopped)
            train(patch, simple_trainer, *options, *resume)
        output = capsys.readouterr().out
        assert f"The timelapse was left after {stopped_at - 1} of 4 frames: --resume makes it anew." in output
        assert f"Interrupted after 4 steps; saved {tmp_path}/ckpts/ckpt_4.pt" in output
        assert json.loads((tmp_path / "ended.json").read_text())["status"] == "interrupted"
        assert [path.name for path in (tmp_path / "videos").iterdir()] == ["timelapse"]  # the frames
    train(monkeypatch, simple_trainer, *options, "--resume")
    assert len(frames_of(tmp_path / "videos/timelapse.mp4")) == 4
    assert json.loads((tmp_path / "ended.json").read_text())["status"] == "finished"


@pytest.mark.slow
def test_a_second_ctrl_c_after_the_checkpoint_says_where_that_is(monkeypatch, city_block, tmp_path, capsys):
    """The first one comes in the second step, and another while the timelapse of a run that was stopped is made."""
    after_step = Timelapse.after_step

    def stop(self: Timelapse, run: object, steps_done: int, loss: torch.Tensor) -> None:
        after_step(self, run, steps_done, loss)
        if steps_done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("training.reporting.load_lpips", lambda net, device: None)
    monkeypatch.setattr(Timelapse, "after_step", stop)
    monkeypatch.setattr("training.timelapse.whole_video", lambda *video: os.kill(os.getpid(), signal.SIGINT))
    options = ("--data_dir", city_block, "--timelapse", 1, "--max_steps", 9, "--result_dir", tmp_path)
    with pytest.raises(SystemExit) as ended:
        train(monkeypatch, simple_trainer, *options)
    assert ended.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == f"Stopped at once; saved {tmp_path}/ckpts/ckpt_2.pt"
    assert (tmp_path / "ckpts/ckpt_2.pt").stat().st_size > 0


@pytest.mark.slow
def test_depth_is_beside_the_colours_and_the_size_is_chosen(monkeypatch, city_block, tmp_path):
    """The ground is farther than roofs, and the tiles of the split trainer draw the same."""
    options = ("--data_dir", city_block, *VIDEO, "--max_steps", 2, "--video_size", 96, 50, "--video_depth")
    options = (*options, "--trajectory", "orbit")
    train(monkeypatch, simple_trainer, *options, "--result_dir", tmp_path / "gpu")
    whole = frames_of(tmp_path / "gpu/videos/orbit_2.mp4")
    assert whole.shape == (12, 50, 192, 3)
    depth = whole[0, :, 96:]
    assert np.ptp(depth[..., 0]) > 100
    assert np.ptp(depth[..., 2]) > 100
    split = (*options, "--ckpt", tmp_path / "gpu/ckpts/ckpt_2.pt", "--split_threshold", 0.1)
    train(monkeypatch, simple_trainer_hybrid_optimized_split, *split, "--result_dir", tmp_path / "split")
    assert np.abs(frames_of(tmp_path / "split/videos/orbit_2.mp4") - whole).mean() <= 0.1


def test_depths_are_those_of_the_scene(city_block):
    """A wall of Gaussians in front of a camera: its distance is what is drawn, and one span holds for the video."""
    lens = Lens(np.array([[50.0, 0, 32], [0, 50, 24], [0, 0, 1]]), 64, 48)
    points = np.random.default_rng(0).uniform([-5, -5, 2], [5, 5, 6], (2000, 3))
    near, far = depth_span(points, np.eye(4)[None], lens)
    assert 2.0 <= near < 2.8
    assert 5.7 < far <= 6.0
    colors = depth_colors(np.array([[0.0, near, (near + far) / 2, far]]), (near, far))[0].astype(int)
    assert (colors[0] == 0).all()
    assert colors[1, 0] > 100 > colors[1, 2]  # red
    assert colors[2, 1] > 150  # between
    assert colors[3].max() < 80  # turbo ends in a dark blue
    rows = {
        "means": torch.tensor([[0.0, 0.0, 3.0]]),
        "scales": torch.full((1, 3), 1.0),
        "quats": torch.tensor([[1.0, 0, 0, 0]]),
        "opacities": torch.tensor([10.0]),
        "sh0": torch.zeros(1, 1, 3),
        "shN": torch.zeros(1, 0, 3),
    }
    cameras = posed_cameras(torch.eye(4)[None], torch.from_numpy(lens.K).float()[None], 64, 48, Config())
    picture, _ = render(rows, cameras, Config(), sh_degree=0, depth=True)
    assert picture.shape == (1, 48, 64, 4)
    assert picture[0, 24, 32, 3].item() == pytest.approx(3.0, rel=1e-3)


def test_a_given_path_is_flown_in_the_coordinates_of_the_input(city_block, tmp_path):
    scene = load_scene(city_block)
    world = np.linalg.inv(scene.transform)
    keys = transform_cameras(world, scene.camtoworlds[[2, 3]])
    path = tmp_path / "path.json"
    path.write_text(json.dumps({"camtoworlds": keys.tolist()}))
    poses = poses_of(scene, Config(trajectory=str(path), video_seconds=1.0))
    np.testing.assert_allclose(poses[[0, -1]], scene.camtoworlds[[2, 3]], atol=1e-6)
    assert video_file(Config(trajectory=str(path)), 7) == "videos/path_7.mp4"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--trajectory", "orbit"), "--trajectory is of --video: give that, too."),
        (("--video_depth",), "--video_depth is of --video: give that, too."),
        (("--video", "--trajectory", "loop"), "--trajectory loop is neither flight"),
        (("--video", "--video_size", "64"), "--video_size has 1 numbers"),
        (
            ("--video", "--video_size", "161", "121"),
            "--video_size 161 121 has an odd side, and videos have even ones: give 160 120",
        ),
        (("--ckpt", "a.pt", "--timelapse", "4"), "--timelapse is of a training, and --ckpt evaluates"),
        (("--ckpt", "a.pt", "--viewer", "8080"), "view.py a.pt"),
        (("--video", "--video_seconds", "-1"), "--video_seconds is -1"),
    ],
)
def test_what_no_video_can_be_made_of_is_refused(monkeypatch, city_block, tmp_path, capsys, options, sentence):
    with pytest.raises(SystemExit, match="2"):
        train(monkeypatch, simple_trainer, "--data_dir", city_block, "--result_dir", tmp_path / "r", *options)
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "r/cfg.yml").exists()


def test_a_frame_gets_even_sides_and_loses_nothing():
    frame = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    padded = even(frame)
    assert padded.shape == (6, 8, 3)
    assert np.array_equal(padded[:5, :7], frame)
    assert np.array_equal(padded[5], padded[4])
    assert np.array_equal(padded[:, 7], padded[:, 6])
    assert np.array_equal(even(padded), padded)


@pytest.mark.parametrize(
    ("frames", "seconds"), [(1, 0.5), (4, 2), (19, 9.5), (20, 10), (100, 10), (300, 10), (600, 20)]
)
def test_a_timelapse_can_be_watched(frames, seconds):
    assert frames / pace_of(frames) == pytest.approx(seconds)


@pytest.mark.slow
def test_a_timelapse_goes_on_where_it_was_stopped_and_changes_nothing(monkeypatch, city_block, tmp_path):
    """A frame each 4 steps; one run is stopped in the middle, as by Ctrl-C, and another draws none."""
    options = ("--data_dir", city_block, "--max_steps", 10, *("--timelapse", 4))
    train(monkeypatch, simple_trainer, *options, "--result_dir", tmp_path / "whole")
    train(monkeypatch, simple_trainer, *options[:-2], "--result_dir", tmp_path / "without")
    assert not (tmp_path / "without/videos").exists()

    after_step = Timelapse.after_step

    def interrupted(self, run, steps_done, loss):
        after_step(self, run, steps_done, loss)
        if steps_done == 6:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Timelapse, "after_step", interrupted)
    train(monkeypatch, simple_trainer, *options, "--result_dir", tmp_path / "stopped")
    assert len(frames_of(tmp_path / "stopped/videos/timelapse.mp4")) == 2
    stale = tmp_path / "stopped/videos/timelapse/step_000000012.jpg"  # of a run that was killed after this
    stale.write_bytes((tmp_path / "whole/videos/timelapse/step_000000008.jpg").read_bytes())
    train(monkeypatch, simple_trainer, *options, "--resume", "--result_dir", tmp_path / "stopped")
    for name in ("whole", "stopped"):
        frames = sorted((tmp_path / name / "videos/timelapse").glob("*.jpg"))
        assert [frame.name[5:14] for frame in frames][:4] == ["000000001", "000000004", "000000008", "000000010"]
        assert frames_of(tmp_path / name / "videos/timelapse.mp4").shape == (4, 78, 102, 3)
        about = imageio.get_reader(tmp_path / name / "videos/timelapse.mp4").get_meta_data()
        assert about["duration"] == pytest.approx(2.0, abs=0.1)
        assert (
            imageio.imread(frames[3]).tolist()
            == imageio.imread(tmp_path / "whole/videos/timelapse/step_000000010.jpg").tolist()
        )
    models = [
        load_checkpoint(tmp_path / name / "ckpts/ckpt_10.pt").gaussians for name in ("whole", "without", "stopped")
    ]
    assert all(torch.equal(models[0][key], model[key]) for model in models for key in models[0])
