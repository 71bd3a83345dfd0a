"""Checkpoints of compact states: read back bit for bit, converted both ways, and checked."""

from __future__ import annotations

import json
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import export
import simple_trainer
import simple_trainer_hybrid_baseline
import simple_trainer_hybrid_streamed
from benchmarks.aerial_scene import aerial_scene
from errors import DamagedError
from offload.adam.deferral import largest_step
from offload.adam.options import AdamOptions
from offload.adam.state import CurrentValues, current_rows, format_of, names_of_rows, sh_degree_of
from offload.culling.native import BlockBounds, visible_ids
from offload.models.baseline import BaselineGaussians
from offload.models.deferred import DeferredGaussians
from offload.models.device import DeviceGaussians
from offload.models.forwarded import ForwardedGaussians
from offload.models.streamed import StreamedGaussians
from tests.aerial_training import train_on_random_gradients, views_of
from tests.interrupted_runs import run_script, saved
from tests.tight_rows import in_other_form, same_rows
from tests.training_scripts import slow_but
from training.checkpoint_writing import save_checkpoint
from training.checkpoints import PROLOGUE, Checkpoint, load_checkpoint, peek_checkpoint
from training.joined_rows import joined_state, picked_state
from training.ply import load_ply

CPU, N = torch.device("cpu"), 600
VIEWS = views_of(aerial_scene(N, seed=0)[1])
NEXT = VIEWS[5 % len(VIEWS)]  # after 5 steps
RATES = {"means": 1e-3, "scales": 5e-3, "quats": 1e-3, "opacities": 5e-2, "sh0": 2.5e-3, "shN": 1.25e-4}
ADAM = AdamOptions(RATES, lambda step: RATES["means"], (0.9, 0.999))
BOUND = {"device": CPU, "max_gaussians": 2 * N}
COMPACT: dict[str, Callable] = {
    "deferred": lambda start: DeferredGaussians(start, ADAM, device=CPU, state="compact"),
    "forwarded": lambda start: ForwardedGaussians(start, ADAM, state="compact", **BOUND),
    "forwarded, host": lambda start: ForwardedGaussians(start, ADAM, geometry="host", state="compact", **BOUND),
    "streamed": lambda start: StreamedGaussians(start, ADAM, state="compact", **BOUND),
    "streamed, host": lambda start: StreamedGaussians(start, ADAM, geometry="host", state="compact", **BOUND),
}
FLOAT: dict[str, Callable] = {
    "dense": lambda start: DeviceGaussians(start, ADAM, device=CPU),
    "deferred": lambda start: DeferredGaussians(start, ADAM, device=CPU),
    "baseline": lambda start: BaselineGaussians(start, ADAM, **BOUND),
    "forwarded": lambda start: ForwardedGaussians(start, ADAM, geometry="device", **BOUND),
    "forwarded, host": lambda start: ForwardedGaussians(start, ADAM, geometry="host", **BOUND),
    "streamed": lambda start: StreamedGaussians(start, ADAM, **BOUND),
    "streamed, host": lambda start: StreamedGaussians(start, ADAM, geometry="host", **BOUND),
    "streamed, bfloat16": lambda start: StreamedGaussians(start, ADAM, moments="bfloat16", **BOUND),
}


def start(sh_degree: int) -> dict[str, Tensor]:
    parameters, _ = aerial_scene(N, seed=0)
    generator = torch.Generator().manual_seed(1)
    parameters["shN"] = 0.1 * torch.randn(N, (sh_degree + 1) ** 2 - 1, 3, generator=generator)
    return parameters


def train(gaussians, *steps: int):
    train_on_random_gradients(gaussians, VIEWS, range(*steps))
    return gaussians


def write(path: Path, gaussians) -> Checkpoint:
    save_checkpoint(path, Checkpoint(gaussians.steps_done, np.eye(4), gaussians.state()))
    return load_checkpoint(path)


def start_from(make: Callable, checkpoint: Checkpoint):
    gaussians = make({name: value.clone() for name, value in checkpoint.gaussians.items()})
    gaussians.load_state(checkpoint.state)
    return gaussians


def values_of(gaussians) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in gaussians.rows(0, gaussians.num_gaussians).items()}


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def spacing_of_half(values: Tensor) -> Tensor:
    return (2.0 ** (torch.frexp(values)[1] - 11)).clamp(min=2.0**-24)


