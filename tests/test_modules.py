"""Modules are trained by dense Adam, whatever a step sees of them; what they do to pictures has an oracle each."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from benchmarks.troubled_city import pose_errors
from datasets.normalize import camera_alignment, transform_cameras
from modules.contract import TrainedModule, Training
from modules.exposure import AffineExposure, BilateralGrid, Place
from modules.held_out_poses import Foretelling, common_motion
from modules.motions import corrections, rows_of
from modules.poses import Poses, turns_upwards
from modules.sky import Sky, directions
from offload.culling.cameras import Cameras
from rendering.projection import Projection
from rendering.rasterize import rasterize
from rendering.spherical_harmonics import spherical_harmonics
from tests.gaussian_scenes import GaussianScene, random_scene
from training.color_correction import clipped_as, color_corrected
from training.evaluation import evaluate
from training.views import View

CPU = torch.device("cpu")
NAMES = ["a", "b", "c", "d", "e"]


def decay(step: int) -> float:
    return 0.9**step


TRAINING = Training(decay, (0.9, 0.999), CPU)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def a_module(names: list[str] = NAMES, training: Training = TRAINING) -> TrainedModule:
    return TrainedModule(names, torch.linspace(-1, 1, 6).view(2, 3), 0.1, training)


def target_of(row: int, step: int) -> Tensor:
    return random(2, 3, seed=100 * row + step) - 0.5


def seen(step: int) -> Tensor:
    """Two rows a step, at times the same one twice; the last two rows rest for a long while."""
    return torch.tensor([[step % 3, 0], [1, 1], [2, 3 if step > 30 else 2]])[step % 3]


def advance(module: TrainedModule, steps: range) -> None:
    for step in steps:
        rows = seen(step)
        module.fetch(rows)
        targets = torch.stack([target_of(int(row), step) for row in rows])
        (module.leaf() - targets).square().sum().backward()
        module.update()


def densely(steps: int, multipliers: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """The rows after so many steps of torch's dense Adam, in float64; learning rates of their halves differ."""
    halves = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3).repeat(5, 1, 1).unbind(dim=1)
    halves = [half.clone().requires_grad_() for half in halves]
    adam = torch.optim.Adam([{"params": [half]} for half in halves], betas=(0.9, 0.999), eps=1e-15)
    for step in range(steps):
        for group, multiplier in zip(adam.param_groups, multipliers, strict=True):
            group["lr"] = 0.1 * decay(step) * multiplier
        adam.zero_grad()
        rows = torch.stack(halves, dim=1)
        sum((rows[row] - target_of(int(row), step).double()).square().sum() for row in seen(step)).backward()
        adam.step()
    return torch.stack(halves, dim=1).detach()


def test_rows_are_trained_as_by_dense_adam():
    module = a_module()
    advance(module, range(60))
    torch.testing.assert_close(module.values(torch.arange(5)).double(), densely(60), rtol=0, atol=1e-5)
    assert torch.equal(module.values(torch.tensor([4]))[0], torch.linspace(-1, 1, 6).view(2, 3))


def test_numbers_of_a_row_have_learning_rates_of_their_own():
    multipliers = torch.tensor([1.0, 1, 1, 0.2, 0.2, 0.2])
    module = TrainedModule(NAMES, torch.linspace(-1, 1, 6).view(2, 3), 0.1, TRAINING, multipliers)
    advance(module, range(40))
    expected = densely(40, multipliers=(1.0, 0.2))
    torch.testing.assert_close(module.values(torch.arange(5)).double(), expected, rtol=0, atol=1e-5)
    other = TrainedModule(NAMES, torch.linspace(-1, 1, 6).view(2, 3), 0.1, TRAINING, 2 * multipliers)
    other.load_state_dict(module.state_dict())  # whose rows lag behind, at the rates that they were trained with
    torch.testing.assert_close(other.values(torch.arange(5)).double(), expected, rtol=0, atol=1e-5)


def test_what_rows_will_be_after_a_step_of_others():
    module = a_module()
    advance(module, range(35))
    resting = torch.tensor([3, 4])
    ahead, now = module.values_ahead(resting), module.values(resting)
    assert not torch.equal(ahead, now)
    assert torch.equal(module.values(resting), now)
    module.fetch(torch.tensor([0, 1]))
    module.leaf().sum().backward()
    assert torch.equal(module.values_ahead(resting), ahead)
    module.update()
    assert torch.equal(module.values(resting), ahead)


