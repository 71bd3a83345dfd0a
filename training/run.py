"""What surrounds every training loop: scene, views, the order of steps, and the way to stop."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Generic

import torch
from torch import Tensor
from tqdm import tqdm

from configs import AnyConfig
from datasets.loader import BatchLoader, training_loader
from datasets.scene import Scene
from datasets.synthetic import ensure_city_block
from errors import InputError, NotSaved, TrainingStopped, counted, heard_signals, telling_unreadable
from offload.adam.options import AdamOptions
from offload.culling.cameras import Cameras
from offload.errors import ParameterError
from offload.models.contract import GaussianModel
from rendering.rasterize import check_gsplat
from strategies.contract import Strategy
from trainers import Trainer
from training import schedules, stopping
from training.beginning import Beginning
from training.blank import BlankPictures
from training.checkpoints import Checkpoint, load_checkpoint
from training.commands import resume_command
from training.dataset import load_dataset
from training.depth_loss import known_depths
from training.drawing import Drawing
from training.ending import FINISHED, INTERRUPTED, NOT_BEGUN, Ending
from training.joint_run import Agreed, JointRun, told_once
from training.joint_viewing import OtherRank
from training.live import LiveViewer
from training.memory import limit_fragmentation
from training.modules import RunModules
from training.options import check_options
from training.pose_files import PoseFiles, tell_of_old_poses
from training.profiling import profiled_steps
from training.reporting import (
    Evaluation,
    Export,
    Observer,
    ProgressBar,
    Result,
    TensorBoardLog,
    TrainStatistics,
    is_looked_at,
)
from training.results import ResultFolder
from training.saving import Saving, check_degree, checkpoint_to_resume
from training.stages import StageTimes
from training.starting_model import StartingModel
from training.strategy import strategy_of, unused_rules
from training.timelapse import Timelapse
from training.views import Backdrop, View

MOST_SKIPPED_STEPS = 10  # in a row; then training stops


def check_device(name: str) -> None:
    """Refuse CUDA where it is not there.

    Raises:
        InputError: It was asked for.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda was given, but torch finds no CUDA GPU: use --device cpu or auto.")


def select_device(name: str) -> torch.device:
    """Return the device to train on, checked to be usable.

    Raises:
        InputError: CUDA was asked for and is not there, or gsplat cannot be used on it.
    """
    check_device(name)
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    limit_fragmentation()
    check_gsplat()
    return torch.device("cuda", 0)  # with an index, or torch looks at each call for a stream which one is meant


