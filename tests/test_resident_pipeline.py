"""Rows that stay on the device against dense Adam in float64; and what a step of GPU-only training allocates."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from benchmarks.aerial_scene import aerial_scene
from offload import backends
from offload.adam.deferral import DeferralTables
from offload.adam.options import AdamOptions
from offload.culling.cameras import Cameras
from offload.models.deferred import DeferredGaussians
from offload.pipelines.groups import RowGroup
from offload.pipelines.resident import ResidentPipeline
from offload.store.device_store import DeviceStore
from tests.aerial_training import gaussians_of, views_of
from tests.test_adam import APPEARANCE, EPS, DenseOracle, largest_row_error
from tests.triton_places import INTERPRETED

BETAS, RATE = (0.9, 0.999), 1e-2
CPU = torch.device("cpu")


def make_pipeline(n: int, views: list[Tensor], device: torch.device) -> tuple[ResidentPipeline, RowGroup]:
    """A pipeline whose cameras are numbers of views."""
    parameters = {"means": torch.zeros(n, 3), "sh0": torch.randn(n, 1, 3), "shN": torch.randn(n, 15, 3)}
    store = DeviceStore(parameters, "appearance", device=device)
    group = RowGroup(store, DeferralTables(APPEARANCE, BETAS, EPS, device), lambda step: [RATE * 0.98**step])
    return ResidentPipeline({"appearance": group}, lambda index: views[index].to(device), device), group


def random_views(n: int, num_views: int) -> list[Tensor]:
    """Sorted ids of views of all sizes, also of none."""
    shares = torch.rand(num_views)
    shares[5] = 0
    return [torch.nonzero(torch.rand(n) < 0.5 * share)[:, 0] for share in shares]


def step(pipeline: ResidentPipeline, index: int, gradients: Tensor, upcoming: int | None) -> None:
    view = pipeline.fetch(index)
    view.values["appearance"].grad = gradients
    if upcoming is not None:
        pipeline.prefetch(upcoming)
    pipeline.update()
    assert not view.values  # nothing of a view is kept


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_every_row_is_that_of_dense_adam(monkeypatch, kernels):
    if kernels == "triton":
        if not INTERPRETED:
            pytest.skip("needs Triton's interpreter; the next test runs the kernels on a GPU")
        monkeypatch.setattr(backends, "_takes_triton", lambda device: True)
    torch.manual_seed(0)
    n, num_views = (40, 12) if kernels == "triton" else (200, 60)
    views = random_views(n, num_views)
    pipeline, group = make_pipeline(n, views, CPU)
    oracle = DenseOracle(group.store.rows.parameters.clone(), BETAS)
    for index, ids in enumerate(views):
        gradients = torch.randn(len(ids), 48) * 10 ** (-6 * torch.rand(len(ids), 1))
        is_known = index + 1 < len(views) and index % 5 != 4  # now and then the next view is not known in time
        step(pipeline, index, gradients, index + 1 if is_known else None)
        dense = torch.zeros(n, 48)
        dense[ids] = gradients
        oracle.step(dense, RATE * 0.98 ** (index + 1) * APPEARANCE[0].double())
        if index % 6 == 5:
            some = torch.randperm(n)[: n // 2].sort().values
            before = [tensor.clone() for tensor in group.store.rows.tensors()]
            current = pipeline.read("appearance", some)
            assert largest_row_error(current, oracle.state()[0][some]) < 1e-5
            for stored, value in zip(group.store.rows.tensors(), before, strict=True):
                assert torch.equal(stored, value)  # reading changes nothing
            pipeline.catch_up("appearance", some)
            assert (group.store.last_step[some] == index + 1).all()
            for stored, expected in zip(group.store.rows.tensors(), oracle.state(), strict=True):
                assert largest_row_error(stored[some], expected[some]) < 1e-5
    assert (group.store.last_step < num_views).any()  # some rows lag behind
    pipeline.catch_up("appearance", None)
    assert (group.store.last_step == num_views).all()
    for stored, expected in zip(group.store.rows.tensors(), oracle.state(), strict=True):
        assert largest_row_error(stored, expected) < 1e-5


@pytest.mark.cuda
def test_a_gpu_does_as_dense_adam():
    torch.manual_seed(0)
    device, n = torch.device("cuda"), 500_000
    views = [(torch.rand(n) < 0.15).nonzero()[:, 0] for _ in range(30)]
    pipeline, group = make_pipeline(n, views, device)
    expected = group.store.rows.parameters.double().requires_grad_()
    adam = torch.optim.Adam([expected], betas=BETAS, eps=EPS)
    for index, ids in enumerate(views):
        gradients = torch.randn(len(ids), 48, device=device)
        step(pipeline, index, gradients, index + 1 if index + 1 < len(views) else None)
        adam.param_groups[0]["lr"] = RATE * 0.98 ** (index + 1)
        expected.grad = torch.zeros_like(expected)
        expected.grad[ids.to(device)] = gradients.double()
        adam.step()
    pipeline.catch_up("appearance", None)
    state = adam.state[expected]
    for actual, moment in zip(group.store.rows.moments, (state["exp_avg"], state["exp_avg_sq"]), strict=True):
        # The terms of a first moment may cancel: its rounding error is that of the largest of them.
        rounding = 4 * torch.finfo(torch.float32).eps * moment.abs().max().item()
        torch.testing.assert_close(actual.double(), moment, rtol=1e-4, atol=rounding)
    sh0 = slice(0, 3)  # the columns that have the learning rate of the schedule
    torch.testing.assert_close(
        group.store.rows.parameters[:, sh0].double(), expected.detach()[:, sh0], rtol=1e-4, atol=1e-4
    )


class LargestTensor(TorchDispatchMode):
    """Notes how many rows the largest tensor has that is made within; views of others are not made."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, function: Callable, types: object, arguments: tuple = (), named: dict | None = None):
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((arguments, named)) if torch.is_tensor(leaf)}
        result = function(*arguments, **(named or {}))
        for made in tree_leaves(result):
            if torch.is_tensor(made) and made.ndim and made.untyped_storage().data_ptr() not in given:
                self.rows = max(self.rows, len(made))
        return result


