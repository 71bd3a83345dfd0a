"""The viewer: when it draws, what it refuses, and that a run that is watched gives the same model."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import signal
import socket
import sys
import threading
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

import export
import simple_trainer
import simple_trainer_hybrid_streamed
import view
from configs import Config
from datasets.image_files import decode_image
from datasets.scene import load_scene
from errors import InputError
from tests.visitors import Visitor, free_port, page_camera
from tests.waiting import HANGS_AFTER
from training import command_line, live
from training.checkpoint_writing import save_checkpoint
from training.checkpoints import load_checkpoint
from training.opened import open_model
from training.views import posed_cameras, render
from viewer import frustums
from viewer import page as page_module
from viewer.frustums import Frustums, Photo
from viewer.pace import LEAST_PIXELS, RESTS_AFTER, Pace
from viewer.page import Page, cameras_of, check_free

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------- when it draws


def draw_at(pace: Pace, now: float, seconds_per_pixel: float, *, version: int = 0, most: int = 500_000) -> int:
    """One look of the viewer; returns the pixels that it drew."""
    count = pace.pixels_due(now, version, most)
    if count:
        pace.drew(now, now + seconds_per_pixel * count, version, count)
    return count


def test_a_camera_that_moves_is_drawn_small_and_sharp_when_it_rests():
    pace, cost = Pace(), 4e-6  # seconds a pixel: all of the page takes 2 s
    pace.move(0.0)
    sizes = []
    for look in range(20):
        now = 0.1 * look
        if look < 10:
            pace.move(now)
        sizes.append(draw_at(pace, now, cost))
    assert sizes[0] == LEAST_PIXELS
    assert all(LEAST_PIXELS <= size <= 1 / 15 / cost + 1 for size in sizes[:10])
    still = [size for size in sizes[10:] if size]
    assert max(still) == pytest.approx(1.0 / cost, rel=1e-3)
    assert sizes[-5:] == [0] * 5, "nothing changes any more"


def test_a_page_that_draws_fast_becomes_whole():
    pace = Pace()
    pace.move(0.0)
    sizes = [draw_at(pace, 0.1 * look, 1e-8) for look in range(12)]
    assert max(sizes) == 500_000
    assert sizes[-5:] == [0] * 5


def test_while_a_model_trains_its_picture_takes_little_of_the_time():
    pace, cost, now, drawing = Pace(), 4e-7, 0.0, 0.0  # 0.2 s a picture
    pace.move(-RESTS_AFTER)
    draw_at(pace, now, cost)
    count = 0
    while now < 200.0:
        now += 0.1
        pixels = draw_at(pace, now, cost, version=int(10 * now))
        drawing, count = drawing + cost * pixels, count + bool(pixels)
        now += cost * pixels
    assert 20 < count < 60
    assert drawing < 0.06 * 200.0


# ------------------------------------------------------------------------------------------------- what it draws


def test_a_page_sees_what_a_camera_sees_there():
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_rotvec([0.3, -0.2, 0.1]).as_matrix()
    pose[:3, 3] = [1, 2, 3]
    cameras = cameras_of(page_camera(pose), 80 * 60, lambda *arguments: posed_cameras(*arguments, Config()))
    assert (cameras.width, cameras.height) == (80, 60)
    np.testing.assert_allclose(torch.linalg.inv(cameras.viewmats[0].double()).numpy(), pose, atol=1e-6)
    # The middle of the upper edge is half the field of view away from the middle.
    corner = torch.linalg.inv(cameras.Ks[0]) @ torch.tensor([40.0, 0.0, 1.0])
    assert torch.atan2(-corner[1], corner[2]).item() == pytest.approx(0.5, abs=1e-6)
    assert corner[0].item() == pytest.approx(0.0, abs=1e-6)


@pytest.fixture(scope="module")
def trained(city_block, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as monkeypatch:
        train(monkeypatch, simple_trainer, city_block, folder, "--max_steps", 12)
    return folder


def train(monkeypatch, script, data_dir: Path, result_dir: Path, *options: object) -> None:
    arguments = ("--data_dir", data_dir, "--result_dir", result_dir, "--device", "cpu", *options)
    monkeypatch.setattr(sys, "argv", ["script", "default", *map(str, arguments)])
    command_line.main(script.CONFIGS, script.train, "test")


@pytest.mark.parametrize("name", ["ckpts/ckpt_12.pt", "ply/point_cloud_12.ply"])
def test_an_opened_model_draws_what_all_its_rows_draw(trained, name):
    model, up, pose = open_model(trained / name, CPU, antialiased=False)
    assert up.tolist() == [0, 0, 1]
    assert abs(pose[:3, 0] @ up) < 1e-9, "level"
    whole = load_checkpoint(trained / "ckpts/ckpt_12.pt").gaussians
    means = whole["means"].numpy()
    local = (means - pose[:3, 3]) @ pose[:3, :3]
    assert (local[:, 2] > 0).mean() > 0.9, "it stands before the model"
    cameras = cameras_of(page_camera(pose), 80 * 60, model.make_cameras)
    expected, _ = render(whole, cameras, Config(), sh_degree=3)
    assert expected.std() > 0.05
    torch.testing.assert_close(model.draw(cameras), expected, atol=2e-6, rtol=0)


def test_an_exported_model_stands_upright(trained, tmp_path):
    y_down, z_up = [0, -1, 0], [0, 0, 1]
    for world, up, expected in (("normalized", "y", y_down), ("normalized", "z", z_up), ("input", None, y_down)):
        to = tmp_path / f"{world}_{up}.ply"
        export.export(export.Options(trained / "ckpts/ckpt_12.pt", to, world=world, up=up))
        assert open_model(to, CPU, antialiased=False)[1].tolist() == expected


def test_a_checkpoint_says_that_it_was_trained_antialiased(trained, tmp_path):
    saved = load_checkpoint(trained / "ckpts/ckpt_12.pt")
    options = {**saved.options, "antialiased": True}
    save_checkpoint(tmp_path / "ckpt.pt", dataclasses.replace(saved, options=options))
    pictures = []
    for path, antialiased in ((tmp_path / "ckpt.pt", False), (trained / "ckpts/ckpt_12.pt", True)):
        model, _, pose = open_model(path, CPU, antialiased=antialiased)
        pictures.append(model.draw(cameras_of(page_camera(pose), 80 * 60, model.make_cameras)))
    torch.testing.assert_close(pictures[0], pictures[1], atol=0, rtol=0)
    plain, _, pose = open_model(trained / "ckpts/ckpt_12.pt", CPU, antialiased=False)
    assert not torch.equal(pictures[0], plain.draw(cameras_of(page_camera(pose), 80 * 60, plain.make_cameras)))


# ---------------------------------------------------------------------------------------------------------- photos


class Box:
    """Stand for viser's checkbox."""

    value = False

    def on_update(self, callback) -> None:
        self._callback = callback

    def tick(self, value: bool, position: np.ndarray) -> None:
        self.value = value
        self._callback(SimpleNamespace(client=SimpleNamespace(camera=SimpleNamespace(position=position))))


