"""Runs COLMAP's steps on a folder of photos through pycolmap: cameras, features, matches, models.

All steps run in a process of their own (`datasets.child_process`). All but the last keep what they have done in one
database, photo by photo and pair by pair, so that an interrupted one goes on where it was. Their bars count what is in
the database, since pycolmap tells nothing while it works.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
from PIL import Image
from tqdm import tqdm

from datasets.child_process import run_in_child
from datasets.images import in_threads
from datasets.likely_pairs import NUM_FEATURES, largest_features, likely_pairs
from datasets.links import write_whole
from errors import InputError

MOST_EXHAUSTIVE = 200  # photos; beyond that GPS says which ones may see the same, or else their largest features
PAIRS = "pairs.txt"  # beside the database: the pairs that `find_likely_pairs` has found
LOG = "log"  # the folder beside the database of what COLMAP says
SEED = 0  # of COLMAP's random samples

_BATCH = 128  # pairs of a list that are matched before what was found is written down
_LEAST_NEIGHBOURS = 20  # of a photo by its GPS position, however far they are
_EXIF_CAMERA = (0x010F, 0x0110)  # make, model
_EXIF_IFD, _EXIF_LENS = 0x8769, (0x920A, 0xA405)  # focal length, and as that of a 35 mm film
# Characters that end a name in a list of pairs, or make a comment of it, and what stands for them there.
_CODES = str.maketrans(" #\t\n", "\x1c\x1d\x1e\x1f")
_PLAIN = str.maketrans("\x1c\x1d\x1e\x1f", " #\t\n")
# Which pairs of photos are compared: options, what lists the pairs, and what compares them.
_PAIRINGS: dict[str, tuple[Any, Any, Any]] = {
    "exhaustive": (
        pycolmap.ExhaustivePairingOptions,
        pycolmap.ExhaustivePairGenerator,
        pycolmap.match_exhaustive,
    ),
    "spatial": (pycolmap.SpatialPairingOptions, pycolmap.SpatialPairGenerator, pycolmap.match_spatial),
    "sequential": (pycolmap.SequentialPairingOptions, pycolmap.SequentialPairGenerator, pycolmap.match_sequential),
    "preemptive": (pycolmap.ImportedPairingOptions, pycolmap.ImportedPairGenerator, pycolmap.match_image_pairs),
    "vocab_tree": (pycolmap.VocabTreePairingOptions, pycolmap.VocabTreePairGenerator, pycolmap.match_vocabtree),
}
MATCHINGS = tuple(_PAIRINGS)


@dataclass(frozen=True)
class Photo:
    """Hold what the database knows of one photo."""

    name: str
    num_features: int
    num_partners: int  # photos that it shares verified matches with
    gps: tuple[float, float, float] | None  # latitude and longitude in degrees, altitude in metres


# --------------------------------------------------------------------------------------------------------------- steps


def log_to(folder: Path) -> None:
    """Let COLMAP write its log into a folder, and nothing to the terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    log: Any = pycolmap.logging
    log.logtostderr = log.alsologtostderr = False
    log.stderrthreshold = log.FATAL.value
    log.set_log_destination(log.INFO, str(folder / "colmap."))


