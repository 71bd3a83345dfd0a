"""What a run goes on from: saved while it trains and at its end, and put in place again when it is resumed."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from configs import Config, in_effect
from distributed.dealing import dealt_rows
from distributed.mesh import Ranks
from errors import InputError, NotSaved, counted
from offload.adam.state import format_of, names_of_rows, num_gaussians_of, sh_degree_of
from offload.models.contract import GaussianModel
from training import schedules
from training.checkpoint_folder import CheckpointFolder, SaveSchedule
from training.checkpoints import Checkpoint, Part
from training.commands import resume_command
from training.dataset import Dataset, photos_of
from training.joined_rows import picked_state, whole
from training.measured import read_options
from training.options import shown
from training.roles import TOLD_WHEN_RESUMED
from training.strategy import has_effect
from training.trained_photos import with_photos_before

TOLD_APART = ("state",)  # an option that is told of by what a checkpoint holds


class Stateful(Protocol):
    """Stand for a part of a run that has a state of its own: densification, a strategy, a module with its optimizer.

    One whose state has rows of the Gaussians names these tensors in an attribute `rows_of_state`: other ranks have
    other rows of them.
    """

    def state_dict(self) -> Mapping[str, Tensor]:
        """Return everything that it goes on from, by name."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from such a state; its tensors are views of a file."""


