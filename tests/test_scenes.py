"""Where the trainer scripts may differ: each has its own loop and its own table of scenes, edited there.

Whoever changes a scene or a step in one script changes it in all of them, or says here that the difference is wanted.
"""

from __future__ import annotations

import ast
import difflib
import importlib
from dataclasses import fields
from pathlib import Path

import pytest

from configs import DATASETS, Config
from trainers import TRAINERS

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.stem for path in ROOT.glob("simple_trainer*.py"))
OPTIMIZED, STREAMED = "simple_trainer_hybrid_optimized", "simple_trainer_hybrid_streamed"
SPLIT = f"{OPTIMIZED}_split"

# Fields of a scene in which a script is meant to differ from simple_trainer: {(script, scene): {field, ...}}.
INTENDED: dict[tuple[str, str], set[str]] = {}

# Lines of `train` that differ from those of the optimized trainer: (its lines, the script's).
LOOPS: dict[str, tuple[list[str], list[str]]] = {
    OPTIMIZED: ([], []),
    STREAMED: (
        [
            "def train(run: TrainingRun[HybridConfig]) -> None:",
            "gaussians = ForwardedGaussians(run.initial_gaussians(), run.adam, device=run.device, "
            "geometry=cfg.geometry, state=cfg.state, max_gaussians=cfg.most_gaussians)",
        ],
        [
            "def train(run: TrainingRun[StreamedConfig]) -> None:",
            "gaussians = StreamedGaussians(run.initial_gaussians(), run.adam, device=run.device, "
            "geometry=cfg.geometry, moments=cfg.moments, state=cfg.state, max_gaussians=cfg.most_gaussians, "
            "resident_share=cfg.resident_share, tell=tqdm.write)",
        ],
    ),
    "simple_trainer_hybrid_baseline": (
        [
            "def train(run: TrainingRun[HybridConfig]) -> None:",
            "gaussians = ForwardedGaussians(run.initial_gaussians(), run.adam, device=run.device, "
            "geometry=cfg.geometry, state=cfg.state, max_gaussians=cfg.most_gaussians)",
            "if run.upcoming is not None:",
            "gaussians.prefetch(run.upcoming.cameras, strategy.strays(step, gaussians, gaussians.ids, rows))",
            "run.mark('cull')",
        ],
        [
            "def train(run: TrainingRun[Config]) -> None:",
            "gaussians = BaselineGaussians(run.initial_gaussians(), run.adam, device=run.device, "
            "max_gaussians=cfg.most_gaussians)",
        ],
    ),
    "simple_trainer": (
        [
            "def train(run: TrainingRun[HybridConfig]) -> None:",
            "gaussians = ForwardedGaussians(run.initial_gaussians(), run.adam, device=run.device, "
            "geometry=cfg.geometry, state=cfg.state, max_gaussians=cfg.most_gaussians)",
            "if run.upcoming is not None:",
            "gaussians.prefetch(run.upcoming.cameras, strategy.strays(step, gaussians, gaussians.ids, rows))",
            "run.mark('cull')",
            "ids = gaussians.ids",
            "gaussians.update()",
        ],
        [
            "def train(run: TrainingRun[DeviceConfig]) -> None:",
            "deferred = cfg.adam == 'deferred'",
            "gaussians: DeferredGaussians | DeviceGaussians",
            "if deferred:",
            "gaussians = DeferredGaussians(run.initial_gaussians(), run.adam, device=run.device, state=cfg.state)",
            "else:",
            "gaussians = DeviceGaussians(run.initial_gaussians(), run.adam, device=run.device)",
            "strays = strategy.strays(step, gaussians, gaussians.ids, rows) if deferred else None",
            "if run.upcoming is not None:",
            "gaussians.prefetch(run.upcoming.cameras, strays)",
            "ids = gaussians.ids if deferred else None",
            "gaussians.update(info['gaussian_ids'])",
        ],
    ),
}


def configs_of(script: str) -> dict[str, Config]:
    return importlib.import_module(script).CONFIGS


def lines_of_train(script: str) -> list[str]:
    """The lines of a script's `train`, each on one line, without comments, docstring and indentation."""
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    (train,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")
    train.body = train.body[1:]
    return [line.strip() for line in ast.unparse(train).splitlines()]


def test_the_register_names_the_scripts_that_there_are():
    assert sorted({trainer.script for trainer in TRAINERS.values()}) == SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_every_scene_with_the_same_numbers(script):
    expected, actual = configs_of("simple_trainer"), configs_of(script)
    assert list(actual) == list(expected) == list(DATASETS)
    for scene, config in expected.items():
        differing = {
            item.name for item in fields(Config) if getattr(config, item.name) != getattr(actual[scene], item.name)
        }
        assert differing == INTENDED.get((script, scene), set()), scene


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_scene_names_its_own_data_and_results(script):
    for scene, config in configs_of(script).items():
        assert config.result_dir == f"results/{scene}"
        assert {name: getattr(config, name) for name in DATASETS[scene]} == DATASETS[scene]
        assert config.max_steps == max(config.eval_steps) == max(config.save_steps) == max(config.ply_steps)


# The split trainer's loop is over tiles: the test after this one compares it.
@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != SPLIT])
def test_loops_differ_only_where_it_is_said(script):
    assert script in LOOPS, "say there which lines of its loop differ from the optimized trainer's"
    compared = list(difflib.ndiff(lines_of_train(OPTIMIZED), lines_of_train(script)))
    removed, added = ([line[2:] for line in compared if line[0] == sign] for sign in "-+")
    assert (removed, added) == LOOPS[script]


def test_tiles_are_trained_as_whole_views_are_but_for_rendering():
    def after_rendering(script: str) -> list[str]:
        lines = lines_of_train(script)
        lines = lines[lines.index("ids = gaussians.ids") :]
        (end,) = (index for index, line in enumerate(lines) if line.startswith("del "))
        return lines[:end]

    assert after_rendering(SPLIT) == after_rendering(OPTIMIZED)
