import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from datasets import images
from datasets.cache import user_cache_dir
from datasets.image_files import decode_image
from datasets.images import prepare_images
from errors import InputError
from tests.small_scene import ramp_picture


def prepared(*arguments, **options) -> tuple[list[Path], list[tuple[int, int]]]:
    pictures = prepare_images(*arguments, **options)
    return pictures.paths, pictures.sizes


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def dataset(tmp_path) -> Path:
    """Three smooth random pictures of 150 x 101 pixels: a PNG, a JPEG, and a JPEG in a subfolder."""
    data_dir = tmp_path / "data"
    (data_dir / "images/sub").mkdir(parents=True)
    (data_dir / "sparse").mkdir()
    rng = np.random.default_rng(0)
    for name in NAMES:
        noise = gaussian_filter(rng.normal(size=(101, 150, 3)), (6, 6, 0))
        Image.fromarray(np.uint8(np.clip(128 + 700 * noise, 0, 255))).save(data_dir / "images" / name, quality=98)
    return data_dir


NAMES = ["a.png", "b.JPG", "sub/c.jpg"]


def modes() -> dict[str, tuple[Image.Image, np.ndarray]]:
    """Pictures in each mode and the RGB that they stand for."""
    rgb = ramp_picture((40, 30))
    gray = rgb[..., 0]
    gray_rgb = np.repeat(gray[..., None], 3, axis=2)
    palette = Image.fromarray(rgb).quantize(16)
    return {
        "RGB": (Image.fromarray(rgb), rgb),
        "L": (Image.fromarray(gray), gray_rgb),
        "RGBA": (Image.fromarray(np.dstack([rgb, gray])), rgb),
        "LA": (Image.fromarray(np.dstack([gray, gray[::-1]])), gray_rgb),
        "P": (palette, np.asarray(palette.convert("RGB"))),
        "16 bits": (Image.fromarray(gray.astype(np.uint16) * 257), gray_rgb),
        "1": (Image.fromarray(gray > 100), np.uint8(gray_rgb > 100) * 255),
    }


@pytest.mark.parametrize("mode", modes())
def test_every_mode_becomes_rgb(tmp_path, mode):
    picture, expected = modes()[mode]
    picture.save(tmp_path / "picture.png")
    decoded = decode_image(tmp_path / "picture.png")
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, expected)


def test_exif_orientation_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(ramp_picture((40, 30))).save(tmp_path / "a.jpg", exif=exif)
    assert decode_image(tmp_path / "a.jpg").shape == (30, 40, 3)


@pytest.mark.parametrize(("factor", "suffix", "size"), [(4.0, "4", (38, 25)), (3.4175, "3.4175", (44, 30))])
def test_scaled_pictures(dataset, factor, suffix, size):
    paths, sizes = prepared(dataset, NAMES, data_factor=factor)
    assert paths == [dataset / f"images_{suffix}" / name for name in NAMES]
    assert sizes == [size] * 3
    for name, path in zip(NAMES, paths, strict=True):
        original, scaled = decode_image(dataset / "images" / name).astype(float), decode_image(path).astype(float)
        assert scaled.shape == (size[1], size[0], 3)
        # The oracle: the blurred original, looked at where each scaled pixel has its centre.
        y = (np.arange(size[1]) + 0.5) * 101 / size[1] - 0.5
        x = (np.arange(size[0]) + 0.5) * 150 / size[0] - 0.5
        blurred = gaussian_filter(original, (0.35 * factor, 0.35 * factor, 0))
        at = blurred[np.round(y).astype(int)[:, None], np.round(x).astype(int)]
        assert np.abs(at - scaled)[2:-2, 2:-2].mean() < 3
        with Image.open(path) as picture:
            assert picture.format == ("PNG" if name.endswith("png") else "JPEG")
            if picture.format == "JPEG":
                assert {layer[1:3] for layer in picture.layer} == {(1, 1)}  # 4:4:4


def test_downscaling_does_not_alias(tmp_path):
    (tmp_path / "images").mkdir()
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "images/a.png")
    (path,), _ = prepared(tmp_path, ["a.png"], data_factor=4)
    assert np.abs(decode_image(path)[:, 2:-2].astype(int) - 127).max() < 4


def test_scaled_pictures_are_made_once(dataset, monkeypatch):
    made = []
    scale_image = images._scale_image
    monkeypatch.setattr(images, "_scale_image", lambda *given: made.append(given[1]) or scale_image(*given))
    paths, _ = prepared(dataset, NAMES, data_factor=2)
    assert sorted(made) == sorted(paths)
    made.clear()
    paths[1].unlink()
    prepared(dataset, NAMES, data_factor=2)
    assert made == [paths[1]]


def test_pictures_rounded_another_way_are_taken_as_they_are(dataset):
    (dataset / "images_4/sub").mkdir(parents=True)
    for name in NAMES:
        Image.new("RGB", (37, 26)).save(dataset / "images_4" / name)
    paths, sizes = prepared(dataset, NAMES, data_factor=4)
    assert sizes == [(37, 26)] * 3
    assert not decode_image(paths[0]).any()


