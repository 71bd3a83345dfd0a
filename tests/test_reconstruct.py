"""Photos, or a video, become a dataset that trains; what cannot be used is refused first, in one sentence."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pycolmap
import pytest
from PIL import Image

from datasets import photo_source, published_models, reconstruct, reconstruction_report, video_frames
from datasets.child_process import run_in_child
from datasets.photogrammetry import (
    Photo,
    _counting,
    choose_matching,
    extract_features,
    import_photos,
    match,
    read_models,
    read_photos,
    registered_names,
)
from datasets.scene import load_scene
from datasets.synthetic import write_city_block
from tests.small_scene import write_scene
from tests.waiting import wait_until

ORIGIN = (47.37, 8.54, 400.0)  # latitude, longitude, altitude of the block's centre
NUM_VIEWS, MOST_VIEWS = 12, 10


def degrees_minutes_seconds(angle: float) -> tuple[float, float, float]:
    minutes = angle % 1 * 60
    return float(int(angle)), float(int(minutes)), minutes % 1 * 60


def save_with_gps(picture: Path, target: Path, position: np.ndarray) -> None:
    """A JPEG of a picture whose EXIF says where it was taken: metres east, north and up of ORIGIN."""
    wgs84 = pycolmap.GPSTransform(pycolmap.GPSTransfromEllipsoid.WGS84)
    latitude, longitude, altitude = wgs84.enu_to_ellipsoid(position[None], *ORIGIN)[0]
    exif = Image.Exif()
    exif[0x8825] = {
        **{1: "N", 2: degrees_minutes_seconds(latitude), 3: "E", 4: degrees_minutes_seconds(longitude)},
        **{5: b"\0", 6: altitude},
    }
    Image.open(picture).convert("RGB").save(target, quality=98, exif=exif)


def run(*arguments: object) -> int:
    """The exit code of the command."""
    try:
        reconstruct.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def refused(capsys, *arguments: object) -> str:
    assert run(*arguments) == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence.startswith("Error: ")
    return sentence


def mean_reprojection_error(model: pycolmap.Reconstruction) -> float:
    """The mean over points of the mean distance, in pixels, from where photos saw them to where they are projected."""
    means = []
    for point in model.points3D.values():
        seen = [(model.image(element.image_id), element.point2D_idx) for element in point.track.elements]
        distances = [image.project_point(point.xyz) - image.points2D[index].xy for image, index in seen]
        means.append(np.linalg.norm(distances, axis=1).mean())
    return float(np.mean(means))


def interrupted(*arguments: object) -> None:
    raise KeyboardInterrupt


def never(*arguments: object, **options: object) -> None:
    raise AssertionError("a step that was complete began again")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    """Photos of a city block and a black one, with GPS, and the true positions of their cameras, in metres."""
    folder = tmp_path_factory.mktemp("photos")
    write_city_block(folder / "block", num_views=NUM_VIEWS, width=320, height=240, size=48)
    truth = pycolmap.Reconstruction(folder / "block/sparse/0")
    (folder / "my photos").mkdir()
    positions = {}
    for image in truth.images.values():
        name = f"view {Path(image.name).stem}.jpg"
        positions[name] = np.array(image.projection_center())
        save_with_gps(folder / "block/images" / image.name, folder / "my photos" / name, positions[name])
    Image.new("RGB", (320, 240)).save(folder / "my photos/black.png")
    return folder / "my photos", positions


@pytest.mark.slow
def test_photos_become_a_georeferenced_scene_although_interrupted(photos, tmp_path, capsys, monkeypatch):
    folder, positions = photos
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "the scene"
    command = (folder, "--out", out, "--georeference")

    with monkeypatch.context() as patched:
        patched.setattr(reconstruct, "make_models", interrupted)
        assert run(*command) == 130
    assert "python -m datasets.reconstruct" in capsys.readouterr().err
    assert not (out / "sparse").exists()

    with monkeypatch.context() as patched:
        for room, step in (
            *((reconstruct, name) for name in ("extract_features", "match")),
            *((photo_source, name) for name in ("link_file", "checked_picture")),
        ):
            patched.setattr(room, step, never)
        assert run(*command) == 0
    printed = capsys.readouterr().out
    assert int(re.search(rf"registered: (\d+) of {NUM_VIEWS + 1} photos", printed)[1]) >= MOST_VIEWS
    assert "no features (blank, blurred or covered): black.png" in printed
    assert f"--data_dir '{out}'" in printed

    scene = load_scene(out)
    back = np.linalg.inv(scene.transform)
    found = scene.camtoworlds[:, :3, 3] @ back[:3, :3].T + back[:3, 3]  # metres
    true = np.array([positions[name] for name in scene.image_names])
    mean = np.mean(list(positions.values()), axis=0)
    assert len(true) >= MOST_VIEWS
    assert np.linalg.norm(found - (true - mean), axis=1).max() < 1.0  # the cameras are up to 114 m apart
    side = json.loads((out / "georeference.json").read_text())
    geocentric = np.array(side["offset"]) + found @ np.array(side["rotation"]).T
    wgs84 = pycolmap.GPSTransform(pycolmap.GPSTransfromEllipsoid.WGS84)
    assert np.abs(wgs84.ellipsoid_to_enu(wgs84.ecef_to_ellipsoid(geocentric), *ORIGIN) - true).max() < 1.0

    with monkeypatch.context() as patched:  # all is done: the report alone
        for step in ("extract_features", "match", "make_models", "publish"):
            patched.setattr(reconstruct, step, never)
        assert run(*command) == 0
    assert f"of {NUM_VIEWS + 1} photos" in capsys.readouterr().out

    kept = [(out / name).read_bytes() for name in ("georeference.json", "sparse/0/images.bin")]
    assert run(*command[:-1]) == 0  # what is left out stays as it is
    assert "stays as it is: --georeference" in capsys.readouterr().out
    assert [(out / name).read_bytes() for name in ("georeference.json", "sparse/0/images.bin")] == kept
    assert not (out / "replaced_1").exists()

    assert run(*command[:-1], "--no-georeference") == 0
    assert "goes on with --model_dir replaced_1/0" in capsys.readouterr().out
    assert not (out / "georeference.json").exists()
    assert [(out / "replaced_1" / name).read_bytes() for name in ("georeference.json", "0/images.bin")] == kept
    assert np.array_equal(load_scene(out, model_dir="replaced_1/0").camtoworlds, scene.camtoworlds)
    capsys.readouterr()
    assert run(*command[:-1], "--mapper", "global") == 0
    assert not (out / "georeference.json").exists()
    printed = capsys.readouterr().out
    assert "--model_dir replaced_2/0" in printed
    error = float(re.search(r"mean reprojection error (\S+) pixels", printed)[1])
    model = pycolmap.Reconstruction(out / "sparse/0")
    assert error == pytest.approx(mean_reprojection_error(model), abs=0.006)
    assert error == pytest.approx(model.compute_mean_reprojection_error(), abs=0.006)

    (out / "reconstruction/steps.json").unlink()
    assert "was not made by this command" in refused(capsys, *command)


def test_a_model_of_photos_that_are_all_in_larger_ones_is_left_out(tmp_path):
    first = pycolmap.Reconstruction(write_scene(tmp_path / "one", ["a.png", "b.png", "c.png"]) / "sparse/0")
    second = pycolmap.Reconstruction(write_scene(tmp_path / "two", ["b.png", "c.png"]) / "sparse/0")
    third = pycolmap.Reconstruction(write_scene(tmp_path / "three", ["c.png", "d.png"]) / "sparse/0")
    for number, model in enumerate((second, third, first)):
        (tmp_path / f"models/{number}").mkdir(parents=True)
        model.write(tmp_path / f"models/{number}")
    found = read_models(tmp_path / "models")
    assert [sorted(registered_names(model)) for model in found] == [["a.png", "b.png", "c.png"], ["c.png", "d.png"]]
    sentences = published_models.publish(tmp_path / "models", tmp_path, None)
    assert "fell into 2 models that could not be joined" in sentences[0]
    assert "the others hold 1 photo that it lacks" in sentences[0]


def test_a_model_that_is_replaced_by_another_is_kept(tmp_path):
    for number, names in enumerate((["a.png", "b.png", "c.png"], ["a.png", "b.png"])):
        model = pycolmap.Reconstruction(write_scene(tmp_path / f"scene {number}", names) / "sparse/0")
        (tmp_path / f"models {number}/0").mkdir(parents=True)
        model.write(tmp_path / f"models {number}/0")
    out = tmp_path / "out"
    out.mkdir()
    assert published_models.publish(tmp_path / "models 0", out, None) == []
    assert published_models.publish(tmp_path / "models 0", out, None) == []  # the same: an interruption came between
    assert not (out / "replaced_1").exists()
    for number, others, count in ((1, 1, 3), (2, 0, 2)):
        [sentence] = published_models.publish(tmp_path / f"models {others}", out, None)
        assert f"kept in {out}/replaced_{number}:" in sentence
        assert f"--model_dir replaced_{number}/0" in sentence
        assert pycolmap.Reconstruction(out / f"replaced_{number}/0").num_reg_images() == count


@pytest.mark.slow
def test_photos_with_nothing_in_common(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.new("RGB", (64, 48), (60 * number, 90, 90)).save(tmp_path / f"photos/{number}.png")
    sentence = refused(capsys, tmp_path / "photos", "--out", tmp_path / "scene")
    assert "no two of them have enough in common" in sentence
    assert "3 have no features" in sentence


def test_what_cannot_be_used_is_refused_before_anything_begins(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reconstruct, "extract_features", never)
    folder, out = tmp_path / "photos", tmp_path / "scene"
    assert "does not exist" in refused(capsys, folder, "--out", out)
    folder.mkdir()
    assert "holds no photos" in refused(capsys, folder, "--out", out)
    picture = Image.effect_noise((64, 48), 50)
    picture.save(folder / "a.png")
    assert "holds one photo" in refused(capsys, folder, "--out", out)
    picture.save(folder / "b.png")
    assert "holds 2 photos" in refused(capsys, folder, "--out", out)
    picture.save(folder / "c.png")
    assert "lies in the folder of the photos" in refused(capsys, folder, "--out", folder / "scene")
    assert not out.exists()
    assert "0 of 3 have them" in refused(capsys, folder, "--out", out, "--georeference")
    assert "either" in refused(capsys, "--out", out)
    assert "either" in refused(capsys, folder, "--video", "a.mp4", "--out", out)
    assert "--vocab_tree" in refused(capsys, folder, "--out", out, "--matching", "vocab_tree")
    assert "does not exist" in refused(capsys, folder, "--out", out, "--vocab_tree", tmp_path / "none")
    (tmp_path / "tree").write_bytes(b"\2\0\0\0" + b"no tree" * 100)
    assert "tree is no vocabulary tree of COLMAP 3.12" in refused(
        capsys, folder, "--out", out, "--vocab_tree", tmp_path / "tree"
    )
    assert "there is none" in refused(capsys, folder, "--out", out, "--fps", 3)
    assert "begun with --camera_model SIMPLE_RADIAL: name another --out for OPENCV" in refused(
        capsys, folder, "--out", out, "--camera_model", "OPENCV"
    )
    picture.save(folder / "d.png")
    told = refused(capsys, folder, "--out", out)
    assert told.endswith("was begun with other photos: name another --out.")  # what else lies there is not to be lost
    (folder / "d.png").write_bytes((folder / "a.png").read_bytes()[:-200])
    assert "d.png" in refused(capsys, folder, "--out", tmp_path / "another")
    (tmp_path / "other/images").mkdir(parents=True)
    picture.save(tmp_path / "other/images/z.png")
    assert "z.png" in refused(capsys, folder, "--out", tmp_path / "other")
    (tmp_path / "other/sparse/0").mkdir(parents=True)
    assert "was not made by this command" in refused(capsys, folder, "--out", tmp_path / "other")


def test_which_photos_are_compared_follows_their_number_and_gps():
    few = [Photo(f"{number}", 0, 0, None) for number in range(5)]
    many = [Photo(f"{number}", 0, 0, (47.0, 8.0, 400.0)) for number in range(reconstruct.MOST_EXHAUSTIVE + 1)]
    assert choose_matching(few, is_video=False) == "exhaustive"
    assert choose_matching(few, is_video=True) == "sequential"
    assert choose_matching(many, is_video=False) == "spatial"
    assert choose_matching([*many, *few], is_video=False) == "preemptive"


def test_photos_that_are_left_out_are_named_with_the_reason(tmp_path):
    write_scene(tmp_path, ["a.png", "b.png", "c.png"])
    write_scene(tmp_path / "other", ["c.png", "d.png", "e.png"])
    (tmp_path / "other/sparse/0").rename(tmp_path / "sparse/1")
    features = {"a.png": 900, "b.png": 800, "c.png": 1000, "d.png": 850, "e.png": 990, "black.png": 0, "sky.png": 300}
    photos = [Photo(name, count, 0 if name == "black.png" else 2, None) for name, count in features.items()]
    photos += [Photo(f"lawn {number}.png", 900, 0, None) for number in range(6)]

    def report(matching: str) -> str:
        return "\n".join(
            reconstruction_report.report(tmp_path, photos, matching, tmp_path / "reconstruction" / reconstruct.LEFT_OUT)
        )

    said = report("exhaustive")
    assert "registered: 3 of 13 photos" in said
    assert "left out:   2, in another model (sparse/1): d.png, e.png\n" in said
    assert "left out:   1, no features (blank, blurred or covered): black.png\n" in said
    assert (
        "left out:   1, matches too few points of the model (of few features: 300 in the median, registered photos "
        "900): sky.png\n"
    ) in said
    assert (
        "left out:   6, no other photo matches: lawn 0.png, lawn 1.png, lawn 2.png, lawn 3.png, lawn 4.png and 1 "
        in said
    )
    assert "Warning:    most photos are left out" in said
    assert "--matching exhaustive" not in said
    assert "(spatial matching): the same command with --matching exhaustive" in report("spatial")
    listed = (tmp_path / "reconstruction" / reconstruct.LEFT_OUT).read_text().splitlines()
    assert len(listed) == 10
    assert "sky.png\tmatches too few points of the model" in listed


def test_a_video_gives_the_sharpest_frame_of_each_interval(tmp_path, monkeypatch, capsys):
    sharp = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)

    def frames() -> Iterator[np.ndarray]:
        for number in range(30):  # 3 s of 10 frames a second; frames 3, 8, 13 ... are sharp, and told by their corner
            frame = sharp.copy() if number % 5 == 3 else np.full_like(sharp, 100)
            frame[:8, :8] = 8 * number
            yield frame

    monkeypatch.setattr(video_frames, "open_video", lambda video: (10.0, 3.0, frames()))
    assert video_frames.write_sharpest_frames(tmp_path / "a.mp4", 2.0, tmp_path / "images") == 6
    written = sorted((tmp_path / "images").iterdir())
    assert [path.name for path in written] == [f"frame_{number:06d}.jpg" for number in range(1, 7)]
    corners = [np.asarray(Image.open(path))[2:6, 2:6].mean() / 8 for path in written]
    np.testing.assert_allclose(corners, range(3, 30, 5), atol=0.5)
    assert video_frames.write_sharpest_frames(tmp_path / "a.mp4", 100.0, tmp_path / "all") == 30  # no more than it has


@pytest.mark.slow
def test_a_video_is_matched_in_its_order(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(photo_source, "open_video", lambda video: (10.0, 0.4, iter(())))
    monkeypatch.setattr(
        video_frames,
        "open_video",
        lambda video: (10.0, 0.4, iter([np.full((48, 64, 3), number, np.uint8) for number in range(4)])),
    )
    video = tmp_path / "a.mp4"
    video.write_bytes(b"video")
    refused(capsys, "--video", video, "--fps", 10, "--out", tmp_path / "scene")  # blank frames
    steps = json.loads((tmp_path / "scene/reconstruction/steps.json").read_text())
    assert steps["matches"] == {"matching": "sequential"}
    assert len(list((tmp_path / "scene/images").iterdir())) == 4
    sentence = refused(capsys, "--video", video, "--fps", 5, "--out", tmp_path / "scene")
    assert "was begun with --fps 10: name another --out" in sentence
    video.write_bytes(b"another video")
    sentence = refused(capsys, "--video", video, "--fps", 5, "--out", tmp_path / "scene")
    assert "was begun with other photos: name another --out" in sentence
    assert "raise --fps" in refused(capsys, "--video", video, "--fps", 2.5, "--out", tmp_path / "two")


def test_videos_that_cannot_be_read(tmp_path, monkeypatch, capsys):
    video = tmp_path / "a.mp4"
    assert "does not exist" in refused(capsys, "--video", video, "--out", tmp_path / "scene")
    video.write_bytes(b"no video" * 100)
    sentence = refused(capsys, "--video", video, "--out", tmp_path / "scene")
    assert "cannot be read as a video (" in sentence
    assert "version" not in sentence
    assert not (tmp_path / "scene").exists()

    def without_ffmpeg(*arguments: object) -> None:
        raise ImportError("To use the imageio ffmpeg plugin you need to `pip install imageio-ffmpeg`")

    monkeypatch.setattr(video_frames.imageio, "get_reader", without_ffmpeg)
    assert "pip install imageio-ffmpeg" in refused(capsys, "--video", video, "--out", tmp_path / "scene")


@pytest.mark.slow
def test_counting_leaves_the_database_to_those_who_write(tmp_path, capsys):
    """A reader of another SQLite library would end by removing the log that a writer of this process has mapped."""
    database, names = tmp_path / "database.db", ["a.png", "b.png", "c.png"]
    for name in names:
        Image.effect_noise((64, 48), 50).save(tmp_path / name)
    assert import_photos(database, tmp_path, names) == 1
    with closing(pycolmap.Database.open(database)) as writer:
        first, second, third = (image.image_id for image in writer.read_all_images())
        nothing = np.zeros((0, 2), np.uint32)
        for pair in ((first, second), (first, third)):
            log = tmp_path / "database.db-wal"
            assert log.is_file()
            inode = log.stat().st_ino
            with _counting(database, lambda opened: opened.num_matched_image_pairs(), "matches", "pair", 3) as look:
                writer.write_matches(*pair, nothing)
                look()
            assert log.is_file()
            assert log.stat().st_ino == inode
        assert writer.num_matched_image_pairs() == 2
        assert read_photos(database)[0].num_features == 0
        assert log.is_file()
    assert "2/3" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupted_import_goes_on_with_the_camera_it_began_with(tmp_path):
    names = ["a.png", "b.png", "large.png", "c.png"]
    for name in names:
        Image.effect_noise((96, 64) if name == "large.png" else (64, 48), 50).save(tmp_path / name)
    assert import_photos(tmp_path / "database.db", tmp_path, names[:1]) == 1
    assert import_photos(tmp_path / "database.db", tmp_path, names) == 2
    with closing(pycolmap.Database.open(tmp_path / "database.db")) as opened:
        cameras = {image.name: image.camera_id for image in opened.read_all_images()}
    assert cameras["a.png"] == cameras["b.png"] == cameras["c.png"] != cameras["large.png"]


@pytest.mark.slow
def test_photos_in_their_order_are_compared_with_all_near_ones_and_some_far_ones(tmp_path):
    names = [f"{number:02d}.png" for number in range(40)]
    for name in names:
        Image.new("RGB", (64, 48), (90, 90, 90)).save(tmp_path / name)  # without features, so that nothing takes time
    database = tmp_path / "database.db"
    import_photos(database, tmp_path, names)
    extract_features(database, tmp_path, names)
    match(database, "sequential", None)
    with closing(pycolmap.Database.open(database)) as opened:
        ids = {image.name: image.image_id for image in opened.read_all_images()}
        offsets = {
            j - i for i in range(40) for j in range(i + 1, 40) if opened.exists_matches(ids[names[i]], ids[names[j]])
        }
    assert offsets == {*range(1, 11), 16, 32}


def ignores(pid: int, number: int) -> bool:
    """Whether a process ignores a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(re.search(r"SigIgn:\s*(\w+)", status)[1], 16) >> (number - 1) & 1)


