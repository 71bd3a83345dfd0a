"""Exports: formats read back by readers of their own, placed, cropped and chosen as asked, or refused in a sentence."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.lib.recfunctions import repack_fields
from plyfile import PlyData, PlyElement
from torch import Tensor

import compare
import export
import view
from configs import Config
from errors import InputError
from exports import formats, streamed
from exports.crop import Polygons, read_region
from exports.gaussians import importance
from exports.quantization import Codebook, Palette
from exports.source import open_source
from exports.streamed import merged
from offload.culling.cameras import Cameras
from offload.store.morton import morton_order
from option_words import parse
from tests.data.make_export_golden import COUNT, FILES, FOLDER, READ, random_model
from tests.oracles import splat_formats
from tests.oracles.splat_formats import (
    read_compressed_ply,
    read_elements,
    read_ply,
    read_sog,
    read_splat,
    read_spz,
    turned_over,
)
from training.checkpoint_writing import save_checkpoint
from training.checkpoints import Checkpoint
from training.ply import frame_of_ply, load_ply, save_ply
from training.similarity import moved
from training.starting_model import StartingModel
from training.views import render

READERS = {".compressed.ply": read_compressed_ply, ".spz": read_spz, ".sog": read_sog, ".splat": read_splat}
UPRIGHT = np.array([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
TRANSFORM = np.array([[0, -0.5, 0, 1.0], [0.5, 0, 0, -2.0], [0, 0, 0.5, 3.0], [0, 0, 0, 1]])  # input to model


def write_model(path: Path, gaussians: dict[str, Tensor], transform: np.ndarray = TRANSFORM) -> Path:
    state = {f"parameters/{name}": value for name, value in gaussians.items()}
    save_checkpoint(path, Checkpoint(1, transform, state))
    return path


def run(*arguments: object) -> None:
    export.export(parse(export.Options, words=list(map(str, arguments))))


@pytest.fixture(scope="module")
def model() -> dict[str, Tensor]:
    return random_model(600, seed=1)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "ckpt.pt", model)


def as_numbers(gaussians: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """As the readers of tests/oracles give them."""
    numbers = {name: value.double().numpy() for name, value in gaussians.items()}
    numbers["opacities"] = 1 / (1 + np.exp(-numbers["opacities"]))
    numbers["sh0"] = numbers["sh0"][:, 0]
    return splat_formats.gaussians(**numbers)


def in_file_order(model: dict[str, Tensor]) -> dict[str, Tensor]:
    """Upright, and in Morton order, as formats for viewers hold them."""
    turned = moved(model, UPRIGHT)
    order = morton_order(turned["means"])
    return {name: value[order] for name, value in turned.items()}


def angles(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Angles in radians between rotations [N, 4]."""
    return 2 * np.arccos(np.clip(np.abs((a * b).sum(axis=1)), 0, 1))


# ------------------------------------------------------------------------------------------------------------ formats


@pytest.mark.parametrize("name", FILES)
def test_the_readers_of_these_tests_read_what_another_program_reads(name):
    """Files that export.py wrote, and what splat-transform read of them: of .spz with its axes as they are."""
    (ending,) = (ending for ending in (*READERS, "lod-meta.json") if name.endswith(ending))
    if ending == "lod-meta.json":
        folder = (FOLDER / name).parent
        names = json.loads((FOLDER / name).read_text())["filenames"]
        parts = [read_sog((folder / part).parent) for part in names]
        found = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    else:
        found = READERS[ending](FOLDER / name)
    expected = np.load(READ)
    assert len(found["means"]) == COUNT
    for key in ("means", "scales", "sh0", "shN", "opacities"):
        # float32, and opacities as logits that are kept from infinity
        np.testing.assert_allclose(found[key], expected[f"{name}/{key}"], rtol=2e-5, atol=2e-5, err_msg=key)
    # 1 / 128 and 2 / 255 of a .splat's components are half a step apart; else float32 that is near its rounding at 0
    assert angles(found["quats"], expected[f"{name}/quats"]).max() < (0.02 if ending == ".splat" else 2e-3)


def test_compressed_ply_holds_values_between_the_bounds_of_256(model, checkpoint, tmp_path):
    run(checkpoint, "--to", tmp_path / "a.compressed.ply")
    found, expected = read_compressed_ply(tmp_path / "a.compressed.ply"), as_numbers(in_file_order(model))
    for first in range(0, 600, 256):
        rows = slice(first, first + 256)
        for name in ("means", "scales"):
            steps = np.ptp(expected[name][rows], axis=0) / (2047, 1023, 2047)
            assert (np.abs(found[name] - expected[name])[rows] <= 0.501 * steps + 1e-6).all()
        steps = np.ptp(expected["sh0"][rows], axis=0) / 255
        assert (np.abs(found["sh0"] - expected["sh0"])[rows] <= 0.501 * steps + 1e-6).all()
    assert np.abs(found["opacities"] - expected["opacities"]).max() <= 0.501 / 255
    assert np.abs(found["shN"] - expected["shN"]).max() <= 8 / 256 / 2 + 1e-6
    assert angles(found["quats"], expected["quats"]).max() <= 2 * 3 * 2**0.5 / 1023


