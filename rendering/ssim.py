"""Weighted sum of the L1 and SSIM maps of two pictures and its analytic gradient, in torch.

For one 11x11 Gaussian window G and pictures x (rendered) and y (target), per channel (Wang et al., "Image
quality assessment: from error visibility to structural similarity", 2004):

    mu1 = G x    mu2 = G y    s = G (x^2 + y^2) - mu1^2 - mu2^2    s12 = G (x y) - mu1 mu2
    a = 2 mu1 mu2 + C1    b = 2 s12 + C2    d = mu1^2 + mu2^2 + C1    e = s + C2    SSIM = a b / (d e)

The two variances only ever occur as their sum, so four blurred moments are enough: x, y, x^2 + y^2 and x y.
Differentiating by the three that depend on x gives three maps, each as large as the SSIM map,

    by_square = dSSIM / d G(x^2) = -SSIM / e
    by_cross  = dSSIM / d G(x y) = 2 a / (d e)
    by_mean   = dSSIM / d G(x)   = 2 mu2 (b - a) / (d e) - 2 mu1 SSIM (1/d - 1/e)

and the gradient is, with G' the transpose of the blur,

    d sum(SSIM) / dx = G' by_mean + 2 x G' by_square + y G' by_cross.

`rendering/ssim_triton.py` has the same function as two CUDA kernels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW_SIZE = 11  # px
C1 = 0.01**2
C2 = 0.03**2


def _gaussian(size: int, sigma: float) -> list[float]:
    """Return the weights of one axis of the window, which is separable; `sigma` in px."""
    weights = [math.exp(-((i - size // 2) ** 2) / (2 * sigma**2)) for i in range(size)]
    return [weight / sum(weights) for weight in weights]


WINDOW = _gaussian(WINDOW_SIZE, sigma=1.5)


def weighted_sum(
    rendered: Tensor,
    target: Tensor,
    l1_weight: float,
    ssim_weight: float,
    constant: float,
    with_gradient: bool,
    spends_target: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return `l1_weight` * sum |rendered - target| + `ssim_weight` * sum SSIM + `constant`.

    Args:
        rendered, target: [C, H, W, 3] contiguous, H and W at least 11 px.
        with_gradient: whether its gradient is wanted.
        spends_target: whether the gradient may lie in the memory of `target`; here it does not.

    Returns:
        The sum (scalar), and its gradient [C, H, W, 3] by `rendered`, or None.
    """
    l1_sum = (rendered - target).abs_().sum()
    square = (rendered * rendered).addcmul_(target, target)
    # Twelve channels in one depthwise convolution take a third of the time of four times three.
    moments = torch.cat([rendered, target, square, rendered * target], dim=-1)  # [C, H, W, 12]
    mu1, mu2, square, cross = _blur(moments).split(3, dim=-1)  # each [C, H-10, W-10, 3]

    a = mu1 * mu2
    b = (cross - a).mul_(2).add_(C2)
    a.mul_(2).add_(C1)
    d = (mu1 * mu1).addcmul_(mu2, mu2)
    e = (square - d).add_(C2)
    d.add_(C1)
    inverse_de = (d * e).reciprocal_()
    ssim = a * b * inverse_de
    total = l1_weight * l1_sum + ssim_weight * ssim.sum() + constant
    if not with_gradient:
        return total, None

    by_square = -ssim / e
    by_cross = 2 * a * inverse_de
    by_mean = 2 * (mu2 * (b - a) * inverse_de - mu1 * (ssim / d + by_square))
    derivatives = torch.cat([by_mean, by_square, by_cross], dim=-1)  # [C, H-10, W-10, 9]
    # The window is symmetric, so the transpose of the valid blur is the blur of the zero-padded maps.
    mean, square, cross = _blur(derivatives, padding=WINDOW_SIZE - 1).split(3, dim=-1)
    gradient = torch.addcmul(mean, rendered, square, value=2).addcmul_(target, cross).mul_(ssim_weight)
    return total, gradient.add_((rendered - target).sign_(), alpha=l1_weight)


def _blur(maps: Tensor, padding: int = 0) -> Tensor:
    """Blur [C, H, W, K] maps by a separable Gaussian, each side padded by `padding` zeros and cut by 5 px."""
    channels = maps.shape[-1]
    window = maps.new_tensor(WINDOW).expand(channels, 1, WINDOW_SIZE)
    maps = maps.permute(0, 3, 1, 2)  # a view that torch knows as channels-last
    maps = F.conv2d(maps, window.unsqueeze(3), groups=channels, padding=(padding, 0))
    maps = F.conv2d(maps, window.unsqueeze(2), groups=channels, padding=(0, padding))
    return maps.permute(0, 2, 3, 1)
