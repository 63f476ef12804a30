"""The optimiser: schedule, clipping, loss scaling, Muon. Skipped steps and resuming: test_recovery.py."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.unet import DualModalUNet
from tests.test_unet import CONFIG, SIZES, T5, noise, randomised
from training.muon import Muon, orthogonalise_
from training.optimise import FIRST_SCALE, MUON_DECAY, MUON_RATE, STEPS_BEFORE_RAISE, Optimiser


class NothingWaits(TorchDispatchMode):
    """Fails where Python asks for a tensor's value, or for a size that depends on values: there a GPU is waited for."""

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        assert function._schema.name.split("::")[1] not in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero",
                                                            "masked_select", "item"), function
        return function(*arguments, **(named or {}))


def linear(**changes) -> tuple[nn.Linear, Optimiser]:
    model = nn.Linear(2, 1)
    return model, Optimiser(model, 0.1, warmup_steps=4, total_steps=14, gradient_clip=1.0, **changes)


def step(optimiser: Optimiser, loss: torch.Tensor, number: int = 0) -> tuple[bool, float]:
    """Whether it was taken, and the gradient norm."""
    optimiser.scale(loss).backward()
    optimiser.rate.fill_(optimiser.learning_rate(number))
    norm = optimiser.step(loss.detach()).item()
    return optimiser.judge(loss.item(), norm, optimiser.loss_scale.item(), "step 1"), norm


def test_the_learning_rate_warms_up_stays_and_decays_in_the_last_quarter():
    _, optimiser = linear()
    rates = [optimiser.learning_rate(step) for step in range(15)]
    assert rates[:12] == pytest.approx([0.025, 0.05, 0.075, *[0.1] * 9])
    assert rates[12:] == pytest.approx([0.05 * (1 + math.cos(0.2 * math.pi)), 0.05 * (1 + math.cos(0.6 * math.pi)), 0])
    assert rates[4:] == sorted(rates[4:], reverse=True)


@pytest.mark.parametrize("float16", [False, True])
def test_gradients_are_unscaled_clipped_and_cleared(float16):
    (model, optimiser), gradients = linear(float16=float16), []
    model.weight.register_post_accumulate_grad_hook(lambda p: gradients.append(p.grad))
    taken, norm = step(optimiser, model(torch.full((2,), 100.0)).sum())
    assert taken and norm == pytest.approx(20_001**0.5) and optimiser.rate == torch.tensor(0.025)  # the first
    assert gradients[0].norm() == pytest.approx(1, abs=1e-3) and model.weight.grad is None


def test_the_loss_scale_rises_after_many_good_steps_and_falls_after_a_bad_one(capsys):
    model, optimiser = linear(float16=True)
    optimiser.since_overflow += STEPS_BEFORE_RAISE - 1
    taken = [step(optimiser, model(torch.ones(2)).sum())[0] for _ in range(2)]
    assert taken == [True, True] and optimiser.loss_scale == 2 * FIRST_SCALE and optimiser.since_overflow == 1
    taken = [step(optimiser, model(torch.ones(2)).sum() * factor)[0] for factor in (math.nan, math.inf, 1e38, 1)]
    assert taken == [False, False, False, True] and optimiser.loss_scale == FIRST_SCALE  # the loss is to blame, then it
    assert optimiser.bad_in_a_row == 0 and "gradient overflow" in capsys.readouterr().out


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
    muon, reference = Muon([matrix.detach() for matrix in ours], 0.3), torch.optim.Muon(theirs, 0.02, 0.3)
    for number in range(6):
        gradients, ok = [torch.randn_like(matrix) for matrix in ours], number != 3
        if not ok:
            gradients[0][0, 0] = torch.nan  # the step is not taken, and leaves no trace
        muon.step(gradients, torch.tensor(0.02), torch.tensor(ok))
        if ok:
            for matrix, gradient in zip(theirs, gradients):
                matrix.grad = gradient
            reference.step()
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)  # equal on most processors; a step has length 0.02


@pytest.mark.parametrize("kind", ["adam", "muon"])
def test_weights_without_a_gradient_stay_and_their_momenta_too(kind):
    """Where no visit of a batch has a modality, the network that makes it learns nothing, though it has before."""
    torch.manual_seed(0)
    network = randomised(DualModalUNet(SIZES, CONFIG), 0.05)
    optimiser = Optimiser(network, 1e-3, 1, 10, 1.0, kind)
    for targets in (("a", "b"), ("b",)):
        before, state = copy.deepcopy((network.state_dict(), optimiser.state_dict()))
        step(optimiser, sum(output.square().mean() for output in network(noise(), T5, targets).values()))
    moved = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all("to_b." in name for name in moved)
    same = [all(torch.equal(mine[key], theirs[key]) for key in mine) for part in ("adam", "muon")
            for mine, theirs in zip(state[part], optimiser.state_dict()[part])]
    assert same.count(True) == same.count(False) > 20


def test_orthogonalised_matrices_have_singular_values_of_about_one():
    for shape in ((5, 8, 20), (1, 9, 9)):
        matrices = torch.randn(shape).bfloat16()
        assert orthogonalise_(matrices) is matrices
        values = torch.linalg.svdvals(matrices.float())
        assert values.min() > 0.5 and values.max() < 1.5


@pytest.mark.parametrize("kind, float16", [("muon", False), ("adam", False), ("muon", True)])
def test_a_step_that_is_not_finite_leaves_weights_and_state_and_nothing_waits_for_the_device(kind, float16):
    torch.manual_seed(0)
    network = randomised(DualModalUNet(SIZES, CONFIG), 0.05)
    optimiser = Optimiser(network, 1e-3, 1, 10, 1.0, kind, float16)

    def take(factor: float) -> torch.Tensor:
        loss = factor * sum(output.square().mean() for output in network(noise(), T5).values())
        optimiser.scale(loss).backward()
        with NothingWaits():
            return optimiser.step(loss.detach())
    take(1)
    state = copy.deepcopy([network.state_dict(), optimiser.state_dict()])
    assert not take(math.inf).isfinite().all()
    after = [network.state_dict(), optimiser.state_dict()]
    scales = [(content[1].pop("loss_scale"), content[1].pop("since_overflow")) for content in (state, after)]
    assert scales == ([(FIRST_SCALE, 1), (FIRST_SCALE, 2)] if float16 else [(1, 0), (1, 0)])  # the loss is to blame
    torch.testing.assert_close(after, state, rtol=0, atol=0)
    take(1)
    assert any((old != new).any() for old, new in zip(state[0].values(), network.state_dict().values()))
