"""The photometric loss of 3D Gaussian Splatting: L1 and SSIM (Kerbl et al. 2023, section 5)."""

from types import ModuleType

import torch
from torch import Tensor

from errors import InputError
from rendering import ssim as ssim_torch
from rendering.backends import kernels_for


def photometric_loss(
    rendered: Tensor, target: Tensor, *, ssim_lambda: float = 0.2, masks: Tensor | None = None
) -> Tensor:
    """Return (1 - ssim_lambda) * L1 + ssim_lambda * (1 - SSIM), differentiable by `rendered`.

    Args:
        rendered: [C, H, W, 3] float32, H and W at least 11 px; read without a copy where contiguous.
        target: The same in [0, 1], or uint8, of which float32 is made here; it receives no gradient.
        ssim_lambda: share of the SSIM term, in [0, 1].
        masks: [C, H, W] bool; both pictures are set to zero where False, so those pixels add nothing to the
            loss and receive no gradient. The means still run over all pixels and windows, so a picture with
            fewer valid pixels weighs less.

    Returns:
        Scalar.

    Raises:
        InputError: the pictures are smaller than the SSIM window.
    """
    is_copy = target.dtype == torch.uint8
    target = as_colors(target)
    if masks is not None:
        # where() and not a product: whatever the rasterizer left outside the mask, NaN included, is gone.
        rendered = torch.where(masks[..., None], rendered, 0.0)
        target, is_copy = torch.where(masks[..., None], target, 0.0), True
    l1_weight = (1 - ssim_lambda) / rendered.numel()
    ssim_weight = -ssim_lambda / count_windows(rendered)
    return photometric_sum(rendered, target, l1_weight, ssim_weight, constant=ssim_lambda, spends_target=is_copy)


def as_colors(pixels: Tensor) -> Tensor:
    """Return uint8 pixels as float32 in [0, 1]; others as they are."""
    return pixels.float().div_(255.0) if pixels.dtype == torch.uint8 else pixels


def count_windows(pictures: Tensor) -> int:
    """Count the SSIM values (windows times channels) in [C, H, W, 3] pictures."""
    n_cameras, height, width, channels = pictures.shape
    border = ssim_torch.WINDOW_SIZE - 1
    if min(height, width) <= border:
        raise InputError(
            f"Pictures of {width}x{height} pixels are smaller than the {border + 1}x{border + 1} window of SSIM: "
            "give a smaller --data_factor."
        )
    return n_cameras * (height - border) * (width - border) * channels


def photometric_sum(
    rendered: Tensor,
    target: Tensor,
    l1_weight: float,
    ssim_weight: float,
    *,
    constant: float = 0.0,
    spends_target: bool = False,
) -> Tensor:
    """Return l1_weight * sum of the L1 map + ssim_weight * sum of the SSIM map + constant; `rendered` gets a gradient.

    Sums and not means, so that the parts of a picture add up to the whole: the SSIM map has one value for each
    window wholly inside the pictures given, so a part that brings a halo of 5 px (none at the border of the
    whole picture) counts exactly the windows whose centres lie in the part.

    Args:
        rendered, target: [C, H, W, 3], H and W at least 11 px.
        l1_weight, ssim_weight, constant: as above.
        spends_target: nobody else has `target`, so that the gradient may lie in its memory.

    Returns:
        Scalar.
    """
    # Checked because the kernels trust it: a mismatch would read outside the smaller picture.
    if rendered.shape != target.shape or rendered.dtype != target.dtype or rendered.shape[-1] != 3:
        raise ValueError(
            f"rendered {tuple(rendered.shape)} {rendered.dtype} and target {tuple(target.shape)} {target.dtype} "
            "must be [C, H, W, 3] of one shape and dtype"
        )
    return _PhotometricSum.apply(rendered, target.detach(), l1_weight, ssim_weight, constant, spends_target)


class _PhotometricSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        rendered: Tensor,
        target: Tensor,
        l1_weight: float,
        ssim_weight: float,
        constant: float,
        spends_target: bool,
    ) -> Tensor:
        rendered, target = rendered.contiguous(), target.contiguous()
        with_gradient = ctx.needs_input_grad[0]
        total, gradient = _kernels(rendered).weighted_sum(
            rendered, target, l1_weight, ssim_weight, constant, with_gradient, spends_target
        )
        ctx.save_for_backward(gradient)  # and neither picture
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_sum: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_sum, None, None, None, None, None


def _kernels(pictures: Tensor) -> ModuleType:
    """Return the module whose `weighted_sum` suits these pictures."""
    if pictures.dtype != torch.float32:
        return ssim_torch  # on any device; Triton's kernels take float32 only
    return kernels_for(pictures.device, ssim_torch.__name__)
