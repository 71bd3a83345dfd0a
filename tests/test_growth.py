"""Where growth leads: what is said of it before it begins, against what a loop over the refinements grows to."""

from __future__ import annotations

from dataclasses import replace

import pytest

import simple_trainer
from configs import Config
from tests.interrupted_runs import run_script
from training.growth import shortfall
from training.strategy import strategy_of

MCMC = Config(strategy="mcmc", max_gaussians=8_000_000, max_steps=7000)
TARGET = Config(target_gaussians=5000, max_steps=1000)


def grown_by_mcmc(cfg: Config, steps_done: int, count: int) -> int:
    """Grow step by step, by a twentieth that is rounded down."""
    for step in range(steps_done, min(cfg.max_steps, cfg.refine_stop_iter)):
        if step > cfg.refine_start_iter and step % cfg.refine_every == 0:
            count = max(min(count * 105 // 100, cfg.max_gaussians), count)
    return count


def doubled(cfg: Config, steps_done: int, count: int) -> int:
    """Double step by step, but where a reset has just been."""
    for step in range(steps_done, min(cfg.max_steps, cfg.refine_stop_iter)):
        is_paused = step % cfg.reset_every < cfg.pause_refine_after_reset
        if step > cfg.refine_start_iter and step % cfg.refine_every == 0 and not is_paused:
            count = min(2 * count, max(cfg.target_gaussians, count))
    return count


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_steps": 30_000},
        {"max_steps": 30_000, "refine_stop_iter": 2001},
        {"max_steps": 2000, "refine_stop_iter": 2000},
        {"max_steps": 2001, "refine_stop_iter": 2001},
        {"refine_start_iter": 0, "refine_every": 7},
        {"refine_start_iter": 7000},
        {"pause_refine_after_reset": 3000},
        {"max_gaussians": 40_000},
    ],
    ids=str,
)
@pytest.mark.parametrize("steps_done", [0, 500, 501, 1999, 2001, 6999])
@pytest.mark.parametrize("count", [19, 20, 33_004, 50_000])
def test_mcmc_heads_for_what_growth_leads_to(changes, steps_done, count):
    cfg = replace(MCMC, **changes)
    expected = grown_by_mcmc(cfg, steps_done, count)
    assert strategy_of(cfg, 1.0).heading(steps_done - 1, count) == (expected if expected > count else None)


def test_a_bound_that_is_far_is_not_where_mcmc_heads():
    """The number that a newcomer took for a promise: 8 million in 7,000 steps."""
    lack = shortfall(MCMC, 0, 33_004, MCMC.max_gaussians)
    assert lack.reached == grown_by_mcmc(MCMC, 0, 33_004)
    assert 700_000 < lack.reached < 800_000
    assert (lack.cause, lack.remedy) == ("a refinement adds 5 %", "raise --max_steps, or lower --refine_every")


MCMC_CASES = [
    ({"max_steps": 30_000}, 0, 33_004, None),
    ({"max_steps": 30_000, "refine_stop_iter": 7000}, 0, 33_004, "raise --refine_stop_iter, or lower --refine_every"),
    ({"refine_stop_iter": 7000}, 0, 33_004, "raise --max_steps and --refine_stop_iter, or lower --refine_every"),
    ({"refine_start_iter": 6000}, 0, 33_004, "raise --max_steps and --refine_stop_iter, or lower --refine_every"),
    (
        {"max_gaussians": 700_000, "refine_start_iter": 1000},
        0,
        33_004,
        "raise --max_steps, or lower --refine_every or ",
    ),
    ({}, 6999, 33_004, "raise --max_steps"),
    ({}, 0, 19, "begin with more points, or take --strategy default"),
    ({}, 0, 9_000_000, None),
]


@pytest.mark.parametrize(("changes", "steps_done", "count", "remedy"), MCMC_CASES, ids=lambda value: str(value)[:40])
def test_what_helps_mcmc_is_said(changes, steps_done, count, remedy):
    cfg = replace(MCMC, **changes)
    lack = shortfall(cfg, steps_done, count, cfg.max_gaussians)
    assert (lack is None) == (remedy is None)
    if lack is not None:
        assert lack.remedy.startswith(remedy)
        assert lack.reached == grown_by_mcmc(cfg, steps_done, count)


