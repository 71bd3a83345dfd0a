"""What a run says and saves where an error ends it."""

from __future__ import annotations

import sys
from traceback import clear_frames, print_exception
from typing import TYPE_CHECKING

import torch

from distributed.levelling import HeldTwice
from distributed.mesh import RanksParted
from errors import InputError, NotSaved, TrainingStopped, counted
from offload.errors import sentence_of
from trainers import remedy, smaller_trainer
from training import ending
from training.commands import resume_command, smaller_command
from training.memory_estimate import Memory
from training.streams import loud

if TYPE_CHECKING:
    from training.run import TrainingRun

SAID = (TrainingStopped, InputError, RanksParted, HeldTwice)  # errors that are sentences for the user


def without_memory(run: TrainingRun, error: Exception) -> TrainingStopped | None:
    """Return the sentence for memory that ran out before the first step or in an evaluation; None for other errors."""

    def what_helps(memory: Memory) -> str:
        return remedy(run.trainer, run.cfg, run.beginning.lack(memory, ran_out=True))

    told = "" if isinstance(error, SAID) else ending.without_memory(error, what_helps)
    return TrainingStopped(told) if told else None


def stopped(run: TrainingRun, error: Exception) -> TrainingStopped:
    """Return the sentence for an error that ends training, with everything trained so far saved."""
    message, command = told_of(run, error)
    try:
        undo_step(run)
        return TrainingStopped(
            f"{message} The Gaussians are saved in {run.saving.at_the_end()}. Continue with: {command}"
        )
    except NotSaved as failure:
        return TrainingStopped(f"{message} {failure}")
    except Exception as failure:  # of whatever kind: the user gets the sentence
        return TrainingStopped(f"{message} The Gaussians could not be saved ({failure}).")


def undo_step(run: TrainingRun) -> tuple[int, bool]:
    """Forget the step that an error has ended, so that what is left can be saved.

    Returns:
        How many steps are done, and whether the last one was without the gradients of modules.

    Raises:
        RuntimeError: It has been applied in part.
    """
    run.model.undo_step()
    return run.model.steps_done, run.modules.complete_step(run.model.steps_done)


def told_of(run: TrainingRun, error: Exception) -> tuple[str, str]:
    """Return the sentence for an error that ends training, and the command to continue with."""
    command = resume_command(run.remedy)
    if isinstance(error, SAID):
        return sentence_of(error), command
    steps, ran_out = counted(run.model.steps_done, "step"), ending.memory_that_ran_out(error)
    if ran_out is None:
        print_exception(error, file=loud(sys.stderr))  # whoever mends it wants to see where
        return f"An error ended training after {steps}.", command
    clear_frames(error.__traceback__)  # which hold what the step had allocated
    if ran_out == "device":
        torch.cuda.empty_cache()
    lack = run.beginning.lack(ran_out, run.model.num_gaussians, ran_out=True)
    message = (
        f"{ran_out.capitalize()} memory ran out after {steps} with {run.model.num_gaussians:,} Gaussians: "
        f"{remedy(run.trainer, run.cfg, lack)}."
    )
    smaller = smaller_trainer(run.trainer, run.cfg, lack)
    return message, command if smaller is None else smaller_command(smaller, run.scene_name, run.given)
