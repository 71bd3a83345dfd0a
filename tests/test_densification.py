"""Densification against a rule-by-rule loop over single Gaussians and, on a GPU, against gsplat itself."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from configs import DensificationRules
from errors import TrainingStopped
from offload.adam.options import AdamOptions
from offload.models.device import DeviceGaussians
from offload.store.morton import morton_order
from strategies import ops
from strategies.default import DefaultStrategy, Statistics
from strategies.ops import grow, rotation_matrices
from training.gaussians import PARAMETER_NAMES

SCENE_SCALE = 2.0
CPU = torch.device("cpu")


def random_gaussians(num_gaussians: int, device: torch.device = CPU, seed: int = 0) -> DeviceGaussians:
    """Gaussians around all thresholds, with non-zero moments; shN[:, 0, 0] is the number of the row."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    parameters = {
        "means": normal(num_gaussians, 3),
        "scales": math.log(0.01 * SCENE_SCALE) + 1.5 * normal(num_gaussians, 3),
        "quats": normal(num_gaussians, 4),
        "opacities": math.log(0.005) + 2 * normal(num_gaussians),
        "sh0": normal(num_gaussians, 1, 3),
        "shN": normal(num_gaussians, 15, 3),
    }
    parameters["shN"][:, 0, 0] = torch.arange(num_gaussians)
    adam = AdamOptions(dict.fromkeys(PARAMETER_NAMES, 0.0), lambda step: 0.0, (0.9, 0.999))
    gaussians = DeviceGaussians(parameters, adam, device=device)
    for parameter in gaussians.fetch(None).values():
        parameter.grad = torch.ones_like(parameter)
    gaussians.update()
    return gaussians


def random_statistics(num_gaussians: int, device: torch.device = CPU) -> Statistics:
    generator = torch.Generator().manual_seed(1)
    count = torch.randint(0, 4, (num_gaussians,), generator=generator).float()
    grad2d = count * 4e-4 * torch.rand(num_gaussians, generator=generator)
    radii = 0.3 * torch.rand(num_gaussians, generator=generator)
    return Statistics(grad2d.to(device), count.to(device), radii.to(device))


def row_numbers(gaussians: DeviceGaussians) -> list[int]:
    return gaussians.read("shN")[:, 0, 0].long().tolist()


def moments(gaussians: DeviceGaussians, name: str) -> torch.Tensor:
    return gaussians.optimizer.state[gaussians.parameters[name]]["exp_avg"]


def refined(rules: DensificationRules, step: int, num_gaussians: int = 300) -> DeviceGaussians:
    gaussians = random_gaussians(num_gaussians)
    subject = DefaultStrategy(rules, SCENE_SCALE, seed=3)
    subject.statistics = random_statistics(num_gaussians)
    subject.refine(step, gaussians)
    return gaussians


@pytest.mark.parametrize("step", [600, 3100])
@pytest.mark.parametrize("refine_scale2d_stop_iter", [0, 5000])
def test_refine_follows_the_rules_row_by_row(step, refine_scale2d_stop_iter):
    rules = DensificationRules(refine_scale2d_stop_iter=refine_scale2d_stop_iter)
    before, statistics = random_gaussians(300), random_statistics(300)
    expected = []
    by_screen = step < refine_scale2d_stop_iter
    for row in range(300):
        largest = max(math.exp(x) for x in before.read("scales")[row].tolist())
        opacity = 1 / (1 + math.exp(-before.read("opacities")[row].item()))
        gradient = statistics.grad2d[row].item() / max(statistics.count[row].item(), 1)
        radius = statistics.radii[row].item()
        is_small = largest <= rules.grow_scale3d * SCENE_SCALE
        is_duplicated = gradient > rules.grow_grad2d and is_small
        is_split = (gradient > rules.grow_grad2d and not is_small) or (by_screen and radius > rules.grow_scale2d)
        # Number of rows that carry this number afterwards, and their size.
        sizes = [largest / 1.6] * 2 if is_split else [largest]
        sizes += [largest] if is_duplicated else []
        for size in sizes:
            huge = step > rules.reset_every and (
                size > rules.prune_scale3d * SCENE_SCALE or (by_screen and radius > rules.prune_scale2d)
            )
            if opacity >= rules.prune_opa and not huge:
                expected.append((row, math.log(size)))
    after = refined(rules, step)
    sizes = after.read("scales").amax(dim=-1).tolist()
    actual = sorted(zip(row_numbers(after), sizes, strict=True))
    assert len(expected) not in (0, 300)
    assert [row for row, _ in actual] == [row for row, _ in sorted(expected)]
    assert [size for _, size in actual] == pytest.approx([size for _, size in sorted(expected)], abs=1e-4)