def shown(photos: list[Photo]) -> tuple[Frustums, Box, dict[str, SimpleNamespace]]:
    """Frustums on a page that keeps what it is told, by the photos' names, in their order."""
    kept: dict[str, SimpleNamespace] = {}

    def add(name: str, **options) -> SimpleNamespace:
        kept[name.removeprefix("/cameras/")] = frustum = SimpleNamespace(**options, image=None)
        frustum.on_click = lambda callback: setattr(frustum, "click", callback)
        return frustum

    box = Box()
    scene = SimpleNamespace(add_camera_frustum=add)
    server = SimpleNamespace(scene=scene, gui=SimpleNamespace(add_checkbox=lambda *_, **__: box))
    return Frustums(server, photos, 0.1), box, kept


def photo_at(x: float, read) -> Photo:
    pose = np.eye(4)
    pose[0, 3] = x
    return Photo(f"{x:g}", pose, 1.0, 1.5, read)


def test_photos_are_read_when_they_are_shown_and_the_nearest_first():
    order: list[float] = []

    def reads(x: float):
        def read(pixels: int) -> np.ndarray:
            order.append(x)
            if x == 3:
                raise OSError("damaged")
            return np.full((pixels, pixels, 3), x, np.uint8)

        return read

    places = [0.0, 1.0, 3.0, 7.0]
    photos, box, kept = shown([photo_at(x, reads(x)) for x in places])
    assert not any(frustum.visible or order for frustum in kept.values())
    box.tick(True, np.array([3.05, 0, 0]))
    photos._reader.submit(lambda: None).result()  # until all are read
    assert order == [3.0, 1.0, 0.0, 7.0]
    assert [None if f.image is None else int(f.image.max()) for f in kept.values()] == [0, 1, None, 7]
    # Who stands in a photo's place would see it in place of the model.
    assert [f.visible for f in kept.values()] == [True, True, False, True]
    camera = SimpleNamespace()
    kept["7"].click(SimpleNamespace(client=SimpleNamespace(camera=camera, atomic=contextlib.nullcontext)))
    assert camera.position.tolist() == [7, 0, 0]
    assert [f.visible for f in kept.values()] == [True, True, True, False]
    photos.close()


