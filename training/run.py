"""What surrounds every training loop: scene, views, evaluation, saving, the log and the way to stop."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from traceback import clear_frames, print_exception
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from configs import Config
from datasets.loader import evaluation_loader, training_loader
from datasets.scene import Scene, load_scene
from datasets.synthetic import ensure_city_block
from errors import InputError
from offload.adam.state import sh_degree_of
from offload.culling.cameras import Cameras
from offload.models.contract import GaussianModel
from offload.pipelines.contract import Counters
from offload.store.morton import morton_order
from rendering.rasterize import check_gsplat
from training.checkpoint_folder import SaveSchedule
from training.checkpoints import Checkpoint, load_checkpoint
from training.command_line import resume_command, smaller_command
from training.densification import Densification, TrainingStopped
from training.evaluation import evaluate, load_lpips, synchronize
from training.gaussians import PARAMETER_NAMES, initial_gaussians
from training.memory import allocated_bytes, format_bytes, limit_fragmentation, peak_bytes
from training.memory_estimate import Footprint, check_memory, needs, share_in_largest_view
from training.per_step import PerStep
from training.profiling import SKIPPED_STEPS, WARM_UP_STEPS, profiled_steps
from training.results import ResultFolder
from training.stages import StageTimes
from training.video import record_flight
from training.views import View

# Options that say where a run finds and leaves things and what it reports, not what it computes.
OPTIONS_OF_THE_PLACE = (
    *("data_dir", "result_dir", "device", "resume", "save_every", "keep"),
    *("num_workers", "log_every", "profile", "video"),
)
MOST_SKIPPED_STEPS = 10  # in a row; then training stops


class NotSaved(TrainingStopped):
    """Training has come to an end that could not be saved."""


def select_device(name: str) -> torch.device:
    """The device to train on, checked to be usable.

    Raises:
        InputError: CUDA was asked for and is not there, or gsplat cannot be used on it.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda was given, but torch finds no CUDA GPU: use --device cpu or auto.")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    limit_fragmentation()
    check_gsplat()
    return torch.device("cuda")


