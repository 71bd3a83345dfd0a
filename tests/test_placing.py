"""Exports come under their names whole, with the file beside them, and remove what is their own alone."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import export
from errors import InputError
from exports.formats import format_of
from exports.placing import LOCK, UNFINISHED, placing
from tests.data.make_export_golden import random_model
from tests.killed_exports import kill_export
from training.checkpoint_writing import save_checkpoint
from training.checkpoints import Checkpoint


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    """Two checkpoints of the same Gaussians in worlds that lie apart."""
    folder = tmp_path_factory.mktemp("models")
    state = {f"parameters/{name}": value for name, value in random_model(20, seed=0, sh_degree=0).items()}
    for number in range(2):
        transform = np.eye(4)
        transform[:3, 3] = 10 * number
        save_checkpoint(folder / f"{number}.pt", Checkpoint(1, transform, state))
    return [folder / "0.pt", folder / "1.pt"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "every"),
    [("a.ply", 1), ("a/lod-meta.json", 3)]
    + [(name, 7) for name in ("a.compressed.ply", "a.spz", "a.sog", "a.splat", "a.html")],
)
def test_an_export_is_whole_or_not_there_whenever_it_is_killed(name, every, models, tmp_path):
    """Before each change of a file, or some; the next export, of another model, finds its place or refuses it."""
    expected = []
    for number, model in enumerate(models):
        folder = tmp_path / f"whole_{number}"
        folder.mkdir()
        export.export(export.Options(model, folder / name))
        expected.append(contents(folder))
    assert len(expected[0]) >= 2, "there is a file beside"
    was_killed, moment = True, 0
    while was_killed:
        folder = tmp_path / f"killed_{moment}"
        folder.mkdir()
        was_killed = kill_export(export.Options(models[0], folder / name), moment)
        left = contents(folder)
        named = {file: content for file, content in left.items() if UNFINISHED not in file}
        if name in named:
            assert named == expected[0]
            with pytest.raises(InputError, match="is there already"):
                export.export(export.Options(models[1], folder / name))
            assert contents(folder) == expected[0]
        else:
            assert was_killed
            assert named.items() <= expected[0].items()
            export.export(export.Options(models[1], folder / name))
            assert contents(folder) == expected[1]
        assert not list(folder.glob(f"*{UNFINISHED}"))
        moment += every
    assert moment > 10


def test_a_folder_that_no_export_made_stays(models, tmp_path):
    theirs = tmp_path / f"a.spz{UNFINISHED}"
    for path in (theirs, tmp_path / "partial_a.spz", tmp_path / "partial_a"):
        path.mkdir()
        (path / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"a\.spz\.unfinished, where it would be written, is there and was"):
        export.export(export.Options(models[0], tmp_path / "a.spz"))
    assert contents(tmp_path) == before
    export.export(export.Options(models[0], tmp_path / "a/lod-meta.json"))
    assert before.items() <= contents(tmp_path).items()
    link = tmp_path / f"b.spz{UNFINISHED}"
    link.symlink_to(theirs)
    (theirs / LOCK).touch()
    with pytest.raises(InputError, match="was not made by an export"):
        export.export(export.Options(models[0], tmp_path / "b.spz"))
    assert (theirs / "notes.txt").read_text() == "mine"


def test_a_place_to_which_another_export_writes_is_refused(models, tmp_path):
    to = tmp_path / "a.spz"
    with placing(to) as path:
        path.write_bytes(b"half")
        with pytest.raises(InputError, match=r"a\.spz is being written by another export: wait for its end"):
            export.export(export.Options(models[0], to))
        path.write_bytes(b"whole")
    assert contents(tmp_path) == {"a.spz": b"whole"}


@pytest.mark.parametrize("taken", ["a.spz", "a.spz.json"])
def test_what_appears_under_its_name_meanwhile_stays(taken, models, tmp_path, monkeypatch):
    def write(path: Path, gaussians: object) -> None:
        path.write_bytes(b"model")
        (tmp_path / taken).write_text("theirs")

    form = dataclasses.replace(format_of(Path("a.spz")), write=write)
    monkeypatch.setattr(export, "format_of", lambda path: form)
    with pytest.raises(InputError, match=f"{taken} has appeared meanwhile"):
        export.export(export.Options(models[0], tmp_path / "a.spz"))
    assert contents(tmp_path) == {taken: b"theirs"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_export_that_is_stopped_leaves_nothing_and_says_so(number, models, tmp_path, monkeypatch, capsys):
    def write(path: Path, gaussians: object) -> None:
        path.write_bytes(b"half")
        os.kill(os.getpid(), number)

    form = dataclasses.replace(format_of(Path("a.spz")), write=write)
    monkeypatch.setattr(export, "format_of", lambda path: form)
    monkeypatch.setattr(sys, "argv", ["export.py", str(models[0]), "--to", str(tmp_path / "a.spz")])
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        with pytest.raises(SystemExit, match="130"):
            export.main()
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert "Stopped; nothing was written." in capsys.readouterr().err
    assert contents(tmp_path) == {}
    assert not list(tmp_path.iterdir())


def test_a_second_signal_ends_at_once_without_a_traceback():
    program = """
import os, signal
from errors import stopped_by_signals
with stopped_by_signals():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt:
        print("stopped", flush=True)
os.kill(os.getpid(), signal.SIGINT)
print("not ended")
"""
    folder = Path(export.__file__).parent
    ended = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "stopped\n", "")
