"""The register of trainers: each way to train a scene is one entry, by name.

compare.py and benchmarks/train_step.py run them all; memory estimates, floors of traffic, remedies and the command that
goes on in a smaller trainer read it. A new trainer is one more entry.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

from training import memory_estimate
from training.memory_estimate import Footprint, Memory

PARTS = (2, 4)  # in which the split trainer is to cut the largest view, where memory lacks: more where two take as much


@dataclass(frozen=True)
class Traffic:
    """Hold bytes that one step must read and write."""

    device: float = 0.0
    link: float = 0.0  # in the busier direction
    host: float = 0.0


@dataclass(frozen=True)
class Trainer:
    """Hold one way to train: a script, the options that choose its variant, and what it takes of a machine."""

    script: str  # its module: a file beside this one
    footprint: Callable[[Any], Footprint]  # of its options
    traffic: Callable[[float, float], Traffic]  # of a step, from N Gaussians of which V are visible
    options: Mapping[str, str] = field(default_factory=dict)  # that choose the variant, by their fields' names
    # The entry that may need less device, or host, memory next, by its name; which one does depends on the views.
    less_device: str = ""  # empty: nothing does
    less_host: str = ""
    smaller_views_help: bool = True  # where device memory is too small: rows come there view by view
    several_gpus: bool = True  # whether processes can train one model together (docs/several_gpus.md)
    few_steps: bool = False  # it is so slow that a benchmark measures a tenth of the steps

    @property
    def path(self) -> Path:
        """Return where the script lies."""
        return Path(__file__).parent / f"{self.script}.py"

    @property
    def arguments(self) -> tuple[str, ...]:
        """Return the arguments that choose the variant."""
        return tuple(_words(self.options))

    def load(self) -> ModuleType:
        """Return the script's module, with `CONFIGS` and `train`."""
        return importlib.import_module(self.script)


@dataclass(frozen=True)
class Smaller:
    """Hold a trainer that needs less memory, and the options that it needs for that."""

    trainer: Trainer
    options: Mapping[str, Any]

    def cfg(self, cfg: Any, scene: str = "default") -> Any:
        """Return its options for what is trained with these; those that its script does not have are left out."""
        default = self.trainer.load().CONFIGS[scene]
        there = {item.name for item in fields(default)}
        shared = {item.name: getattr(cfg, item.name) for item in fields(cfg) if item.name in there}
        return replace(default, **{**shared, **self.options})


@dataclass(frozen=True)
class Lack:
    """Say which memory is too small for a trainer, and what is known of its views and of the other memory."""

    memory: Memory
    share_in_view: float  # of the Gaussians, in the largest view of a step
    other_room: float = math.inf  # bytes of the other memory that there are for each Gaussian
    num_ranks: int = 1  # that train together
    ran_out: bool = False  # with Gaussians there, whose degree stays; False: at the start, by an estimate


# Traffic. Rows are 48 (appearance) and 12 (geometry) float32.
# - Adam over a value reads parameter, gradient and two moments, and writes three of them: 28 bytes. Where it is dense
#   the backward pass has written gradients of all Gaussians: 4 more. Culling on the device reads 24 bytes of each.
# - Geometry on the device whose steps are deferred is gathered before, which reads parameter and moments and writes the
#   value: 16 bytes of each more. Harmonics that lie there are read so where colours are made of them, 12 bytes of each,
#   and read and written by the step, 24, which makes their gradients.
# - A streamed row comes and goes with its moments, 576 bytes each way, and is updated on the device; with moments in
#   bfloat16 it has 384 bytes. With geometry on the host rows of 256 bytes come with their moments, whose 512 bytes come
#   once more for Adam, and all 768 go: by far the most is read.
# - To forward a row reads parameters and moments and writes the value; to commit one reads its gradient as well and
#   writes three: 4 + 7 values. A row that two consecutive views share takes 3 values less; here few are. The optimized
#   trainer reads 24 bytes in place of the gradient of harmonics.
# - A compact row has 328 bytes, with the step of its last update in both groups: 132 of geometry, 196 of harmonics;
#   values have 256. Where geometry stays on the device its rows are tight, 116. On the device geometry (64) is decoded,
#   which reads the row and writes the values, and stepped, which reads those, gradients, moments and last step (68, or
#   60 of a tight row), and writes the row. Harmonics are read where colours are made of them, and read and written by
#   the step, which makes their gradients of the constant one (12) and of means, which are copied before (36). Where a
#   row travels it is written when it comes and read when it goes. Culling reads 20 bytes of each Gaussian, or 32
#   of each 64 of them. Geometry that stays, beside harmonics on the host, is culled by 32 bytes of each row; its
#   gradients are laid side by side (56 + 64), and its step reads and writes the row.
COMPACT_ROW = 328
COMPACT_VALUES = 256
HARMONICS_ROW = 196
HARMONICS_VALUES = 192
HARMONICS_STEP = 196 + (196 + 12 + 36 + 196)
COMPACT_STEP = (132 + 64) + (64 + 64 + 68 + 132) + HARMONICS_STEP
TIGHT_STEP = (116 + 64) + (64 + 64 + 60 + 116) + HARMONICS_STEP
TIGHT_GEOMETRY_STEP = (116 + 64) + (56 + 64) + (64 + 116 + 116)
COMPACT_COMMIT = COMPACT_ROW + COMPACT_VALUES + COMPACT_ROW  # by the CPU
COMPACT_MADE_COMMIT = COMPACT_ROW + 64 + 24 + COMPACT_ROW  # where gradients of harmonics are made
HARMONICS_COMMIT = HARMONICS_ROW + HARMONICS_VALUES + HARMONICS_ROW  # by the CPU, of harmonics alone
HARMONICS_MADE_COMMIT = HARMONICS_ROW + 24 + HARMONICS_ROW
COMPACT_BY_CPU = (COMPACT_ROW + COMPACT_VALUES) + COMPACT_COMMIT  # where it forwards as well