def import_photos(database: Path, images: Path, names: list[str], camera_model: str | None = None) -> int:
    """Put photos and their GPS positions into the database, those that are not there yet.

    Photos of one size, make, model and focal length share a camera.

    Args:
        database: The file, which may not exist yet.
        images: Folder of the photos.
        names: The photos, relative to it.
        camera_model: Of COLMAP; None for that which the database was begun with, at first SIMPLE_RADIAL.

    Returns:
        The number of cameras.

    Raises:
        InputError: COLMAP cannot read a photo, or the database was begun with another camera model.
    """
    _rename(database, _PLAIN)  # of an interrupted `match`
    with closing(pycolmap.Database.open(database)) as opened:
        known = {image.name: image.camera_id for image in opened.read_all_images()}
        begun_with = {camera.model_name for camera in opened.read_all_cameras()}
    if begun_with and camera_model not in (None, *begun_with):
        raise InputError(
            f"{database} was begun with --camera_model {', '.join(sorted(begun_with))}: name another --out for "
            f"{camera_model}, or leave --camera_model out."
        )
    camera_model = camera_model or next(iter(begun_with), "SIMPLE_RADIAL")
    groups: dict[Any, list[str]] = {}
    for name, key in zip(names, in_threads(lambda name: _camera_key(images / name), names, 4, "EXIF"), strict=True):
        groups.setdefault(key, []).append(name)
    missing = []
    for group in groups.values():
        camera_id = next((known[name] for name in group if name in known), None)  # of an interrupted import
        names_left = [name for name in group if name not in known]
        if names_left:
            missing.append((camera_id, names_left))
    if missing:
        run_in_child(_import_groups, database, images, missing, camera_model)
    with closing(pycolmap.Database.open(database)) as opened:
        imported = {image.name for image in opened.read_all_images()}
        num_cameras = opened.num_cameras()
    unread = [name for name in names if name not in imported]
    if unread:
        raise InputError(
            f"{len(unread)} of {len(names)} photos cannot be read by COLMAP, such as {images / unread[0]}: save them "
            "as JPEG or PNG."
        )
    return num_cameras


def extract_features(database: Path, images: Path, names: list[str]) -> None:
    """Find the features of the photos that have none in the database yet."""

    def count(opened: pycolmap.Database) -> int:
        return sum(opened.exists_keypoints(image.image_id) for image in opened.read_all_images())

    with _counting(database, count, "features", "photo", len(names)) as look:
        run_in_child(_extract_features, database, images, names, look=look)


def choose_matching(photos: list[Photo], is_video: bool) -> str:
    """Return which photos are compared: "exhaustive", "spatial", "preemptive" or "sequential"."""
    if is_video:
        return "sequential"
    if len(photos) <= MOST_EXHAUSTIVE:
        return "exhaustive"
    return "spatial" if all(photo.gps for photo in photos) else "preemptive"


def check_vocab_tree(path: Path) -> None:
    """Raise InputError where a file is no vocabulary tree that this COLMAP reads."""
    if not path.is_file():
        raise InputError(f"--vocab_tree {path} does not exist: name the file of a vocabulary tree.")
    try:
        run_in_child(_read_vocab_tree, path)
    except RuntimeError as error:
        raise InputError(
            f"--vocab_tree {path} is no vocabulary tree of COLMAP 3.12 or newer (older ones, for FLANN, are not read): "
            "take one whose name begins with vocab_tree_faiss from https://github.com/colmap/colmap/releases."
        ) from error


def find_likely_pairs(database: Path) -> None:
    """Write the pairs of photos whose largest features agree best into a file beside the database."""
    with closing(pycolmap.Database.open(database)) as opened:
        images = sorted(opened.read_all_images(), key=lambda image: str(image.name))
        features = np.zeros((len(images), NUM_FEATURES, 128), np.uint8)  # 64 KiB a photo
        for row, image in zip(features, images, strict=True):
            descriptors = opened.read_descriptors(image.image_id).data
            row[:] = largest_features(opened.read_keypoints(image.image_id), descriptors)
    names = [image.name.translate(_CODES) for image in images]
    lines = [f"{names[first]} {names[second]}\n" for first, second in likely_pairs(features)]
    write_whole(database.with_name(PAIRS), lambda partial: partial.write_text("".join(lines), encoding="utf-8"))


def match(database: Path, matching: str, vocab_tree: Path | None) -> None:
    """Match the features of those pairs that have not been matched yet.

    Args:
        database: The file, which holds the features.
        matching: "exhaustive", "spatial", "sequential", "preemptive", which takes the pairs that `find_likely_pairs`
            has written, or "vocab_tree".
        vocab_tree: The file of the vocabulary tree, which the last one needs.
    """
    with _coded_names(database) if matching == "preemptive" else nullcontext():
        _match_and_count(database, matching, vocab_tree)


