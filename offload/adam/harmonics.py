"""The gradient of a view's harmonics, which is made where Adam's step needs it, in place of 180 bytes a row.

One camera sees a Gaussian from the direction d, unit length, in the colour

    1/2 + sum_k Y_k(d) h_k,  cut at zero,

with coefficients h_k and 3DGS's real harmonics Y_k, of which Y_0 is a constant. With g the gradient of the colour, zero
where it is cut, that of h_k is Y_k(d) g. So that of h_0, which lies with geometry where a state is compact, tells all
others:

    dL/dh_k = Y_k(d) / Y_0 dL/dh_0

Where several cameras see a row its gradient is a sum of such products, and not one: there it is not made here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from offload.culling.cameras import Cameras

CONSTANT = 0.28209479177387814  # Y_0
MADE_COLUMNS = 6  # of what a gradient is made of, as it travels
SHORTEST_SQUARED = 1e-24  # of the way to a Gaussian, as the rasterizers have it
# A colour above the first is zero but for rounding, and is not cut: black points begin there, which would else get no
# gradient. It becomes the second, as what was cut is zero.
CUT_BELOW, LEAST_COLOR = -(2.0**-22), 2.0**-100


@dataclass(frozen=True)
class HarmonicsGradient:
    """Holds what the gradient of harmonics in V rows is made of, where one camera has seen them."""

    means: Tensor  # [V, 3] float32 where rows are updated, as they were rendered
    constant: Tensor  # [V, 3] the gradient of sh0, which comes from colours alone
    position: tuple[float, float, float]  # of the camera
    sh_degree: int  # which they were rendered with; columns of higher ones have no gradient
    has_constant: bool = False  # whether the gradient of sh0 is wanted as well, before the others

    def dense(self, columns: int) -> Tensor:
        """Return the gradient [V, columns]; the step's kernel does not, but makes it as it needs it."""
        used = num_harmonics(self.sh_degree)
        directions = directions_to(self.means, self.means.new_tensor(self.position))
        factors = relative_harmonics(directions)[:, :used]  # [V, K - 1]
        # What is not drawn has no gradient, wherever it lies; its direction may be none.
        products = torch.where(self.constant[:, None] == 0, 0, factors[:, :, None] * self.constant[:, None])
        gradient, first = self.means.new_zeros(len(self.means), columns), 3 if self.has_constant else 0
        gradient[:, :first] = self.constant[:, :first]
        gradient[:, first : first + 3 * used] = products.flatten(1)
        return gradient

    def side_by_side(self) -> Tensor:
        """Return means and gradients of sh0 as they travel, [V, 6]."""
        return torch.cat([self.means, self.constant], dim=1)

    def __getitem__(self, rows: slice) -> HarmonicsGradient:
        """Return what it is of some of the rows."""
        return replace(self, means=self.means[rows], constant=self.constant[rows])

    def of(self, rows: Tensor) -> HarmonicsGradient:
        """Return what it is of other rows [M], which `side_by_side` has given: views of these [M, 6]."""
        return replace(self, means=rows[:, :3], constant=rows[:, 3:])


def num_harmonics(sh_degree: int) -> int:
    """Count the harmonics up to a degree, without the constant one."""
    return (sh_degree + 1) ** 2 - 1


def directions_to(means: Tensor, position: Tensor) -> Tensor:
    """Return the unit vectors [V, 3] from a position [3] or [1, 3] to means [V, 3]."""
    towards = means - position
    return towards / towards.square().sum(dim=1, keepdim=True).clamp(min=SHORTEST_SQUARED).sqrt()


def relative_harmonics(directions: Tensor) -> Tensor:
    """Return the 15 harmonics of degrees 1 to 3, over the constant one, [V, 15], of unit vectors [V, 3]."""
    x, y, z = directions.unbind(dim=1)
    xx, yy, zz = x * x, y * y, z * z
    return torch.stack(
        [
            -(3**0.5) * y,
            3**0.5 * z,
            -(3**0.5) * x,
            15**0.5 * x * y,
            -(15**0.5) * y * z,
            1.25**0.5 * (3 * zz - 1),
            -(15**0.5) * x * z,
            3.75**0.5 * (xx - yy),
            -(4.375**0.5) * y * (3 * xx - yy),
            105**0.5 * x * y * z,
            -(2.625**0.5) * y * (5 * zz - 1),
            1.75**0.5 * z * (5 * zz - 3),
            -(2.625**0.5) * x * (5 * zz - 1),
            26.25**0.5 * z * (xx - yy),
            -(4.375**0.5) * x * (xx - 3 * yy),
        ],
        dim=1,
    )


def position_of(cameras: Cameras) -> tuple[float, float, float]:
    """Return where the first one stands."""
    *rows, _ = cameras.viewmats[0].tolist()  # in Python's numbers: torch takes longer to launch for so few
    x, y, z = (-sum(row[axis] * row[3] for row in rows) for axis in range(3))  # -R^T t
    return x, y, z
