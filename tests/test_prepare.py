"""The public datasets are prepared from made-up downloads in their exact layout and with their numbers of pictures."""

import errno
import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pycolmap
import pytest
import torch
from PIL import Image

from configs import DATASETS, scene_config
from datasets import links
from datasets import mega_nerf as mega_nerf_layout
from datasets.image_files import decode_image
from datasets.model_choice import load_sparse_model
from datasets.ply import read_points
from datasets.prepare import INSTRUCTIONS, PUBLISHED_COUNTS, main
from datasets.scene import load_scene
from datasets.splits import split_indices
from tests.made_up_downloads import View, gauu_scene, matrix_city, mega_nerf, pinhole, write_model, write_point_cloud


@pytest.fixture(autouse=True)
def _own_place(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def readme_command(dataset: str) -> list[str]:
    """The arguments of the README's command for a dataset."""
    page = (Path(__file__).parent.parent / "docs/datasets.md").read_text()
    (command,) = (line for line in page.splitlines() if line.startswith(f"python -m datasets.prepare {dataset}"))
    return shlex.split(command)[3:]


def assert_prepared(dataset: str, train: list[View], test: list[View], data_dir: Path | None = None) -> None:
    """The trainers' own options select exactly the test views, and every picture has its own pose."""
    cfg = scene_config(dataset)
    model = load_sparse_model(data_dir or Path(cfg.data_dir))[0]
    train_ids, test_ids = split_indices(len(model.image_names), test_every=cfg.test_every, test_after=cfg.test_after)
    for ids, views in ((train_ids, train), (test_ids, test)):
        assert len(ids) == len(views)
        for image_id, view in zip(ids, views, strict=True):
            linked = (data_dir or Path(cfg.data_dir)) / "images" / model.image_names[image_id]
            assert os.path.samefile(linked, view.file)
            np.testing.assert_allclose(model.worldtocams[image_id, :3], view.worldtocam, atol=1e-6)


def refused(arguments: list[str], capsys) -> str:
    """The one sentence with which a command ends."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["rubble", "building"])
def test_mill_19(dataset, capsys):
    data_dir = Path(scene_config(dataset).data_dir)
    num_train, num_test = PUBLISHED_COUNTS[dataset]
    every = {"rubble": 83, "building": 97}[dataset]
    train, test = mega_nerf(data_dir, Path("data/colmap_results") / dataset, num_train + num_test, every)
    assert (len(train), len(test)) == (num_train, num_test)
    main(readme_command(dataset))
    assert_prepared(dataset, list(train.values()), list(test.values()))
    report = capsys.readouterr().out
    assert f"python simple_trainer.py {dataset}\n" in report
    assert f"{num_train} train, {num_test} test, by --test_every {every}, as published" in report
    main([dataset, "--check"])
    assert capsys.readouterr().out == report


@pytest.mark.slow
@pytest.mark.parametrize(("dataset", "every", "has_rgbs"), [("residence", 129, False), ("sciart", 150, True)])
def test_urban_scene_3d(dataset, every, has_rgbs, capsys):
    command = readme_command(dataset)
    photos = Path(command[command.index("--photos") + 1])
    data_dir = Path(scene_config(dataset).data_dir)
    num_train, num_test = PUBLISHED_COUNTS[dataset]
    models = Path("data/colmap_results") / dataset
    train, test = mega_nerf(data_dir, models, num_train + num_test, every, None if has_rgbs else photos)
    assert (len(train), len(test)) == (num_train, num_test)
    main(command)
    train_views = [View(data_dir / "train/rgbs" / name, view.worldtocam) for name, view in train.items()]
    test_views = [View(data_dir / "val/rgbs" / name, view.worldtocam) for name, view in test.items()]
    # By these counts the facts of configs.py leave the first test picture to training, which the report says.
    assert_prepared(dataset, [*train_views, test_views[0]], test_views[1:])
    report = capsys.readouterr().out
    assert (
        f"{num_test - 1} test, by --test_after {num_train}; of the {num_test} published test pictures 1 would" in report
    )
    assert f"--test_after {num_train - 1} holds them all out" in report


@pytest.mark.slow
def test_matrix_city(capsys):
    command = readme_command("aerial")
    train, test = matrix_city(Path("data/MatrixCity/aerial"), *PUBLISHED_COUNTS["aerial"], Path(command[-1]))
    main(command)
    assert_prepared("aerial", train, test)
    assert "741 test, by --test_after 5620, as published" in capsys.readouterr().out
    names = sorted(path.name for path in Path("data/MatrixCity/aerial/images").iterdir())
    assert (names[0], names[5621], names[-1]) == ("0000.png", "5621.png", "6361.png")
    assert os.path.samefile("data/MatrixCity/aerial/sparse/0/points.ply", command[-1])


@pytest.mark.parametrize("dataset", ["sztu", "lfls", "sziit"])
def test_gauu_scene_where_it_was_unpacked(dataset, capsys):
    data_dir = Path(scene_config(dataset).data_dir)
    views = gauu_scene(data_dir)
    before = set(data_dir.rglob("*"))
    main(readme_command(dataset))
    assert set(data_dir.rglob("*")) == before | {data_dir / "sparse/0/parsed_scene.npz"}
    assert_prepared(dataset, [v for i, v in enumerate(views) if i % 10], views[::10])
    assert "27 train, 3 test, by --test_every 10" in capsys.readouterr().out


@pytest.mark.parametrize("model_dir", ["sparse/0", "sparse"])
def test_gauu_scene_from_elsewhere_with_points_in_a_ply(model_dir):
    views = gauu_scene(Path("download"), model_dir=model_dir, points_in_ply=True)
    main(["lfls", "--source", "download", "--data_dir", "lfls"])
    assert_prepared("lfls", [v for i, v in enumerate(views) if i % 10], views[::10], Path("lfls"))
    points, colors = read_points(Path("download") / model_dir / "points3D.ply")
    model = load_sparse_model(Path("lfls"))[0]
    order, model_order = np.lexsort(points.T), np.lexsort(model.points.T)
    np.testing.assert_array_equal(model.points[model_order], points[order])
    np.testing.assert_array_equal(model.points_rgb[model_order], colors[order])
    main(["lfls", "--source", "download", "--data_dir", "lfls"])


def small_rubble(monkeypatch, num_images: int = 25, every: int = 5) -> tuple[dict[str, View], dict[str, View]]:
    """Rubble with every fifth of a few pictures held out."""
    monkeypatch.setitem(DATASETS, "rubble", DATASETS["rubble"] | {"test_every": every})
    return mega_nerf(Path("download"), Path("models"), num_images, every)


RUBBLE = ["rubble", "--source", "download", "--colmap", "models", "--data_dir", "rubble"]


def test_the_merged_model_holds_both(monkeypatch):
    small_rubble(monkeypatch)
    main(RUBBLE)
    merged = pycolmap.Reconstruction("rubble/sparse/0")
    parts = [pycolmap.Reconstruction(f"models/{part}/sparse/0") for part in ("train", "val")]
    assert merged.is_valid()
    # One camera is in both halves, and each half has another.
    assert sorted(camera.focal_length_x for camera in merged.cameras.values()) == [20, 21, 22]
    by_name = {image.name: image for image in merged.images.values()}
    assert len(by_name) == sum(part.num_images() for part in parts)
    found = {tuple(point.xyz): point for point in merged.points3D.values()}
    assert len(found) == sum(part.num_points3D() for part in parts) == 60
    observations = 0
    for part in parts:
        for image in part.images.values():
            twin = by_name[image.name]
            np.testing.assert_array_equal(twin.cam_from_world().matrix(), image.cam_from_world().matrix())
            assert merged.cameras[twin.camera_id].params.tolist() == part.cameras[image.camera_id].params.tolist()
            np.testing.assert_array_equal([p.xy for p in twin.points2D], [p.xy for p in image.points2D])
        for point in part.points3D.values():
            twin = found[tuple(point.xyz)]
            assert twin.color.tolist() == point.color.tolist()
            assert twin.error == point.error
            seen_by = {(part.images[e.image_id].name, e.point2D_idx) for e in point.track.elements}
            assert {(merged.images[e.image_id].name, e.point2D_idx) for e in twin.track.elements} == seen_by
            observations += len(seen_by)
    assert observations == merged.compute_num_observations() > 20


def interrupt_after(num_calls: int, function: Callable[..., object]) -> Callable[..., object]:
    calls = []

    def interrupted(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) > num_calls:
            raise KeyboardInterrupt
        return function(*arguments)

    return interrupted


def test_an_interrupted_run_goes_on(monkeypatch, capsys):
    train, test = small_rubble(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(mega_nerf_layout, "link_file", interrupt_after(10, links.link_file))
        with pytest.raises(SystemExit) as stopped:
            main(RUBBLE)
    assert stopped.value.code == 130
    assert "goes on" in capsys.readouterr().err
    assert len(list(Path("rubble/images").iterdir())) == 10
    (Path("rubble") / "sparse.part/0").mkdir(parents=True)
    for _ in range(2):
        main(RUBBLE)
        assert_prepared("rubble", list(train.values()), list(test.values()), Path("rubble"))
        assert sorted(path.name for path in Path("rubble").iterdir()) == ["images", "sparse", "test_images.txt"]
    scene = load_scene("rubble", data_factor=4, test_every=5)
    assert len(scene.test_ids) == 5


def test_models_may_lie_in_the_download_and_name_pictures_with_another_suffix(monkeypatch):
    train, test = small_rubble(monkeypatch)
    for part, half in (("train", train), ("val", test)):
        poses = {name.replace(".jpg", ".JPG"): view.worldtocam for name, view in half.items()}
        write_model(Path("download") / part / "sparse/0", poses, [pinhole()])
    main(["rubble", "--source", "download", "--data_dir", "rubble"])
    assert_prepared("rubble", list(train.values()), list(test.values()), Path("rubble"))
    assert Path("rubble/images/000000.JPG").is_file()


@pytest.mark.parametrize(("failing", "kind"), [([], "hard"), (["link"], "symbolic"), (["link", "symlink"], "copy")])
def test_files_are_copied_only_where_nothing_else_works(tmp_path, monkeypatch, failing, kind):
    def fail(*arguments: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    source, target = tmp_path / "source", tmp_path / "folder/target"
    source.write_bytes(b"content")
    for name in failing:
        monkeypatch.setattr(links.os, name, fail)
    for _ in range(2):
        links.link_file(source, target)
        assert target.read_bytes() == b"content"
        assert target.is_symlink() == (kind == "symbolic")
        assert os.path.samefile(source, target) == (kind != "copy")
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_nothing_of_others_is_replaced(monkeypatch, capsys):
    small_rubble(monkeypatch)
    shutil.copytree("models/train/sparse", "rubble/sparse")
    assert "was not made by this command" in refused(RUBBLE, capsys)
    assert sorted(path.name for path in Path("rubble").iterdir()) == ["sparse"]
    shutil.rmtree("rubble/sparse")
    Path("rubble/images").mkdir()
    Path("rubble/images/000003.jpg").write_bytes(b"mine")
    assert "000003.jpg exists and is not" in refused(RUBBLE, capsys)
    assert Path("rubble/images/000003.jpg").read_bytes() == b"mine"


def test_incomplete_downloads_are_refused(monkeypatch, capsys):
    _, test = small_rubble(monkeypatch)
    no_models = ["rubble", "--source", "download", "--data_dir", "rubble"]
    assert "--colmap" in refused(no_models, capsys)
    os.rename("download/train/rgbs/000001.jpg", "000001.jpg")
    assert "1 of 20 pictures of the train model are missing" in refused(RUBBLE, capsys)
    os.rename("000001.jpg", "download/train/rgbs/000001.jpg")
    shutil.copy("download/val/rgbs/000000.jpg", "download/val/rgbs/000025.jpg")
    assert "1 test pictures in download/val/rgbs are not in the COLMAP model" in refused(RUBBLE, capsys)
    os.rename("download/val/rgbs/000025.jpg", "download/val/rgbs/000005.png")  # now of one stem with another
    os.rename("download/val/rgbs/000005.jpg", "000005.jpg")
    shutil.copytree("models", "twice")
    shutil.rmtree("twice/val/sparse")
    poses = {name: view.worldtocam for name, view in test.items()} | {"000005.JPG": test["000005.jpg"].worldtocam}
    write_model(Path("twice/val/sparse/0"), poses, [pinhole()])
    command = [argument.replace("models", "twice") for argument in RUBBLE]
    assert "1 of 6 pictures of the val model are missing from download/val/rgbs (000005.jpg)" in refused(
        command, capsys
    )
    os.rename("000005.jpg", "download/val/rgbs/000005.jpg")
    Path("download/val/rgbs/000005.png").unlink()
    Path("download/val/rgbs/.000005.part.jpg").write_bytes(b"left over")
    Path("download/val/rgbs/Thumbs.db").write_bytes(b"")
    assert not Path("rubble").exists()
    main(RUBBLE)
    shutil.rmtree("download/val")
    assert "download/val does not exist" in refused(RUBBLE, capsys)


def test_halves_of_different_worlds_or_with_equal_names_are_refused(monkeypatch, capsys):
    train, test = small_rubble(monkeypatch)
    shutil.rmtree("models/val")
    far = {name: view.worldtocam + np.array([[0.0, 0, 0, 500]]) for name, view in test.items()}
    write_model(Path("models/val/sparse/0"), far, [pinhole()])
    assert "different worlds" in refused(RUBBLE, capsys)
    shutil.rmtree("models/val")
    shutil.copy("download/train/rgbs/000001.jpg", "download/val/rgbs/000001.jpg")
    poses = {name: view.worldtocam for name, view in [*test.items(), ("000001.jpg", train["000001.jpg"])]}
    write_model(Path("models/val/sparse/0"), poses, [pinhole()])
    assert "1 names occur in both" in refused(RUBBLE, capsys)


def test_a_split_that_is_not_the_published_one_is_refused(monkeypatch, capsys):
    train, test = small_rubble(monkeypatch)
    monkeypatch.setitem(DATASETS, "rubble", DATASETS["rubble"] | {"test_every": 6})
    assert "--test_every 6 selects 1 of the 5 published test pictures of rubble and 4 others" in refused(RUBBLE, capsys)
    monkeypatch.setitem(DATASETS, "rubble", DATASETS["rubble"] | {"test_every": -1, "test_after": 18})
    shutil.rmtree("rubble")
    error = refused(RUBBLE, capsys)
    assert "--test_after 18 selects 5 of the 5 published test pictures of rubble and 1 others" in error
    assert "train with --test_every -1 --test_after 19." in error
    monkeypatch.setitem(DATASETS, "rubble", DATASETS["rubble"] | {"test_after": 20})
    main(["rubble", "--data_dir", "rubble", "--check"])
    assert (
        "4 test, by --test_after 20; of the 5 published test pictures 1 would be trained on" in capsys.readouterr().out
    )
    scene = load_scene("rubble", test_every=-1, test_after=19)
    assert [scene.image_names[i] for i in scene.test_ids] == [f"val/{name}" for name in test]
    assert [scene.image_names[i] for i in scene.train_ids] == [f"train/{name}" for name in train]


def test_check_finds_what_is_wrong(monkeypatch, capsys):
    small_rubble(monkeypatch)
    check = ["rubble", "--data_dir", "rubble", "--check"]
    assert "rubble does not exist" in refused(check, capsys)
    main(RUBBLE)
    picture = Path("rubble/images/000007.jpg")
    picture.unlink()
    assert "1 of 25 pictures of the COLMAP model are missing" in refused(check, capsys)
    picture.write_bytes(b"no picture")
    assert "000007.jpg cannot be decoded" in refused(check, capsys)
    Image.new("RGB", (18, 24)).save(picture)
    assert "000007.jpg is 18x24 pixels" in refused(check, capsys)
    Image.new("RGB", (24, 18)).save(picture)
    main(check)
    test_list = Path("rubble/test_images.txt")
    test_list.write_text(test_list.read_text().replace("000005", "000006"))
    assert "selects 4 of the 5 published" in refused(check, capsys)


@pytest.mark.parametrize("source", ["download", "residence"])
def test_photos_are_undistorted_once(source, monkeypatch, capsys):
    monkeypatch.setitem(DATASETS, "residence", DATASETS["residence"] | {"test_after": 19})
    mega_nerf(Path(source), Path("models"), 25, 5, Path("photos"))
    command = ["residence", "--source", source, "--colmap", "models", "--data_dir", "residence"]
    assert "--photos" in refused(command, capsys)
    command += ["--photos", "photos"]
    with monkeypatch.context() as patch:
        patch.setattr(mega_nerf_layout.cv2, "undistort", interrupt_after(10, cv2.undistort))
        with pytest.raises(SystemExit):
            main(command)
    main(command)
    made = Path("residence/train/rgbs/000007.jpg")
    K, distortion = np.array([[20.0, 0, 12], [0, 20, 9], [0, 0, 1]]), np.array([0.05, -0.01, 0, 0])
    expected = cv2.undistort(decode_image(Path("photos/1/DJI_0007.JPG")), K, distortion)
    assert np.abs(decode_image(made).astype(int) - expected).mean() < 3
    before = made.stat().st_mtime_ns
    Path("residence/val/rgbs/000005.jpg").unlink()
    Path("residence/images/val/000005.jpg").unlink()
    main(command)
    assert made.stat().st_mtime_ns == before
    assert Path("residence/images/val/000005.jpg").is_file()
    assert os.path.samefile("residence/images/train/000007.jpg", made)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("../secret.jpg,000001.pt", "names no photo"),
        ("/etc/passwd,000001.pt", "names no photo"),
        ("1/DJI_0001.JPG,../../x.pt", "names no photo"),
        ("1/DJI_0001.JPG", "names no photo"),
        ("1/DJI_9999.JPG,000001.pt", "DJI_9999.JPG of download/mappings.txt does not exist"),
    ],
)
def test_mappings_stay_inside_the_download(monkeypatch, capsys, line, message):
    mega_nerf(Path("download"), Path("models"), 6, 5, Path("photos"))
    Path("secret.jpg").write_bytes(b"")
    Path("download/mappings.txt").write_text(line + "\n")
    command = ["residence", "--source", "download", "--colmap", "models", "--photos", "photos", "--data_dir", "out"]
    assert message in refused(command, capsys)


def test_metadata_is_not_executed(monkeypatch, capsys):
    class Payload:
        def __reduce__(self):
            return os.mkdir, ("executed",)

    mega_nerf(Path("download"), Path("models"), 6, 5, Path("photos"))
    command = ["residence", "--source", "download", "--colmap", "models", "--photos", "photos", "--data_dir", "out"]
    for content in (
        Payload(),
        {"W": 24},
        {"W": 1, "H": 1, "intrinsics": torch.full((4,), torch.nan), "distortion": []},
    ):
        torch.save(content, "download/train/metadata/000003.pt")
        assert "000003.pt cannot be read as Mega-NeRF's metadata" in refused(command, capsys)
    assert not Path("executed").exists()


def small_aerial(monkeypatch, **options: object) -> tuple[list[View], list[View]]:
    monkeypatch.setitem(DATASETS, "aerial", DATASETS["aerial"] | {"test_after": 19})
    return matrix_city(Path("download"), 20, 6, Path("points.ply"), **options)


AERIAL = ["aerial", "--source", "download", "--data_dir", "aerial"]


def test_matrix_city_can_be_loaded(monkeypatch):
    train, test = small_aerial(monkeypatch, in_input=True)
    main([*AERIAL, "--points", "points.ply"])
    assert_prepared("aerial", train, test, Path("aerial"))
    scene = load_scene("aerial", data_factor=1.2, test_every=-1, test_after=19, init_ply=True)
    assert len(scene.points) == 500
    assert {(camera.width, camera.height) for camera in scene.cameras} == {(20, 15)}
    np.testing.assert_allclose(scene.cameras[0].K, [[20 / 1.2, 0, 10], [0, 20 / 1.2, 7.5], [0, 0, 1]])


def colmap_of_matrix_city(halves: list[list[View]], folder: str = "models") -> None:
    """COLMAP models as CityGaussian's scripts make them: each half counts from 0000.png."""
    for part, views in zip(("train", "test"), halves, strict=True):
        poses = {f"{index:04d}.png": view.worldtocam for index, view in enumerate(views)}
        write_model(Path(folder) / part / "sparse/0", poses, [pinhole()])


def test_matrix_city_with_colmap_models(monkeypatch):
    train, test = small_aerial(monkeypatch)
    colmap_of_matrix_city([train, test])
    main([*AERIAL, "--colmap", "models"])
    assert_prepared("aerial", train, test, Path("aerial"))
    model = load_sparse_model(Path("aerial"))[0]
    assert len(model.points) == 60
    points, colors = read_points(Path("aerial/sparse/0/points.ply"))
    np.testing.assert_allclose(np.sort(points, axis=0), np.sort(model.points, axis=0), atol=1e-5)
    np.testing.assert_array_equal(np.sort(colors, axis=0), np.sort(model.points_rgb, axis=0))
    main([*AERIAL, "--colmap", "models", "--points", "points.ply"])
    assert len(read_points(Path("aerial/sparse/0/points.ply"))[0]) == 500


def test_matrix_city_refuses_what_does_not_belong_together(monkeypatch, capsys):
    train, test = small_aerial(monkeypatch)
    assert "--points" in refused(AERIAL, capsys)
    colmap_of_matrix_city([train, test[::-1]])
    assert "0000.png of models/test/sparse/0 is not the picture" in refused([*AERIAL, "--colmap", "models"], capsys)
    colmap_of_matrix_city([train[:-1], test], "fewer")
    assert "has 19 of the 20 pictures" in refused([*AERIAL, "--colmap", "fewer"], capsys)
    colmap_of_matrix_city([train, [*test, test[0]]], "more")
    assert "0006.png of more/test/sparse/0 is not" in refused([*AERIAL, "--colmap", "more"], capsys)
    write_point_cloud(Path("metres.ply"), scale=100)
    assert "units of 100 m" in refused([*AERIAL, "--points", "metres.ply"], capsys)
    train[3].file.unlink()
    assert "unpack block_1.tar in download/train" in refused([*AERIAL, "--points", "points.ply"], capsys)
    assert not Path("aerial").exists()


def of_a_block(content: dict) -> None:
    for frame in content["frames"]:
        frame["transform_matrix"] = (np.array(frame["transform_matrix"]) * 0.01).tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("fl_x"), "cannot be read as MatrixCity's poses ('fl_x')"),
        (lambda c: c.update(w=-1), "no usable size"),
        (lambda c: c.update(w=1e9), "no usable size"),
        (lambda c: c.update(fl_x=float("nan")), "no usable focal length"),
        (lambda c: c.update(frames=[]), "do not have the shape of poses"),
        (lambda c: c["frames"][2].pop("transform_matrix"), "cannot be read as"),
        (lambda c: c["frames"][2].update(file_path=7), "is not a text"),
        (lambda c: c["frames"][2].update(file_path="../../../../etc/passwd"), "which is outside download"),
        (lambda c: c["frames"][2].update(file_path="/etc/passwd"), "which is outside download"),
        (lambda c: c["frames"][2]["transform_matrix"][0].__setitem__(0, float("inf")), "are not poses"),
        (of_a_block, "not the transforms.json of a block"),
    ],
)
def test_damaged_poses_are_refused(monkeypatch, capsys, change, message):
    small_aerial(monkeypatch)
    path = Path("download/pose/block_all/transforms_train.json")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    error = refused([*AERIAL, "--points", "points.ply"], capsys)
    assert message in error
    assert "transforms_train.json" in error


def test_gauu_scene_refuses_what_is_missing(capsys):
    gauu_scene(Path("download"))
    command = ["sztu", "--source", "download", "--data_dir", "sztu"]
    os.rename("download/sparse/0/points3D.bin", "points3D.bin")
    assert "neither points3D.bin nor points3D.ply" in refused(command, capsys)
    os.rename("points3D.bin", "download/sparse/0/points3D.bin")
    shutil.rmtree("download/images")
    assert "download/images does not exist" in refused(command, capsys)
    shutil.rmtree("download/sparse")
    assert "--colmap" in refused(command, capsys)


@pytest.mark.parametrize("dataset", INSTRUCTIONS)
def test_without_a_download_it_is_said_where_to_get_it(dataset, capsys):
    for arguments, code in (([dataset], 2), ([dataset, "--help"], 0)):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == code
        said = capsys.readouterr()
        assert "https://" in said.out
        assert str(DATASETS[dataset]["data_dir"]) in said.out
        assert "{" not in said.out
    main_error = "does not exist: download what is named above"
    with pytest.raises(SystemExit):
        main([dataset])
    assert main_error in capsys.readouterr().err