def _match_and_count(database: Path, matching: str, vocab_tree: Path | None) -> None:
    pairings, generator = _pairings(database, matching, vocab_tree), _PAIRINGS[matching][1]
    with closing(pycolmap.Database.open(database)) as opened:
        num_done = opened.num_matched_image_pairs()
        if matching == "vocab_tree":  # which pairs it takes is known only while it looks them up
            num_pairs, num_others = opened.num_images() * pairings[0].num_images, 0
        else:
            pairs = {(min(pair), max(pair)) for some in pairings for pair in generator(some, opened).all_pairs()}
            num_pairs = len(pairs)
            num_others = num_done - sum(opened.exists_matches(*pair) for pair in pairs)  # of another --matching

    def count(opened: pycolmap.Database) -> int:
        return opened.num_matched_image_pairs() - num_others

    with _counting(database, count, "matches", "pair", num_pairs) as look:
        run_in_child(_match, database, matching, vocab_tree, look=look)


def make_models(database: Path, images: Path, folder: Path, mapper: str, num_photos: int) -> None:
    """Make models of the photos that match, each in a folder of its own.

    Args:
        database: Holds features and matches.
        images: Folder of the photos.
        folder: Receives the models; it is empty.
        mapper: "incremental" or "global".
        num_photos: How many there are to be registered.
    """
    if mapper == "global":
        tqdm.write("The global mapper tells nothing while it works; its log is beside the database.")
        run_in_child(_make_models_globally, database, images, folder)
        return
    count = multiprocessing.get_context("spawn").Value("i", 0)
    with tqdm(total=num_photos, desc="models", unit="photo", dynamic_ncols=True) as bar:

        def look() -> None:
            bar.update(min(count.value, num_photos) - bar.n)  # of a model that is given up photos count twice

        run_in_child(_make_models, database, images, folder, count, look=look)


# ------------------------------------------------------------------------------------ what runs in a process of its own


def _import_groups(database: Path, images: Path, groups: list[tuple[int | None, list[str]]], camera_model: str) -> None:
    """Import photos, one camera for each group: the one whose id is given, or a new one."""
    log_to(database.parent / LOG)
    for camera_id, group in groups:
        options = pycolmap.ImageReaderOptions()
        options.camera_model = camera_model
        if camera_id is not None:
            options.existing_camera_id = camera_id
        pycolmap.import_images(database, images, pycolmap.CameraMode.SINGLE, group, options)


def _read_vocab_tree(path: Path) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # COLMAP logs there what is said in one sentence
    pycolmap.VisualIndex.read(path)


def _extract_features(database: Path, images: Path, names: list[str]) -> None:
    log_to(database.parent / LOG)
    pycolmap.extract_features(database, images, names)


def _match(database: Path, matching: str, vocab_tree: Path | None) -> None:
    log_to(database.parent / LOG)
    verification = pycolmap.TwoViewGeometryOptions()
    verification.ransac.random_seed = SEED
    for pairing in _pairings(database, matching, vocab_tree):
        _PAIRINGS[matching][2](database, pairing_options=pairing, verification_options=verification)


def _pairings(database: Path, matching: str, vocab_tree: Path | None) -> list[Any]:
    """Return the options of pycolmap that list the pairs, one after the other."""
    pairing = _PAIRINGS[matching][0]()
    if matching == "sequential":  # the next 1, 2, 4, 8 ... photos, and all of the next ones
        near = pycolmap.SequentialPairingOptions()
        near.quadratic_overlap = False
        return [pairing, near]
    if matching == "spatial":
        pairing.min_num_neighbors = _LEAST_NEIGHBOURS
    elif matching == "preemptive":
        pairing.match_list_path = database.with_name(PAIRS)
        pairing.block_size = _BATCH
    elif matching == "vocab_tree":
        pairing.vocab_tree_path = vocab_tree
    return [pairing]


def _make_models(database: Path, images: Path, folder: Path, count: Any) -> None:
    """Make models incrementally; `count` is a shared integer, the photos that have been registered."""
    log_to(database.parent / LOG)
    pycolmap.set_random_seed(SEED)
    options = pycolmap.IncrementalPipelineOptions()
    options.random_seed = SEED

    def add(num_photos: int) -> None:
        count.value += num_photos

    pycolmap.incremental_mapping(
        database,
        images,
        folder,
        options,
        initial_image_pair_callback=lambda: add(2),
        next_image_callback=lambda: add(1),
    )