class TrainingRun(Generic[AnyConfig]):
    """Run one trainer on one scene; as a context manager leave everything written and closed.

    Attributes:
        cfg: The options, with steps_scaler applied.
        given: The options as they were given.
        scene_name: What is trained on, as the command line calls it.
        trainer: Which trainer it is, with these options.
        said_of_input: Sentences on what is used of the dataset, and what is not.
        device: Where views are rendered.
        ranks: The processes that train this model together; None: this one alone.
        scene: The dataset, in normalized coordinates.
        scene_scale: Extent of the cameras in world units, with gsplat's margin of 10 %.
        times: Stage times; the trainer marks its stages.
        results: The folder that receives everything.
        saving: What the run goes on from.
        beginning: The Gaussians that it begins with, and the memory that there was for them.
        modules: What is trained beside the Gaussians.
        drawing: Makes pictures of the model, from `steps` on.
        observers: Who is told of every step; append to it before `steps`.
        view: While `steps` runs, the view of the present step.
        upcoming: While `steps` runs, the view of the step after the present one; None at the last, and where
            the strategy will change rows before it, or the present step its cameras.
        agreed: What the ranks have agreed on for the present step.
        sh_degree: Degree of the spherical harmonics that the present step uses.
        strategy: What changes the number of Gaussians; None before `steps`.
        ending: How the run has ended, for programs.
        remedy: Values of options with which to go on, where one that was given has ended it.
    """

    def __init__(self, given: AnyConfig, scene_name: str, trainer: Trainer) -> None:
        """Check everything and load the scene; nothing expensive happens before all input has been checked.

        Args:
            given: Options.
            scene_name: "demo" makes its dataset on first use.
            trainer: Which trainer it is, with these options.

        Raises:
            InputError: Something in the options, the dataset or the machine cannot be used.
        """
        self.given = given
        self.scene_name = scene_name
        self.trainer = trainer
        with told_once(InputError):
            check_options(given)
            self._joint = JointRun(given, select_device(given.device))
        self.cfg = cfg = given.with_scaled_steps()
        self.said_of_input: list[str] = []
        with ExitStack() as resources, self._joint.ending_together(), telling_unreadable():
            self._joint.meet(trainer, resources)
            self.ranks, self.device = self._joint.ranks, self._joint.device
            if not cfg.ckpt and (unused := unused_rules(given)):
                print(unused)
            self._evaluated: Checkpoint | None = load_checkpoint(Path(cfg.ckpt)) if cfg.ckpt else None
            if self._evaluated is not None:
                check_degree(self._evaluated, cfg, "of --ckpt", "--ckpt")
            starting = StartingModel.load(Path(cfg.init_ckpt)) if cfg.init_ckpt else None
            torch.manual_seed(cfg.seed)
            self.results = ResultFolder(given, self.ranks)
            resources.callback(self.results.close)
            is_shown = cfg.viewer is not None
            self._live = live = LiveViewer(cfg) if is_shown and self.speaks else None
            if live is not None:
                resources.callback(live.page.close)
            resumed = checkpoint_to_resume(cfg, self.results.checkpoints) if cfg.resume else None
            if resumed is not None:  # what is written names the model that the run began from, as before
                self.cfg = cfg = replace(cfg, init_ckpt=str(resumed.options.get("init_ckpt", "")))
                self.results.name_beginning(cfg.init_ckpt)
            with self._joint.one_first():  # pictures are scaled once
                if scene_name == "demo":
                    ensure_city_block(Path(cfg.data_dir))
                dataset = load_dataset(
                    cfg,
                    self._evaluated or resumed,
                    self._say_of_input,
                    None if starting is None else starting.checkpoint,
                )
            self.scene: Scene = dataset.scene
            if live is not None:
                live.place(self.scene)
                print(f"Watch the training at {live.page.url}.")
            self._joint.check_same_dataset(self.scene)
            starting_gaussians = None if starting is None else starting.placed(self.scene.transform, cfg, print)
            are_trained = resumed is None or resumed.steps < cfg.max_steps
            self.modules = RunModules(cfg, self.scene, self.device, self.ranks, are_trained=are_trained)
            self.drawing = Drawing(cfg, self.modules, self.device, self.ranks)
            if self._evaluated is not None:
                self.modules.load_evaluated(self._evaluated, cfg, self.scene)
            self._evaluation = Evaluation(cfg, self.device)
            self.saving = Saving(cfg, dataset, self.results.checkpoints, resumed, self.ranks)
            self.beginning = Beginning(
                cfg,
                self.scene,
                trainer,
                self._joint,
                saving=self.saving,
                evaluated=self._evaluated,
                given=starting_gaussians,
                modules_bytes=self.modules.nbytes,
            )
            self._resources = resources.pop_all()  # which an error above closes
        self.scene_scale = schedules.SCALE_MARGIN * self.scene.scene_scale
        self.times = StageTimes(self.device)
        self._timelapse = Timelapse()
        self._results: tuple[Result, ...] = (
            self._timelapse, TrainStatistics(), Export(), PoseFiles(), self._evaluation,
        )  # fmt: skip
        self.observers: list[Observer] = ([OtherRank()] if live is None else [live]) if is_shown else []
        self.view: View | None = None
        self.upcoming: View | None = None
        self.sh_degree = 0
        self._num_gaussians = 0  # of all ranks
        self._changes_rows_after: Callable[[int], bool] = lambda step: False
        self.ending = Ending(FINISHED)
        self.remedy: Mapping[str, str] = {}
        self.strategy: Strategy | None = None
        self._model: GaussianModel | None = None
        self._step = 0
        self._first_step = 0
        self._skipped_steps = 0
        self._depth_share: float | Tensor = 1.0
        self._interrupted = False
        self.agreed = Agreed()

    def _say_of_input(self, sentence: str) -> None:
        print(sentence)
        self.said_of_input.append(sentence)

    @property
    def num_ranks(self) -> int:
        """Count the processes that train this model together, 1 where it is this one alone."""
        return self._joint.size

    @property
    def speaks(self) -> bool:
        """Return whether this process tells the user what all of them do."""
        return self._joint.speaks

    # --------------------------------------------------------------------------------------- what a trainer starts with

    @property
    def num_initial_gaussians(self) -> int:
        """Count the Gaussians that training starts with, at all ranks."""
        return self.beginning.num_gaussians

    def initial_gaussians(self) -> dict[str, Tensor]:
        """Return the Gaussians that training starts with, as `training.beginning.Beginning.gaussians`."""
        return self.beginning.gaussians()

    @property
    def adam(self) -> AdamOptions:
        """Say how Adam updates the Gaussians: as one process does with the views of all ranks."""
        return schedules.adam_options(replace(self.cfg, batch_size=self.views_per_step), self.scene_scale)

    @property
    def views_per_step(self) -> int:
        """Count the views of a step, of all ranks."""
        return self.cfg.batch_size * self.num_ranks

    def new_strategy(self) -> Strategy:
        """Return the strategy that the options choose, as it is before the first step."""
        return strategy_of(self.cfg, self.scene_scale, self.ranks)

    @property
    def standing(self) -> str:
        """Return the sentence where Ctrl-C ends the run at once, or what comes after it: what is on disk."""
        if self._evaluated is not None:
            return f"Stopped: {self._evaluation.standing}."
        if self._model is None:
            return NOT_BEGUN
        file, holds_all = self.saving.on_disk()
        if file is None:
            return "Stopped at once, without saving."
        return f"Stopped at once{'; saved' if holds_all else ', without saving what came after'} {file}"

    # -------------------------------------------------------------------------------------------------------- the steps

    @property
    def model(self) -> GaussianModel:
        """Return the Gaussians that `steps` was given."""
        if self._model is None:
            raise RuntimeError("a run has no model before `steps`")
        return self._model

    @property
    def num_gaussians(self) -> int:
        """Count the Gaussians of all ranks."""
        return self.model.num_gaussians if self.ranks is None else self._num_gaussians

    @property
    def last_step(self) -> int:
        """Return the step that all its figures lead up to; of an evaluation, how many the checkpoint has had."""
        return self.cfg.max_steps if self._evaluated is None else self._evaluated.steps

    @property
    def steps_of_this_run(self) -> int:
        """Count the steps done since it was started or resumed."""
        return self.model.steps_done - self._first_step

    @property
    def is_interrupted(self) -> bool:
        """Tell whether training has been asked to stop after the present step."""
        return self._interrupted

    def end_as_interrupted(self) -> None:
        """End after what is under way, which the ranks have left together."""
        self.agreed = replace(self.agreed, interrupted=True)

    def mark(self, stage: str) -> None:
        """End a stage of the present step, which began at the mark before."""
        self.times.mark(stage)

    def steps(
        self,
        model: GaussianModel,
        strategy: Strategy,
        draw: Callable[[Cameras, bool], Tensor] | None = None,
    ) -> Iterator[tuple[int, View]]:
        """Yield the step numbers and the view of each, until max_steps or Ctrl-C; from 0 or where it stopped before.

        With --ckpt evaluate the model and yield nothing.

        Args:
            model: The Gaussians that are trained.
            strategy: What changes their number.
            draw: Makes the picture [1, H, W, 3] of one camera from them, for evaluation, with a fourth channel for
                depth where it is told so; None: all rows at once.
        """
        self._model, self.strategy = model, strategy
        self.drawing.begin(model, draw)
        self._changes_rows_after = strategy.changes_rows_after
        self._count_gaussians()
        if self._evaluated is not None:
            self._begin(None)
            self._evaluation.evaluate(self, self._evaluated.steps)
            self._evaluation.record_video(self, self._evaluated.steps)
            self.results.check_none_missed()
            return
        self._joint.release_sigterm()
        for number in heard_signals():
            self._resources.callback(self._give_back, number, signal.signal(number, self._on_interrupt))
        first = self._first_step = self.saving.begin(model, {strategy.name: strategy, **self.modules.parts})
        self.modules.begin_at(first)
        is_over = first >= self.cfg.max_steps
        if is_over:
            tqdm.write(f"All {self.cfg.max_steps:,} steps are done: raise --max_steps to train on.")
        self._begin(None if is_over else first)
        for result in self._results if first > 0 else ():
            result.make_missing(self, first)
        if self.agreed.interrupted:
            self._end_interrupted()
            return
        if is_over:
            self._finish()
            return
        loader = self._resources.enter_context(
            training_loader(
                self.scene,
                self.scene.train_ids,
                batch_size=self.cfg.batch_size,
                seed=self.cfg.seed,
                view_window=self.cfg.view_window,
                start_step=first,
                rank=0 if self.ranks is None else self.ranks.rank,
                num_ranks=self.num_ranks,
                num_workers=self.cfg.num_workers or None,
                pin_memory=self.device.type == "cuda",
                keep_bytes=self.beginning.keep_bytes,
            )
        )
        bar = tqdm(
            total=self.cfg.max_steps, initial=first, desc="train", unit="step", dynamic_ncols=True,
            disable=not self.speaks,
        )  # fmt: skip
        self._resources.enter_context(bar)
        if self.speaks:
            self.observers += [ProgressBar(bar), BlankPictures(), TensorBoardLog()]
        self.observers += self._results
        self._step = first - 1
        following = self._following(loader)
        step_done = self._resources.enter_context(
            profiled_steps(self.cfg.profile, self.results.path / "profile", self.device)
        )
        for step in range(first, self.cfg.max_steps):
            self._step, self.sh_degree = step, schedules.sh_degree(self.cfg, step)
            self.times.start()
            view, following = following, None
            assert view is not None  # there is one for each step
            if self.upcoming is None:
                view = self.modules.placed(view)
            following = self._following(loader)
            if self.agreed.interrupted:
                self._end_interrupted()
                return
            self.upcoming = None
            if following is not None and not strategy.changes_rows_after(step):
                self.upcoming = self.modules.placed_ahead(following, view)
            following = self.upcoming or following
            self.times.mark("load")
            self.view = view
            self.modules.begin_step(view)
            self._depth_share = self._share_of_depths(view)
            yield step, view
            self.view = None
            del view
            step_done()
            if self.agreed.interrupted or (self._interrupted and self.ranks is None):
                self._end_interrupted()
                return
        self._finish()

    def _following(self, loader: BatchLoader) -> View | None:
        """Return the view of the next step, None behind the last; where ranks train together, when all have theirs."""

        def load() -> View | None:
            return View.from_batch(next(loader), self.cfg, self.device) if self._step + 1 < self.cfg.max_steps else None

        def wishes() -> Agreed:
            is_due = self.speaks and self.saving.is_due(self._step + 1)
            is_watched = self._live is not None and self._live.page.is_watched
            return Agreed(self._interrupted, is_due, self.speaks and self.results.is_lost(), is_watched)

        view, self.agreed = self._joint.load_and_agree(load, wishes)
        return view

    def _finish(self) -> None:
        saved = self.saving.at_the_end()
        if not self._timelapse.make_video(self):
            self._tell_interrupted(saved)
        self._joint.wait_for_all()  # whoever waits for others has what it waits for
        self.results.check_none_missed()

    def _end_interrupted(self) -> None:
        saved = self.saving.at_the_end()
        self._timelapse.make_video(self)
        self._tell_interrupted(saved)
        self._joint.wait_for_all()

    def _tell_interrupted(self, saved: Path) -> None:
        sentence = f"Interrupted after {counted(self.model.steps_done, 'step')}; saved {saved}"
        self.ending = Ending(INTERRUPTED, sentence)
        tqdm.write(f"{sentence}\nContinue with:\n{resume_command()}")

    def _begin(self, first_step: int | None) -> None:
        """Let the run write to its folder, as `ResultFolder.begin`, and tell what it leaves there as it is."""
        try:
            self.results.begin(first_step)
        except OSError as error:
            raise InputError(
                f"result_dir {self.results.path} cannot be written ({error.strerror}): choose another --result_dir."
            ) from error
        tell_of_old_poses(self)

    def backgrounds(self, view: View) -> Tensor | Backdrop | None:
        """Return what is behind the view of the present step, as `training.views.render` takes it."""
        return self.drawing.backgrounds(view, self._step)

    @property
    def depth_weight(self) -> float | Tensor:
        """Return the weight that this rank's mean difference of inverse depths, which are in world units, has."""
        return self.cfg.depth_lambda * self.scene_scale * self._depth_share

    def _share_of_depths(self, view: View) -> float | Tensor:
        """Return how many depths a view knows, by the mean of all ranks: its own mean counts by their number."""
        if self.ranks is None or view.inverse_depths is None:
            return 1.0
        count = known_depths(view).sum().float()
        return count / self.ranks.mean(count).clamp(min=1 / self.ranks.size)

    def after_step(self, step: int, loss: Tensor) -> None:
        """Update the modules, save what is due after a step, and tell the observers of it.

        Args:
            step: Its number, from 0.
            loss: Scalar.
        """
        self.modules.update()
        if is_looked_at(step + 1, self.cfg.max_steps):
            self._look_at_skipped_steps()
        if self.ranks is None:
            is_new, is_due = self.results.make_again(), None
        else:
            is_new, is_due = self.agreed.is_lost and self.results.make_again(), self.agreed.is_due
        if is_new:
            self.saving.now()
        self.saving.after_step(step + 1, is_due)
        loss = self._joint.mean(loss.detach())
        if self._changes_rows_after(step):
            self._count_gaussians()
        for observer in self.observers:
            observer.after_step(self, step + 1, loss)
        self.saving.look_at_failures()

    def _count_gaussians(self) -> None:
        """Count the Gaussians of all ranks, which call this at once."""
        self._num_gaussians = sum(self._joint.gather(self.model.num_gaussians))

    def _look_at_skipped_steps(self) -> None:
        skipped, in_a_row = max(self._joint.gather(self.model.skipped_steps()))  # a rank that sees nothing cannot tell
        if in_a_row >= MOST_SKIPPED_STEPS:
            raise TrainingStopped(
                f"The gradients of the last {in_a_row} steps were not finite, so nothing is learned any more: look at "
                "the pictures, or lower the learning rates."
            )
        if skipped > self._skipped_steps:
            tqdm.write(f"Warning: {skipped} steps so far had gradients that were not finite; they were skipped.")
        self._skipped_steps = skipped

    # ---------------------------------------------------------------------------------------------------------- the end

    def __enter__(self) -> TrainingRun[AnyConfig]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, ParameterError | TrainingStopped):
            self.remedy = error.remedy
        with self._resources:
            # Whatever ends training, what has been trained is saved; only a second Ctrl-C does not wait for that.
            if isinstance(error, KeyboardInterrupt) and self.ranks is not None:  # else told when all is closed
                self._joint.stop_at_once(error, self.standing)
            if not isinstance(error, Exception):
                return
            if self._evaluated is not None or not self.results.has_begun or self.model.steps_done == 0:
                without_memory = stopping.without_memory(self, error)
                with self._joint.ending_together():
                    if without_memory is not None:
                        raise without_memory from error
                    raise error
            if self.ranks is not None:
                message, command = stopping.told_of(self, error)
                undo_step, save = partial(stopping.undo_step, self), self.saving.at_the_end
                raise self._joint.stopped(error, message, command, undo_step, save) from error
            if not isinstance(error, NotSaved):
                raise stopping.stopped(self, error) from error

    def _give_back(self, number: signal.Signals, handler: Callable | int | None) -> None:
        """Let a signal do what it did before `steps`, unless it is ignored since, as ranks end."""
        if signal.getsignal(number) == self._on_interrupt:
            signal.signal(number, handler)

    def _on_interrupt(self, signal_number: int, frame: FrameType | None) -> None:
        if self._interrupted and signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        self._interrupted = True
        if self.ranks is not None and signal_number == signal.SIGTERM:
            return  # by torchrun, where another rank has ended: that one tells
        tqdm.write("Stopping after this step; press Ctrl-C again to stop at once without saving.")