@pytest.mark.parametrize("degree", [0, 1, 3])
def test_spz_holds_fixed_point_numbers(degree, model, checkpoint, tmp_path):
    run(checkpoint, "--to", tmp_path / "a.spz", "--sh_degree", degree)
    found, expected = turned_over(read_spz(tmp_path / "a.spz")), as_numbers(in_file_order(model))
    assert np.abs(found["means"] - expected["means"]).max() <= 2.0**-20  # of 24 bits, for a model of this size
    assert np.abs(found["scales"] - expected["scales"]).max() <= 0.501 / 16
    assert np.abs(found["opacities"] - expected["opacities"]).max() <= 0.501 / 255
    assert np.abs(found["sh0"] - expected["sh0"]).max() <= 0.501 / 255 / 0.15
    assert angles(found["quats"], expected["quats"]).max() <= 2 * 3 * 2**0.5 / 1023
    kept = (degree + 1) ** 2 - 1
    assert found["shN"].shape == (600, kept, 3)
    step = np.where(np.arange(kept) < 3, 8, 16)[:, None] / 128
    assert (np.abs(found["shN"] - expected["shN"][:, :kept]) <= step / 2 + 0.51 / 128).all()


def test_spz_gives_a_large_model_the_bits_that_it_needs(model, tmp_path, capsys):
    far = {**model, "means": model["means"] * 10_000}
    run(write_model(tmp_path / "ckpt.pt", far), "--to", tmp_path / "a.spz")
    expected = as_numbers(in_file_order(far))["means"]
    assert np.abs(turned_over(read_spz(tmp_path / "a.spz"))["means"] - expected).max() <= np.abs(expected).max() / 2**22
    (step,) = re.findall(r"keeps positions to (\S+) units here, since a Gaussian lies", capsys.readouterr().out)
    assert np.abs(expected).max() / 2**23 < float(step) <= np.abs(expected).max() / 2**22


@pytest.mark.parametrize(("background", "said"), [("sky", "before a sky"), ("white", "before white"), ("random", "")])
def test_a_background_that_no_format_holds_is_named(background, said, model, tmp_path, capsys):
    state = {f"parameters/{name}": value for name, value in model.items()}
    save_checkpoint(tmp_path / "ckpt.pt", Checkpoint(1, TRANSFORM, state, options={"background": background}))
    run(tmp_path / "ckpt.pt", "--to", tmp_path / "a.splat")
    told = f"It was trained {said}, which no format holds" in capsys.readouterr().out
    assert told == bool(said)


@pytest.mark.parametrize("ending", [".ply", *READERS, ".html", "/lod-meta.json"])
def test_a_ply_of_a_run_is_known_to_have_had_a_sky(ending, model, tmp_path, monkeypatch, capsys):
    (tmp_path / "run/ply").mkdir(parents=True)
    save_ply(tmp_path / "run/ply/a.ply", lambda *at: {k: v[slice(*at)] for k, v in model.items()}, 600, TRANSFORM)
    monkeypatch.chdir(tmp_path / "run/ply")
    cases = {"sky": "max_steps: 9\nbackground: sky\n", "none": "max_steps: 9\n", "damaged": "["}
    for case, options in cases.items():
        (tmp_path / "run/cfg.yml").write_text(options)
        run("a.ply", "--to", f"{tmp_path}/{case}{ending}")
        assert ("It was trained before a sky, which no format holds" in capsys.readouterr().out) == (case == "sky")


@pytest.mark.parametrize("program", [compare, export, view])
def test_of_several_processes_that_do_the_work_of_one_the_first_tells(program, monkeypatch, capsys):
    """Of the first machine and of others, which may have one process each."""
    waiting = []
    monkeypatch.setattr("distributed.mesh.hear_sigterm", lambda: waiting.append(os.environ["RANK"]))
    monkeypatch.setattr("distributed.mesh.TELLS_WITHIN", 0)
    monkeypatch.setattr("sys.argv", [f"{program.__name__}.py"])
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank, local_rank, local_size in (("0", "0", "2"), ("1", "1", "2"), ("2", "0", "1")):
        for name, value in (("RANK", rank), ("LOCAL_RANK", local_rank), ("LOCAL_WORLD_SIZE", local_size)):
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            program.main()
        assert ended.value.code == 2
        assert "as one process: start it without torchrun, which sets WORLD_SIZE=3." in capsys.readouterr().err
    assert waiting == ["1"]


def test_splat_holds_float32_and_bytes(model, checkpoint, tmp_path, capsys):
    run(checkpoint, "--to", tmp_path / "a.splat")
    found, expected = read_splat(tmp_path / "a.splat"), as_numbers(moved(model, UPRIGHT))
    np.testing.assert_allclose(found["means"], expected["means"], rtol=1e-6)
    np.testing.assert_allclose(found["scales"], expected["scales"], atol=1e-5)
    inside = np.abs(expected["sh0"] * splat_formats.C0) < 0.5  # other colours cannot be stored
    assert inside.mean() > 0.9
    assert np.abs(found["sh0"] - expected["sh0"])[inside].max() <= 0.501 / 255 / splat_formats.C0
    assert np.abs(found["opacities"] - expected["opacities"]).max() <= 0.501 / 255
    assert angles(found["quats"], expected["quats"]).max() <= 2 * 2 / 128
    assert "harmonics of degree 0 (of 3)" in capsys.readouterr().out


