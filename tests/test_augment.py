"""Augmentation: both modalities of a pair and their masks move alike."""

import pytest
import torch

from data.augment import PairTransform
from tests.conftest import BOTH

EXTENT = torch.tensor([160.0, 200.0, 120.0])


def transform(*kinds: str, keys=(0, 1, 2, 3)) -> PairTransform:
    return PairTransform(kinds, BOTH, EXTENT, [torch.Generator().manual_seed(key) for key in keys])


def coordinates(size: tuple[int, int, int]) -> torch.Tensor:
    """(X, Y, Z, 3) mm from the centre of the field of view."""
    axes = [(torch.arange(n) + 0.5) / n * extent - extent / 2 for n, extent in zip(size, EXTENT)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def centroid(volume: torch.Tensor) -> torch.Tensor:
    """(4, 3) mm of volumes (4, 1, X, Y, Z) that are -1 outside."""
    weight = volume[:, 0] + 1
    return (weight[..., None] * coordinates(volume.shape[2:])).sum((1, 2, 3)) / weight.sum((1, 2, 3))[:, None]


@pytest.mark.parametrize("kinds", [("flip",), ("affine",), ("intensity",), ("flip", "affine", "intensity")])
def test_both_modalities_and_the_mask_move_alike_in_mm(kinds):
    centre, change, moved = torch.tensor([30.0, -20.0, 10.0]), transform(*kinds), {}
    for modality, size in (("fmri", (32, 32, 18)), ("dmri", (48, 60, 30))):
        ball = 2 * torch.exp(-((coordinates(size) - centre) ** 2).sum(-1) / 800) - 1
        moved[modality] = centroid(change.volume(modality, ball.expand(4, 1, *size)))
    mask = centroid(change.mask((ball > 0).float().expand(4, 1, *size)) * 2 - 1)
    torch.testing.assert_close(moved["fmri"], moved["dmri"], atol=1.5, rtol=0)
    torch.testing.assert_close(mask, moved["dmri"], atol=2.5, rtol=0)
    distance = (moved["dmri"] - centre).norm(dim=1)
    assert (distance.max() > 2) == (kinds != ("intensity",)) and distance.max() < 75


def test_each_kind_changes_what_it_names_and_nothing_else():
    volume = torch.rand(4, 1, 6, 5, 4) * 2 - 1
    flipped = transform("flip").volume("fmri", volume)
    ways = [torch.equal(a, b.flip(1)) - torch.equal(a, b) for a, b in zip(flipped, volume)]
    assert set(ways) == {1, -1}  # exactly mirrored along x, or exactly unchanged
    changed = transform("intensity").volume("fmri", volume)
    assert not torch.equal(changed, volume) and torch.equal(changed.argsort(2), volume.argsort(2))
    ends = torch.tensor([-1.0, 1.0]).view(1, 1, 2, 1, 1).expand(4, 1, 2, 1, 1)
    torch.testing.assert_close(transform("intensity").volume("fmri", ends), ends)
    assert torch.equal(transform().volume("fmri", volume), volume)
    mask = (volume > 0).float()
    assert set(transform("affine").mask(mask).unique().tolist()) == {0, 1}
    assert torch.equal(transform("intensity").mask(mask), mask)


def test_transform_of_a_pair_depends_on_its_key_alone():
    volume = torch.rand(4, 1, 8, 8, 8)
    together = transform("flip", "affine", keys=(5, 6, 7, 8)).volume("dmri", volume)
    torch.testing.assert_close(together[2:3], transform("flip", "affine", keys=(7,)).volume("dmri", volume[2:3]))
