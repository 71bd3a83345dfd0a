"""Poses of other programs: the same scene, written in each format, is the scene that COLMAP's model is."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

import simple_trainer
from datasets.camera import make_camera
from datasets.colmap import SparseModel
from datasets.model_choice import load_sparse_model
from datasets.posed_photos import PhotoFinder
from datasets.scene import Scene, load_scene
from datasets.synthetic import write_city_block
from errors import InputError
from tests import exported_formats
from tests.small_scene import SIZE, camera, write_scene
from tests.training_scripts import train

PERSPECTIVE = ("OPENCV", (80, 82, 47, 33, 0.03, -0.02, 0.004, -0.003))
FISHEYE = ("OPENCV_FISHEYE", (40, 41, 47, 33, 0.02, -0.01, 0.003, -0.001))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def exported(
    tmp_path: Path,
    write: Callable[..., Path],
    lens: tuple[str, tuple[float, ...]] = PERSPECTIVE,
    k3: float = 0.0,
    **options: bool,
) -> tuple[Path, Path, SparseModel]:
    """Write a COLMAP dataset and the same in another format; returns both folders and COLMAP's model."""
    colmap = write_scene(tmp_path / "colmap", ["b/2.png", "a.png", "b/10.png", "c.png", "d.png"], [camera(*lens)])
    model, _ = load_sparse_model(colmap)
    if k3:
        model.camera_params[:, 8] = k3
    other = tmp_path / "other"
    other.mkdir()
    shutil.copytree(colmap / "images", other / "images")
    write(model, other, **options)
    return colmap, other, model


def assert_same_model(read: SparseModel, model: SparseModel) -> None:
    assert read.image_names == model.image_names
    np.testing.assert_allclose(read.worldtocams, model.worldtocams, atol=1e-6, rtol=0)
    for name in ("camera_params", "camera_sizes"):
        of_photos = (getattr(m, name)[m.camera_indices] for m in (read, model))
        np.testing.assert_allclose(*of_photos, atol=1e-6, rtol=0)
    np.testing.assert_allclose(read.points, model.points, atol=1e-6, rtol=0)
    np.testing.assert_array_equal(read.points_rgb, model.points_rgb)


def assert_same_scene(left: Scene, right: Scene) -> None:
    assert left.image_names == right.image_names
    np.testing.assert_allclose(left.camtoworlds, right.camtoworlds, atol=1e-6, rtol=0)
    np.testing.assert_array_equal(left.test_ids, right.test_ids)
    np.testing.assert_allclose(left.points, right.points, atol=1e-5, rtol=0)
    for one, other in zip(left.cameras, right.cameras, strict=True):
        np.testing.assert_allclose(one.K, other.K, atol=1e-4)
        assert (one.width, one.height) == (other.width, other.height)


def refused(data_dir: Path) -> str:
    """Return the sentence with which a dataset is refused."""
    with pytest.raises(InputError) as error:
        load_scene(data_dir)
    sentence = str(error.value)
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize("lens", [PERSPECTIVE, FISHEYE])
@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("applied", [False, True])
def test_nerfstudio_is_read_as_colmap(tmp_path, lens, per_frame, applied):
    write = exported_formats.write_nerfstudio
    colmap, other, model = exported(tmp_path, write, lens, per_frame=per_frame, applied=applied)
    said: list[str] = []
    read, place = load_sparse_model(other, say=said.append)
    assert said == ["Format: nerfstudio, transforms.json."]
    assert place == other / "transforms.json"
    assert_same_model(read, model)
    assert_same_scene(load_scene(other), load_scene(colmap))


