"""Makes a dataset that trains of a folder of photos, or of a video, with COLMAP's own steps.

    python -m datasets.reconstruct PHOTOS --out data/scene
    python -m datasets.reconstruct --video FILE --fps 2 --out data/scene

OUT receives images/ (links where the file system can), sparse/0 and, for what is computed on the way, reconstruction/.
The same command goes on where it was interrupted. With other options it makes the model anew and keeps the one before;
what they leave out stays as it was.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pycolmap

from datasets.cache import is_writable
from datasets.georeference import LocalFrame
from datasets.likely_pairs import NUM_FEATURES, NUM_PARTNERS
from datasets.links import write_whole
from datasets.model_choice import Say
from datasets.paths import photo_names
from datasets.photo_source import FPS, Source
from datasets.photogrammetry import (
    LOG,
    MATCHINGS,
    MOST_EXHAUSTIVE,
    Photo,
    check_vocab_tree,
    choose_matching,
    extract_features,
    find_likely_pairs,
    import_photos,
    log_to,
    make_models,
    match,
    read_models,
    read_photos,
)
from datasets.places import check_outside_datasets
from datasets.published_models import publish
from datasets.reconstruction_report import no_model, report
from errors import InputError, reason, refusing, stopped_by_signals
from option_words import Parser, named_path

WORK = "reconstruction"  # the folder in OUT of what is computed on the way
LEFT_OUT = "not_registered.txt"  # in that


def main(arguments: list[str] | None = None) -> None:
    """Reconstruct, and exit: 0 when the dataset can be trained on, 2 with one sentence when it cannot be made."""
    with refusing():
        options = _parse(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    with refusing(), stopped_by_signals():
        try:
            lines = reconstruct(options, print)
        except KeyboardInterrupt:
            command = shlex.join(["python", "-m", "datasets.reconstruct", *words])
            print(f"Stopped; what has been done is kept, and this goes on from there: {command}", file=sys.stderr)
            sys.exit(130)
    out = Path(options.out)
    print("\n".join(lines))
    print(
        f"{out} is ready: python simple_trainer.py default --data_dir {shlex.quote(str(out))} "
        f"--result_dir {shlex.quote(f'results/{out.resolve().name}')}"
    )


def reconstruct(options: argparse.Namespace, say: Say) -> list[str]:
    """Make the dataset that the options describe, or go on with it.

    Args:
        options: As `_parse` returns them.
        say: Takes a sentence on what is used and done.

    Returns:
        The lines of a report.

    Raises:
        InputError: Something cannot be used, or the photos have nothing in common.
    """
    out: Path = options.out
    _check_options(options)
    _check_place(out)
    source = Source.of(options.photos, options.video, options.fps, out)
    _make_place(out)
    with _claimed(out / WORK):
        return _reconstruct(options, source, say)


def _reconstruct(options: argparse.Namespace, source: Source, say: Say) -> list[str]:
    out: Path = options.out
    images, work = out / "images", out / WORK
    database, models = work / "database.db", work / "models"
    steps = _Steps(work)
    steps.check_same_source(source)
    if not steps.are_done("photos", source.identity):
        source.put(images, say)
        steps.set_done("photos", source.identity)
    names = sorted(photo_names(images))
    log_to(work / LOG)
    with _of_colmap("reading the photos", work):
        num_cameras = import_photos(database, images, names, options.camera_model)
        photos = read_photos(database)
    num_gps = sum(photo.gps is not None for photo in photos)
    say(f"{len(names):,} photos of {num_cameras} {'camera' if num_cameras == 1 else 'cameras'}, {num_gps:,} with GPS.")
    made_with = _choose(options, photos, steps.made_with, say)
    matching, mapper, georeference = (made_with[name] for name in ("matching", "mapper", "georeference"))
    frame = LocalFrame.of(photos) if georeference else None

    if not steps.are_done("features", True):
        say(f"Features are found on the {'GPU' if pycolmap.has_cuda else 'CPU (this pycolmap is built without CUDA)'}.")
        with _of_colmap("finding features", work):
            extract_features(database, images, names)
        steps.set_done("features", True)

    settings = {"matching": matching}
    if not steps.are_done("matches", settings):
        say(_why(matching, photos, options))
        if matching == "preemptive" and not steps.are_done("pairs", [NUM_FEATURES, NUM_PARTNERS]):
            with _of_colmap("looking for likely pairs", work):
                find_likely_pairs(database)
            steps.set_done("pairs", [NUM_FEATURES, NUM_PARTNERS])
        with _of_colmap("matching", work):
            match(database, matching, options.vocab_tree)
        steps.set_done("matches", settings)
    photos = read_photos(database)

    settings |= {"mapper": mapper}
    if not steps.are_done("models", settings):
        partial = models.with_name("models.part")
        for folder in (partial, models):
            shutil.rmtree(folder, ignore_errors=True)
        partial.mkdir()
        num_matched = sum(photo.num_partners > 0 for photo in photos)
        with _of_colmap("making a model", work):
            make_models(database, images, partial, mapper, num_matched)
        if not read_models(partial):
            raise InputError(no_model(source.what, photos, matching))
        partial.rename(models)
        steps.set_done("models", settings)

    if not steps.are_done("sparse", made_with):
        for sentence in publish(models, out, frame):
            say(sentence)
        steps.set_done("sparse", made_with)
    return report(out, photos, matching, work / LEFT_OUT)


# ------------------------------------------------------------------------------------------------ before anything else


def _check_options(options: argparse.Namespace) -> None:
    if (options.photos is None) == (options.video is None):
        raise InputError("Name either the folder of the photos or a --video.")
    if options.fps is not None and not options.video:
        raise InputError("--fps says how many frames of a --video are taken, and there is none: leave it out.")
    if options.fps is not None and not 0 < options.fps <= 1000:
        raise InputError(f"--fps is {options.fps}, but must be above 0 and at most 1000.")
    if options.video and options.georeference:
        raise InputError("--georeference takes GPS from photos, which frames of a --video do not have: leave it out.")
    if options.matching == "vocab_tree" and options.vocab_tree is None:
        raise InputError("--matching vocab_tree needs a vocabulary tree of COLMAP: name its file with --vocab_tree.")
    if options.vocab_tree is not None and options.matching not in (None, "vocab_tree"):
        raise InputError(f"--vocab_tree and --matching {options.matching} exclude each other: give one of them.")
    if options.vocab_tree is not None:
        check_vocab_tree(options.vocab_tree)


def _check_place(out: Path) -> None:
    """Raise InputError where OUT lies in what a dataset is read from, or holds a model that is not this command's."""
    check_outside_datasets("--out", out)
    if (out / "sparse").exists() and not (out / WORK / _Steps.FILE).is_file():
        raise InputError(
            f"{out / 'sparse'} exists and was not made by this command: move it away, or name another --out."
        )


