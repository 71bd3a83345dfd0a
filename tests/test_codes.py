"""The codes of a compact state alone, over all that Adam produces: in torch, in Triton and in C++."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from offload.adam import codes
from offload.adam.bfloat16 import random_bits
from offload.adam.codes import LARGEST_RATIO, OCTAVE_STEPS, blocks_of, degree_of, num_values, random_fractions
from offload.adam.deferral import largest_step
from offload.backends import native
from offload.store.layout import HALF_MAX, num_columns
from tests.test_row_kernels import assert_neighbouring_codes
from tests.training_scripts import slow_but
from tests.triton_places import ON_GPU, WITHOUT_GPU

BETAS, EPS = (0.9, 0.999), 1e-15
REACH = largest_step(BETAS)
DEGREES = [0, 1, 2, 3]
ROUNDING = 1e-5  # of float32, relative: a few operations, and on a GPU approximations of roots and logarithms
TINY = 1e-36  # what float32 squares at the lower end of its range is rounded more


NATIVE = pytest.param("native", "cpu", id="native on the CPU")
CODECS = [pytest.param(each.values, id=each.id, marks=each.marks) for each in (*WITHOUT_GPU, ON_GPU[1], NATIVE)]


@pytest.fixture(params=CODECS)
def codec(request) -> SimpleNamespace:
    return codec_of(*request.param)


def codec_of(kind: str, device: str) -> SimpleNamespace:
    """Return encode(m, v, random), decode(codes) and round_to_half(w, random), of tensors on the CPU."""
    if kind == "native":
        return native_codec()
    if kind == "torch":
        encode, decode = codes.encode_moments, codes.decode_moments

        def round_to_half(w, random):
            return codes.round_to_half(w, random_fractions(random)[0])

    else:
        from tests import triton_codec

        encode, decode, round_to_half = (
            triton_codec.encode_moments,
            triton_codec.decode_moments,
            triton_codec.round_to_half,
        )
    return SimpleNamespace(
        encode=lambda m, v, random: encode(m.to(device), v.to(device), REACH, random.to(device)).cpu(),
        decode=lambda words: tuple(moment.cpu() for moment in decode(words.to(device), REACH)),
        round_to_half=lambda w, random: round_to_half(w.to(device), random.to(device)).cpu(),
    )


def native_codec() -> SimpleNamespace:
    def stored(w: Tensor, m: Tensor, v: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
        halves, words = (torch.zeros(m.shape, dtype=torch.int16) for _ in range(2))
        floats = (each.contiguous() for each in (w, m, v))
        native.encode_rows(*floats, random.to(torch.int32).contiguous(), REACH, halves, words)
        return halves, words

    def decoded(halves: Tensor, words: Tensor) -> list[Tensor]:
        floats = [torch.empty(words.shape) for _ in range(3)]
        native.decode_rows(halves, words, REACH, *floats)
        return floats

    def round_to_half(w: Tensor, random: Tensor) -> Tensor:
        halves, words = stored(w, torch.zeros_like(w), torch.zeros_like(w), random)
        assert not words.any()
        values, m, v = decoded(halves, words)
        torch.testing.assert_close(values, halves.view(torch.float16).float(), rtol=0, atol=0, equal_nan=True)
        assert not m.any()
        assert not v.any()
        return values

    return SimpleNamespace(
        encode=lambda m, v, random: stored(torch.zeros_like(m), m, v, random)[1],
        decode=lambda words: tuple(decoded(torch.zeros_like(words), words)[1:]),
        round_to_half=round_to_half,
    )


def adam_moments(degree: int, rows: int = 4000) -> tuple[Tensor, Tensor]:
    """Return both moments as Adam leaves them, float32 [rows, columns].

    Gradients of 1e-12 ... 1e3, alike or not alike within a row, some of them zero; 1 to 6 updates, 1 ... 100,000 steps
    apart, and as many steps after the last one in every other row; blocks without any gradient; rows without any.
    """
    columns, values = num_columns("appearance", degree, "compact"), num_values(degree)
    sizes = 10 ** (15 * torch.rand(rows, columns, dtype=torch.float64) - 12)
    sizes[::3] = sizes[::3, :1]
    sizes[1::7] = 1e-12
    sizes[1::7, :values:5] = 1e3  # tiny ones beside huge ones
    sizes[torch.rand(rows, columns) < 0.1] = 0
    for number, block in enumerate(blocks_of(degree)):
        sizes[number::11, block] = 0
    sizes[::13] = 0
    sizes[:, values:] = 0
    m, v = torch.zeros_like(sizes), torch.zeros_like(sizes)
    for update in range(6):
        does = (torch.randint(6, (rows, 1)) >= update).double()
        gap = does * (10 ** (5 * torch.rand(rows, 1, dtype=torch.float64))).round()
        g = does * sizes * torch.randn(rows, columns)
        m = BETAS[0] ** gap * m + (1 - BETAS[0]) * g
        v = BETAS[1] ** gap * v + (1 - BETAS[1]) * g * g
    lag = (10 ** (5 * torch.rand(rows, 1, dtype=torch.float64))).round()
    lag[::2] = 0
    m, v = (BETAS[0] ** lag * m).float(), (BETAS[1] ** lag * v).float()
    assert (m.double().abs() <= REACH * v.double().sqrt() * (1 + ROUNDING) + 1e-37).all()
    return m, v


@pytest.fixture(params=slow_but(["0", "3"], DEGREES))
def moments(request) -> SimpleNamespace:
    """Moments m, v [rows, columns] of rows of a degree, and random bits."""
    torch.manual_seed(request.param)
    m, v = adam_moments(request.param)
    random = random_bits(torch.arange(len(m)), m.shape[1], step=3)
    return SimpleNamespace(m=m, v=v, degree=request.param, random=random)


def test_second_moments_become_a_neighbouring_code_and_never_zero(codec, moments):
    _, decoded = codec.decode(codec.encode(moments.m, moments.v, moments.random))
    v = moments.v.double()
    assert torch.equal(decoded[v == 0], torch.zeros_like(decoded[v == 0]))
    for block in blocks_of(moments.degree):
        largest = v[:, block].amax(1, keepdim=True)  # [rows, 1]
        share = v[:, block] / largest.clamp(min=1e-300)
        positive = (v[:, block] > 0) & (largest * 2**-34 > TINY)
        assert moments.degree == 0 or positive.any()
        ratio = (decoded[:, block].double() / v[:, block])[positive]
        # The codes reach 254 sixteenths of an octave down from the scale, which is up to 2^-7 above the largest root.
        within = (share > 2 ** (-2 * 253 / OCTAVE_STEPS))[positive]
        step = 2 ** (2 / OCTAVE_STEPS) * (1 + ROUNDING)
        assert ((ratio[within] < step) & (ratio[within] > 1 / step)).all()
        smallest = (decoded[:, block].double() / largest.clamp(min=1e-300))[positive][~within]
        assert (smallest > 2 ** (-2 * 254.01 / OCTAVE_STEPS)).all()
        assert (smallest < 2 ** (-2 * 252 / OCTAVE_STEPS)).all()
        assert moments.degree == 0 or ((~within).any() and within.any())


def test_first_moments_are_off_by_less_than_a_code_and_bounded(codec, moments):
    """Whatever the gradients of a block, the error is a small part of Adam's step, and no step becomes too large."""
    m, v = codec.decode(codec.encode(moments.m, moments.v, moments.random))
    root = v.double().sqrt()
    assert (m.double().abs() <= REACH * (root + EPS) * (1 + ROUNDING)).all()  # also where v is tiny
    largest = REACH * root
    clear = largest > REACH * TINY**0.5
    exact = moments.m.double().clamp(-largest, largest)
    gap = (2 * (exact.abs() / largest).sqrt() * LARGEST_RATIO + 1) / LARGEST_RATIO**2 * largest  # of squares of codes
    assert ((m - exact).abs() <= gap * (1 + 1e-3))[clear].all()
    assert (m * moments.m >= 0).all()  # none changes its sign
    assert moments.degree == 0 or clear.float().mean() > 0.2