def test_only_untouched_rows_keep_their_moments():
    gaussians = random_gaussians(10)
    grow(gaussians, torch.tensor([1, 2]), torch.tensor([4]), False, torch.Generator().manual_seed(0))
    assert row_numbers(gaussians) == [*range(10), 1, 2, 4]
    for name in PARAMETER_NAMES:
        kept = moments(gaussians, name).flatten(1 if moments(gaussians, name).dim() > 1 else 0)
        kept = (kept.reshape(13, -1) != 0).all(dim=1)
        assert torch.where(~kept)[0].tolist() == [4, 10, 11, 12], name
    gaussians.keep(torch.tensor([0, 12]))
    assert row_numbers(gaussians) == [0, 4]
    assert moments(gaussians, "shN").shape == (2, 15, 3)


def test_split_halves_are_distributed_like_their_parent():
    num_copies = 20_000
    gaussians = random_gaussians(1)
    gaussians.append_copies(torch.zeros(num_copies - 1, dtype=torch.long))
    mean, quat = gaussians.read("means")[0].clone(), gaussians.read("quats")[0].clone()
    variances = gaussians.read("scales")[0].exp() ** 2
    opacities = gaussians.read("opacities").clone()
    grow(
        gaussians,
        torch.zeros(0, dtype=torch.long),
        torch.arange(num_copies),
        True,
        torch.Generator().manual_seed(0),
    )
    w, x, y, z = quat.tolist()
    rotation = torch.from_numpy(Rotation.from_quat([x, y, z, w]).as_matrix()).float()
    local = (gaussians.read("means") - mean) @ rotation  # in the parent's axes
    covariance = local.T @ local / len(local)
    expected = torch.diag(variances)
    assert (covariance - expected).norm() < 0.03 * expected.norm()
    assert torch.allclose(gaussians.read("scales")[0].exp() ** 2, variances / 1.6**2, rtol=1e-4)
    halves = torch.sigmoid(gaussians.read("opacities"))
    # Two halves over each other are as opaque as the parent (arXiv 2404.06109).
    assert torch.allclose(1 - (1 - halves[:num_copies]) ** 2, torch.sigmoid(opacities), rtol=1e-4)


