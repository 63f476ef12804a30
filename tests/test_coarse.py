"""Coarse volumes: sampled once, checked, and varied in training. Stopped and resumed: test_recovery.py."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from models.diffusion import Diffusion, name_key
from tests.conftest import SIZES
from training import coarse
from training.coarse import CoarseVolumes
from utils.errors import UserError

NAMES = ["sub-01", "sub-02", "sub-03"]
OPT = {"coarse": "given", "coarse_samples": 2, "coarse_dropout": 0.25, "sampler": "dpmpp", "sampling_steps": 3,
       "eta": 0.0, "seed": 0}


class FakePrior:
    """Records its calls; the samples are the position of the pair plus a tenth of the sample's number."""

    diffusion, coupling, dtype = Diffusion(1000, "v"), "independent", torch.float32

    def __init__(self):
        self.calls = []

    def sample(self, keys, sampling, given):
        numbers = [(list(map(name_key, NAMES)).index(key), k) for _, _, key, k in keys]
        self.calls.append((set(given), numbers))
        values = torch.tensor([i + 0.1 * k for i, k in numbers]).view(-1, 1, 1, 1, 1)
        return {modality: values.expand(-1, 1, *size) for modality, size in SIZES.items()}


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """(changed settings) -> coarse volumes of three subjects, sampled two at once."""
    def build(**changes):
        volumes = CoarseVolumes(SimpleNamespace(cache_dir=tmp_path, **{**OPT, **changes}), study, FakePrior(), "hash")
        volumes.prepare()
        return volumes

    monkeypatch.setattr(coarse, "BATCH", 2)
    study = SimpleNamespace(
        pairs=[SimpleNamespace(name=name) for name in NAMES], sizes=SIZES, modalities=tuple(SIZES), fingerprint="",
        mean_volumes=lambda: {modality: torch.full((1, 1, *size), 9.0) for modality, size in SIZES.items()},
        volumes=lambda positions: {modality: torch.zeros(len(positions), 1, *size) for modality, size in SIZES.items()})
    return build


def test_samples_are_drawn_once_and_belong_to_their_settings(prepare):
    first, again, more = prepare(), prepare(), prepare(coarse_samples=3)
    assert first.prior.calls[:2] == [({"dmri"}, [(0, 0), (1, 0)]), ({"dmri"}, [(2, 0)])] and len(first.prior.calls) == 8
    assert not again.prior.calls and [k for _, jobs in more.prior.calls for _, k in jobs] == [2] * 6
    found = again.volumes("dmri", [2, 0])
    assert found.shape == (2, 1, *SIZES["dmri"])
    torch.testing.assert_close(found[:, 0, 0, 0, 0], torch.tensor([2.05, 0.05]))
    torch.testing.assert_close(again.volumes("fmri", [1], [[1]]).mean(), torch.tensor(1.1))
    assert len({volumes.folder for volumes in (first, again, prepare(seed=1), prepare(sampling_steps=4))}) == 3


def test_joint_samples_serve_both_targets_and_none_needs_no_sample(prepare):
    joint, none = prepare(coarse="joint", coarse_samples=1), prepare(coarse="none")
    assert joint.prior.calls == [(set(), [(0, 0), (1, 0)]), (set(), [(2, 0)])] and not none.prior.calls
    assert len(list(joint.folder.iterdir())) == 6 and none.volumes("fmri", [0, 2]).eq(9).all()


@pytest.mark.parametrize("content", [np.full(SIZES["dmri"], np.nan, np.float32), np.zeros((2, 3, 4), np.float32),
                                     b"no array"], ids=["nan", "shape", "text"])
def test_an_unusable_file_is_sampled_again(prepare, content):
    path = prepare().folder / "sub-02_dmri_0.npy"
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
    again = prepare()
    assert again.prior.calls == [({"fmri"}, [(0, 0), (1, 0)])] and again.volumes("dmri", [1], [[0]]).mean() == 1
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="sub-02_dmri_0.npy.*opt.cache_dir"):
        prepare()


def test_training_averages_random_subsets_and_sometimes_drops_them(prepare):
    volumes, values = prepare(coarse_samples=3), []
    for step in range(80):
        both = volumes.varied("dmri", [1, 2], step, [0, 1]).mean(dim=(1, 2, 3, 4))
        assert torch.equal(volumes.varied("dmri", [2], step, [1]).mean(dim=(1, 2, 3, 4)), both[1:])  # keyed by place
        values += [round(float(value), 3) for value in both]
    assert any(len(set(volumes.varied("dmri", [1, 1], step, [0, 1])[:, 0, 0, 0, 0].tolist())) > 1 for step in range(5))
    assert 0.15 < np.mean([value == 9 for value in values]) < 0.35  # the mean training volume
    assert {1.0, 1.05, 1.1, 1.15, 1.2, 2.0, 2.1, 2.2} <= set(values)  # means of one, two or three of 0, 0.1 and 0.2
