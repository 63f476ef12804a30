"""The diffusion process: schedule, noising, targets, keyed noise, training timesteps."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from models.diffusion import (
    EXPECTED_FRACTION,
    GIVEN_FRACTION,
    Diffusion,
    Purpose,
    cosine_alpha_bar,
    keyed_noise,
    training_timesteps,
)

T = 1000


def test_the_cosine_schedule_is_that_of_diffusers():
    """diffusers counts the noisy timesteps from 0; alpha_bar_T is about 2e-9."""
    ours, theirs = cosine_alpha_bar(T), DDPMScheduler(T, beta_schedule="squaredcos_cap_v2").alphas_cumprod
    np.testing.assert_allclose(ours[1:], theirs, rtol=2e-3, atol=1e-6)
    assert ours[0] == 1 and 1e-9 < ours[-1] < 4e-9 and (ours.diff() < 0).all()


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_the_true_output_gives_back_x0_and_noise_has_unit_variance(prediction):
    diffusion, t = Diffusion(T, prediction), torch.tensor([0, 1, 100, 500, 900])
    x0, noise = torch.randn(2, 5, 1, 20, 20, 20)
    xt, output = diffusion.add_noise(x0, noise, t), diffusion.target(x0, noise, t)
    torch.testing.assert_close(diffusion.to_x0(xt, output, t, clip=False), x0, atol=2e-4, rtol=0)
    torch.testing.assert_close(diffusion.to_x0(xt, output, t), x0.clamp(-1, 1), atol=2e-4, rtol=0)
    torch.testing.assert_close(xt.var(dim=(1, 2, 3, 4)), torch.ones(5), atol=0.06, rtol=0)
    assert torch.equal(xt[0], x0[0])  # t = 0 is clean


def test_noise_depends_on_its_key_alone():
    sizes, state = {"fmri": (5, 4, 3), "dmri": (6, 5, 4)}, torch.get_rng_state()
    together = keyed_noise(sizes, (0, Purpose.PICTURES, 4), (0, Purpose.PICTURES, 9))
    alone = keyed_noise(sizes, (0, Purpose.PICTURES, 9))
    assert torch.equal(together["dmri"][1:], alone["dmri"])
    assert not torch.equal(alone["dmri"], keyed_noise(sizes, (0, Purpose.COARSE, 9))["dmri"])
    assert torch.equal(torch.get_rng_state(), state)


def test_training_timesteps_of_both_couplings():
    keys = [(0, Purpose.TIMESTEPS, n) for n in range(4000)]
    source, target = training_timesteps("shared", T, keys)
    assert torch.equal(source, target) and source.min() >= 1 and source.max() <= T
    source, target = training_timesteps("independent", T, keys)
    given, times = source == 0, target[source == 0]
    assert given.float().mean().item() == pytest.approx(GIVEN_FRACTION, abs=0.025) and target.min() >= 1
    assert (times == T).float().mean().item() == pytest.approx(EXPECTED_FRACTION, abs=0.03)
    assert 0.64 < (times[times < T] / T).mean() < 0.70  # of the larger of two uniform draws: 2 / 3
    assert abs(np.corrcoef(source[~given], target[~given])[0, 1]) < 0.06
