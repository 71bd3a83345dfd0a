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
import filecmp
import itertools
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import pycolmap

from datasets.cache import is_writable
from datasets.georeference import SIDE_FILE, LocalFrame
from datasets.image_files import checked_picture, fitting_workers
from datasets.images import in_threads, picture_sizes
from datasets.likely_pairs import NUM_FEATURES, NUM_PARTNERS
from datasets.links import link_file, write_whole
from datasets.model_choice import Say
from datasets.paths import photo_names
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
    registered_names,
)
from datasets.places import check_outside_datasets
from datasets.prepared import check_prepared
from datasets.video_frames import open_video, write_sharpest_frames
from errors import InputError, counted, reason, refusing, stopped_by_signals
from option_words import Parser, named_path

FPS = 2.0  # frames that are taken of each second of a video, where --fps says nothing else
FEWEST_PHOTOS = 3  # of which one is held out, and two see the same
_NO_FEATURES = "no features (blank, blurred or covered)"
_NAMED = 5  # of photos of a kind, in the report; all are in a file

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
    source = _Source.of(options)
    _make_place(out)
    with _claimed(out / WORK):
        return _reconstruct(options, source, say)


def _reconstruct(options: argparse.Namespace, source: _Source, say: Say) -> list[str]:
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
            raise InputError(_no_model(source.what, photos, matching))
        partial.rename(models)
        steps.set_done("models", settings)

    if not steps.are_done("sparse", made_with):
        for sentence in _publish(models, out, frame):
            say(sentence)
        steps.set_done("sparse", made_with)
    return _report(out, photos, matching)


# ------------------------------------------------------------------------------------------------------ what goes in


class _Source:
    """Say where photos come from, and put them into the dataset."""

    def __init__(self, what: str, identity: list[Any], put: Callable[[Path, Say], None]) -> None:
        """
        Args:
            what: Its name for sentences.
            identity: What JSON can hold, equal only for the same photos; of a video, its --fps comes last.
            put: Puts the photos into a folder, and says how.
        """
        self.what = what
        self.identity = identity
        self.put = put

    @classmethod
    def of(cls, options: argparse.Namespace) -> _Source:
        """Look at what the options name.

        Raises:
            InputError: There are no photos, or too few, or they cannot be read.
        """
        return (
            cls._video(options.video, options.fps or FPS) if options.video else cls._photos(options.photos, options.out)
        )

    @classmethod
    def _video(cls, video: Path, fps: float) -> _Source:
        video_fps, seconds, _ = open_video(video)
        stat = video.stat()

        def put(images: Path, say: Say) -> None:
            say(f"{video}: {seconds:.1f} s of {video_fps:g} frames a second, the sharpest of each {1 / fps:.3g} s.")
            for name in photo_names(images) if images.is_dir() else ():  # of an interruption
                (images / name).unlink()
            count = write_sharpest_frames(video, fps, images)
            if count < FEWEST_PHOTOS:
                raise InputError(
                    f"--video {video} gives {counted(count, 'photo')}, too few to reconstruct: raise --fps, or take a "
                    "longer video."
                )

        return cls(f"{video}", [video.name, stat.st_size, stat.st_mtime_ns, fps], put)

    @classmethod
    def _photos(cls, folder: Path, out: Path) -> _Source:
        if not folder.is_dir():
            raise InputError(f"{folder} does not exist or is no folder: name the folder of the photos.")
        images = out / "images"
        in_place = images.is_dir() and images.samefile(folder)
        if not in_place and out.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"--out {out} lies in the folder of the photos, {folder}: name one beside it.")
        names = sorted(photo_names(folder))
        if len(names) < FEWEST_PHOTOS:
            found = {0: "no photos", 1: "one photo"}.get(len(names), f"{len(names)} photos")
            raise InputError(
                f"{folder} holds {found}, and a reconstruction needs {FEWEST_PHOTOS} at least, of the same things "
                "from several places: name the folder of the photos, or take more."
            )
        others = [] if in_place or not images.is_dir() else sorted(photo_names(images) - set(names))
        if others:
            raise InputError(
                f"{images} holds {len(others)} photos that are not in {folder}, such as {others[0]}: move them away, "
                "or name another --out."
            )
        sizes = picture_sizes(folder, names)
        stats = [(folder / name).stat() for name in names]
        identity = [[name, stat.st_size] for name, stat in zip(names, stats, strict=True)]

        def put(images: Path, say: Say) -> None:
            workers = fitting_workers(os.cpu_count() or 1, max(width * height for width, height in sizes))
            in_threads(lambda name: checked_picture(folder / name), names, workers, "Checking photos")
            if in_place:
                return
            for name in names:
                link_file(folder / name, images / name)
            kinds = [_kind_of_link(folder / name, images / name) for name in names]
            counts = " and ".join(f"{kinds.count(kind):,} {kind}" for kind in sorted(set(kinds)))
            say(f"{images} holds {counts} of {folder}.")

        return cls(f"{folder}", identity, put)


def _kind_of_link(source: Path, target: Path) -> str:
    if target.is_symlink():
        return "symbolic links to photos"
    return "hard links to photos" if target.samefile(source) else "copies of photos"


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

    def check_same_source(self, source: _Source) -> None:
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


# ------------------------------------------------------------------------------------------------------ what comes out


