"""Depths of photos: from the points that they saw and from maps, and the loss that compares them with rendered ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import simple_trainer
from benchmarks.troubled_city import SIZE, depths_of, write_city
from datasets.colmap import open_model, read_tracks
from datasets.depths import fit, of_points, read_map
from datasets.loader import training_loader
from datasets.model_choice import load_sparse_model
from datasets.scene import Scene, load_scene
from datasets.synthetic import Camera as TrueCamera
from datasets.synthetic import View as TrueView
from datasets.synthetic import build_city
from errors import InputError
from offload.culling.cameras import Cameras
from offload.tiles.boxes import Tile
from rendering.rasterize import rasterize
from tests.exported_formats import write_nerfstudio
from tests.interrupted_runs import run_script
from training.depth_loss import with_depth_loss
from training.views import View

WIDTH, HEIGHT = 64, 48


@pytest.fixture(scope="module")
def mapped_city(tmp_path_factory) -> Path:
    data_dir = tmp_path_factory.mktemp("data") / "city"
    write_city(data_dir, num_views=10, width=WIDTH, height=HEIGHT, num_points=800, depths=True)
    return data_dir


def loaded(data_dir: Path, *, depths: bool = True) -> tuple[Scene, list[str]]:
    """The scene with its depths, and what was said of those."""
    said: list[str] = []
    scene = load_scene(data_dir, depths=depths, say=said.append)
    return scene, [sentence for sentence in said if "depth" in sentence.lower()]


def inverse_of(scene: Scene, image: int) -> np.ndarray:
    return scene.depths.inverse(image, scene.cameras[scene.camera_indices[image]], scene.camtoworlds[image])


def true_inverse(scene: Scene, image: int) -> np.ndarray:
    """By casting rays into the city, in the scene's units."""
    pose = scene.camtoworlds[image]
    unit = np.cbrt(np.linalg.det(scene.transform[:3, :3]))
    back = np.linalg.inv(scene.transform)
    position = back[:3, :3] @ pose[:3, 3] + back[:3, 3]
    rotation = (back[:3, :3] * unit @ pose[:3, :3]).T
    city = build_city(SIZE, np.random.default_rng([0, 0]))
    return 1 / (unit * depths_of(city, TrueCamera(WIDTH, HEIGHT), TrueView(rotation, position)))


def test_depth_images_that_a_file_names_count_as_they_are(mapped_city, tmp_path):
    """Millimetres along the camera's axis, as nerfstudio has them, of a model that says nothing of what photos saw."""
    shutil.copytree(mapped_city / "images", tmp_path / "images")
    path = write_nerfstudio(load_sparse_model(mapped_city)[0], tmp_path)
    meta = json.loads(path.read_text())
    plain, _ = loaded(tmp_path, depths=False)
    (tmp_path / "depth").mkdir()
    for image, frame in enumerate(meta["frames"]):
        unit = np.cbrt(np.linalg.det(plain.transform[:3, :3]))
        millimetres = 1000 / (unit * true_inverse(plain, image))
        frame["depth_file_path"] = f"depth/{image}.npy"  # farther than 16 bits of a PNG reach
        np.save(tmp_path / frame["depth_file_path"], millimetres)
    path.write_text(json.dumps(meta))
    assert loaded(tmp_path, depths=False)[1] == [
        "Depth images that the model names are not used; --depth_loss trains with them."
    ]
    scene, said = loaded(tmp_path)
    assert "from the depth images that the model names for 8, from maps in depths/ for 0 training photos" in said[0]
    shutil.copytree(mapped_city / "depths", tmp_path / "depths")
    assert loaded(tmp_path)[1] == said  # those that are named go first
    del meta["frames"][scene.train_ids[0]]["depth_file_path"]
    path.write_text(json.dumps(meta))
    assert not any("has no map" in sentence for sentence in loaded(tmp_path)[1])  # of a photo that has a named one
    for image in scene.train_ids.tolist():
        np.testing.assert_allclose(inverse_of(scene, image), true_inverse(scene, image), rtol=1e-4)


def test_maps_that_nothing_uses_are_told_of(mapped_city, tmp_path):
    assert loaded(mapped_city, depths=False)[1] == [
        "Depth maps in depths/ are not used; --depth_loss trains with them."
    ]
    assert loaded(mapped_city, depths=None)[1] == []  # nothing is trained
    for folder in ("images", "sparse"):
        shutil.copytree(mapped_city / folder, tmp_path / folder)
    assert loaded(tmp_path, depths=False)[1] == []
    (tmp_path / "depths").mkdir()
    (tmp_path / "depths/README.txt").touch()
    assert loaded(tmp_path, depths=False)[1] == []


