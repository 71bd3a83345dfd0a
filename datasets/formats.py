"""Finds out which program's poses lie in a dataset that has no COLMAP model, and reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from datasets import metashape, nerfstudio, open_drone_map, reality_capture
from datasets.colmap import SparseModel

# In this order the first that is there is read, after COLMAP.
_READERS: dict[str, tuple[Callable[[Path], list[Path]], Callable[[Path, Path], SparseModel]]] = {
    "nerfstudio": (nerfstudio.find, nerfstudio.read),
    "OpenDroneMap": (open_drone_map.find, open_drone_map.read),
    "Metashape": (metashape.find, metashape.read),
    "RealityScan": (reality_capture.find, reality_capture.read),
}
WHAT_IS_READ = (
    "transforms.json (nerfstudio, Polycam, Record3D), opensfm/reconstruction.json (OpenDroneMap), cameras.xml "
    "(Metashape) or .csv of camera parameters (RealityScan)"
)


@dataclass(frozen=True)
class ProjectFile:
    """Name a file with poses and the program whose format it has."""

    path: Path
    program: str


def project_files(data_dir: Path) -> list[ProjectFile]:
    """Return the files of other programs than COLMAP in a dataset, the one to be read first."""
    return [ProjectFile(path, program) for program, (find, _) in _READERS.items() for path in find(data_dir)]


def read_project(project: ProjectFile, data_dir: Path) -> SparseModel:
    """Read the poses, lenses and points of a file.

    Raises:
        InputError: It cannot be used.
    """
    return _READERS[project.program][1](project.path, data_dir)
