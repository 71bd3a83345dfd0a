"""What the processes of a run do as one: they meet, agree around a step, and end together, of which one tells.

A process that trains alone asks nobody, and each method answers for it alone.

The group is left when all has been said, by `training.command_line`: with NCCL, leaving may wait for ever for ranks
that are gone. Between the end of training and there nothing calls a collective.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import astuple, dataclass
from pathlib import Path
from traceback import print_exception
from types import FrameType
from typing import NoReturn, TypeVar

import torch
from torch import Tensor

from configs import Config
from datasets.scene import Scene
from distributed.dealing import dealt_rows
from distributed.levelling import HeldTwice
from distributed.mesh import Ranks, RanksParted, Terminated, arrive, hear_sigterm, let_first_tell
from distributed.watch import End, Watch
from errors import EndedElsewhere, InputError, NotSaved, TrainingStopped, reason
from offload.errors import ParameterError, sentence_of
from trainers import Trainer
from training.agreement import check_same_dataset, check_same_options
from training.commands import resume_command
from training.ending import FAILED, NOT_BEGUN, Ending, without_memory, write_ending
from training.results import folder_of
from training.streams import loud, silent_output

T = TypeVar("T")
Standing = tuple[int, bool]  # steps done, and whether the last one was without the gradients of modules


@contextmanager
def told_once(kind: type[InputError]) -> Iterator[None]:
    """Let one process of each machine tell of an error that all have alike, before they can speak with each other.

    Raises:
        InputError: Again, at the first; and later at another one that is still there, since only it has the error.
    """
    try:
        yield
    except kind:
        let_first_tell()
        raise


@dataclass(frozen=True)
class Agreed:
    """Hold what ranks have agreed on for a step; one process asks nobody, and everything is false."""

    interrupted: bool = False  # training ends before the step
    is_due: bool = False  # a periodic checkpoint is saved after it
    is_lost: bool = False  # the result folder is made again after it
    is_watched: bool = False  # somebody looks at the model after it


class JointRun:
    """Let the processes of a run begin, agree and end as one.

    Attributes:
        ranks: The processes that train this model together; None: this one alone.
        device: Where views are rendered.
    """

    def __init__(self, given: Config, device: torch.device) -> None:
        """
        Args:
            given: The options as they were given.
            device: Kind of device to render on; once the ranks have met, the one that is this rank's.
        """
        self._given = given
        self.device = device
        self.ranks: Ranks | None = None
        self._watch: Watch | None = None

    @property
    def size(self) -> int:
        """Count the processes that train this model together, 1 where it is this one alone."""
        return 1 if self.ranks is None else self.ranks.size

    @property
    def speaks(self) -> bool:
        """Return whether this process tells the user what all of them do."""
        return self.ranks is None or self.ranks.leads

    # ----------------------------------------------------------------------------------------------------- they meet

    def meet(self, trainer: Trainer, resources: ExitStack) -> None:
        """Meet the other processes, if there are any.

        Args:
            trainer: Which trainer it is, with these options.
            resources: What the run closes at its end.

        Raises:
            InputError: The script or the options are not for so many, or not the same everywhere.
        """
        with told_once(ParameterError):
            arrival = arrive(self.device, self._given.shares)
        if arrival is None:
            return
        self._watch = resources.enter_context(Watch(arrival, self._last_words))
        resources.callback(self.release_sigterm)
        signal.signal(signal.SIGTERM, self._on_early_end)
        hear_sigterm()
        self._watch.wait_for_all()
        ranks = self.ranks = arrival.meet()
        resources.enter_context(silent_output(silent=not ranks.leads))  # rank 0 tells the same
        check_same_options(ranks, trainer.path.name, self._given)
        _check_for_several(self._given, trainer)
        self.device = ranks.device

    def _on_early_end(self, signal_number: int, frame: FrameType | None) -> None:
        """Leave what comes before the first step: torchrun sends SIGTERM, mostly where another rank has ended."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: this one is leaving
        raise Terminated(f"SIGTERM has come {'in the evaluation' if self._given.ckpt else 'before the first step'}")

    def release_sigterm(self) -> None:
        """Let SIGTERM end this process as it ends any: what comes before the first step is over, or the run is."""
        if signal.getsignal(signal.SIGTERM) == self._on_early_end:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def one_first(self) -> AbstractContextManager[None]:
        """Let the first process of each machine do something before the others, which then find it done."""
        return nullcontext() if self.ranks is None else self.ranks.one_first()

    def check_same_dataset(self, scene: Scene) -> None:
        """Refuse ranks whose dataset folders differ.

        Raises:
            InputError: At every rank.
        """
        if self.ranks is not None:
            check_same_dataset(self.ranks, scene)

    def own_rows(self, gaussians: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the rows [M, ...] that this rank holds at first of the Gaussians [N, ...] of all."""
        if self.ranks is None:
            return gaussians
        own = dealt_rows(len(gaussians["means"]), self.ranks.rank, self.ranks.proportions)
        return {name: value[own] for name, value in gaussians.items()}

    # ---------------------------------------------------------------------------------------------------- they agree

    def load_and_agree(self, load: Callable[[], T], wishes: Callable[[], Agreed]) -> tuple[T, Agreed]:
        """Load what each rank needs for the next step, which none has begun, and ask what all do around it.

        Args:
            load: Gives what this rank needs.
            wishes: Says what this rank would do; it is done where any rank would.

        Raises:
            Exception: Some rank cannot load.
        """
        if self.ranks is None:
            return load(), Agreed()
        loaded: list[T] = []
        failure: Exception | None = None
        try:
            loaded.append(load())
        except Exception as error:
            failure = error
        failed, *agreed = self.ranks.any_of([failure is not None, *astuple(wishes())])
        if failure is not None:
            raise failure
        if failed:
            raise RanksParted("another rank has no picture")
        return loaded[0], Agreed(*agreed)

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean over the ranks of a tensor on the device, which has no gradient."""
        return value if self.ranks is None else self.ranks.mean(value)

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks; small ones."""
        return [value] if self.ranks is None else self.ranks.gather(value)

    def wait_for_all(self) -> None:
        """Wait until all ranks are here."""
        if self.ranks is not None:
            self.ranks.barrier()

    # ------------------------------------------------------------------------------------------------------ they end

    @contextmanager
    def ending_together(self) -> Iterator[None]:
        """Let an error of one rank be the end of all, of which one rank tells.

        Raises:
            EndedElsewhere: Another rank does.
        """
        try:
            yield
        except Exception as error:
            if self._watch is None:
                raise
            end = self._end_of(error, sentence_of(error))
            if end.told_by != self._watch.rank:
                raise EndedElsewhere(end.sentence) from error
            if isinstance(error, RanksParted | Terminated):
                raise TrainingStopped(f"{end.sentence}.") from error
            if isinstance(error, InputError | TrainingStopped):
                raise
            if told := without_memory(error):
                raise TrainingStopped(told) from error
            print_exception(error, file=loud(sys.stderr))  # whoever mends it wants to see where
            raise TrainingStopped(f"An error has ended this process ({reason(error)}).") from error
        except KeyboardInterrupt as interrupt:
            self.stop_at_once(interrupt, NOT_BEGUN)

    def stop_at_once(self, interrupt: KeyboardInterrupt, sentence: str) -> NoReturn:
        """Let all ranks end where Ctrl-C has ended this one.

        Raises:
            KeyboardInterrupt: With the sentence, which this rank tells.
            EndedElsewhere: Another rank tells.
        """
        if self._watch is not None:
            end = self._end_of(interrupt, sentence)
            if end.told_by != self._watch.rank:
                raise EndedElsewhere(end.sentence) from interrupt
        raise KeyboardInterrupt(sentence) from interrupt

    def stopped(
        self, error: Exception, message: str, command: str, undo_step: Callable[[], Standing], save: Callable[[], Path]
    ) -> TrainingStopped:
        """End as all ranks do, after an error at one of them; return what this one says.

        Where all stand after the same step, the Gaussians are saved.

        Args:
            error: Of this rank, or that another one has left.
            message: The sentence on it.
            command: To continue with.
            undo_step: Forgets the step that the error has ended, and returns where this process stands then.
            save: Saves them and returns where.
        """
        assert self._watch is not None  # only ranks end together
        end = self._end_of(error, message)
        resume = f"Continue with: {command}"
        cannot_save = end.is_gone or isinstance(error, HeldTwice)
        if isinstance(error, NotSaved) and not cannot_save:
            self._watch.all_stand_at([])  # others may ask
            outcome = ""  # the error has said it
        else:
            outcome = resume if cannot_save else _saved_together(self._watch, command, undo_step, save)
        if end.told_by != self._watch.rank:
            return EndedElsewhere(end.sentence)
        if not outcome:
            return TrainingStopped(end.sentence)
        return TrainingStopped(f"{end.sentence.rstrip('.')}. {outcome}")

    def _end_of(self, error: BaseException, sentence: str) -> End:
        """Return why all ranks end, after this one has met an error; others that wait for it wait no more."""
        assert self._watch is not None
        if signal.getsignal(signal.SIGTERM) == self._on_early_end:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # this one is leaving by itself
        if isinstance(error, RanksParted | Terminated):
            end = self._watch.end_by_others(error)
        else:
            end = self._watch.end_by(sentence)
        if end.told_by == self._watch.rank:  # torchrun sends it as soon as another rank has left, before this one tells
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self.device.type == "cpu" and self.ranks is not None:
            self.ranks.leave()  # gloo's connections close at once; with NCCL the watch ends those that wait
        return end

    def _last_words(self, sentence: str) -> None:
        """Tell why the ranks end, where this process cannot leave by itself."""
        ending = Ending(FAILED, f"Stopped: {sentence}. Continue with: {resume_command()}")
        print(ending.message, file=loud(sys.stderr), flush=True)
        write_ending(folder_of(self._given), ending)


def _check_for_several(cfg: Config, trainer: Trainer) -> None:
    """Refuse what one process alone can do.

    Raises:
        InputError: At every rank.
    """
    if not trainer.several_gpus:
        raise InputError(
            f"{trainer.path.name} trains on one GPU: start it without torchrun, or take "
            "simple_trainer_hybrid_streamed.py."
        )


def _saved_together(watch: Watch, command: str, undo_step: Callable[[], Standing], save: Callable[[], Path]) -> str:
    """Save the Gaussians of all ranks after an error, and return the sentence that says so, or why not."""
    try:
        standing = list(undo_step())
    except Exception:  # applied in part, which no checkpoint can hold
        standing = []
    try:
        if not watch.all_stand_at(standing) or not standing:
            return (
                "The ranks have not ended after the same step, so the Gaussians are not saved: continue from the "
                f"checkpoint before, if there is one, with: {command}"
            )
        return f"The Gaussians are saved in {save()}. Continue with: {command}"
    except NotSaved as failure:
        return str(failure)
