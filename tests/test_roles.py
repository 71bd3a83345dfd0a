"""What each option changes: every one has a role, and whoever asks for roles does as they say."""

from __future__ import annotations

from dataclasses import asdict, fields, replace

import pytest

from comparing.runs import differing_options
from configs import Config
from trainers import TRAINERS
from training.roles import OF_A_MACHINE, OF_NO_OTHER_RUN, ROLES, TOLD_WHEN_RESUMED


def test_every_option_of_all_scripts_has_one_role():
    names = {item.name for trainer in TRAINERS.values() for item in fields(trainer.load().CONFIGS["default"])}
    assert sorted(name for of_role in ROLES.values() for name in of_role) == sorted(names)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("num_workers", 3), ("log_every", 7), ("viewer", [80]), ("viewer_host", "0.0.0.0"), ("keep", 9)),
        *(("save_every", "1m"), ("result_dir", "elsewhere"), ("resume", True), ("force", True), ("new_photos", True)),
    ],
)
def test_a_run_is_gone_on_with_whoever_watches_it(name, value):
    cfg = Config()
    assert differing_options(asdict(cfg), replace(cfg, **{name: value})) == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("seed", 1), ("max_steps", 5), ("strategy", "mcmc"), ("steps_scaler", 0.5), ("test_every", 9)),
        *(("data_dir", "elsewhere"), ("device", "cpu"), ("init_ckpt", "a.pt")),  # figures, or the model, are others
        *(("eval_steps", [5]), ("timelapse", 9), ("lpips_net", "vgg"), ("shares", [1, 2])),
    ],
)
def test_a_run_of_another_model_or_other_results_is_another(name, value):
    cfg = Config()
    assert name in differing_options(asdict(cfg), replace(cfg, **{name: value}))


def test_what_makes_a_model_is_never_a_machine_s_own():
    assert not {*TOLD_WHEN_RESUMED} & {*OF_A_MACHINE, *OF_NO_OTHER_RUN}
    assert {"data_dir", "result_dir", "device", "num_workers"} <= {*OF_A_MACHINE}
