"""`rendering/ssim.py` as two CUDA kernels in Triton; the mathematics is explained there.

A picture [H, W, 3] is read as H rows of 3W floats, in which the neighbour of a value in its own channel is 3
floats away; so nothing is transposed and neighbouring threads read neighbouring floats. A program owns BLOCK
columns (floats) of ROWS rows and walks down the rows. For each row it blurs horizontally from 11 shifted loads,
which the L1 cache serves, and vertically by keeping the partial sums of the 10 windows that are still open in
registers: `open1` is the oldest, and each new row moves every sum one step on. Nothing is shared between
programs and nothing intermediate but the three maps of derivatives goes to memory.

Memory traffic in float32, per pixel: the first kernel reads 2 pictures and writes 3 maps, the second reads all of that
and writes the gradient, 11 x 12 bytes, and the backward pass scales that, 2 x 12. At 4 TB/s that is 0.017 ms for
800x533 and 0.32 ms for 3840x2160. The maps, 36 bytes per pixel, would be the largest tensors of a step with large
pictures. So the two kernels take turns in bands of a picture, each some waves of programs, and a band's maps lie where
those of the band before lay, but for its last rows, into which windows of this one reach up: row m of a map is row m
modulo `kept` in memory. A band reads no rows of the target above its own, and its second kernel of these only the
pixels whose gradients it writes: so gradients may lie where the target lay.

What holds for a row as a whole bounds its columns in the masks: a scalar condition and a block's would together make
an integer in Triton's interpreter, where the kernels are tested without a GPU.

Sums are deterministic: one float per program, then torch's own reduction; no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rendering.ssim import C1, C2, WINDOW

BLOCK = 128  # floats of a row per program, one per thread
ROWS = 16  # rows per program; 10 more are read for the windows that reach over its edge
PROGRAMS = 1536  # of a band, at most, where a row of programs has fewer: some waves, so that bands cost no time

_C1 = tl.constexpr(C1)
_C2 = tl.constexpr(C2)
_PEAK = tl.constexpr(WINDOW[5])
_FALL = tl.constexpr(WINDOW[4] / WINDOW[5])  # a Gaussian falls by this factor to the square of the distance


def weighted_sum(
    rendered: Tensor,
    target: Tensor,
    l1_weight: float,
    ssim_weight: float,
    constant: float,
    with_gradient: bool,
    spends_target: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Do as `rendering.ssim.weighted_sum`, for float32 on a CUDA device."""
    n_cameras, height, width, _ = rendered.shape
    columns, rows = -(-3 * width // BLOCK), -(-height // ROWS)  # of programs
    partial_sums = rendered.new_empty(n_cameras, rows, columns)
    num_bands = min(-(-partial_sums.numel() // PROGRAMS), rows) if with_gradient else 1
    band = -(-rows // num_bands)
    kept = ROWS * min(band + 1, rows)
    maps = rendered.new_empty(3, n_cameras, kept, width - 10, 3) if with_gradient else None
    gradient = None
    if with_gradient:
        gradient = target if spends_target else torch.empty_like(rendered)
    with torch.cuda.device_of(rendered):
        for first in range(0, rows, band):
            grid = (columns, min(band, rows - first), n_cameras)
            _forward_kernel[grid](
                rendered, target, maps, partial_sums, height, 3 * width, first, rows, kept, l1_weight, ssim_weight,
                constant, ROWS=ROWS, BLOCK=BLOCK, num_warps=BLOCK // 32,
            )  # fmt: skip
            if with_gradient:
                _backward_kernel[grid](
                    rendered, target, maps, gradient, height, 3 * width, first, kept, l1_weight, ssim_weight,
                    ROWS=ROWS, BLOCK=BLOCK, num_warps=BLOCK // 32,
                )  # fmt: skip
    return partial_sums.sum(), gradient


@triton.jit(do_not_specialize=["first", "num_rows"])
def _forward_kernel(
    rendered,  # [C, H, W, 3]
    target,  # [C, H, W, 3]
    maps,  # [3, C, kept, W-10, 3], by_mean, by_square, by_cross; or None
    partial_sums,  # [C, num_rows, programs of a row]
    height,
    row_length,  # 3 W
    first,  # row of programs
    num_rows,  # of programs, of the picture
    kept,
    l1_weight,
    ssim_weight,
    constant,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    program_row = first + tl.program_id(1)
    first_row = program_row * ROWS
    camera = tl.program_id(2).to(tl.int64)  # offsets between pictures may pass 2^31
    in_map = column < row_length - 30  # a window begins here that ends inside the picture
    rendered += camera * height * row_length
    target += camera * height * row_length
    map_row_length = row_length - 30
    map_size = kept * map_row_length
    map_stride = tl.num_programs(2).to(tl.int64) * map_size
    if maps is not None:
        maps += camera * map_size + (first_row % kept - first_row) * map_row_length  # to where row 0 would be

    l1_sum = tl.zeros([BLOCK], tl.float32)
    ssim_sum = tl.zeros([BLOCK], tl.float32)
    zero = tl.zeros([BLOCK, 2, 2], tl.float32)
    open1, open2, open3, open4, open5 = zero, zero, zero, zero, zero
    open6, open7, open8, open9, open10 = zero, zero, zero, zero, zero
    for i in range(0, tl.minimum(ROWS + 10, height - first_row)):
        row = first_row + i
        x_row = rendered + row * row_length + column
        y_row = target + row * row_length + column

        is_own = column < tl.where(row < first_row + ROWS, row_length, 0)  # the rows below are the next program's
        x = tl.load(x_row, mask=is_own, other=0.0)
        y = tl.load(y_row, mask=is_own, other=0.0)
        l1_sum += tl.abs(x - y)

        mu1 = tl.zeros([BLOCK], tl.float32)
        mu2 = tl.zeros([BLOCK], tl.float32)
        square = tl.zeros([BLOCK], tl.float32)
        cross = tl.zeros([BLOCK], tl.float32)
        for tap in tl.static_range(11):
            x = tl.load(x_row + 3 * tap, mask=in_map, other=0.0)
            y = tl.load(y_row + 3 * tap, mask=in_map, other=0.0)
            mu1 += x * _weight(tap)
            mu2 += y * _weight(tap)
            square += (x * x + y * y) * _weight(tap)
            cross += x * y * _weight(tap)

        moments, open1, open2, open3, open4, open5, open6, open7, open8, open9, open10 = _blur_down(
            tl.join(tl.join(mu1, square), tl.join(mu2, cross)),
            open1, open2, open3, open4, open5, open6, open7, open8, open9, open10,
        )  # fmt: skip
        mu1_square, mu2_cross = tl.split(moments)
        mu1, square = tl.split(mu1_square)
        mu2, cross = tl.split(mu2_cross)

        a = 2 * mu1 * mu2 + _C1
        b = 2 * (cross - mu1 * mu2) + _C2
        d = mu1 * mu1 + mu2 * mu2 + _C1
        e = square - mu1 * mu1 - mu2 * mu2 + _C2
        a_by_d = a / d
        inverse_e = 1 / e
        ssim = a_by_d * b * inverse_e
        is_complete = column < tl.where(row >= first_row + 10, map_row_length, 0)
        ssim_sum += tl.where(is_complete, ssim, 0.0)

        if maps is not None:
            by_square = -ssim * inverse_e
            by_cross = 2 * a_by_d * inverse_e
            by_mean = 2 * ((mu2 * (b - a) * inverse_e - mu1 * ssim) / d - mu1 * by_square)
            map_row = maps + (row - 10) * map_row_length + column
            tl.store(map_row, by_mean, mask=is_complete)
            tl.store(map_row + map_stride, by_square, mask=is_complete)
            tl.store(map_row + 2 * map_stride, by_cross, mask=is_complete)

    program = (camera * num_rows + program_row) * tl.num_programs(0) + tl.program_id(0)
    own = tl.sum(l1_weight * l1_sum + ssim_weight * ssim_sum)
    tl.store(partial_sums + program, tl.where(program == 0, own + constant, own))  # so nobody need add it to the sum


@triton.jit(do_not_specialize=["first"])
def _backward_kernel(
    rendered,  # [C, H, W, 3]
    target,  # [C, H, W, 3]
    maps,  # [3, C, kept, W-10, 3]
    gradient,  # [C, H, W, 3]
    height,
    row_length,  # 3 W
    first,  # row of programs
    kept,
    l1_weight,
    ssim_weight,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first_row = (first + tl.program_id(1)) * ROWS
    camera = tl.program_id(2).to(tl.int64)
    picture = camera * height * row_length
    map_row_length = row_length - 30
    map_size = kept * map_row_length
    map_stride = tl.num_programs(2).to(tl.int64) * map_size
    maps += camera * map_size + (first_row % kept - first_row) * map_row_length  # to where row 0 would be
    wrap = tl.where(first_row % kept == 0, kept, 0)  # what is more than that for the rows before this program's

    zero = tl.zeros([BLOCK, 2, 2], tl.float32)
    open1, open2, open3, open4, open5 = zero, zero, zero, zero, zero
    open6, open7, open8, open9, open10 = zero, zero, zero, zero, zero
    # A pixel gathers from the windows that begin up to 10 px above and to the left of it.
    for i in range(0, tl.minimum(ROWS + 10, height - first_row + 10)):
        row = first_row - 10 + i
        map_row = maps + (row + tl.where(i < 10, wrap, 0)) * map_row_length + column
        map_columns = tl.where((row >= 0) & (row < height - 10), map_row_length, 0)
        mean = tl.zeros([BLOCK], tl.float32)
        square = tl.zeros([BLOCK], tl.float32)
        cross = tl.zeros([BLOCK], tl.float32)
        for tap in tl.static_range(11):
            in_map = (column >= 3 * tap) & (column - 3 * tap < map_columns)
            mean += tl.load(map_row - 3 * tap, mask=in_map, other=0.0) * _weight(tap)
            square += tl.load(map_row - 3 * tap + map_stride, mask=in_map, other=0.0) * _weight(tap)
            cross += tl.load(map_row - 3 * tap + 2 * map_stride, mask=in_map, other=0.0) * _weight(tap)

        # join() makes pairs, so the third map goes in twice; the compiler drops the copy.
        blurred, open1, open2, open3, open4, open5, open6, open7, open8, open9, open10 = _blur_down(
            tl.join(tl.join(mean, square), tl.join(cross, cross)),
            open1, open2, open3, open4, open5, open6, open7, open8, open9, open10,
        )  # fmt: skip
        mean_square, cross_cross = tl.split(blurred)
        mean, square = tl.split(mean_square)
        cross, _ = tl.split(cross_cross)

        is_own = column < tl.where(row >= first_row, row_length, 0)
        pixel = picture + row * row_length + column
        x = tl.load(rendered + pixel, mask=is_own, other=0.0)
        y = tl.load(target + pixel, mask=is_own, other=0.0)
        sign = (x > y).to(tl.float32) - (x < y).to(tl.float32)
        total = ssim_weight * (mean + 2 * x * square + y * cross) + l1_weight * sign
        tl.store(gradient + pixel, total, mask=is_own)


@triton.jit
def _blur_down(row, open1, open2, open3, open4, open5, open6, open7, open8, open9, open10):
    """Add one row to the eleven windows it lies in; returns the finished one, then the ten left open."""
    return (
        open1 + row * _weight(10),
        open2 + row * _weight(9),
        open3 + row * _weight(8),
        open4 + row * _weight(7),
        open5 + row * _weight(6),
        open6 + row * _weight(5),
        open7 + row * _weight(4),
        open8 + row * _weight(3),
        open9 + row * _weight(2),
        open10 + row * _weight(1),
        row * _weight(0),
    )


@triton.jit
def _weight(tap: tl.constexpr):
    """Return the weight of one axis of the window, 0 <= tap < 11, folded into a constant by the compiler."""
    return _PEAK * _FALL ** ((tap - 5) * (tap - 5))
