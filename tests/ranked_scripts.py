"""Trainer scripts in several processes that train together, with faults in one of them, for tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

from tests.spared_work import leave_charts_undrawn
from tests.waiting import HANGS_AFTER, wait_until
from trainers import TRAINERS


class ScriptGroup:
    """So many processes of a trainer script, which meet as if torchrun had started them."""

    def __init__(self, size: int, trainer: str, options: tuple[object, ...], faults: Mapping[int, str] = {}) -> None:
        """
        Args:
            size: How many.
            trainer: A key of `TRAINERS`.
            options: Of the script.
            faults: What happens to which rank: see `be_child`.
        """
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.processes = [
            subprocess.Popen(
                (sys.executable, "-m", "tests.ranked_scripts", trainer, faults.get(rank, "none"), *map(str, options)),
                env=environment(rank, size, self._store),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(size)
        ]

    def end_as_torchrun_does(self) -> None:
        """Wait until one has ended, and send SIGTERM to the others."""
        while all(process.poll() is None for process in self.processes):
            time.sleep(0.05)
        for process in self.processes:
            process.terminate()

    def ends(self) -> list[tuple[int, str]]:
        """Exit code and output of each rank."""
        try:
            outputs = [process.communicate(timeout=HANGS_AFTER)[0] for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return [(process.returncode, output) for process, output in zip(self.processes, outputs, strict=True)]


def environment(rank: int, size: int, store: TCPStore) -> dict[str, str]:
    """What torchrun would tell a process."""
    return os.environ | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "GROUP_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1,1",
    }  # fmt: skip


def be_child(trainer: str, fault: str, arguments: list[str]) -> None:
    """Train in this process, to which a fault happens: picture, error, kill, interrupt and the step, as in "kill@7".
    With "stop" Ctrl-C comes before the picture of a number, with "frame" before that frame of its video.

    One that is "full" cannot write its parts of checkpoints.

    With "unfinished" the error comes when the Gaussians have taken the step and modules have not. With "early_kill" it
    is killed before it reads the dataset, with "terminate" it gets SIGTERM there. One that is "slow" begins two seconds
    later; one that is "patient" lets it tell what both have alike, and another rank be found gone, however slow the
    machine is. With "late_error" torchrun finds that another rank has left before this one has told why.
    """
    import startup  # noqa: F401
    from distributed import mesh, watch
    from errors import InputError
    from training import command_line, reporting, run, video
    from training.checkpoint_writing import PartialCheckpoint
    from training.run import TrainingRun
    from training.views import View

    leave_charts_undrawn(pytest.MonkeyPatch())
    what, _, step = fault.partition("@")
    reporting.load_lpips = lambda net, device: None
    load_dataset = run.load_dataset
    mark, leave, from_batch, even = TrainingRun.mark, TrainingRun.__exit__, View.from_batch, video.even
    loaded = drawn = 0

    def marked(self: TrainingRun, stage: str) -> None:
        mark(self, stage)
        if stage == "update" and what == "unfinished" and self.model.steps_done == int(step):
            raise MemoryError("no memory for a test")
        if stage == "render" and self.model.steps_done + 1 == int(step):
            if what in ("error", "late_error"):
                raise MemoryError("no memory for a test")
            if what == "kill":
                wait_until(lambda: list((self.results.path / "ckpts").glob("ckpt_*.pt")))  # the one before
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "interrupt":
                os.kill(os.getpid(), signal.SIGINT)

    def left(self: TrainingRun, *error: object) -> None:
        try:
            leave(self, *error)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    def terminated(*arguments: object) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return load_dataset(*arguments)

    def no_room(self: PartialCheckpoint) -> None:
        self.discard()
        raise OSError("no room for a test")

    def decoded(*batch: object) -> View:
        nonlocal loaded
        loaded += 1
        if loaded == int(step) and what == "stop":
            os.kill(os.getpid(), signal.SIGINT)
        elif loaded == int(step):
            raise InputError("photos/7.png cannot be decoded: replace it.")
        return from_batch(*batch)

    def finished(frame: Any) -> Any:
        nonlocal drawn
        drawn += 1
        if drawn == int(step):
            os.kill(os.getpid(), signal.SIGINT)
        return even(frame)

    if what == "early_kill":
        run.load_dataset = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
    elif what == "terminate":
        run.load_dataset = terminated
    elif what == "full":
        PartialCheckpoint.publish = no_room
    elif what == "slow":
        time.sleep(2)
    elif what == "patient":
        mesh.TELLS_WITHIN = watch.CAUSED_WITHIN = HANGS_AFTER
    elif what == "frame":
        video.even = finished
    elif what in ("picture", "stop"):
        View.from_batch = decoded
    elif what != "none":
        TrainingRun.mark = marked
    if what == "late_error":
        TrainingRun.__exit__ = left
    script = TRAINERS[trainer].load()
    sys.argv = [TRAINERS[trainer].path.name, "default", *arguments]
    command_line.main(script.CONFIGS, script.train, "")


def options_for(data_dir: Path, result_dir: Path, *options: object) -> tuple[object, ...]:
    """Options of a short run on the CPU."""
    return ("--data_dir", data_dir, "--result_dir", result_dir, "--device", "cpu", "--num_workers", 1, *options)


if __name__ == "__main__":
    be_child(sys.argv[1], sys.argv[2], sys.argv[3:])