TARGET_CASES = [
    ({}, 0, "a refinement at most doubles them", None),
    ({"max_steps": 700}, 0, "a refinement at most doubles them", "raise --max_steps, or lower --refine_every"),
    (
        {"max_steps": 500},
        0,
        "no refinement comes before --max_steps",
        "raise --max_steps, or lower --refine_start_iter",
    ),
    (
        {"refine_stop_iter": 500},
        0,
        "no refinement comes before --refine_stop_iter",
        "raise --refine_stop_iter, or lower",
    ),
    (
        {"max_steps": 500, "refine_stop_iter": 500},
        0,
        "no refinement comes before --max_steps and --refine_stop_iter",
        "raise --max_steps and --refine_stop_iter, or lower --refine_start_iter",
    ),
    ({}, 900, "a refinement at most doubles them", "raise --max_steps, or lower --refine_every"),
    ({}, 901, "no refinement comes before --max_steps", "raise --max_steps, or lower --refine_every"),
    (
        {"pause_refine_after_reset": 3000},
        0,
        "--pause_refine_after_reset 3,000 leaves no refinement",
        "lower --pause_refine_after_reset",
    ),
    (
        {"pause_refine_after_reset": 1000},
        0,
        "--pause_refine_after_reset 1,000 leaves no refinement",
        "raise --max_steps, or lower --pause_refine_after_reset",
    ),
    (
        {"pause_refine_after_reset": 3000, "max_steps": 400},
        0,
        "no refinement comes before --max_steps",
        "raise --max_steps and --refine_stop_iter, and lower --pause_refine_after_reset",
    ),
]


@pytest.mark.parametrize(("changes", "steps_done", "cause", "remedy"), TARGET_CASES, ids=lambda value: str(value)[:40])
def test_why_a_target_cannot_be_reached_is_said(changes, steps_done, cause, remedy):
    cfg = replace(TARGET, **changes)
    lack = shortfall(cfg, steps_done, 600, 5000)
    reached = doubled(cfg, steps_done, 600)
    assert (lack is None) == (reached >= 5000) == (remedy is None)
    if lack is not None:
        assert (lack.reached, lack.cause) == (reached, cause)
        assert lack.remedy.startswith(remedy)


@pytest.fixture
def said(monkeypatch, capsys, city_block, tmp_path):
    """Return what a run says of where growth will end, and on what step it stands."""

    def run(*options: object) -> list[str]:
        options = ("--refine_start_iter", 1, "--refine_every", 2, *options)
        assert run_script(monkeypatch, simple_trainer, city_block, tmp_path, *options) == 0
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("Warning: growth")]

    return run


@pytest.mark.slow
def test_a_run_says_at_its_start_where_it_ends_below_its_bound(said):
    options = ("--strategy", "mcmc", "--max_gaussians", 700)
    assert said(*options, "--max_steps", 5) == [
        "Warning: growth will end below --max_gaussians 700, with 661 Gaussians: a refinement adds 5 %; raise "
        "--max_steps."
    ]
    assert said(*options, "--max_steps", 7, "--resume") == [
        "Warning: growth will end below --max_gaussians 700, with 694 Gaussians: a refinement adds 5 %; raise "
        "--max_steps, or lower --refine_every."
    ]
    assert said(*options, "--max_steps", 9, "--resume") == []


@pytest.mark.slow
def test_a_resumed_run_says_where_it_ends_below_its_target(said):
    """It is not refused: it may stand where growth has ended, and is to be trained on."""
    options = ("--prune_opa", 1e-6, "--target_gaussians")
    assert said(*options, 620, "--max_steps", 3) == []
    far = said(*options, 5000, "--max_steps", 5, "--resume")
    assert far[0] == (
        "Warning: growth will end below --target_gaussians 5,000, with 1,240 Gaussians: a refinement at most doubles "
        "them; raise --max_steps."
    )
    ended = said(*options, 5000, "--max_steps", 6, "--refine_stop_iter", 5, "--resume")
    assert len(ended) == 1
    assert ended[0].endswith(
        " Gaussians: no refinement comes before --refine_stop_iter; raise --max_steps and --refine_stop_iter."
    )


@pytest.mark.slow
def test_a_resumed_run_that_has_come_close_to_its_target_says_nothing(said):
    options = ("--prune_opa", 1e-6, "--target_gaussians", 620, "--refine_stop_iter", 3)
    assert said(*options, "--max_steps", 4) == []
    assert said(*options, "--max_steps", 5, "--resume", "--target_gaussians", 640) == []