def test_rotation_matrices_agree_with_scipy():
    quats = torch.randn(20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = Rotation.from_quat(quats[:, [1, 2, 3, 0]].numpy()).as_matrix()
    assert torch.allclose(rotation_matrices(quats), torch.from_numpy(expected))


def test_max_gaussians_lets_the_largest_gradients_grow():
    unbounded = DensificationRules(prune_opa=0.0)
    bounded = DensificationRules(prune_opa=0.0, max_gaussians=320)
    wanted = row_numbers(refined(unbounded, 600))
    for row in range(300):
        wanted.remove(row)
    grown = refined(bounded, 600)
    assert len(wanted) > 20
    assert grown.num_gaussians == 320
    statistics = random_statistics(300)
    gradients = statistics.grad2d / statistics.count.clamp_min(1)
    strongest = sorted(wanted, key=lambda row: -gradients[row].item())[:20]
    assert sorted(row_numbers(grown)[300:]) == sorted(strongest)
    assert refined(DensificationRules(prune_opa=0.0, max_gaussians=100), 600).num_gaussians == 300


@pytest.mark.parametrize(
    ("max_gaussians", "step", "sorts"),
    [
        pytest.param(0, 600, True, id="many appended"),
        pytest.param(320, 600, False, id="few appended"),
        pytest.param(320, 14_900, True, id="few appended by the last refinement"),
    ],
)
def test_rows_are_sorted_when_it_is_worth_it(max_gaussians, step, sorts):
    rules = DensificationRules(prune_opa=0.0, prune_scale3d=1e9, max_gaussians=max_gaussians)
    before = random_gaussians(300)
    gaussians = random_gaussians(300)
    order = morton_order(gaussians.read("means"))
    gaussians.keep(order)
    subject = DefaultStrategy(rules, SCENE_SCALE, seed=3)
    statistics = random_statistics(300)
    subject.statistics = Statistics(*(values[order] for values in vars(statistics).values()))
    subject.refine(step, gaussians)
    num_appended = gaussians.num_gaussians - 300
    assert num_appended == 20 if max_gaussians else num_appended > 100
    in_order = torch.equal(morton_order(gaussians.read("means")), torch.arange(gaussians.num_gaussians))
    assert in_order == sorts
    assert subject.state_dict()["num_appended"] == (0 if sorts else num_appended)
    # Rows have taken all that belongs to them along.
    numbers = row_numbers(gaussians)
    once = [place for place, row in enumerate(numbers) if numbers.count(row) == 1]
    rows = [numbers[place] for place in once]
    for name in PARAMETER_NAMES:
        assert torch.equal(gaussians.read(name)[once], before.read(name)[rows])
        assert torch.equal(moments(gaussians, name)[once], moments(before, name)[rows])


def test_the_number_of_appended_rows_is_part_of_the_state():
    subject = DefaultStrategy(DensificationRules(prune_opa=0.0, max_gaussians=320), SCENE_SCALE, seed=3)
    subject.statistics = random_statistics(300)
    subject.refine(600, random_gaussians(300))
    resumed = DefaultStrategy(subject.rules, SCENE_SCALE, seed=3)
    resumed.load_state_dict(subject.state_dict())
    assert resumed.state_dict()["num_appended"] == 20
    before_any = DefaultStrategy(subject.rules, SCENE_SCALE, seed=3)
    before_any.load_state_dict({})
    assert before_any.statistics is None


def packed_info(num_gaussians: int, gradient: float) -> dict:
    means2d = torch.zeros(num_gaussians, 2, requires_grad=True)
    means2d.grad = torch.full((num_gaussians, 2), gradient)
    return {
        "means2d": means2d,
        "gaussian_ids": torch.arange(num_gaussians),
        "radii": torch.ones(num_gaussians, 2, dtype=torch.int32),
        "width": 40,
        "height": 30,
        "n_cameras": 1,
    }


def test_schedule_of_refinements_and_resets():
    rules = DensificationRules(
        refine_start_iter=20,
        refine_every=10,
        reset_every=40,
        refine_stop_iter=95,
        pause_refine_after_reset=15,
        prune_opa=0.005,
    )
    gaussians = random_gaussians(5)
    gaussians.parameters["opacities"].data.fill_(2.0)
    subject = DefaultStrategy(rules, SCENE_SCALE, seed=0)
    refinements, resets = [], []
    for step in range(120):
        gaussians.parameters["opacities"].data.fill_(2.0)
        if subject.after_step(step, packed_info(gaussians.num_gaussians, 0.0), gaussians):
            refinements.append(step)
        if gaussians.read("opacities").max() < 2.0:
            resets.append(step)
            assert torch.allclose(torch.sigmoid(gaussians.read("opacities")), torch.tensor(0.01))
            assert (moments(gaussians, "opacities") == 0).all()
            assert (moments(gaussians, "means") != 0).any()
    assert refinements == [30, 60, 70]
    assert resets == [40, 80]


def test_gradients_are_measured_in_half_pictures():
    subject = DefaultStrategy(DensificationRules(refine_scale2d_stop_iter=10), SCENE_SCALE, seed=0)
    subject.statistics = Statistics.zeros(5, CPU)
    info = packed_info(5, 0.001)
    info["gaussian_ids"] = torch.tensor([0, 2, 2, 3, 4])  # row 2 in two cameras
    info["radii"][2] = 7
    subject.observe(info)
    subject.observe(packed_info(5, 0.0))
    norm = math.hypot(0.001 * 20, 0.001 * 15)
    assert subject.statistics.grad2d.tolist() == pytest.approx([norm, 0, 2 * norm, norm, norm])
    assert subject.statistics.count.tolist() == [2, 1, 3, 2, 2]
    assert subject.statistics.radii.tolist() == pytest.approx([1 / 40, 1 / 40, 7 / 40, 1 / 40, 1 / 40])


def test_removing_everything_stops():
    gaussians = random_gaussians(20)
    gaussians.parameters["opacities"].data.fill_(-20.0)
    subject = DefaultStrategy(DensificationRules(), SCENE_SCALE, seed=0)
    subject.statistics = random_statistics(20)
    with pytest.raises(TrainingStopped, match="--prune_opa"):
        subject.refine(600, gaussians)
    assert gaussians.num_gaussians >= 20


def test_growth_past_memory_is_skipped(monkeypatch):
    """What is to be removed is removed nevertheless."""
    monkeypatch.setattr(ops, "free_bytes", lambda: 1000)
    gaussians = random_gaussians(300)
    kept = (torch.sigmoid(gaussians.read("opacities")) >= 0.005).nonzero().squeeze(1).tolist()
    subject = DefaultStrategy(DensificationRules(), SCENE_SCALE, seed=0)
    subject.statistics = random_statistics(300)
    subject.refine(600, gaussians)
    assert row_numbers(gaussians) == kept


@pytest.mark.parametrize("call", range(1, 19))
def test_growth_that_runs_out_of_memory_half_way_is_undone(monkeypatch, call):
    """Whichever tensor does not fit: the rows are those of a refinement that adds none, moments included."""
    expected, gaussians = random_gaussians(300), random_gaussians(300)
    expected.keep((torch.sigmoid(expected.read("opacities")) >= 0.005).nonzero().squeeze(1))
    subject = DefaultStrategy(DensificationRules(), SCENE_SCALE, seed=0)
    subject.statistics = random_statistics(300)
    cat, calls = torch.cat, [0]

    def runs_out(tensors: list[torch.Tensor], *arguments: object, **options: object) -> torch.Tensor:
        appends = len(tensors) == 2 and len(tensors[0]) == 300
        calls[0] += appends
        if appends and calls[0] == call:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return cat(tensors, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "cat", runs_out)
        subject.refine(600, gaussians)
    assert calls[0] >= call
    actual, wanted = gaussians.state(), expected.state()
    assert all(torch.equal(actual[name], value) for name, value in wanted.items())


@pytest.mark.cuda
@pytest.mark.parametrize("step", [600, 3100])
@pytest.mark.parametrize("refine_scale2d_stop_iter", [0, 5000])
def test_same_gaussians_as_gsplat(step, refine_scale2d_stop_iter):
    from gsplat.strategy import DefaultStrategy as GsplatStrategy

    device = torch.device("cuda")
    num_gaussians = 20_000
    ours = random_gaussians(num_gaussians, device)
    statistics = random_statistics(num_gaussians, device)

    theirs = random_gaussians(num_gaussians, device)
    params = torch.nn.ParameterDict({name: torch.nn.Parameter(theirs.read(name)) for name in PARAMETER_NAMES})
    optimizers = {name: torch.optim.Adam([params[name]], lr=0.0) for name in PARAMETER_NAMES}
    for name in PARAMETER_NAMES:
        params[name].grad = torch.ones_like(params[name])
        optimizers[name].step()
    strategy = GsplatStrategy(refine_scale2d_stop_iter=refine_scale2d_stop_iter)
    state = {
        "grad2d": statistics.grad2d.clone(),
        "count": statistics.count.clone(),
        "radii": statistics.radii.clone(),
        "scene_scale": SCENE_SCALE,
    }
    strategy._grow_gs(params, optimizers, state, step)
    strategy._prune_gs(params, optimizers, state, step)

    subject = DefaultStrategy(
        DensificationRules(refine_scale2d_stop_iter=refine_scale2d_stop_iter), SCENE_SCALE, seed=0
    )
    subject.statistics = statistics
    subject.refine(step, ours)

    def signature(scales, opacities, marker, moment):
        # All that does not depend on the random positions of split halves.
        table = torch.cat([marker[:, None], scales, opacities[:, None], moment.flatten(1)[:, :1]], dim=1)
        table = table.double().cpu()
        order = np.lexsort((table[:, 1:4].sum(dim=1).numpy(), table[:, 0].numpy()))
        return table[order]

    gsplat_signature = signature(
        params["scales"].detach(),
        params["opacities"].detach(),
        params["shN"].detach()[:, 0, 0],
        optimizers["shN"].state[params["shN"]]["exp_avg"],
    )
    our_signature = signature(
        ours.read("scales"), ours.read("opacities"), ours.read("shN")[:, 0, 0], moments(ours, "shN")
    )
    assert len(gsplat_signature) != num_gaussians
    assert torch.equal(our_signature[:, 0], gsplat_signature[:, 0])
    assert torch.allclose(our_signature, gsplat_signature, rtol=1e-5, atol=1e-5)
