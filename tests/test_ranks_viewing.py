"""Several processes show their model as one: over gloo, on the CPU, with somebody who looks and nobody's browser."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs import Config
from distributed.mesh import Ranks
from offload.culling.cameras import Cameras
from tests.rank_groups import StayingRanks, run_in_group
from tests.ranked_scripts import options_for
from tests.visitors import Visitor, free_port
from trainers import TRAINERS
from training import joint_viewing
from training.checkpoints import load_checkpoint
from training.command_line import main
from training.joint_viewing import FirstRank
from training.modules import sky_of, state_of
from training.run import TrainingRun
from training.views import render

pytestmark = pytest.mark.slow

pytest.importorskip("viser")

STEPS, PAUSED_AT = 8, 4
PLACES = ("project_pairs", "_find_room")  # where a rank may find that memory is too little
OPTIONS = ("--max_steps", STEPS, "--background", "sky", "--eval_steps", 1000, "--save_every", 0)
OPTIONS += ("--sh_degree_interval", 2, "--refine_start_iter", 2, "--refine_every", 3, "--grow_grad2d", 4e-4)


def train(ranks: Ranks, data_dir: Path, folder: Path, patch: pytest.MonkeyPatch, *options: object) -> None:
    """Train with a script in this process, as one of the ranks."""
    script = TRAINERS["streamed"].load()
    arguments = (*options_for(data_dir, folder), *OPTIONS, *options)
    patch.setattr("training.joint_run.arrive", lambda *given: StayingRanks(**vars(ranks)))
    patch.setattr("training.command_line.leave", lambda: None)
    patch.setattr("training.reporting.load_lpips", lambda net, device: None)
    patch.setattr("sys.argv", ["simple_trainer_hybrid_streamed.py", "default", *map(str, arguments)])
    main(script.CONFIGS, script.train, "")


def visited(patch: pytest.MonkeyPatch, ranks: Ranks, before_step: Callable[[TrainingRun, int, Visitor | None], None]):
    """Let somebody look at the first rank's page; returns the pages, of which there is one at that rank."""
    visitors: list[Visitor] = []
    after_step = TrainingRun.after_step

    def watched(run: TrainingRun, step: int, loss: Tensor) -> None:
        if ranks.leads and not visitors:
            page = run.observers[0].page
            visitors.append(Visitor(page))
            patch.setattr(page._server, "get_clients", visitors[0].clients)
        if visitors:
            visitors[0].move(run.scene.camtoworlds[step % 3])
        before_step(run, step, visitors[0] if visitors else None)
        after_step(run, step, loss)

    patch.setattr(TrainingRun, "after_step", watched)
    return visitors


def alone(ranks: Ranks, data_dir: Path, folder: Path) -> None:
    """Train without a page."""
    with pytest.MonkeyPatch.context() as patch:
        train(ranks, data_dir, folder, patch)


def watched(ranks: Ranks, data_dir: Path, folder: Path) -> tuple[Cameras, Tensor, int, int] | None:
    """Train while a camera moves at every step, and pause once; returns what was drawn last, and how much was."""
    drawn: list[tuple[Cameras, Tensor]] = []
    draw = FirstRank.draw

    def recorded(self: FirstRank, cameras: Cameras) -> Tensor:
        picture = draw(self, cameras)
        drawn.append((cameras, picture))
        return picture

    def pause(run: TrainingRun, step: int, visitor: Visitor | None) -> None:
        if visitor is not None and step + 1 == PAUSED_AT:
            visitor._page._toggle()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FirstRank, "draw", recorded)
        visitors = visited(patch, ranks, pause)
        train(ranks, data_dir, folder, patch, "--viewer", ranks.broadcast(free_port()))
    return (*drawn[-1], len(visitors[0].pictures), visitors[0].looks_while_paused) if visitors else None