def test_photos_that_are_hidden_again_are_not_read():
    began, goes_on, order = threading.Event(), threading.Event(), []

    def read(pixels: int) -> np.ndarray:
        began.set()
        assert goes_on.wait(HANGS_AFTER)
        order.append(0)
        return np.zeros((2, 3, 3), np.uint8)

    photos, box, _ = shown([photo_at(float(x), read) for x in range(5)])
    box.tick(True, np.full(3, 9.0))
    assert began.wait(HANGS_AFTER)
    box.tick(False, np.full(3, 9.0))
    goes_on.set()
    photos.close()
    assert len(order) == 1


def test_of_many_photos_some_are_shown_evenly():
    _, _, kept = shown([photo_at(float(x), None) for x in range(1000)])
    places = sorted(map(float, kept))
    assert len(places) == frustums.MOST
    assert (places[0], places[-1]) == (0, 999)
    assert set(np.diff(places)) == {5.0, 6.0}
    assert shown([])[2] == {}


def test_a_photo_on_the_page_is_what_its_camera_sees(city_block):
    scene = load_scene(city_block)
    for index in (0, len(scene.image_names) - 1):
        photo = live.photo_of(scene, index)
        camera = scene.cameras[scene.camera_indices[index]]
        small = photo.read(40)
        assert max(small.shape) == 40
        assert small.shape[1] / small.shape[0] == pytest.approx(photo.aspect, rel=0.05)
        whole = camera.undistort(decode_image(scene.image_paths[index]))
        np.testing.assert_allclose(small.mean(axis=(0, 1)), whole.mean(axis=(0, 1)), atol=1.0)
        assert photo.fov == pytest.approx(2 * np.arctan(0.5 * camera.height / camera.K[1, 1]))
        np.testing.assert_array_equal(photo.pose, scene.camtoworlds[index])


# -------------------------------------------------------------------------------------------------------- refusals


def test_a_page_that_is_served_everywhere_is_named_by_an_address_that_opens():
    pytest.importorskip("viser")
    page = Page(free_port(), "0.0.0.0")
    try:
        assert "0.0.0.0" not in page.url
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(page.url, timeout=HANGS_AFTER) as answer:
            assert answer.status == 200
    finally:
        page.close()


def test_without_a_network_the_address_of_this_machine_is_named(monkeypatch):
    class Unreachable(socket.socket):
        def connect(self, address) -> None:
            raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(socket, "socket", Unreachable)
    assert page_module.address_of("0.0.0.0") == "127.0.0.1"
    assert page_module.address_of("192.0.2.7") == "192.0.2.7"


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_port_that_is_none_is_one_sentence(port):
    with pytest.raises(InputError, match=f"Port {port} is none: give one from 1 to 65535"):
        check_free(port, "127.0.0.1")


@pytest.mark.parametrize("program", ["script", "view.py"])
def test_a_port_that_is_taken_is_one_sentence(monkeypatch, trained, city_block, tmp_path, capsys, program):
    pytest.importorskip("viser")

    def begin(port: int) -> None:
        if program == "view.py":
            monkeypatch.setattr(sys, "argv", ["view.py", str(trained / "ckpts/ckpt_12.pt"), "--port", str(port)])
            view.main()
        else:
            train(monkeypatch, simple_trainer, city_block, tmp_path / "results", "--viewer", port)

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit, match="2"):
            begin(port)
    assert f"Port {port} is in use" in capsys.readouterr().err
    assert not (tmp_path / "results/cfg.yml").exists()


def test_a_host_that_is_none_of_this_machine_is_one_sentence(monkeypatch, city_block, tmp_path, capsys):
    pytest.importorskip("viser")
    with pytest.raises(SystemExit, match="2"):
        train(monkeypatch, simple_trainer, city_block, tmp_path, "--viewer", 8080, "--viewer_host", "192.0.2.1")
    assert "The viewer cannot be served at 192.0.2.1:8080" in capsys.readouterr().err


def test_without_viser_the_command_that_installs_it_is_named(monkeypatch, city_block, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "viser", None)
    with pytest.raises(SystemExit, match="2"):
        train(monkeypatch, simple_trainer, city_block, tmp_path, "--viewer")
    assert "pip install viser" in capsys.readouterr().err


def test_a_file_that_holds_no_model_is_named(tmp_path):
    with pytest.raises(InputError, match=r"The model .*nothing\.ply does not exist"):
        open_model(tmp_path / "nothing.ply", CPU, antialiased=False)