def streamed_compact(culled: float, visible: float) -> Traffic:
    """Return what a step moves where compact rows travel both ways.

    Args:
        culled: Bytes that culling reads.
        visible: V.
    """
    travelling = 2 * COMPACT_ROW * visible
    return Traffic(device=culled + travelling + COMPACT_STEP * visible, host=travelling, link=COMPACT_ROW * visible)


def gpu_only_footprint(cfg: Any) -> Footprint:
    """Return the memory that training on the device alone takes."""
    return memory_estimate.gpu_only(cfg.sh_degree, cfg.adam, cfg.state, cfg.batch_size)


def optimized_footprint(cfg: Any) -> Footprint:
    """Return the memory that training takes where the CPU updates rows."""
    return memory_estimate.optimized(cfg.sh_degree, cfg.geometry, cfg.state, cfg.batch_size)


def split_footprint(cfg: Any) -> Footprint:
    """Return the same where large views are rendered in tiles."""
    return memory_estimate.split(cfg.sh_degree, cfg.geometry, cfg.largest_part, cfg.state)


def streamed_footprint(cfg: Any) -> Footprint:
    """Return the memory that training takes where the device updates rows of the host, in float32."""
    return memory_estimate.streamed(cfg.sh_degree, cfg.geometry, cfg.moments, cfg.state)


def streamed_compact_footprint(cfg: Any) -> Footprint:
    """Return the memory that training with compact rows takes, residents included."""
    footprint = memory_estimate.streamed(cfg.sh_degree, cfg.geometry, cfg.moments, cfg.state, cfg.batch_size)
    return memory_estimate.with_residents(footprint, cfg.sh_degree, cfg.resident_share)


