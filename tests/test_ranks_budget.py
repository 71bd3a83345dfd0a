"""Several processes keep a budget of device memory: over gloo, on the CPU, where what tiles take is counted."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distributed.mesh import Ranks
from errors import EndedElsewhere, InputError
from offload.culling.cameras import Cameras
from offload.models.tiled import TiledGaussians, ViewTile
from offload.pipelines.tiled import TiledPipeline
from offload.tiles.budget import (
    EXCHANGED_BYTES,
    HEADROOM,
    INTERSECTION_BYTES,
    PAIR_BYTES,
    PIXEL_BYTES,
    RENDERING_BYTES,
    MemoryBudget,
    RowBytes,
)
from tests.rank_groups import run_in_group
from tests.test_ranks import BOUNDS, assert_same_model, trained
from training.drawing import Drawing
from training.joint_tiles import JointPart
from training.joint_viewing import draw_for_first
from training.views import draw_together

pytestmark = pytest.mark.slow

BUDGET = 1_100_000  # bytes, for which views are cut
LACKING = {"fetch": (3, 1), "render": (7, 0), "propagate": (12, 1)}  # in what memory is lacking: step and rank
ROW_BYTES = RowBytes.of("host", 3, together=2)
FEWER_STEPS = ("--max_steps", 30)
FEW_STEPS = ("--device_memory_budget", BUDGET, "--max_steps", 8, "--eval_steps", 1000)


class Watched:
    """Watches a run of one rank, in which memory is lacking now and then."""

    def __init__(self, patch: pytest.MonkeyPatch, ranks: Ranks, lacking: Mapping[str, tuple[int, int]]) -> None:
        self.step, self.rank, self.lacking = 0, ranks.rank, dict(lacking)
        self.rounds: list[dict[str, Any]] = []
        self.drawn: list[float] = []  # how far pictures drawn in rounds are from those that are drawn at once
        self.frames: list[float] = []  # the same of a timelapse
        update, make, draw = TiledGaussians.update, JointPart.__init__, Drawing.draw
        draw_frame = Drawing.draw_for_first

        def updated(gaussians: TiledGaussians) -> None:
            update(gaussians)
            self.step = gaussians.steps_done

        def made(joint: JointPart, part: ViewTile, *arguments: Any, **options: Any) -> None:
            make(joint, part, *arguments, **options)
            if torch.is_grad_enabled():
                counted = len(part.rows["means"]), joint.num_made, joint.num_sent, joint.num_drawn
                self.rounds.append({"step": self.step, "load": part.load, "counted": counted, "draws": joint.draws})

        def shown(drawing: Drawing, cameras: Cameras, *, depth: bool = False) -> Tensor:
            picture = draw(drawing, cameras, depth=depth)
            whole = draw_together(drawing._model, cameras, drawing._cfg, ranks, depth=depth)
            self.drawn.append(float((picture - whole).abs().max()))
            return picture

        def framed(drawing: Drawing, cameras: Cameras) -> Tensor | None:
            picture = draw_frame(drawing, cameras)
            whole = draw_for_first(drawing._model, cameras, drawing._cfg, ranks)
            assert (picture is None) == (whole is None) == (ranks.rank > 0)
            if picture is not None and whole is not None:
                self.frames.append(float((picture - whole).abs().max()))
            return picture

        patch.setattr(Drawing, "draw_for_first", framed)
        patch.setattr(TiledGaussians, "update", updated)
        patch.setattr(JointPart, "__init__", made)
        patch.setattr(Drawing, "draw", shown)
        patch.setattr(TiledPipeline, "fetch_tile", self.failing("fetch", TiledPipeline.fetch_tile))
        patch.setattr(JointPart, "render", self.failing("render", JointPart.render))
        patch.setattr(JointPart, "propagate", self.failing("propagate", JointPart.propagate))

    def failing(self, where: str, method: Any) -> Any:
        """The method, which once has not enough memory for what it has done."""

        def done(*arguments: Any) -> Any:
            found = method(*arguments)
            if torch.is_grad_enabled() and self.lacking.get(where) == (self.step, self.rank):
                del self.lacking[where]
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            return found

        return done


def watched(
    ranks: Ranks,
    data_dir: Path,
    folder: Path,
    trainer: str,
    options: tuple[object, ...],
    lacking: Mapping[str, tuple[int, int]] = LACKING,
) -> dict[str, Any]:
    """What a rank trains, and what was watched."""
    with pytest.MonkeyPatch.context() as patch:
        watch = Watched(patch, ranks, lacking)
        rows = trained(trainer, ranks, data_dir, folder, *options, *FEWER_STEPS, device=ranks.device.type)
    rows = {name: value.cpu() for name, value in rows.items()}
    failed = lacking.keys() - watch.lacking
    return {"rows": rows, "rounds": watch.rounds, "drawn": watch.drawn, "frames": watch.frames, "failed": failed}


def budgeted(ranks: Ranks, data_dir: Path, folder: Path) -> dict[str, Any]:
    return watched(
        ranks, data_dir, folder, "split_geometry_on_host", ("--device_memory_budget", BUDGET, "--timelapse", 20)
    )


def resumed(ranks: Ranks, data_dir: Path, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A run, and the same that ends on its way and is resumed."""
    parts = "split_geometry_on_host", ranks, data_dir
    whole = trained(*parts, folder / "whole", *FEW_STEPS)
    trained(*parts, folder / "parts", *FEW_STEPS, "--save_steps", 4)
    ranks.barrier()
    if ranks.leads:
        (folder / "parts/split_geometry_on_host/ckpts/ckpt_8.pt").unlink()
    ranks.barrier()
    return whole, trained(*parts, folder / "parts", *FEW_STEPS, "--resume")


