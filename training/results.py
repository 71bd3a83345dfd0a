"""The result folder of a run, laid out as gsplat's example trainer does."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import yaml
from torch import Tensor
from tqdm import tqdm

from configs import Config, in_effect
from datasets.places import check_outside_datasets
from distributed.mesh import Ranks
from errors import InputError, TrainingStopped
from training.checkpoint_folder import CheckpointFolder
from training.ending import ENDED, forget_ending
from training.event_log import FILES as LOGS
from training.event_log import EventLog
from training.files import write_file
from training.folder_lock import FolderLock, FolderTaken
from training.ply import save_ply
from training.pose_files import FILES as POSE_FILES
from training.pose_files import FOLDER as POSES
from training.timelapse import FRAMES, VIDEO
from training.video import NAMES

MOST_LOGGED = 4  # pictures that TensorBoard gets at an evaluation: it keeps each, uncompressed in memory when shown
FOLDERS = ("ckpts", "stats", "renders", "ply", "tb")
OPTIONS = "cfg.yml"
EVALUATED = "evaluated"  # in the folder of a training: what --ckpt measures, in the layout of a result folder
# What only a run writes. A folder that holds some of the first is a run's; the others come with them.
RESULTS = ("ckpts/ckpt_*.pt", "stats/train_step*.json", "ply/point_cloud_*.ply")
BESIDE_RESULTS = (
    *("ckpts/ckpt_*.pt.partial", "ckpts/ckpt_*.part", "ckpts/ckpt_*.part.partial"),
    *("stats/val_step*.json", "ply/point_cloud_*.json", "renders/val_step*.png"),
    *(f"videos/{name}_*.mp4" for name in NAMES),
    *(f"{POSES}/{name}" for name in POSE_FILES),
    *("report.html", VIDEO, f"{FRAMES}/step_*.jpg", f"tb/{LOGS}", "*/partial_*", f"{FRAMES}/partial_*"),
)


def folder_of(cfg: Config) -> Path:
    """Return the folder that a run writes to: an evaluation leaves what a training has written there.

    Args:
        cfg: Its result folder; with --ckpt that may be a training's, which has cfg.yml, and then holds another one.
    """
    folder = Path(cfg.result_dir)
    return folder / EVALUATED if cfg.ckpt and (folder / OPTIONS).is_file() else folder


def check_result_dir(cfg: Config) -> None:
    """Refuse a result folder without a name, and one in which the next run would take results for photos.

    Raises:
        InputError: Nothing has been written.
    """
    if not cfg.result_dir:
        raise InputError("--result_dir is empty: name a folder, such as results/garden.")
    check_outside_datasets("--result_dir", Path(cfg.result_dir), Path(cfg.data_dir), cfg.model_dir)


def holds_run(folder: Path) -> bool:
    """Return whether there is anything of a run in a folder that would be lost if another began there."""
    return next(_found(folder, RESULTS), None) is not None


def remove_run(folder: Path) -> None:
    """Remove all results of a run; what others have put into its folder stays."""
    of_run = RESULTS + BESIDE_RESULTS
    of_evaluations = tuple(f"{EVALUATED}/{pattern}" for pattern in (*of_run, ENDED))
    for file in list(_found(folder, of_run + of_evaluations)):
        file.unlink(missing_ok=True)


def _found(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    return (file for pattern in patterns for file in folder.glob(pattern) if not file.is_dir())


class ResultFolder:
    """Hold ckpts/ stats/ renders/ videos/ ply/ tb/ cfg.yml of one run, which no other run can have meanwhile.

    N in file names counts the training steps done.

    Attributes:
        path: The folder.
        checkpoints: Those in ckpts/.
        log: Writes to tb/; there since `begin`.
        has_begun: Whether the run may change what lies there.
        missed: What could not be written, and why.
    """

    log: EventLog

    def __init__(self, cfg: Config, ranks: Ranks | None = None) -> None:
        """Take the folder; nothing that lies in it changes before `begin`.

        Args:
            cfg: The options.
            ranks: That write into it together: the first has the folder, as a run of one process has, and writes all
                but the others' parts. All of them make a `ResultFolder`, and call `begin`, `make_again` and `has`.

        Raises:
            FolderTaken: Another run is in it, or has been and the options do not say what to do with that.
            InputError: The folder cannot be made or written, or is not one for all ranks.
        """
        self.path = folder_of(cfg)
        self._cfg = cfg
        self._ranks = ranks
        self._made: list[Path] = []
        self._is_missing = False
        self._is_logging = False
        self.has_begun = False
        self.missed: list[str] = []
        self._lock: FolderLock | None = None
        if self._leads:
            self._take_first()
        if ranks is not None:
            self._check_shared(ranks)
        self.checkpoints = CheckpointFolder(self.path / "ckpts", keep=cfg.keep, ranks=ranks)

    def name_beginning(self, init_ckpt: str) -> None:
        """Let cfg.yml name the model that the run which goes on began from: it is not given with --resume."""
        self._cfg = replace(self._cfg, init_ckpt=init_ckpt)

    def begin(self, first_step: int | None) -> None:
        """Write cfg.yml, and remove what the run replaces: all that could be refused has been checked.

        Args:
            first_step: From 0; None where nothing is trained, so that the options of the training before stay.

        Raises:
            OSError: It cannot be written.
        """
        self.has_begun = True
        if self._leads:
            self._begin(first_step)
        if self._ranks is not None:
            self._ranks.barrier()  # from now on the others write, too

    def _begin(self, first_step: int | None) -> None:
        forget_ending(self.path)
        if not self._cfg.ckpt:
            self.checkpoints.remove_unfinished()
        if self._cfg.force:
            remove_run(self.path)
        if first_step is not None:
            self._write_options()
        # What the run before had logged from this step on is forgotten: it is done once more.
        self.log = EventLog(self.path / "tb", first_step + 1 if first_step else None)
        self._is_logging = True

    def make_again(self) -> bool:
        """Make the folder again where it has been removed or renamed meanwhile, and say so.

        Returns:
            Whether it had to be. Where it cannot be made, that is said, and what is written fails, too.
        """
        if self._ranks is None:
            return self._make_again()
        is_new = self._ranks.broadcast(self._leads and self._make_again())
        self.path = self._ranks.broadcast(self.path)
        self.checkpoints.path = self.path / "ckpts"
        return is_new

    def is_lost(self) -> bool:
        """Return whether the folder has been removed or renamed; asked of the process that has it."""
        return self._lock is not None and not self._lock.is_in_place()

    def _make_again(self) -> bool:
        if self._lock is None or not self.is_lost():
            return False
        said = f"Warning: {self.path} has been removed or renamed while training went on"
        try:
            before = self._lock
            try:
                self._lock = self._take()
            except FolderTaken:
                self.path = self.path.with_name(f"{self.path.name}_{os.getpid()}")
                self._lock = self._take()
            before.release()
            self.checkpoints.path = self.path / "ckpts"
            self._write_options()
            with contextlib.suppress(OSError):
                self.log.close()
            self.log = EventLog(self.path / "tb")
        except OSError as error:
            if not self._is_missing:
                tqdm.write(f"{said}, and cannot be made again ({error}).")
            self._is_missing = True
            return False
        self._is_missing = False
        tqdm.write(f"{said}: from now on results go to {self.path}, made anew.")
        return True

    def close(self) -> None:
        """Let the checkpoints be written to their end, and give the folder back."""
        self.checkpoints.close()
        if self._is_logging:
            with contextlib.suppress(OSError):  # the log is not worth an error at the very end
                self.log.close()
        self._give_back()

    @contextlib.contextmanager
    def missed_if_unwritable(self, what: str, *, was_asked_for: bool = True) -> Iterator[None]:
        """Go on where a result cannot be written: it is missed, with a warning, and not worth the training.

        Args:
            what: It is called in sentences.
            was_asked_for: Whether a run that misses it has not done all that it should.
        """
        try:
            yield
        except OSError as error:
            if was_asked_for:
                self.missed.append(f"{what} ({error})")
            tqdm.write(f"Warning: {what} could not be written to {self.path} ({error}).")

    def check_none_missed(self) -> None:
        """Stop at the end of a run that has not written all that it was asked for.

        Raises:
            TrainingStopped: Naming what is missed.
        """
        if self.missed:
            raise TrainingStopped(
                f"Of what was asked for, this could not be written to {self.path}: {', '.join(self.missed)}. Make room "
                "there or make it writable."
            )

    def has(self, name: str) -> bool:
        """Return whether a result is there, by its path in the folder."""
        is_there = (self.path / name).is_file()
        return is_there if self._ranks is None else self._ranks.broadcast(is_there)

    def save_ply(
        self,
        steps: int,
        rows: Callable[[int, int], Mapping[str, Tensor]],
        num_gaussians: int,
        transform: np.ndarray,
    ) -> None:
        """Write ply/point_cloud_{steps}.ply, and .json beside it; as `training.ply.save_ply`, of all ranks."""
        save_ply(self.path / "ply" / f"point_cloud_{steps}.ply", rows, num_gaussians, transform, ranks=self._ranks)

    def save_statistics(self, kind: str, steps: int, statistics: Mapping[str, object]) -> None:
        """Write stats/{kind}_step{steps}.json."""
        write_file(self.path / "stats" / f"{kind}_step{steps}.json", json.dumps(statistics, indent=2) + "\n")

    def save_rendering(self, steps: int, index: int, canvas: np.ndarray) -> None:
        """Write one picture [H, W, 3] uint8 as renders/val_step{steps}_{index}.png."""
        # In memory first: after a full disk imageio tries once more when its writer is forgotten, with a traceback.
        content = imageio.imwrite("<bytes>", canvas, extension=".png", compress_level=1)
        write_file(self.path / "renders" / f"val_step{steps}_{index:04d}.png", content)

    def log_renderings(self, steps: int, count: int) -> None:
        """Show a few of the pictures of `save_rendering` in TensorBoard, the same ones at every evaluation.

        Args:
            steps: Of the evaluation.
            count: How many views it had.
        """
        for index in range(0, count, count // MOST_LOGGED + 1):
            path = self.path / "renders" / f"val_step{steps}_{index:04d}.png"
            if path.is_file():  # and not one that a mask hides
                self.log.add_picture(f"val/{index:04d}", imageio.imread(path), steps)

    @property
    def _leads(self) -> bool:
        return self._ranks is None or self._ranks.leads

    def _take_first(self) -> None:
        try:
            self._lock = self._take()
        except OSError as error:
            raise InputError(
                f"result_dir {self.path} cannot be written ({error.strerror}): choose another --result_dir."
            ) from error
        cfg = self._cfg
        if not (cfg.resume or cfg.ckpt or cfg.force) and holds_run(self.path):
            self._give_back()
            raise FolderTaken(
                f"{self.path} holds a run already: give --resume to go on with it, --force to begin anew in its place, "
                "or another --result_dir."
            )

    def _check_shared(self, ranks: Ranks) -> None:
        """Refuse a folder that is not the same at all ranks.

        Raises:
            InputError: At all of them.
        """
        name = ranks.broadcast(f".shared_by_{os.getpid()}")
        if self._leads:
            with contextlib.suppress(OSError):  # a full disk is told of later
                (self.path / name).touch()
        ranks.barrier()
        seen = ranks.gather((socket.gethostname(), (self.path / name).exists()))
        if self._leads:
            (self.path / name).unlink(missing_ok=True)
        lacking = [f"rank {rank} ({host})" for rank, (host, is_there) in enumerate(seen) if not is_there]
        if lacking and seen[0][1]:
            self._give_back()
            raise InputError(
                f"result_dir {self.path} of rank 0 ({seen[0][0]}) is not that of {lacking[0]}: give a folder that all "
                "machines share."
            )

    def _take(self) -> FolderLock:
        self._make(self.path)
        lock = FolderLock(self.path)
        try:
            for name in FOLDERS:
                self._make(self.path / name)
        except OSError:
            lock.release()
            raise
        return lock

    def _make(self, folder: Path) -> None:
        if not folder.is_dir():
            folder.mkdir(parents=True)
            self._made.append(folder)

    def _give_back(self) -> None:
        """Release the lock; a run that has not begun leaves nothing."""
        if self._lock is None:
            return
        self._lock.release(remove=not self.has_begun)
        if not self.has_begun:
            for folder in reversed(self._made):
                with contextlib.suppress(OSError):  # not empty
                    folder.rmdir()

    def _write_options(self) -> None:
        write_file(self.path / OPTIONS, yaml.safe_dump(in_effect(asdict(self._cfg)), sort_keys=False))
