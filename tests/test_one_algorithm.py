"""Given the same gradients, every trainer's Gaussians take the same steps: nothing is left to chaos.

Training itself multiplies roundings: Adam scales the smallest gradient to a full step, and a pixel that passes the
threshold of alpha (1/255) by a rounding changes the gradients of what is behind it. So runs of whole trainers are
compared with a tolerance (tests/test_same_model.py). Here gradients do not depend on parameters. They come
from a table of random numbers, for the rows that a fixed part of each picture shows, so that what is left is what the
trainers do differently: culling, forwarding, deferring, committing, and moving rows at a refinement.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from configs import Config
from datasets.loader import training_loader
from datasets.scene import Scene, load_scene
from datasets.synthetic import write_city_block
from offload import backends
from offload.adam.options import AdamOptions
from offload.culling.cameras import Cameras
from offload.models import geometry_packed
from offload.models.baseline import BaselineGaussians
from offload.models.contract import GaussianModel
from offload.models.deferred import DeferredGaussians
from offload.models.device import DeviceGaussians
from offload.models.forwarded import ForwardedGaussians
from offload.models.streamed import StreamedGaussians
from strategies.ops import grow
from tests import sabotage
from tests.triton_places import INTERPRETED
from training import schedules
from training.gaussians import initial_gaussians
from training.views import View

CPU = torch.device("cpu")
NUM_STEPS = 200
INTERPRETED_STEPS = 12
REFINED = (40, 80, 120, 160)  # after these steps, counted from 0
SORTED = (80,)  # and in another order after these
RESET = 100
LOCK = threading.RLock()  # since some kernels call others
ROW_KERNELS = (
    "fetch_rows",
    "fetch_dated_rows",
    "step_rows",
    "step_host_rows",
    "step_stored_rows",
    "step_view_rows",
    "catch_up_rows",
    "move_rows",
    "write_rows",
    "read_packed_rows",
    "write_packed_rows",
)
WITH_KERNELS = ("deferred", "geometry on device", "streamed", "streamed from host")
COMPACT_WITH_KERNELS = tuple(f"{trainer}, compact" for trainer in WITH_KERNELS)
OFFLOADING = ("baseline", "deferred", "geometry on device", "geometry on host", "streamed", "streamed from host")


@pytest.fixture(scope="module")
def views_and_points(tmp_path_factory):
    """The cameras of each step, and a scene whose points are the first Gaussians."""
    data_dir = tmp_path_factory.mktemp("data") / "city_block"
    write_city_block(data_dir, num_views=24, width=64, height=48, num_points=1500)
    scene = load_scene(data_dir)
    with training_loader(scene, scene.train_ids, batch_size=1, seed=0, num_workers=1, pin_memory=False) as loader:
        return [View.from_batch(next(loader), CONFIG, CPU).cameras for _ in range(NUM_STEPS)], scene


@pytest.fixture(scope="module", params=[False, True], ids=["as many rows", "refined"])
def gpu_only(request, views_and_points):
    """Whether rows are refined, the rows with gradients at each step, and the Gaussians of GPU-only training."""
    views, scene = views_and_points
    gaussians, drawn = DeviceGaussians(*start(scene), device=CPU), []
    for step, cameras in enumerate(views):
        ids = surely_drawn(gaussians, cameras)
        gradients = random_gradients(step, len(ids))
        gradients["sh0"], gradients["shN"] = gradients.pop("colors").split([1, 15], dim=1)
        for name, parameter in gaussians.fetch(cameras).items():
            parameter.grad = torch.zeros_like(parameter).index_copy(0, ids, gradients[name])
        gaussians.update(ids)
        drawn.append(ids)
        if request.param:
            refine(gaussians, step)
    assert 0.2 < sum(map(len, drawn)) / NUM_STEPS / gaussians.num_gaussians < 0.4
    return request.param, drawn, gaussians.rows(0, gaussians.num_gaussians)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", OFFLOADING)
def test_same_gradients_give_the_same_gaussians(views_and_points, gpu_only, trainer):
    refines, drawn, expected = gpu_only
    actual = train(trainer, *views_and_points, drawn, refines)
    differences = relative_differences(actual, expected)
    assert max(differences.values()) < 1e-6, differences


@pytest.mark.slow
def test_compact_trainers_round_alike(monkeypatch, views_and_points, gpu_only):
    """They differ from float32 by their rounding, which is random but for its seed, and not from one another.

    But where geometry is culled on the host fewer rows are fetched that nothing is drawn of, and these are rounded
    more seldom.
    """
    monkeypatch.setattr(geometry_packed, "BLOCK_ROWS", 200)
    refines, drawn, exact = gpu_only
    deferred, streamed, from_host, by_cpu = (
        train(f"{trainer}, compact", *views_and_points, drawn, refines)
        for trainer in ("deferred", "streamed", "streamed from host", "geometry on device")
    )
    assert all(torch.equal(value, deferred[name]) for name, value in streamed.items())
    # Geometry on the device is the same, whoever updates harmonics, which the CPU's kernels round a little otherwise.
    assert all(torch.equal(by_cpu[name], deferred[name]) for name in exact if name != "shN")
    before, _ = start(views_and_points[1])
    for name, value in exact.items():
        way = 1.0 if refines else (value - before[name]).norm() / value.norm()
        for rounded in (deferred, from_host, by_cpu):
            assert 0 < (rounded[name] - value).norm() / value.norm() < 0.05 * way, name


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter; other tests run the kernels on a GPU")
@pytest.mark.parametrize("trainer", [*WITH_KERNELS, *COMPACT_WITH_KERNELS])
def test_so_they_do_with_the_kernels_of_a_gpu(monkeypatch, views_and_points, gpu_only, trainer):
    """All of `offload` as it runs on a GPU, but for streams and memory."""
    from offload.adam import deferral_triton, packed_rows_triton
    from offload.adam import finite_triton as gradients_triton
    from offload.adam import geometry_triton as geometry_kernels_triton
    from offload.adam import rows_triton as row_kernels_triton
    from offload.culling import kernels_triton as culling_triton

    refines, drawn, _ = gpu_only
    if refines:
        pytest.skip("refinements have no kernels, and come after more steps than these")
    (views, scene), few = views_and_points, INTERPRETED_STEPS
    expected = train(trainer, views[:few], scene, drawn, refines)

    blocks = [(culling_triton, "BLOCK"), (geometry_kernels_triton, "BLOCK")]
    for module, size in [*blocks, (row_kernels_triton, "LINK_TILE"), (row_kernels_triton, "TILE")]:
        monkeypatch.setattr(module, size, 1 << 12)  # the interpreter takes as long for a small one
    monkeypatch.setattr(packed_rows_triton, "TILE", 1 << 14)
    monkeypatch.setattr(backends, "_takes_triton", lambda device: True)
    others = [(gradients_triton, ["clear_unless_finite"]), (deferral_triton, ["add_step"])]
    for module, names in [(row_kernels_triton, ROW_KERNELS), *others]:
        for name in names:
            monkeypatch.setattr(module, name, one_at_a_time(getattr(module, name)))
    actual = train(trainer, views[:few], scene, drawn, refines)
    if trainer in COMPACT_WITH_KERNELS:
        assert_same_but_for_ties(actual.pop("shN"), expected.pop("shN"))
    differences = relative_differences(actual, expected)
    assert max(differences.values()) < 1e-6, differences


@pytest.mark.slow
@pytest.mark.parametrize("trainer", OFFLOADING[1:])
def test_a_catch_up_that_is_one_step_off_is_noticed(monkeypatch, views_and_points, gpu_only, trainer):
    refines, drawn, expected = gpu_only
    sabotage.catch_up_one_step_off(monkeypatch)
    differences = relative_differences(train(trainer, *views_and_points, drawn, refines), expected)
    assert min(differences["sh0"], differences["shN"]) > 1e-4, differences


CONFIG = Config(max_steps=NUM_STEPS)
SCALE = 5.0  # of the scene, in world units


def start(scene: Scene) -> tuple[dict[str, Tensor], AdamOptions]:
    """Return the first Gaussians, one per point, and how they are updated."""
    options = {"sh_degree": 3, "init_opacity": 0.5, "init_scale": 1.0, "seed": 0}
    return initial_gaussians(scene.points, scene.points_rgb, **options), schedules.adam_options(CONFIG, SCALE)


def train(trainer: str, views: list[Cameras], scene: Scene, drawn: list[Tensor], refines: bool) -> dict[str, Tensor]:
    """The Gaussians of an offloading trainer after all steps, of which `drawn` says which rows have gradients."""
    state = "compact" if trainer.endswith("compact") else "float32"
    if trainer == "baseline":
        gaussians = BaselineGaussians(*start(scene), device=CPU)
    elif trainer.startswith("deferred"):
        gaussians = DeferredGaussians(*start(scene), device=CPU, state=state)
    elif trainer.startswith("streamed"):
        place = "host" if "host" in trainer else "device"
        gaussians = StreamedGaussians(*start(scene), geometry=place, device=CPU, state=state)
    else:
        place = "host" if "host" in trainer else "device"
        gaussians = ForwardedGaussians(*start(scene), geometry=place, device=CPU, state=state)
    for step, cameras in enumerate(views):
        rows = gaussians.fetch(cameras)
        rows_will_change = refines and step in (*REFINED, RESET)
        if trainer != "baseline" and step + 1 < len(views) and not rows_will_change:
            gaussians.prefetch(views[step + 1])
        positions = torch.searchsorted(gaussians.ids, drawn[step])
        assert torch.equal(gaussians.ids[positions], drawn[step])  # culling has left out none of them
        gradients = random_gradients(step, len(positions))
        if state == "compact":
            gradients["sh0"], gradients["shN"] = gradients.pop("colors").split([1, 15], dim=1)
            rows["shN"] = rows["shN"][:, :15]
        sum((rows[name][positions] * gradient).sum() for name, gradient in gradients.items()).backward()
        gaussians.update()
        if refines:
            refine(gaussians, step)
    return gaussians.rows(0, gaussians.num_gaussians)


def one_at_a_time(kernel: Callable) -> Callable:
    """The interpreter serves one thread at a time."""

    def call(*arguments: object) -> object:
        with LOCK:
            return kernel(*arguments)

    return call


def surely_drawn(gaussians: DeviceGaussians, cameras: Cameras) -> Tensor:
    """Rows that are in the inner part of the picture and not nearly transparent."""
    means = gaussians.read("means") @ cameras.viewmats[0, :3, :3].T + cameras.viewmats[0, :3, 3]  # [N, 3]
    pixels = (means @ cameras.Ks[0].T)[:, :2] / means[:, 2:]  # [N, 2]
    size = torch.tensor([cameras.width, cameras.height])
    inside = ((pixels > 0.2 * size) & (pixels < 0.8 * size)).all(dim=1) & (means[:, 2] > 0.1)
    return (inside & (gaussians.read("opacities").sigmoid() > 0.02)).nonzero().squeeze(1)


def random_gradients(step: int, num_rows: int) -> dict[str, Tensor]:
    """Gradients of some rows at a step; those of some rows are a million times larger than those of others."""
    generator = torch.Generator().manual_seed(step)
    sizes = 10 ** (-6 * torch.rand(num_rows, 1, generator=generator))
    gradients = sizes * torch.randn(num_rows, 59, generator=generator)
    means, scales, quats, opacities, colors = gradients.split([3, 3, 4, 1, 48], dim=1)
    colors = colors.view(num_rows, 16, 3)
    return {"means": means, "scales": scales, "quats": quats, "opacities": opacities[:, 0], "colors": colors}


def refine(gaussians: GaussianModel, step: int) -> None:
    """At some steps duplicate, split, remove and re-order rows, or reset opacities; which rows, the step decides."""
    if step in REFINED:
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randperm(gaussians.num_gaussians, generator=generator)[:200]
        grow(gaussians, chosen[:120].sort().values, chosen[120:].sort().values, False, generator)
        num_kept = int(0.95 * gaussians.num_gaussians)
        kept = torch.randperm(gaussians.num_gaussians, generator=generator)[:num_kept]
        gaussians.keep(kept if step in SORTED else kept.sort().values)
    if step == RESET:
        gaussians.clamp_opacities(-3.0)


def relative_differences(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Norm of the difference over that of the expected values, for each parameter."""
    return {name: ((actual[name] - value).norm() / value.norm()).item() for name, value in expected.items()}


def assert_same_but_for_ties(actual: Tensor, expected: Tensor) -> None:
    """Compare values that are rounded to halves at random at each step.

    The kernels' last bits in float32, before they round, are those of other instructions, and on another processor
    others. Such a bit tips one of some 2^13 roundings over, to the next half; and a value is rounded in several steps.
    """
    assert (actual != expected).float().mean() < 1e-3
    # Two halves, of which two of a size are at most 2^-10 of it apart, and the smallest 2^-24.
    torch.testing.assert_close(actual, expected, rtol=2 * 2**-10, atol=2 * 2**-24)