def test_parts_add_up_and_a_part_that_failed_is_forgotten():
    whole, parts = a_module(), a_module()
    for module in (whole, parts):
        module.fetch(torch.tensor([1, 3]))
    (3 * whole.leaf()).sum().backward()
    parts.leaf().sum().backward()
    parts.gather()
    (100 * parts.leaf()).sum().backward()  # and then the rest of its backward pass ran out of memory
    (2 * parts.leaf()).sum().backward()
    parts.gather()
    for module in (whole, parts):
        module.update()
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True))
    with pytest.raises(RuntimeError, match="before they are fetched"):
        whole.leaf()


def test_a_gradient_that_is_not_finite_counts_as_zero():
    module, resting = a_module(), a_module()
    for each in (module, resting):
        advance(each, range(6))
    module.fetch(torch.tensor([0, 1]))
    (module.leaf() * torch.tensor([0.0, torch.nan])[:, None, None]).sum().backward()
    module.update()
    resting.update()
    torch.testing.assert_close(module.values(torch.arange(5)), resting.values(torch.arange(5)), rtol=0, atol=1e-6)


def test_a_state_goes_on_bit_for_bit():
    whole, first, second = a_module(), a_module(), a_module()
    advance(whole, range(40))
    advance(first, range(17))
    second.load_state_dict(first.state_dict())
    advance(second, range(17, 40))
    expected = whole.state_dict()
    for name, value in second.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_rows_are_known_again_by_name():
    before, after = a_module(), a_module(["x", "c", "a"])
    advance(before, range(20))
    after.load_state_dict(before.state_dict())
    assert after.steps_done == 20
    assert torch.equal(after.values(torch.tensor([1, 2])), before.values(torch.tensor([2, 0])))
    assert torch.equal(after.values(torch.tensor([0])), a_module().values(torch.tensor([0])))


def test_other_betas_find_every_row_up_to_date():
    before, after = a_module(), a_module(training=replace(TRAINING, betas=(0.8, 0.99)))
    advance(before, range(20))
    after.load_state_dict(before.state_dict())
    everything = torch.arange(5)
    torch.testing.assert_close(after.values(everything), before.values(everything), rtol=0, atol=1e-6)
    assert (after.last_step == 20).all()


def test_a_state_of_other_rows_is_refused():
    with pytest.raises(ValueError, match="rows"):
        a_module().load_state_dict(AffineExposure(NAMES, TRAINING).state_dict())


# ------------------------------------------------------------------------------------------------------------- the sky


def some_cameras() -> tuple[Tensor, Tensor]:
    """Two cameras that look about; [2, 4, 4] and [2, 3, 3]."""
    viewmats = torch.eye(4).repeat(2, 1, 1)
    viewmats[:, :3, :3] = torch.linalg.qr(random(2, 3, 3) - 0.5).Q
    viewmats[:, :3, :3] *= torch.linalg.det(viewmats[:, :3, :3])[:, None, None]
    viewmats[:, :3, 3] = random(2, 3, seed=1)
    Ks = torch.tensor([[40.0, 0.7, 21.0], [0.0, 45.0, 14.5], [0.0, 0.0, 1.0]]).repeat(2, 1, 1)
    return viewmats, Ks


def test_points_in_the_direction_of_a_pixel_are_drawn_there():
    viewmats, Ks = some_cameras()
    towards = directions(viewmats, Ks, 5, 3, 11, 7)  # [2, 7, 11, 3]
    centres = -(viewmats[:, :3, :3].transpose(1, 2) @ viewmats[:, :3, 3:])[..., 0]  # [2, 3]
    points = centres[:, None, None] + 8 * towards
    in_camera = torch.einsum("cij,chwj->chwi", viewmats[:, :3, :3], points) + viewmats[:, None, None, :3, 3]
    pixels = torch.einsum("cij,chwj->chwi", Ks, in_camera / in_camera[..., 2:])
    x, y = torch.meshgrid(torch.arange(5.5, 16), torch.arange(3.5, 10), indexing="xy")
    torch.testing.assert_close(pixels[..., 0], x.expand(2, 7, 11), rtol=0, atol=1e-4)
    torch.testing.assert_close(pixels[..., 1], y.expand(2, 7, 11), rtol=0, atol=1e-4)