def _make_place(out: Path) -> None:
    """Make OUT's folders. Raises InputError where it cannot be written."""
    try:
        for folder in (out, out / WORK):
            folder.mkdir(parents=True, exist_ok=True)
            if not is_writable(folder):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        why = error.strerror or reason(error)
        raise InputError(f"--out {out} cannot be written ({why}): make it writable, or name another folder.") from error


# -------------------------------------------------------------------------------------------------- what has been done


def _choose(options: argparse.Namespace, photos: list[Photo], before: dict[str, Any], say: Say) -> dict[str, Any]:
    """Return how the model is made: as the options say, else as it was made before, else by default."""
    defaults = {
        "matching": choose_matching(photos, bool(options.video)),
        "mapper": "incremental",
        "georeference": False,
    }
    given = {name: getattr(options, name) for name in defaults}
    if options.vocab_tree:
        given["matching"] = "vocab_tree"
    chosen = {**defaults, **before, **{name: value for name, value in given.items() if value is not None}}
    kept = [name for name in defaults if given[name] is None and chosen[name] != defaults[name]]
    if kept:
        words = [f"--{name}" if chosen[name] is True else f"--{name} {chosen[name]}" for name in kept]
        say(f"What was asked for before stays as it is: {' '.join(words)}.")
    return chosen