@pytest.mark.slow
def test_a_run_without_depth_loss_says_what_would_use_the_maps(monkeypatch, mapped_city, tmp_path, capsys):
    sentence = "Depth maps in depths/ are not used; --depth_loss trains with them."
    for more, times in (((), 1), (("--ckpt", tmp_path / "ckpts/ckpt_1.pt"), 0)):
        run_script(monkeypatch, simple_trainer, mapped_city, tmp_path, "--max_steps", 1, "--eval_steps", 9, *more)
        assert capsys.readouterr().out.count(sentence) == times


def test_maps_are_fitted_to_what_the_photos_saw(mapped_city):
    scene, said = loaded(mapped_city)
    assert said == [
        "--depth_loss: depths come from maps in depths/ for 8 training photos, and from the points that it saw for 0."
    ]
    for image in scene.train_ids.tolist():
        relative = inverse_of(scene, image) / true_inverse(scene, image)
        assert abs(np.median(relative) - 1) < 0.02  # the points are off by 0.15 m, of 60
        assert (abs(relative - 1) < 0.05).all()


def test_points_lie_where_the_photos_saw_them(mapped_city, tmp_path):
    data_dir = shutil.copytree(mapped_city, tmp_path / "city")
    shutil.rmtree(data_dir / "depths")
    scene, said = loaded(data_dir)
    assert "for 0 training photos, and from the points that it saw for 8" in said[0]
    image = int(scene.train_ids[0])
    inverse, true = inverse_of(scene, image), true_inverse(scene, image)
    at = inverse > 0
    assert at.sum() > 50
    assert abs(np.median(inverse[at] / true[at]) - 1) < 0.01
    with training_loader(scene, scene.train_ids, num_workers=1) as loader:
        batch = next(loader)
    expected = inverse_of(scene, int(batch.image_ids[0]))
    assert torch.equal(batch.inverse_depths[0], torch.from_numpy(expected))


def test_tracks_of_text_and_binary_models_are_the_same(mapped_city, tmp_path):
    shutil.copytree(mapped_city / "sparse/0", tmp_path / "0")
    binary = read_tracks(tmp_path / "0")
    reconstruction = open_model(tmp_path / "0")
    for path in (tmp_path / "0").iterdir():
        path.unlink()
    reconstruction.write_text(str(tmp_path / "0"))
    text = read_tracks(tmp_path / "0")
    assert binary.keys() == text.keys()
    for image in reconstruction.images.values():
        assert len(binary[image.name]) == image.num_points3D > 50
        np.testing.assert_allclose(text[image.name], binary[image.name], rtol=1e-12)


def test_the_nearest_of_points_at_one_pixel_counts(mapped_city):
    scene, _ = loaded(mapped_city)
    camera = scene.cameras[0]
    along = np.linalg.inv(camera.K) @ [10.5, 7.5, 1]
    points = np.stack([3 * along, 2 * along, 5 * along, -2 * along])
    inverse = of_points(points, camera, np.eye(4))
    assert inverse[7, 10] == pytest.approx(0.5)
    assert (inverse > 0).sum() == 1


def test_outliers_hardly_change_a_fit():
    rng = np.random.default_rng(0)
    values = rng.uniform(1, 2, (20, 30))
    inverse = 0.3 * values + 0.1
    inverse[rng.random(inverse.shape) < 0.5] = 0  # no points there
    known = rng.random(inverse.shape) < 0.9
    scale, shift = fit(values, known, inverse)
    assert (scale, shift) == (pytest.approx(0.3), pytest.approx(0.1))
    inverse[4, 5] = 40.0
    scale, shift = fit(values, known | True, inverse)
    assert abs(scale * 1.5 + shift - 0.55) < 0.01
    assert fit(-values, known, inverse) is None  # depths, and not one over them
    assert fit(np.ones_like(values), known, inverse) is None
    assert fit(values, np.zeros_like(known), inverse) is None


