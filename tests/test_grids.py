"""Resampling, padding and cropping."""

import nibabel as nib
import numpy as np
import pytest
from nibabel.processing import resample_from_to

from data.grids import onto_grid, pad_crop, resample
from tests.conftest import AFFINE, ball


def test_resampling_keeps_the_field_of_view():
    x = np.linspace(-1, 1, 24)
    smooth = np.exp(-(x[:, None, None] ** 2 + x[None, :20, None] ** 2 + x[None, None, :16] ** 2)).astype(np.float32)
    coarse, affine = resample(smooth, AFFINE, (12, 13, 11))
    assert coarse.shape == (12, 13, 11)
    corner = np.array([-0.5, -0.5, -0.5, 1])
    np.testing.assert_allclose(affine @ corner, AFFINE @ corner)
    np.testing.assert_allclose(affine @ [11.5, 12.5, 10.5, 1], AFFINE @ [23.5, 19.5, 15.5, 1])
    assert np.abs(onto_grid(coarse, affine, smooth.shape, AFFINE, np.nan) - smooth).max() < 0.1  # up to its edges


@pytest.mark.parametrize("size", [(11, 9, 8), (4, 5, 5), (7, 6, 5), (4, 9, 5)])
def test_padding_and_cropping_keep_every_voxel_in_place(size):
    volume = ball(7, 6, 5)
    made, affine = pad_crop(volume, AFFINE, size)
    assert made.shape == size
    theirs = resample_from_to(nib.Nifti1Image(volume, AFFINE), (size, affine), order=0, cval=volume.min())
    np.testing.assert_array_equal(made, theirs.get_fdata().astype(np.float32))
    back = onto_grid(made, affine, volume.shape, AFFINE, outside=made.min())
    theirs = resample_from_to(nib.Nifti1Image(made, affine), (volume.shape, AFFINE), order=0, cval=made.min())
    np.testing.assert_allclose(back, theirs.get_fdata(), atol=1e-3)