def child_at_work(process: subprocess.Popen) -> int:
    """The process that another one has started with `run_in_child`, once the function is called there, and the other
    one, which must not lose Ctrl-C to itself, waits for it."""
    found: list[int] = []

    def is_there() -> bool:
        assert process.poll() is None
        children = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
        found[:] = [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
        return bool(found) and ignores(found[0], signal.SIGTERM) and not ignores(process.pid, signal.SIGINT)

    wait_until(is_there)
    return found[0]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # which init has not buried yet


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize(
    ("number", "to", "last_line"),
    [
        (signal.SIGINT, "both", "KeyboardInterrupt"),
        (signal.SIGTERM, "both", "KeyboardInterrupt"),
        (signal.SIGHUP, "both", "KeyboardInterrupt"),
        (signal.SIGKILL, "child", "RuntimeError: its process ended by signal SIGKILL"),
        (signal.SIGKILL, "parent", ""),
    ],
)
def test_what_runs_in_a_process_of_its_own_ends_with_the_command(number, to, last_line):
    program = """import time
from datasets.child_process import run_in_child
from errors import stopped_by_signals
if __name__ == "__main__":
    with stopped_by_signals():
        run_in_child(time.sleep, 1000)
"""
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    child = child_at_work(process)
    os.killpg(process.pid, number) if to == "both" else os.kill(child if to == "child" else process.pid, number)
    _, errors = process.communicate()  # which ends when the child, too, has closed it
    assert process.returncode != 0
    assert errors.strip().rpartition("\n")[2] == last_line
    wait_until(lambda: not is_running(child))  # the system closes its files, which others see, before it is gone


@pytest.mark.slow
def test_a_request_to_end_and_a_fault_are_one_sentence_and_nothing_is_lost(photos, tmp_path, capsys, monkeypatch):
    command = (photos[0], "--out", tmp_path / "scene")
    monkeypatch.setattr(reconstruct, "extract_features", lambda *arguments: os.kill(os.getpid(), signal.SIGTERM))
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        assert run(*command) == 130
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # so that a second one ends the process at once
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("Stopped; what has been done is kept, and this goes on from there: python -m datasets.rec")
    monkeypatch.setattr(reconstruct, "extract_features", lambda *arguments: run_in_child(os.abort))
    sentence = refused(capsys, *command)
    assert "COLMAP failed in finding features (its process ended by signal SIGABRT)" in sentence
    assert len(read_photos(tmp_path / "scene/reconstruction/database.db")) == NUM_VIEWS + 1