def test_sog_holds_entries_of_codebooks(model, checkpoint, tmp_path):
    run(checkpoint, "--to", tmp_path / "a.sog")
    found, expected = read_sog(tmp_path / "a.sog"), as_numbers(in_file_order(model))
    steps = np.ptp(np.sign(expected["means"]) * np.log1p(np.abs(expected["means"])), axis=0) / 65535
    assert (np.abs(found["means"] - expected["means"]) <= 0.51 * steps * (1 + np.abs(expected["means"]))).all()
    assert np.abs(found["opacities"] - expected["opacities"]).max() <= 0.501 / 255
    assert angles(found["quats"], expected["quats"]).max() <= 2 * 3 * 2**0.5 / 255
    for name in ("scales", "sh0"):
        entries = np.unique(found[name])
        assert len(entries) <= 256
        nearest = np.abs(expected[name][..., None] - entries).min(axis=-1)
        assert (np.abs(found[name] - expected[name]) <= nearest + 1e-6).all()
    # 600 sets of coefficients fit into the palette, so that their codebook alone counts
    assert np.sqrt(np.mean((found["shN"] - expected["shN"]) ** 2)) < 0.02 * expected["shN"].std()


def test_sog_without_harmonics_has_no_palette(checkpoint, tmp_path):
    run(checkpoint, "--to", tmp_path / "a.sog", "--sh_degree", 0)
    assert read_sog(tmp_path / "a.sog")["shN"].shape == (600, 0, 3)


def test_the_same_model_gives_the_same_files(checkpoint, tmp_path):
    for ending in (".compressed.ply", ".spz", ".sog", ".splat"):
        for name in ("a", "b"):
            run(checkpoint, "--to", tmp_path / (name + ending))
        assert (tmp_path / ("a" + ending)).read_bytes() == (tmp_path / ("b" + ending)).read_bytes()


def test_html_is_one_page_with_the_model_in_it(checkpoint, tmp_path):
    run(checkpoint, "--to", tmp_path / "a <b>.html")
    run(checkpoint, "--to", tmp_path / "a.spz")
    page = (tmp_path / "a <b>.html").read_text()
    assert "<title>a &lt;b&gt;</title>" in page
    (model,) = re.findall(r'base64">([^<]*)<', page)
    assert base64.b64decode(model) == (tmp_path / "a.spz").read_bytes()
    assert "{{" not in page
    assert not re.search(r"""(src|href)\s*=|import\s*\(|fetch\s*\(|url\(""", page)  # nothing is loaded


def test_a_codebook_is_as_good_as_even_steps_and_better_where_values_gather():
    values = np.random.default_rng(0).normal(size=100_000) ** 3
    book = Codebook.fitted(values)
    error = np.abs(book.entries[book.codes(values)] - values)
    assert (error <= np.abs(book.entries[:, None] - values[None, :1000]).min(axis=0).max() + np.ptp(values)).all()
    even = np.ptp(values) / 255 / 12**0.5
    assert np.sqrt(np.mean(error**2)) < 0.5 * even
    assert Codebook.fitted(np.full(5, 2.5)).entries.tolist() == [2.5] * 256


def test_a_palette_is_nearly_as_good_as_looking_through_all_of_it():
    rows = torch.randn(4000, 6, generator=torch.Generator().manual_seed(0))
    palette = Palette(rows, 256)
    assert len(palette.vectors) == 256
    found = (palette.vectors[palette.codes(rows)] - rows).square().sum(dim=1)
    best = torch.cdist(rows, palette.vectors).amin(dim=1).square()
    assert found.mean() < 1.25 * best.mean()
    assert found.mean() < 0.6 * rows.square().sum(dim=1).mean()


# ------------------------------------------------------------------------------------------------- levels of detail


@pytest.fixture
def small_leaves(monkeypatch):
    monkeypatch.setattr(streamed, "LEAF_ROWS", 40)
    monkeypatch.setattr(streamed, "CHUNK_ROWS", 100)
    monkeypatch.setattr(streamed, "COARSEST_ROWS", 50)


def leaves_of(node: dict) -> list[dict]:
    return [leaf for child in node["children"] for leaf in leaves_of(child)] if "children" in node else [node]


def test_streamed_levels_are_those_of_the_specification(small_leaves, model, checkpoint, tmp_path):
    run(checkpoint, "--to", tmp_path / "city/lod-meta.json")
    assert (tmp_path / "city/input.json").is_file()
    index = json.loads((tmp_path / "city/lod-meta.json").read_text())
    assert index["version"] == 1
    assert index["counts"][0] == 600
    assert len(index["counts"]) == index["lodLevels"] == 3
    assert index["count"] == sum(index["counts"])
    chunks = [read_sog((tmp_path / "city" / name).parent) for name in index["filenames"]]
    leaves = leaves_of(index["tree"])
    assert len(leaves) == 16
    for level, total in enumerate(index["counts"]):
        runs = sorted(
            (leaf["lods"][str(level)]["file"], *list(leaf["lods"][str(level)].values())[1:]) for leaf in leaves
        )
        assert sum(count for _, _, count in runs) == total
        ends: dict[int, int] = {}
        for file, offset, count in runs:  # one after the other, without gaps
            assert offset == ends.get(file, 0)
            ends[file] = offset + count
            assert index["filenames"][file].startswith(f"{level}_")
        assert all(len(chunks[file]["means"]) == end for file, end in ends.items())
    for leaf in leaves:
        for lod in leaf["lods"].values():
            rows = slice(lod["offset"], lod["offset"] + lod["count"])
            means = chunks[lod["file"]]["means"][rows]
            assert (means >= np.array(leaf["bound"]["min"]) - 1e-4).all()
            assert (means <= np.array(leaf["bound"]["max"]) + 1e-4).all()

    def check_bounds(node: dict) -> None:
        if "children" in node:
            lows, highs = ([child["bound"][end] for child in node["children"]] for end in ("min", "max"))
            assert len(node["children"]) == 2
            assert node["bound"] == {"min": np.min(lows, axis=0).tolist(), "max": np.max(highs, axis=0).tolist()}
            for child in node["children"]:
                check_bounds(child)

    check_bounds(index["tree"])
    found = np.concatenate(
        [chunk["means"] for chunk, name in zip(chunks, index["filenames"], strict=True) if name[0] == "0"]
    )
    expected = moved(model, UPRIGHT)["means"].numpy()
    assert np.abs(np.sort(found, axis=0) - np.sort(expected, axis=0)).max() < 2e-3  # every Gaussian, once


