"""Mapping intensities to [-1, 1] and back."""

from pathlib import Path

import numpy as np
import pytest

from data.intensity import brain_region, normalise, scale, to_units
from data.problems import VolumeError
from opt import Options

CHOICES = Options.__dataclass_fields__["intensity"].metadata["choices"]


@pytest.mark.parametrize("intensity", CHOICES)
def test_constant_volume_is_refused_and_a_nearly_constant_one_uses_its_full_range(intensity):
    with pytest.raises(VolumeError, match="constant.nii: every voxel is 7"):
        normalise(np.full((5, 5, 5), 7.0), Path("constant.nii"), intensity)
    nearly = np.pad(np.full((1, 1, 1), 5, np.float32), 9)
    volume, low, high = normalise(nearly, Path("x"), intensity)
    assert (low, high) == (0, 5) and np.isfinite(volume).all()


def test_range_of_each_choice_there_and_back():
    head = np.pad(np.linspace(100, 200, 1000).reshape(10, 10, 10), 5)
    brain = {intensity: normalise(head, Path("x"), intensity)[1:] for intensity in CHOICES}
    assert brain["brain_minmax"] == (100, 200) and brain["brain_percentile"] == pytest.approx((100.1, 199.9))
    head[0, 0, 0] = 5000  # an outlier
    ends = {intensity: normalise(head, Path("x"), intensity)[1:] for intensity in CHOICES}
    assert ends["minmax"] == (0, 5000) and ends["percentile"][0] == 0 and 190 < ends["percentile"][1] < 201
    volume, low, high = normalise(head, Path("x"))
    assert volume.min() == -1 and volume.max() == 1
    np.testing.assert_allclose(to_units(scale(np.array([130.0]), low, high), low, high), [130.0], rtol=1e-5)


def test_brain_region_is_one_component_without_holes():
    volume = np.full((20, 20, 20), -1.0)
    volume[4:16, 4:16, 4:16], volume[9:11, 9:11, 9:11], volume[0, 0, 0] = 0.5, -1, 1
    region = brain_region(volume)
    assert region.sum() == 12**3 and not region[0, 0, 0]
