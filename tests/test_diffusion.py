"""The diffusion process against diffusers, and its own properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from models.diffusion import Diffusion, Purpose, cosine_alpha_bar, keyed_generator, keyed_noise, training_timesteps

T = 1000
THEIRS = dict(num_train_timesteps=T, beta_schedule="squaredcos_cap_v2", clip_sample=True, clip_sample_range=1.0)
SIZES = {"fmri": (5, 4, 3), "dmri": (6, 5, 4)}


def test_cosine_schedule_is_that_of_diffusers():
    """diffusers counts the noisy timesteps from 0; alpha_bar_T is about 2e-9."""
    ours = cosine_alpha_bar(T)
    np.testing.assert_allclose(ours[1:], DDPMScheduler(**THEIRS).alphas_cumprod, rtol=2e-3, atol=1e-6)
    assert ours[0] == 1 and 1e-9 < ours[-1] < 4e-9 and (ours.diff() < 0).all()


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_steps_are_those_of_diffusers(prediction, steps, eta):
    """Same alphas, timesteps and model outputs give the same xt."""
    diffusion = Diffusion(T, prediction)
    theirs = DDIMScheduler(**THEIRS, prediction_type="epsilon" if prediction == "epsilon" else "v_prediction",
                           set_alpha_to_one=True)
    theirs.alphas_cumprod = diffusion.alpha_bar[1:].clone()
    theirs.num_inference_steps = steps
    x = torch.randn(2, 1, *SIZES["fmri"], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    stride = T // steps
    for now in range(T, 0, -stride):
        output = torch.randn(x.shape, generator=generator, dtype=torch.float64) * 0.1 + 0.3 * x
        fresh = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        t, t_next = torch.tensor([now, now]), torch.tensor([now - stride] * 2)
        x0 = diffusion.x0(x, output, t)
        mine = diffusion.ddim_step(x, x0, t, t_next, eta, fresh)
        expected = theirs.step(output, now - 1, x, eta=eta, use_clipped_model_output=True,
                               variance_noise=fresh if eta else None).prev_sample
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
        x = expected


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_the_true_output_gives_back_x0(prediction):
    diffusion = Diffusion(T, prediction)
    generator = keyed_generator(3)
    x0 = torch.rand(4, 1, 5, 4, 3, generator=generator) * 2 - 1
    noise, t = torch.randn(x0.shape, generator=generator), torch.tensor([1, 100, 500, 900])
    xt = diffusion.noisy(x0, noise, t)
    torch.testing.assert_close(diffusion.x0(xt, diffusion.target(x0, noise, t), t), x0, atol=2e-4, rtol=0)


def test_noising_has_unit_variance_and_keeps_clean_volumes():
    diffusion = Diffusion(T, "v")
    x0, noise = torch.randn(3, 1, 20, 20, 20), torch.randn(3, 1, 20, 20, 20)
    xt = diffusion.noisy(x0, noise, torch.tensor([0, 400, T]))
    assert torch.equal(xt[0], x0[0])
    torch.testing.assert_close(xt.var(dim=(1, 2, 3, 4)), torch.ones(3), atol=0.06, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 300, 999, T])
def test_spacing_ends_at_0_and_never_skips(steps):
    times = Diffusion(T, "v").spacing(steps)
    assert times[0] == T and times[-1] == 0 and len(times) == steps + 1
    assert all(a > b for a, b in zip(times[:-1], times[1:]))


def exact(x0):
    """A network that knows the answer, as v; it also checks what it is given."""
    diffusion = Diffusion(T, "v")

    def network(xt, t, wanted):
        outputs = {}
        for name in wanted:
            signal, sigma = diffusion.weights(t[name])
            outputs[name] = (signal * xt[name] - x0[name]) / sigma
        return outputs
    return diffusion, network


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sampling_with_the_exact_network_gives_the_volume(eta):
    x0 = {name: torch.rand(2, 1, *size) * 2 - 1 for name, size in SIZES.items()}
    diffusion, network = exact(x0)
    keys = [(7, 1), (7, 2)]
    made = diffusion.sample(network, keyed_noise(SIZES, *keys), 10, eta=eta, keys=keys)
    for name in SIZES:
        torch.testing.assert_close(made[name], x0[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("coupling", ["independent", "shared"])
def test_a_given_modality_is_seen_as_its_coupling_says(coupling):
    x0 = {name: torch.rand(2, 1, *size) * 2 - 1 for name, size in SIZES.items()}
    diffusion, network = exact(x0)
    noise, seen = keyed_noise(SIZES, (1,), (2,)), []

    def watched(xt, t, wanted):
        seen.append((xt["fmri"].clone(), t["fmri"].clone(), t["dmri"].clone()))
        assert set(wanted) == {"dmri"}
        return network(xt, t, wanted)

    made = diffusion.sample(watched, noise, 5, given={"fmri": x0["fmri"]}, coupling=coupling)
    assert torch.equal(made["fmri"], x0["fmri"])
    for xt, t, other in seen:
        if coupling == "independent":
            assert torch.equal(xt, x0["fmri"]) and (t == 0).all() and (other > 0).all()
        else:
            assert torch.equal(t, other)
            torch.testing.assert_close(xt, diffusion.noisy(x0["fmri"], noise["fmri"], t))


def test_noise_depends_on_its_key_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    together = keyed_noise(SIZES, (0, Purpose.PICTURES, 4), (0, Purpose.PICTURES, 9))
    alone = keyed_noise(SIZES, (0, Purpose.PICTURES, 9))
    assert torch.equal(together["dmri"][1:], alone["dmri"])
    assert not torch.equal(alone["dmri"], keyed_noise(SIZES, (0, Purpose.COARSE, 9))["dmri"])
    assert torch.equal(torch.get_rng_state(), state)


def test_training_timesteps():
    keys = [(0, Purpose.TIMESTEPS, n) for n in range(4000)]
    shared = training_timesteps("shared", T, ("fmri", "dmri"), keys)
    assert torch.equal(shared["fmri"], shared["dmri"]) and shared["fmri"].min() >= 1 and shared["fmri"].max() <= T
    own = training_timesteps("independent", T, ("fmri", "dmri"), keys)
    for name in own:
        assert 0.22 < (own[name] == 0).float().mean() < 0.28  # given in a quarter of the draws
    assert not ((own["fmri"] == 0) & (own["dmri"] == 0)).any()
    noisy = (own["fmri"] > 0) & (own["dmri"] > 0)
    assert abs(np.corrcoef(own["fmri"][noisy], own["dmri"][noisy])[0, 1]) < 0.06