class Saving:
    """Keep a run's checkpoints: each holds the state of the Gaussians and of every part, by name.

    Names of the Gaussians' tensors stand in the file as they are; those of a part begin with its name, as in
    "densification/count".
    """

    def __init__(
        self,
        cfg: Config,
        dataset: Dataset,
        checkpoints: CheckpointFolder,
        resumed: Checkpoint | None,
        ranks: Ranks | None = None,
    ) -> None:
        """
        Args:
            cfg: Options of the run.
            dataset: What is trained on.
            checkpoints: Where they lie.
            resumed: What training goes on from, as `checkpoint_to_resume` found it; None where it begins anew.
            ranks: Of whom this one trains a part of the Gaussians; None where it trains all.
        """
        self._cfg = cfg
        self._dataset = dataset
        self._checkpoints = checkpoints
        self._schedule = SaveSchedule(cfg.save_every)
        self._ranks = ranks
        self._model: GaussianModel | None = None
        self._parts: Mapping[str, Stateful] = {}
        self._began = time.perf_counter()  # earlier by what the run before had taken
        self._saved_steps = 0  # of the newest checkpoint; -1 where it could not be written
        self._failure: Exception | None = None  # why
        self.resumed = resumed  # until it is in place

    @property
    def elapsed_seconds(self) -> float:
        """Return the seconds that training has taken, pauses left out."""
        return time.perf_counter() - self._began

    @property
    def longest_stall(self) -> float:
        """Return the seconds that training has waited at most for a checkpoint."""
        return self._checkpoints.longest_stall

    def begin(self, model: GaussianModel, parts: Mapping[str, Stateful]) -> int:
        """Keep a model and parts from now on, and put the state that is resumed in place.

        Args:
            model: The Gaussians that are trained.
            parts: Whatever else has a state, by the name it has in checkpoints.

        Returns:
            The number of the first step.

        Raises:
            InputError: The checkpoint does not hold what the model and the parts need.
        """
        self._model, self._parts = model, parts
        checkpoint, self.resumed = self.resumed, None
        if checkpoint is not None:
            self._load(checkpoint)
        if self._ranks is not None:
            self._ranks.barrier()  # nobody reads any more what the first to save may drop
        self._schedule = SaveSchedule(self._cfg.save_every)  # time begins now
        return self._saved_steps

    def is_due(self, steps_done: int) -> bool:
        """Return whether a periodic checkpoint is due after so many steps, by this process's clock; ask once a step."""
        return self._schedule.is_due(steps_done)

    def after_step(self, steps_done: int, is_due: bool | None = None) -> None:
        """Save what is due; where that fails, say so and train on.

        Args:
            steps_done: So far.
            is_due: Whether a periodic checkpoint is, as the ranks have agreed; None: as `is_due` says.
        """
        if schedules.is_due(self._cfg, steps_done, self._cfg.save_steps):
            self._save(periodic=False)
        elif self.is_due(steps_done) if is_due is None else is_due:
            self._save(periodic=True)

    def now(self) -> None:
        """Save a periodic checkpoint; where that fails, say so and train on."""
        self._save(periodic=True)

    def look_at_failures(self) -> None:
        """Tell of a checkpoint that has not reached the disk since this was called last."""
        failure = self._checkpoints.failure()
        if failure is not None:
            self._has_failed(failure)

    def at_the_end(self) -> Path:
        """Make sure that all steps done are in a checkpoint on disk, and return its file.

        Raises:
            NotSaved: They cannot be.
        """
        checkpoints, steps_done = self._checkpoints, self._steps_done
        for _ in range(2):  # what has just failed may succeed in a folder that was made again
            if self._saved_steps != steps_done:
                self._save(periodic=True, is_last=True)
            failure = checkpoints.wait()
            if failure is not None:
                self._has_failed(failure, is_last=True)
        if self._saved_steps != steps_done:
            raise NotSaved(
                f"The Gaussians after {counted(steps_done, 'step')} could not be saved in {checkpoints.path} "
                f"({self._failure}): make room there or make it writable, and continue from the checkpoint "
                f"before, if there is one, with: {resume_command()}"
            )
        return checkpoints.path / f"ckpt_{steps_done}.pt"

    def on_disk(self) -> tuple[Path | None, bool]:
        """Return the checkpoint of most steps that is on disk, if any is, and whether it holds all steps done."""
        files = {file.stem.removeprefix("ckpt_"): file for file in self._checkpoints.path.glob("ckpt_*.pt")}
        steps = [int(number) for number in files if number.isdecimal()]
        if not steps:
            return None, False
        if self._saved_steps == self._steps_done and self._steps_done in steps:  # or another run has left it
            return files[str(self._steps_done)], True
        return files[str(max(steps))], False

    @property
    def _steps_done(self) -> int:
        return 0 if self._model is None else self._model.steps_done

    def _save(self, *, periodic: bool, is_last: bool = False) -> None:
        assert self._model is not None  # `begin` came before
        steps_done = self._steps_done
        parts = {
            f"{name}/{key}": value for name, part in self._parts.items() for key, value in part.state_dict().items()
        }
        elapsed = torch.tensor(self.elapsed_seconds, dtype=torch.float64)
        state = {**self._model.state(), **parts, "elapsed_seconds": elapsed}
        ranks = self._ranks
        checkpoint = Checkpoint(
            steps=steps_done,
            transform=self._dataset.scene.transform,
            state=state,
            options=asdict(self._cfg),
            periodic=periodic,
            photos=photos_of(self._dataset.scene),
            part=None if ranks is None else Part(ranks.rank, ranks.size, self._names_of_rows(state)),
        )
        checkpoint = with_photos_before(checkpoint, self._dataset.trained_before)
        try:
            self._checkpoints.save(checkpoint, self._model.copied_before_change())
            self._saved_steps = steps_done
        except OSError as error:
            self._has_failed(error, is_last=is_last)

    def _has_failed(self, error: Exception, *, is_last: bool = False) -> None:
        """Remember a failure, and tell of it; of the last checkpoint `NotSaved` tells."""
        self._saved_steps, self._failure = -1, error
        if is_last:
            return
        goes_on = self._steps_done < self._cfg.max_steps
        then = "Those before it are untouched, and training goes on." if goes_on else "It is written once more."
        tqdm.write(f"Warning: a checkpoint could not be written to {self._checkpoints.path} ({error}). {then}")

    def _names_of_rows(self, state: Mapping[str, Tensor]) -> list[str]:
        """Return the names of the tensors that have a row of each Gaussian, those of the parts too."""
        of_parts = (f"{name}/{key}" for name, part in self._parts.items() for key in getattr(part, "rows_of_state", ()))
        return names_of_rows(state) + [name for name in of_parts if name in state]

    # ------------------------------------------------------------------------------------------------------ resuming

    def own_state(self, checkpoint: Checkpoint) -> Mapping[str, Tensor]:
        """Return what this process goes on from: all of a checkpoint, or the rows that a rank gets of it.

        As many ranks as have written it go on with their own parts. Others, and those with other --shares, are dealt
        its rows anew, in the order of the parts.
        """
        if self._ranks is None:
            return checkpoint.state
        rank, size = self._ranks.rank, self._ranks.size
        if len(checkpoint.parts) == size and checkpoint.options.get("shares") == self._cfg.shares:
            return checkpoint.parts[rank].state
        ids = dealt_rows(num_gaussians_of(checkpoint.state), rank, self._ranks.proportions)
        return picked_state(checkpoint.state, self._names_of_rows(checkpoint.state), ids.numpy())

    def _load(self, checkpoint: Checkpoint) -> None:
        """Put a state in place: each part takes the tensors under its name, and the Gaussians the others."""
        assert self._model is not None  # `begin` came before
        state = dict(self.own_state(checkpoint))
        writers, readers = max(len(checkpoint.parts), 1), 1 if self._ranks is None else self._ranks.size
        if writers != readers:
            done = "are joined" if readers == 1 else f"are dealt to {readers} processes"
            print(f"The checkpoint was written by {counted(writers, 'rank')}: its Gaussians {done}.")
        view_has_changed = self._dataset.has_changed
        given = json.loads(json.dumps(asdict(self._cfg)))
        options_before = in_effect({**given, **checkpoint.options})
        for name, value in in_effect(given).items():
            before = options_before[name]
            if before != value and name in TOLD_WHEN_RESUMED and name not in TOLD_APART:
                if has_effect(name, self._cfg.strategy):
                    print(f"--{name} is now {shown(value)}; it was {shown(before)}.")
                view_has_changed = True
        before, now = format_of(state), getattr(self._cfg, "state", "float32")
        if before != now:  # the option may be missing, then or now
            rounds = " Values and moments are rounded to it once, now." if now == "compact" else ""
            print(f"The Gaussians are kept in the form {now} (--state) from now on; they were {before}.{rounds}")
            view_has_changed = True
        trained = {name.removesuffix("/names") for name in state if name.endswith("/names")}  # by modules
        for part_name in sorted(trained - {*self._parts}):
            print(f"Warning: what the checkpoint holds of {part_name} is dropped, since the options do not ask for it.")
        if view_has_changed:
            state = {key: value for key, value in state.items() if not key.startswith("upcoming/")}
        try:
            self._model.load_state(state)
            for part_name, part in self._parts.items():
                prefix = f"{part_name}/"
                part.load_state_dict(
                    {key.removeprefix(prefix): whole(value) for key, value in state.items() if key.startswith(prefix)}
                )
            self._began -= state["elapsed_seconds"].item()
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"The checkpoint of {counted(checkpoint.steps, 'step')} in {self._checkpoints.path} does not hold what "
                "resuming needs: move it away, or give another --result_dir."
            ) from error
        self._saved_steps = checkpoint.steps
        num_gaussians = num_gaussians_of(checkpoint.state)
        print(f"Resuming after {counted(checkpoint.steps, 'step')} with {counted(num_gaussians, 'Gaussian')}.")
        for option in ("max_gaussians", "target_gaussians"):
            bound = getattr(self._cfg, option)
            if 0 < bound < num_gaussians:
                print(f"These are more than --{option} {bound:,}: none are added, and none are removed for that.")


