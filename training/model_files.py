"""Which files hold a model that the suite reads: a checkpoint or a 3DGS PLY file, and no file that is for viewers.

All but checkpoints hold Gaussians alone.
"""

from __future__ import annotations

from pathlib import Path

from errors import InputError

OPENED_BY = {  # what opens files that keep less than a model has, by their endings
    ".compressed.ply": "SuperSplat",
    ".spz": "Spark or Babylon.js",
    ".sog": "SuperSplat",
    ".splat": "a web viewer of splats",
    ".html": "a browser",
    "lod-meta.json": "SuperSplat's viewer",
}


def not_held(background: str) -> str:
    """Return what Gaussians were trained before and no file for other programs holds; empty for nothing.

    Args:
        background: As the option.
    """
    return {"sky": "a sky", "white": "white"}.get(background, "")


def check_model_file(path: Path, what: str = "") -> None:
    """Refuse what is no file, or one for viewers, before anything reads it.

    Args:
        path: Of the model.
        what: It is called in sentences, before its name; nothing for the name alone.

    Raises:
        InputError: With the remedy.
    """
    name = f"{what} {path}".strip()
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"{name} {problem}: name a checkpoint (.pt) or a 3DGS PLY file.")
    for ending, program in OPENED_BY.items():
        if path.name.lower().endswith(ending):
            raise InputError(
                f"{name} is a file for viewers, which keeps less than a model has: open it in {program}, or name the "
                "checkpoint or the PLY file that it was made of."
            )