@pytest.mark.parametrize("sh_degree", slow_but(["0", "3"], [0, 1, 2, 3]))
@pytest.mark.parametrize("kind", ["deferred", "forwarded", "streamed", "streamed, host"])
def test_a_compact_state_is_read_back_bit_for_bit(tmp_path, kind, sh_degree):
    """And training goes on as if it had not been interrupted."""
    gaussians = train(COMPACT[kind](start(sh_degree)), 5)
    checkpoint = write(tmp_path / "a.pt", gaussians)
    assert format_of(checkpoint.state) == "compact"
    assert sh_degree_of(checkpoint.state) == sh_degree
    assert (checkpoint.state["last_step/appearance"] < 5).any()
    again = start_from(COMPACT[kind], checkpoint)
    assert_same_bits(again.state(), gaussians.state())
    train(gaussians, 5, 9)
    train(again, 5, 9)
    assert_same_bits(again.state(), gaussians.state())


@pytest.mark.parametrize("sh_degree", [0, 3])
@pytest.mark.parametrize("make", [FLOAT["dense"], FLOAT["forwarded"], FLOAT["streamed, host"], COMPACT["streamed"]])
def test_a_checkpoint_is_exported_with_all_steps_applied(tmp_path, make, sh_degree):
    """Whichever rows have deferred some; .ply asks for none of them first."""
    checkpoint = write(tmp_path / "a.pt", train(make(start(sh_degree)), 5))
    export.export(export.Options(tmp_path / "a.pt", tmp_path / "a.ply"))
    assert_same_bits(load_ply(tmp_path / "a.ply"), checkpoint.gaussians)


@pytest.mark.parametrize("kind", ["forwarded", "forwarded, host", "streamed", "streamed, host"])
def test_compact_trainers_take_one_anothers_states_as_they_are(tmp_path, kind):
    checkpoint = write(tmp_path / "a.pt", train(COMPACT["deferred"](start(3)), 5))
    gaussians = start_from(COMPACT[kind], checkpoint)
    back = start_from(COMPACT["deferred"], write(tmp_path / "b.pt", gaussians))
    for state in (gaussians.state(), back.state()):
        for name in ("packed/appearance", "last_step/geometry", "last_step/appearance"):
            assert torch.equal(state[name], checkpoint.state[name]), name
        assert same_rows(state["packed/geometry"], checkpoint.state["packed/geometry"])
    assert torch.equal(state["packed/geometry"], checkpoint.state["packed/geometry"])  # tight again


@pytest.mark.parametrize("sh_degree", slow_but(["0", "3"], [0, 1, 2, 3]))
@pytest.mark.parametrize("other", slow_but(["dense", "streamed"], FLOAT))
def test_a_compact_state_goes_to_every_trainer_and_back(tmp_path, other, sh_degree):
    compact = train(COMPACT["streamed"](start(sh_degree)), 5)
    checkpoint = write(tmp_path / "compact.pt", compact)
    gaussians = start_from(FLOAT[other], checkpoint)
    expected = values_of(compact)
    for name, value in values_of(gaussians).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)
    assert_moments_are(gaussians.state(), checkpoint.state, rounded=2**-7 if other.endswith("bfloat16") else 1e-5)

    back = start_from(COMPACT["streamed"], write(tmp_path / "float.pt", gaussians))
    for name, value in values_of(back).items():
        if name == "shN":
            assert bool(((value - expected[name]).abs() <= spacing_of_half(expected[name]) * 1.001).all())
        else:
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)

    if other == "dense":  # which is told of rows in another way
        return
    before, drawn = expected, drawn_rows(expected)
    for trainer in (gaussians, back):
        step_on(trainer, drawn)
    exact, rounded = values_of(gaussians), values_of(back)
    for name, value in exact.items():
        moved, allowed = (value - before[name]).abs(), 0.05 * largest_step((0.9, 0.999)) * RATES[name]
        if name == "shN":
            allowed = allowed + 2 * spacing_of_half(value)
        elif name != "quats":
            assert moved[drawn].max() > 0.1 * RATES[name]
        assert bool(((rounded[name] - value).abs() <= allowed + 1e-6 * value.abs()).all()), name


def drawn_rows(values: dict[str, Tensor]) -> Tensor:
    """Rows that a view shows, whatever else culling may find for it."""
    columns = [values[name].view(N, -1) for name in ("means", "scales", "quats", "opacities")]
    geometry = torch.cat([*columns, torch.zeros(N, 1)], dim=1)
    drawn = visible_ids(geometry, BlockBounds(geometry), NEXT)
    assert len(drawn) > 20
    return drawn