def test_columns_without_values_hold_the_scales_and_zeros(codec, moments):
    words = codec.encode(moments.m, moments.v, moments.random)
    values = num_values(degree_of(words.shape[1]))
    for number, block in enumerate(blocks_of(degree_of(words.shape[1]))):
        scale = (words[:, values + number].int() << 16).view(torch.float32).double()
        largest = moments.v[:, block].double().sqrt().amax(1)
        # The CPU's kernels take what is denormal in float32 for zero.
        largest[(scale == 0) & (largest**2 < torch.finfo(torch.float32).tiny)] = 0
        assert (scale >= largest * (1 - ROUNDING)).all()  # rounded upwards
        assert (scale <= largest * (1 + 2**-7 + ROUNDING)).all()
    assert not words[:, values + degree_of(words.shape[1]) :].any()
    for decoded in codec.decode(words):
        assert not decoded[:, values:].any()


@pytest.mark.parametrize(("kind", "device"), [*WITHOUT_GPU[1:], ON_GPU[1], NATIVE])
def test_kernels_make_the_same_codes(kind, device, moments):
    """But for single ones at ties, where a logarithm or a power of two differs in its last bits; scales are exact.

    The CPU's kernels take what is denormal in float32 for zero; rows that have such are left out.
    """
    codec = codec_of(kind, device)
    clear = ~((moments.v > 0) & (moments.v < torch.finfo(torch.float32).tiny)).any(1)
    assert clear.float().mean() > 0.9
    words = codec.encode(moments.m, moments.v, moments.random)
    expected = codes.encode_moments(moments.m, moments.v, REACH, moments.random)
    assert (words == expected)[clear].float().mean() > 0.999
    assert_neighbouring_codes(words[clear], expected[clear])
    for actual, other in zip(codec.decode(expected), codes.decode_moments(expected, REACH), strict=True):
        torch.testing.assert_close(actual, other, rtol=2e-6, atol=torch.finfo(torch.float32).tiny)