def test_the_third_radial_coefficient_is_undistorted():
    """Each undistorted pixel is fetched from where OpenCV's own model projects its ray to."""
    params = np.array([80, 82, 47, 33, -0.2, 0.1, 0.004, -0.003, 0.15])
    made = make_camera("OPENCV", params, np.array(SIZE), SIZE)
    assert made.valid_mask is None
    columns, rows = np.meshgrid(np.arange(SIZE[0]) + 0.5, np.arange(SIZE[1]) + 0.5)
    rays = np.stack([columns, rows, np.ones_like(rows)], axis=-1).reshape(-1, 3) @ np.linalg.inv(made.K).T
    fx, fy, cx, cy, *distortion = params
    intrinsics = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
    expected, _ = cv2.projectPoints(rays, np.zeros(3), np.zeros(3), intrinsics, np.array(distortion))
    ramp = np.stack([columns, rows], axis=-1).astype(np.float32)  # a picture that says where its pixels are
    actual = made.undistort(ramp).reshape(-1, 2)
    inside = ((expected[:, 0] > 1) & (expected[:, 0] < np.array(SIZE) - 1)).all(axis=1)
    assert inside.mean() > 0.9
    np.testing.assert_allclose(actual[inside], expected[inside, 0], atol=0.04)  # remap rounds to 1/32 of a pixel


def edited(path: Path, change: Callable[[dict], object]) -> Path:
    """Change what a JSON file holds."""
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))
    return path


def test_nerfstudio_masks_depths_and_scale(tmp_path):
    _, other, model = exported(tmp_path, exported_formats.write_nerfstudio, per_frame=True)
    (other / "masks").mkdir()
    mask = np.full(SIZE[::-1], 255, np.uint8)
    mask[:, :24] = 0
    Image.fromarray(mask).save(other / "masks/all.png")
    (other / "depth").mkdir()
    millimetres = np.full(SIZE[::-1], 2000, np.uint16)
    millimetres[0] = 0  # not known
    Image.fromarray(millimetres).save(other / "depth/1.png")

    def change(meta: dict) -> None:
        meta["applied_scale"] = 0.5
        for frame in meta["frames"]:
            frame["mask_path"], frame["depth_file_path"] = "masks/all.png", "depth/1.png"
            for row in frame["transform_matrix"][:3]:
                row[3] *= 0.5

    edited(other / "transforms.json", change)
    exported_formats.write_ply(other / "sparse_pc.ply", 0.5 * model.points[:, [0, 2, 1]] * [1, 1, -1], model.points_rgb)
    said: list[str] = []
    scene = load_scene(other, depths=True, say=said.append)
    assert_same_model(load_sparse_model(other)[0], model)
    assert {path.name for path in scene.mask_paths if path} == {"all.png"}
    assert any("25.0 % of all pixels" in sentence for sentence in said)
    assert any("from the depth images that the model names for 4, from maps" in sentence for sentence in said)
    inverse = scene.depths.inverse(1, scene.cameras[0], scene.camtoworlds[1])
    world = np.cbrt(np.linalg.det(scene.transform[:3, :3]))
    np.testing.assert_allclose(inverse[3:], 1 / (2.0 / 0.5 * world), rtol=1e-6)
    assert not inverse[0].any()
    (other / "depth/1.png").unlink()
    assert "names 'depth/1.png' as depth_file_path, which is no file beside it: put the depth images" in refused(other)


def test_instant_ngp_names_photos_without_a_suffix_and_lenses_by_angles(tmp_path):
    _, other, model = exported(
        tmp_path, exported_formats.write_nerfstudio, ("PINHOLE", (80, 80, 48, 32)), applied=False, points=False
    )

    def change(meta: dict) -> None:
        for key in ("fl_x", "fl_y", "cx", "cy", "w", "h", "camera_model"):
            del meta[key]
        meta["camera_angle_x"] = 2 * np.arctan(48 / 80)
        for frame in meta["frames"]:
            frame["file_path"] = "./" + frame["file_path"].removesuffix(".png")

    edited(other / "transforms.json", change)
    said: list[str] = []
    read, _ = load_sparse_model(other, say=said.append)
    assert read.image_names == model.image_names
    np.testing.assert_allclose(read.camera_params[0], model.camera_params[0], atol=1e-9)
    assert any("without points: training starts from 50,000 random ones" in sentence for sentence in said)
    # They are in the cameras' view: each photo has a good share of them in it.
    scene = load_scene(other)
    for camtoworld, index in zip(scene.camtoworlds, scene.camera_indices, strict=True):
        seen = scene.cameras[index]
        local = (scene.points - camtoworld[:3, 3]) @ camtoworld[:3, :3]
        pixels = local[:, :2] / local[:, 2:] * seen.K[0, 0] + seen.K[:2, 2]
        inside = (local[:, 2] > 0) & (pixels >= 0).all(axis=1) & (pixels <= [seen.width, seen.height]).all(axis=1)
        assert inside.mean() > 0.2


