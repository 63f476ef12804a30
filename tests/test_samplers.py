"""The samplers, step by step against diffusers; their order and their timesteps."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from models.diffusion import Diffusion, keyed_generator
from models.samplers import ddim, dpmpp, timestep_spacing

T = 1000
SHAPE = (2, 1, 5, 4, 3)
NAMES = {"epsilon": "epsilon", "v": "v_prediction"}


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def normal(*key: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=keyed_generator(*key))


def assert_same(sampler, scheduler, diffusion, times, offset, clip, eta=0.0, **more) -> None:
    """The volumes of every step are those of a scheduler of diffusers, for the same outputs of a network."""
    def output(x, t):
        return 0.3 * x + 0.1 * normal(2, t)

    def denoise(volumes, t):
        seen.append(volumes["a"])
        return {"a": diffusion.to_x0(seen[-1], output(seen[-1], t), torch.tensor([t, t]), clip)}

    seen, expected, noise = [], [normal(1)], ({"fresh_noise": lambda t: {"a": normal(3, t)}, "eta": eta} if eta else {})
    seen.append(sampler(denoise, {"a": normal(1)}, times, diffusion.alpha_bar, **noise)["a"])
    for t, t_next in zip(times, times[1:]):
        more |= {"variance_noise": normal(3, t_next), "eta": eta} if eta else {}
        expected.append(scheduler.step(output(expected[-1], t), t - offset, expected[-1], **more).prev_sample)
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("steps, eta", [(4, 0.0), (20, 0.0), (20, 0.7)])
def test_ddim_is_that_of_diffusers(prediction, steps, eta):
    diffusion = Diffusion(T, prediction)
    theirs = DDIMScheduler(T, prediction_type=NAMES[prediction], clip_sample=True, set_alpha_to_one=True)
    theirs.alphas_cumprod, theirs.num_inference_steps = diffusion.alpha_bar[1:].clone(), steps
    times = timestep_spacing(T, steps, "ddim")
    assert_same(ddim, theirs, diffusion, times, 1, True, eta, use_clipped_model_output=True)


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("steps", [2, 12, 20])
def test_dpmpp_is_that_of_diffusers(prediction, steps):
    diffusion, times = Diffusion(T, prediction), timestep_spacing(T, steps, "dpmpp")
    theirs = DPMSolverMultistepScheduler(T, algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero",
                                         prediction_type=NAMES[prediction])
    theirs.set_timesteps(steps)
    alpha_bar = diffusion.alpha_bar[times]
    theirs.timesteps, theirs.sigmas = torch.tensor(times[:-1]), torch.sqrt((1 - alpha_bar) / alpha_bar)
    assert_same(dpmpp, theirs, diffusion, times, 0, False)


@pytest.mark.parametrize("sampler, order, error", [(ddim, 0.8, 0.1), (dpmpp, 1.7, 0.01)])  # error: of 10 steps
def test_the_standard_deviation_of_samples_converges_with_the_samplers_order(sampler, order, error):
    def denoise(volumes, t):  # E[x0 | xt] of x0 with standard deviation 0.5: samples are a number times their noise
        return {"a": volumes["a"] * alpha_bar[t].sqrt() * 0.25 / (0.25 * alpha_bar[t] + 1 - alpha_bar[t])}

    alpha_bar, counts = Diffusion(T, "v").alpha_bar, [5, 10, 20, 40]
    stds = [sampler(denoise, {"a": torch.ones(())}, timestep_spacing(T, steps, sampler.__name__), alpha_bar)["a"].item()
            for steps in counts]
    errors = np.abs(np.array(stds) - 0.5)
    assert -np.polyfit(np.log(counts), np.log(errors), 1)[0] >= order and errors[1] < error


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp"])
def test_timesteps_fall_from_T_to_0_without_repetition(sampler):
    for steps in (1, 2, 7, 20, 300, 999, T):
        times = timestep_spacing(T, steps, sampler)
        assert times[0] == T and times[-1] == 0 and len(times) == steps + 1 and (np.diff(times) < 0).all()
    for steps in (0, T + 1):
        with pytest.raises(ValueError, match="do not fit"):
            timestep_spacing(T, steps, sampler)