def _make_models_globally(database: Path, images: Path, folder: Path) -> None:
    log_to(database.parent / LOG)
    pycolmap.set_random_seed(SEED)
    pycolmap.calibrate_view_graph(database)
    options = pycolmap.GlobalPipelineOptions()
    options.random_seed = SEED
    for number, model in pycolmap.global_mapping(database, images, folder, options).items():
        model.extract_colors_for_all_images(images)
        model.write(folder / str(number))


# ------------------------------------------------------------------------------------------------------------- reading


def read_photos(database: Path) -> list[Photo]:
    """Return what the database knows of each photo, ordered by name."""
    with closing(pycolmap.Database.open(database)) as opened:
        partners: dict[int, int] = {}
        for pair, num_inliers in zip(*opened.read_two_view_geometry_num_inliers(), strict=True):
            for image_id in pycolmap.pair_id_to_image_pair(pair) if num_inliers > 0 else ():
                partners[image_id] = partners.get(image_id, 0) + 1
        images = opened.read_all_images()
        features = {image.image_id: opened.num_keypoints_for_image(image.image_id) for image in images}
        priors = {
            prior.corr_data_id.id: prior.position
            for prior in opened.read_all_pose_priors()
            if prior.has_position() and prior.coordinate_system == pycolmap.PosePriorCoordinateSystem.WGS84
        }
    photos = []
    for image in images:
        position = priors.get(image.image_id)
        gps = None if position is None else (float(position[0]), float(position[1]), float(position[2]))
        photos.append(Photo(image.name, features[image.image_id], partners.get(image.image_id, 0), gps))
    return sorted(photos, key=lambda photo: photo.name)


def read_models(folder: Path) -> list[pycolmap.Reconstruction]:
    """Return the models in the folders of a folder, the one of most photos first.

    Those are left out whose photos are all in larger ones: COLMAP begins some that it then does not need.
    """
    models = [pycolmap.Reconstruction(path) for path in sorted(folder.iterdir()) if path.is_dir()]
    models.sort(key=lambda model: (-model.num_reg_images(), -model.num_points3D()))
    found: list[pycolmap.Reconstruction] = []
    names: set[str] = set()
    for model in models:
        if not registered_names(model) <= names:
            found.append(model)
            names |= registered_names(model)
    return found


def registered_names(model: pycolmap.Reconstruction) -> set[str]:
    """Return the names of the photos whose poses a model knows."""
    return {model.image(image_id).name for image_id in model.reg_image_ids()}


@contextmanager
def _coded_names(database: Path) -> Iterator[None]:
    """Let photos have names in the database that COLMAP finds in a list of pairs, whatever is in their own names."""
    _rename(database, _CODES)
    try:
        yield
    finally:
        _rename(database, _PLAIN)


def _rename(database: Path, characters: dict[int, int]) -> None:
    """Replace characters in the names of photos."""
    with closing(pycolmap.Database.open(database)) as opened:
        for image in opened.read_all_images():
            name = image.name.translate(characters)
            if name != image.name:
                image.name = name
                opened.update_image(image)


def _camera_key(path: Path) -> tuple[object, ...]:
    """Return what photos of one camera and lens have in common."""
    with Image.open(path) as image:
        size = image.size
        try:
            exif = image.getexif()
            lens = exif.get_ifd(_EXIF_IFD)
            return (size, *(str(exif.get(tag)) for tag in _EXIF_CAMERA), *(str(lens.get(tag)) for tag in _EXIF_LENS))
        except Exception:  # what stands in EXIF is as many programs wrote it
            return (size,)


# ------------------------------------------------------------------------------------------------------------ progress


@contextmanager
def _counting(
    database: Path, count: Callable[[pycolmap.Database], int], description: str, unit: str, total: int
) -> Iterator[Callable[[], None]]:
    """Show a bar of what the database holds; gives what looks at it again.

    It is read through pycolmap: two SQLite libraries in one process release each other's locks, and one then takes
    away the memory that the other has mapped.
    """
    with closing(pycolmap.Database.open(database)) as opened:
        initial = min(count(opened), total)
        with tqdm(total=total, initial=initial, desc=description, unit=unit, dynamic_ncols=True) as bar:

            def look() -> None:
                with suppress(RuntimeError):  # the writer holds the file; the next look finds it free
                    bar.update(min(count(opened), total) - bar.n)

            yield look