BAD_NERFSTUDIO = {
    "no frames": (lambda meta: meta.pop("frames"), r"transforms\.json lacks frames"),
    "no pose": (lambda meta: meta["frames"][1].pop("transform_matrix"), r"no transform_matrix of frame 1 .*finite"),
    "no path": (lambda meta: meta["frames"][1].pop("file_path"), "lacks file_path of frame 1"),
    "no focal length": (lambda meta: meta.pop("fl_x"), "lacks fl_x of frame 0"),
    "not a number": (lambda meta: meta.update(cx="wide"), "says 'wide' for cx of frame 0"),
    "not finite": (lambda meta: meta.update(k1=float("nan")), "says 'nan' for k1"),
    "no size": (lambda meta: meta.update(w=0), "says 0 for w"),
    "no rotation": (
        lambda meta: meta["frames"][2].update(transform_matrix=np.ones((4, 4)).tolist()),
        "pose of frame 2 .* is no rotation",
    ),
    "mirrored": (lambda meta: meta.update(applied_transform=(-np.eye(4)[:3]).tolist()), "applied_transform .* is no"),
    "camera model of two lines": (lambda meta: meta.update(camera_model="A\nB"), r"model A\?B, which is not"),
    "camera model": (lambda meta: meta.update(camera_model="EQUIRECTANGULAR"), "model EQUIRECTANGULAR, which is not"),
    "k4": (lambda meta: meta.update(k4=0.1), "with k4, which moves their corners by"),
    "k4 at any focal length": (lambda meta: meta.update(fl_x=1e-300, k4=0.1), "with k4, which moves their corners by"),
    "lens of a field": (lambda meta: meta.update(ftheta_p0=0.1), "the camera model ftheta_p0, which is not supported"),
    "sphere": (lambda meta: meta["frames"][0].update(latlong=True), "the camera model latlong, which is not supported"),
    "other axes": (lambda meta: meta.update(camera_convention="opencv"), "poses have the camera axes of opencv"),
    "points": (lambda meta: meta.update(ply_file_path="gone.ply"), "'gone.ply' as ply_file_path"),
    "points elsewhere": (lambda meta: meta.update(ply_file_path="../x.ply"), "as ply_file_path, which is no file"),
    "mask": (
        lambda meta: meta["frames"][0].update(mask_path="masks/gone.png"),
        "gone.png, the mask of frame 0",
    ),
    "mask elsewhere": (lambda meta: meta["frames"][0].update(mask_path="m.png"), "masks are read from"),
    "twice": (lambda meta: meta["frames"].append(meta["frames"][0]), "names a picture twice"),
    "photo": (lambda meta: meta["frames"][0].update(file_path="images/gone.png"), r"missing from .*gone\.png"),
    "photo without a size": (
        lambda meta: (meta.pop("w"), meta.pop("h"), meta["frames"][0].update(file_path=f"images/{300 * 'a'}.png")),
        r"names frame 0 \(images/aa.*, which is not in",
    ),
}


@pytest.mark.parametrize("case", BAD_NERFSTUDIO)
def test_bad_transforms_are_one_sentence(tmp_path, case):
    _, other, _ = exported(tmp_path, exported_formats.write_nerfstudio)
    change, sentence = BAD_NERFSTUDIO[case]
    edited(other / "transforms.json", change)
    with pytest.raises(InputError, match=sentence):
        load_scene(other)
    assert ": " in refused(other)


def test_nerfstudio_distortion_counts_whatever_the_camera_model_is_called(tmp_path):
    _, other, model = exported(tmp_path, exported_formats.write_nerfstudio)
    (other / "points").mkdir()
    (other / "sparse_pc.ply").rename(other / "points/of it.ply")
    fields = {"camera_model": "PINHOLE", "ply_file_path": "points\\of it.ply"}
    edited(other / "transforms.json", lambda meta: meta.update(fields, rolling_shutter=[0, 0, 0.1], latlong=False))
    said: list[str] = []
    assert_same_model(load_sparse_model(other, say=said.append)[0], model)
    assert "gives rolling_shutter (a rolling shutter), which is not used" in said[1]
    edited(other / "transforms.json", lambda meta: meta.update(rolling_shutter=[0, 0, 0]))
    said.clear()
    load_sparse_model(other, say=said.append)
    assert len(said) == 1


