"""Strategies: mcmc against the paper's formulas and a loop over single rows, its noise, and growth to a target."""

from __future__ import annotations

import math
from dataclasses import fields
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.transform import Rotation
from test_contract import ADAM, BOUND, MODELS, QUICK, A, B, C, N, values_of
from test_densification import random_gaussians, random_statistics
from torch import Tensor

from configs import Config, DensificationRules
from errors import InputError, TrainingStopped
from offload.adam.options import AdamOptions
from offload.models.contract import GaussianModel
from offload.models.deferred import DeferredGaussians
from offload.models.device import DeviceGaussians
from strategies import ops
from strategies.default import DefaultStrategy, Statistics
from strategies.mcmc import MCMCStrategy
from strategies.noise import Noise, normal_numbers
from strategies.ops import MOST_COPIES, drawn_rows, sample_by_weight, shared_opacities_and_shrinking
from strategies.regularizers import Regularizers
from strategies.target import planned_growth
from tests.training_scripts import slow_but
from training.gaussians import PARAMETER_NAMES
from training.options import check_options
from training.strategy import ONLY_OF_DEFAULT

CPU = torch.device("cpu")
SCALE = 2.0  # of the scene

# ---------------------------------------------------------------------------------------------------------- correction


def paper_correction(opacity: Decimal, n: int) -> tuple[float, float]:
    """Equation 9 of arXiv 2404.09591 as it stands there, in 60 digits."""
    with localcontext() as context:
        context.prec = 60
        shared = 1 - ((1 - opacity).ln() / n).exp()
        total = sum(
            math.comb(i - 1, k) * (-1) ** k * shared ** (k + 1) / Decimal(k + 1).sqrt()
            for i in range(1, n + 1)
            for k in range(i)
        )
        return float(shared), float(opacity / total)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 50, 51])
def test_the_correction_is_that_of_the_paper(n):
    opacities = [1e-6, 0.005, 0.1, 0.5, 0.9, 0.999, 1 - 1e-7]
    shared, shrinking = shared_opacities_and_shrinking(
        torch.tensor(opacities, dtype=torch.float64), torch.full((len(opacities),), n)
    )
    for row, opacity in enumerate(opacities):
        expected = paper_correction(Decimal(opacity), n)
        assert (shared[row].item(), shrinking[row].item()) == pytest.approx(expected, rel=1e-9)


def test_more_copies_than_the_table_has_count_as_that_many():
    few, many = (shared_opacities_and_shrinking(torch.tensor([0.3]), torch.tensor([n])) for n in (MOST_COPIES, 900))
    assert torch.equal(few[0], many[0])
    assert torch.equal(few[1], many[1])


def test_an_opaque_row_can_be_shared():
    for values in shared_opacities_and_shrinking(torch.tensor([1.0]), torch.tensor([7])):
        assert values.isfinite().all()


def test_rows_are_drawn_by_their_weight():
    weights = torch.tensor([0.0, 1.0, 0.0, 3.0, 4.0, 0.0])
    drawn = sample_by_weight(weights, 8000, torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn, minlength=6)
    assert counts[weights == 0].sum() == 0
    assert stats.chisquare(counts[weights > 0].numpy(), 1000 * weights[weights > 0].numpy()).pvalue > 0.01


# ---------------------------------------------------------------------------------------------------------- refinement


def rules(**options: object) -> DensificationRules:
    given = {"strategy": "mcmc", "refine_start_iter": 0, "refine_every": 10, "refine_stop_iter": 40, **options}
    return DensificationRules(**given)


def mcmc(noise_lr: float = 0.0, **options: object) -> MCMCStrategy:
    given = rules(noise_lr=noise_lr, max_gaussians=1000, **options)
    return MCMCStrategy(given, np.full(1200, 1e-2), seed=3, margin=ADAM.displacement)


