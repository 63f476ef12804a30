"""The losses: pattern-aware (stage 1), tissue and microstructure (stage 2). Volumes are (B, 1, X, Y, Z)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SSIM_SIGMA, SSIM_RADIUS = 1.5, 5  # voxels
SSIM_C1, SSIM_C2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # for a data range of 2


def pattern_aware_loss(prediction: Tensor, target: Tensor, mask: Tensor, weight: float, kind: str = "l1") -> Tensor:
    """(B,) means over voxels of (1 + weight mask) |prediction - target| (arXiv 2511.04963), squared for kind "l2".

    mask: (B, 1, X, Y, Z), 1 inside the disease-related networks.
    """
    error = (prediction - target).abs()
    return ((1 + weight * mask) * (error if kind == "l1" else error.square())).mean(dim=(1, 2, 3, 4))


def tissue_loss(refined: Tensor, truth: Tensor, mask: Tensor, weight: float) -> Tensor:
    """Mean squared plus mean absolute error, weighted by (1 + weight mask) as in stage 1."""
    error = refined - truth
    return ((1 + weight * mask) * (error.square() + error.abs())).mean()


def projections(volume: Tensor) -> list[Tensor]:
    """The means of (B, 1, X, Y, Z) along each axis: (B, 1, Y, Z), (B, 1, X, Z), (B, 1, X, Y).

    They average the noise of a whole axis away, so that what differs is structure.
    """
    return [volume.mean(dim=axis) for axis in (2, 3, 4)]


def microstructure_loss(refined: Tensor, truth: Tensor) -> Tensor:
    """Distance of the three orthogonal mean projections: their values and their gradients, mean absolute error.

    The term that needs no pretrained weights; models/perceptual.py has the one that does.
    """
    loss = refined.new_zeros(())
    for difference in projections(refined - truth):  # (B, 1, two axes); the projection is linear
        loss = loss + difference.abs().mean() + sum(difference.diff(dim=along).abs().mean() for along in (2, 3))
    return loss / 3


def structure_loss(refined: Tensor, truth: Tensor) -> Tensor:
    """1 - SSIM (Wang et al. 2004; as a loss Zhao et al. 2017), as in utils/metrics.py: Gaussian window, range 2."""
    a, b = refined.float(), truth.float()
    maps = _smooth(torch.cat([a, b, a * a, b * b, a * b], dim=1))
    mean_a, mean_b, aa, bb, ab = maps.chunk(5, dim=1)
    var_a, var_b, cov = aa - mean_a**2, bb - mean_b**2, ab - mean_a * mean_b
    ssim = ((2 * mean_a * mean_b + SSIM_C1) * (2 * cov + SSIM_C2)
            / ((mean_a**2 + mean_b**2 + SSIM_C1) * (var_a + var_b + SSIM_C2)))
    return 1 - ssim.mean()


def _smooth(x: Tensor) -> Tensor:
    """Gaussian means of (B, C, X, Y, Z) where the whole window is inside: each axis loses 2 SSIM_RADIUS voxels."""
    places = torch.arange(-SSIM_RADIUS, SSIM_RADIUS + 1, device=x.device, dtype=x.dtype)
    weights = torch.exp(-0.5 * (places / SSIM_SIGMA) ** 2)
    weights = weights / weights.sum()
    for axis in (2, 3, 4):  # a banded matrix along each axis: on a CPU far faster than a convolution of few channels
        n = x.shape[axis]
        band = torch.stack([F.pad(weights, (k, n - len(weights) - k)) for k in range(n - len(weights) + 1)])
        x = torch.movedim(torch.movedim(x, axis, -1) @ band.T, -1, axis)
    return x


def x0_error(x0: Tensor, truth: Tensor) -> Tensor:
    """(B,) unweighted mean absolute error of an estimate of x0: comparable between settings."""
    return F.l1_loss(x0, truth, reduction="none").mean(dim=(1, 2, 3, 4))


def blend_weights(truth: Tensor, candidates: list[Tensor]) -> Tensor:
    """Least-squares weights (len(candidates) + 1,) of truth ~ sum of weight x candidate + constant, over all voxels."""
    columns = torch.stack([*(each.flatten() for each in candidates), truth.new_ones(truth.numel())], dim=1).double()
    normal = columns.T @ columns / len(columns) + 1e-6 * torch.eye(columns.shape[1]).to(columns)
    return torch.linalg.solve(normal, columns.T @ truth.flatten().double() / len(columns)).float()