def cull_unseen(pipeline: ResidentPipeline) -> None:
    """Let culling, which looks at all Gaussians, make its tensors where `LargestTensor` sees none."""
    cull = pipeline._cull

    def unseen(cameras: Cameras) -> Tensor:
        with _disable_current_modes():
            return cull(cameras)

    pipeline._cull = unseen


def fetch_and_update(kind: str) -> tuple[int, int, int]:
    """Number of Gaussians, of those in the view, and of rows of the largest tensor of a step, but for culling."""
    parameters, cameras = aerial_scene(20_000, seed=0)
    gaussians, (first, second, *_) = gaussians_of(kind, parameters, CPU), views_of(cameras)
    if kind != "gpu_only":
        cull_unseen(gaussians._pipeline)
    for present, upcoming in ((first, second), (second, first)):
        with LargestTensor() as largest:
            rows = gaussians.fetch(present)
            gaussians.prefetch(upcoming)
            for value in rows.values():
                value.square().sum().backward(retain_graph=True)
            gaussians.update()
    return gaussians.num_gaussians, len(gaussians.ids), largest.rows


def test_a_step_makes_no_tensor_of_all_rows():
    num_gaussians, num_visible, largest = fetch_and_update("gpu_only, deferred")
    assert num_visible < 0.3 * num_gaussians
    assert largest == num_visible
    num_gaussians, _, largest = fetch_and_update("gpu_only")
    assert largest == num_gaussians  # which would be noticed


@pytest.mark.cuda
def test_a_step_on_a_gpu_takes_memory_for_the_view_alone():
    """Beside what culling takes, a byte for each Gaussian: dense gradients would be 236."""
    parameters, cameras = aerial_scene(2_000_000, seed=0)
    gaussians, views = gaussians_of("gpu_only, deferred", parameters, torch.device("cuda")), views_of(cameras)
    for present, upcoming in ((0, 1), (1, 2), (2, 3)):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        rows = gaussians.fetch(views[present])
        torch.autograd.backward(list(rows.values()), [torch.ones_like(value) for value in rows.values()])
        gaussians.prefetch(views[upcoming])
        gaussians.update()
        del rows
        taken = torch.cuda.max_memory_allocated() - before
        # Values, gradients, gradients of what is rendered and as much of geometry: less than 6 x 236 bytes.
        assert taken < 2 * gaussians.num_gaussians + 6 * 236 * len(gaussians.ids) + 2**24


def test_a_step_that_is_undone_after_a_failed_fetch_keeps_its_view(monkeypatch):
    views = [torch.tensor([0, 2]), torch.tensor([1, 2])]
    pipeline, group = make_pipeline(4, views, CPU)
    step(pipeline, 0, torch.ones(2, 48), upcoming=1)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "read", lambda name, ids: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pipeline.fetch(1)
    assert torch.equal(pipeline.state()["upcoming/ids"], views[1])
    pipeline.fetch(1)
    assert pipeline.state() == {}
    pipeline.undo_step(1)
    assert torch.equal(pipeline.state()["upcoming/ids"], views[1])
    assert group.adam.step == 1


def test_adam_options_reach_every_parameter():
    """Each parameter has its own learning rate, that of the means decays."""
    rates = {"means": 1.0, "scales": 2e-1, "quats": 3e-2, "opacities": 4e-3, "sh0": 5e-4, "shN": 6e-5}
    parameters, cameras = aerial_scene(2000, seed=0)
    start = {name: value.clone() for name, value in parameters.items()}
    options = AdamOptions(rates, lambda number: 0.1**number * rates["means"], BETAS)
    gaussians = DeferredGaussians(parameters, options, device=CPU)
    view = views_of(cameras)[0]
    rows = gaussians.fetch(view)
    ids = gaussians.ids
    sum(value.sum() for value in rows.values()).backward()  # Adam's first step is as long as the learning rate
    gaussians.update()
    moved = gaussians.rows(0, gaussians.num_gaussians)
    for name, rate in rates.items():
        torch.testing.assert_close(start[name][ids] - moved[name][ids], torch.full_like(start[name][ids], rate))
        others = torch.ones(len(start[name]), dtype=torch.bool).index_fill(0, ids, False)
        assert torch.equal(moved[name][others], start[name][others])


def test_the_next_view_is_culled_when_all_that_is_rendered_has_been_given():
    """Before that a GPU would rest while the host waits for the culling."""
    pipeline, _ = make_pipeline(4, [torch.tensor([0, 2]), torch.tensor([1, 2])], CPU)
    culled, cull = [], pipeline._cull
    pipeline._cull = lambda index: culled.append(index) or cull(index)
    view = pipeline.fetch(0)
    pipeline.prefetch(1)
    assert culled == [0]
    view.values["appearance"].grad = torch.ones(2, 48)
    pipeline.update()
    assert culled == [0, 1]
    pipeline.fetch(1)
    assert culled == [0, 1]
    pipeline.prefetch(0)
    pipeline.undo_step(1)
    pipeline.fetch(1)
    pipeline.update()
    assert culled == [0, 1]  # what was undone is not culled for any more
