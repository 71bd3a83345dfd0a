"""Pictures as people have them: masks, formats, large frames, scaled files that are out of date."""

import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from configs import Config
from datasets import images
from datasets.image_files import PictureFault, decode_image, decode_mask, decode_picture
from datasets.images import prepare_images
from datasets.loader import evaluation_loader, training_loader
from datasets.masks import find_masks, scaled_mask
from datasets.ply import read_points
from datasets.scene import Scene, load_scene
from errors import InputError
from tests.small_scene import SIZE, camera, ramp_picture, write_scene
from training.evaluation import evaluate
from training.views import View


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# ------------------------------------------------------------------------------------------ scaled files


def photo(seed: int) -> Image.Image:
    """A picture of 120 x 80 pixels with structure of all sizes."""
    rng = np.random.default_rng(seed)
    layers = [cv2.resize(rng.normal(size=(h, w, 3)), (120, 80)) for h, w in ((3, 4), (8, 12), (20, 30))]
    return Image.fromarray(np.uint8(np.clip(128 + 30 * sum(layers), 0, 255)))


@pytest.fixture
def dataset(tmp_path) -> Path:
    (tmp_path / "data/images").mkdir(parents=True)
    (tmp_path / "data/sparse").mkdir()
    for seed, name in enumerate(NAMES):
        photo(seed).save(tmp_path / "data/images" / name, quality=95)
    return tmp_path / "data"


NAMES = ["a.jpg", "b.png", "c.jpg"]


def scaled(dataset: Path) -> tuple[list[np.ndarray], list[str]]:
    said: list[str] = []
    pictures = prepare_images(dataset, NAMES, data_factor=2, say=said.append)
    return [decode_image(path) for path in pictures.paths], said


def is_of(picture: np.ndarray, seed: int) -> bool:
    expected = np.asarray(photo(seed).resize((60, 40), Image.Resampling.BICUBIC)).astype(int)
    return np.abs(picture - expected).mean() < 4


@pytest.mark.parametrize("age", [-1000, 0, 1000])  # seconds: photos that are put back from a copy are older
def test_photos_that_were_replaced_are_scaled_again(dataset, age):
    scaled(dataset)
    before = (dataset / "images_2/a.jpg").stat().st_mtime_ns
    photo(7).save(dataset / "images/b.png")
    when = (dataset / "images_2/b.png").stat().st_mtime_ns + age * 10**9
    os.utime(dataset / "images/b.png", ns=(when, when))
    (a, b, _), said = scaled(dataset)
    assert is_of(a, 0)
    assert is_of(b, 7)
    assert (dataset / "images_2/a.jpg").stat().st_mtime_ns == before
    assert any("1 of 3 files" in s and "b.png" in s and "scaled again" in s for s in said)
    assert scaled(dataset)[1] == []


def test_replaced_photos_of_another_size_are_scaled_again(dataset):
    scaled(dataset)
    photo(7).resize((90, 60)).save(dataset / "images/b.png")
    assert scaled(dataset)[0][1].shape == (30, 45, 3)


def foreign(dataset: Path, seeds: list[int], resample: Image.Resampling, *, older: bool) -> None:
    """Scaled pictures that came with the dataset."""
    (dataset / "images_2").mkdir()
    for name, seed in zip(NAMES, seeds, strict=True):
        path = dataset / "images_2" / name
        photo(seed).resize((60, 40), resample).save(path, quality=90)
        when = (dataset / "images" / name).stat().st_mtime_ns + (-1 if older else 1) * 10**9
        os.utime(path, ns=(when, when))


def test_scaled_pictures_that_came_along_stay_where_they_show_the_photos(dataset):
    """A copied dataset has files of any age."""
    foreign(dataset, [0, 1, 2], Image.Resampling.LANCZOS, older=True)
    content = [(dataset / "images_2" / name).read_bytes() for name in NAMES]
    assert scaled(dataset)[1] == []
    assert [(dataset / "images_2" / name).read_bytes() for name in NAMES] == content