def refused(ranks: Ranks, data_dir: Path, folder: Path) -> str:
    """What a rank says to a budget that is too small."""
    try:
        trained("split", ranks, data_dir, folder, "--device_memory_budget", 400_000)
    except EndedElsewhere:
        return ""
    except InputError as error:
        return str(error)
    return "trained"


@pytest.fixture(scope="module")
def group(city_block, tmp_path_factory) -> dict[str, list[Any]]:
    folder = tmp_path_factory.mktemp("budget")
    cases = {
        case.__name__: functools.partial(case, data_dir=city_block, folder=folder / case.__name__)
        for case in (budgeted, resumed, refused)
    }
    return run_in_group(2, cases, folder)


def test_ranks_train_the_model_of_one_process_within_a_budget(group, city_block, tmp_path):
    expected = trained("gpu_only", None, city_block, tmp_path, *FEWER_STEPS, "--batch_size", 2)
    assert_same_model([part["rows"] for part in group["budgeted"]], expected, BOUNDS)
    assert set.union(*(part["failed"] for part in group["budgeted"])) == set(LACKING)


def test_what_is_promised_of_a_round_is_kept(group):
    """Rows are those that were planned, pairs at most as many; the bytes of these, as counted here, keep the budget."""
    for part in group["budgeted"]:
        rounds = [each for each in part["rounds"] if each["load"] is not None]
        assert len(rounds) > 100
        for each in rounds:
            rows, made, sent, drawn = each["counted"]
            load = each["load"]
            assert rows == load.rows
            assert made <= load.made
            assert sent <= load.sent
            assert drawn <= load.drawn
            assert each["draws"] == (load.pixels > 0)
            rendering = (ROW_BYTES.values + RENDERING_BYTES) * rows + PAIR_BYTES * max(made - rows, 0)
            rendering += EXCHANGED_BYTES * (sent + drawn)
            rendering += INTERSECTION_BYTES * load.intersections + PIXEL_BYTES * load.pixels
            assert rendering + ROW_BYTES.values * rows < (1 - HEADROOM) * BUDGET
        assert 0 < sum(not each["draws"] for each in rounds) < len(rounds)  # some have fewer tiles than others


def test_pictures_drawn_in_rounds_are_those_drawn_at_once(group):
    drawn = [difference for part in group["budgeted"] for difference in part["drawn"]]
    assert drawn
    assert max(drawn) < 1e-5
    first, second = (part["frames"] for part in group["budgeted"])
    assert len(first) == 3  # of the timelapse, after steps 1, 20 and 30
    assert max(first) < 1e-5
    assert not second


def test_a_resumed_run_goes_on_in_the_rounds_that_were_planned(group):
    for whole, parts in group["resumed"]:
        assert all(torch.equal(parts[name], value) for name, value in whole.items())


def test_a_budget_that_ranks_cannot_keep_is_refused_by_one_of_them(group):
    silent, sentence = sorted(group["refused"])
    assert silent == ""
    assert "is too small for the views of a step, which 2 ranks draw of " in sentence
    assert "however they are split: give it at least " in sentence


# Options, and in what memory is lacking; tiles of so few rows are too small to be cut finer.
ON_GPU: dict[str, tuple[tuple[object, ...], dict[str, tuple[int, int]]]] = {
    "split": (("--split_threshold", 0.1), {}),
    "split_geometry_on_host": (("--device_memory_budget", "400MiB"), LACKING),
}


@pytest.fixture(scope="module", params=["cuda:0", "cuda"], ids=["one GPU", "two GPUs"])
def group_on_gpu(request, city_block, tmp_path_factory) -> dict[str, list[Any]]:
    """With a GPU each, by NCCL; or by gloo, which lets them share one."""
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("there are not two GPUs")
    folder = tmp_path_factory.mktemp("gpu")
    cases = {
        trainer: functools.partial(
            watched, data_dir=city_block, folder=folder, trainer=trainer, options=options, lacking=lacking
        )
        for trainer, (options, lacking) in ON_GPU.items()
    }
    return run_in_group(2, cases, folder, request.param)


@pytest.mark.cuda
@pytest.mark.parametrize("trainer", ON_GPU)
def test_ranks_on_a_gpu_draw_tiles_together(group_on_gpu, city_block, tmp_path, trainer):
    parts = group_on_gpu[trainer]
    expected = trained("gpu_only", None, city_block, tmp_path, *FEWER_STEPS, "--batch_size", 2, device="cuda")
    assert_same_model([part["rows"] for part in parts], {name: x.cpu() for name, x in expected.items()}, BOUNDS)
    assert set.union(*(part["failed"] for part in parts)) == set(ON_GPU[trainer][1])
    for part in parts:
        assert max(part["drawn"]) < 1e-4
        of_step = [each["step"] for each in part["rounds"]]
        assert max(map(of_step.count, of_step)) > 2  # rounds; by the budget only where memory was lacking


def test_pairs_count_as_rows():
    """In one process a row has one pair, which nobody sends."""
    alone, together = (MemoryBudget(10**9, RowBytes.of("host", 3, together=n), 1000) for n in (0, 2))
    assert alone.as_rows(100, 0, 0) == 100
    row = ROW_BYTES.values + RENDERING_BYTES
    more = 50 * PAIR_BYTES + 300 * EXCHANGED_BYTES
    assert row * 100 + more <= row * together.as_rows(100, 150, 300) < row * 101 + more
