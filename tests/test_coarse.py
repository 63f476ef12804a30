"""Coarse volumes: joint samples are drawn once and checked. Stopped and resumed: test_recovery.py."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from models.diffusion import Diffusion, name_key
from tests.conftest import SIZES
from training.coarse import CoarseVolumes
from utils.errors import UserError
from utils.stop import Interrupted, stop

NAMES = ["sub-01", "sub-02", "sub-03"]
OPT = {"coarse": "joint", "sampler": "dpmpp", "sampling_steps": 3, "eta": 0.0, "seed": 0, "batch_size": 2}


class FakePrior:
    """Records its calls; a sample is the position of its pair, and the expected volume twice the source."""

    diffusion, coupling, dtype = Diffusion(1000, "v"), "independent", torch.float32
    network = SimpleNamespace(source={"fmri": "dmri", "dmri": "fmri"}.get, net=lambda target: SimpleNamespace(
        mean=torch.full((2, 1, *SIZES[target]), 9.0)))

    def __init__(self):
        self.calls = []

    def sample(self, keys, sampling):
        numbers = [list(map(name_key, NAMES)).index(key) for _, _, key, _ in keys]
        self.calls.append(numbers)
        values = torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1, 1, 1)
        return {modality: values.expand(-1, 1, *size) for modality, size in SIZES.items()}

    def expected(self, target, source):
        return torch.full((len(source), 1, *SIZES[target]), 2 * source.mean())


@pytest.fixture
def prepare(tmp_path):
    """(changed settings) -> coarse volumes of three subjects, sampled two at once."""
    def build(**changes):
        volumes = CoarseVolumes(SimpleNamespace(cache_dir=tmp_path, **{**OPT, **changes}), study, FakePrior(), "hash")
        volumes.prepare()
        return volumes

    study = SimpleNamespace(
        pairs=[SimpleNamespace(name=name, is_complete=name in NAMES) for name in (*NAMES, "one scan")], sizes=SIZES,
        modalities=tuple(SIZES), identity={"data": ""},
        volumes=lambda members: {modality: torch.full((len(members), 1, *size), 0.25)
                                 for modality, size in SIZES.items()})
    return build


def test_joint_samples_are_drawn_once_and_belong_to_their_settings(prepare):
    first, again = prepare(), prepare()
    assert first.prior.calls == [[0, 1], [2]] and not again.prior.calls and len(list(first.folder.iterdir())) == 6
    found = again.volumes("dmri", [2, 0])
    assert found.shape == (2, 1, *SIZES["dmri"]) and found[:, 0, 0, 0, 0].tolist() == [2, 0]
    assert len({volumes.folder for volumes in (first, again, prepare(seed=1), prepare(sampling_steps=4))}) == 3


def test_expected_and_mean_volumes_need_no_sample(prepare):
    expected, none = prepare(coarse="expected"), prepare(coarse="none")
    assert not expected.prior.calls and not none.prior.calls and not none.folder.exists()
    assert expected.volumes("fmri", [0]).eq(0.5).all() and none.volumes("fmri", [0, 2]).eq(9).all()


@pytest.mark.parametrize("content", [np.full(SIZES["dmri"], np.nan, np.float32), np.zeros((2, 3, 4), np.float32),
                                     b"no array"], ids=["nan", "shape", "text"])
def test_an_unusable_file_is_sampled_again(prepare, content):
    path = prepare().folder / "sub-02_dmri.npy"
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
    again = prepare()
    assert again.prior.calls == [[0, 1]] and again.volumes("dmri", [1]).mean() == 1
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="sub-02_dmri.npy.*opt.cache_dir"):
        prepare()


def test_a_stop_keeps_what_was_drawn(prepare, monkeypatch):
    volumes, sample = prepare(coarse="none"), FakePrior.sample
    volumes.opt.coarse = "joint"
    with monkeypatch.context() as patch:
        patch.setattr(stop, "reason", "")
        patch.setattr(FakePrior, "sample", lambda *given: patch.setattr(stop, "reason", "test") or sample(*given))
        with pytest.raises(Interrupted):
            volumes.prepare()
    assert volumes.prior.calls == [[0, 1]] and prepare().prior.calls == [[2]]