def test_a_refinement_relocates_and_adds_row_by_row(monkeypatch):
    """From the rows that were drawn at random: what becomes of each, after the paper's formulas."""
    draws, sample = [], ops.sample_by_weight

    def watched(weights: Tensor, count: int, generator: torch.Generator, ranks: None) -> Tensor:
        draws.append((weights.clone(), sample(weights, count, generator, ranks)))
        return draws[-1][1]

    monkeypatch.setattr("strategies.mcmc.sample_by_weight", watched)
    monkeypatch.setattr("strategies.mcmc.is_worth_sorting", lambda *_, **__: False)
    before, gaussians, strategy = random_gaussians(300), random_gaussians(300), mcmc()
    assert strategy.after_step(10, {}, gaussians)
    (alive_weights, sources), (weights, added) = draws
    opacities, scales = before.read("opacities").double().sigmoid().tolist(), before.read("scales").double().tolist()
    dead = [row for row, opacity in enumerate(opacities) if opacity <= 0.005]
    assert len(sources) == len(dead) > 20
    assert (alive_weights == 0).nonzero().squeeze(1).tolist() == dead
    assert len(added) == 15  # 5 % of 300
    rows = list(range(300))  # which row of before stands where
    for drawn, targets in ((sources.tolist(), dead), (added.tolist(), range(300, 315))):
        old_opacities, old_scales = list(opacities), [list(scale) for scale in scales]
        for source in set(drawn):
            shared, shrinking = paper_correction(Decimal(old_opacities[source]), drawn.count(source) + 1)
            opacities[source] = min(max(shared, 0.005), 1 - 2**-23)
            scales[source] = [scale + math.log(shrinking) for scale in old_scales[source]]
        for source, target in zip(drawn, targets, strict=True):
            values = opacities[source], scales[source], rows[source]
            if target < 300:
                opacities[target], scales[target], rows[target] = values
            else:
                opacities.append(values[0]), scales.append(values[1]), rows.append(values[2])
    assert gaussians.num_gaussians == 315
    assert weights.double().tolist() == pytest.approx(opacities_before_growth(before, sources, dead), rel=1e-4)
    assert gaussians.read("opacities").sigmoid().tolist() == pytest.approx(opacities, rel=1e-4)
    assert torch.allclose(gaussians.read("scales"), torch.tensor(scales).float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(gaussians.read("means"), before.read("means")[rows])
    assert torch.equal(gaussians.read("shN"), before.read("shN")[rows])
    touched = {*sources.tolist(), *dead, *range(300, 315)}  # rows that growth copies keep their moments
    assert set(added.tolist()) - touched
    moments = gaussians.optimizer.state[gaussians.parameters["scales"]]["exp_avg"]
    assert set((moments == 0).all(dim=1).nonzero().squeeze(1).tolist()) == touched


def opacities_before_growth(before: DeviceGaussians, sources: Tensor, dead: list[int]) -> list[float]:
    opacities = before.read("opacities").double().sigmoid().tolist()
    old, drawn = list(opacities), sources.tolist()
    for source in set(drawn):
        opacities[source] = max(paper_correction(Decimal(old[source]), drawn.count(source) + 1)[0], 0.005)
    for source, target in zip(drawn, dead, strict=True):
        opacities[target] = opacities[source]
    return opacities


def test_every_rule_is_looked_at_or_named_as_one_of_the_default():
    looked_at = set()

    class Watched(DensificationRules):
        def __getattribute__(self, name: str) -> object:
            looked_at.add(name)
            return super().__getattribute__(name)

    gaussians, rates = random_gaussians(300), np.full(50, 1e-2)
    strategy = MCMCStrategy(Watched(**vars(rules(max_gaussians=1000))), rates, seed=3, margin=ADAM.displacement)
    strategy.heading(9, 300)
    strategy.after_step(10, {}, gaussians)
    names = {item.name for item in fields(DensificationRules)}
    assert names - looked_at - {"strategy", "target_gaussians"} == ONLY_OF_DEFAULT  # the target is refused


def test_growth_ends_at_the_bound_and_without_memory(monkeypatch, capsys):
    gaussians, strategy = random_gaussians(300), mcmc()
    strategy.rules.max_gaussians = 310
    assert strategy.heading(9, 300) == 310
    for step in (10, 20):
        strategy.after_step(step, {}, gaussians)
        assert gaussians.num_gaussians == 310
    assert strategy.heading(20, 310) is None
    strategy.rules.max_gaussians = 1000
    monkeypatch.setattr(ops, "free_bytes", lambda: 1000)
    strategy.after_step(30, {}, gaussians)
    assert gaussians.num_gaussians == 310
    assert "lower --max_gaussians" in capsys.readouterr().out


def test_where_all_are_transparent_training_stops_in_one_sentence():
    gaussians = random_gaussians(20)
    gaussians.overwrite(torch.arange(20), {"opacities": torch.full((20,), -9.0)})
    with pytest.raises(TrainingStopped, match="--opacity_reg"):
        mcmc().after_step(10, {}, gaussians)


# --------------------------------------------------------------------------------------------------------------- noise


def test_random_numbers_are_normal_and_differ_by_row_step_and_axis():
    ids = torch.arange(50_000)
    numbers = torch.cat([normal_numbers(ids, ops.word_at([1], step)) for step in range(3)], dim=1)  # [M, 9]
    for column in numbers.T:
        assert stats.kstest(column.numpy(), "norm").pvalue > 1e-3
    correlations = np.corrcoef(numbers.T.numpy()) - np.eye(9)
    assert np.abs(correlations).max() < 0.02
    assert torch.equal(normal_numbers(ids[7:9], ops.word_at([1], 0)), numbers[7:9, :3])  # whichever others are drawn


STANDARD_DEVIATIONS = (0.3, 0.1, 0.02)
LOGIT, NUM_SLEEPING = -4.0, 100_000
RATES = 1e-2 * 0.01 ** (np.arange(1200) / 1200)


def sleepers() -> DeferredGaussians:
    """Gaussians of one shape at the origin, nearly transparent."""
    turn = Rotation.from_rotvec([0.4, -0.2, 0.7])
    x, y, z, w = turn.as_quat()
    parameters = {
        "means": torch.zeros(NUM_SLEEPING, 3),
        "scales": torch.tensor(STANDARD_DEVIATIONS).log().expand(NUM_SLEEPING, 3),
        "quats": 2 * torch.tensor([w, x, y, z]).float().expand(NUM_SLEEPING, 4),
        "opacities": torch.full((NUM_SLEEPING,), LOGIT),
        "sh0": torch.zeros(NUM_SLEEPING, 1, 3),
        "shN": torch.zeros(NUM_SLEEPING, 0, 3),
    }
    adam = AdamOptions(dict.fromkeys(ADAM.learning_rates, 1e-9), lambda step: 1e-9, (0.9, 0.999))
    return DeferredGaussians(parameters, adam, device=CPU)


def local_noise(means: Tensor) -> np.ndarray:
    """Means along the axes of the Gaussians, each in units of its variance; [3 M]."""
    turn = Rotation.from_rotvec([0.4, -0.2, 0.7]).as_matrix()
    return (means.double().numpy() @ turn / np.array(STANDARD_DEVIATIONS) ** 2).ravel()


@pytest.mark.slow
@pytest.mark.parametrize("num_skipped", [1, 30, 1000])
def test_noise_of_slept_steps_is_distributed_as_noise_at_every_step(num_skipped):
    """Rows are seen at step 5, and then not before so many others have passed; a variance of 1.1 is noticed."""
    rng, opacity = np.random.default_rng(0), 1 / (1 + math.exp(-LOGIT))
    size = 1 / (1 + math.exp(100 * (opacity - 0.005)))
    every = np.zeros(NUM_SLEEPING, np.float32)
    for rate in RATES[6 : 5 + 1 + num_skipped + 1]:
        every += np.float32(rate * size) * rng.standard_normal(NUM_SLEEPING, np.float32)
    for noise_lr in (1.0, math.sqrt(1.1)):
        gaussians, strategy = sleepers(), MCMCStrategy(rules(noise_lr=noise_lr), RATES, seed=num_skipped, margin=0.0)
        info = {"gaussian_ids": torch.arange(NUM_SLEEPING), "n_cameras": 1}
        for step in (5, 5 + 1 + num_skipped):
            start = gaussians.read("means").clone()
            strategy.before_update(step, gaussians.rows(0, NUM_SLEEPING), info, Displacing(gaussians), None)
            strategy.after_step(step, info, gaussians)
        p = stats.ks_2samp(local_noise(gaussians.read("means") - start), every, method="asymp").pvalue
        assert p > 0.01 if noise_lr == 1.0 else p < 1e-4, (noise_lr, p)


class Displacing:
    """A model whose displacements take place at once."""

    def __init__(self, model: GaussianModel) -> None:
        self._model = model
        self.num_gaussians, self.device = model.num_gaussians, model.device

    def displace(self, rows: Tensor, offsets: Tensor) -> None:
        self._model.overwrite(rows, {"means": self._model.read("means")[rows] + offsets})


def test_what_is_copied_is_paid_and_owes_from_then_on():
    noise = Noise(np.full(100, 1.0), [0], margin=0.0)
    noise.begin(0, 5, CPU)
    rows = {
        "scales": torch.zeros(2, 3),
        "quats": torch.tensor([[1.0, 0, 0, 0]] * 2),
        "opacities": torch.tensor([-5.0, 9]),
    }
    paid = torch.tensor([1, 3])
    first = noise.offsets(9, paid, rows)
    assert (first[0] != 0).all()
    assert first[1].abs().max() < 1e-30  # opaque
    assert torch.equal(noise.offsets(9, paid, rows), first)
    noise.owe_from(10, paid)
    assert noise.offsets(9, paid, rows).abs().max() == 0
    noise.owe_from(10, torch.tensor([2]))
    noise.append(10, 1)
    assert noise.state_dict()["owed_from"].tolist() == [0, 10, 10, 10, 0, 10]
    noise.keep(torch.tensor([5, 0]))
    assert noise.state_dict()["owed_from"].tolist() == [10, 0]


def test_rows_that_are_not_finite_get_no_noise():
    noise = Noise(np.full(100, 1.0), [0], margin=0.0)
    noise.begin(0, 1, CPU)
    rows = {"scales": torch.full((1, 3), 200.0), "quats": torch.ones(1, 4), "opacities": torch.tensor([-5.0])}
    assert noise.offsets(9, torch.tensor([0]), rows).tolist() == [[0.0, 0.0, 0.0]]
    assert noise.strays(9, torch.tensor([0]), rows).tolist() == []


def test_strays_are_what_noise_carries_too_far():
    """None is ruled out by the bound that knows neither random numbers nor what is owed; the others stay."""
    generator = torch.Generator().manual_seed(0)
    rows = {
        "scales": torch.randn(2000, 3, generator=generator) - 2,
        "quats": torch.randn(2000, 4, generator=generator),
        "opacities": torch.randn(2000, generator=generator) - 4,
    }
    ids, noise = torch.arange(0, 4000, 2), Noise(np.full(100, 2.0), [0], margin=0.1)
    noise.begin(0, 4000, CPU)
    for step, some in ((7, ids[::3]), (29, ids[::5])):
        noise.owe_from(step, some)
    far = noise.offsets(31, ids, rows).abs().amax(dim=1)
    strays = noise.strays(31, ids, rows)
    assert 50 < len(strays) < 1000
    assert torch.equal(strays, ids[far > 0.099])


def test_noise_is_owed_until_the_update_has_been_done(monkeypatch):
    """A step that fails after its noise has been drawn has paid nothing; nor has growth that finds no memory."""
    gaussians, strategy = random_gaussians(300), mcmc(noise_lr=1.0)
    info = {"gaussian_ids": torch.arange(300), "n_cameras": 1}
    rows = gaussians.rows(0, 300)
    strategy.before_update(3, rows, info, Displacing(gaussians), None)
    assert (strategy.state_dict()["owed_from"] == 3).all()
    strategy.before_update(3, rows, info, Displacing(gaussians), None)
    strategy.after_step(3, info, gaussians)
    assert (strategy.state_dict()["owed_from"] == 4).all()

    def without_memory(ids: Tensor) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    gaussians.overwrite(torch.arange(300), {"opacities": torch.zeros(300)})  # none is dead
    monkeypatch.setattr(gaussians, "append_copies", without_memory)
    means = gaussians.read("means").clone()
    strategy.after_step(10, {}, gaussians)
    assert (strategy.state_dict()["owed_from"] == 4).all()
    assert torch.equal(gaussians.read("means"), means)


# -------------------------------------------------------------------------------------------------------- beside gsplat


@pytest.mark.cuda
@pytest.mark.parametrize(("case", "lowest", "most"), [("relocation", -7.0, 20_000), ("growth", -5.0, 40_000)])
def test_rows_become_those_of_gsplat(case, lowest, most, monkeypatch):
    """From equal rows and equal draws, row by row. Growth relocates none, so that both draw from equal opacities."""
    from gsplat.strategy import MCMCStrategy as GsplatStrategy

    device, count, step = torch.device("cuda"), 20_000, 10
    logits = lowest + 9 * torch.rand(count, generator=torch.Generator().manual_seed(0))
    ours, theirs = random_gaussians(count, device), random_gaussians(count, device)
    for gaussians in (ours, theirs):
        gaussians.overwrite(torch.arange(count, device=device), {"opacities": logits.to(device)})
    params = torch.nn.ParameterDict({name: torch.nn.Parameter(theirs.read(name).clone()) for name in PARAMETER_NAMES})
    optimizers = {name: torch.optim.Adam([params[name]], lr=0.0) for name in PARAMETER_NAMES}
    for name in PARAMETER_NAMES:
        params[name].grad = torch.ones_like(params[name])
        optimizers[name].step()

    subject = mcmc(refine_every=step)
    subject.rules.max_gaussians = most
    monkeypatch.setattr("strategies.mcmc.is_worth_sorting", lambda *_, **__: False)
    assert subject.after_step(step, {}, ours)
    generator = ops.generator_at([3], step)  # of the seed that `mcmc` has
    monkeypatch.setattr(
        "gsplat.strategy.ops._multinomial_sample",
        lambda weights, n, replacement=True: sample_by_weight(weights, n, generator),
    )
    strategy = GsplatStrategy(cap_max=most, noise_lr=0.0, refine_start_iter=0, refine_stop_iter=40, refine_every=step)
    strategy.step_post_backward(params, optimizers, strategy.initialize_state(), step, {}, lr=0.0)

    assert ours.num_gaussians == (count if case == "relocation" else 21_000)
    changed = (ours.read("opacities")[:count] != logits.to(device)).sum()
    assert changed > (6_000 if case == "relocation" else 900)  # rows that were dead, and those that were copied
    for name in PARAMETER_NAMES:
        # gsplat adds up the binomials in float32, whose signs alternate
        torch.testing.assert_close(ours.read(name), params[name].detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.cuda
def test_noise_is_that_of_gsplat(monkeypatch):
    from gsplat.strategy.ops import inject_noise_to_position

    device, count, rate = torch.device("cuda"), 5000, 0.3
    rows = random_gaussians(count, device).rows(0, count)
    normal = torch.randn(count, 3, generator=torch.Generator().manual_seed(0)).to(device)
    monkeypatch.setattr("strategies.noise.normal_numbers", lambda ids, word: normal)
    noise = Noise(np.full(20, rate), [0], margin=0.0)
    noise.begin(7, count, device)
    offsets = noise.offsets(7, torch.arange(count, device=device), rows)
    monkeypatch.setattr(torch, "randn_like", lambda like: normal)
    params = {**rows, "means": torch.zeros_like(rows["means"])}
    inject_noise_to_position(params=params, optimizers={}, state={}, scaler=rate)
    largest = rate * (2 * rows["scales"].amax(dim=1)).exp() * torch.sigmoid(0.5 - 100 * rows["opacities"].sigmoid())
    assert ((offsets - params["means"]).norm(dim=1) <= 1e-4 * largest * normal.norm(dim=1) + 1e-30).all()
    assert (offsets.norm(dim=1) > 0.1 * largest).sum() > 0.9 * count


# ------------------------------------------------------------------------------------------------------ all the models

VIEWS = (A, B, C, A, B, A, C, B, A, C, B, A, C)


def start_transparent() -> dict[str, Tensor]:
    """Gaussians of which half have noise, and some are dead."""
    generator = torch.Generator().manual_seed(5)
    parameters = random_start()
    parameters["opacities"] = torch.logit(0.003 + 0.05 * torch.rand(N, generator=generator))
    parameters["scales"] = parameters["scales"].clamp(max=math.log(0.1))
    return parameters


def random_start() -> dict[str, Tensor]:
    from test_contract import start

    return {name: value.clone() for name, value in start().items()}


def gradients_at(step: int, count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    shapes = {"means": (3,), "scales": (3,), "quats": (4,), "opacities": ()}
    return {name: torch.randn(count, *shape, generator=generator) for name, shape in shapes.items()}


def train_mcmc(model: GaussianModel, drawn_of: list[Tensor] | None) -> list[Tensor]:
    """Train with the same gradients of the same rows in every model; return the rows that were drawn at each step."""
    strategy, drawn_ids = mcmc(noise_lr=50.0, opacity_reg=3.0, scale_reg=3.0, refine_every=4), []
    for step, cameras in enumerate(VIEWS):
        rows = model.fetch(cameras)
        if step + 1 < len(VIEWS) and not strategy.changes_rows_after(step):
            model.prefetch(VIEWS[step + 1], strategy.strays(step, model, model.ids, rows))
        ids = model.ids
        if drawn_of is None:  # every second row that another model has fetched
            drawn_ids.append(ids[(ids * 7 + step) % 2 == 0])
        else:
            drawn_ids.append(drawn_of[step])
        positions = torch.searchsorted(ids, drawn_ids[-1])
        assert torch.equal(ids[positions], drawn_ids[-1])
        info = {"gaussian_ids": positions, "n_cameras": 1}
        gradients = gradients_at(step, len(positions))
        loss = sum((rows[name][positions] * gradient).sum() for name, gradient in gradients.items())
        strategy.regularized(loss, rows, info).backward()
        of_all = None if isinstance(model, DeviceGaussians) else ids
        strategy.before_update(step, rows, info, model, of_all)
        model.update()
        strategy.after_step(step, info, model, of_all)
    return drawn_ids


@pytest.fixture(scope="module")
def expected() -> tuple[list[Tensor], dict[str, Tensor]]:
    """The rows that each step draws, which every model fetches, and what GPU-only training makes of them."""
    drawn = train_mcmc(MODELS["baseline"](start_transparent()), None)  # which culls without a margin
    return drawn, values_of_after(MODELS["GPU only"](start_transparent()), drawn)


def values_of_after(model: GaussianModel, drawn: list[Tensor]) -> dict[str, Tensor]:
    train_mcmc(model, drawn)
    return values_of(model)


@pytest.mark.parametrize("kind", slow_but(QUICK, [kind for kind in MODELS if kind != "GPU only"]))
def test_mcmc_is_the_same_in_every_model(kind, expected):
    drawn, reference = expected
    actual = values_of_after(MODELS[kind](start_transparent()), drawn)
    assert len(reference["means"]) > 1.15 * N
    bound = 1e-5 if "compact" not in kind else 5e-3
    others = torch.zeros(len(reference["means"]), dtype=torch.bool)
    if (
        "compact" in kind
    ):  # a draw by rounded opacities may fall on another row: then it, its copy and the right row differ
        for name, value in reference.items():
            others |= (actual[name] - value).view(len(value), -1).abs().amax(dim=1) > 0.1
        assert others.sum() <= 3
    for name, value in reference.items():
        assert (actual[name] - value)[~others].norm() < bound * value.norm(), name


@pytest.mark.parametrize("kind", MODELS)
def test_a_displacement_comes_with_the_update_and_goes_with_its_step(kind):
    model, twin = MODELS[kind](random_start()), MODELS[kind](random_start())
    offsets = torch.arange(6.0).view(2, 3)
    for subject in (model, twin):
        rows = subject.fetch(A)
        sum(value.sum() for value in rows.values()).backward()
        if subject is model:
            subject.displace(torch.tensor([3, 8]), offsets)
            subject.undo_step()
            sum(value.sum() for value in subject.fetch(A).values()).backward()
        ids = subject.ids[torch.tensor([3, 8])]
        subject.update()
    assert all(torch.equal(value, values_of(twin)[name]) for name, value in values_of(model).items())
    for subject in (model, twin):
        ids = fetched_ids(subject)
        if subject is model:
            subject.displace(torch.tensor([3, 8]), offsets)
        subject.update()
    moved, stayed = values_of(model), values_of(twin)
    expected = stayed["means"].clone()
    expected[ids[torch.tensor([3, 8])]] += offsets
    assert torch.allclose(moved.pop("means"), expected, atol=1e-6)
    assert all(torch.equal(value, stayed[name]) for name, value in moved.items())


CULLED_AHEAD = [kind for kind in MODELS if kind not in ("GPU only", "baseline", "streamed, host, compact")]


@pytest.mark.parametrize("kind", CULLED_AHEAD)  # row by row; for blocks of rows see tests/test_bounds.py
def test_a_stray_is_found_wherever_it_lands(kind):
    """A row of one view lands in the next one, among whose rows it would not be if it were not named."""
    model, means = MODELS[kind](random_start()), random_start()["means"]
    present = fetched_ids(model)
    model.prefetch(B)
    model.update()
    model.fetch(B)
    upcoming = model.ids
    stray = present[~torch.isin(present, upcoming)][7]
    place = upcoming[~torch.isin(upcoming, present)][7]

    model = MODELS[kind](random_start())
    assert torch.equal(fetched_ids(model), present)
    model.prefetch(B, stray[None])
    model.displace((present == stray).nonzero()[0], (means[place] - means[stray])[None])
    model.update()
    rows = model.fetch(B)
    assert torch.equal(model.ids, torch.cat([upcoming, stray[None]]).sort().values)
    assert (rows["means"][model.ids == stray] - means[place]).abs().max() < 0.1


def fetched_ids(model: GaussianModel) -> Tensor:
    sum(value.sum() for value in model.fetch(A).values()).backward()
    return model.ids


# -------------------------------------------------------------------------------------------------------- regularizers


def test_regularizers_add_up_to_the_mean_over_all_rows():
    """Over many views that show each row as often, to the gradients of the mean over N for as many steps."""
    generator = torch.Generator().manual_seed(0)
    rows = {"opacities": torch.randn(400, generator=generator), "scales": torch.randn(400, 3, generator=generator)}
    leaves = {name: value.clone().requires_grad_() for name, value in rows.items()}
    (0.3 * leaves["opacities"].sigmoid().mean() + 0.7 * leaves["scales"].exp().mean()).backward()
    regularizers, sums = Regularizers(0.3, 0.7), {name: torch.zeros_like(value) for name, value in rows.items()}
    steps = 0
    for turn in range(41):
        order = torch.randperm(400, generator=generator)
        for drawn in order.split([40, 60, 20, 80, 100, 50, 50]):
            shown = {name: value[drawn].clone().requires_grad_() for name, value in rows.items()}
            if turn > 0:  # the first ones are counted
                regularizers.of(shown, torch.arange(len(drawn))).backward()
                for name, value in shown.items():
                    sums[name][drawn] += value.grad
                steps += 1
            regularizers.count(len(drawn))
    for name, leaf in leaves.items():
        assert torch.allclose(sums[name] / steps, leaf.grad, rtol=0.05)


def test_regularizers_are_off_until_something_was_counted_and_go_on_from_a_state():
    rows, drawn = {"opacities": torch.zeros(4), "scales": torch.zeros(4, 3)}, torch.tensor([1, 2])
    regularizers, resumed = Regularizers(1.0, 0.0), Regularizers(1.0, 0.0)
    assert regularizers.of(rows, drawn) == 0
    regularizers.count(2)
    assert regularizers.of(rows, drawn) == 0.5
    resumed.load_state_dict(regularizers.state_dict())
    assert resumed.of(rows, drawn) == 0.5
    assert Regularizers(0.0, 0.0).state_dict() == {}


def test_a_row_that_several_cameras_draw_counts_once():
    assert drawn_rows({"gaussian_ids": torch.tensor([0, 3, 7]), "n_cameras": 1}).tolist() == [0, 3, 7]
    assert drawn_rows({"gaussian_ids": torch.tensor([0, 3, 7, 3, 9]), "n_cameras": 2}).tolist() == [0, 3, 7, 9]


# -------------------------------------------------------------------------------------------------------------- target


@pytest.mark.slow
@pytest.mark.parametrize(("every", "target"), [(100, 2000), (100, 310), (1000, 2000), (5000, 550)])
@pytest.mark.parametrize("pruned", [0.0, 0.01])
def test_growth_ends_at_the_target(every, target, pruned, capsys):
    """With many refinements and with one, where rows are removed and where none are."""
    gaussians = random_gaussians(300)
    gaussians.overwrite(torch.arange(300), {"opacities": torch.randn(300) - 1, "scales": torch.full((300, 3), -4.0)})
    given = {
        "target_gaussians": target,
        "refine_every": every,
        "refine_start_iter": every - 1,
        "refine_stop_iter": 5001,
    }
    strategy = DefaultStrategy(DensificationRules(**given, grow_grad2d=1e3), SCALE, seed=3)
    generator = torch.Generator().manual_seed(0)
    for step in filter(strategy.refines_at, range(5001)):
        count = gaussians.num_gaussians
        expected = min(target, count * 2 ** min(len_left(strategy, step), 40))
        assert strategy.heading(step - 1, count) == (expected if count < target else None)
        lost = torch.randperm(count, generator=generator)[: int(pruned * count)]
        gaussians.overwrite(lost, {"opacities": torch.full((len(lost),), -9.0)})
        strategy.statistics = random_statistics(count)
        strategy.statistics.grad2d += 1e-6
        strategy.statistics.count += 1
        strategy.refine(step, gaussians)
    assert abs(gaussians.num_gaussians - target) <= 0.05 * target
    assert strategy.heading(5000, gaussians.num_gaussians) is None
    assert "growth ended" not in capsys.readouterr().out


def len_left(strategy: DefaultStrategy, step: int) -> int:
    return sum(map(strategy.refines_at, range(step, 5001)))


def test_the_bar_shows_no_target_that_is_reached():
    strategy = DefaultStrategy(DensificationRules(target_gaussians=500, refine_stop_iter=601), SCALE, seed=3)
    assert [strategy.heading(9, count) for count in (499, 500, 501)] == [500, None, None]


def test_a_target_that_growth_has_missed_is_told(capsys):
    gaussians = random_gaussians(300)
    strategy = DefaultStrategy(DensificationRules(target_gaussians=5000, refine_stop_iter=601), SCALE, seed=3)
    strategy.statistics = random_statistics(300)
    strategy.refine(600, gaussians)
    assert "and --target_gaussians is 5,000: a refinement adds at most" in capsys.readouterr().out


@pytest.mark.parametrize("ended_by", ["--max_steps", "--refine_stop_iter"])
def test_that_few_gaussians_were_seen_is_told_where_it_has_held_back(capsys, ended_by):
    """Two refinements would do for twice as many; each has seen 30 rows, so that neither doubles."""
    gaussians = random_gaussians(300)
    gaussians.overwrite(torch.arange(300), {"opacities": torch.zeros(300), "scales": torch.full((300, 3), -9.0)})
    strategy = DefaultStrategy(
        DensificationRules(target_gaussians=1100, refine_stop_iter=701), SCALE, seed=3, ends_of_growth=ended_by
    )
    for step in (600, 700):
        strategy.statistics = random_statistics(gaussians.num_gaussians)
        strategy.statistics.grad2d += 1e-6
        strategy.statistics.grad2d[30:] = 0
        strategy.statistics.count[30:] = 0
        strategy.refine(step, gaussians)
    assert gaussians.num_gaussians == 360
    assert capsys.readouterr().out == (
        "Warning: growth ended with 360 Gaussians, and --target_gaussians is 1,100: those that no view has shown since "
        f"the refinement before do not grow; raise --batch_size or {ended_by}.\n"
    )


def test_that_doubling_was_too_little_is_told_where_few_were_seen_as_well(capsys):
    gaussians = random_gaussians(300)
    gaussians.overwrite(torch.arange(300), {"opacities": torch.zeros(300), "scales": torch.full((300, 3), -9.0)})
    strategy = DefaultStrategy(
        DensificationRules(target_gaussians=5000, refine_stop_iter=601), SCALE, seed=3, ends_of_growth="--max_steps"
    )
    strategy.statistics = Statistics.zeros(300, torch.device("cpu"))
    strategy.statistics.grad2d[:30] = 1.0
    strategy.statistics.count[:30] = 1.0
    strategy.refine(600, gaussians)
    said = capsys.readouterr().out
    assert said.endswith("as there are; raise --max_steps or lower --refine_every.\n")
    assert said.startswith("Warning: growth ended with 330 Gaussians")


def test_that_memory_was_lacking_is_told_as_why_a_target_was_missed(monkeypatch, capsys):
    gaussians = random_gaussians(300)
    strategy = DefaultStrategy(DensificationRules(target_gaussians=500, refine_stop_iter=601), SCALE, seed=3)
    strategy.statistics = random_statistics(300)
    strategy.statistics.grad2d += 1e-6
    monkeypatch.setattr(ops, "free_bytes", lambda: 1000)
    strategy.refine(600, gaussians)
    first, last = capsys.readouterr().out.splitlines()
    assert "are free: lower --target_gaussians. Gaussians that do not fit are not added." in first
    assert last.endswith("--target_gaussians is 500: memory for more was lacking; lower --target_gaussians.")


def test_a_target_below_what_training_went_on_with_is_told_when_it_goes_on(capsys):
    """By `Saving`, and not once more where growth ends."""
    gaussians = random_gaussians(300)
    gaussians.overwrite(torch.arange(300), {"opacities": torch.zeros(300), "scales": torch.full((300, 3), -9.0)})
    strategy = DefaultStrategy(DensificationRules(target_gaussians=100, refine_stop_iter=601), SCALE, seed=3)
    strategy.statistics = random_statistics(300)
    strategy.refine(600, gaussians)
    assert gaussians.num_gaussians == 300
    assert capsys.readouterr().out == ""


def test_growth_follows_the_largest_gradients():
    gaussians = random_gaussians(300)
    gaussians.overwrite(torch.arange(300), {"opacities": torch.zeros(300), "scales": torch.full((300, 3), -9.0)})
    strategy = DefaultStrategy(DensificationRules(target_gaussians=320, refine_stop_iter=601), SCALE, seed=3)
    strategy.statistics = random_statistics(300)
    average = strategy.statistics.grad2d / strategy.statistics.count.clamp_min(1)
    strategy.refine(600, gaussians)
    numbers = gaussians.read("shN")[:, 0, 0].long().bincount()
    assert set((numbers == 2).nonzero().squeeze(1).tolist()) == set(average.topk(20).indices.tolist())


def test_what_is_planned_makes_up_for_what_is_removed():
    given = DensificationRules(target_gaussians=1000)
    assert planned_growth(given, 400, 0, 6) == 100
    assert planned_growth(given, 400, 50, 6) == 150
    assert planned_growth(given, 1100, 50, 1) == 0
    assert BOUND["max_gaussians"] == 2 * N  # which the models above may grow to


@pytest.mark.parametrize(("name", "value"), [("noise_lr", 1.0), ("depth_lambda", 0.5)])
def test_numbers_of_what_is_off_are_refused(name, value):
    with pytest.raises(InputError, match=f"--{name} is of --"):
        check_options(Config(**{name: value}))