class _Steps:
    """Remember in a file which steps are complete, and with which settings."""

    FILE = "steps.json"
    ORDER = ("photos", "features", "pairs", "matches", "models", "sparse")

    def __init__(self, folder: Path) -> None:
        self._path = folder / self.FILE
        try:
            self._done: dict[str, Any] = json.loads(self._path.read_text()) if self._path.is_file() else {}
        except PermissionError:
            raise
        except (OSError, ValueError) as error:
            raise InputError(f"{self._path} cannot be read ({reason(error)}): name another --out.") from error

    def are_done(self, step: str, settings: object) -> bool:
        """Return whether a step is complete, with these settings."""
        return step in self._done and self._done[step] == json.loads(json.dumps(settings))

    def set_done(self, step: str, settings: object) -> None:
        """Remember a step; those after it are to be done again."""
        for later in self.ORDER[self.ORDER.index(step) + 1 :]:
            self._done.pop(later, None)
        self._done[step] = json.loads(json.dumps(settings))
        if isinstance(settings, dict):
            self._done["made_with"] = {**self.made_with, **settings}
        write_whole(self._path, lambda partial: partial.write_text(json.dumps(self._done, indent=1) + "\n"))

    @property
    def made_with(self) -> dict[str, Any]:
        """The settings of the steps that make the model, as each was last completed."""
        return self._done.get("made_with", {})

    def check_same_source(self, source: Source) -> None:
        """Raise InputError where other photos have been put here before."""
        if "photos" not in self._done or self.are_done("photos", source.identity):
            return
        *file, fps = self._done["photos"]
        same_video = file == source.identity[:-1] and isinstance(fps, float)
        raise InputError(
            f"{self._path.parent} was begun with {f'--fps {fps:g}' if same_video else 'other photos'}: name another "
            "--out."
        )


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Hold a folder for this process, which gives it back even when it is killed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"Another command is at work in {folder}: wait for it, or name another --out.") from error
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _of_colmap(doing: str, work: Path) -> Iterator[None]:
    """Say in one sentence what COLMAP could not do."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError) as error:
        raise InputError(
            f"COLMAP failed in {doing} ({reason(error)}): look into its log in {work / LOG}, and start again."
        ) from error


def _why(matching: str, photos: list[Photo], options: argparse.Namespace) -> str:
    """Say which photos are compared, and why these."""
    count = len(photos)
    if options.matching or options.vocab_tree:
        return f"Photos are compared as --{'matching' if options.matching else 'vocab_tree'} says ({matching})."
    if matching == "sequential":
        return (
            "Each frame is compared with the next ones and a few later ones (sequential matching), as a video's "
            "neighbours see the same."
        )
    if matching == "spatial":
        return "Each photo is compared with those near it by GPS (spatial matching)."
    pairs = f"{count * (count - 1) // 2:,} pairs of photos"
    if matching == "exhaustive":
        return f"All {pairs} are compared (exhaustive matching)."
    return (
        f"Of {pairs} those are compared that are likely to see the same, {NUM_PARTNERS} partners of each photo whose "
        "largest features agree best with its own (preemptive matching), since not all photos have GPS."
    )


# ---------------------------------------------------------------------------------------------------- the command line


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m datasets.reconstruct",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add: Any = parser.add_argument
    add("photos", type=named_path, nargs="?", metavar="PHOTOS", help="the folder of the photos, in subfolders or not")
    add("--video", type=named_path, metavar="FILE", help="take the photos out of a video")
    add("--fps", type=float, help=f"of each second of a video take so many frames, the sharpest ({FPS:g})")
    add("--out", type=named_path, required=True, help="the dataset's folder to make")
    add(
        "--matching",
        choices=MATCHINGS,
        help=f"which photos are compared (all up to {MOST_EXHAUSTIVE}; beyond that by GPS, where all have it, or else "
        "those whose largest features agree; neighbours in a video)",
    )
    add(
        "--vocab_tree",
        type=named_path,
        metavar="FILE",
        help="compare those that a vocabulary tree of COLMAP finds similar",
    )
    add("--mapper", choices=("incremental", "global"), help="how COLMAP makes the model (incremental)")
    add(
        "--camera_model",
        choices=("SIMPLE_RADIAL", "RADIAL", "OPENCV", "OPENCV_FISHEYE", "PINHOLE"),
        help="of the lenses (SIMPLE_RADIAL)",
    )
    add(
        "--georeference",
        action=argparse.BooleanOptionalAction,
        help="bring the model into metres by the photos' GPS (no)",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