@pytest.mark.slow
def test_roundings_of_moments_are_right_on_average(codec):
    """Of values between two codes, at codes, at the ends of the codes' range and beside ones that differ by octaves."""
    rows, columns = 20_000, 48
    v = torch.zeros(columns)
    for block in blocks_of(3):
        v[block] = torch.linspace(1.0, 1.2, block.stop - block.start) ** 2
    v[[1, 2, 3]] = torch.tensor([1e-3, 1e-6, 2e-9])  # of the first block, whose largest is 1.2^2
    m = 0.8 * REACH * v.sqrt() * torch.linspace(-1, 1, columns)
    random = random_bits(torch.arange(rows), columns, step=7)
    decoded_m, decoded_v = codec.decode(codec.encode(m.expand(rows, -1), v.expand(rows, -1), random))
    # The mean of n roundings has a deviation of at most half a gap between two codes over sqrt(n).
    for decoded, exact, gap in (
        (decoded_v, v.double(), codes.STEP_UP * v.double()),
        (decoded_m, m.double(), (2 * LARGEST_RATIO - 1) / LARGEST_RATIO**2 * REACH * v.double().sqrt() * 1.05),
    ):
        error = (decoded.double().mean(0) - exact)[:45] / gap[:45]
        assert (error.abs() <= 4.5 * 0.5 / rows**0.5 + ROUNDING * (exact / gap)[:45].abs()).all()
        # And that of all columns tells v from its root, which is not what is right on average.
        assert error.mean().abs() <= 4.5 * 0.5 / (45 * rows) ** 0.5 + 3 * ROUNDING


def test_roundings_of_values_are_right_on_average(codec):
    """Of those between two float16 too, also of tiny ones; what a float16 holds stays."""
    ids, columns = torch.arange(20_000), 16
    held = torch.tensor([0.0, 1.0, -1.5, HALF_MAX, -HALF_MAX, 2**-14, 2**-24, -3 * 2**-24])
    between = torch.tensor([1.0001, -3.1416, 65503.0, 1e-5, -1e-7, 2047.999, 6.1e-5, 1 / 3])
    w = torch.cat([held, between])
    rounded = codec.round_to_half(w.expand(len(ids), columns), random_bits(ids, columns, step=5)).double()
    assert torch.equal(rounded, rounded.half().double())
    assert torch.equal(rounded[:, :8], held.double().expand(len(ids), 8))
    gap = torch.maximum(w.abs().double(), torch.tensor(2.0**-14)).log2().floor().exp2() * 2**-10
    assert ((rounded - w).abs() < gap)[:, 8:].all()
    assert ((rounded.mean(0) - w).abs() <= 4.5 * 0.5 * gap / len(ids) ** 0.5).all()


def test_values_beyond_the_range_of_float16_become_its_largest(codec):
    w = torch.tensor([[65504.5, 65536.0, 1e30, torch.inf]]).repeat(1, 4)
    w[:, 8:] *= -1
    for step in range(10):
        rounded = codec.round_to_half(w, random_bits(torch.tensor([3]), 16, step))
        assert torch.equal(rounded, HALF_MAX * w.sign())
    assert codec.round_to_half(torch.full((1, 16), torch.nan), random_bits(torch.tensor([3]), 16, 1)).isnan().all()


@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
def test_moments_that_are_not_finite_are_refused(number):
    for spoils_first in (True, False):
        m, v = torch.zeros(2, 16), torch.ones(2, 16)
        (m if spoils_first else v)[1, 3] = number
        with pytest.raises(ValueError, match="not finite"):
            codes.encode_moments(m, v, largest_step((0.9, 0.999)), random_bits(torch.arange(2), 16, 1))
