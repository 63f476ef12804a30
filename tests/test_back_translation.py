"""training/back_translation.py: synthetic sources have the texture of real ones."""

from types import SimpleNamespace

import pytest
import torch

from data.study import read_study
from tests.conftest import SIZES
from tests.test_study import options
from training.back_translation import BODY, error_spectra, texture, with_texture


def test_texture_has_the_spectrum_of_the_priors_errors_and_depends_on_its_key_alone(study_csv, tmp_path):
    study = read_study(options(study_csv, tmp_path))
    random, errors = torch.Generator().manual_seed(0), {}

    def expected(target: str, source: torch.Tensor) -> torch.Tensor:
        """The truth, but for an error that is the same in neighbouring slices."""
        i = next(i for i in study.roles["train"] for other in SIZES
                 if other != target and torch.equal(study.volumes([i])[other], source))
        error = 0.2 * torch.randn(1, 1, *SIZES[target], generator=random)
        error = error + error.roll(1, dims=4)
        errors.setdefault(target, []).append(error / (study.volumes([i])[target] > BODY).float().mean().sqrt())
        return study.volumes([i])[target] - error

    prior = SimpleNamespace(expected=expected, network=SimpleNamespace(directions=[("fmri", "dmri"), ("dmri", "fmri")]))
    spectra = error_spectra(prior, study)
    for modality, size in SIZES.items():
        made = texture(spectra[modality], size, *((0, 9, step) for step in range(40)))
        wanted, found = (each.square().mean().item() for each in (torch.cat(errors[modality]), made))
        assert made.shape == (40, 1, *size) and found == pytest.approx(wanted, rel=0.1)
        neighbours = (made * made.roll(1, dims=4)).mean().item() / found
        assert neighbours == pytest.approx(0.5, abs=0.06) and abs((made * made.roll(1, dims=2)).mean().item()) < 0.05
        torch.testing.assert_close(texture(spectra[modality], size, (0, 9, 7)), made[7:8])  # but for the last bits


def test_background_gets_no_texture_and_nothing_leaves_the_range():
    made = torch.tensor([-1.0, -0.97, 0.0, 0.9]).view(1, 1, 4, 1, 1)
    assert torch.allclose(with_texture(made, torch.full_like(made, 0.5)).flatten(), torch.tensor([-1, -0.97, 0.5, 1]))
