"""The losses: pattern-aware (stage 1), tissue and microstructure (stage 2). Volumes are (B, 1, X, Y, Z)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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


def x0_error(x0: Tensor, truth: Tensor) -> Tensor:
    """(B,) unweighted mean absolute error of an estimate of x0: comparable between settings."""
    return F.l1_loss(x0, truth, reduction="none").mean(dim=(1, 2, 3, 4))


def blend_weights(truth: Tensor, candidates: list[Tensor]) -> Tensor:
    """Least-squares weights (len(candidates) + 1,) of truth ~ sum of weight x candidate + constant, over all voxels."""
    columns = torch.stack([*(each.flatten() for each in candidates), truth.new_ones(truth.numel())], dim=1).double()
    normal = columns.T @ columns / len(columns) + 1e-6 * torch.eye(columns.shape[1]).to(columns)
    return torch.linalg.solve(normal, columns.T @ truth.flatten().double() / len(columns)).float()