def test_the_sky_has_the_harmonics_of_gaussians():
    viewmats, Ks = some_cameras()
    sky, coefficients = Sky(TRAINING), 0.1 * (random(16, 3, seed=2) - 0.5)
    colors = sky(coefficients, viewmats, Ks, 0, 0, 42, 29)
    centres = -(viewmats[:, :3, :3].transpose(1, 2) @ viewmats[:, :3, 3:])[..., 0]
    means = (centres[:, None, None] + directions(viewmats, Ks, 0, 0, 42, 29)).view(-1, 3)
    ids, count = torch.arange(len(means)), len(means) // 2
    nothing = torch.empty(0)
    projection = Projection(
        camera_ids=ids // count,
        gaussian_ids=ids,
        row_offsets=torch.tensor([0, count, 2 * count]),
        radii=nothing,
        means2d=nothing,
        depths=nothing,
        conics=nothing,
        opacities=nothing,
    )
    expected = spherical_harmonics(3, means, viewmats, coefficients.expand(len(means), 16, 3).contiguous(), projection)
    torch.testing.assert_close(colors.view(-1, 3), expected, rtol=0, atol=1e-5)
    part = sky(coefficients, viewmats, Ks, 16, 8, 20, 10)
    torch.testing.assert_close(part, colors[:, 8:18, 16:36], rtol=0, atol=1e-6)


def test_gradients_of_the_sky():
    viewmats, Ks = (t.double() for t in some_cameras())
    coefficients = random(16, 3, dtype=torch.float64).requires_grad_()
    sky = Sky(TRAINING)
    viewmats.requires_grad_()
    assert torch.autograd.gradcheck(lambda c, v: sky(c, v, Ks, 3, 2, 4, 3), (coefficients, viewmats))


# --------------------------------------------------------------------------------------------------------------- poses


def some_poses(weight: float = 0.0) -> Poses:
    viewmats, _ = some_cameras()
    return Poses(["a", "b"], viewmats.double(), torch.tensor([0.0, 2.5]).double(), 3.0, 1e-3, weight, TRAINING)


def test_a_pose_is_as_it_was_given_at_first():
    poses, both = some_poses(), torch.arange(2)
    assert torch.equal(poses(poses.values(both), both).float(), some_cameras()[0])


def test_a_pose_is_turned_about_what_it_looks_at_and_moved_in_its_own_axes():
    poses, both, rows = some_poses(), torch.arange(2), 0.02 * (random(2, 6, seed=1) - 0.5)
    turn = torch.from_numpy(Rotation.from_rotvec(rows[:, :3].numpy()).as_matrix())
    correction = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    correction[:, :3, :3], correction[:, :3, 3] = turn, rows[:, 3:]
    place = torch.tensor([0.0, 0, 2.5]).double()  # of the second; the first turns where it stands
    correction[1, :3, 3] += place - turn[1] @ place
    expected = torch.linalg.inv(some_cameras()[0].double()) @ correction
    found = poses(rows, both)
    torch.testing.assert_close(torch.linalg.inv(found), expected, rtol=0, atol=1e-6)
    products = found[:, :3, :3] @ found[:, :3, :3].mT
    torch.testing.assert_close(products, torch.eye(3, dtype=torch.float64).expand(2, 3, 3), rtol=0, atol=1e-6)


def test_rows_of_motions_are_those_that_they_were_made_of():
    rows, distances = random(50, 6, seed=2, dtype=torch.float64) - 0.5, 3 * random(50, seed=3, dtype=torch.float64)
    found = rows_of(corrections(rows, distances).numpy(), distances.numpy())
    np.testing.assert_allclose(found, rows.numpy(), rtol=0, atol=1e-14)  # of numbers up to 3


@pytest.mark.parametrize("size", [0.0, 0.3])
def test_gradients_of_poses(size):
    rows = (size * (random(2, 6, seed=1, dtype=torch.float64) - 0.5)).requires_grad_()
    assert torch.autograd.gradcheck(lambda r: some_poses()(r, torch.arange(2)), (rows,))


def test_poses_of_a_state_without_distances_turn_about_themselves():
    """As they did when that was written, so that the cameras stand where they stood."""
    before, after = some_poses(), some_poses()
    before.distances.zero_()
    before.rows.uniform_(-0.1, 0.1)
    state = before.state_dict()
    del state["distances"]
    after.load_state_dict(state)
    rows, ids = before.values(torch.arange(2)), torch.arange(2)
    assert torch.equal(after.values(ids), rows)
    assert torch.equal(after(rows, ids), before(rows, ids))


def test_the_penalty_of_poses_is_in_radians_and_extents():
    rows = torch.tensor([[0.1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0.3, 0]])
    torch.testing.assert_close(some_poses(weight=2.0).penalty(rows), torch.tensor(2.0 * (0.1**2 + (0.3 / 3) ** 2) / 2))


