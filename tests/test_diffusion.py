"""The diffusion process against diffusers, and its own properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from models.diffusion import Diffusion, Purpose, cosine_alpha_bar, keyed_generator, keyed_noise, training_timesteps
from models.samplers import SAMPLERS, ddim_step, dpmpp_step, sample, spacing

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
        x0 = diffusion.x0(x, output, torch.tensor([now, now]))
        mine = ddim_step(diffusion, x, x0, now, now - stride, eta, fresh)
        expected = theirs.step(output, now - 1, x, eta=eta, use_clipped_model_output=True,
                               variance_noise=fresh if eta else None).prev_sample
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
        x = expected


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("steps", [2, 12, 20])
def test_dpmpp_steps_are_those_of_diffusers(prediction, steps):
    """Same alphas, timesteps and model outputs give the same xt, with our spacing of the timesteps."""
    diffusion, times = Diffusion(T, prediction), spacing(T, steps, "dpmpp")
    theirs = DPMSolverMultistepScheduler(
        num_train_timesteps=T, beta_schedule="squaredcos_cap_v2", algorithm_type="dpmsolver++", solver_order=2,
        prediction_type="epsilon" if prediction == "epsilon" else "v_prediction", final_sigmas_type="zero")
    theirs.set_timesteps(steps)
    theirs.timesteps = torch.tensor(times[:-1])
    alpha_bar = diffusion.alpha_bar[times]
    theirs.sigmas = torch.sqrt((1 - alpha_bar) / alpha_bar)
    x = torch.randn(2, 1, *SIZES["fmri"], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    generator, before, last = torch.Generator().manual_seed(2), None, 0
    torch.set_default_dtype(torch.float64)
    try:
        for now, after in zip(times[:-1], times[1:]):
            output = torch.randn(x.shape, generator=generator) * 0.1 + 0.3 * x
            x0 = diffusion.x0(x, output, torch.tensor([now, now]), clip=False)
            mine = dpmpp_step(diffusion, x, x0, now, after, before, last)
            x = theirs.step(output, now, x).prev_sample
            torch.testing.assert_close(mine, x, rtol=1e-5, atol=1e-5)
            before, last = x0, now
    finally:
        torch.set_default_dtype(torch.float32)


def optimal_denoiser(diffusion: Diffusion, covariance: torch.Tensor, size: int):
    """The network that knows E[x0 | xt] of a Gaussian pair with this covariance (2 size, 2 size), as v."""
    def network(xt, t, wanted):
        signal, sigma = zip(*(diffusion.weights(t[name][:1]) for name in ("a", "b")))
        H, R = (torch.cat([each.reshape(1).expand(size) for each in pair]).diag() for pair in (signal, sigma))
        gain = covariance @ H @ torch.linalg.inv(H @ covariance @ H + R @ R)
        x0 = (torch.cat([xt["a"].flatten(1), xt["b"].flatten(1)], 1) @ gain.T).split(size, 1)
        return {name: (signal[i] * xt[name] - x0[i].reshape(xt[name].shape)) / sigma[i]
                for i, name in enumerate("ab") if name in wanted}
    return network


@pytest.mark.parametrize("sampler, slope", [("ddim", 0.8), ("dpmpp", 1.7)])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("correlation, variance", [(0.6, 1.0), (0.8, 0.25)])
def test_sampled_covariance_converges(sampler, slope, given, correlation, variance):
    """A correlated Gaussian pair: the sampler is then a linear map of its noise, propagated here without sampling."""
    n, steps = 3, np.array([5, 10, 20, 40])
    torch.set_default_dtype(torch.float64)
    try:
        own = torch.tensor([[0.5 ** abs(i - j) for j in range(n)] for i in range(n)])
        covariance = variance * torch.cat([torch.cat([own, correlation * own], 1),
                                           torch.cat([correlation * own, own], 1)])
        a, b, across = covariance[:n, :n], covariance[n:, n:], covariance[:n, n:]
        expected = a - across @ torch.linalg.inv(b) @ across.T if given else covariance
        diffusion, errors = Diffusion(T, "v"), []
        columns = torch.eye(2 * n).view(2 * n, 1, 2 * n, 1, 1)
        noise = {"a": columns[:, :, :n], "b": columns[:, :, n:]}
        for count in steps:
            made = sample(diffusion, optimal_denoiser(diffusion, covariance, n), noise, int(count), sampler=sampler,
                          clip=False, given={"b": torch.zeros_like(noise["b"])} if given else None)
            linear = torch.cat([made[name].flatten(1) for name in ("a" if given else "ab")], 1).T
            errors.append(float((linear @ linear.T - expected).norm() / expected.norm()))
    finally:
        torch.set_default_dtype(torch.float32)
    assert -np.polyfit(np.log(steps), np.log(errors), 1)[0] >= slope, errors
    assert errors[-1] < 0.1


def test_a_given_modality_is_used_as_the_mean_of_a_gaussian_says():
    """The sampled conditional mean is across inv(b) given."""
    covariance = torch.tensor([[1.0, 0.7], [0.7, 1.0]])
    diffusion = Diffusion(T, "v")
    given = torch.tensor([-2.0, 0.0, 1.5]).view(3, 1, 1, 1, 1)
    made = sample(diffusion, optimal_denoiser(diffusion, covariance, 1), {"a": torch.zeros(3, 1, 1, 1, 1),
                  "b": torch.zeros(3, 1, 1, 1, 1)}, 60, clip=False, given={"b": given})
    torch.testing.assert_close(made["a"], 0.7 * given, atol=5e-3, rtol=0)


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


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 300, 999, T])
def test_spacing_ends_at_0_and_never_skips(steps, sampler):
    times = spacing(T, steps, sampler)
    assert times[0] == T and times[-1] == 0 and len(times) == steps + 1
    assert all(a > b for a, b in zip(times[:-1], times[1:]))


@pytest.mark.parametrize("steps", [0, T + 1])
def test_more_steps_than_timesteps_are_refused(steps):
    with pytest.raises(ValueError, match="do not fit"):
        spacing(T, steps, "dpmpp")


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


@pytest.mark.parametrize("sampler, eta", [("ddim", 0.0), ("ddim", 1.0), ("dpmpp", 0.0)])
def test_sampling_with_the_exact_network_gives_the_volume(sampler, eta):
    x0 = {name: torch.rand(2, 1, *size) * 2 - 1 for name, size in SIZES.items()}
    diffusion, network = exact(x0)
    keys = [(7, 1), (7, 2)]
    seen = []
    made = sample(diffusion, network, keyed_noise(SIZES, *keys), 10, sampler=sampler, eta=eta, keys=keys,
                  progress=lambda steps: seen.append(len(steps)) or steps)
    assert seen == [10]
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

    made = sample(diffusion, watched, noise, 5, given={"fmri": x0["fmri"]}, coupling=coupling)
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
        assert 0.35 < (own[name] == 0).float().mean() < 0.40  # given in three eighths of the draws
        other = own["dmri" if name == "fmri" else "fmri"][own[name] == 0]
        assert 0.64 < (other / T).mean() < 0.70  # of the larger of two uniform draws: 2 / 3
    assert not ((own["fmri"] == 0) & (own["dmri"] == 0)).any()
    noisy = (own["fmri"] > 0) & (own["dmri"] > 0)
    assert abs(np.corrcoef(own["fmri"][noisy], own["dmri"][noisy])[0, 1]) < 0.06
