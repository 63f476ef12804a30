"""The prior: how it samples, and what it does with a given modality. Its loss: test_loop.py."""

from dataclasses import replace

import pytest
import torch

from models.diffusion import Diffusion, keyed_noise
from models.prior import Prior
from models.samplers import Sampling
from tests.test_unet import SIZES, noise
from utils.stop import Interrupted, stop

CPU = torch.device("cpu")
KEYS = [(7, 1), (7, 2)]


def exact_prior(coupling: str = "independent") -> tuple[Prior, dict[str, torch.Tensor], list]:
    """A prior whose network knows two pairs and predicts their v; the pairs; the calls of the network."""
    x0, calls, diffusion = {each: volume.clamp(-1, 1) for each, volume in noise(2).items()}, [], Diffusion(1000, "v")

    def network(xt, t, targets, group=None):
        calls.append((xt, t, set(targets), group))
        weights = {modality: diffusion.weights(t[modality]) for modality in targets}
        return {each: (signal * xt[each] - x0[each]) / sigma for each, (signal, sigma) in weights.items()}
    network.sizes, network.source = SIZES, {"a": "b", "b": "a"}.get
    return Prior(network, diffusion, coupling, SIZES, CPU, torch.float32, ("AD", "NC")), x0, calls


@pytest.mark.parametrize("sampling", [Sampling("ddim", 10), Sampling("ddim", 10, 1.0), Sampling("dpmpp", 10)])
def test_an_exact_network_samples_its_volumes_until_a_stop(sampling, monkeypatch):
    (prior, x0, calls), record = exact_prior(), []
    samples = prior.sample(KEYS, sampling, groups=["NC", "unknown"], record=record)
    torch.testing.assert_close(samples, x0, atol=1e-4, rtol=0)
    assert len(calls) == len(record) == 10 and all(group.tolist() == [2, 0] for *_, group in calls)
    assert all(t == call[1]["a"][0] and noisy["a"].shape == SIZES["a"] for (t, noisy, _), call in zip(record, calls))
    assert record[-1][2]["b"] == pytest.approx(x0["b"][0, 0].numpy(), abs=1e-4)
    monkeypatch.setattr(stop, "reason", "test")
    with pytest.raises(Interrupted):
        prior.sample(KEYS, sampling)


@pytest.mark.parametrize("coupling", ["independent", "shared"])
def test_a_given_modality_is_kept_and_seen_as_its_coupling_says(coupling):
    prior, x0, calls = exact_prior(coupling)
    samples = prior.sample(KEYS, Sampling("dpmpp", 5), {"a": x0["a"]})
    assert torch.equal(samples["a"], x0["a"])
    torch.testing.assert_close(samples["b"], x0["b"], atol=1e-4, rtol=0)
    for xt, t, targets, group in calls:
        assert targets == {"b"} and group is None and (t["b"] > 0).all()
        assert torch.equal(t["a"], 0 * t["b"] if coupling == "independent" else t["b"])
        assert torch.equal(xt["a"], prior.diffusion.add_noise(x0["a"], keyed_noise(SIZES, *KEYS)["a"], t["a"]))


@pytest.mark.parametrize("coupling, prediction, evaluations", [("independent", "v", 1), ("shared", "v", 5),
                                                               ("independent", "epsilon", 5)])
def test_a_translation_is_the_expected_volume_or_else_a_sample(coupling, prediction, evaluations):
    prior, x0, calls = exact_prior(coupling)
    if prediction == "epsilon":  # of the same exact network
        exact = prior.network

        def epsilon(xt, t, targets, group):
            signal, sigma = prior.diffusion.weights(t["b"])
            return {"b": signal * exact(xt, t, targets, group)["b"] + sigma * xt["b"]}
        epsilon.source = exact.source
        prior = replace(prior, diffusion=Diffusion(1000, "epsilon"), network=epsilon)
    made = prior.translate("b", x0["a"], KEYS, Sampling("dpmpp", 5))
    torch.testing.assert_close(made, x0["b"], atol=1e-3, rtol=0)
    assert len(calls) == evaluations
    if prior.has_expected_volume:
        (xt, t, targets, _), = calls
        assert targets == {"b"} and (t["a"] == 0).all() and (t["b"] == 1000).all()
        assert torch.equal(xt["a"], x0["a"]) and not xt["b"].any()