def test_held_out_photos_go_with_what_all_poses_have_moved_in_common():
    scene = seen_from_around(10)
    given = torch.linalg.inv(scene.viewmats.double())
    poses = Poses(list("abcdefghij"), scene.viewmats.double(), torch.zeros(10).double(), 3.5, 1e-3, 0.0, TRAINING)
    assert np.array_equal(poses.foretelling().poses(given.numpy()), given.numpy())  # by those of none that was seen
    motion = np.eye(4)
    motion[:3, :3] = 1.002 * Rotation.from_rotvec([0.01, -0.02, 0.015]).as_matrix()
    motion[:3, 3] = 0.03, -0.01, 0.02
    moved = transform_cameras(motion, given.numpy())
    off = torch.linalg.inv(given) @ torch.from_numpy(moved)
    turns = Rotation.from_matrix(off[:, :3, :3].numpy()).as_rotvec()
    poses.rows[:] = torch.cat([torch.from_numpy(turns), off[:, :3, 3]], dim=1)
    poses.last_step[:] = 1
    np.testing.assert_allclose(poses.foretelling().poses(given.numpy()), moved, rtol=0, atol=5e-4)


def around(count: int) -> np.ndarray:
    """Return cameras [count, 4, 4] in a circle of radius 1 about what they look at."""
    angles = 2 * np.pi * np.arange(count) / count
    poses = np.repeat(np.eye(4)[None], count, axis=0)
    poses[:, :3, :3] = Rotation.from_euler("y", -angles[:, None]).as_matrix()
    poses[:, :3, 3] = -poses[:, :3, 2]
    return poses


@pytest.mark.parametrize("of", ["the capture", "each photo"])
def test_held_out_photos_go_with_their_neighbours_where_these_foretell_one_another(of):
    """Cameras all shifted to the right, and more so on one side, are an error of the capture."""
    generator, every, distances = np.random.default_rng(0), around(40), np.ones(35)
    is_held_out = np.arange(40) % 8 == 0
    rows = np.zeros((40, 6))
    if of == "the capture":
        rows[:, 3] = 0.002 + 0.001 * np.cos(4 * np.pi * np.arange(40) / 40)
        rows[[3, 21], :] += 0.1  # photos that nothing else shows
    else:
        rows[~is_held_out] = 0.002 * generator.standard_normal((35, 6))
    right = every @ corrections(torch.from_numpy(rows), torch.ones(40).double()).numpy()
    found = Foretelling(every[~is_held_out], right[~is_held_out], distances, extent=1.0).poses(every[is_held_out])
    motion = common_motion(every[~is_held_out], right[~is_held_out], 1.0)
    by_all = transform_cameras(motion, every[is_held_out])
    ahead = np.array([0, 0, 1.0, 1])  # what they look at
    missed, missed_by_all = (np.linalg.norm((poses - right[is_held_out]) @ ahead, axis=1) for poses in (found, by_all))
    if of == "the capture":
        assert missed.max() < 0.001
        assert np.median(missed_by_all) > 0.002
    else:
        np.testing.assert_array_equal(found, by_all)
        assert missed.max() < 0.002


def test_photos_that_have_gone_astray_do_not_move_the_others():
    every, shift = around(30), np.array([0.01, 0.02, 0.03])
    right = every.copy()
    right[:, :3, 3] += shift
    astray = right.copy()
    astray[[2, 9, 11, 20], :3, 3] += 0.3
    moved = transform_cameras(common_motion(every, astray, 1.0), every)
    np.testing.assert_allclose(moved, right, rtol=0, atol=1e-9)
    assert np.abs(transform_cameras(camera_alignment(every, astray, 1.0), every) - right).max() > 0.02


def test_a_photo_does_not_foretell_itself_where_many_were_taken_at_one_place():
    """Seven exposures from each place have the same given pose, and errors of their own."""
    generator, every = np.random.default_rng(0), np.repeat(around(20), 7, axis=0)
    is_held_out = np.arange(140) % 8 == 0
    rows = 0.002 * generator.standard_normal((140, 6))
    right = every @ corrections(torch.from_numpy(rows), torch.ones(140).double()).numpy()
    given, known = every[~is_held_out], right[~is_held_out]
    found = Foretelling(given, known, np.ones(len(given)), extent=1.0).poses(every[is_held_out])
    by_all = transform_cameras(common_motion(given, known, 1.0), every[is_held_out])
    np.testing.assert_array_equal(found, by_all)


def test_few_photos_foretell_what_they_have_in_common():
    every, shift = around(8), np.array([0.0, 0.1, 0])
    right = every.copy()
    right[:, :3, 3] += shift
    found = Foretelling(every[3:], right[3:], np.ones(5), extent=1.0).poses(every[:3])
    np.testing.assert_allclose(found, right[:3], rtol=0, atol=1e-12)