class TrainingRun:
    """One run of one trainer on one scene; a context manager that leaves everything written and closed.

    Attributes:
        cfg: The options, with steps_scaler applied.
        device: Where views are rendered.
        scene: The dataset, in normalized coordinates.
        scene_scale: Extent of the cameras in world units, with gsplat's margin of 10 %.
        times: Stage times; the trainer marks its stages.
        upcoming: While `steps` runs, the view of the step after the present one; None at the last.
    """

    def __init__(self, cfg: Config, scene_name: str) -> None:
        """Check everything and load the scene; nothing expensive happens before all input has been checked.

        Args:
            cfg: Options.
            scene_name: "demo" makes its dataset on first use.

        Raises:
            InputError: Something in the options, the dataset or the machine cannot be used.
        """
        self.cfg = cfg.with_scaled_steps()
        check_options(self.cfg)
        self.device = select_device(cfg.device)
        self._checkpoint_to_evaluate = load_checkpoint(Path(cfg.ckpt)) if cfg.ckpt else None
        torch.manual_seed(cfg.seed)
        self._results = ResultFolder(cfg)
        if scene_name == "demo":
            ensure_city_block(cfg.data_dir)
        self.scene: Scene = load_scene(
            cfg.data_dir,
            data_factor=cfg.data_factor,
            test_every=cfg.test_every,
            test_after=cfg.test_after,
            init_ply=cfg.init_ply,
            num_workers=cfg.num_workers or None,
        )
        self.scene_scale = 1.1 * self.scene.scene_scale
        self._lpips = load_lpips(cfg.lpips_net, self.device)
        self.times = StageTimes(self.device)
        self._resources = ExitStack()
        self._resources.callback(self._results.close)
        if not cfg.ckpt:
            self._results.checkpoints.remove_unfinished()
        self._resumed = self._checkpoint_to_resume() if cfg.resume else None
        self._model: GaussianModel | None = None
        self._step = 0
        self._first_step = 0
        self._traffic_per_step = PerStep()
        self._offload_per_step = PerStep()
        self._saved_steps = 0
        self._save_failure: Exception | None = None
        self._skipped_steps = 0
        self._interrupted = False
        self._begin = time.perf_counter()

    def check_memory(self, footprint: Footprint, largest_part: float = 1.0) -> None:
        """Print what training will take of host and device memory.

        Args:
            footprint: Of the trainer.
            largest_part: Share of the Gaussians above which a view is rendered in parts.

        Raises:
            InputError: It does not fit, with the option to change.
        """
        if self._checkpoint_to_evaluate is not None:
            return
        share = min(share_in_largest_view(self.scene, self.cfg.batch_size), largest_part)
        num_pixels = self.cfg.batch_size * max(camera.width * camera.height for camera in self.scene.cameras)
        resumed = self._resumed
        num_gaussians = len(self.scene.points if resumed is None else resumed.state["parameters/means"])
        all_needs = needs(footprint, share, num_pixels, self.device)
        print(check_memory(all_needs, num_gaussians, self.cfg.max_gaussians))

    def initial_gaussians(self) -> dict[str, Tensor]:
        """One Gaussian per point of the scene, in Morton order; those of the checkpoint, where there is one."""
        if self._checkpoint_to_evaluate is not None:
            return self._checkpoint_to_evaluate.gaussians
        if self._resumed is not None:
            return {name: self._resumed.state[f"parameters/{name}"] for name in PARAMETER_NAMES}
        order = morton_order(torch.from_numpy(self.scene.points)).numpy()
        return initial_gaussians(
            self.scene.points[order],
            self.scene.points_rgb[order],
            sh_degree=self.cfg.sh_degree,
            init_opacity=self.cfg.init_opacity,
            init_scale=self.cfg.init_scale,
            seed=self.cfg.seed,
        )

    def steps(
        self, model: GaussianModel, densification: Densification, draw: Callable[[Cameras], Tensor]
    ) -> Iterator[tuple[int, View]]:
        """The step numbers and the view of each, until max_steps or Ctrl-C; from 0 or, with --resume, where it stopped.

        Args:
            model: The Gaussians that are trained, for saving and resuming.
            densification: The same.
            draw: Makes the picture [1, H, W, 3] of one camera from them, for evaluation.
        """
        self._model, self._densification, self._draw = model, densification, draw
        for number in (signal.SIGINT, signal.SIGTERM):
            self._resources.callback(signal.signal, number, signal.signal(number, self._on_interrupt))
        first = self._first_step = self._load_resumed()
        self._schedule = SaveSchedule(self.cfg.save_every)
        if first >= self.cfg.max_steps:
            tqdm.write(f"All {self.cfg.max_steps} steps are done: raise --max_steps to train on.")
            return
        loader = self._resources.enter_context(
            training_loader(
                self.scene,
                self.scene.train_ids,
                batch_size=self.cfg.batch_size,
                seed=self.cfg.seed,
                view_window=self.cfg.view_window,
                start_step=first,
                num_workers=self.cfg.num_workers or None,
                pin_memory=self.device.type == "cuda",
            )
        )
        self._bar = self._resources.enter_context(
            tqdm(total=self.cfg.max_steps, initial=first, desc="train", unit="step", dynamic_ncols=True)
        )
        self.upcoming = View.from_batch(next(loader), self.cfg, self.device)
        step_done = self._resources.enter_context(
            profiled_steps(self.cfg.profile, self._results.path / "profile", self.device)
        )
        for step in range(first, self.cfg.max_steps):
            self._step = step
            self.times.start()
            view = self.upcoming
            self.upcoming = (
                View.from_batch(next(loader), self.cfg, self.device) if step + 1 < self.cfg.max_steps else None
            )
            self.times.mark("load")
            yield step, view
            step_done()
            if self._interrupted:
                tqdm.write(f"Interrupted after {model.steps_done} steps; saved {self._save_at_the_end()}")
                tqdm.write(f"Continue with:\n{resume_command()}")
                return
        self._save_at_the_end()

    def backgrounds(self, view: View) -> Tensor | None:
        """Colours [C, 3] behind a training view: random ones where the options ask for them, else None for black."""
        if not self.cfg.random_background:
            return None
        # On the CPU, so that devices agree; from the step's number, so that a resumed run draws the same.
        colors = np.random.default_rng([self.cfg.seed, self._step]).random((len(view.images), 3), np.float32)
        return torch.from_numpy(colors).to(self.device)

    def after_step(self, step: int, loss: Tensor, sh_degree: int) -> None:
        """Show, log, evaluate and save what is due after a step.

        Args:
            step: Its number, from 0.
            loss: Scalar.
            sh_degree: Degree of the spherical harmonics it used.
        """
        cfg = self.cfg
        steps_done = step + 1
        self._bar.update()
        last = steps_done == cfg.max_steps
        if step % 10 == 0 or last:
            # Reading the loss waits for the device, so not at every step.
            self._bar.set_postfix(
                loss=f"{loss.item():.4f}",
                GS=f"{self._model.num_gaussians:,}",
                sh=sh_degree,
                mem=format_bytes(peak_bytes(self.device)["device_allocated"]),
            )
            self._look_at_skipped_steps()
        if steps_done % cfg.log_every == 0:
            with self._going_on_without("The log"):
                self._log(steps_done, loss)
        if steps_done in cfg.save_steps or last:
            self._save_checkpoint(periodic=False)
            with self._going_on_without("The statistics"):
                self._save_train_statistics()
        elif self._schedule.is_due(steps_done):
            self._save_checkpoint(periodic=True)
        if steps_done in cfg.ply_steps or last:
            with self._going_on_without("The PLY file"):
                self._results.save_ply(steps_done, self._model.rows, self._model.num_gaussians, self.scene.transform)
        if steps_done in cfg.eval_steps or last:
            with self._going_on_without("The evaluation"):
                self.evaluate(self._draw, steps_done, self._model.num_gaussians)
        if cfg.video and last:
            self._record_flight(self._draw, steps_done)
        failure = self._results.checkpoints.failure()
        if failure is not None:
            self._checkpoint_failed(failure)

    def _look_at_skipped_steps(self) -> None:
        skipped, in_a_row = self._model.skipped_steps()
        if in_a_row >= MOST_SKIPPED_STEPS:
            raise TrainingStopped(
                f"The gradients of the last {in_a_row} steps were not finite, so nothing is learned any more: look at "
                "the pictures, or lower the learning rates."
            )
        if skipped > self._skipped_steps:
            tqdm.write(f"Warning: {skipped} steps so far had gradients that were not finite; they were skipped.")
        self._skipped_steps = skipped

    def evaluate(self, draw: Callable[[Cameras], Tensor], steps: int, num_gaussians: int) -> None:
        """Compare renderings of the test views with the photos, print the means and write them to stats/.

        Args:
            draw: Makes the picture [1, H, W, 3] of one camera.
            steps: Training steps that the model has had.
            num_gaussians: Its size.
        """
        with evaluation_loader(self.scene, self.scene.test_ids, num_workers=self.cfg.num_workers or None) as loader:
            views = (
                (self.scene.image_names[int(batch.image_ids[0])], View.from_batch(batch, self.cfg, self.device))
                for batch in loader
            )
            statistics = evaluate(
                views,
                draw,
                self._lpips,
                lambda index, canvas: self._results.save_rendering(steps, index, canvas),
                self.device,
            )
        statistics = {"num_GS": num_gaussians, **statistics}
        self._results.save_statistics("val", steps, statistics)
        for key in ("psnr", "ssim", "lpips"):
            if statistics[key] is not None:
                self._results.tensorboard.add_scalar(f"val/{key}", statistics[key], steps)
        lpips = "missing" if statistics["lpips"] is None else f"{statistics['lpips']:.3f}"
        tqdm.write(
            f"Step {steps}: PSNR {statistics['psnr']:.2f} dB, SSIM {statistics['ssim']:.4f}, LPIPS {lpips} "
            f"on {len(statistics['images'])} held-out views, "
            f"{1000 * statistics['seconds_per_image']:.1f} ms per view, {num_gaussians} Gaussians"
        )

    def evaluate_checkpoint(self, draw: Callable[[Cameras], Tensor], model: GaussianModel) -> None:
        """Evaluate the model made from the checkpoint that the options name."""
        self.evaluate(draw, self._checkpoint_to_evaluate.steps, model.num_gaussians)
        if self.cfg.video:
            self._record_flight(draw, self._checkpoint_to_evaluate.steps)

    def _record_flight(self, draw: Callable[[Cameras], Tensor], steps: int) -> None:
        with self._going_on_without("The video"):
            record_flight(self.scene, self.cfg, draw, self._results.path / "videos" / f"flight_{steps}.mp4")

    def __enter__(self) -> TrainingRun:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._resources:
            # Whatever ends training, what has been trained is saved; only a second Ctrl-C does not wait for that.
            if isinstance(error, NotSaved) or not isinstance(error, Exception):
                return
            if self._model is not None and self._model.steps_done > 0:
                raise self._stopped(error) from error

    def _on_interrupt(self, signal_number: int, frame: FrameType | None) -> None:
        if self._interrupted and signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        self._interrupted = True
        tqdm.write("Stopping after this step; press Ctrl-C again to stop at once without saving.")

    def _stopped(self, error: Exception) -> TrainingStopped:
        """The sentence for an error that ends training, with everything trained so far saved."""
        message = str(error)
        command = resume_command()
        if isinstance(error, torch.cuda.OutOfMemoryError):
            clear_frames(error.__traceback__)  # which hold what the step had allocated
            torch.cuda.empty_cache()
            message = (
                f"Device memory ran out after {self._model.steps_done} steps with {self._model.num_gaussians} "
                "Gaussians: continue in a trainer that needs less of it, or raise --data_factor."
            )
            command = smaller_command()
        elif not isinstance(error, TrainingStopped | InputError):
            print_exception(error)  # a defect: whoever mends it wants to see where
            message = f"An error ended training after {self._model.steps_done} steps."
        try:
            self._model.undo_step()
            return TrainingStopped(
                f"{message} The Gaussians are saved in {self._save_at_the_end()}. Continue with: {command}"
            )
        except NotSaved as failure:
            return TrainingStopped(f"{message} {failure}")
        except Exception as failure:  # of whatever kind: the user gets the sentence
            return TrainingStopped(f"{message} The Gaussians could not be saved ({failure}).")

    # ---------------------------------------------------------------------------------------- saving and resuming

    def _checkpoint_to_resume(self) -> Checkpoint | None:
        checkpoints = self._results.checkpoints
        checkpoint = checkpoints.newest_valid(print)
        if checkpoint is None:
            print(f"{checkpoints.path} holds no checkpoint to resume from: training starts from the beginning.")
            return None
        if sh_degree_of(checkpoint.state) != self.cfg.sh_degree:
            raise InputError(
                f"The checkpoint to resume from has harmonics of degree {sh_degree_of(checkpoint.state)}: give this "
                "--sh_degree, or another --result_dir."
            )
        if not np.allclose(checkpoint.transform, self.scene.transform, rtol=1e-4, atol=1e-6):
            raise InputError(
                f"The checkpoint to resume from was trained on another dataset than {self.cfg.data_dir}: give its "
                "--data_dir, or another --result_dir."
            )
        return checkpoint

    def _load_resumed(self) -> int:
        """Put the state of the checkpoint that is resumed in place; returns the number of the first step."""
        checkpoint, self._resumed = self._resumed, None
        if checkpoint is None:
            return 0
        state, prefix = dict(checkpoint.state), "densification/"
        statistics = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        for name, value in json.loads(json.dumps(asdict(self.cfg))).items():
            before = checkpoint.options.get(name, value)
            if before != value and name not in OPTIONS_OF_THE_PLACE:
                print(f"--{name} is now {value}; it was {before}.")
                state = {key: value for key, value in state.items() if not key.startswith("upcoming/")}  # another view
        try:
            self._model.load_state(state)
            self._densification.load_state(statistics, self._model.device)
            self._begin -= state["elapsed_seconds"].item()
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"The checkpoint of {checkpoint.steps} steps in {self._results.checkpoints.path} does not hold what "
                "resuming needs: remove it."
            ) from error
        self._saved_steps = checkpoint.steps
        self._results.purge_log(checkpoint.steps + 1)
        print(f"Resuming after {checkpoint.steps} steps with {self._model.num_gaussians} Gaussians.")
        return checkpoint.steps

    def _save_checkpoint(self, *, periodic: bool) -> None:
        """Save what training goes on from; where that fails, say so and train on."""
        steps_done = self._model.steps_done
        statistics = {f"densification/{name}": value for name, value in self._densification.state().items()}
        elapsed = torch.tensor(time.perf_counter() - self._begin, dtype=torch.float64)
        checkpoint = Checkpoint(
            steps=steps_done,
            transform=self.scene.transform,
            state={**self._model.state(), **statistics, "elapsed_seconds": elapsed},
            options=asdict(self.cfg),
            periodic=periodic,
        )
        try:
            self._results.checkpoints.save(checkpoint, self._model.copied_before_change())
            self._saved_steps = steps_done
        except OSError as error:
            self._checkpoint_failed(error)

    def _checkpoint_failed(self, error: Exception) -> None:
        self._saved_steps, self._save_failure = -1, error
        tqdm.write(
            f"Warning: a checkpoint could not be written to {self._results.checkpoints.path} ({error}). "
            "Those before it are untouched, and training goes on."
        )

    def _save_at_the_end(self) -> Path:
        """Make sure that all steps done are in a checkpoint on disk.

        Raises:
            NotSaved: They cannot be.
        """
        checkpoints, steps_done = self._results.checkpoints, self._model.steps_done
        path = checkpoints.path / f"ckpt_{steps_done}.pt"
        if self._saved_steps != steps_done:
            self._save_checkpoint(periodic=True)
        failure = checkpoints.wait()
        if failure is not None:
            self._checkpoint_failed(failure)
        if self._saved_steps != steps_done:
            raise NotSaved(
                f"The Gaussians after {steps_done} steps could not be saved in {checkpoints.path} "
                f"({self._save_failure}): make room there or make it writable, and continue from the checkpoint "
                f"before with: {resume_command()}"
            )
        return path

    @contextmanager
    def _going_on_without(self, what: str) -> Iterator[None]:
        """A result that cannot be written is missed, not worth the training."""
        try:
            yield
        except OSError as error:
            tqdm.write(f"Warning: {what} could not be written to {self._results.path} ({error}); training goes on.")

    def _save_train_statistics(self) -> None:
        synchronize(self.device)
        seconds = time.perf_counter() - self._begin
        peaks = peak_bytes(self.device)
        self._results.save_statistics(
            "train",
            self._model.steps_done,
            {
                "num_GS": self._model.num_gaussians,
                "elapsed_seconds": seconds,
                "steps_per_second": self._model.steps_done / seconds,
                "peak_device_bytes_allocated": peaks["device_allocated"],
                "peak_device_bytes_reserved": peaks["device_reserved"],
                "peak_host_bytes": peaks["host"],
                "device_bytes_allocated": allocated_bytes(self.device),
                "longest_save_seconds": self._results.checkpoints.longest_stall,
                "stages_ms": self.times.mean_milliseconds("statistics"),
                **self._counted("statistics"),
            },
        )

    def _log(self, steps_done: int, loss: Tensor) -> None:
        writer = self._results.tensorboard
        writer.add_scalar("train/loss", loss.item(), steps_done)
        writer.add_scalar("train/num_GS", self._model.num_gaussians, steps_done)
        writer.add_scalar("train/elapsed_seconds", time.perf_counter() - self._begin, steps_done)
        for kind, num_bytes in peak_bytes(self.device).items():
            writer.add_scalar(f"memory/{kind}_GiB", num_bytes / 2**30, steps_done)
        writer.add_scalar("memory/device_allocated_now_GiB", allocated_bytes(self.device) / 2**30, steps_done)
        counted = self._counted("log")
        if "staging_allocations" in counted:
            writer.add_scalar("memory/staging_allocations", counted["staging_allocations"], steps_done)
        for stage, milliseconds in self.times.mean_milliseconds("log").items():
            writer.add_scalar(f"stages_ms/{stage}", milliseconds, steps_done)
        for group in ("offload_ms", "per_step"):
            for name, mean in counted.get(group, {}).items():
                writer.add_scalar(f"{group}/{name}", mean, steps_done)

    def _counted(self, reader: str) -> dict[str, Any]:
        """Read the counters of the model, as means per step since this reader asked last.

        Returns:
            `staging_allocations` so far, constant in the steady state; `offload_ms`, what a step does beside its
            stages, which overlaps with them and with itself; and `per_step`, the rows and bytes that a step moves.
            What the model does not count is missing.
        """
        counters: Counters = self._model.counters()
        steps = self._model.steps_done - self._first_step
        counted: dict[str, Any] = {}
        if counters.staging_allocations is not None:
            counted["staging_allocations"] = counters.staging_allocations
        if counters.milliseconds is not None:
            counted["offload_ms"] = self._offload_per_step.means(reader, steps, counters.milliseconds)
        if counters.traffic is not None:
            counted["per_step"] = self._traffic_per_step.means(reader, steps, counters.traffic)
        return counted