def test_damaged_json_is_one_sentence(tmp_path):
    _, other, _ = exported(tmp_path, exported_formats.write_nerfstudio)
    path = other / "transforms.json"
    path.write_bytes(path.read_bytes()[:-30])
    assert "cannot be read as JSON" in refused(other)
    path.write_text("[1]")
    assert "holds no JSON object" in refused(other)


def test_colmap_goes_first_and_model_dir_takes_another(tmp_path):
    colmap, other, model = exported(tmp_path, exported_formats.write_nerfstudio)
    shutil.copytree(colmap / "sparse", other / "sparse")
    said: list[str] = []
    assert load_sparse_model(other, say=said.append)[1] == other / "sparse/0"
    assert said[0] == ("Format: COLMAP; transforms.json (nerfstudio) not read (--model_dir transforms.json takes it).")
    said.clear()
    read, place = load_sparse_model(other, "transforms.json", say=said.append)
    assert place == other / "transforms.json"
    assert said[0] == "Format: nerfstudio, transforms.json; the COLMAP model in sparse is not read."
    assert_same_model(read, model)


def test_photos_of_one_name_are_not_guessed(tmp_path):
    _, other, _ = exported(tmp_path, exported_formats.write_nerfstudio)
    shutil.copy(other / "images/a.png", other / "images/b/a.png")
    edited(other / "transforms.json", lambda meta: meta["frames"][0].update(file_path="elsewhere/a.png"))
    load_scene(other)  # images/a.png has that very path's end
    edited(other / "transforms.json", lambda meta: meta["frames"][0].update(file_path="elsewhere/a"))
    assert "may be a.png or b/a.png" in refused(other)