TRAINERS: dict[str, Trainer] = {
    "gpu_only": Trainer(
        "simple_trainer",
        footprint=gpu_only_footprint,
        traffic=lambda n, v: Traffic(device=(28 + 4) * 59 * n),
        options={"adam": "dense"},
        less_device="gpu_only_deferred",
        smaller_views_help=False,  # all Gaussians lie there
    ),
    "gpu_only_deferred": Trainer(
        "simple_trainer",
        footprint=gpu_only_footprint,
        traffic=lambda n, v: Traffic(device=24 * n + ((16 + 28) * 11 + (12 + 24) * 48) * v),
        options={"adam": "deferred"},
        less_device="optimized",
        smaller_views_help=False,
    ),
    "gpu_only_compact": Trainer(
        "simple_trainer",
        footprint=gpu_only_footprint,
        traffic=lambda n, v: Traffic(device=20 * n + TIGHT_STEP * v),
        options={"adam": "deferred", "state": "compact"},
        less_device="streamed_compact",
        smaller_views_help=False,
    ),
    "baseline": Trainer(
        "simple_trainer_hybrid_baseline",
        footprint=lambda cfg: memory_estimate.baseline(cfg.sh_degree),
        traffic=lambda n, v: Traffic(host=48 * n + 28 * 60 * n + 8 * 60 * v, link=240 * v),
        less_device="split_geometry_on_host",
        less_host="optimized",
        several_gpus=False,
        few_steps=True,
    ),
    "optimized": Trainer(
        "simple_trainer_hybrid_optimized",
        footprint=optimized_footprint,
        traffic=lambda n, v: Traffic(host=(40 * 48 + 24) * v, link=192 * v),
        less_device="optimized_geometry_on_host",
        less_host="optimized_compact",
    ),
    "optimized_geometry_on_host": Trainer(
        "simple_trainer_hybrid_optimized",
        footprint=optimized_footprint,
        traffic=lambda n, v: Traffic(host=(44 * 12 + 40 * 48 + 24) * v, link=240 * v),
        options={"geometry": "host"},
        less_device="split_geometry_on_host",
        less_host="optimized_compact_geometry_on_host",
    ),
    # Of the next two the device reads rows itself, and decodes them where they are used.
    "optimized_compact": Trainer(
        "simple_trainer_hybrid_optimized",
        footprint=optimized_footprint,
        traffic=lambda n, v: Traffic(
            device=32 * n + (TIGHT_GEOMETRY_STEP + 2 * HARMONICS_ROW) * v,
            host=(HARMONICS_ROW + HARMONICS_MADE_COMMIT) * v,
            link=HARMONICS_ROW * v,
        ),
        options={"state": "compact"},
        less_device="optimized_compact_geometry_on_host",
    ),
    "optimized_compact_geometry_on_host": Trainer(
        "simple_trainer_hybrid_optimized",
        footprint=optimized_footprint,
        traffic=lambda n, v: Traffic(
            device=(2 * COMPACT_ROW + 64) * v, host=(COMPACT_ROW + COMPACT_MADE_COMMIT) * v, link=COMPACT_ROW * v
        ),
        options={"geometry": "host", "state": "compact"},
        less_device="split_compact_geometry_on_host",
    ),
    "split": Trainer(
        "simple_trainer_hybrid_optimized_split",
        footprint=split_footprint,
        traffic=lambda n, v: Traffic(host=44 * 48 * v, link=192 * v),
        less_device="split_geometry_on_host",
        less_host="split_compact",
    ),
    "split_geometry_on_host": Trainer(
        "simple_trainer_hybrid_optimized_split",
        footprint=split_footprint,
        traffic=lambda n, v: Traffic(host=44 * 60 * v, link=240 * v),
        options={"geometry": "host"},
        less_host="split_compact_geometry_on_host",
    ),
    "split_compact": Trainer(
        "simple_trainer_hybrid_optimized_split",
        footprint=split_footprint,
        traffic=lambda n, v: Traffic(
            device=32 * n + TIGHT_GEOMETRY_STEP * v,
            host=(HARMONICS_ROW + HARMONICS_VALUES + HARMONICS_COMMIT) * v,
            link=HARMONICS_VALUES * v,
        ),
        options={"state": "compact"},
        less_device="split_compact_geometry_on_host",
    ),
    "split_compact_geometry_on_host": Trainer(
        "simple_trainer_hybrid_optimized_split",
        footprint=split_footprint,
        traffic=lambda n, v: Traffic(host=COMPACT_BY_CPU * v, link=COMPACT_VALUES * v),
        options={"geometry": "host", "state": "compact"},
    ),
    "streamed": Trainer(
        "simple_trainer_hybrid_streamed",
        footprint=streamed_footprint,
        traffic=lambda n, v: Traffic(device=24 * n + 28 * 59 * v, host=2 * 576 * v, link=576 * v),
        less_device="streamed_geometry_on_host",
        less_host="streamed_compact",
    ),
    "streamed_geometry_on_host": Trainer(
        "simple_trainer_hybrid_streamed",
        footprint=streamed_footprint,
        traffic=lambda n, v: Traffic(device=4 * 256 * v, host=(1280 + 768) * v, link=1280 * v),
        options={"geometry": "host"},
        less_device="optimized_geometry_on_host",
        less_host="streamed_compact_geometry_on_host",
    ),
    "streamed_bfloat16": Trainer(
        "simple_trainer_hybrid_streamed",
        footprint=streamed_footprint,
        traffic=lambda n, v: Traffic(device=24 * n + (28 * 11 + 20 * 48) * v, host=2 * 384 * v, link=384 * v),
        options={"moments": "bfloat16"},
        less_device="streamed_geometry_on_host",
        less_host="streamed_compact",
    ),
    "streamed_compact": Trainer(
        "simple_trainer_hybrid_streamed",
        footprint=streamed_compact_footprint,
        traffic=lambda n, v: streamed_compact(20 * n, v),
        options={"state": "compact"},
        less_device="streamed_compact_geometry_on_host",
    ),
    "streamed_compact_geometry_on_host": Trainer(
        "simple_trainer_hybrid_streamed",
        footprint=streamed_compact_footprint,
        traffic=lambda n, v: streamed_compact(32 / 64 * n, v),
        options={"state": "compact", "geometry": "host"},
        less_device="split_compact_geometry_on_host",
    ),
}