def step_on(gaussians, drawn: Tensor) -> None:
    """A step with a gradient of rows that are drawn, the same for every trainer."""
    rows = gaussians.fetch(NEXT)
    ids = gaussians.ids
    positions = torch.searchsorted(ids, drawn)
    assert torch.equal(ids[positions], drawn)
    loss = torch.zeros(())
    for name, value in named_alike(rows).items():
        generator = torch.Generator().manual_seed(len(name))
        coefficients = torch.randn(N, *value.shape[1:], generator=generator)
        loss = loss + (value[positions] * coefficients[drawn]).sum()
    loss.backward()
    gaussians.update()


def named_alike(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Coefficients of colours under two names, without those that only fill a row."""
    rows = dict(rows)
    if "colors" in rows:
        rows["sh0"], rows["shN"] = rows["colors"][:, :1], rows["colors"][:, 1:]
        del rows["colors"]
    rows["shN"] = rows["shN"][:, : max(k for k in (0, 3, 8, 15) if k <= rows["shN"].shape[1])]
    return rows


def assert_moments_are(state: dict[str, Tensor], expected: dict[str, Tensor], rounded: float) -> None:
    for name in RATES:
        if expected["packed/sh_degree"] == 0 and name == "shN":
            continue
        for (_, actual), (_, wanted) in zip(current_rows(state, name), current_rows(expected, name), strict=True):
            for array in ("exp_avg", "exp_avg_sq"):
                scale = wanted[array].abs().amax()
                torch.testing.assert_close(
                    actual[array].float(), wanted[array], rtol=2 * rounded, atol=1e-6 * scale.item()
                )


def test_a_compact_state_made_of_float32_is_the_same_each_time(tmp_path):
    """Its random rounding depends on rows and step alone; moments keep to what their codes hold."""
    checkpoint = write(tmp_path / "a.pt", train(FLOAT["streamed"](start(3)), 5))
    first, second = (start_from(COMPACT["streamed, host"], checkpoint).state() for _ in range(2))
    assert_same_bits(first, second)
    tight = start_from(COMPACT["deferred"], checkpoint).state()
    assert same_rows(tight["packed/geometry"], first["packed/geometry"])
    for name in ("means", "opacities", "sh0"):  # moments in bfloat16
        (_, actual), (_, wanted) = next(current_rows(first, name)), next(current_rows(checkpoint.state, name))
        for array in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(actual[array], wanted[array], rtol=2**-7, atol=1e-30)
    (_, actual), (_, wanted) = next(current_rows(first, "shN")), next(current_rows(checkpoint.state, "shN"))
    large = wanted["exp_avg_sq"] > wanted["exp_avg_sq"].amax((1, 2), keepdim=True) * 2.0**-20
    ratio = actual["exp_avg_sq"][large] / wanted["exp_avg_sq"][large]
    assert bool(((ratio > 2**-0.126) & (ratio < 2**0.13)).all())  # one of 16 steps to an octave of the root


def test_what_a_file_says_of_its_version(tmp_path):
    """A file that earlier versions can read says so."""
    for path, gaussians in (
        (tmp_path / "a", FLOAT["streamed"](start(1))),
        (tmp_path / "b", COMPACT["streamed"](start(1))),
        (tmp_path / "c", COMPACT["deferred"](start(1))),
    ):
        write(path, gaussians)
    versions = [PROLOGUE.unpack_from((tmp_path / name).read_bytes())[1] for name in ("a", "b", "c")]
    assert versions == [2, 3, 5]


def test_a_file_of_an_earlier_version_is_read(tmp_path):
    """Version 2 without photos, as it was written before there were compact states."""
    path = tmp_path / "a.pt"
    gaussians = train(FLOAT["streamed"](start(2)), 3)
    expected = write(path, gaussians).gaussians
    content = path.read_bytes()
    magic, _, place, length, _ = PROLOGUE.unpack_from(content)
    header = json.loads(content[place : place + length])
    del header["photos"], header["options"]
    header["options"] = {"max_steps": 3}
    written = json.dumps(header).encode()
    prologue = PROLOGUE.pack(magic, 2, place, len(written), zlib.crc32(written))
    path.write_bytes(prologue + struct.pack("<I", zlib.crc32(prologue)) + content[len(prologue) + 4 : place] + written)
    checkpoint = load_checkpoint(path)
    for name, value in checkpoint.gaussians.items():
        assert torch.equal(value, expected[name])
    assert format_of(start_from(COMPACT["streamed"], checkpoint).state()) == "compact"


@pytest.mark.parametrize("kind", ["deferred", "forwarded"])
def test_a_file_that_is_not_tight_goes_on_where_rows_are(tmp_path, kind):
    """As it was written before rows on the device were tight."""
    gaussians = train(COMPACT[kind](start(3)), 5)
    state = gaussians.state()
    assert state["packed/geometry"].shape == (N, 28)
    whole = {**state, "packed/geometry": in_other_form(state["packed/geometry"])}
    save_checkpoint(tmp_path / "a.pt", Checkpoint(5, np.eye(4), whole))
    assert PROLOGUE.unpack_from((tmp_path / "a.pt").read_bytes())[1] == 3
    again = start_from(COMPACT[kind], load_checkpoint(tmp_path / "a.pt"))
    assert_same_bits(again.state(), state)
    for some in (gaussians, again):
        train(some, 5, 9)
    assert_same_bits(again.state(), gaussians.state())


def test_rows_move_between_models_on_a_device_and_on_the_host(tmp_path):
    """As ranks exchange them of which one has no room left, each with another form of rows."""
    models = [train(COMPACT[kind](start(3)), 5) for kind in ("deferred", "streamed")]
    assert [some.state()["packed/geometry"].shape[1] for some in models] == [28, 32]
    ids = torch.arange(0, N, 7)
    sent = [{name: rows.clone() for name, rows in some.moving_rows(ids).items()} for some in models]
    assert_same_bits(*sent)
    for gaussians, rows in zip(models, reversed(sent), strict=True):
        gaussians.append_rows(rows)
        state = gaussians.state()
        for name, came in rows.items():
            there = state[name][N:]
            assert same_rows(there, came) if name == "packed/geometry" else torch.equal(there, came)
    on_device, on_host = (some.state() for some in models)
    assert same_rows(on_device["packed/geometry"], on_host["packed/geometry"])


def test_parts_of_which_some_are_tight_are_joined():
    models = [train(COMPACT[kind](start(3)), 5) for kind in ("streamed", "deferred")]
    states = [some.state() for some in models]
    of_rows = names_of_rows(states[0])
    joined = joined_state(states, of_rows)
    rows = joined["packed/geometry"]
    assert rows.shape == (2 * N, 28)
    ids = torch.tensor([3, 2 * N - 1, N, 0])
    for some in (slice(N - 5, N + 5), slice(0, 2 * N), ids):
        assert same_rows(rows[some], torch.cat([in_other_form(states[0]["packed/geometry"]), rows[N:]])[some])
    assert same_rows(rows[N:], states[1]["packed/geometry"])
    for kind, first in (("deferred", 0), ("streamed", N)):
        picked = picked_state(joined, of_rows, np.arange(first, first + N))
        again = COMPACT[kind](start(3))
        again.load_state(picked)
        assert same_rows(again.state()["packed/geometry"], states[0]["packed/geometry"])


@pytest.mark.parametrize("kind", ["streamed", "deferred"])
def test_a_flipped_bit_in_a_row_is_found(tmp_path, kind):
    path = tmp_path / "a.pt"
    write(path, train(COMPACT[kind](start(3)), 2))
    content = bytearray(path.read_bytes())
    place, length = PROLOGUE.unpack_from(content)[2:4]
    entries = json.loads(bytes(content[place : place + length]))["tensors"]
    rng = random.Random(0)
    for _ in range(50):
        entry = entries[rng.choice(["packed/appearance", "packed/geometry", "last_step/appearance"])]
        at = entry["place"] + rng.randrange(4 * int(np.prod(entry["shape"])))
        bit = 1 << rng.randrange(8)
        content[at] ^= bit
        path.write_bytes(content)
        with pytest.raises(DamagedError, match="not a complete checkpoint"):
            load_checkpoint(path)
        content[at] ^= bit
    path.write_bytes(content)
    load_checkpoint(path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state.update({"packed/sh_degree": torch.tensor(2)}),
        lambda state: state.update({"packed/sh_degree": torch.tensor(7)}),
        lambda state: state.update({"packed/appearance": state["packed/appearance"][:, :-1].contiguous()}),
        lambda state: state.update({"packed/appearance": state["packed/appearance"].float()}),
        lambda state: state.update({"packed/geometry": state["packed/geometry"][:, :-2].contiguous()}),
        lambda state: state.pop("packed/appearance"),
        lambda state: state.pop("last_step/geometry"),
        lambda state: state.update({"last_step/geometry": state["last_step/geometry"] + 9}),
        lambda state: state.pop("deferral/appearance/betas"),
    ],
)
def test_a_compact_file_that_does_not_fit_together_is_refused(tmp_path, spoil):
    state = dict(train(COMPACT["streamed"](start(3)), 2).state())
    spoil(state)
    save_checkpoint(tmp_path / "a.pt", Checkpoint(2, np.eye(4), state))
    with pytest.raises(DamagedError):
        load_checkpoint(tmp_path / "a.pt")


def test_values_that_lag_behind_are_evaluated_as_training_sees_them(tmp_path):
    gaussians = train(COMPACT["streamed, host"](start(3)), 6)
    checkpoint = write(tmp_path / "a.pt", gaussians)
    assert (peek_checkpoint(tmp_path / "a.pt").state["last_step/geometry"] < 6).any()
    for name, value in values_of(gaussians).items():
        torch.testing.assert_close(checkpoint.gaussians[name], value, rtol=1e-6, atol=1e-7)
    assert replace(checkpoint).can_resume


# ------------------------------------------------------------------------------------------------- whole trainings


OPTIONS = ("--refine_start_iter", 1000, "--num_workers", 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options"),
    [
        (simple_trainer, ("--adam", "deferred", "--state", "compact")),
        (simple_trainer_hybrid_streamed, ("--state", "compact", "--geometry", "host")),
    ],
)
def test_evaluation_and_ply_file_have_the_values_of_the_last_step(monkeypatch, city_block, tmp_path, script, options):
    options = (*OPTIONS, *options, "--max_steps", 12)
    assert run_script(monkeypatch, script, city_block, tmp_path / "a", *options) == 0
    checkpoint, exported = saved(tmp_path / "a", 12), load_ply(tmp_path / "a/ply/point_cloud_12.ply")
    for name, value in checkpoint.gaussians.items():
        torch.testing.assert_close(value, exported[name], rtol=1e-6, atol=1e-7)
    ckpt = tmp_path / "a/ckpts/ckpt_12.pt"
    for evaluating, place in ((script, options), (simple_trainer, ())):
        folder = tmp_path / evaluating.__name__ / str(len(place))
        assert run_script(monkeypatch, evaluating, city_block, folder, *place, "--ckpt", ckpt) == 0
        (found,) = folder.glob("stats/val_step*.json")
        expected = json.loads((tmp_path / "a/stats/val_step12.json").read_text())
        assert json.loads(found.read_text())["psnr"] == pytest.approx(expected["psnr"], abs=1e-4)


@pytest.mark.slow
def test_a_run_that_goes_on_in_another_form_says_so(monkeypatch, city_block, tmp_path, capsys):
    """Also where a script has no such option."""
    streamed, baseline = simple_trainer_hybrid_streamed, simple_trainer_hybrid_baseline
    told = []
    for steps, script, options in (
        (4, streamed, ()),
        (8, streamed, ("--state", "compact")),
        (12, streamed, ("--state", "compact", "--geometry", "host")),
        (16, streamed, ()),
        (20, streamed, ("--state", "compact")),
        (24, baseline, ()),
        (28, streamed, ("--state", "compact")),
    ):
        options = (*OPTIONS, *options, "--max_steps", steps, "--resume")
        assert run_script(monkeypatch, script, city_block, tmp_path, *options) == 0
        sentence = [line for line in capsys.readouterr().out.splitlines() if "--state" in line]
        told.append([line.split(" (")[0].rpartition(" ")[2] for line in sentence])
        is_compact = "compact" in options
        assert format_of(saved(tmp_path, steps).state) == ("compact" if is_compact else "float32")
    assert told == [[], ["compact"], [], ["float32"], ["compact"], ["float32"], ["compact"]]


@pytest.mark.parametrize(
    "make", [*FLOAT.values(), *COMPACT.values()], ids=[*FLOAT, *(f"{k}, compact" for k in COMPACT)]
)
def test_rows_are_current_wherever_they_lie(make, tmp_path):
    """Every single row of a file, asked for by its number, as all of them together."""
    checkpoint = write(tmp_path / "a.pt", train(make(start(2)), 5))
    values = CurrentValues(checkpoint.state)
    ids = torch.randperm(N, generator=torch.Generator().manual_seed(0))[:99]
    for name, expected in checkpoint.gaussians.items():
        assert torch.equal(values.parameter(name, ids), expected[ids])
        assert torch.equal(values.parameter(name, slice(7, 20)), expected[7:20])