def test_merged_gaussians_have_the_moments_of_those_they_replace(model):
    found = merged(model)
    assert len(found["means"]) == 150
    rows = {name: value[:4].double().numpy() for name, value in model.items()}
    x, y, z = np.exp(rows["scales"]).T
    weights = (x * y + y * z + z * x) / (1 + np.exp(-rows["opacities"]))
    weights /= weights.sum()
    mean = weights @ rows["means"]
    np.testing.assert_allclose(found["means"][0], mean, rtol=1e-5)
    np.testing.assert_allclose(found["shN"][0], np.tensordot(weights, rows["shN"], 1), rtol=1e-4, atol=1e-6)

    def covariance(quat: np.ndarray, scales: np.ndarray) -> np.ndarray:
        w, x, y, z = quat / np.linalg.norm(quat)
        rotation = np.array(
            [
                [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
            ]
        )
        return rotation @ np.diag(np.exp(2 * scales)) @ rotation.T

    expected = sum(
        weight * (covariance(quat, scales) + np.outer(m - mean, m - mean))
        for weight, quat, scales, m in zip(weights, rows["quats"], rows["scales"], rows["means"], strict=True)
    )
    found_covariance = covariance(found["quats"][0].double().numpy(), found["scales"][0].double().numpy())
    np.testing.assert_allclose(found_covariance, expected, rtol=1e-4, atol=1e-6)


def test_merging_equal_gaussians_changes_their_opacity_alone():
    one = {name: value[:1].repeat(4, *[1] * (value.ndim - 1)) for name, value in random_model(1, seed=2).items()}
    one["opacities"][:] = torch.logit(torch.tensor(0.2))
    found = merged(one)
    assert torch.sigmoid(found["opacities"]).item() == pytest.approx(0.8, abs=1e-5)
    torch.testing.assert_close(found["means"], one["means"][:1])
    torch.testing.assert_close(found["scales"].sort().values, one["scales"][:1].sort().values)


# ---------------------------------------------------------------------------------------------------- where and which


def picture(gaussians: dict[str, Tensor], viewmat: np.ndarray) -> Tensor:
    Ks = torch.tensor([[[40.0, 0, 24], [0, 40, 20], [0, 0, 1]]])
    cameras = Cameras(torch.from_numpy(viewmat).float()[None], Ks, 48, 40)
    return render(gaussians, cameras, Config(), sh_degree=3)[0]


CAMERA = np.array([[1.0, 0, 0, 0.3], [0, 0, -1, 0.2], [0, 1, 0, 6], [0, 0, 0, 1]])  # looks along y of the model, z up


@pytest.mark.parametrize(
    ("options", "move"),
    [
        ((), np.eye(4)),
        (("--up", "y"), UPRIGHT),
        (("--world", "input"), np.linalg.inv(TRANSFORM)),
        (("--world", "input", "--up", "y"), UPRIGHT @ np.linalg.inv(TRANSFORM)),
    ],
)
def test_a_model_in_another_world_draws_what_it_drew(options, move, model, checkpoint, tmp_path):
    """Positions, sizes, rotations and harmonics go together."""
    run(checkpoint, "--to", tmp_path / "a.ply", *options)
    scale = np.cbrt(np.linalg.det(move[:3, :3]))
    camera = CAMERA @ np.linalg.inv(move)
    camera[:3] *= scale  # units of the other world
    before, after = picture(model, CAMERA), picture(load_ply(tmp_path / "a.ply"), camera)
    assert before.std() > 0.1
    assert (before - after).abs().max() < 2e-4  # rounding of float32, and what is cut at 1 / 255


def test_input_coordinates_are_those_of_the_dataset(model, checkpoint, tmp_path):
    run(checkpoint, "--to", tmp_path / "a.ply", "--world", "input")
    found = read_ply(tmp_path / "a.ply")["means"]
    inverse = np.linalg.inv(TRANSFORM)
    expected = model["means"].double().numpy() @ inverse[:3, :3].T + inverse[:3, 3]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    way_back = json.loads((tmp_path / "a.json").read_text())
    np.testing.assert_allclose(way_back["offset"], 0, atol=1e-12)


@pytest.mark.parametrize("ending", [".ply", ".spz"])
def test_the_offset_of_georeferenced_coordinates_is_kept_beside(ending, model, tmp_path):
    """UTM: 500 km east and 5,000 km north, of which float32 keeps half a metre."""
    transform = TRANSFORM.copy()
    transform[:3, 3] = -TRANSFORM[:3, :3] @ (500_000.0, 5_000_000.0, 300.0)
    run(write_model(tmp_path / "ckpt.pt", model, transform), "--to", tmp_path / ("a" + ending), "--world", "input")
    way_back = json.loads((tmp_path / ("a.json" if ending == ".ply" else "a.spz.json")).read_text())
    path = tmp_path / ("a" + ending)
    means = (read_ply(path) if ending == ".ply" else turned_over(read_spz(path)))["means"]
    found = way_back["offset"] + way_back["scale"] * means @ np.array(way_back["rotation"]).T
    inverse = np.linalg.inv(transform)
    expected = model["means"].double().numpy() @ inverse[:3, :3].T + inverse[:3, 3]
    assert np.abs(np.sort(found, axis=0) - np.sort(expected, axis=0)).max() < 1e-4


def test_a_file_that_is_upright_is_not_turned_again(model, checkpoint, tmp_path):
    run(checkpoint, "--to", tmp_path / "y.ply", "--up", "y")
    run(tmp_path / "y.ply", "--to", tmp_path / "again.splat")
    run(checkpoint, "--to", tmp_path / "once.splat")
    assert (tmp_path / "again.splat").read_bytes() == (tmp_path / "once.splat").read_bytes()
    run(tmp_path / "y.ply", "--to", tmp_path / "z.ply", "--up", "z")
    np.testing.assert_allclose(read_ply(tmp_path / "z.ply")["means"], model["means"].numpy(), atol=1e-6)


def test_coordinates_of_the_dataset_are_not_turned_later(checkpoint, tmp_path):
    """Nobody has said what is up there, and the file says so."""
    run(checkpoint, "--to", tmp_path / "input.ply", "--world", "input")
    run(tmp_path / "input.ply", "--to", tmp_path / "again.splat")
    run(checkpoint, "--to", tmp_path / "once.splat", "--world", "input")
    assert (tmp_path / "again.splat").read_bytes() == (tmp_path / "once.splat").read_bytes()
    assert frame_of_ply(tmp_path / "input.ply")[1] is None


@pytest.mark.parametrize("up", [(), ("--up", "z"), ("--up", "y")])
def test_coordinates_of_training_are_not_had_from_those_of_the_dataset(up, checkpoint, tmp_path):
    run(checkpoint, "--to", tmp_path / "input.ply", "--world", "input", *up)
    with pytest.raises(InputError, match="--world normalized wants the coordinates of training"):
        run(tmp_path / "input.ply", "--to", tmp_path / "a.ply", "--world", "normalized")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "in the file's own coordinates, with x right, y forward, z up."),
        (
            ("--world", "normalized", "--up", "y"),
            "in the file's own coordinates, turned to x right, y down, z forward.",
        ),
        (("--world", "input"), "in the dataset's coordinates, with its axes as they are."),
        (("--world", "input", "--up", "z"), "in the dataset's coordinates, of which z is taken for up."),
        (
            ("--world", "input", "--up", "y"),
            "in the dataset's coordinates, of which z is taken for up, turned to y down.",
        ),
    ],
)
def test_what_is_said_of_coordinates_is_what_is_known(options, words, checkpoint, tmp_path, capsys):
    run(checkpoint, "--to", tmp_path / "a.ply", *options)
    assert words in capsys.readouterr().out