def checkpoint_to_resume(cfg: Config, checkpoints: CheckpointFolder) -> Checkpoint | None:
    """Return the checkpoint to go on from; None, with a sentence, where none has been written.

    Raises:
        InputError: None of those there are can be used, or it has harmonics of another degree; or none has been written
            by a run that began from a model, which the photos' points are not to stand for.
    """
    checkpoint = checkpoints.newest_valid(print)
    if checkpoint is None:
        begun_from = (read_options(checkpoints.path.parent) or {}).get("init_ckpt")
        if begun_from:
            raise InputError(
                f"{checkpoints.path} holds no checkpoint to resume from, and the run there began from a model: give "
                f"--init_ckpt {begun_from} in place of --resume to begin so again."
            )
        print(f"{checkpoints.path} holds no checkpoint to resume from: training starts from the beginning.")
        return None
    check_degree(checkpoint, cfg, "to resume from", "--result_dir")
    return checkpoint


def check_degree(checkpoint: Checkpoint, cfg: Config, which: str, other: str) -> None:
    """Refuse a checkpoint of which the options would leave harmonics out, or want more.

    Args:
        checkpoint: It.
        cfg: The options.
        which: It is, in the sentence.
        other: The option that names another one.

    Raises:
        InputError: With its degree.
    """
    degree = sh_degree_of(checkpoint.state)
    if degree != cfg.sh_degree:
        raise InputError(
            f"The checkpoint {which} has harmonics of degree {degree}: give --sh_degree {degree}, or another {other}."
        )