def trainer_of(script: str, cfg: object) -> Trainer:
    """Return the entry of a script with these options: of those that fit, the first that names most of them."""
    fitting = [
        trainer for trainer in TRAINERS.values() if trainer.script == script and not _missing(trainer.options, cfg)
    ]
    return max(fitting, key=lambda trainer: len(trainer.options))


def footprint_of(trainer: Trainer, cfg: Any, num_ranks: int = 1) -> Footprint:
    """Return the memory that each Gaussian of a rank takes; each draws a part at once, of what all bring."""
    footprint = trainer.footprint(replace(cfg, batch_size=num_ranks * cfg.batch_size))
    return replace(footprint, largest_part=min(1.0, num_ranks * footprint.largest_part))


def smaller_trainer(trainer: Trainer, cfg: Any, lack: Lack) -> Smaller | None:
    """Return the next trainer that takes less of a memory, by its footprint, and for which the other one suffices.

    Args:
        trainer: The entry that lacks memory.
        cfg: Its options.
        lack: Which memory is too small.

    Returns:
        It, with the options that it needs; None where nothing is known to take less.
    """
    resident_share = getattr(cfg, "resident_share", 0)
    # At the start no memory is counted for all of them: none stay where there is no room.
    if lack.memory == "device" and (0 < resident_share < 1 or (resident_share > 0 and lack.ran_out)):
        return Smaller(trainer, {"resident_share": 0})
    taken, _ = _taken(trainer, cfg, lack)
    for entry, parts in product(_chain(trainer, lack.memory), PARTS):
        smaller = Smaller(entry, _options(entry, trainer, cfg, lack, parts))
        less, other = _taken(entry, smaller.cfg(cfg), lack)
        if less < taken and other <= lack.other_room:
            return smaller
    return None


def remedy(trainer: Trainer, cfg: Any, lack: Lack) -> str:
    """Return what to change where memory is too small for a trainer with these options."""
    smaller = smaller_trainer(trainer, cfg, lack)
    if smaller is not None and smaller.trainer.script == trainer.script:
        return "give " + " ".join(_words(smaller.options))
    remedies = []
    if smaller is not None:
        command = " ".join([smaller.trainer.path.name, *_words(smaller.options)])
        remedies.append(f"use {command}, which needs less of it")
    if lack.memory == "device" and getattr(cfg, "largest_part", 0) > 0:
        remedies.append("lower --split_threshold")
    if lack.memory == "device" and trainer.smaller_views_help:
        remedies.append("raise --data_factor")
        remedies += ["lower --batch_size"] if cfg.batch_size > 1 else []
    else:
        has_degree = cfg.sh_degree > 0 and not (cfg.resume or lack.ran_out)
        remedies += ["lower --sh_degree"] if has_degree else []
        remedies += ["free some of it"] if smaller is None else []
    return ", or ".join([", ".join(remedies[:-1]), remedies[-1]] if len(remedies) > 1 else remedies)


def _chain(trainer: Trainer, memory: Memory) -> Iterator[Trainer]:
    """Give what may need less of a memory, one after the other."""
    while name := trainer.less_device if memory == "device" else trainer.less_host:
        trainer = TRAINERS[name]
        yield trainer


def _taken(trainer: Trainer, cfg: Any, lack: Lack) -> tuple[float, float]:
    """Return the bytes a Gaussian takes of the memory that lacks, and of the other one, its start included."""
    footprint = footprint_of(trainer, cfg, lack.num_ranks)
    host, device = footprint.while_training(lack.share_in_view, sparing=True)
    if lack.memory == "device":
        return device, max(host, footprint.host_at_start)
    return host, max(device, footprint.device_at_start)


def _options(entry: Trainer, trainer: Trainer, cfg: Any, lack: Lack, parts: int) -> dict[str, Any]:
    """Return the options of an entry that are to be given in place of a trainer's: of its script those that change.

    Where a threshold decides a view is cut in so many parts at least.
    """
    if entry.script != trainer.script:
        part = max(round(lack.share_in_view / lack.num_ranks / parts, 3), 0.001)
        is_cut = getattr(Smaller(entry, entry.options).cfg(cfg), "largest_part", 0) <= part
        return {**entry.options, **({} if is_cut else {"split_threshold": part})}
    options = _missing(entry.options, cfg)
    if "state" in options and getattr(cfg, "moments", "float32") != "float32":
        options["moments"] = "float32"  # a compact state has its own
    return options


def _missing(options: Mapping[str, str], cfg: object) -> dict[str, str]:
    return {name: value for name, value in options.items() if getattr(cfg, name, None) != value}


def _words(options: Mapping[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]