@pytest.mark.parametrize(
    ("ending", "program"), [("/lod-meta.json", "SuperSplat's viewer"), (".compressed.ply", "SuperSplat")]
)
def test_a_file_for_viewers_is_not_shown_and_what_opens_it_is_named(trained, tmp_path, ending, program):
    made = tmp_path / f"a{ending}"
    export.export(export.Options(trained / "ckpts/ckpt_12.pt", made, max_gaussians=20))
    expected = f"The model {made} is a file for viewers, which keeps less than a model has: open it in {program}, or"
    with pytest.raises(InputError, match=re.escape(expected)):
        open_model(made, CPU, antialiased=False)


# ------------------------------------------------------------------------------------------- a run that is watched


@pytest.mark.parametrize("script", [simple_trainer, simple_trainer_hybrid_streamed])
def test_a_run_that_is_watched_and_paused_gives_the_same_model(monkeypatch, city_block, tmp_path, script):
    """Its camera moves at every step, and at step 6 somebody pauses for a moment."""
    pytest.importorskip("viser")
    options = ("--max_steps", 12, "--refine_start_iter", 3, "--refine_every", 4)
    train(monkeypatch, script, city_block, tmp_path / "alone", *options)

    visitors: list[Visitor] = []
    said: list[list[str]] = []
    after_step = command_line.TrainingRun.after_step

    def watched(run, step, loss):
        page = run.observers[0].page
        if not visitors:
            visitors.append(Visitor(page))
            monkeypatch.setattr(page._server, "get_clients", visitors[0].clients)
            monkeypatch.setattr(page, "say", said.append)
        visitors[0].move(run.scene.camtoworlds[step % 3])
        if step == 6:
            page._toggle()
        after_step(run, step, loss)

    monkeypatch.setattr(command_line.TrainingRun, "after_step", watched)
    train(monkeypatch, script, city_block, tmp_path / "watched", *options, "--viewer", free_port())
    assert visitors[0].looks_while_paused == 10
    assert len(visitors[0].pictures) >= 12
    assert all(picture.dtype == np.uint8 and picture.std() > 5 for picture in visitors[0].pictures)
    assert len({picture.tobytes() for picture in visitors[0].pictures}) > 3
    assert any("steps a second" in line for lines in said for line in lines)
    models = [load_checkpoint(tmp_path / name / "ckpts/ckpt_12.pt").gaussians for name in ("alone", "watched")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_ctrl_c_ends_a_run_that_is_paused(monkeypatch, city_block, tmp_path, capsys):
    pytest.importorskip("viser")
    after_step = command_line.TrainingRun.after_step

    class Impatient(Visitor):
        def while_paused(self, looks: int) -> None:
            if looks == 5:
                os.kill(os.getpid(), signal.SIGINT)

    def watched(run, step, loss):
        page = run.observers[0].page
        if step == 2:
            visitor = Impatient(page)
            visitor.move(run.scene.camtoworlds[0])
            monkeypatch.setattr(page._server, "get_clients", visitor.clients)
            page._toggle()
        after_step(run, step, loss)

    monkeypatch.setattr(command_line.TrainingRun, "after_step", watched)
    train(monkeypatch, simple_trainer, city_block, tmp_path, "--max_steps", 50, "--viewer", free_port())
    said = capsys.readouterr().out
    assert "Interrupted after 3 steps" in said
    assert re.search(r"Watch the training at http://127\.0\.0\.1:\d+", said)


def test_a_picture_without_enough_memory_is_black_and_training_goes_on(monkeypatch, city_block, tmp_path):
    pytest.importorskip("viser")
    after_step = command_line.TrainingRun.after_step
    visitors: list[Visitor] = []

    def no_memory(cameras, *, depth=False):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def watched(run, step, loss):
        if not visitors:
            visitors.append(Visitor(run.observers[0].page))
            visitors[0].move(run.scene.camtoworlds[0])
            monkeypatch.setattr(run.observers[0].page._server, "get_clients", visitors[0].clients)
        with monkeypatch.context() as patch:
            if step < 2:
                patch.setattr(run.drawing, "draw", no_memory)
            after_step(run, step, loss)

    monkeypatch.setattr(command_line.TrainingRun, "after_step", watched)
    train(monkeypatch, simple_trainer, city_block, tmp_path, "--max_steps", 3, "--viewer", free_port())
    assert visitors[0].pictures
    assert visitors[0].pictures[0].max() == 0
    assert (tmp_path / "ckpts/ckpt_3.pt").is_file()