def test_what_all_cameras_look_too_high_by_is_not_followed():
    """And what each turns by alone is found beside it, whether it looks aslant at the ground or straight down."""
    generator, steps, n = torch.Generator().manual_seed(0), 400, 8
    viewmats = torch.eye(4).double().repeat(n, 1, 1)
    tilts = np.stack([np.full(n, -np.pi), np.zeros(n), np.arange(n) * 0.9], axis=1)  # straight down, by azimuths
    tilts[:6, 0] += 0.8
    viewmats[:, :3, :3] = torch.from_numpy(Rotation.from_euler("xyz", tilts).as_matrix()).mT
    upwards = turns_upwards(viewmats).float()
    turned = torch.from_numpy(Rotation.from_rotvec(0.01 * upwards.double().numpy()).as_matrix())
    lifted = (viewmats[:, :3, :3].mT @ turned)[:, 2, 2] - viewmats[:, 2, 2]  # of where they look, in the world
    assert (lifted[:6] > 0.003).all()
    assert (lifted[6:].abs() < 1e-6).all()
    own = 0.005 * torch.randn(n, 3, generator=generator)
    own -= (own * upwards).sum() / upwards.square().sum() * upwards
    wanted = own + 0.004 * upwards  # as pictures that are drawn too high want it
    training = Training(lambda step: 0.01 ** (step / steps), (0.9, 0.999), CPU)
    in_sight = torch.ones(n).double()
    poses = Poses(list("abcdefgh"), viewmats, in_sight, 3.0, 1e-3, 0.0, training)
    for step in range(steps):
        seen_now = torch.tensor([step % n])
        poses.fetch(seen_now)
        (50 * (poses.leaf()[:, :3] - wanted[seen_now]).square().sum()).backward()
        poses.update()
    found = poses.values(torch.arange(n))[:, :3]
    assert abs((found * upwards).sum() / upwards.square().sum()) < 1e-4
    torch.testing.assert_close(found, own, rtol=0, atol=5e-4)


def test_ground_of_opaque_gaussians_is_drawn_too_high_seen_from_aslant():
    """Nearer ones cover the edges of those behind: why a common turn is nothing to learn from pictures."""
    width, height, spacing = 64, 48, 0.75
    generator = torch.Generator().manual_seed(0)
    line = torch.arange(-30, 30, spacing)
    places = torch.cartesian_prod(line, line) + spacing * (torch.rand(len(line) ** 2, 2, generator=generator) - 0.5)

    def brightness(x: Tensor, y: Tensor) -> Tensor:
        return 0.5 + 0.2 * torch.sin(x / 1.2) + 0.2 * torch.sin(y / 1.3)

    num = len(places)
    means = torch.nn.functional.pad(places, (0, 1))
    scales, quats = torch.tensor([0.5, 0.5, 0.01]).repeat(num, 1), torch.eye(4)[:1].repeat(num, 1)
    viewmats, aslant = torch.eye(4)[None], math.sqrt(0.5)
    viewmats[0, :3, :3] = torch.tensor([[1, 0, 0], [0, -aslant, -aslant], [0, aslant, -aslant]])
    viewmats[0, 2, 3] = 40.0  # in front of it is the middle of the ground
    K = torch.tensor([[64.0, 0, width / 2], [0, 64.0, height / 2], [0, 0, 1]])
    colors = brightness(*places.T)[:, None].repeat(1, 3)
    gaussians = (means, quats, scales, torch.full((num,), 0.95), colors)
    drawn = rasterize(*gaussians, viewmats, K[None], width, height)[0][0, 12:36, 16:48, 0]

    def misfit(rows_up: float) -> float:
        down, across = torch.meshgrid(torch.arange(12, 36) + 0.5 + rows_up, torch.arange(16, 48) + 0.5, indexing="ij")
        rays = torch.stack([(across - width / 2) / 64, (down - height / 2) / 64, torch.ones_like(down)], dim=-1)
        rays = rays @ viewmats[0, :3, :3]
        position = -viewmats[0, :3, 3] @ viewmats[0, :3, :3]
        x, y, _ = (position - rays * (position[2] / rays[..., 2:])).unbind(dim=-1)
        return float(-torch.corrcoef(torch.stack([drawn.flatten(), brightness(x, y).flatten()]))[0, 1])

    shifts = np.arange(-1.5, 1.55, 0.1)
    assert 0.4 < shifts[np.argmin([misfit(shift) for shift in shifts])] < 1.4