@pytest.mark.parametrize("older", [True, False])
def test_scaled_pictures_that_came_along_and_are_older_are_compared(dataset, older):
    foreign(dataset, [0, 9, 2], Image.Resampling.LANCZOS, older=older)
    (_, b, _), said = scaled(dataset)
    assert is_of(b, 1 if older else 9)  # a newer one was put there on purpose
    assert any("scaled again" in s for s in said) == older


def test_a_blurred_part_of_a_photo_is_seen(dataset):
    foreign(dataset, [0, 1, 2], Image.Resampling.LANCZOS, older=True)
    picture = np.asarray(photo(1)).copy()
    picture[20:50, 30:70] = cv2.GaussianBlur(picture[20:50, 30:70], (0, 0), 8)
    Image.fromarray(picture).save(dataset / "images/b.png")
    (_, b, _), said = scaled(dataset)
    assert any("1 of 3 files" in s for s in said)
    expected = cv2.resize(picture, (60, 40), interpolation=cv2.INTER_AREA).astype(int)
    assert np.abs(b - expected)[12:24, 17:33].mean() < 2


def test_a_read_only_dataset_with_stale_pictures_uses_the_users_cache(dataset):
    scaled(dataset)
    stale = (dataset / "images_2/b.png").read_bytes()
    photo(7).save(dataset / "images/b.png")
    for folder in (dataset, dataset / "images_2", dataset / "sparse"):
        folder.chmod(0o555)
    assert is_of(scaled(dataset)[0][1], 7)
    assert (dataset / "images_2/b.png").read_bytes() == stale


def test_nothing_is_opened_again_that_was_seen_before(dataset, monkeypatch):
    (dataset / "masks").mkdir()
    for name in NAMES:
        Image.new("L", (120, 80), 255).save(dataset / f"masks/{name}.png")
    prepare_images(dataset, NAMES)
    scaled(dataset)
    opened = []
    monkeypatch.setattr(Image, "open", lambda *arguments, **options: opened.append(arguments))
    prepare_images(dataset, NAMES)
    prepare_images(dataset, NAMES, data_factor=2)
    assert opened == []


# ------------------------------------------------------------------------------------------ masks and alpha


def disc(size: tuple[int, int] = SIZE) -> np.ndarray:
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    return np.hypot(x - size[0] / 2, y - size[1] / 2) < size[1] / 3


def hidden(picture: np.ndarray, seen: np.ndarray, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, picture.shape, np.uint8)
    return np.where(seen[..., None], picture, noise)


LAYOUTS = {
    "alpha": None,
    "COLMAP": lambda name: f"{name}.png",
    "stem": lambda name: name.replace(".png", ".PNG").replace(".PNG", ".png"),
    "subfolder": lambda name: f"{name}.png",
    "alpha and mask": lambda name: f"{name}.png",
}


def with_masks(data_dir: Path, layout: str) -> tuple[Path, np.ndarray]:
    """A scene whose pictures are noise outside of a disc, and the disc."""
    names = [f"{'left/' if layout == 'subfolder' else ''}{k}.png" for k in range(4)]
    write_scene(data_dir, names)
    seen, ramp = disc(), ramp_picture()
    upper = np.arange(SIZE[1])[:, None] < SIZE[1] // 2
    for name in names:
        alpha = {"alpha": seen, "alpha and mask": seen | upper}.get(layout)
        mask = {"alpha": None, "alpha and mask": seen | ~upper}.get(layout, seen)
        layers = [hidden(ramp, seen)] + ([] if alpha is None else [np.uint8(255 * alpha)])
        Image.fromarray(np.dstack(layers)).save(data_dir / "images" / name)
        if mask is not None:
            path = data_dir / "masks" / LAYOUTS[layout](name)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.uint8(255 * mask)).save(path)
    return data_dir, seen


