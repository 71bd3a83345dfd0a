"""Nothing is written where a dataset is read from, whatever path or link leads there."""

import os
import sys
from pathlib import Path

import pytest

import export
import simple_trainer
from datasets import reconstruct
from datasets.links import link_file, write_whole
from datasets.places import check_outside_datasets
from errors import InputError, reason
from tests.small_scene import write_scene
from tests.test_options import train


def listing(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@pytest.fixture
def scene(tmp_path) -> Path:
    """A dataset whose photos lie elsewhere, behind a link, with a model beside its own."""
    data_dir = write_scene(tmp_path / "garden")
    (data_dir / "images").rename(tmp_path / "photos")
    (data_dir / "images").symlink_to(tmp_path / "photos")
    write_scene(tmp_path / "again", model_dir="colmap/best")
    (tmp_path / "again/colmap").rename(data_dir / "colmap")
    (tmp_path / "link").symlink_to(data_dir / "sparse")
    return data_dir


READ = (
    *("garden/images", "garden/images/2024/run", "garden/images_4/run", "garden/masks", "garden/masks_2.5/run"),
    *("garden/depths", "garden/sparse", "garden/sparse/0", "garden/results/../images/run"),
    *("photos", "photos/run", "link/run", "garden/colmap/best/run", "garden/colmap/best"),
)
FREE = (
    "garden/results",
    "garden/results/images",
    "garden",
    "images",
    "results",
    "garden_images/run",
    "garden/colmap/a",
)


@pytest.mark.parametrize("relative", [True, False])
def test_folders_that_are_read_are_refused(monkeypatch, scene, relative):
    monkeypatch.chdir(scene.parent)
    data_dir, root = (Path("garden"), Path()) if relative else (scene, scene.parent)
    before = listing(scene.parent)
    for name in READ:
        with pytest.raises(InputError, match=r"^--result_dir .* would write into .*: name a place outside of it\.$"):
            check_outside_datasets("--result_dir", root / name, data_dir, "colmap/best")
    for name in FREE:
        check_outside_datasets("--result_dir", root / name, data_dir, "colmap/best")
        check_outside_datasets("--result_dir", root / name, data_dir, ".")  # a model in the dataset's own folder
    assert listing(scene.parent) == before


def test_a_dataset_that_nobody_has_named_is_seen_by_what_lies_in_it(scene):
    for name in ("images/a", "images_4/a", "masks/a", "depths/a", "sparse/0/points.ply"):
        with pytest.raises(InputError, match=f"would write into {scene}"):
            check_outside_datasets("--to", scene / name)
    (scene.parent / "no dataset/images").mkdir(parents=True)
    check_outside_datasets("--to", scene.parent / "no dataset/images/a")


def test_programs_refuse_them_and_write_nothing(monkeypatch, scene, capsys):
    (scene.parent / "more").mkdir()
    model = scene.parent / "model.ply"
    before = listing(scene.parent)
    photos = scene / "images/more"
    assert train(monkeypatch, simple_trainer, "default", "--data_dir", scene, "--result_dir", scene / "images") == 2
    for program, words in (
        (export, (model, "--to", scene / "images/a/lod-meta.json")),
        (export, (model, "--to", scene / "sparse/0/points.ply")),
        (reconstruct, (scene.parent / "more", "--out", photos)),
    ):
        monkeypatch.setattr(sys, "argv", ["program.py", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            program.main()
        assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4
    assert all(" would write into " in line for line in said)
    assert listing(scene.parent) == before


@pytest.mark.parametrize("kind", ["read-only", "file", "broken disk"])
def test_a_place_that_cannot_be_written_is_told_first(monkeypatch, tmp_path, capsys, kind):
    """In words, without numbers of errors, and before anything is read of what would be written there."""
    place, why = tmp_path / "place", "Permission denied"
    if kind == "file":
        place.write_text("")
        why = "Not a directory"
    else:
        place.mkdir(mode=0o500)
    if kind == "broken disk":
        place.chmod(0o700)
        why = "Input/output error"
        make, error = Path.mkdir, OSError(5, why, str(place))

        def refused(self, *arguments, **options):
            if self.parent == place:
                raise error
            make(self, *arguments, **options)

        monkeypatch.setattr(Path, "mkdir", refused)
    monkeypatch.setattr(export, "open_source", lambda path: pytest.fail("read"))
    with pytest.raises(InputError) as told:
        export.export(export.Options(tmp_path / "a.pt", place / "a.sog"))
    if kind == "file":
        assert str(told.value) == f"--to {place}/a.sog: the folder {place} is a file: choose another."
    else:
        assert str(told.value) == f"--to {place}/a.sog cannot be written ({why}): choose another place."
    photos = write_scene(tmp_path / "scene") / "images"
    with pytest.raises(SystemExit):
        reconstruct.main([str(photos), "--out", str(place / "made" if kind == "file" else place)])
    out = place / "made" if kind == "file" else place
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"Error: --out {out} cannot be written ({why}): make it writable, or name another folder."
    )
    assert kind == "file" or not os.listdir(place)


def test_a_file_that_cannot_be_written_is_told_with_a_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    for write in (
        lambda target: link_file(tmp_path / "file", target),
        lambda target: write_whole(target, lambda partial: partial.write_text("")),
    ):
        with pytest.raises(InputError) as told:
            write(tmp_path / "file/folder/a.txt")
        assert "[Errno" not in str(told.value)
        assert str(told.value).startswith(f"{tmp_path}/file/folder/a.txt cannot be written (Not a directory: ")
        assert str(told.value).endswith("): make room there, make it writable, or name another folder.")


def test_a_cause_is_told_without_the_number_of_an_error():
    assert reason(PermissionError(13, "Permission denied", "a.txt")) == "Permission denied: 'a.txt'"
    assert reason(OSError("disk [Errno 5] broken.")) == "disk [Errno 5] broken"