def test_what_cannot_be_used_is_said(mapped_city, tmp_path):
    data_dir = shutil.copytree(mapped_city, tmp_path / "city")
    scene, _ = loaded(data_dir)
    first, second, third, fourth = (f"{scene.image_names[image][:-4]}.npy" for image in scene.train_ids[:4])
    maps = data_dir / "depths"
    (maps / first).unlink()
    np.save(maps / second, np.zeros((HEIGHT, WIDTH), np.float32))
    np.save(maps / third, 1 / np.load(maps / third))  # depths, and not one over them
    # A map of 16 bits and half the size, with a hole.
    small = cv2.resize(np.load(maps / fourth), (WIDTH // 2, HEIGHT // 2), interpolation=cv2.INTER_AREA)
    small[:5] = 0
    (maps / fourth).unlink()
    assert cv2.imwrite(str(maps / f"{fourth[:-4]}.png"), np.round(60000 * small / small.max()).astype(np.uint16))
    scene, said = loaded(data_dir)
    assert "maps in depths/ for 5 training photos, and from the points that it saw for 3" in said[0]
    assert f"depths/ has no map of {first[:-4]}.png: the points" in said[1]
    assert f"depths/{second}, depths/{third} cannot be fitted" in said[2]
    image = int(scene.train_ids[3])
    inverse, true = inverse_of(scene, image), true_inverse(scene, image)
    assert (inverse[:9] == 0).all()
    assert (inverse[12:] > 0).all()
    assert abs(np.median(inverse[12:] / true[12:]) - 1) < 0.02


@pytest.mark.parametrize("by", ["mask", "alpha"])
def test_what_is_hidden_does_not_say_how_a_map_is_fitted(mapped_city, tmp_path, by):
    """As where somebody walks by, who is not in the points: the map is as if it were not known there."""
    fits = []
    for hidden in ("nothing", "something else"):
        data_dir = shutil.copytree(mapped_city, tmp_path / hidden)
        picture = cv2.imread(str(data_dir / "images" / "001.png"))
        seen = np.full((HEIGHT, WIDTH), 255, np.uint8)
        seen[:, : 3 * WIDTH // 4] = 0
        if by == "mask":
            (data_dir / "masks").mkdir()
            assert cv2.imwrite(str(data_dir / "masks" / "001.png"), seen)
        else:
            assert cv2.imwrite(str(data_dir / "images" / "001.png"), np.dstack([picture, seen]))
        values = np.load(data_dir / "depths" / "001.npy")
        values[seen == 0] = 0 if hidden == "nothing" else -values[seen == 0]
        np.save(data_dir / "depths" / "001.npy", values)
        scene, _ = loaded(data_dir)
        fits.append(scene.depths.fits[scene.image_names.index("001.png")])
    assert fits[0] == fits[1]


def test_maps_that_bear_other_names_than_photos_are_not_passed_over_in_silence(mapped_city, tmp_path):
    data_dir = shutil.copytree(mapped_city, tmp_path / "city")
    for path in (data_dir / "depths").iterdir():
        path.rename(path.with_name(f"depth_{path.name}"))
    _, said = loaded(data_dir)
    assert "maps in depths/ for 0 training photos" in said[0]
    assert "depths/ has no map of 001.png, 002.png, 003.png and 5 more" in said[1]
    assert "That of 001.png would be depths/001.npy or depths/001.png." in said[1]
    shutil.rmtree(data_dir / "depths")
    assert len(loaded(data_dir)[1]) == 1


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (np.ones((HEIGHT, HEIGHT)), "is 48x48, which is not the shape of its photo (64x48)"),
        (np.ones((HEIGHT, WIDTH, 3)), "is no depth map, which has one channel of numbers"),
        (np.array(["a"]), "is no depth map"),
        (np.array([object()]), "cannot be read as a depth map"),
    ],
)
def test_a_map_that_is_none_is_refused(monkeypatch, mapped_city, tmp_path, capsys, values, sentence):
    data_dir = shutil.copytree(mapped_city, tmp_path / "city")
    np.save(data_dir / "depths" / "001.npy", values, allow_pickle=True)
    assert run_script(monkeypatch, simple_trainer, data_dir, tmp_path / "run", "--depth_loss") == 2
    error = capsys.readouterr().err
    assert str(data_dir / "depths" / "001.npy") in error
    assert sentence in error


def test_a_damaged_picture_is_no_map(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"a\.png is no depth map"):
        read_map(tmp_path / "a.png")


def test_a_model_without_tracks_has_no_depths(mapped_city, tmp_path):
    data_dir = shutil.copytree(mapped_city, tmp_path / "city")
    reconstruction = open_model(data_dir / "sparse/0")
    for path in (data_dir / "sparse/0").iterdir():
        path.unlink()
    reconstruction.write_text(str(data_dir / "sparse/0"))
    images = data_dir / "sparse/0/images.txt"
    lines = [line for line in images.read_text().splitlines() if not line.startswith("#")]
    images.write_text("\n".join("" if number % 2 else line for number, line in enumerate(lines)) + "\n")
    with pytest.raises(InputError, match="--depth_loss finds no depths"):
        loaded(data_dir)


# ---------------------------------------------------------------------------------------------------------- the loss


def random_view(dtype: torch.dtype = torch.float32) -> tuple[View, torch.Tensor]:
    """Two photos with depths at some pixels and masks, and rendered depths of them, some 0."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 40, 50)
    depths = torch.rand(shape, generator=generator, dtype=dtype) + 0.5
    depths[torch.rand(shape, generator=generator) < 0.1] = 0
    inverse = torch.rand(shape, generator=generator, dtype=dtype) * (torch.rand(shape, generator=generator) < 0.4)
    masks = torch.rand(shape, generator=generator) < 0.8
    cameras = Cameras(torch.eye(4).repeat(2, 1, 1), torch.eye(3).repeat(2, 1, 1), 50, 40)
    return View(torch.zeros(*shape, 3), cameras, masks, None, inverse), depths


def test_the_loss_is_the_mean_difference_of_inverse_depths():
    view, depths = random_view()
    differences = [
        abs((1 / d if d > 0 else 0) - wanted)
        for d, wanted, seen in zip(
            *(t.flatten().tolist() for t in (depths, view.inverse_depths, view.masks)), strict=True
        )
        if wanted > 0 and seen
    ]
    loss = with_depth_loss(torch.tensor(2.0), {"expected_depths": depths}, view, 0.3)
    assert loss.item() == pytest.approx(2 + 0.3 * sum(differences) / len(differences), rel=1e-5)


@pytest.mark.parametrize("halo", [0, 5, 10])
def test_shares_of_tiles_add_up(halo):
    view, depths = random_view()
    whole = depths.clone().requires_grad_()
    expected = with_depth_loss(torch.zeros(()), {"expected_depths": whole}, view, 0.3)
    expected.backward()
    leaf, total = depths.clone().requires_grad_(), 0.0
    for camera in range(2):
        for x, width in ((0, 16), (16, 34)):
            for y, height in ((0, 32), (32, 8)):
                tile = Tile(camera, x, y, width, height)
                padded = tile.with_halo(halo, 50, 40)
                drawn = leaf[
                    camera : camera + 1, padded.y : padded.y + padded.height, padded.x : padded.x + padded.width
                ]
                total += with_depth_loss(torch.zeros(()), {"expected_depths": drawn}, view, 0.3, tile, halo)
    total.backward()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(leaf.grad, whole.grad)


def test_gradients_reach_gaussians():
    """Of the loss by everything that places a Gaussian, against differences in float64."""
    generator = torch.Generator().manual_seed(1)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    means = torch.cat([rand(8, 2) - 0.5, 2 + rand(8, 1)], dim=1)
    leaves = [means, rand(8, 4), 0.1 + 0.1 * rand(8, 3), 0.3 + 0.4 * rand(8)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    K = torch.tensor([[20.0, 0, 10], [0, 20, 8], [0, 0, 1]], dtype=torch.float64)[None]
    wanted = 0.1 + 0.1 * rand(1, 16, 20)  # farther than all Gaussians, so that no difference changes its sign
    view = View(torch.zeros(1, 16, 20, 3), Cameras(torch.eye(4)[None], K.float(), 20, 16), None, None, wanted)

    def loss(*leaves: torch.Tensor) -> torch.Tensor:
        rendered, _, _ = rasterize(
            *leaves, torch.zeros(8, 3, dtype=torch.float64), torch.eye(4, dtype=torch.float64)[None], K, 20, 16,
            render_mode="RGB+ED", eps2d=3.0,
        )  # fmt: skip
        return with_depth_loss(torch.zeros((), dtype=torch.float64), {"expected_depths": rendered[..., 3]}, view, 1.0)

    loss(*leaves).backward()
    for leaf in leaves:
        direction = rand(*leaf.shape) - 0.5
        step = 1e-6
        values = [
            loss(*(other + sign * step * direction if other is leaf else other for other in leaves)) for sign in (1, -1)
        ]
        difference = ((values[0] - values[1]) / (2 * step)).item()
        assert (leaf.grad * direction).sum().item() == pytest.approx(difference, rel=1e-4, abs=1e-7)
