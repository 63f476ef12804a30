"""Group normalisation and SiLU of large volumes on a GPU, in two passes over them, and two more in the gradient.

PyTorch's leave the channels-last layout of the convolutions and the 16 bits of autocast, and come back (docs/speed.md
has what that costs). In Triton, which comes with PyTorch on Linux.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # values that a program of the GPU holds at a time
PROGRAMS = 1024  # per volume, at most


@triton.jit
def first_place(S, C, VOXELS: tl.constexpr):
    """Where the program's VOXELS voxels begin in (B, S, C)."""
    return (tl.program_id(1).to(tl.int64) * S + tl.program_id(0) * VOXELS) * C


@triton.jit
def tile(start, S, C, VOXELS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Places of ROWS voxels from `start` on, of the program's, all channels, and which of them exist. WIDTH: a power of
    2 from C on."""
    rows, channels = start + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    exist = (tl.program_id(0) * VOXELS + rows < S)[:, None] & (channels < C)[None, :]
    return rows[:, None] * C + channels[None, :], exist


@triton.jit
def of_channels(pointer, C, WIDTH: tl.constexpr):
    """This volume's row of (B, C), as (1, WIDTH)."""
    channels = tl.arange(0, WIDTH)
    return tl.load(pointer + tl.program_id(1) * C + channels, mask=channels < C, other=0.0)[None, :]


@triton.jit
def silu_gradient(z):
    sigmoid = tl.sigmoid(z)
    return sigmoid * (1 + z * (1 - sigmoid))


@triton.jit
def sum_kernel(x, gradient, scale, shift, sums, S, C,
               BACKWARD: tl.constexpr, VOXELS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """sums (B, programs, 2, C): of y and of y x over the program's voxels, where y is x, or in the backward pass the
    gradient of the normalised volume, scale x + shift."""
    first, second = tl.zeros([WIDTH], tl.float32), tl.zeros([WIDTH], tl.float32)
    x += first_place(S, C, VOXELS)
    if BACKWARD:
        gradient += first_place(S, C, VOXELS)
        scale, shift = of_channels(scale, C, WIDTH), of_channels(shift, C, WIDTH)
    for start in range(0, VOXELS, ROWS):
        places, exist = tile(start, S, C, VOXELS, ROWS, WIDTH)
        values = tl.load(x + places, mask=exist, other=0.0).to(tl.float32)
        y = values
        if BACKWARD:
            y = tl.load(gradient + places, mask=exist, other=0.0).to(tl.float32) * silu_gradient(values * scale + shift)
        first += tl.sum(y, axis=0)
        second += tl.sum(y * values, axis=0)
    channels = tl.arange(0, WIDTH)
    sums += (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * 2 * C + channels
    tl.store(sums, first, mask=channels < C)
    tl.store(sums + C, second, mask=channels < C)


@triton.jit
def map_kernel(x, gradient, scale, shift, slope, offset, out, S, C,
               BACKWARD: tl.constexpr, VOXELS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """out = SiLU(scale x + shift), or in the backward pass the gradient of x, with one coefficient per channel."""
    x += first_place(S, C, VOXELS)
    out += first_place(S, C, VOXELS)
    scale, shift = of_channels(scale, C, WIDTH), of_channels(shift, C, WIDTH)
    if BACKWARD:
        gradient += first_place(S, C, VOXELS)
        slope, offset = of_channels(slope, C, WIDTH), of_channels(offset, C, WIDTH)
    for start in range(0, VOXELS, ROWS):
        places, exist = tile(start, S, C, VOXELS, ROWS, WIDTH)
        values = tl.load(x + places, mask=exist, other=0.0).to(tl.float32)
        z = values * scale + shift
        if BACKWARD:
            y = tl.load(gradient + places, mask=exist, other=0.0).to(tl.float32) * silu_gradient(z) * scale
            y += values * slope + offset
        else:
            y = z * tl.sigmoid(z)
        tl.store(out + places, y.to(out.dtype.element_ty), mask=exist)


class NormSiLU(torch.autograd.Function):
    """SiLU of the group-normalised (B, C, X, Y, Z), in the dtype of x and channels-last; computed in float32.

    The norm is a scale and a shift per channel, which follow from the sums of x and x^2; so is the norm's part of the
    gradient, from those of the gradient and of its product with x.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last_3d)
        count = x[0].numel() // groups  # values of a group
        means = sums(x, groups).sum(dim=3, keepdim=True) / count
        mean, square = means.unbind(dim=1)  # (B, groups, 1)
        inverse = (square - mean.square()).clamp(min=0).add(eps).rsqrt()
        scale = weight.view(1, groups, -1) * inverse  # (B, groups, C / groups)
        shift = bias.view(1, groups, -1) - mean * scale
        ctx.save_for_backward(x, weight, mean, inverse, scale, shift)
        return map_voxels(x, scale, shift)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        x, weight, mean, inverse, scale, shift = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last_3d)
        groups, count = mean.shape[1], x[0].numel() // mean.shape[1]
        both = sums(x, groups, gradient, scale, shift)
        of_shift, of_scale = (both * weight.view(1, 1, groups, -1)).sum(dim=3, keepdim=True).unbind(dim=1)
        slope = (of_shift * mean - of_scale) * inverse**3 / count
        offset = -slope * mean - of_shift * inverse / count
        of_x = map_voxels(x, scale, shift, gradient, *(each.expand_as(scale).contiguous() for each in (slope, offset)))
        of_bias, of_weight = both.unbind(dim=1)
        of_weight = (of_weight - mean * of_bias) * inverse
        return of_x, of_weight.sum(dim=0).flatten(), of_bias.sum(dim=0).flatten(), None, None


def sums(x: Tensor, groups: int, gradient: Tensor | None = None, scale: Tensor | None = None,
         shift: Tensor | None = None) -> Tensor:
    """The two sums of `sum_kernel` over all voxels: (B, 2, groups, C / groups)."""
    grid, sizes = grid_of(x)
    parts = x.new_empty(len(x), grid[0], 2, x.shape[1], dtype=torch.float32)
    sum_kernel[grid](x, gradient, scale, shift, parts, BACKWARD=gradient is not None, **sizes)
    return parts.sum(dim=1).view(len(x), 2, groups, -1)


def map_voxels(x: Tensor, scale: Tensor, shift: Tensor, gradient: Tensor | None = None, slope: Tensor | None = None,
               offset: Tensor | None = None) -> Tensor:
    """The volume that `map_kernel` computes, like x."""
    grid, sizes = grid_of(x)
    out = torch.empty_like(x)
    map_kernel[grid](x, gradient, scale, shift, slope, offset, out, BACKWARD=gradient is not None, **sizes)
    return out


def grid_of(x: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """(programs, volumes), and the sizes that both kernels need."""
    C, S = x.shape[1], x[0, 0].numel()
    width = triton.next_power_of_2(C)
    rows = max(1, TILE // width)
    voxels = triton.next_power_of_2(triton.cdiv(S, rows * PROGRAMS)) * rows  # of a program; each number is compiled
    return (triton.cdiv(S, voxels), len(x)), {"S": S, "C": C, "VOXELS": voxels, "ROWS": rows, "WIDTH": width}