def seen_from_around(num_cameras: int) -> GaussianScene:
    """Gaussians, and cameras that look at them from an arc."""
    scene = random_scene(300, seed=3, n_cameras=num_cameras, width=64, height=48, median_scale=0.1)
    middle = torch.tensor([0.0, 0, 3.5])
    for camera, viewmat in enumerate(scene.viewmats):
        angles = [0.25 * (camera % 3 - 1), 0.35 * (camera - (num_cameras - 1) / 2)]
        viewmat[:3, :3] = torch.from_numpy(Rotation.from_euler("xy", angles).as_matrix())
        viewmat[:3, 3] = middle - viewmat[:3, :3] @ middle
    return scene


def trained_together(
    is_off: bool, pose_opt: bool, steps: int = 200, *, relief: float = 1.0, distance: float = 3.5
) -> tuple[float, tuple[float, float]]:
    """Train Gaussians that begin beside the right ones, and poses that are off by 0.3 degrees and 0.3 % of the extent.

    Args:
        is_off: Whether they are.
        pose_opt: Whether they are trained.
        steps: Of both.
        relief: How deep the scene is, by what it is at first.
        distance: In front of each camera, of the place about which it turns; the scene's is 3.5.

    Returns:
        PSNR of a held-out photo, from where it stands among the others, and `pose_errors` of these.
    """
    scene, extent, generator = seen_from_around(10), 3.5, torch.Generator().manual_seed(0)
    scene.means[:, 2] = 3.5 + relief * (scene.means[:, 2] - 3.5)

    def draw(means: Tensor, sh0: Tensor, viewmats: Tensor) -> Tensor:
        gaussians = (means, scene.quats, scene.scales, scene.opacities, torch.cat([sh0, scene.shN], dim=1))
        return rasterize(*gaussians, viewmats, scene.Ks[: len(viewmats)], scene.width, scene.height, sh_degree=1)[0]

    truth = scene.viewmats.double()
    photos = draw(scene.means, scene.sh0, scene.viewmats)
    axes = torch.nn.functional.normalize(torch.randn(2, 9, 3, generator=generator), dim=2)
    upwards = torch.einsum("nij,ni->nj", scene.viewmats[1:, :3, :3], turns_upwards(scene.viewmats[1:]))  # in the world
    axes[0] -= (axes[0] * upwards).sum() / upwards.square().sum() * upwards  # which is left alone
    off = torch.cat([math.radians(0.3) * axes[0], 0.003 * extent * axes[1]], dim=1) * is_off
    training = Training(lambda step: 0.01 ** (step / steps), (0.9, 0.999), CPU)
    where_they_stand, in_sight = torch.zeros(9).double(), torch.full((9,), distance).double()
    given = truth[1:] @ torch.linalg.inv(corrections(off, where_they_stand))
    poses, every = Poses(list("abcdefghi"), given, in_sight, extent, 1e-3, 1.0, training), torch.arange(9)
    means = (scene.means + 0.02 * torch.randn(300, 3, generator=generator)).requires_grad_()
    sh0 = (0.8 * scene.sh0).requires_grad_()
    adam = torch.optim.Adam([{"params": [means], "lr": 2e-3}, {"params": [sh0], "lr": 1e-2}], eps=1e-15)
    schedule = torch.optim.lr_scheduler.ExponentialLR(adam, 0.01 ** (1 / steps))
    for _ in range(steps):
        poses.fetch(every)
        viewmats = poses(poses.leaf(), every) if pose_opt else given
        adam.zero_grad()
        (draw(means, sh0, viewmats.float()) - photos[1:]).abs().mean().backward()
        adam.step()
        schedule.step()
        if pose_opt:
            poses.update()
    found, right = (torch.linalg.inv(viewmats).numpy() for viewmats in (poses(poses.values(every), every), truth))
    held_out = transform_cameras(camera_alignment(right[1:], found, extent), right[:1])
    with torch.no_grad():
        drawn = draw(means, sh0, torch.linalg.inv(torch.from_numpy(held_out)).float())
    return -10 * math.log10((drawn - photos[:1]).square().mean()), pose_errors(found, right[1:])


@pytest.mark.slow
def test_poses_that_are_off_are_corrected_while_the_gaussians_are_trained():
    right, _ = trained_together(is_off=False, pose_opt=False)
    without, before = trained_together(is_off=True, pose_opt=False)
    corrected, after = trained_together(is_off=True, pose_opt=True)
    assert right > without + 2.0
    assert corrected > right - 0.1 * (right - without), (right, without, corrected)
    assert all(now < old / 5 for now, old in zip(after, before, strict=True)), (before, after)


