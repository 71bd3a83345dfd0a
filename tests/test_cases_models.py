"""COLMAP models as people have them: several of them, text of other programs, pictures that do not fit."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pycolmap
import pytest
from PIL import Image

from datasets.camera import check_shape, make_camera
from datasets.colmap import load_model, open_model
from datasets.model_choice import load_sparse_model
from datasets.scene import load_scene
from errors import InputError
from tests.small_scene import camera, camera_poses, ramp_picture, write_scene

NAMES = [f"{k}.png" for k in range(6)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def said(data_dir: Path, **options) -> tuple[list[str], list[str]]:
    """Names of the images of the scene that is loaded, and what is said meanwhile."""
    sentences: list[str] = []
    return load_scene(data_dir, say=sentences.append, **options).image_names, sentences


# ------------------------------------------------------------------------------------------ several models


def with_fragment(data_dir: Path, fragment: str = "sparse/0", whole: str = "sparse/1") -> Path:
    write_scene(data_dir, NAMES, model_dir=whole)
    write_scene(data_dir, NAMES[:3], model_dir=fragment, num_points=20, write_pictures=False)
    return data_dir


@pytest.mark.parametrize("whole", ["sparse/1", "sparse/10", "sparse/all", "sparse"])
def test_the_model_of_most_photos_is_used_and_both_are_named(tmp_path, whole):
    with_fragment(tmp_path, whole=whole)
    names, sentences = said(tmp_path)
    assert names == NAMES
    warning = next(s for s in sentences if s.startswith("Warning"))
    assert f"{whole} is used, which holds 6 photos; sparse/0 holds 3" in warning
    assert "--model_dir sparse/0" in warning
    assert any(f"6 of 6 photos, 60 points, from {whole};" in s for s in sentences)
    assert (len(said(tmp_path)[1])) == len(sentences)  # from the caches too


def test_the_model_is_chosen_by_an_option(tmp_path):
    with_fragment(tmp_path)
    names, sentences = said(tmp_path, model_dir="sparse/0")
    assert names == NAMES[:3]
    assert any("Warning" in s and "sparse/1 holds 6, 3 of which it lacks" in s for s in sentences)
    assert any("3 of 6 photos, 20 points, from sparse/0;" in s for s in sentences)
    assert any("3 photos, such as 3.png, are not in the model" in s for s in sentences)
    assert said(tmp_path, model_dir=str(tmp_path / "sparse/1"))[0] == NAMES
    shutil.move(tmp_path / "sparse/1", tmp_path.with_name("elsewhere"))
    assert said(tmp_path, model_dir=str(tmp_path.with_name("elsewhere")))[0] == NAMES
    with pytest.raises(InputError, match=r"--model_dir sparse/7 holds no COLMAP model: .*sparse/0"):
        load_scene(tmp_path, model_dir="sparse/7")


def test_photos_count_and_not_names(tmp_path):
    """A larger model of photos that are not there is not better."""
    write_scene(tmp_path, NAMES[:4])
    write_scene(tmp_path, [f"other {k}.png" for k in range(9)], model_dir="sparse/1", write_pictures=False)
    assert said(tmp_path)[0] == NAMES[:4]


def test_parts_that_were_not_joined_are_named(tmp_path):
    write_scene(tmp_path, NAMES[:4])
    write_scene(tmp_path, NAMES[4:], model_dir="sparse/1")
    names, sentences = said(tmp_path)
    assert names == NAMES[:4]
    assert any(s.startswith("Warning") and "sparse/1 holds 2, 2 of which it lacks" in s for s in sentences)


def test_a_better_model_outside_of_sparse_is_named(tmp_path):
    with_fragment(tmp_path, whole="colmap/sparse/0")
    names, sentences = said(tmp_path)
    assert names == NAMES[:3]
    assert any("Warning" in s and "--model_dir colmap/sparse/0 takes" in s for s in sentences)
    assert said(tmp_path, model_dir="colmap/sparse/0")[0] == NAMES
    shutil.rmtree(tmp_path / "sparse")
    with pytest.raises(InputError, match=r"holds no COLMAP model.*there are models in colmap/sparse/0"):
        load_scene(tmp_path)


def test_a_folder_of_datasets_is_told_from_a_dataset(tmp_path):
    write_scene(tmp_path / "out one", NAMES)
    write_scene(tmp_path / "two", NAMES)
    shutil.rmtree(tmp_path / "two/images")
    with pytest.raises(InputError, match=rf"a dataset lies below it, so give --data_dir '{tmp_path}/out one'\.$"):
        load_scene(tmp_path)
    write_scene(tmp_path / "three", NAMES)
    with pytest.raises(InputError, match=rf"give --data_dir '{tmp_path}/out one' or --data_dir {tmp_path}/three\.$"):
        load_scene(tmp_path)
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match=r"there are models in out one/sparse/0, .*which --model_dir takes"):
        load_scene(tmp_path)


def test_a_sibling_that_cannot_be_read_is_named_and_a_first_one_refused(tmp_path):
    with_fragment(tmp_path, fragment="sparse/1", whole="sparse/0")
    (tmp_path / "sparse/1/points3D.bin").write_bytes(b"x")
    names, sentences = said(tmp_path)
    assert names == NAMES
    assert any("Warning: sparse/1 holds another COLMAP model, which cannot be used" in s for s in sentences)
    shutil.copy(tmp_path / "sparse/1/points3D.bin", tmp_path / "sparse/0/points3D.bin")
    with pytest.raises(InputError, match=r"sparse/0/points3D\.bin is damaged"):
        load_scene(tmp_path)


def test_the_newer_of_text_and_binary_files_is_used(tmp_path):
    write_scene(tmp_path, NAMES)
    pycolmap.Reconstruction(str(tmp_path / "sparse/0")).write_text(str(tmp_path / "sparse/0"))
    images = tmp_path / "sparse/0/images.txt"
    lines = images.read_text().split("\n")
    images.write_text("\n".join(line for line in lines if not line.endswith(" 3.png")))
    for age, path in ((1, images), (2, images.with_suffix(".bin"))):
        later = max(file.stat().st_mtime_ns for file in images.parent.iterdir()) + age * 10**9
        os.utime(path, ns=(later, later))
        names, sentences = said(tmp_path)
        assert names == ([name for name in NAMES if name != "3.png"] if path == images else NAMES)
        older = ".bin" if path == images else ".txt"
        assert any(f"as {path.suffix} and as older {older} files" in s for s in sentences)


@pytest.mark.parametrize("name", ["points3D.txt", "points3D.ply", "images.txt"])
def test_a_newer_part_in_another_format_is_named(tmp_path, name):
    write_scene(tmp_path, NAMES)
    path = tmp_path / "sparse/0" / name
    path.write_text("")
    for seconds, expected in ((10, True), (-10, False)):
        when = path.with_suffix(".bin").stat().st_mtime_ns + seconds * 10**9
        os.utime(path, ns=(when, when))
        assert any(f"sparse/0/{name} is newer than" in s for s in said(tmp_path)[1]) == expected


# ------------------------------------------------------------------------------------------ text of other programs

HARD_NAMES = [
    *("flight plan (1).png", "two  blanks.png", "a/b c/d.png", "Äö 日本.png", "comma, comma.png", 'it\'s "it".png'),
    *("12 13 14.png", "# 1.png", "no suffix"),
]


def forms(text: str) -> dict[str, bytes]:
    """images.txt as other programs write it."""
    without = "".join(line + "\n" for line in text.split("\n") if line.strip())
    observed = "".join(
        line + "\n" + "1.5 2 -1 3 4.25 7\n" * (not line.startswith("#")) for line in without.strip().split("\n")
    )
    mixed = without.split("\n")
    mixed.insert(len(mixed) - 3, "")
    return {
        "as COLMAP": text.encode(),
        "no empty lines": without.encode(),
        "observations": observed.encode(),
        "some empty lines": "\n".join(mixed).encode(),
        "Windows": b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode(),
        "no empty lines, Windows": without.replace("\n", "\r\n").encode(),
        "no last end of line": without.rstrip("\n").encode(),
        "tabs": "\n".join("\t".join(line.split(" ", 9)) for line in text.split("\n")).encode(),
        "more empty lines": text.replace("\n\n", "\n\n\n\n").encode(),
        "other quaternions": "\n".join(
            line if line.startswith("#") or not line else scaled(line) for line in text.split("\n")
        ).encode(),
    }


def scaled(line: str) -> str:
    words = line.split(" ", 9)
    return " ".join([words[0], *(repr(-2 * float(word)) for word in words[1:5]), *words[5:]])


@pytest.mark.parametrize("form", forms("#\n"))
def test_every_form_of_images_txt_gives_all_images(tmp_path, form):
    names = HARD_NAMES
    write_scene(
        tmp_path, names, [camera(), camera("RADIAL", (70, 48, 32, 0.01, 0.02))], text=True, write_pictures=False
    )
    path = tmp_path / "sparse/0/images.txt"
    path.write_bytes(forms(path.read_text())[form])
    model = load_model(tmp_path / "sparse/0", tmp_path)
    assert model.image_names == sorted(names)
    assert not model.remarks
    order = [names.index(name) for name in model.image_names]
    np.testing.assert_allclose(model.worldtocams[:, :3], camera_poses(len(names))[order], atol=1e-9)
    assert [model.camera_models[i] for i in model.camera_indices] == [("PINHOLE", "RADIAL")[i % 2] for i in order]
    assert model.points.shape == (60, 3)


def test_text_and_binary_of_one_model_are_equal(tmp_path):
    write_scene(tmp_path / "a", NAMES, write_pictures=False)
    write_scene(tmp_path / "b", NAMES, write_pictures=False, text=True)
    a, b = (load_model(tmp_path / name / "sparse/0", tmp_path / name) for name in "ab")
    assert a.image_names == b.image_names
    for name in ("worldtocams", "camera_indices", "camera_sizes", "camera_params", "points", "points_rgb"):
        left, right = getattr(a, name), getattr(b, name)
        if name.startswith("points"):  # pycolmap keeps them in the order of a hash table
            left, right = left[np.lexsort(a.points.T)], right[np.lexsort(b.points.T)]
        np.testing.assert_allclose(left, right, atol=1e-12, err_msg=name)


def test_names_in_the_encoding_of_windows_are_read(tmp_path):
    write_scene(tmp_path, ["Brücke.png", "b.png", "c.png"], text=True)
    path = tmp_path / "sparse/0/images.txt"
    path.write_bytes(path.read_text().encode("cp1252"))
    assert load_scene(tmp_path).image_names == ["Brücke.png", "b.png", "c.png"]
    path.write_bytes(b"\xff\xfe" + path.read_bytes())
    with pytest.raises(InputError, match=r"images\.txt is written in UTF-16"):
        load_scene(tmp_path)


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("images", "7 1 0 0 0 0 0 0 1", r"line 15 .* is not IMAGE_ID"),  # a name is missing
        ("images", "7 1 0 0 zero 0 0 0 1 a.png", "line 15 .* is not IMAGE_ID"),
        ("images", "7 1 0 0 0 0 0 0 9 a.png", r"line 15 names the camera 9, which cameras\.txt lacks"),
        ("images", "7 0 0 0 0 0 0 0 1 a.png", "line 15 holds a rotation that is none"),
        ("images", "3 1 0 0 0 0 0 0 1 a.png", "line 15 gives the image 3 again"),
        ("images", "3.5 4.5 6 7", "line 15 .* is not IMAGE_ID"),  # observations of nothing
        ("images", "7 1 0 0 0 0 0 0 1 000.png", "names a picture twice"),
        ("cameras", "2 PINHOLE 96 64 80 82 48", "line 5 gives a camera of the model PINHOLE 3 parameters, which has 4"),
        ("cameras", "2 PINHOLE 96.5 64 80 82 48 32", "line 5 .*whole numbers"),
        ("cameras", "1 PINHOLE 96 64 80 82 48 32", "line 5 gives the camera 1 again"),
        ("points3D", "9 1 2 3 300 0 0 0.5", "holds a colour that is not from 0 to 255"),
        ("points3D", "9 1 2 3 0 0", "is not POINT3D_ID"),
    ],
)
def test_a_line_of_text_that_is_none_is_named(tmp_path, file, line, message):
    write_scene(tmp_path, 5, text=True, write_pictures=False)
    path = tmp_path / f"sparse/0/{file}.txt"
    path.write_text(path.read_text().rstrip("\n") + "\n" * (1 + (file == "images")) + line + "\n")
    with pytest.raises(InputError, match=message) as error:
        load_sparse_model(tmp_path)
    assert "\n" not in str(error.value)


def test_a_file_that_was_cut_short_is_named_every_time(tmp_path):
    write_scene(tmp_path, NAMES, text=True)
    path = tmp_path / "sparse/0/images.txt"
    path.write_text("\n".join(path.read_text().split("\n")[:-7]))
    for _ in range(2):  # the second time from the cache
        names, sentences = said(tmp_path)
        assert names == NAMES[: len(names)]
        assert any(f"holds {len(names)} images, and 6 by its own first lines" in s for s in sentences)


def test_pycolmap_is_not_believed(tmp_path):
    """Where a downloaded model is opened for merging, what comes back is compared with the file."""
    write_scene(tmp_path, ["a b.png", "c.png", "d.png"], text=True, write_pictures=False)
    with pytest.raises(InputError, match=r"images\.txt is written in a way that pycolmap does not read whole"):
        open_model(tmp_path / "sparse/0")


# ------------------------------------------------------------------------------------------ cameras


def fields_of_view(K: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.degrees([2 * np.arctan(side / 2 / focal) for side, focal in zip(size, np.diag(K), strict=False)])


@pytest.mark.parametrize("seed", range(40))
def test_undistorted_pictures_have_about_the_photos_field_of_view(seed):
    """Of ordinary and wide-angle calibrations: what the lens sees at the middle of each side, the picture shows."""
    rng = np.random.default_rng(seed)
    size = (800, 600)
    focal = rng.uniform(320, 1200)
    k1, k2 = rng.uniform(-0.35, 0.3), rng.uniform(-0.02, 0.15)
    params = np.array([focal, focal, 400, 300, k1, k2, 0.003 * rng.normal(), 0.003 * rng.normal()])
    made = make_camera("OPENCV", params, np.array(size), size)
    # The oracle: pycolmap's own undistortion, as far as it has one.
    edges = pycolmap.Camera(model="OPENCV", width=800, height=600, params=params).cam_from_img(
        np.array([[0.0, 300], [800, 300], [400, 0], [400, 600]])
    )
    lens = np.array([edges[1, 0] - edges[0, 0], edges[3, 1] - edges[2, 1]])  # at depth 1
    shown = np.array([800, 600]) / np.diag(made.K)[:2]
    mask = made.valid_mask
    assert mask is None or mask.mean() > 0.99
    assert (shown < 1.02 * lens).all() or np.isnan(lens).any()
    assert (shown > 0.6 * np.array([800, 600]) / focal).all()
    assert (shown < 1.7 * np.array([800, 600]) / focal).all()


def test_a_calibration_on_which_opencv_fails_keeps_its_field_of_view(tmp_path):
    params = (574.704445314, 400.0, 300.0, -0.305757899, 0.00909603)
    scene = load_scene(write_scene(tmp_path, 3, [camera("RADIAL", params, (800, 600))]))
    (made,) = scene.cameras
    before = fields_of_view(np.diag([574.7, 574.7, 1]), (800, 600))
    assert (np.abs(fields_of_view(made.K, (made.width, made.height)) - before) < 20).all()


@pytest.mark.parametrize(
    ("size", "fits"),
    [
        *(((800, 600), True), ((200, 150), True), ((199, 149), True), ((267, 200), True), ((234, 176), True)),
        *(((1600, 1200), True), ((1601, 1201), True), ((13, 10), True), ((800, 607), False), ((800, 593), False)),
        *(((807, 600), False), ((200, 153), False), ((600, 800), False), ((800, 603), False), ((203, 150), False)),
    ],
)
def test_pictures_have_the_shape_of_their_camera(size, fits):
    if fits:
        check_shape(Path("a.png"), size, (800, 600))
    else:
        with pytest.raises(InputError, match=rf"a\.png is {size[0]}x{size[1]} pixels.*\(800x600\)"):
            check_shape(Path("a.png"), size, (800, 600))


@pytest.mark.parametrize("factor", [1, 2])
def test_a_padded_picture_is_refused(tmp_path, factor):
    write_scene(tmp_path, NAMES, [camera(size=(480, 320))])
    Image.fromarray(np.pad(ramp_picture((480, 320)), ((0, 7), (0, 0), (0, 0)))).save(tmp_path / "images/2.png")
    with pytest.raises(InputError, match=r"2\.png is 480x327 pixels, which is not the shape of its camera"):
        load_scene(tmp_path, data_factor=factor)


@pytest.mark.slow
def test_the_option_reaches_the_trainers(tmp_path):
    with_fragment(tmp_path)
    command = [sys.executable, "simple_trainer.py", "default", "--data_dir", str(tmp_path), "--model_dir", "sparse/7"]
    done = subprocess.run(
        [*command, "--result_dir", str(tmp_path / "out"), "--device", "cpu"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "--model_dir sparse/7 holds no COLMAP model" in done.stderr