def _publish(models: Path, out: Path, frame: LocalFrame | None) -> list[str]:
    """Write the models into `sparse`, the one of most photos as `sparse/0`; returns sentences on them."""
    sparse = out / "sparse"
    partial = sparse.with_name(".sparse.part")
    shutil.rmtree(partial, ignore_errors=True)
    found = read_models(models)
    sentences = []
    for number, model in enumerate(found):
        if frame is not None:
            distance = frame.align(model)
            if distance is None and number == 0:
                raise InputError(
                    "--georeference found no place for the model where its photos' GPS positions agree: leave it out."
                )
            sentences.append(
                f"sparse/{number} could not be georeferenced: too few of its photos have GPS that agrees."
                if distance is None
                else f"sparse/{number} is in metres east, north and up of the place in {SIDE_FILE}; the median camera "
                f"is {distance:.2f} m from its GPS position."
            )
        model.update_point_3d_errors()  # in pixels, which the global mapper's are not
        (partial / str(number)).mkdir(parents=True)
        model.write(partial / str(number))
    if _hold_the_same(partial, sparse):
        shutil.rmtree(partial)
    else:
        sentences += _set_aside(out)
        partial.rename(sparse)
    (out / SIDE_FILE).unlink(missing_ok=True)
    if frame is not None:
        frame.write(out / SIDE_FILE)
    if len(found) > 1:
        names = [registered_names(model) for model in found]
        num_others = len(set.union(*names) - names[0])
        sentences.append(
            f"The photos fell into {len(found)} models that could not be joined: sparse/0, the largest, is trained on; "
            f"the others hold {counted(num_others, 'photo')} that it lacks."
        )
    return sentences


def _hold_the_same(first: Path, second: Path) -> bool:
    """Tell whether two folders of models hold the same files."""
    files = [{path.relative_to(folder) for path in folder.glob("*/*.bin")} for folder in (first, second)]
    return files[0] == files[1] and all(filecmp.cmp(first / name, second / name, shallow=False) for name in files[0])


def _set_aside(out: Path) -> list[str]:
    """Move the model that OUT holds, with its place on the Earth, into a folder of its own; returns a sentence."""
    sparse = out / "sparse"
    if not sparse.exists():
        return []
    if (out / SIDE_FILE).exists():  # before its model goes, so that no interruption parts them
        (out / SIDE_FILE).rename(sparse / SIDE_FILE)
    folder = next(path for number in itertools.count(1) if not (path := out / f"replaced_{number}").exists())
    sparse.rename(folder)
    return [
        f"The model that was here before is kept in {folder}: training that began with it goes on with --model_dir "
        f"{folder.name}/0; train with the new one into another --result_dir."
    ]


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


def _no_model(what: str, photos: list[Photo], matching: str) -> str:
    """Say why there is no model."""
    without = sum(photo.num_features == 0 for photo in photos)
    alone = sum(photo.num_partners == 0 for photo in photos)
    if alone == len(photos):
        cause = "no two of them have enough in common"
    else:
        cause = f"those that match ({len(photos) - alone} of them) see too little from places far enough apart"
    return (
        f"No model can be made of the {len(photos)} photos of {what}, since {cause}"
        + (f", and {without} have no features at all" if without else "")
        + ": take sharp photos from several places, each of which shows most of what another shows"
        + ("." if matching == "exhaustive" else ", or compare all pairs of them with --matching exhaustive.")
    )


def _report(out: Path, photos: list[Photo], matching: str) -> list[str]:
    """Return the lines of the report: what was registered, what not and why, and what `prepare --check` finds."""
    models = [pycolmap.Reconstruction(out / "sparse" / str(k)) for k in range(_count_models(out / "sparse"))]
    registered = [registered_names(model) for model in models]
    left_out: dict[str, list[Photo]] = {}
    for photo in photos:
        if photo.name not in registered[0]:
            left_out.setdefault(_why_left_out(photo, registered), []).append(photo)
    usual = _median_features([photo for photo in photos if photo.name in registered[0]])
    lines = [
        f"registered: {len(registered[0]):,} of {len(photos):,} photos, {models[0].num_points3D():,} points, "
        f"mean reprojection error {models[0].compute_mean_reprojection_error():.2f} pixels"
    ]
    path = out / WORK / LEFT_OUT
    path.unlink(missing_ok=True)
    for why, group in left_out.items():
        more = f" and {len(group) - _NAMED} more, all in {path}" if len(group) > _NAMED else ""
        names = ", ".join(photo.name for photo in group[:_NAMED])
        lines.append(f"left out:   {len(group):,}, {why}{_few_features(group, usual)}: {names}{more}")
    if 2 * len(registered[0]) < len(photos):
        lines.append(
            "Warning:    most photos are left out; photos that show more of what others show give a larger model."
        )
    if matching != "exhaustive" and any(why != _NO_FEATURES for why in left_out):
        lines.append(
            f"            Not all pairs were compared ({matching} matching): the same command with --matching "
            "exhaustive keeps what has been matched, compares the others too, and may place more photos in a new "
            "model; this one is kept, too."
        )
    if left_out:
        rows = [f"{photo.name}\t{why}\n" for why, group in left_out.items() for photo in group]
        write_whole(path, lambda partial: partial.write_text("".join(sorted(rows))))
    return lines + check_prepared("default", out)


def _few_features(group: list[Photo], usual: int) -> str:
    """Say that photos have fewer features than half the usual number, where they do."""
    count = _median_features(group)
    return f" (of few features: {count:,} in the median, registered photos {usual:,})" if 0 < 2 * count < usual else ""


def _median_features(photos: list[Photo]) -> int:
    return round(median(photo.num_features for photo in photos))


def _count_models(sparse: Path) -> int:
    return sum(path.is_dir() and path.name.isdecimal() for path in sparse.iterdir())


def _why_left_out(photo: Photo, registered: list[set[str]]) -> str:
    if photo.num_features == 0:
        return _NO_FEATURES
    if photo.num_partners == 0:
        return "no other photo matches"
    for number, names in enumerate(registered[1:], start=1):
        if photo.name in names:
            return f"in another model (sparse/{number})"
    return "matches too few points of the model"


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