@pytest.mark.slow
def test_a_turn_about_what_is_seen_is_told_from_a_shift():
    """Over flat ground, where a turn of a camera about itself looks as a shift does."""
    about_itself, about_the_ground = (
        trained_together(is_off=True, pose_opt=True, steps=80, relief=0.2, distance=distance)[1]
        for distance in (0.0, 3.5)
    )
    assert all(after < before / 1.5 for before, after in zip(about_itself, about_the_ground, strict=True)), (
        about_itself,
        about_the_ground,
    )


# ------------------------------------------------------------------------------------------------------------ exposure

EXPOSURES = pytest.mark.parametrize("kind", [AffineExposure, BilateralGrid])


@EXPOSURES
def test_an_exposure_changes_nothing_at_first(kind):
    exposure, colors = kind(NAMES, TRAINING), random(2, 20, 30, 3)
    exposure.fetch(torch.tensor([0, 4]))
    torch.testing.assert_close(exposure(colors, exposure.leaf(), Place(0, 0, 30, 20)), colors, rtol=0, atol=1e-6)


def random_rows(exposure: AffineExposure | BilateralGrid) -> Tensor:
    exposure.fetch(torch.tensor([1, 2]))
    leaf = exposure.leaf().detach()
    return leaf + 0.3 * (random(*leaf.shape, seed=3) - 0.5)


@EXPOSURES
def test_a_part_is_exposed_as_it_is_in_the_whole(kind):
    exposure, colors = kind(NAMES, TRAINING), random(2, 20, 30, 3)
    rows = random_rows(exposure)
    whole = exposure(colors, rows, Place(0, 0, 30, 20))
    part = exposure(colors[:, 4:13, 7:27], rows, Place(7, 4, 30, 20))
    torch.testing.assert_close(part, whole[:, 4:13, 7:27], rtol=0, atol=1e-6)


@EXPOSURES
def test_gradients_of_exposures(kind):
    exposure, colors = kind(NAMES, TRAINING), 0.1 + 0.8 * random(2, 3, 4, 3, dtype=torch.float64)
    rows = random_rows(exposure).double()
    place, colors = Place(2, 1, 30, 20), colors.requires_grad_()
    assert torch.autograd.gradcheck(lambda c: exposure(c, rows, place), (colors,))
    direction = random(*rows.shape, seed=4).double()
    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: exposure(colors.detach(), rows + s * direction, place), (step,))


def test_an_affine_exposure_is_a_matrix():
    exposure, colors = AffineExposure(NAMES, TRAINING), random(2, 5, 6, 3)
    rows = random_rows(exposure)
    expected = torch.einsum("cij,chwj->chwi", rows[..., :3], colors) + rows[:, None, None, :, 3]
    torch.testing.assert_close(exposure(colors, rows, Place(0, 0, 6, 5)), expected, rtol=0, atol=1e-6)


def test_a_grid_is_interpolated_by_place_and_brightness():
    """Against a loop over the eight corners around one pixel."""
    exposure, colors = BilateralGrid(NAMES, TRAINING), random(1, 1, 1, 3)
    grid = random_rows(exposure)[:1]
    brightness = float(colors[0, 0, 0] @ torch.tensor([0.299, 0.587, 0.114]))
    at = (brightness * 7, 12.5 / 20 * 15, 8.5 / 30 * 15)  # in cells, by brightness, row and column
    matrix = torch.zeros(12)
    for corner in range(8):
        cell = [math.floor(a) + (corner >> axis & 1) for axis, a in enumerate(at)]
        weight = math.prod(1 - abs(a - c) for a, c in zip(at, cell, strict=True))
        matrix += weight * grid[0, :, cell[0], cell[1], cell[2]]
    expected = matrix.view(3, 4)[:, :3] @ colors[0, 0, 0] + matrix.view(3, 4)[:, 3]
    torch.testing.assert_close(exposure(colors, grid, Place(8, 12, 30, 20))[0, 0, 0], expected, rtol=0, atol=1e-5)