def check_options(cfg: Config) -> None:
    """Refuse options that cannot work, before anything is loaded.

    Raises:
        InputError: Naming the option.
    """
    positive = ("max_steps", "batch_size", "view_window", "data_factor", "log_every", "init_scale", "steps_scaler")
    for name in positive:
        if getattr(cfg, name) <= 0:
            raise InputError(f"--{name} is {getattr(cfg, name)}, but must be above 0.")
    if cfg.profile and not 0 < cfg.profile <= cfg.max_steps - SKIPPED_STEPS - WARM_UP_STEPS:
        raise InputError(
            f"--profile is {cfg.profile}, but must be above 0 and leave {SKIPPED_STEPS + WARM_UP_STEPS} of the "
            f"{cfg.max_steps} steps of --max_steps to warm up."
        )
    for name in ("init_opacity", "prune_opa"):
        if not 0 < getattr(cfg, name) < 0.5:
            raise InputError(f"--{name} is {getattr(cfg, name)}, but must be between 0 and 0.5.")
    if not 0 <= cfg.sh_degree <= 3:
        raise InputError(f"--sh_degree is {cfg.sh_degree}, but must be 0, 1, 2 or 3.")
    if not 0 <= cfg.ssim_lambda <= 1:
        raise InputError(f"--ssim_lambda is {cfg.ssim_lambda}, but must be between 0 and 1.")
    SaveSchedule(cfg.save_every)
    if cfg.keep < 0:
        raise InputError(f"--keep is {cfg.keep}, but must be 0 (keep all) or above.")
    if cfg.ckpt and cfg.resume:
        raise InputError("--ckpt evaluates a checkpoint and --resume trains on: give one of them.")
    if cfg.max_gaussians < 0 or cfg.num_workers < 0:
        raise InputError("--max_gaussians and --num_workers must be 0 (no bound, one per core) or above.")
