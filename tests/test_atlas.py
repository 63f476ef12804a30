"""Masks of brain networks, and of the labels of the user's own image."""

import numpy as np
import pytest

from data.atlas import LabelImage, pattern_mask, roi_centres
from tests.conftest import save
from utils.errors import UserError


def test_rois_of_dosenbach():
    counts = {"cingulo-opercular": 32, "default": 34, "fronto-parietal": 21, "occipital": 22, "sensorimotor": 33,
              "cerebellum": 18}
    assert {network: len(roi_centres((network,))) for network in counts} == counts and roi_centres(()).shape == (0, 3)
    assert roi_centres(tuple(counts)).shape == (160, 3) and [6, 64, 3] in roi_centres(("default",)).tolist()
    with pytest.raises(UserError, match="opt.pattern_networks names visual; choose from cerebellum, "):
        roi_centres(("visual",))


def test_masks_are_spheres_at_the_coordinates_and_none_vanishes_on_a_coarse_grid():
    affine = np.array([[-2.0, 0, 0, 90], [0, 2.0, 0, -126], [0, 0, 2.0, -72], [0, 0, 0, 1]])
    centres = np.array([[10.0, 20, 30], [-40, -50, 10]])
    mask = pattern_mask((91, 109, 91), affine, centres, 5.0)
    voxels = np.argwhere(mask) @ affine[:3, :3].T + affine[:3, 3]
    distance = np.linalg.norm(voxels[:, None] - centres, axis=-1)
    assert distance.min(axis=1).max() <= 5.0
    assert mask.sum() == 2 * 81  # points of a lattice within 2.5 steps of one of them
    assert pattern_mask((8, 8, 8), np.diag([12.0, 12, 12, 1]), np.array([[30.0, 30, 30], [500, 0, 0]]), 1.0).sum() == 1


def test_label_image_on_a_grid_of_other_spacing_and_orientation(tmp_path):
    labels = np.zeros((40, 40, 40), np.int16)
    labels[10:20, 12:24, 8:28], labels[30:, :, :] = 3, 7
    path = save(tmp_path / "labels.nii.gz", labels, np.diag([2.0, 2, 2, 1]))
    affine = np.array([[-5.0, 0, 0, 77.5], [0, 4.0, 0, 1], [0, 0, 10.0, 4], [0, 0, 0, 1]])
    mask = LabelImage(path).mask((3,), (16, 20, 8), affine)
    places = np.argwhere(mask) @ affine[:3, :3].T + affine[:3, 3]
    assert (places >= [19, 23, 15]).all() and (places <= [39, 47, 55]).all()  # the box: -1 .. +1 mm around its voxels
    assert mask.sum() * 5 * 4 * 10 == pytest.approx(20 * 24 * 40, rel=0.15)
    assert LabelImage(path).mask((), (16, 20, 8), affine).sum() > mask.sum() and LabelImage(path).labels == {3, 7}