def without_memory(ranks: Ranks, data_dir: Path, folder: Path) -> list[int] | None:
    """Train while the second rank lacks memory for pictures, here or there; returns how bright those were."""
    lacking = ""

    def choose(run: TrainingRun, step: int, visitor: Visitor | None) -> None:
        nonlocal lacking
        lacking = PLACES[step % len(PLACES)]

    def lacks(place: str) -> Callable[..., Any]:
        real = getattr(joint_viewing, place)

        def called(*arguments: object, **options: object) -> Any:
            if place == lacking:
                raise torch.OutOfMemoryError("no memory for a test")
            return real(*arguments, **options)

        return called

    with pytest.MonkeyPatch.context() as patch:
        for place in PLACES if ranks.rank == 1 else ():
            patch.setattr(joint_viewing, place, lacks(place))
        visitors = visited(patch, ranks, choose)
        train(ranks, data_dir, folder, patch, "--viewer", ranks.broadcast(free_port()))
    return [int(picture.max()) for picture in visitors[0].pictures] if visitors else None


def interrupted(ranks: Ranks, data_dir: Path, folder: Path) -> None:
    """Train until the second rank is asked to stop, while the first one pauses."""

    def pause(run: TrainingRun, step: int, visitor: Visitor | None) -> None:
        if step + 1 == PAUSED_AT:
            if visitor is None:
                os.kill(os.getpid(), signal.SIGINT)
            else:
                visitor._page._toggle()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Visitor, "while_paused", lambda self, looks: None)
        visited(patch, ranks, pause)
        train(ranks, data_dir, folder, patch, "--viewer", ranks.broadcast(free_port()))


@pytest.fixture(scope="module")
def shown(city_block, tmp_path_factory) -> tuple[Path, dict[str, list[Any]]]:
    """The folder of all runs, and what each returns at each rank."""
    folder = tmp_path_factory.mktemp("shown")
    cases: dict[str, Callable[[Ranks], Any]] = {
        "alone": alone,
        "watched": watched,
        "without memory": without_memory,
        "interrupted": interrupted,
    }
    cases = {name: functools.partial(case, data_dir=city_block, folder=folder / name) for name, case in cases.items()}
    return folder, run_in_group(2, cases, tmp_path_factory.mktemp("group"))


def test_a_picture_is_that_of_one_process(shown):
    folder, found = shown
    cameras, picture, *_ = found["watched"][0]
    whole = load_checkpoint(folder / f"watched/ckpts/ckpt_{STEPS}.pt")
    backdrop = sky_of(state_of(whole, "sky"), torch.device("cpu"))
    expected, _ = render(whole.gaussians, cameras, Config(), sh_degree=3, backgrounds=backdrop)
    assert expected.std() > 0.03
    torch.testing.assert_close(picture, expected, atol=2e-6, rtol=0)
    assert found["watched"][1] is None


def test_a_run_that_is_watched_and_paused_gives_the_same_model(shown):
    folder, found = shown
    *_, num_pictures, looks_while_paused = found["watched"][0]
    assert num_pictures >= STEPS - 1  # who comes is seen from the next step on
    assert looks_while_paused == 10
    states = [load_checkpoint(folder / f"{name}/ckpts/ckpt_{STEPS}.pt").gaussians for name in ("alone", "watched")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_too_little_memory_at_any_rank_makes_pictures_black_and_training_goes_on(shown):
    folder, found = shown
    pictures = found["without memory"][0]
    assert len(pictures) >= STEPS - 1
    assert set(pictures) == {0}
    states = [
        load_checkpoint(folder / f"{name}/ckpts/ckpt_{STEPS}.pt").gaussians for name in ("alone", "without memory")
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_ctrl_c_at_any_rank_ends_a_run_that_is_paused(shown):
    folder, _ = shown
    assert [path.name for path in (folder / "interrupted/ckpts").glob("*.pt")] == [f"ckpt_{PAUSED_AT}.pt"]
