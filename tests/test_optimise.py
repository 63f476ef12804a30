"""The optimiser: schedule, clipping, loss scaling, Muon. Skipped steps and resuming: test_recovery.py."""

import math

import pytest
import torch
from torch import nn

from models.unet import DualModalUNet
from tests.test_unet import CONFIG, SIZES, T5, noise, randomised
from training.muon import Muon, orthogonalised
from training.optimise import FIRST_SCALE, MUON_DECAY, MUON_RATE, STEPS_BEFORE_RAISE, Optimiser


def linear(**changes) -> tuple[nn.Linear, Optimiser]:
    model = nn.Linear(2, 1)
    return model, Optimiser(model, 0.1, warmup_steps=4, total_steps=14, gradient_clip=1.0, **changes)


def step(optimiser: Optimiser, loss: torch.Tensor) -> dict[str, float]:
    (loss * optimiser.loss_scale).backward()
    return optimiser.step(loss.detach(), "step 1")


def test_the_learning_rate_warms_up_stays_and_decays_in_the_last_quarter():
    _, optimiser = linear()
    rates = []
    for optimiser.taken in range(15):
        rates.append(optimiser.learning_rate())
    assert rates[:12] == pytest.approx([0.025, 0.05, 0.075, *[0.1] * 9])
    assert rates[12:] == pytest.approx([0.05 * (1 + math.cos(0.2 * math.pi)), 0.05 * (1 + math.cos(0.6 * math.pi)), 0])
    assert rates[4:] == sorted(rates[4:], reverse=True)


@pytest.mark.parametrize("float16", [False, True])
def test_gradients_are_unscaled_clipped_and_cleared(float16):
    (model, optimiser), gradients = linear(float16=float16), []
    model.weight.register_post_accumulate_grad_hook(lambda p: gradients.append(p.grad))
    values = step(optimiser, model(torch.full((2,), 100.0)).sum())
    assert values["learning_rate"] == pytest.approx(0.025)  # the first of the warm-up
    assert values["gradient_norm"] == pytest.approx(20_001**0.5)
    assert gradients[0].norm() == pytest.approx(1, abs=1e-3) and model.weight.grad is None


def test_the_loss_scale_rises_after_many_good_steps_and_stays_where_the_loss_is_to_blame():
    model, optimiser = linear(float16=True)
    optimiser.since_overflow = STEPS_BEFORE_RAISE - 1
    taken = [step(optimiser, model(torch.ones(2)).sum() * factor)["taken"] for factor in (1, math.nan, math.inf, 1)]
    assert taken == [True, False, False, True] and (optimiser.taken, optimiser.bad_in_a_row) == (2, 0)
    assert optimiser.loss_scale == 2 * FIRST_SCALE


@pytest.mark.parametrize("kind, nearly", [("muon", True), ("adam", False)])
def test_muon_orthogonalises_hidden_updates_and_leaves_the_ends_to_adam(kind, nearly):
    torch.manual_seed(0)
    network = randomised(DualModalUNet(SIZES, CONFIG), 0.05)
    optimiser, body = Optimiser(network, 1e-3, 1, 10, 1.0, kind), network.net("b").body
    hidden, stem = body.down[0][0].conv1.weight, body.stem.weight
    before = hidden.detach().clone(), stem.detach().clone()
    loss = sum(output.square().mean() for output in network(noise(), T5).values())
    U, _, V = torch.linalg.svd(torch.autograd.grad(loss, hidden, retain_graph=True)[0].flatten(1), full_matrices=False)
    step(optimiser, loss)
    update = (before[0] - hidden.detach()).flatten(1)
    assert (torch.cosine_similarity(update.flatten(), (U @ V).flatten(), dim=0) > 0.95) == nearly
    assert update.norm() == pytest.approx(1e-3 * MUON_RATE * 8**0.5, rel=0.2) or kind == "adam"  # 8 rows of length 1
    assert (before[1] - stem).abs().max() <= 1.01e-3  # Adam's first step is the rate, whatever the gradient


def test_hidden_matrices_decay_and_nothing_else_does():
    torch.manual_seed(0)
    model = nn.Sequential()
    for name in ("stem", "hidden", "head"):
        model.add_module(name, nn.Linear(4, 4))
    optimiser = Optimiser(model, 1e-3, 1, 10, 1.0, "muon")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    step(optimiser, 0 * model(torch.ones(1, 4)).sum())
    for name, parameter in model.named_parameters():
        kept = 1 - 1e-3 * MUON_RATE * MUON_DECAY if name == "hidden.weight" else 1
        torch.testing.assert_close(parameter.detach(), kept * before[name])


def test_muon_takes_the_steps_of_torch():
    torch.manual_seed(0)
    shapes = [(32, 864)] * 3 + [(128, 128)] * 2 + [(384, 128), (192, 64), (64, 1728)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(matrix.detach().clone()) for matrix in ours]
    optimisers = Muon(ours, 0.02, 0.3), torch.optim.Muon(theirs, 0.02, 0.3)
    for _ in range(5):
        for one, other in zip(ours, theirs):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimiser in optimisers:
            optimiser.step()
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)  # equal on most processors; a step has length 0.02


def test_orthogonalised_matrices_have_singular_values_of_about_one():
    for shape in ((5, 8, 20), (3, 20, 8), (1, 9, 9)):
        values = torch.linalg.svdvals(orthogonalised(torch.randn(shape)).float())
        assert values.min() > 0.5 and values.max() < 1.5
