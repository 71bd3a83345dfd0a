"""What may not be read is named in one sentence, and taken for nothing else; nothing goes on without it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import export
import simple_trainer
import view
from datasets import reconstruct
from datasets.masks import find_masks
from errors import Unreadable, telling_unreadable
from tests.interrupted_runs import run_script
from tests.permissions import forbidden
from tests.small_scene import write_scene
from training.checkpoint_folder import CheckpointFolder
from training.checkpoint_writing import save_checkpoint
from training.checkpoints import Checkpoint, load_checkpoint
from training.ply import save_ply

COUNT = 50


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def model() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"means": (3,), "scales": (3,), "quats": (4,), "opacities": (), "sh0": (1, 3), "shN": (15, 3)}
    return {name: torch.rand(COUNT, *shape) for name, shape in shapes.items()}


def checkpoint(path: Path, steps: int = 1) -> Path:
    state = {f"parameters/{name}": value for name, value in model().items()}
    save_checkpoint(path, Checkpoint(steps, np.eye(4), state, sequence=steps))
    return path


def ply(path: Path) -> Path:
    gaussians = model()
    save_ply(path, lambda first, end: {name: value[first:end] for name, value in gaussians.items()}, COUNT, np.eye(4))
    return path


def ends(monkeypatch, main: Callable[[], object], *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.mark.parametrize("in_folder", [False, True])
@pytest.mark.parametrize("write", [checkpoint, ply])
def test_a_model_that_may_not_be_read(monkeypatch, tmp_path, capsys, write, in_folder):
    (tmp_path / "models").mkdir()
    path = write(tmp_path / "models" / ("a.pt" if write is checkpoint else "a.ply"))
    barred = path.parent if in_folder else path
    data_dir = write_scene(tmp_path / "data", 4)
    init = ("--init_ckpt", path, "--max_steps", 1)
    evaluated = ("--ckpt", path)
    monkeypatch.setattr(view, "Page", lambda port, host: type("Closed", (), {"close": lambda self: None})())
    with forbidden(barred):
        codes = [
            ends(monkeypatch, export.main, path, "--to", tmp_path / "b.splat"),
            ends(monkeypatch, view.main, path),
            run_script(monkeypatch, simple_trainer, data_dir, tmp_path / "run", *init),
            *(
                [run_script(monkeypatch, simple_trainer, data_dir, tmp_path / "run", *evaluated)]
                if write is checkpoint
                else []
            ),
        ]
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error: ")]
    assert codes == [2] * len(codes)
    assert errors == [f"Error: {barred} may not be read: change its permissions."] * len(codes)


@pytest.mark.parametrize("barred", ["sparse/0/images.bin", "sparse/0/points3D.bin", "sparse/0", "images", "masks", "."])
def test_a_dataset_that_may_not_be_read(monkeypatch, tmp_path, capsys, barred):
    data_dir = write_scene(tmp_path / "data", 4)
    (data_dir / "masks").mkdir()
    Image.new("L", (96, 64), 255).save(data_dir / "masks/001.png")
    with forbidden(data_dir / barred):
        assert run_script(monkeypatch, simple_trainer, data_dir, tmp_path / "run", "--max_steps", 1) == 2
        error = capsys.readouterr().err
    assert f"Error: {data_dir / barred} may not be read: change its permissions.\n" in error
    assert "Traceback" not in error


def test_masks_that_may_not_be_read_are_not_left_out(tmp_path):
    (tmp_path / "masks/sub").mkdir(parents=True)
    with forbidden(tmp_path / "masks/sub"), pytest.raises(PermissionError):
        find_masks(tmp_path / "masks", ["sub/a.jpg"])


def test_photos_that_may_not_be_read_are_not_none(tmp_path, capsys):
    photos = write_scene(tmp_path / "data", 4) / "images"
    with forbidden(photos), pytest.raises(SystemExit) as stop:
        reconstruct.main([str(photos), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert f"Error: {photos} may not be read: change its permissions." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("barred", ["newest", "folder"])
def test_a_run_does_not_go_on_from_an_older_checkpoint(tmp_path, barred):
    for steps in (4, 8):
        checkpoint(tmp_path / f"ckpt_{steps}.pt", steps)
    said: list[str] = []
    with forbidden(tmp_path / "ckpt_8.pt" if barred == "newest" else tmp_path), pytest.raises(PermissionError):
        CheckpointFolder(tmp_path, keep=1).newest_valid(said.append)
    assert said == []


def test_what_may_not_be_read_is_no_damage(tmp_path):
    path = checkpoint(tmp_path / "a.pt")
    with forbidden(path), pytest.raises(PermissionError):
        load_checkpoint(path)
    with forbidden(path), pytest.raises(Unreadable, match=r"a\.pt may not be read"), telling_unreadable():
        load_checkpoint(path)


def test_what_may_not_be_written_is_not_told_as_unreadable(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(PermissionError), telling_unreadable():  # raised by hand: the file may be read
        raise PermissionError(13, "Permission denied", str(tmp_path / "a"))
    with pytest.raises(PermissionError), telling_unreadable():
        raise PermissionError(13, "Permission denied", str(tmp_path / "new"))
