"""The photometric loss against torchmetrics, finite differences and, on a GPU, the torch path in float64."""

import weakref
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from errors import InputError
from rendering import losses as losses_module
from rendering import ssim as ssim_torch
from rendering.losses import count_windows, photometric_loss, photometric_sum
from tests.triton_places import INTERPRETED


def make_pictures(n_cameras: int, height: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A target with shapes, flat parts and noise, and a rendering of it that is a little off. [C, H, W, 3]"""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    waves = torch.stack([torch.sin(x / 5), torch.cos(y / 3), torch.sin((x + y) / 7)], dim=-1) * 0.4 + 0.5
    target = waves.expand(n_cameras, -1, -1, -1).clone()
    target[:, : height // 3, : width // 2] = 0.7
    target += 0.05 * torch.randn(target.shape, generator=generator)
    rendered = 0.9 * target + 0.1 * torch.rand(target.shape, generator=generator)
    return rendered.clamp(0, 1), target.clamp(0, 1)


def torchmetrics_ssim(rendered: Tensor, target: Tensor) -> Tensor:
    """Its map without the border of 5 px, where the windows reach into reflected pixels."""
    planes = [pictures.permute(0, 3, 1, 2) for pictures in (rendered, target)]
    _, ssim_map = structural_similarity_index_measure(*planes, data_range=1.0, return_full_image=True)
    return ssim_map[..., 5:-5, 5:-5].mean()


def ssim(rendered: Tensor, target: Tensor) -> Tensor:
    """The mean over all windows, by what the loss is made of."""
    return photometric_sum(rendered, target, 0.0, 1 / count_windows(rendered))


def gradient_of(loss, rendered: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    rendered = rendered.clone().requires_grad_()
    value = loss(rendered, target)
    (gradient,) = torch.autograd.grad(value, rendered)
    return value.detach(), gradient


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("size", [(1, 11, 11), (1, 12, 30), (2, 53, 41), (1, 97, 131)])
def test_ssim_equals_torchmetrics(size):
    rendered, target = make_pictures(*size)
    value, gradient = gradient_of(ssim, rendered, target)
    # In float64, because torchmetrics' own float32 is off by 4e-5 on the smallest of these.
    expected_value, expected_gradient = gradient_of(torchmetrics_ssim, rendered.double(), target.double())
    assert value.item() == pytest.approx(expected_value.item(), rel=1e-5)
    assert relative_error(gradient, expected_gradient) < 1e-4


@pytest.mark.parametrize("ssim_lambda", [0.0, 0.2, 1.0])
def test_photometric_loss_is_its_definition(ssim_lambda):
    def definition(rendered, target):
        l1 = (rendered - target).abs().mean()
        return (1 - ssim_lambda) * l1 + ssim_lambda * (1 - torchmetrics_ssim(rendered, target))

    def ours(rendered, target):
        return photometric_loss(rendered, target, ssim_lambda=ssim_lambda)

    rendered, target = make_pictures(2, 37, 53)
    value, gradient = gradient_of(ours, rendered, target)
    expected_value, expected_gradient = gradient_of(definition, rendered.double(), target.double())
    assert value.item() == pytest.approx(expected_value.item(), rel=1e-5)
    assert relative_error(gradient, expected_gradient) < 1e-4


def test_gradient_equals_finite_differences():
    rendered, target = (pictures.double() for pictures in make_pictures(2, 13, 12))
    rendered.requires_grad_()
    # Weights of order one on either side, or the L1 part would hide an error of the SSIM part.
    torch.autograd.gradcheck(lambda pictures: photometric_sum(pictures, target, 0.3, 0.7), rendered, fast_mode=True)


def test_equal_pictures():
    _, target = make_pictures(1, 20, 24)
    target[:, :, :12] = 0.0  # windows without any variance
    assert ssim(target, target).item() == pytest.approx(1.0, abs=1e-6)
    value, gradient = gradient_of(photometric_loss, target, target)
    assert value.item() == pytest.approx(0.0, abs=1e-6)
    assert gradient.abs().max().item() < 1e-6


def test_the_loss_holds_no_picture():
    """Scripts let go of what was rendered before the backward pass, which needs the memory."""
    rendered, target = make_pictures(1, 20, 20)
    picture = 1.0 * rendered.requires_grad_()
    held = weakref.ref(picture)
    loss = photometric_loss(picture, target)
    assert held() is not None
    del picture
    assert held() is None
    loss.backward()
    assert rendered.grad is not None


def test_target_gets_no_gradient():
    rendered, target = make_pictures(1, 16, 16)
    target.requires_grad_()
    assert not photometric_loss(rendered, target).requires_grad
    photometric_loss(rendered.requires_grad_(), target).backward()
    assert target.grad is None
    assert rendered.grad is not None


def test_masked_pixels_count_for_nothing():
    rendered, target = make_pictures(2, 30, 34)
    masks = torch.ones(rendered.shape[:3], dtype=torch.bool)
    masks[0, :, 20:] = False
    masks[1, 5:9, 3:30] = False

    def masked_loss(rendered, target):
        return photometric_loss(rendered, target, masks=masks)

    value, gradient = gradient_of(masked_loss, rendered, target)
    blackened = photometric_loss(rendered * masks[..., None], target * masks[..., None])
    assert value.item() == pytest.approx(blackened.item(), rel=1e-6)
    assert value < photometric_loss(rendered, target)
    assert (gradient[~masks] == 0).all()
    assert (gradient[masks] != 0).any()

    rendered[~masks], target[~masks] = torch.nan, 0.25
    value_of_other, gradient_of_other = gradient_of(masked_loss, rendered, target)
    assert torch.equal(value, value_of_other)
    assert torch.equal(gradient, gradient_of_other)


def test_parts_with_a_halo_add_up_to_the_whole():
    rendered, target = (pictures.double() for pictures in make_pictures(1, 40, 48))

    def ssim_sum(rendered, target):
        return photometric_sum(rendered, target, 0.0, 1.0)

    whole, whole_gradient = gradient_of(ssim_sum, rendered, target)
    total, total_gradient = torch.zeros_like(whole), torch.zeros_like(whole_gradient)
    for rows in (slice(0, 16 + 5), slice(16 - 5, 40)):
        for columns in (slice(0, 32 + 5), slice(32 - 5, 48)):
            part, gradient = gradient_of(ssim_sum, rendered[:, rows, columns], target[:, rows, columns])
            total += part
            total_gradient[:, rows, columns] += gradient
    assert total.item() == pytest.approx(whole.item(), rel=1e-12)
    assert relative_error(total_gradient, whole_gradient) < 1e-12


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_pictures_in_a_wider_tensor(device):
    rendered, target = (pictures.to(device) for pictures in make_pictures(1, 20, 24))
    with_depth = torch.cat([rendered, torch.full_like(rendered[..., :1], 9.0)], dim=-1)
    expected_value, expected_gradient = gradient_of(photometric_loss, rendered, target)
    value, gradient = gradient_of(lambda wide, target: photometric_loss(wide[..., :3], target), with_depth, target)
    assert torch.equal(value, expected_value)
    assert torch.equal(gradient[..., :3], expected_gradient)
    assert (gradient[..., 3] == 0).all()


@pytest.mark.parametrize("size", [(10, 11), (11, 10), (3, 200)])
def test_pictures_smaller_than_the_window_are_refused(size):
    rendered, target = torch.rand(1, *size, 3), torch.rand(1, *size, 3)
    for loss in (photometric_loss, ssim):
        with pytest.raises(InputError, match="data_factor"):
            loss(rendered, target)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("masked", [False, True])
def test_photos_of_bytes_are_those_of_floats_and_stay(device, masked):
    generator = torch.Generator().manual_seed(3)
    photo = torch.randint(256, (2, 23, 31, 3), dtype=torch.uint8, generator=generator).to(device)
    masks = (torch.rand(2, 23, 31, generator=generator) < 0.8).to(device) if masked else None
    drawn, before = torch.rand(2, 23, 31, 3, generator=generator).to(device), photo.clone()
    rendered, expected = drawn.clone().requires_grad_(), drawn.clone().requires_grad_()
    colors = photo.float() / 255
    losses = photometric_loss(rendered, photo, masks=masks), photometric_loss(expected, colors, masks=masks)
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    assert torch.equal(rendered.grad, expected.grad)
    assert torch.equal(photo, before)
    assert torch.equal(colors, before.float() / 255)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_a_gradient_takes_the_place_of_a_copy_and_never_of_what_was_given(monkeypatch, dtype, masked):
    rendered, target = make_pictures(1, 20, 30)
    given, seen = (255 * target).to(dtype), []

    def weighted_sum(rendered, target, *others):
        seen.append((target.data_ptr(), others[-1]))
        return ssim_torch.weighted_sum(rendered, target, *others)

    monkeypatch.setattr(losses_module, "_kernels", lambda pictures: SimpleNamespace(weighted_sum=weighted_sum))
    masks = torch.ones(1, 20, 30, dtype=torch.bool) if masked else None
    photometric_loss(rendered.requires_grad_(), given, masks=masks).backward()
    ((place, spends),) = seen
    assert spends == (place != given.data_ptr()) == (masked or dtype == torch.uint8)


def test_pictures_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        photometric_loss(torch.rand(1, 20, 20, 3), torch.rand(1, 20, 21, 3))
    with pytest.raises(ValueError, match="one shape"):
        photometric_loss(torch.rand(1, 20, 20, 4), torch.rand(1, 20, 20, 4))


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter; the next test runs the kernels on a GPU")
def test_interpreted_triton_kernels_equal_torch():
    """Two programs in each direction, one of which is at the picture's end."""
    from rendering import ssim_triton

    rendered, target = make_pictures(1, 19, 45)
    value, gradient = ssim_triton.weighted_sum(rendered, target, 0.8, -0.2, 30.0, True)
    expected, expected_gradient = ssim_torch.weighted_sum(rendered.double(), target.double(), 0.8, -0.2, 30.0, True)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative_error(gradient, expected_gradient) < 1e-4


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter; a test below cuts pictures on a GPU")
@pytest.mark.parametrize(("n_cameras", "height"), [(1, 35), (2, 17)])
def test_bands_change_no_bit(n_cameras, height, monkeypatch):
    """Three rows of programs and two, in bands of one; maps of the third lie where those of the first did."""
    check_bands(make_pictures(n_cameras, height, 11), 1, monkeypatch)


@pytest.mark.cuda
def test_bands_change_no_bit_on_a_gpu(monkeypatch):
    check_bands([pictures.cuda() for pictures in make_pictures(2, 533, 800)], 300, monkeypatch)


def check_bands(pictures: Sequence[Tensor], programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from rendering import ssim_triton

    whole = ssim_triton.weighted_sum(*pictures, 0.8, -0.2, 0.2, True)
    monkeypatch.setattr(ssim_triton, "PROGRAMS", programs)
    banded = ssim_triton.weighted_sum(*pictures, 0.8, -0.2, 0.2, True)
    target = pictures[1].clone()
    in_its_place = ssim_triton.weighted_sum(pictures[0], target, 0.8, -0.2, 0.2, True, spends_target=True)
    for one, other, expected in zip(banded, in_its_place, whole, strict=True):
        assert torch.equal(one, expected)
        assert torch.equal(other, expected)
    assert in_its_place[1] is target


@pytest.mark.cuda
@pytest.mark.parametrize(
    "size", [(1, 11, 11), (1, 11, 300), (1, 300, 11), (2, 53, 41), (3, 129, 131), (1, 533, 800), (2, 533, 800)]
)
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.8, -0.2)])
def test_triton_kernels_equal_torch(size, weights):
    rendered, target = make_pictures(*size)

    def loss(rendered, target):
        # Doubled, so that the incoming gradient is not one.
        weights_of_means = (weight / target.numel() for weight in weights)
        return 2 * photometric_sum(rendered, target, *weights_of_means, constant=0.2)

    value, gradient = gradient_of(loss, rendered.cuda(), target.cuda())
    expected_value, expected_gradient = gradient_of(loss, rendered.double(), target.double())
    assert value.item() == pytest.approx(expected_value.item(), rel=1e-5, abs=1e-7)
    assert relative_error(gradient.cpu(), expected_gradient) < 1e-4
    assert value.item() == loss(rendered.cuda(), target.cuda()).item()  # bit-equal, and without its gradient


@pytest.mark.cuda
def test_triton_kernels_are_deterministic():
    rendered, target = (pictures.cuda() for pictures in make_pictures(2, 267, 401))
    first, second = (gradient_of(photometric_loss, rendered, target) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.cuda
def test_float64_on_cuda_takes_the_torch_path():
    rendered, target = (pictures.double() for pictures in make_pictures(1, 30, 40))
    value, gradient = gradient_of(ssim, rendered.cuda(), target.cuda())
    expected_value, expected_gradient = gradient_of(ssim, rendered, target)
    assert value.item() == pytest.approx(expected_value.item(), rel=1e-12)
    assert relative_error(gradient.cpu(), expected_gradient) < 1e-10


def test_window_is_the_gaussian_of_3dgs():
    assert len(ssim_torch.WINDOW) == 11
    assert sum(ssim_torch.WINDOW) == pytest.approx(1.0)
    # Variance of the sampled Gaussian, a little under 1.5^2 because it is cut at 5 px.
    variance = sum(weight * (i - 5) ** 2 for i, weight in enumerate(ssim_torch.WINDOW))
    assert variance == pytest.approx(1.5**2, rel=0.01)