def test_photos_are_found_by_names_as_other_systems_write_them(tmp_path):
    for name in ("b/IMG_1.JPG", "frame.jpg", "frame.0001.jpg", "x.png", "X.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).touch()
    finder, file = PhotoFinder(tmp_path), tmp_path / "cameras.xml"
    for label, name in {
        "C:\\Photos\\B\\img_1.jpg": "b/IMG_1.JPG",
        "/home/me/b/IMG_1.dng": "b/IMG_1.JPG",
        "./images\\frame": "frame.jpg",
        "frame.0001": "frame.0001.jpg",
        "frame.0002": "frame.0002",  # which is not there
        "X": "X.png",
    }.items():
        assert finder.find(file, label) == name
    with pytest.raises(InputError, match=r"may be X\.png or x\.png"):
        finder.find(file, "x.tif")


def test_without_a_model_it_is_said_what_can_be_read(tmp_path):
    (tmp_path / "images").mkdir()
    sentence = refused(tmp_path)
    for part in (
        "holds no COLMAP model",
        "transforms.json",
        "opensfm",
        "cameras.xml",
        ".csv",
        "python -m datasets.reconstruct",
    ):
        assert part in sentence


@pytest.mark.parametrize(("lens", "k3"), [(PERSPECTIVE, 0.0), (PERSPECTIVE, 0.02), (FISHEYE, 0.0)])
@pytest.mark.parametrize("camera_beside", [False, True])
def test_open_drone_map_is_read_as_colmap(tmp_path, lens, k3, camera_beside):
    write = exported_formats.write_open_drone_map
    colmap, other, model = exported(tmp_path, write, lens, k3=k3, camera_beside=camera_beside)
    said: list[str] = []
    read, place = load_sparse_model(other, say=said.append)
    assert place == other / "opensfm/reconstruction.json"
    assert said[0] == "Format: OpenDroneMap, opensfm/reconstruction.json."
    assert any("2 reconstructions that were not joined: the largest, of 5 photos" in sentence for sentence in said)
    assert_same_model(read, model)
    if not k3:
        assert_same_scene(load_scene(other), load_scene(colmap))


@pytest.mark.parametrize(("lens", "k3"), [(PERSPECTIVE, 0.0), (PERSPECTIVE, 0.02), (FISHEYE, 0.0)])
@pytest.mark.parametrize("component", [False, True])
def test_metashape_is_read_as_colmap(tmp_path, lens, k3, component):
    colmap, other, model = exported(tmp_path, exported_formats.write_metashape, lens, k3=k3, component=component)
    said: list[str] = []
    read, _ = load_sparse_model(other, say=said.append)
    assert said[0] == "Format: Metashape, cameras.xml."
    assert any("1 camera not aligned" in sentence for sentence in said)
    assert_same_model(read, model)
    if not k3:
        assert_same_scene(load_scene(other), load_scene(colmap))


def test_metashape_2_names_its_fisheyes_and_rolling_shutters(tmp_path):
    _, other, model = exported(tmp_path, exported_formats.write_metashape, FISHEYE)
    path = other / "cameras.xml"
    text = path.read_text().replace('type="fisheye"', 'type="equidistant_fisheye"')
    path.write_text(
        text.replace('<calibration type="', '<property name="rolling_shutter" value="true"/><calibration type="', 1)
    )
    said: list[str] = []
    assert_same_model(load_sparse_model(other, say=said.append)[0], model)
    assert any("aligned with a rolling shutter (sensor unknown), which is not used" in sentence for sentence in said)
    path.write_text(text.replace("equidistant", "equisolid"))
    assert "cameras of type equisolid_fisheye, which is not supported" in refused(other)


def test_metashape_points_in_the_chunks_own_coordinates(tmp_path):
    colmap, other, model = exported(tmp_path, exported_formats.write_metashape, internal_points=True)
    read, _ = load_sparse_model(other)
    assert np.abs(read.worldtocams - model.worldtocams).max() > 1  # another world, but the same scene in it
    left, right = load_scene(other), load_scene(colmap)
    np.testing.assert_allclose(left.scene_scale, right.scene_scale, rtol=1e-6)
    for one, other_one in zip(left.camtoworlds, right.camtoworlds, strict=True):
        seen = [(s.points - pose[:3, 3]) @ pose[:3, :3] for s, pose in ((left, one), (right, other_one))]
        np.testing.assert_allclose(*seen, atol=1e-4)


@pytest.mark.parametrize("k3", [0.0, 0.02])
@pytest.mark.parametrize(("count_line", "newer"), [(False, False), (True, False), (False, True)])
def test_reality_capture_is_read_as_colmap(tmp_path, k3, count_line, newer):
    lens = ("OPENCV", (81, 81, 47, 33, 0.03, -0.02, 0.004, -0.003))
    colmap, other, model = exported(
        tmp_path, exported_formats.write_reality_capture, lens, k3=k3, count_line=count_line, newer=newer
    )
    said: list[str] = []
    read, _ = load_sparse_model(other, say=said.append)
    assert said == ["Format: RealityScan, parameters.csv."]
    assert_same_model(read, model)
    if not k3:
        assert_same_scene(load_scene(other), load_scene(colmap))


def test_formats_in_one_folder_have_an_order(tmp_path):
    _, other, model = exported(tmp_path, exported_formats.write_reality_capture)
    exported_formats.write_metashape(model, other, points=False)
    exported_formats.write_open_drone_map(model, other)
    exported_formats.write_nerfstudio(model, other)
    said: list[str] = []
    assert load_sparse_model(other, say=said.append)[1].name == "transforms.json"
    assert said[0] == (
        "Format: nerfstudio, transforms.json; opensfm/reconstruction.json (OpenDroneMap), cameras.xml (Metashape), "
        "parameters.csv (RealityScan) not read (--model_dir opensfm/reconstruction.json takes it)."
    )


BAD_RECONSTRUCTIONS = {
    "empty": (lambda parts: parts.clear(), "holds no list of reconstructions"),
    "no shots": (lambda parts: parts[1].pop("shots"), "holds no shots of a reconstruction"),
    "no cameras": (lambda parts: parts[1].pop("cameras"), "holds no cameras"),
    "another camera": (
        lambda parts: parts[1]["shots"]["a.png"].update(camera="x"),
        "lacks the camera 'x' of shot a.png",
    ),
    "no rotation": (lambda parts: parts[1]["shots"]["a.png"].pop("rotation"), "no rotation of shot a.png of 3 finite"),
    "no focal length": (
        lambda parts: next(iter(parts[1]["cameras"].values())).pop("focal_x"),
        "lacks focal_x of camera",
    ),
    "sphere": (
        lambda parts: next(iter(parts[1]["cameras"].values())).update(projection_type="spherical"),
        "camera model spherical, which is not supported",
    ),
    "points": (lambda parts: parts[1]["points"]["3"].pop("color"), "no color of points"),
}


@pytest.mark.parametrize("case", BAD_RECONSTRUCTIONS)
def test_bad_reconstructions_are_one_sentence(tmp_path, case):
    _, other, _ = exported(tmp_path, exported_formats.write_open_drone_map)
    change, sentence = BAD_RECONSTRUCTIONS[case]
    edited(other / "opensfm/reconstruction.json", change)
    assert sentence in refused(other)


BAD_XML = {
    "truncated": ("</chunk></document>", "", "cannot be read as XML"),
    "no sensor": ('<sensor id="0"', '<sensor id="7"', "lacks sensor 0 of camera"),
    "no focal length": ("<f>82.0</f>", "", "lacks f of sensor unknown"),
    "no calibration": ("calibration", "something", "lacks the calibration of sensor unknown"),
    "sphere": ('type="frame"', 'type="spherical"', "cameras of type spherical"),
    "skew": ("<f>82.0</f>", "<f>82.0</f><b2>9</b2>", "with b2, which moves their corners"),
    "not aligned": ("<transform>", "<was>", "holds no photo with a pose"),
    "scale": ("<scale>3.0<", "<scale>-3<", "says -3 for the scale"),
    "rotation": (
        '<rotation locked="true">',
        '<rotation locked="true">1 ',
        "no rotation of the chunk of 9 finite numbers",
    ),
}


@pytest.mark.parametrize("case", BAD_XML)
def test_bad_xml_is_one_sentence(tmp_path, case):
    _, other, _ = exported(tmp_path, exported_formats.write_metashape)
    before, after, sentence = BAD_XML[case]
    path = other / "cameras.xml"
    text = path.read_text()
    assert before in text
    text = text.replace(before, after)
    path.write_text(text.replace("</transform>", "</was>") if case == "not aligned" else text)
    assert sentence in refused(other)


def test_points_of_another_world_and_several_files_are_named(tmp_path):
    _, other, model = exported(tmp_path, exported_formats.write_metashape)
    exported_formats.write_ply(other / "points of anything.ply", model.points + 1e5, model.points_rgb)
    assert "export the points in local coordinates" in refused(other)
    exported_formats.write_ply(other / "more.ply", model.points, model.points_rgb)
    assert "leave one there, or name it cameras.ply" in refused(other)
    exported_formats.write_ply(other / "cameras.ply", model.points, model.points_rgb)
    assert_same_model(load_sparse_model(other)[0], model)


def test_a_pose_beyond_all_numbers_is_one_sentence(tmp_path):
    _, other, _ = exported(tmp_path, exported_formats.write_metashape, points=False)
    path = other / "cameras.xml"
    path.write_text(path.read_text().replace("<translation>10.0 ", "<translation>1e308 ").replace(">3.0<", ">1e-3<"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "was taken infinitely far away" in refused(other)


BAD_CSV = {
    "no focal length": (",f,", ",focal,", "lacks the columns f"),
    "short line": ("a.png,", "a.png,1,", "has 17 values for photo 'a.png', and 16 columns"),
    "no photo": ("a.png,", "gone.png,", "names photo 'gone.png', which is not in"),
    "long name": ("a.png,", f"{300 * 'a'}.png,", f"names photo '{100 * 'a'}', which is not in"),
    "not a number": ("a.png,", "a.png,x", "for x of photo 'a.png', which is no number"),
    "skew": (",k4,", ",skew,", "gives photo 'a.png' skew = 0.5, a parameter of the lens that is not supported"),
    "aspect": (",k4,", ",aspect,", "gives photo 'a.png' aspect = 0.5, a parameter of the lens that is not supported"),
    "k5": (",k4,", ",k5,", "gives photo 'a.png' k5 = 0.5, a parameter of the lens that is not supported"),
}


@pytest.mark.parametrize("case", BAD_CSV)
def test_bad_csv_is_one_sentence(tmp_path, case):
    _, other, _ = exported(tmp_path, exported_formats.write_reality_capture)
    before, after, sentence = BAD_CSV[case]
    path = other / "parameters.csv"
    assert before in path.read_text()
    lines = path.read_text().replace(before, after).splitlines()
    if before == ",k4,":  # the fourth value from the end
        lines[1:] = [",".join([*line.split(",")[:-3], "0.5", *line.split(",")[-2:]]) for line in lines[1:]]
    path.write_text("\n".join(lines))
    assert sentence in refused(other)


def with_lens(path: Path, *coefficients: float) -> None:
    """Give all photos of a CSV file these k1, k2, k3, k4, t1 and t2."""
    header, *lines = path.read_text().splitlines()
    path.write_text(
        "\n".join([header, *(",".join([*line.split(",")[:-6], *map(str, coefficients)]) for line in lines)])
    )


def test_a_division_lens_is_not_taken_for_another(tmp_path):
    _, other, _ = exported(tmp_path, exported_formats.write_reality_capture)
    with_lens(other / "parameters.csv", -0.1, 0, 0, 0, 0, 0)
    assert "gives photo 'a.png' k1 = -0.1 and no other coefficient, as a division lens has it" in refused(other)
    with_lens(other / "parameters.csv", -0.1, 1e-9, 0, 0, 0, 0)
    assert load_sparse_model(other)[0].camera_params[0, 4] == -0.1
    with_lens(other / "parameters.csv", -1e-3, 0, 0, 0, 0, 0)  # moves nothing by half a pixel, whatever it is
    assert load_sparse_model(other)[0].camera_params[0, 4] == -1e-3


def test_photos_that_exif_turns_are_named_where_the_file_says_no_size(tmp_path):
    lens = ("OPENCV", (81, 81, 47, 33, 0.03, -0.02, 0.004, -0.003))
    _, other, model = exported(tmp_path, exported_formats.write_reality_capture, lens)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(other / "images/a.png").save(other / "images/a.png", exif=exif)
    said: list[str] = []
    assert_same_model(load_sparse_model(other, say=said.append)[0], model)
    assert "EXIF turns 1 photo of parameters.csv for display, such as a.png" in said[1]


def test_longitude_and_latitude_are_no_place_to_train_in(tmp_path):
    _, other, _ = exported(tmp_path, exported_formats.write_reality_capture)
    path = other / "parameters.csv"
    header, *lines = path.read_text().splitlines()
    moved = [line.split(",") for line in lines]
    moved = [[name, str(8.54 + float(x) / 1e5), str(47.37 + float(y) / 1e5), *rest] for name, x, y, *rest in moved]
    path.write_text("\n".join([header, *map(",".join, moved)]))
    assert "look like longitude and latitude" in refused(other)


WRITERS = {
    "nerfstudio": exported_formats.write_nerfstudio,
    "metashape": exported_formats.write_metashape,
    "reality_capture": exported_formats.write_reality_capture,
    "open_drone_map": exported_formats.write_open_drone_map,
}


@pytest.mark.slow
def test_every_format_trains_to_the_same_quality(tmp_path, monkeypatch):
    colmap = tmp_path / "colmap"
    write_city_block(colmap, num_views=8, width=48, height=36, num_points=600)
    quality = {}
    for name, write in {"colmap": None, **WRITERS}.items():
        data_dir = tmp_path / name
        if write is not None:
            data_dir.mkdir()
            shutil.copytree(colmap / "images", data_dir / "images")
            write(load_sparse_model(colmap)[0], data_dir)
        results = tmp_path / f"results_{name}"
        options = ("--max_steps", 300, "--eval_steps", 300, "--refine_start_iter", 10**6)
        train(monkeypatch, simple_trainer, data_dir, results, *options)
        quality[name] = json.loads((results / "stats/val_step300.json").read_text())["psnr"]
    assert quality["colmap"] > 15
    assert quality == pytest.approx(dict.fromkeys(quality, quality["colmap"]), abs=0.02)