def test_pictures_of_another_scale_are_neither_taken_nor_overwritten(dataset):
    (dataset / "images_4").mkdir()
    Image.new("RGB", (75, 50)).save(dataset / "images_4/a.png")
    with pytest.raises(InputError, match=r"a\.png is 75x50 pixels where --data_factor 4 asks for 38x25"):
        prepared(dataset, NAMES, data_factor=4)
    assert decode_image(dataset / "images_4/a.png").shape == (50, 75, 3)


def test_interrupted_scaling_leaves_nothing_half(dataset, monkeypatch):
    """A run that dies while it writes leaves a part-file, which the next run neither takes nor keeps."""

    def dies_half_way(image, path, **options):
        Path(path).write_bytes(b"\xff\xd8 half a picture")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", dies_half_way)
        with pytest.raises(KeyboardInterrupt):
            prepared(dataset, NAMES, data_factor=2)
    folder = dataset / "images_2"
    assert [path.name for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")] == []
    assert list(folder.rglob(".*"))
    (folder / "sub/.gone.jpg.part").parent.mkdir(exist_ok=True)
    (folder / "sub/.gone.jpg.part").write_bytes(b"x")
    paths, _ = prepared(dataset, NAMES, data_factor=2)
    assert list(folder.rglob(".*")) == []
    for path in paths:
        decode_image(path)


def test_truncated_scaled_picture_is_made_again(dataset):
    paths, _ = prepared(dataset, NAMES, data_factor=2)
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole[: len(whole) // 2])
    prepared(dataset, NAMES, data_factor=2)
    assert paths[1].read_bytes() == whole


def test_two_runs_at_once_do_not_disturb_each_other(dataset, monkeypatch):
    made = []
    scale_image = images._scale_image

    def slow_scale_image(source, target, size):
        time.sleep(0.05)
        made.append(target)
        scale_image(source, target, size)

    monkeypatch.setattr(images, "_scale_image", slow_scale_image)
    runs = [threading.Thread(target=prepared, args=(dataset, NAMES), kwargs={"data_factor": 2}) for _ in "ab"]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert sorted(made) == sorted(dataset / "images_2" / name for name in NAMES)


def test_read_only_dataset_uses_the_users_cache(dataset):
    for folder in (dataset, dataset / "images", dataset / "sparse"):
        folder.chmod(0o555)
    paths, sizes = prepared(dataset, NAMES, data_factor=2)
    assert paths[0] == user_cache_dir(dataset) / "images_2/a.png"
    assert sizes == [(75, 50)] * 3
    assert not (dataset / "images_2").exists()
    assert list((dataset / "sparse").iterdir()) == []


def test_complete_scaled_folder_of_a_read_only_dataset_is_used(dataset):
    prepared(dataset, NAMES, data_factor=2)
    for folder in (dataset, dataset / "images_2"):
        folder.chmod(0o555)
    assert prepared(dataset, NAMES, data_factor=2)[0][0] == dataset / "images_2/a.png"


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("keep", [0, 0.02, 0.5, 0.98])
@pytest.mark.parametrize("name", NAMES)
def test_truncated_picture_is_named(dataset, name, keep, factor):
    path = dataset / "images" / name
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(InputError) as error:
        prepared(dataset, NAMES, data_factor=factor)
    assert name in str(error.value)
    assert str(dataset) in str(error.value)
    assert "\n" not in str(error.value)


def test_pictures_are_checked_once_until_they_change(dataset, monkeypatch):
    checked = []
    check = images.checked_picture
    monkeypatch.setattr(images, "checked_picture", lambda path: checked.append(path.name) or check(path))
    prepared(dataset, NAMES)
    assert sorted(checked) == ["a.png", "b.JPG", "c.jpg"]
    checked.clear()
    prepared(dataset, NAMES)
    prepared(dataset, NAMES[:1])
    assert checked == []
    os.utime(dataset / "images/b.JPG", ns=(0, 1))
    assert prepared(dataset, NAMES)[1] == [(150, 101)] * 3
    assert checked == ["b.JPG"]


def test_missing_pictures_are_listed_up_to_ten(dataset):
    absent = [f"x{i:02d}.jpg" for i in range(13)]
    with pytest.raises(InputError, match=r"x00\.jpg.*x09\.jpg and 3 more") as error:
        prepared(dataset, NAMES + absent)
    assert "x10.jpg" not in str(error.value)
    with pytest.raises(InputError) as error:
        prepared(dataset, NAMES + absent[:10])
    assert all(name in str(error.value) for name in absent[:10])
    assert "more" not in str(error.value)


def test_missing_folder_and_bad_factors(dataset, tmp_path):
    with pytest.raises(InputError, match="images does not exist"):
        prepared(tmp_path, NAMES)
    for factor in (0.5, 0, -2, float("nan"), float("inf")):
        with pytest.raises(InputError, match="data_factor"):
            prepared(dataset, NAMES, data_factor=factor)
