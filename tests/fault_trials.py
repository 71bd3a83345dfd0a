"""Kills training runs at random moments, again and again, and resumes them.

    python -m tests.fault_trials --kills 50 --num_gaussians 200000
    python -m tests.fault_trials --kills 20 --num_gaussians 20000 --ranks 2 --trainers streamed

Each trainer trains one scene in a child process that is killed (SIGKILL) at a random moment: while it starts, at any
time later, shortly after a step, a refinement or the writing of a checkpoint has begun. After each kill the newest
valid checkpoint must be at least as new as the newest one that had been reported as written, and the run is resumed.
When all kills are done the run goes to its end, and its last checkpoint is compared with that of a run that was never
killed: on the CPU they must be bit-equal. Prints a row for each trainer. With --ranks each run is so many processes
that train together, of which one is killed; the others get SIGTERM, as torchrun sends it, and must end and name it.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import startup  # noqa: F401, before torch is imported

# isort: split

import torch
from torch.distributed import TCPStore

from datasets.synthetic import write_city_block
from offload.adam.state import num_gaussians_of
from tests.ranked_scripts import environment
from tests.waiting import HANGS_AFTER
from trainers import TRAINERS
from training.checkpoint_folder import CheckpointFolder
from training.checkpoints import load_checkpoint
from training.joined_rows import whole

MOMENTS = ("step", "refinement", "writing", "publishing")
STEPS_PER_KILL = 5
START_SECONDS = (1.0, 8.0)  # after which a run is killed that most often is still starting


@dataclass
class Report:
    """What came of the kills of one trainer."""

    trainer: str
    kills: int = 0
    lost: int = 0  # kills after which a checkpoint that had been written was not there or not valid
    untold: int = 0  # kills of which no other rank has said so
    moments: Counter[str] = field(default_factory=Counter)  # what the run did when it was killed
    steps_repeated: int = 0  # that had been computed after the newest checkpoint
    num_gaussians: int = 0  # at the end
    bit_equal: bool = False
    longest_end: float = 0.0  # seconds that other ranks took to end after the kill


def kill_trials(trainer: str, kills: int, num_gaussians: int, seed: int = 0, ranks: int = 1) -> Report:
    """Kill and resume one trainer so many times.

    Args:
        trainer: A key of `trainers.TRAINERS`.
        kills: How often.
        num_gaussians: That training starts with.
        seed: Of the moments.
        ranks: How many processes train together.
    """
    rng, report = random.Random(seed), Report(trainer)
    with tempfile.TemporaryDirectory() as scratch:
        data_dir, killed = Path(scratch) / "data", Path(scratch) / "killed"
        write_city_block(data_dir, num_views=12, width=48, height=32, num_points=num_gaussians)
        max_steps = STEPS_PER_KILL * kills + 20  # a run that is killed repeats some
        options = (
            *("--data_dir", data_dir, "--device", "cpu", "--max_steps", max_steps, "--eval_steps", max_steps),
            *("--save_every", 3, "--refine_start_iter", 1, "--refine_every", 4, "--refine_stop_iter", max_steps - 5),
            *("--reset_every", 50, "--grow_grad2d", 1e-4, "--max_gaussians", num_gaussians + num_gaussians // 10),
            *("--num_workers", 1, *TRAINERS[trainer].arguments),
        )
        ending = ("--result_dir", str(Path(scratch) / "whole"), "--resume")
        undisturbed = Run(trainer, (*options, *ending), ranks, is_heard=False)
        published = 0  # steps of the newest checkpoint that has been reported as written
        while report.kills < kills:
            with Run(trainer, (*options, "--result_dir", killed, "--resume"), ranks) as run:
                moment = rng.choice(("starting", "any", *MOMENTS))
                if moment == "starting":
                    time.sleep(rng.uniform(*START_SECONDS))
                # Let some steps pass, so that the run gets on.
                elif not run.wait_for("step", rng.randint(1, STEPS_PER_KILL - 1)):
                    if newest(killed) < max_steps:
                        raise SystemExit(f"{trainer} ended by itself:\n{run.output}")
                    shutil.rmtree(killed)  # on a fast machine all was done; another one is killed
                    published = 0
                    continue
                if moment != "starting":
                    is_there = moment != "any" and run.wait_for(moment, 1)
                    time.sleep(rng.uniform(0, 0.03 if is_there else 1.0))
                killed_rank = rng.randrange(ranks)
                report.longest_end = max(report.longest_end, run.kill(killed_rank))
                report.untold += ranks > 1 and f"Stopped: rank {killed_rank} " not in run.said
            report.kills += 1
            report.moments[run.doing] += 1
            found = newest(killed)
            published = max(published, run.published)
            report.lost += found < published
            report.steps_repeated += max(run.steps_done - found, 0)
            print(
                f"killed {trainer} at {run.doing} after {run.steps_done} steps: resumes after {found}", file=sys.stderr
            )
        Run(trainer, (*options, "--result_dir", killed, "--resume"), ranks, is_heard=False).wait()
        undisturbed.wait()
        checkpoints = [
            load_checkpoint(Path(scratch) / name / f"ckpts/ckpt_{max_steps}.pt") for name in ("killed", "whole")
        ]
        states = [dict(checkpoint.state) for checkpoint in checkpoints]
        report.num_gaussians = num_gaussians_of(states[0])
        report.bit_equal = states[0].keys() == states[1].keys() and all(
            torch.equal(whole(value), whole(states[1][name]))
            for name, value in states[0].items()
            if name != "elapsed_seconds"
        )
    return report


def newest(result_dir: Path) -> int:
    """Steps of the newest valid checkpoint; 0 where there is none."""
    folder = CheckpointFolder(result_dir / "ckpts", keep=0)
    checkpoint = folder.newest_valid(lambda sentence: None)
    folder.close()
    return 0 if checkpoint is None else checkpoint.steps


def child(trainer: str) -> tuple[str, ...]:
    return sys.executable, "-m", "tests.fault_trials", "--child", trainer, "default"


class Run:
    """A training run in a child process, which says what it is doing; or in several, of which the first does."""

    def __init__(self, trainer: str, options: tuple[object, ...], ranks: int = 1, *, is_heard: bool = True) -> None:
        command = (*child(trainer), *map(str, options))
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environments = [environment(rank, ranks, self._store) for rank in range(ranks)] if ranks > 1 else [None]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, it is there as long as this is
        self._processes = [
            subprocess.Popen(
                command,
                env=env,
                stdout=subprocess.PIPE if is_heard and rank == 0 else subprocess.DEVNULL,
                stderr=self._errors,
                text=True,
            )
            for rank, env in enumerate(environments)
        ]
        self._process = self._processes[0]
        self.output = ""
        self.doing = "starting"
        self.steps_done = 0
        self.published = 0  # steps of the newest checkpoint that has been reported as written

    def wait_for(self, moment: str, times: int) -> bool:
        """Whether the run has said so often that it begins this."""
        while times > 0:
            line = self._process.stdout.readline()
            if not line:
                return False
            times -= self._heard(line) == moment
        return True

    def kill(self, rank: int) -> float:
        """Kill one process; return the seconds until all have ended, which the others must do by themselves."""
        began = time.monotonic()
        self._processes[rank].kill()
        for process in self._processes:
            process.terminate()  # as torchrun does
        for line in self._process.stdout:
            self._heard(line)
        self.wait()
        return time.monotonic() - began

    @property
    def said(self) -> str:
        """Return what all processes have told people."""
        self._errors.seek(0)
        return self._errors.read()

    def wait(self) -> None:
        for process in self._processes:
            process.wait(None if len(self._processes) == 1 else 2 * HANGS_AFTER)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.kill()
        self.wait()

    def _heard(self, line: str) -> str:
        self.output += line
        word, *number = line.split()[:2] if line.startswith("@") else ["@"]
        if word == "@step":
            self.steps_done = int(number[0])
        if word == "@published":
            self.published = int(number[0])
        if len(word) > 1:
            self.doing = word[1:]
        return word[1:]


def be_child(trainer: str, arguments: list[str]) -> None:
    """Train in this process, and say on stdout what begins."""
    from strategies.default import DefaultStrategy
    from training import checkpoint_folder, command_line
    from training.checkpoint_parts import JointCheckpoint
    from training.checkpoint_writing import PartialCheckpoint
    from training.run import TrainingRun

    def say(line: str) -> None:
        # One write a line: print() writes its end apart, and another thread's line comes between.
        os.write(sys.stdout.fileno(), f"{line}\n".encode())

    def announce(owner: type, name: str, before: str, after: str = "") -> None:
        method = getattr(owner, name)

        def announced(self, *arguments: object, **options: object) -> object:
            steps = arguments[1].steps if owner is checkpoint and len(arguments) > 1 else None
            if name == "publish":
                steps = int(self.path.stem.split("_")[1])
            if name == "after_step":
                steps = arguments[0] + 1
            say(f"@{before} {steps}")
            result = method(self, *arguments, **options)
            if after:
                say(f"@{after} {steps}")
            return result

        setattr(owner, name, announced)

    checkpoint = PartialCheckpoint if os.environ.get("WORLD_SIZE", "1") == "1" else JointCheckpoint
    announce(checkpoint, "__init__", "writing", "training")
    announce(checkpoint, "publish", "publishing", "published")
    announce(DefaultStrategy, "refine", "refinement", "training")
    announce(TrainingRun, "after_step", "step")
    assert checkpoint_folder.PartialCheckpoint is PartialCheckpoint
    script = TRAINERS[trainer].load()
    sys.argv = [TRAINERS[trainer].path.name, *arguments]
    command_line.main(script.CONFIGS, script.train, "")


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        be_child(sys.argv[2], sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="how many, of all trainers together (50)")
    parser.add_argument("--num_gaussians", type=int, default=200_000, help="that training starts with (200000)")
    parser.add_argument("--trainers", nargs="+", default=list(TRAINERS), choices=list(TRAINERS), help="all")
    parser.add_argument("--ranks", type=int, default=1, help="processes of a run, of which one is killed (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    arguments = parser.parse_args()
    kills = -(-arguments.kills // len(arguments.trainers))
    failed = False
    for trainer in arguments.trainers:
        report = kill_trials(trainer, kills, arguments.num_gaussians, arguments.seed, arguments.ranks)
        failed |= report.lost > 0 or report.untold > 0 or not report.bit_equal
        of_ranks = f"the others ended within {report.longest_end:.0f} s, and {report.untold} times did not say why, "
        moments = ", ".join(f"{count} {moment}" for moment, count in report.moments.items())
        print(
            f"{trainer}: {report.kills} kills ({moments}), {report.num_gaussians} Gaussians at the end, "
            f"{report.lost} checkpoints lost, {report.steps_repeated} steps computed again, "
            f"{of_ranks if arguments.ranks > 1 else ''}"
            f"{'bit-equal' if report.bit_equal else 'NOT EQUAL'} to a run that was not killed",
            flush=True,
        )
    sys.exit(failed)


if __name__ == "__main__":
    main()
