"""The ways to train a scene, by name: a trainer script and the arguments that choose its variant.

compare.py and benchmarks/train_step.py run them all. A new trainer is one more line here.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType


@dataclass(frozen=True)
class Trainer:
    script: str  # its module: a file beside this one
    arguments: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        return Path(__file__).parent / f"{self.script}.py"

    def load(self) -> ModuleType:
        """The script's module, with `CONFIGS` and `train`."""
        return importlib.import_module(self.script)


TRAINERS: dict[str, Trainer] = {
    "gpu_only": Trainer("simple_trainer"),
    "baseline": Trainer("simple_trainer_hybrid_baseline"),
    "optimized": Trainer("simple_trainer_hybrid_optimized"),
    "optimized_geometry_on_host": Trainer("simple_trainer_hybrid_optimized", ("--geometry", "host")),
    "split": Trainer("simple_trainer_hybrid_optimized_split"),
    "streamed": Trainer("simple_trainer_hybrid_streamed"),
    "streamed_geometry_on_host": Trainer("simple_trainer_hybrid_streamed", ("--geometry", "host")),
    "streamed_bfloat16": Trainer("simple_trainer_hybrid_streamed", ("--moments", "bfloat16")),
}
