"""The gradient of harmonics that is made in the update, against autograd in float64 and that of a leaf."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.aerial_scene import aerial_scene
from configs import Config
from offload import backends
from offload.adam import codes
from offload.adam.deferral import DeferralTables
from offload.adam.harmonics import HarmonicsGradient, position_of
from offload.adam.options import AdamOptions
from offload.adam.stored_harmonics import StoredHarmonics
from offload.culling.cameras import Cameras
from offload.models.deferred import DeferredGaussians
from offload.models.forwarded import ForwardedGaussians
from offload.models.geometry_packed import PackedGeometry
from offload.models.offloaded import OffloadedGaussians, row_groups
from offload.models.streamed import StreamedGaussians
from offload.pipelines.resident import ResidentPipeline
from offload.store.device_store import DeviceStore
from offload.store.layout import GROUP_NAMES, packed_rows
from rendering.harmonics import real_harmonics
from tests.aerial_training import views_of
from tests.test_row_kernels import assert_same_rows, random_host_rows
from tests.triton_places import INTERPRETED, ON_GPU, WITHOUT_GPU
from training import schedules
from training.views import render

CPU = torch.device("cpu")
CONFIG = Config()
POSITION = (0.3, -1.2, 2.5)


def gradients_of(count: int, degree: int, of_degree: int) -> tuple[Tensor, Tensor, Tensor]:
    """Means [V, 3]; and the gradients of sh0 [V, 3] and of shN [V, columns], by autograd in float64.

    A third is not drawn, of which two lie nowhere and where the camera is. Some colours are cut.

    Args:
        count: V.
        degree: Of the coefficients.
        of_degree: That colours are made of.
    """
    means = torch.randn(count, 3)
    drawn = torch.arange(count) % 3 > 0
    means[0], means[3:4] = torch.tensor(POSITION), torch.nan
    coeffs = torch.randn(count, 16, 3, dtype=torch.float64).requires_grad_()
    directions = torch.nn.functional.normalize(means.double() - torch.tensor(POSITION).double(), dim=1)
    basis = torch.stack(list(real_harmonics(directions)), dim=1)[drawn, : (of_degree + 1) ** 2]
    colors = (0.5 + (basis[:, :, None] * coeffs[drawn, : (of_degree + 1) ** 2]).sum(dim=1)).clamp(min=0)
    (colors * torch.randn_like(colors)).sum().backward()
    shN = torch.zeros(count, max(1, degree) * 16)
    shN[:, : codes.num_values(degree)] = coeffs.grad[:, 1 : (degree + 1) ** 2].flatten(1)
    return means, coeffs.grad[:, 0].float(), shN


@pytest.mark.parametrize("degree", range(4))
def test_it_is_that_of_autograd(degree):
    torch.manual_seed(degree)
    means, constant, expected = gradients_of(300, 3, degree)
    assert 0.35 < (constant == 0).double().mean() < 0.9
    made = HarmonicsGradient(means, constant, POSITION, degree).dense(48)
    assert torch.equal(made == 0, expected == 0)
    # The difference of a mean and the camera is rounded, which directions at a tenth of that distance see tenfold.
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "device"), [*WITHOUT_GPU, *ON_GPU])
@pytest.mark.parametrize(("degree", "of_degree"), [(3, 3), (3, 1), (2, 2), (1, 1), (1, 0), (0, 0)])
@pytest.mark.parametrize("count", [1, 79])
def test_rows_take_the_step_of_the_gradient_itself(kind, device, degree, of_degree, count):
    results = []
    for is_made, each, place in ((False, "torch", "cpu"), (True, kind, device)):
        torch.manual_seed(count)
        host = random_host_rows(each, place, "appearance", "compact", degree)
        ids = torch.randperm(300)[:count].sort().values.to(place)
        means, constant, gradients = (tensor.to(place) for tensor in gradients_of(count, degree, of_degree))
        if is_made:
            rows = torch.randn(count, 16, device=place)  # of geometry, of which the gradient is a part
            rows[:, 11:14] = constant
            gradients = HarmonicsGradient(means, rows[:, 11:14], POSITION, of_degree)
        words, last_step = host.view(ids)
        values = host.values(words, last_step)
        resident = values.clone()
        host.begin_step()
        host.kernels.step_view_rows(values, ids, last_step, gradients, host.packed(words), host.tables)
        host.kernels.step_stored_rows(resident, ids, host.last_step, gradients, host.state, host.tables)
        results.append([*host.packed(words).tensors(), values, resident, *host.tensors()])
    for actual, expected in zip(results[1], results[0], strict=True):
        assert_same_rows(actual, expected, exact=False, rounded=True)


KINDS = [
    *("deferred", "streamed", "float32", "geometry stays"),
    *("forwarded", "forwarded, host", "forwarded, compact", "forwarded, host, compact"),
]


def model_of(kind: str, parameters: dict[str, Tensor]) -> OffloadedGaussians:
    adam = AdamOptions(schedules.learning_rates(CONFIG, 3.2), lambda step: 1e-4, (0.9, 0.999))
    parameters = {name: value.clone() for name, value in parameters.items()}
    if kind == "deferred":
        return DeferredGaussians(parameters, adam, device=CPU, state="compact")
    if kind == "float32":
        return DeferredGaussians(parameters, adam, device=CPU)
    if kind == "geometry stays":
        place = PackedGeometry(parameters, adam, device=CPU)
        appearance = DeviceStore(parameters, "appearance", state="compact", device=CPU)
        groups = row_groups(place, appearance, adam, lambda each: DeferralTables(each, adam.betas, adam.eps, CPU))
        return OffloadedGaussians(place, groups, ResidentPipeline(groups, place.visible_ids, CPU), CPU)
    if kind.startswith("forwarded"):
        state, place = "compact" if "compact" in kind else "float32", "host" if "host" in kind else "device"
        return ForwardedGaussians(parameters, adam, device=CPU, geometry=place, state=state)
    return StreamedGaussians(parameters, adam, device=CPU, state="compact", geometry="host")


def scene() -> tuple[dict[str, Tensor], list[Cameras]]:
    """Gaussians with harmonics of all degrees, and views of them in pictures of 48 pixels."""
    parameters, cameras = aerial_scene(2000, seed=0)
    parameters["shN"] = 0.2 * torch.randn(2000, 15, 3)
    scale = 48 / cameras.width
    Ks = cameras.Ks * torch.tensor([scale, scale, 1.0])[:, None]
    return parameters, [Cameras(view.viewmats, Ks[:1], 48, 48) for view in views_of(cameras)]


def step(gaussians, view: Cameras, degree: int, *, is_told: bool, moves: bool = False, bad: bool = False) -> bool:
    """One step with a loss of its picture; returns whether harmonics were a tensor, which has a gradient."""
    rows = gaussians.fetch(view, degree if is_told else None)
    colors, info = render(rows, view, CONFIG, sh_degree=degree)
    loss = (colors * torch.linspace(-1, 1, colors.numel()).view(colors.shape)).sum()
    (loss / 0 if bad else loss).backward()
    if moves:
        drawn = info["gaussian_ids"].unique()
        gaussians.displace(drawn, 0.3 * torch.ones(len(drawn), 3))
    gaussians.update()
    return not isinstance(rows.get("colors"), StoredHarmonics)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["", "kernels of a GPU", "moves", "bad", "nothing drawn"])
def test_a_model_takes_the_step_of_the_gradient_itself(monkeypatch, kind, case):
    """Colours are made in other orders of sums, too, so that geometry differs in last bits."""
    if case == "kernels of a GPU":
        if not INTERPRETED:
            pytest.skip("needs Triton's interpreter")
        monkeypatch.setattr(backends, "_takes_triton", lambda device: True)
    parameters, views = scene()
    if case == "nothing drawn":
        parameters["opacities"].fill_(-20.0)
    results = []
    for is_told in (True, False):
        gaussians = model_of(kind, parameters)
        step(gaussians, views[0], 2, is_told=False)
        before = {name: value.clone() for name, value in gaussians.state().items()}
        has_gradient = step(gaussians, views[1], 2, is_told=is_told, moves=case == "moves", bad=case == "bad")
        assert has_gradient != is_told
        assert gaussians.skipped_steps()[0] == (case == "bad")
        results.append(gaussians.state())
    told, dense = results
    assert torch.equal(told["last_step/appearance"], dense["last_step/appearance"])
    stored = [name for name in told if name.startswith(("packed/", "parameters/", "exp_avg")) and "degree" not in name]
    if case in ("bad", "nothing drawn"):
        assert all(torch.equal(told[name], dense[name]) for name in stored)
        return
    moved = {name for name in stored if not torch.equal(told[name], before[name])}
    assert {name for name in stored if "appearance" in name or "shN" in name} <= moved
    # Colours are sums in other orders. However small a gradient, Adam's first steps have the size of the learning
    # rate, and a gradient that is the rest of a cancellation may have another sign.
    actual, expected = (torch.cat([rows.float().flatten() for rows in parameters_of(state)]) for state in results)
    assert ((actual - expected).abs() > 2**-10 * expected.abs()).double().mean() < 0.02


def test_compact_geometry_that_stays_is_that_which_goes_with_views():
    """To the bit, also of rows that lag behind; means, and the constant's gradient, come from it for all harmonics."""
    parameters, views = scene()
    states = []
    for kind in ("deferred", "geometry stays"):
        gaussians = model_of(kind, parameters)
        for index in (0, 3, 1, 0):
            assert not step(gaussians, views[index], 2, is_told=True)
        states.append(gaussians.state())
    assert states[0].keys() == states[1].keys()
    assert (states[0]["last_step/geometry"] < 4).any()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def parameters_of(state: dict[str, Tensor]) -> list[Tensor]:
    """All values of a model's rows, in the form that they have."""
    if "packed/geometry" in state:
        return [packed_rows(state[f"packed/{group}"], group).parameters for group in GROUP_NAMES]
    return [value for name, value in state.items() if name.startswith("parameters/")]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_several_cameras_see_receive_theirs(kind):
    parameters, (first, second, *_) = scene()
    viewmats, Ks = (torch.cat([getattr(view, name) for view in (first, second)]) for name in ("viewmats", "Ks"))
    assert step(model_of(kind, parameters), replace(first, viewmats=viewmats, Ks=Ks), 2, is_told=True)


def test_a_view_that_is_over_does_not_hold_a_store_that_grows():
    """Its rows and its picture are at hand until the next view is fetched, and rows are appended before that."""
    parameters, (view, *_) = scene()
    gaussians = model_of("float32", parameters)
    rows = gaussians.fetch(view, 2)
    loss = render(rows, view, CONFIG, sh_degree=2)[0].sum()
    loss.backward()
    gaussians.update()
    before = [weakref.ref(array) for array in gaussians._groups["appearance"].store.rows.tensors()]
    gaussians.append_copies(torch.arange(3))
    assert [array() for array in before] == [None] * 3
    assert isinstance(rows["colors"], StoredHarmonics)
    assert loss.grad_fn is not None


def test_a_camera_stands_where_it_is_seen_from():
    _, (view, *_) = scene()
    expected = torch.linalg.inv(view.viewmats[0].double())[:3, 3]
    torch.testing.assert_close(torch.tensor(position_of(view)).double(), expected, rtol=1e-5, atol=1e-5)  # a float32