@pytest.mark.parametrize("content", ["{}", '{"offset": [0, 0, 0], "scale": 1, "rot'])
def test_a_damaged_file_beside_a_ply_is_told_of(checkpoint, tmp_path, capsys, content):
    for name, options in (("a", ()), ("b", ("--plain",))):
        run(checkpoint, "--to", tmp_path / f"{name}.ply", *options)
        (tmp_path / f"{name}.json").write_text(content)
    capsys.readouterr()
    run(tmp_path / "a.ply", "--to", tmp_path / "again.splat")
    said = capsys.readouterr().out
    assert f"{tmp_path}/a.json is damaged or another program's; the PLY file itself says" in said
    assert (tmp_path / "again.splat.json").is_file()
    if content == "{}":
        run(tmp_path / "b.ply", "--to", tmp_path / "unknown.splat")
        assert (
            f"{tmp_path}/b.json does not say how to come back to the dataset's coordinates" in capsys.readouterr().out
        )
        assert not (tmp_path / "unknown.splat.json").exists()
    else:
        with pytest.raises(InputError, match=r"b\.json beside it does not say how to come back .*: remove that file"):
            run(tmp_path / "b.ply", "--to", tmp_path / "unknown.splat")


def test_a_truncated_ply_is_told_by_its_length(model, tmp_path):
    """Where something lies beside it too, which is not at fault."""
    run(write_model(tmp_path / "ckpt.pt", model), "--to", tmp_path / "whole.ply")
    shutil.copy(tmp_path / "whole.json", tmp_path / "cut.json")
    content = (tmp_path / "whole.ply").read_bytes()
    (tmp_path / "cut.ply").write_bytes(content[: len(content) // 2])
    told = r"cut\.ply cannot be read as a 3DGS PLY file \(its header promises \d+ bytes or more, \d+ follow\)"
    for read in (frame_of_ply, load_ply, StartingModel.load, open_source):
        with pytest.raises(InputError, match=told):
            read(tmp_path / "cut.ply")


def test_another_programs_ply_keeps_its_axes(model, tmp_path):
    run(write_model(tmp_path / "ckpt.pt", model), "--to", tmp_path / "plain.ply", "--plain")
    assert b"comment" not in (tmp_path / "plain.ply").read_bytes()[:2000]
    (tmp_path / "plain.json").unlink()
    run(tmp_path / "plain.ply", "--to", tmp_path / "a.splat")
    np.testing.assert_array_equal(read_splat(tmp_path / "a.splat")["means"], model["means"].numpy())
    assert not (tmp_path / "a.splat.json").exists()
    with pytest.raises(InputError, match="--world input wants coordinates"):
        run(tmp_path / "plain.ply", "--to", tmp_path / "b.splat", "--world", "input")


def test_a_ply_of_training_is_what_it_was(model, tmp_path):
    """Bytes of `save_ply`, which training writes, and of export.py without options."""
    save_ply(tmp_path / "a.ply", lambda a, b: {n: v[a:b] for n, v in model.items()}, 600, TRANSFORM)
    (tmp_path / "exported").mkdir()
    run(write_model(tmp_path / "ckpt.pt", model), "--to", tmp_path / "exported/a.ply")
    assert (tmp_path / "a.ply").read_bytes() == (tmp_path / "exported/a.ply").read_bytes()
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "exported/a.json").read_bytes()


def test_a_box_crops(model, checkpoint, tmp_path, capsys):
    run(checkpoint, "--to", tmp_path / "a.ply", "--crop", -1, -0.5, -0.25, 1, 0.5, 0.25)
    expected = model["means"][(model["means"].abs() <= torch.tensor([1, 0.5, 0.25])).all(dim=1)]
    assert 0 < len(expected) < 600
    np.testing.assert_array_equal(read_ply(tmp_path / "a.ply")["means"], expected.numpy())
    assert f"{len(expected)} of 600 Gaussians lie in the region" in capsys.readouterr().out


def test_a_crop_is_in_the_world_of_the_export_with_z_up(model, checkpoint, tmp_path):
    inverse = np.linalg.inv(TRANSFORM)
    means = model["means"].double().numpy() @ inverse[:3, :3].T + inverse[:3, 3]
    low, high = np.quantile(means, 0.3, axis=0), np.quantile(means, 0.8, axis=0)
    count = int(((means >= low) & (means <= high)).all(axis=1).sum())
    for up in ("y", "z"):
        run(checkpoint, "--to", tmp_path / f"{up}.ply", "--world", "input", "--up", up, "--crop", *low, *high)
        assert len(read_ply(tmp_path / f"{up}.ply")["means"]) == count > 0


GEOJSON = {
    "type": "Feature",
    "geometry": {
        "type": "Polygon",
        "coordinates": [[[-1, -1], [1, -1], [1, 1], [-1, 1], [-1, -1]], [[-0.5, -0.5], [0, -0.5], [0, 0], [-0.5, 0]]],
    },
}


def test_polygons_crop_and_may_have_holes(model, checkpoint, tmp_path):
    (tmp_path / "a.geojson").write_text(json.dumps(GEOJSON))
    run(checkpoint, "--to", tmp_path / "a.ply", "--crop", tmp_path / "a.geojson")
    x, y = model["means"].numpy()[:, 0], model["means"].numpy()[:, 1]
    inside = (np.abs(x) < 1) & (np.abs(y) < 1) & ~((x > -0.5) & (x < 0) & (y > -0.5) & (y < 0))
    np.testing.assert_array_equal(read_ply(tmp_path / "a.ply")["means"], model["means"].numpy()[inside])

    (tmp_path / "a.txt").write_text("0, 0\n2 0\n\n0 2\n")
    triangle = read_region([str(tmp_path / "a.txt")])
    assert isinstance(triangle, Polygons)
    points = np.array([[0.5, 0.5, 9.0], [1.5, 1.5, 0], [-0.1, 0.1, 0], [0.9, 1.0, -9]])
    assert triangle.contains(points).tolist() == [True, False, False, True]


def test_polygons_that_overlap_crop_to_all_of_both(tmp_path):
    left = [[[0, 0], [2, 0], [2, 2], [0, 2], [0, 0]], [[0.2, 0.2], [0.4, 0.2], [0.4, 0.4], [0.2, 0.4]]]
    right = [[[1, 0], [3, 0], [3, 2], [1, 2], [1, 0]]]
    features = [{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": rings}} for rings in (left, right)]
    contents = (
        {"type": "FeatureCollection", "features": features},
        {"type": "MultiPolygon", "coordinates": [left, right]},
    )
    points = np.array([[0.5, 1, 0], [1.5, 1, 0], [2.5, 1, 0], [3.5, 1, 0], [0.3, 0.3, 0]])
    for content in contents:
        (tmp_path / "a.geojson").write_text("\ufeff" + json.dumps(content), encoding="utf-8")
        region = read_region([str(tmp_path / "a.geojson")])
        assert region is not None
        assert region.contains(points).tolist() == [True, True, True, False, False]


def test_the_most_important_stay(model, checkpoint, tmp_path):
    run(checkpoint, "--to", tmp_path / "a.ply", "--max_gaussians", 50)
    weights = (importance(model)).numpy()
    expected = np.sort(np.argsort(-weights)[:50])
    np.testing.assert_array_equal(read_ply(tmp_path / "a.ply")["means"], model["means"].numpy()[expected])


def test_harmonics_are_cut(model, checkpoint, tmp_path):
    run(checkpoint, "--to", tmp_path / "a.ply", "--sh_degree", 1)
    found = read_ply(tmp_path / "a.ply")["shN"]
    np.testing.assert_array_equal(found, model["shN"].numpy()[:, :3])


def test_values_that_are_not_finite_are_left_out(model, tmp_path, capsys):
    broken = {name: value.clone() for name, value in model.items()}
    broken["means"][7, 1], broken["scales"][8, 0], broken["shN"][9, 3, 0] = np.nan, np.inf, np.nan
    run(write_model(tmp_path / "ckpt.pt", broken), "--to", tmp_path / "a.ply")
    found = read_ply(tmp_path / "a.ply")
    assert len(found["means"]) == 598
    assert all(np.isfinite(value).all() for value in found.values())
    assert "2 Gaussians with values that are not finite are left out." in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--to", "a.obj"], r"a\.obj has an ending that no format has: choose \.compressed\.ply, \.spz"),
        (["--to", "a"], "has an ending that no format has"),
        (["--to", "meta.json"], "has an ending that no format has"),
        (["--to", "nowhere/a.ply"], "the folder .*nowhere does not exist"),
        (["--to", "there.spz"], r"--to \S*there\.spz is there already: remove it, or choose another name"),
        (["--to", "folder/lod-meta.json"], r"folder is there already: name a new one, as in \S*folder/garden/lod-meta"),
        (["--to", "levels/lod-meta.json"], "levels is there already: name another folder"),
        (["--to", "another.ply"], r"another\.json, which would come beside it, is there already: move it away"),
        (["--to", "lod-meta.json"], "lod-meta.json names no folder: name one that is made"),
        (["--to", "a.spz", "--plain"], r"--plain is for \.ply"),
        (["--to", "a.ply", "--sh_degree", 4], "--sh_degree is 4, but must be 0 to 3"),
        (["--to", "a.ply", "--max_gaussians", -1], "--max_gaussians is -1"),
        (["--to", "a.ply", "--crop", 1, 2, 3], "--crop 1 2 3 must be six numbers"),
        (["--to", "a.ply", "--crop", 1, 2, 3, "nan", 4, 5], "must be six numbers"),
        (
            ["--to", "a.ply", "--crop", 1, 2, 3, 2, 1.5, 4],
            "highest y, 1.5, is not above its lowest, 2:",
        ),
        (
            ["--to", "a.ply", "--crop", 1, 2, 3, 2, 3, 3],
            "empty box, whose highest z, 3, is not above",
        ),
        (["--to", "a.ply", "--crop", 100, 100, 100, 101, 101, 101], r"--crop leaves none of the 600.*from -.* to "),
        (["--to", "a.ply", "--crop", "nowhere.geojson"], r"nowhere\.geojson cannot be read as a polygon"),
        (["--to", "a.ply", "--crop", "line.txt"], "fewer than three corners"),
        (["--to", "a.ply", "--crop", "point.geojson"], "Point is not a polygon"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(arguments, sentence, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("there.spz").touch()
    Path("folder").mkdir()
    Path("levels").mkdir()
    Path("levels/lod-meta.json").touch()
    Path("another.json").touch()
    Path("line.txt").write_text("0 0\n1 1\n")
    Path("point.geojson").write_text('{"type": "Point", "coordinates": [0, 0]}')
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=sentence) as raised:
        run(checkpoint, *arguments)
    assert "\n" not in str(raised.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("content", [None, b"", b"ply\n", b"ply\nformat binary_little_endian 1.0\nend_header\n"])
def test_a_model_that_cannot_be_read_is_named(content, tmp_path):
    if content is not None:
        (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.pt "):
        run(tmp_path / "a.pt", "--to", tmp_path / "a.spz")


def test_a_folder_is_no_model(tmp_path):
    with pytest.raises(InputError, match=r"is a folder: name a checkpoint"):
        run(tmp_path, "--to", tmp_path / "a.spz")


@pytest.mark.parametrize("ending", [".compressed.ply", ".spz", ".sog", ".splat", ".html", "/lod-meta.json"])
def test_a_file_for_viewers_is_no_model(ending, checkpoint, tmp_path):
    made = tmp_path / f"a{ending}"
    run(checkpoint, "--to", made, "--max_gaussians", 20)
    with pytest.raises(InputError, match=re.escape(f"{made} is a file for viewers, which keeps less than a model has")):
        run(made, "--to", tmp_path / "b.ply")
    if made.suffix == ".ply":
        made = made.rename(tmp_path / "renamed.ply")
        with pytest.raises(
            InputError, match=r"renamed\.ply cannot be read as a 3DGS PLY file \(it is a compressed one"
        ):
            run(made, "--to", tmp_path / "b.ply")


@pytest.mark.parametrize("change", ["types", "order", "ascii", "big-endian", "more", "names"])
def test_a_ply_of_another_program_is_read_or_named(change, model, tmp_path, capsys):
    """Its numbers are the same in another layout; or a property has another name, which the sentence says."""
    save_ply(tmp_path / "a.ply", lambda a, b: {n: v[a:b] for n, v in model.items()}, 600, TRANSFORM)
    vertex = PlyData.read(tmp_path / "a.ply")["vertex"].data
    names = [name for name in vertex.dtype.names if not name.startswith("n")]
    types = dict.fromkeys(names, "f8" if change == "types" else "f4")
    if change == "order":
        names = names[::-1]
    if change == "more":
        types["segment"] = "i4"
        names = ["segment", *names]
    changed = {"opacity": "alpha"} if change == "names" else {}
    theirs = np.zeros(600, [(changed.get(name, name), types[name]) for name in names])
    for name in names:
        if name != "segment":
            theirs[changed.get(name, name)] = vertex[name]
    elements = [PlyElement.describe(theirs, "vertex")]
    if change == "more":
        elements.insert(0, PlyElement.describe(np.zeros(3, [("fx", "f4")]), "camera"))
    path = tmp_path / "theirs.ply"
    PlyData(elements, text=change == "ascii", byte_order=">" if change == "big-endian" else "<").write(path)
    if change == "names":
        with pytest.raises(
            InputError, match=r"theirs\.ply cannot be read as a 3DGS PLY file \(there is no property opacity"
        ):
            run(path, "--to", tmp_path / "b.ply")
        return
    run(path, "--to", tmp_path / "b.ply")
    assert "in the file's own coordinates, with its axes as they are." in capsys.readouterr().out
    found = load_ply(tmp_path / "b.ply")
    for name, value in model.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6 if change == "ascii" else 0, atol=1e-6)


def test_harmonics_that_colours_do_not_share_evenly_are_refused(model, tmp_path):
    save_ply(tmp_path / "a.ply", lambda a, b: {n: v[a:b] for n, v in model.items()}, 600, TRANSFORM)
    vertex = PlyData.read(tmp_path / "a.ply")["vertex"].data
    kept = [name for name in vertex.dtype.names if name not in {f"f_rest_{i}" for i in range(10, 45)}]
    PlyData([PlyElement.describe(repack_fields(vertex[kept]), "vertex")]).write(tmp_path / "b.ply")
    with pytest.raises(InputError, match=r"it has 10 properties f_rest_\*, which are not as many of each colour"):
        run(tmp_path / "b.ply", "--to", tmp_path / "b.spz")
    with pytest.raises(InputError, match="10 properties"):
        load_ply(tmp_path / "b.ply")


def test_a_disk_that_is_too_small_is_named_before_anything_is_written(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 9000, 9000))
    for name in ("a.ply", "a.compressed.ply", "a.spz", "a.sog", "a.splat", "a.html", "a/lod-meta.json"):
        with pytest.raises(InputError, match=r"and 8\.789 KiB are free on its disk"):
            run(checkpoint, "--to", tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_what_a_format_can_take_is_not_less_than_it_takes(checkpoint, tmp_path):
    for form in formats.FORMATS:
        path = tmp_path / ("a" + form.ending if form.ending.startswith(".") else "a/" + form.ending)
        run(checkpoint, "--to", path)
        files = path.parent.rglob("*") if form.ending == streamed.INDEX else [path]
        assert sum(file.stat().st_size for file in files if file.is_file()) <= form.most_bytes(600, 3)


def test_a_page_is_for_small_models(checkpoint, tmp_path, monkeypatch):
    small = [form for form in formats.FORMATS if form.most_gaussians is not None]
    assert [form.ending for form in small] == [".html"]
    monkeypatch.setattr(formats, "FORMATS", (formats.Format(".html", "a page", lambda *_: None, lambda *_: 0, 3, 500),))
    with pytest.raises(
        InputError, match="600 Gaussians, and a page is for at most 500: choose fewer with --max_gaussians"
    ):
        run(checkpoint, "--to", tmp_path / "a.html")


@pytest.mark.parametrize(
    "name", ["a.ply", "a.compressed.ply", "a.spz", "a.sog", "a.splat", "a.html", "a/lod-meta.json"]
)
def test_a_killed_export_leaves_nothing(name, checkpoint, tmp_path, monkeypatch):
    from exports import source

    calls = 0

    def open_source(path: Path) -> source.Source:
        opened = source.open_source(path)

        def parameter(name: str, rows: slice | Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls > 8:  # choosing has read what it needs
                raise KeyboardInterrupt
            return opened.parameter(name, rows)

        return source.Source(**{**vars(opened), "parameter": parameter})

    monkeypatch.setattr(export, "open_source", open_source)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, "--to", tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_the_script_says_a_sentence_and_exits_with_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["export.py", str(tmp_path / "a.pt"), "--to", str(tmp_path / "a.spz")])
    with pytest.raises(SystemExit, match="2"):
        export.main()
    assert capsys.readouterr().err.startswith(f"Error: {tmp_path}/a.pt does not exist")


def test_ply_elements_are_those_that_viewers_know(checkpoint, tmp_path):
    run(checkpoint, "--to", tmp_path / "a.compressed.ply", "--sh_degree", 2)
    elements = read_elements(tmp_path / "a.compressed.ply")
    assert {name: len(rows) for name, rows in elements.items()} == {"chunk": 3, "vertex": 600, "sh": 600}
    assert len(elements["sh"].dtype.names) == 24