@pytest.mark.parametrize("factor", [1, 2, 3.3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_hidden_pixels_are_masked_at_every_scale(tmp_path, layout, factor):
    data_dir, seen = with_masks(tmp_path, layout)
    said: list[str] = []
    scene = load_scene(data_dir, data_factor=factor, say=said.append)
    assert any("% of all pixels are neither trained nor scored" in s for s in said)
    with evaluation_loader(scene, np.arange(4)) as loader:
        batch = next(loader)
    mask, picture = batch.masks[0].numpy(), batch.images[0].numpy().astype(int)
    assert mask.mean() == pytest.approx(seen.mean(), abs=0.01 if factor == 1 else 0.12)
    if factor == 1:
        np.testing.assert_array_equal(mask, seen)
    # No hidden colour is in what is seen: scaled, it is the ramp without the noise.
    clean = np.asarray(Image.fromarray(ramp_picture()).resize(mask.shape[::-1], Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(picture - clean)[mask].max() <= 2


def test_masks_follow_the_undistortion(tmp_path):
    write_scene(tmp_path, 3, [camera("SIMPLE_RADIAL", (60, 48, 32, -0.15))])
    (tmp_path / "masks").mkdir()
    seen = disc()
    for k in range(3):
        Image.fromarray(hidden(ramp_picture(), seen)).save(tmp_path / f"images/{k:03d}.png")
        Image.fromarray(seen).save(tmp_path / f"masks/{k:03d}.png.png")  # of one bit
    with evaluation_loader(load_scene(tmp_path), np.arange(3)) as loader:
        batch = next(loader)
    made = load_scene(tmp_path).cameras[0]
    clean = made.undistort(ramp_picture()).astype(int)
    mask = batch.masks[0].numpy()
    assert np.abs(batch.images[0].numpy() - clean)[mask].max() <= 1
    sources = made.undistort(np.uint8(255 * seen)[..., None].repeat(3, 2))[..., 0]
    assert mask[sources == 255].mean() > 0.99
    assert not mask[sources < 250].any()


def mask_files() -> dict[str, Image.Image]:
    seen = disc()
    labels = Image.fromarray(np.uint8(seen) * 3).convert("P")
    labels.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 9])
    colors = np.uint8(seen)[..., None] * np.array([0, 0, 9], np.uint8)
    return {
        "0 and 255": Image.fromarray(np.uint8(seen) * 255),
        "0 and 1": Image.fromarray(np.uint8(seen)),
        "one bit": Image.fromarray(seen),
        "labels": labels,
        "colours": Image.fromarray(colors),
        "16 bits": Image.fromarray(np.uint16(seen) * 300),
        "gray and alpha": Image.merge("LA", [Image.fromarray(np.uint8(seen) * 255), Image.new("L", SIZE, 255)]),
    }


@pytest.mark.parametrize("kind", mask_files())
def test_masks_of_every_kind_hide_where_they_are_0(tmp_path, kind):
    mask_files()[kind].save(tmp_path / "a.png")
    np.testing.assert_array_equal(decode_mask(tmp_path / "a.png"), disc())


def test_a_lossy_mask_hides_where_it_is_dark(tmp_path):
    mask_files()["0 and 255"].save(tmp_path / "a.jpg", quality=60)
    assert (decode_mask(tmp_path / "a.jpg") != disc()).mean() < 0.01


def test_names_of_masks(tmp_path):
    for name in ("a.jpg.png", "b.png", "sub/c.jpg", "other.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    said: list[str] = []
    names = ["a.jpg", "b.jpg", "sub/c.jpg", "d.jpg"]
    found = find_masks(tmp_path, names, said.append)
    assert found == {"a.jpg": "a.jpg.png", "b.jpg": "b.png", "sub/c.jpg": "sub/c.jpg"}
    assert "masks of 3 of 4 photos (none of d.jpg, which would be d.jpg.png or d.png)" in said[0]
    assert said[1:] == [f"{tmp_path / 'other.png'} belongs to no photo of the model as its mask."]
    assert find_masks(tmp_path / "nowhere", names) == {}
    said.clear()
    assert find_masks(tmp_path, ["x.jpg"], said.append) == {}
    assert "masks of 0 of 1 photo (" in said[0]  # a folder of which nothing is used
    assert said[1:] == [f"4 files of {tmp_path}, such as a.jpg.png, belong to no photo of the model as its mask."]


def test_masks_may_be_of_another_size_but_not_shape(tmp_path):
    data_dir, seen = with_masks(tmp_path, "COLMAP")
    for path in (tmp_path / "masks").iterdir():
        Image.fromarray(np.uint8(255 * seen)).resize((48, 32), Image.Resampling.NEAREST).save(path)
    scene = load_scene(data_dir)
    with evaluation_loader(scene, np.arange(4)) as loader:
        assert next(loader).masks[0].float().mean().item() == pytest.approx(seen.mean(), abs=0.1)
    Image.new("L", (64, 64), 255).save(tmp_path / "masks/1.png.png")
    with pytest.raises(InputError, match=r"1\.png\.png is 64x64 pixels, .* the shape of its photo 1\.png") as error:
        load_scene(data_dir)
    assert "make the mask of that photo" in str(error.value)
    assert "COLMAP" not in str(error.value)
    with pytest.raises(InputError, match=rf"its photo 1\.png \({SIZE[0]}x{SIZE[1]}\)"):  # as it is stored
        load_scene(data_dir, data_factor=4)


def test_photos_that_are_hidden_entirely_are_left_out(tmp_path):
    data_dir, _ = with_masks(tmp_path, "COLMAP")
    Image.new("L", SIZE, 0).save(tmp_path / "masks/2.png.png")
    said: list[str] = []
    scene = load_scene(data_dir, say=said.append)
    assert scene.train_ids.tolist() == [1, 3]
    assert any("Dataset: 3 of 4 photos" in s for s in said)
    assert any("Warning: 2.png is left out" in s for s in said)
    for k in range(4):
        Image.new("L", SIZE, 0).save(tmp_path / f"masks/{k}.png.png")
    with pytest.raises(InputError, match="hide every pixel of every training picture"):
        load_scene(data_dir)


def test_opaque_alpha_hides_nothing(tmp_path):
    write_scene(tmp_path, 3)
    for k in range(3):
        Image.fromarray(ramp_picture()).convert("RGBA").save(tmp_path / f"images/{k:03d}.png")
    said: list[str] = []
    scene = load_scene(tmp_path, say=said.append)
    assert not any("neither trained" in s for s in said)
    with training_loader(scene, scene.train_ids) as loader:
        assert next(loader).masks is None


def transparent(kind: str) -> Image.Image:
    seen, ramp = disc(), ramp_picture()
    rgba = Image.fromarray(np.dstack([ramp, np.uint8(255 * seen)]))
    if kind == "LA":
        return rgba.convert("LA")
    if kind == "palette":
        indexed = Image.fromarray(np.where(seen, ramp[..., 0] // 2 + 1, 0).astype(np.uint8)).convert("P")
        indexed.putpalette([v for k in range(256) for v in (k, k, k)])
        indexed.info["transparency"] = 0
        return indexed
    if kind == "colour key":
        keyed = Image.fromarray(np.where(seen[..., None], np.maximum(ramp, 1), 0).astype(np.uint8))
        keyed.info["transparency"] = (0, 0, 0)
        return keyed
    return rgba


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "colour key"])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_transparency_of_every_kind_is_seen(tmp_path, kind, suffix):
    if suffix != ".png" and kind in ("palette", "colour key"):
        pytest.skip("these are kinds of PNG")
    picture = transparent(kind)
    options = {"transparency": picture.info["transparency"]} if "transparency" in picture.info else {}
    picture.save(tmp_path / f"a{suffix}", **options, **({"lossless": True} if suffix == ".webp" else {}))
    np.testing.assert_array_equal(decode_picture(tmp_path / f"a{suffix}")[1], disc())


def test_scaled_mask_is_seen_where_no_hidden_pixel_has_a_part():
    rng = np.random.default_rng(0)
    seen = cv2.resize(rng.random((8, 12)), (120, 80)) > 0.4
    for factor in (1.3, 2, 3.7):
        size = (round(120 / factor), round(80 / factor))
        small = scaled_mask(seen, size)
        plain, noisy = (np.where(seen, 100.0, value).astype(np.float32) for value in (100.0, 355.0))
        scaled_plain, scaled_noisy = (
            np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BICUBIC)) for p in (plain, noisy)
        )
        assert np.abs(scaled_noisy - scaled_plain)[small].max() < 0.5
        assert small.mean() > 0.4 * seen.mean()


def test_hidden_pixels_are_not_scored(tmp_path):
    """Whatever a model draws where a photo is hidden, PSNR, SSIM and LPIPS are the same."""
    scene = load_scene(with_masks(tmp_path, "alpha")[0])

    def score(inside: float, outside: float) -> dict[str, object]:
        with evaluation_loader(scene, scene.test_ids) as loader:
            views = [("a", View.from_batch(batch, Config(), torch.device("cpu"))) for batch in loader]
        drawn = (views[0][1].images + inside).clamp(0, 1)
        drawn = torch.where(views[0][1].masks[..., None], drawn, outside)
        return evaluate(
            views[:1], lambda _: drawn, lambda a, b: (a - b).abs().mean(), lambda *_: None, torch.device("cpu")
        )

    exact, off = score(0.0, 0.3), score(0.2, 0.3)
    assert exact["ssim"] == pytest.approx(1, abs=1e-4)  # float32 takes variances for differences of squares
    for other in (score(0.2, 0.9), score(0.2, 0.0)):
        assert {k: other[k] for k in ("psnr", "ssim", "lpips")} == {k: off[k] for k in ("psnr", "ssim", "lpips")}
    # A mean over all windows would count the hidden ones, which are 72 %, as 1.
    whole = score(1.0, 0.5)
    assert whole["ssim"] < 0.5


# ------------------------------------------------------------------------------------------ points


@pytest.mark.parametrize(
    ("kind", "factor"),
    [
        ("ushort", 1),
        ("ushort", 257),
        ("int", 1),
        ("int", 257),
        ("uint", 1),
        ("short", 1),
        ("float", 1),
        ("double", 257),
    ],
)
def test_colours_of_points_are_8_bit_where_they_end_at_255(tmp_path, kind, factor):
    colors = np.array([[255, 0, 7], [1, 128, 254], [200, 30, 3]])
    rows = "".join(f"{k} 0 1 {' '.join(map(str, color * factor))}\n" for k, color in enumerate(colors))
    properties = "".join(f"property float {n}\n" for n in "xyz")
    properties += "".join(f"property {kind} {n}\n" for n in ("red", "green", "blue"))
    (tmp_path / "a.ply").write_text(f"ply\nformat ascii 1.0\nelement vertex 3\n{properties}end_header\n{rows}")
    np.testing.assert_array_equal(read_points(tmp_path / "a.ply")[1], colors)


def test_max_points_takes_a_random_subset_and_says_so(tmp_path):
    write_scene(tmp_path, 4, num_points=1500)
    said: list[str] = []
    scene, whole = load_scene(tmp_path, max_points=1100, say=said.append), load_scene(tmp_path)
    assert any("--max_gaussians 1,100 allows fewer than 1,500 points" in s for s in said)
    np.testing.assert_array_equal(scene.transform, whole.transform)
    rows = {(*xyz, *rgb) for xyz, rgb in zip(whole.points.tolist(), whole.points_rgb.tolist(), strict=True)}
    chosen = {(*xyz, *rgb) for xyz, rgb in zip(scene.points.tolist(), scene.points_rgb.tolist(), strict=True)}
    assert len(chosen) == 1100
    assert chosen < rows
    assert np.abs(scene.points.mean(0) - whole.points.mean(0)).max() < 0.4 * whole.points.std()
    np.testing.assert_array_equal(scene.points, load_scene(tmp_path, max_points=1100).points)
    assert load_scene(tmp_path, max_points=1500).points.shape == whole.points.shape


# ------------------------------------------------------------------------------------------ formats

SAVED_AS = {
    ".ppm": {},
    ".pgm": {},
    ".jp2": {},
    ".webp": {"lossless": True},
    ".bmp": {},
    ".tif": {},
    ".png": {},
    ".heic": {"format": "PNG"},  # the content decides
}


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("suffix", SAVED_AS)
def test_every_format_that_colmap_reads_is_read(tmp_path, suffix, factor):
    names = [f"{k}{suffix}" for k in range(3)]
    write_scene(tmp_path, names, write_pictures=False)
    (tmp_path / "images").mkdir()
    picture = Image.fromarray(ramp_picture()).convert("L" if suffix == ".pgm" else "RGB")
    for name in names:
        picture.save(tmp_path / "images" / name, **SAVED_AS[suffix])
    scene = load_scene(tmp_path, data_factor=factor)
    expected = picture.convert("RGB")
    if factor != 1:
        expected = expected.resize((48, 32), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(decode_image(scene.image_paths[0]), np.asarray(expected))


def tiff_with_thumbnail(path: Path) -> None:
    from PIL import TiffImagePlugin

    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[254] = 1
    Image.fromarray(ramp_picture((48, 32))).save(path, format="TIFF", tiffinfo=tags)


def write_text(content: bytes) -> Callable[[Path], int]:
    return lambda path: path.write_bytes(content)


FAULTS = {
    "float": (
        lambda path: Image.fromarray(np.zeros(SIZE[::-1], np.float32)).save(path, "TIFF"),
        "floating-point",
        "8 or 16",
    ),
    "float colours": (
        lambda path: path.write_bytes(cv2.imencode(".tiff", np.zeros((64, 96, 3), np.float32))[1].tobytes()),
        "floating-point",
        "convert it",
    ),
    "32 bits": (
        lambda path: Image.fromarray(np.full(SIZE[::-1], 1 << 20, np.int32)).save(path, "TIFF"),
        "not of 8 or 16 bits",
        "8 or 16",
    ),
    "16 bits that hold 8": (
        lambda path: Image.fromarray(ramp_picture()[..., 0].astype(np.uint16)).save(path, "PNG"),
        "below 256",
        "8 bits a channel",
    ),
    "16 bits a channel that hold 8": (
        lambda path: path.write_bytes(cv2.imencode(".png", ramp_picture().astype(np.uint16))[1].tobytes()),
        "below 256",
        "8 bits a channel",
    ),
    "16 bits that hold 12": (
        lambda path: Image.fromarray(ramp_picture()[..., 0].astype(np.uint16) * 16).save(path, "PNG"),
        "below 4096",
        "multiply its values by 16",
    ),
    "16 bits a channel that hold 12": (
        lambda path: path.write_bytes(cv2.imencode(".tiff", ramp_picture().astype(np.uint16) * 16)[1].tobytes()),
        "below 4096",
        "multiply its values by 16",
    ),
    "16 bits that hold 14": (
        lambda path: Image.fromarray(ramp_picture()[..., 0].astype(np.uint16) * 64).save(path, "PNG"),
        "below 16384",
        "multiply its values by 4",
    ),
    "HEIC": (write_text(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99)), "a HEIC picture", "convert it to JPEG"),
    "JPEG XL": (write_text(b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(99)), "a JPEG XL picture", "convert it to JPEG"),
    "OpenEXR": (write_text(b"\x76\x2f\x31\x01" + bytes(99)), "an OpenEXR picture", "convert it to JPEG"),
    "empty": (write_text(b""), "it is empty", "whole picture"),
    "zeros": (write_text(bytes(999)), "holds zeros", "whole picture"),
    "Git LFS": (write_text(b"version https://git-lfs.github.com/spec/v1\noid sha256:0"), "Git LFS", "download"),
    "web page": (write_text(b"<!DOCTYPE html><html>404</html>"), "a web page", "download"),
    "noise": (write_text(bytes(range(7, 250)) * 9), "no known format", "whole picture"),
    "thumbnail": (tiff_with_thumbnail, "thumbnail", "the photo alone"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("index", [0, 2])  # a test picture, and a training picture
def test_each_fault_has_its_own_sentence_before_training(tmp_path, fault, index):
    write, cause, remedy = FAULTS[fault]
    write_scene(tmp_path, 5)
    write(tmp_path / f"images/{index:03d}.png")
    for factor in (1, 2):
        with pytest.raises(InputError) as error:
            load_scene(tmp_path, data_factor=factor)
        sentence = str(error.value)
        assert f"{index:03d}.png" in sentence
        assert cause in sentence
        assert remedy in sentence
        assert "\n" not in sentence
        assert ("truncated" in sentence) == (fault == "noise")


def test_raw_photos_are_not_read_as_their_thumbnails(tmp_path):
    write_scene(tmp_path, ["a.png", "b.NEF", "c.png"], write_pictures=False)
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.NEF", "c.png"):
        Image.fromarray(ramp_picture()).save(tmp_path / "images" / name, "TIFF")
    with pytest.raises(InputError, match=r"b\.NEF cannot be decoded, since it is a raw photo: develop it"):
        load_scene(tmp_path)


def test_several_faults_are_told_by_their_causes(tmp_path):
    write_scene(tmp_path, 6)
    for index in (1, 4):
        FAULTS["float"][0](tmp_path / f"images/{index:03d}.png")
    FAULTS["HEIC"][0](tmp_path / "images/003.png")
    with pytest.raises(InputError) as error:
        load_scene(tmp_path)
    assert "001.png, 004.png, since its values are floating-point numbers (save it with" in str(error.value)
    assert "003.png, since it is a HEIC picture (convert it" in str(error.value)


@pytest.mark.parametrize("kind", ["a link to nothing", "no file"])
def test_what_stands_in_a_pictures_place_is_named(tmp_path, kind):
    """A dataset of links was moved: the name is there, and a picture is not."""
    write_scene(tmp_path, 4)
    picture = tmp_path / "images/002.png"
    picture.unlink()
    if kind == "no file":
        picture.mkdir()
    else:
        picture.symlink_to(tmp_path / "elsewhere.png")
    with pytest.raises(InputError, match=rf"What is called 002\.png there is {kind}"):
        load_scene(tmp_path)


def test_a_factor_that_leaves_no_picture_is_named_before_anything_is_scaled(tmp_path):
    write_scene(tmp_path, 4)
    with pytest.raises(InputError, match=r"--data_factor 500 leaves 1x1 pixels of 000\.png"):
        load_scene(tmp_path, data_factor=500)
    assert not (tmp_path / "images_500").exists()


@pytest.mark.parametrize("factor", [1, 2])
def test_pictures_that_an_earlier_version_has_checked_are_checked_by_the_rules_of_this_one(
    tmp_path, monkeypatch, factor
):
    """Scaled ones hold 8 bits and do not tell: their originals are looked at."""
    write_scene(tmp_path, 4)
    FAULTS["16 bits that hold 12"][0](tmp_path / "images/002.png")
    with monkeypatch.context() as earlier:
        earlier.setattr("datasets.images.unscaled_values", lambda highest: ([], []))
        earlier.setattr("datasets.images._RULES", 0)
        load_scene(tmp_path, data_factor=factor)
    with pytest.raises(InputError, match="below 4096"):
        load_scene(tmp_path, data_factor=factor)


def deep_picture(path: Path, highest: int, *, colors: bool) -> None:
    """Write 16 bits a channel that reach a value."""
    ramp = np.uint16(ramp_picture().astype(float) * highest / 255)
    path.write_bytes(cv2.imencode(".png", ramp if colors else ramp[..., 0])[1].tobytes())


@pytest.mark.parametrize("colors", [False, True])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 15, 16])
def test_what_all_photos_of_16_bits_reach_tells_how_many_they_hold(tmp_path, bits, colors):
    """A dark one among them is of the same sensor."""
    write_scene(tmp_path, 4)
    deep_picture(tmp_path / "images/001.png", (1 << bits) - 1, colors=colors)
    deep_picture(tmp_path / "images/002.png", (1 << bits) // 3, colors=colors)
    if bits > 14:
        load_scene(tmp_path)
        return
    for factor in (1, 2):
        with pytest.raises(InputError) as error:
            load_scene(tmp_path, data_factor=factor)
        sentence = str(error.value)
        assert "001.png, 002.png" in sentence
        assert f"below {1 << bits}" in sentence
        assert (f"multiply its values by {1 << (16 - bits)}" in sentence) == (bits > 8)
        assert not (tmp_path / "images_2").exists()


@pytest.mark.parametrize("factor", [1, 2])
def test_a_dark_photo_beside_others_of_16_bits_is_named_and_used(tmp_path, factor):
    write_scene(tmp_path, 4)
    for k, highest in enumerate((65535, 3000, 60000, 50000)):
        deep_picture(tmp_path / f"images/{k:03d}.png", highest, colors=True)
    for _ in range(2):  # looked at, and remembered
        said: list[str] = []
        load_scene(tmp_path, data_factor=factor, say=said.append)
        assert any("001.png is nearly black: of 16 bits only the lower 12 are used" in s for s in said)


def test_scaled_pictures_that_came_along_do_not_hide_how_many_bits_their_photos_hold(tmp_path):
    write_scene(tmp_path, 4)
    deep_picture(tmp_path / "images/001.png", 4095, colors=False)
    (tmp_path / "images_2").mkdir()
    for k in range(4):
        Image.fromarray(ramp_picture((48, 32)) // (16 if k == 1 else 1)).save(tmp_path / f"images_2/{k:03d}.png")
    with pytest.raises(InputError, match=r"001\.png .*below 4096"):
        load_scene(tmp_path, data_factor=2)


def test_names_that_differ_a_little_are_named(tmp_path):
    write_scene(tmp_path, ["a.png", "Fläche.png", "IMG_1.jpg"])
    os.rename(tmp_path / "images/IMG_1.jpg", tmp_path / "images/img_1.JPG")
    with pytest.raises(InputError, match=r"In the place of IMG_1\.jpg there is img_1\.JPG"):
        load_scene(tmp_path)


# ------------------------------------------------------------------------------------------ large frames


def large(tmp_path: Path, *sizes: tuple[int, int]) -> Path:
    """Three gray pictures, of these sizes in turn."""
    cameras = [camera("PINHOLE", (size[0], size[0], size[0] / 2, size[1] / 2), size) for size in sizes]
    write_scene(tmp_path, 3, cameras, write_pictures=False)
    (tmp_path / "images").mkdir()
    for k in range(3):
        Image.new("L", sizes[k % len(sizes)], 90).save(tmp_path / f"images/{k:03d}.png", compress_level=1)
    return tmp_path


@pytest.mark.slow
def test_frames_beyond_pillows_bound_are_scaled(tmp_path):
    """One of 196 million pixels; gray, so that the test takes less memory."""
    data_dir = large(tmp_path, (16200, 12100), (648, 484), (648, 484))
    scene: Scene = load_scene(data_dir, data_factor=64, num_workers=1)
    assert (scene.cameras[0].width, scene.cameras[0].height) == (253, 189)
    assert (decode_image(scene.image_paths[0]) == 90).all()


def test_memory_bounds_the_threads_and_the_frames(tmp_path, monkeypatch):
    data_dir = large(tmp_path, (1620, 1210))
    threads = []
    in_threads = images.in_threads

    def counted(function, items, workers, description):
        threads.append((description.split(":")[0], workers))
        return in_threads(function, items, workers, description)

    monkeypatch.setattr(images, "in_threads", counted)
    monkeypatch.setattr("datasets.image_files.free_bytes", lambda: 100 * 1620 * 1210)
    load_scene(data_dir, data_factor=2, num_workers=16)
    assert dict(threads)["Scaling to images_2"] == 3  # of 32 bytes a pixel
    monkeypatch.setattr("datasets.image_files.free_bytes", lambda: 2 * 1620 * 1210)
    shutil.rmtree(data_dir / "images_2")
    with pytest.raises(InputError, match=r"1620x1210 pixels take .* of memory, and .* are free: free memory"):
        load_scene(data_dir, data_factor=2)


def test_a_header_that_lies_is_refused_by_the_camera(tmp_path):
    write_scene(tmp_path, 3)
    path = tmp_path / "images/001.png"
    content = bytearray(path.read_bytes())
    content[16:24] = (60_000).to_bytes(4, "big") + (59_000).to_bytes(4, "big")

    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"60000x59000 pixels, which is not the shape"):
        load_scene(tmp_path)
    with pytest.raises(PictureFault, match=r"60000x59000 pixels, more than 1,000,000,000"):
        decode_image(path)