@EXPOSURES
def test_what_all_exposures_share_is_left_to_the_model(kind, monkeypatch):
    """Each round changes them as it would without, but for that; a photo that is not trained on stays as it was."""
    monkeypatch.setattr(BilateralGrid, "penalty", lambda grid, rows: None)
    exposure, trained = kind(NAMES, TRAINING), torch.arange(4)
    identity = exposure.rows[0].clone()
    free = TrainedModule(NAMES, identity, exposure._learning_rate, TRAINING)
    for step in range(40):
        if step == 4:  # all have begun, each at the identity
            begun, free_begun = exposure.rows[trained], free.rows[trained]
        ids = trained[[step % 4]]
        for module in (exposure, free):
            module.fetch(ids)
            module.leaf()
            module.gradient.copy_(1 + torch.sin(torch.arange(identity.numel()) + 3 * ids).view(1, -1))
            module.update()
    changed, expected = exposure.rows[trained] - begun, free.rows[trained] - free_begun
    torch.testing.assert_close(changed[1:] - changed[0], expected[1:] - expected[0], rtol=0, atol=1e-5)
    assert (free.rows[trained].mean(dim=0) - identity).abs().max() > 0.005
    matrices = exposure.rows[trained].view(4, 12, exposure.levels, -1)
    expected = torch.eye(3, 4).view(12, 1).expand(-1, exposure.levels)
    torch.testing.assert_close(matrices.mean(dim=(0, 3)), expected, rtol=0, atol=1e-5)
    assert torch.equal(exposure.rows[4], identity)


def test_total_variation_of_grids():
    exposure = BilateralGrid(NAMES, TRAINING)
    flat = torch.eye(3, 4).view(12, 1, 1, 1).repeat(2, 1, 8, 16, 16).view(2, 12, 8, 16, 16)
    assert exposure.penalty(flat) == 0
    ramp = flat + 0.1 * (torch.arange(16) - 7.5)  # 0.1 from column to column
    torch.testing.assert_close(exposure.penalty(ramp), torch.tensor(10 * 0.1**2), rtol=1e-4, atol=0)
    with torch.no_grad():
        exposure.rows += 0.1 * (random(*exposure.rows.shape) - 0.5)
    before = exposure.penalty(exposure.values(torch.arange(5)))
    for _ in range(10):
        exposure.fetch(torch.arange(5))
        exposure.update()
    assert exposure.penalty(exposure.values(torch.arange(5))) < 0.8 * before


# ------------------------------------------------------------------------------------------------- corrected colours


@pytest.mark.parametrize("masked", [False, True])
def test_another_exposure_is_no_error_where_colours_are_corrected(masked):
    rendered = 0.2 + 0.5 * random(1, 20, 30, 3)
    matrix = torch.eye(3) + 0.2 * (random(3, 3, seed=1) - 0.5)
    photo = rendered @ matrix.T + torch.tensor([0.05, -0.02, 0.1])
    mask = random(1, 20, 30, seed=2) < 0.7 if masked else None
    if mask is not None:
        photo[~mask] = 0.5  # which must not count
    difference = color_corrected(rendered, photo, mask) - photo
    assert (difference[mask] if masked else difference).abs().max() < 1e-4


def test_clipped_pixels_do_not_count():
    rendered = 0.2 + 0.5 * random(1, 20, 30, 3)
    photo = (1.6 * rendered).clamp(0, 1)
    assert (color_corrected(rendered, photo) - photo).abs().max() < 1e-4


def test_what_is_wrong_where_a_photo_is_clipped_counts_in_metrics():
    """It is left out of the fit alone: a white sky may be drawn brighter than white, and not grey."""
    photo = 0.2 + 0.6 * random(1, 20, 30, 3)
    photo[:, :8] = 1.0
    rendered = 0.5 * photo + 0.1
    view = View(photo, Cameras(torch.eye(4)[None], torch.eye(3)[None], 30, 20))
    found = {}
    for sky, drawn in {"bright": 0.8, "grey": 0.5}.items():
        rendered[:, :8] = drawn
        evaluated = evaluate([("a", view)], lambda cameras: rendered, None, lambda *_: None, CPU, color_correct=True)
        found[sky] = evaluated["cc_psnr"]
    assert found["bright"] > 60
    assert found["grey"] == pytest.approx(-10 * math.log10(8 / 20 * 0.2**2), abs=0.01)  # 0.5 becomes 0.8


def test_what_a_clipped_photo_cannot_hold_is_no_error():
    photo = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.9, 0.1]).view(1, 2, 1, 3)
    colors = torch.tensor([1.2, 0.8, -0.1, 0.1, 1.2, -0.1]).view(1, 2, 1, 3).requires_grad_()
    (clipped_as(photo, colors) - photo).abs().sum().backward()
    assert colors.grad.flatten().tolist() == [0, -1, 0, 1, 1, -1]


def test_pictures_of_one_colour_are_corrected():
    photo = torch.full((1, 12, 12, 3), 0.25)
    assert (color_corrected(torch.full_like(photo, 0.5), photo) - photo).abs().max() < 1e-3
