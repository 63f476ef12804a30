"""Networks, losses, EMA and the optimiser: shapes, starting points and known answers."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from torch import nn

from estimate import Work
from models.layers import Attention, Conv3d, ResBlock, from_patches, layout, timestep_embedding, to_patches
from models.losses import blend_weights, microstructure_loss, pattern_aware_loss, structure_loss, tissue_loss, x0_error
from models.refine import RefineNet
from models.unet import DualModalUNet
from utils.ema import EMA
from utils.metrics import score
from utils.optimise import MUON_RATE, Optimiser, StopRequest, TrainingError, number_type

SIZES = {"a": (11, 14, 13), "b": (17, 12, 15)}
NETWORK = {"channels": 8, "depth": 3, "blocks": 2, "output_blocks": 2, "patch": 1, "fusion": "early",
           "attention_tokens": 500, "dropout": 0.0}


@pytest.mark.parametrize("fusion", ["late", "early"])
@pytest.mark.parametrize("patch", [1, 2, 3])
@pytest.mark.parametrize("depth", [1, 3])
def test_any_grid_works_and_every_weight_learns(fusion, patch, depth):
    torch.manual_seed(0)
    net = DualModalUNet(SIZES, **{**NETWORK, "fusion": fusion, "patch": patch, "depth": depth})
    x = {name: torch.randn(2, 1, *size) for name, size in SIZES.items()}
    t = {name: torch.tensor([3, 700]) for name in SIZES}
    assert all((out == 0).all() for out in net(x, t).values())  # the last layers start at zero
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        out = net(x, t)
        assert {name: each.shape for name, each in out.items()} == {name: each.shape for name, each in x.items()}
        sum((out[name] - x[name]).square().mean() for name in out).backward()
        optimiser.step()
        grads = {name: p.grad.abs().sum().item() for name, p in net.named_parameters()}
        optimiser.zero_grad()
    assert [name for name, size in grads.items() if size == 0] == []


def test_only_the_wanted_direction_is_computed():
    net = DualModalUNet(SIZES, **NETWORK)
    x = {name: torch.randn(1, 1, *size) for name, size in SIZES.items()}
    assert set(net(x, {name: torch.tensor([0]) for name in SIZES}, {"b"})) == {"b"}


@pytest.mark.parametrize("patch", [1, 2, 3, 4])
def test_patches_there_and_back(patch):
    x = torch.randn(2, 3, 5, 8, 7)
    folded = to_patches(x, patch)
    assert folded.shape == (2, 3 * patch**3, *(math.ceil(n / patch) for n in (5, 8, 7)))
    assert torch.equal(from_patches(folded, patch, x.shape[2:]), x)


def test_timestep_embedding_tells_timesteps_apart():
    every = timestep_embedding(torch.arange(1001), 32)
    assert every.shape == (1001, 32)
    assert torch.cdist(every, every).fill_diagonal_(9).min() > 1e-2


def test_attention_ignores_the_order_of_positions():
    attention = Attention(16)
    nn.init.normal_(attention.out.weight)
    x = torch.randn(1, 16, 4, 3, 2)
    torch.testing.assert_close(attention(x.flip(2)), attention(x).flip(2), atol=1e-5, rtol=1e-4)


def test_attention_only_where_tokens_are_few():
    net = DualModalUNet(SIZES, **NETWORK)
    kinds = [type(each).__name__ for each in net.direction("a", "b").body.attend]
    assert kinds == ["Identity", "Attention", "Attention"]  # 2002, 294 and 48 positions; never on the finest level


def test_pattern_aware_loss():
    prediction, target = torch.zeros(2, 1, 2, 2, 2), torch.ones(2, 1, 2, 2, 2)
    mask = torch.zeros(2, 1, 2, 2, 2)
    mask[:, :, 0] = 1
    assert pattern_aware_loss(prediction, target, mask, 0.0).tolist() == [1, 1]
    assert pattern_aware_loss(prediction, target, mask, 1.0).tolist() == [1.5, 1.5]
    target[1] = 3
    assert pattern_aware_loss(prediction, target, mask, 1.0).tolist() == [1.5, 4.5]
    assert pattern_aware_loss(prediction, target, mask, 1.0, "l2").tolist() == [1.5, 13.5]


def test_tissue_and_microstructure_losses():
    truth = torch.randn(2, 1, 6, 5, 4)
    mask = torch.zeros_like(truth)
    assert tissue_loss(truth, truth, mask, 1.0) == 0 and microstructure_loss(truth, truth) == 0
    assert tissue_loss(truth + 0.5, truth, mask, 1.0).item() == pytest.approx(0.75)
    offset = microstructure_loss(truth + 0.5, truth)
    assert offset.item() == pytest.approx(0.5, rel=1e-5)  # the values differ, the gradients do not
    averaging_out = torch.tensor([1.0, -1.0]).repeat(3, 5, 2).expand(2, 1, 3, 5, 4)
    ramp = torch.linspace(0, 1, 4).expand(2, 1, 3, 5, 4)
    assert microstructure_loss(averaging_out, 0 * averaging_out) > microstructure_loss(ramp, 0 * ramp)
    assert x0_error(truth + 0.25, truth).tolist() == pytest.approx([0.25, 0.25])


def test_structure_loss_is_that_of_scikit_image():
    torch.manual_seed(0)
    truth = torch.rand(2, 1, 13, 11, 16) * 2 - 1
    refined = (truth + 0.3 * torch.randn(truth.shape)).clamp(-1, 1)
    expected = [score(a[0].numpy(), b[0].numpy(), {})["volume"]["ssim"] for a, b in zip(refined, truth)]
    assert structure_loss(refined, truth).item() == pytest.approx(1 - sum(expected) / 2, abs=1e-5)
    assert structure_loss(truth, truth).item() == pytest.approx(0, abs=1e-6)


def test_blend_weights_find_the_mixture():
    a, b = torch.randn(2, 1, 5, 5, 5), torch.randn(2, 1, 5, 5, 5)
    found = blend_weights(0.7 * a - 0.2 * b + 0.1, [a, b])
    torch.testing.assert_close(found, torch.tensor([0.7, -0.2, 0.1]), atol=1e-4, rtol=0)


def test_refinement_starts_from_the_blend():
    net = RefineNet(SIZES, **NETWORK)
    source, coarse = torch.randn(1, 1, *SIZES["a"]), torch.randn(1, 1, *SIZES["b"])
    assert torch.equal(net("a", "b", source, coarse), coarse)
    net.direction("a", "b").blend.copy_(torch.tensor([0.5, 0.0, 0.25]))
    torch.testing.assert_close(net("a", "b", source, coarse), 0.5 * coarse + 0.25)


@pytest.mark.parametrize("fusion", ["late", "early"])
def test_a_warm_start_is_the_backbone_at_fixed_timesteps(fusion):
    torch.manual_seed(0)
    network = {**NETWORK, "fusion": fusion}
    backbone, refine = DualModalUNet(SIZES, **network), RefineNet(SIZES, **network)
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.1)
    refine.start_from(backbone, 500)
    theirs, mine = backbone.direction("a", "b"), refine.direction("a", "b")
    mine.head.load_state_dict(theirs.head.state_dict())
    source, target = torch.randn(2, 1, *SIZES["a"]), torch.randn(2, 1, *SIZES["b"])
    t = torch.zeros(2, dtype=torch.long), torch.full((2,), 500)
    gain = theirs.gain(nn.functional.silu(theirs.embedded(*t)))[:, :, None, None, None]
    torch.testing.assert_close(mine(source, target), theirs(source, target, *t) - gain * target, atol=1e-4, rtol=1e-4)


def test_the_mean_volume_reaches_the_output():
    torch.manual_seed(0)
    net = DualModalUNet(SIZES, **NETWORK)
    x, t = {name: torch.randn(1, 1, *size) for name, size in SIZES.items()}, {name: torch.tensor([5]) for name in SIZES}
    for direction in net.directions:
        nn.init.normal_(net.direction(*direction).head.weight)
    before = net(x, t)
    net.set_means({name: torch.ones(1, 1, *size) for name, size in SIZES.items()})
    assert all(not torch.allclose(before[name], after) for name, after in net(x, t).items())


def test_ema_warms_up_and_copies_buffers():
    model = nn.BatchNorm1d(2)
    ema = EMA(model, 0.9)
    with torch.no_grad():
        model.weight.fill_(11.0)
        model.running_mean.fill_(5.0)
    ema.update(model)
    torch.testing.assert_close(ema.model.weight, torch.full((2,), 1 + 10 * (1 - 2 / 11)))
    assert (ema.model.running_mean == 5).all()
    for _ in range(200):
        ema.update(model)
    torch.testing.assert_close(ema.model.weight, torch.full((2,), 11.0))


def optimiser(**changes) -> tuple[nn.Linear, Optimiser]:
    model = nn.Linear(2, 1)
    return model, Optimiser(model, **{"learning_rate": 0.1, "warmup_steps": 4, "total_steps": 14, "gradient_clip": 1.0,
                                      **changes})


def test_learning_rate_warms_up_and_decays():
    _, steps = optimiser()
    rates = []
    for steps.taken in range(15):
        rates.append(steps.rate())
    assert rates[:5] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])
    assert rates[9] == pytest.approx(0.05) and rates[14] == pytest.approx(0)
    assert all(a >= b for a, b in zip(rates[4:-1], rates[5:]))


def test_T1_a_step_that_is_not_finite_is_not_taken():
    model, steps = optimiser()
    before = model.weight.clone()
    for _ in range(4):
        steps.update(model, [lambda: model(torch.ones(1, 2)).sum() * float("inf")], 3, ["sub-1"])
    assert torch.equal(model.weight, before) and steps.taken == 0
    steps.update(model, [lambda: model(torch.ones(1, 2)).sum()], 4, ["sub-1"])
    assert not torch.equal(model.weight, before) and steps.bad_in_a_row == 0
    with pytest.raises(TrainingError, match="step 10, with sub-7"):
        for _ in range(5):
            steps.update(model, [lambda: model(torch.ones(1, 2)).sum() * float("nan")], 9, ["sub-7"])


def test_T2_an_overflow_lowers_the_scale_and_advances_nothing():
    model, steps = optimiser(float16=True)
    before = model.weight.clone()

    def loss() -> torch.Tensor:  # in float16 the largest number is 65504: 65536 times a gradient of 4 is none
        with torch.autocast("cpu", torch.float16):
            return model(torch.full((1, 2), 4.0)).sum()

    values = [steps.update(model, [loss], step, ["sub-1"]) for step in range(12)]
    taken = [value["taken"] for value in values]
    skipped = taken.index(True)
    assert 0 < skipped < 6 and all(taken[skipped:]) and steps.scale == 2.0**16 / 2**skipped
    assert values[skipped]["learning_rate"] == pytest.approx(0.025)  # the first of the warm-up
    assert values[skipped]["gradient_norm"] == pytest.approx(33**0.5, rel=1e-2) and steps.taken == 12 - skipped
    other, again = optimiser(float16=True)
    again.load_state_dict(steps.state_dict())
    assert (again.scale, again.since_overflow, again.taken) == (steps.scale, 12 - skipped, 12 - skipped)
    again.since_overflow = 1999
    again.update(other, [lambda: other(torch.ones(1, 2)).sum()], 12, [])
    assert again.scale == 2 * steps.scale and not torch.equal(model.weight, before)
    for _ in range(20):
        with contextlib.suppress(TrainingError):
            again.update(other, [lambda: other(torch.ones(1, 2)).sum() * float("nan")], 13, ["sub-7"])
    assert again.scale == 2 * steps.scale and again.bad_in_a_row >= 5  # it is the loss that is to blame, not its scale


def test_parts_of_a_loss_add_up():
    (one, whole), (other, split) = optimiser(), optimiser()
    other.load_state_dict(one.state_dict())
    inputs = torch.randn(4, 2)
    for _ in range(3):
        together = whole.update(one, [lambda: one(inputs).square().mean()], 5, [])
        apart = split.update(other, [lambda part=part: other(part).square().sum() / 4 for part in inputs.split([1, 3])],
                             5, [])
        assert apart == pytest.approx(together, rel=1e-5)
    torch.testing.assert_close(other.weight, one.weight)


def test_muon_makes_hidden_updates_orthogonal():
    """Every singular value of a hidden layer's first update is about the rate; the ends of a network are Adam's."""
    torch.manual_seed(0)
    net = DualModalUNet(SIZES, **NETWORK)
    steps = Optimiser(net, 1e-3, 1, 10, 1.0, "muon")
    body = net.direction("a", "b").body
    x = {name: torch.randn(1, 1, *size) for name, size in SIZES.items()}
    t = {name: torch.tensor([5]) for name in SIZES}
    for parameter in net.parameters():  # nothing is at its starting zero
        nn.init.normal_(parameter, std=0.05)
    before = [each.weight.detach().clone() for each in (body.down[0][0].conv1, body.stem)]
    steps.update(net, [lambda: sum(each.square().mean() for each in net(x, t).values())], 0, [])
    hidden, stem = (each.weight.detach() - old for each, old in zip((body.down[0][0].conv1, body.stem), before))
    singular = torch.linalg.svdvals(hidden.flatten(1)) / (1e-3 * MUON_RATE)
    assert singular.min() > 0.5 and singular.max() < 1.5
    assert stem.abs().max() <= 1.01e-3  # Adam's first step is the rate, whatever the gradient


@pytest.mark.parametrize("kind", ["adam", "muon"])
def test_what_an_optimiser_keeps_survives_a_file_in_every_layout(kind, tmp_path):
    """Two steps, a file, a third step equal three steps; the state of an earlier version is refused."""
    x = {name: torch.randn(1, 1, *size) for name, size in SIZES.items()}
    t = {name: torch.tensor([5]) for name in SIZES}

    def trained(net: DualModalUNet, steps: Optimiser, numbers: range) -> dict[str, torch.Tensor]:
        for number in numbers:
            steps.update(net, [lambda: sum((each - 1).square().mean() for each in net(x, t).values())], number, [])
        return net.state_dict()

    nets, optimisers = [], []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(DualModalUNet(SIZES, **NETWORK))
        optimisers.append(Optimiser(nets[-1], 1e-2, 1, 10, 1.0, kind))
    expected = trained(nets[0], optimisers[0], range(3))
    torch.save({"model": trained(nets[1], optimisers[1], range(2)), "optimiser": optimisers[1].state_dict()},
               tmp_path / "state.pth")
    state = torch.load(tmp_path / "state.pth", weights_only=True)
    fresh = DualModalUNet(SIZES, **NETWORK)
    steps = Optimiser(fresh, 1e-2, 1, 10, 1.0, kind)
    fresh.load_state_dict(state["model"])
    steps.load_state_dict(state["optimiser"])
    for name, value in trained(fresh, steps, range(2, 3)).items():
        assert torch.equal(value, expected[name]), name
    del state["optimiser"]["form"]
    with pytest.raises(ValueError, match="earlier version"):
        steps.load_state_dict(state["optimiser"])


def test_gradients_are_clipped():
    model, steps = optimiser()
    values = steps.update(model, [lambda: model(torch.full((1, 2), 100.0)).sum()], 0, [])
    assert values["gradient_norm"] > 100 and math.isfinite(values["loss"])


def test_stop_after_some_minutes():
    stop = StopRequest()
    stop.end_after(0)
    assert not stop
    stop.end_after(1e-9)
    assert stop and "max_minutes" in stop.reason


def test_precision():
    cpu = torch.device("cpu")
    assert [number_type(name, cpu) for name in ("fp32", "bf16", "fp16")] == [torch.float32, torch.bfloat16,
                                                                             torch.float16]
    assert number_type("auto", cpu) in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("kernel, stride", [(1, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("size", [(24, 9, 8), (25, 9, 8), (4, 5, 6)])
@pytest.mark.parametrize("batch", [1, 2])
def test_convolutions_are_pytorchs(kernel, stride, size, batch):
    """However a single volume goes in, outputs, gradients and layout are as they are with nn.Conv3d."""
    torch.manual_seed(0)
    ours = Conv3d(4, 8, kernel, stride=stride, padding=kernel // 2)
    x = torch.randn(batch, 4, *size).contiguous(memory_format=layout(size)).requires_grad_()
    y = ours(x)
    expected = nn.functional.conv3d(x, ours.weight, ours.bias, stride, kernel // 2)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    direction = torch.randn_like(expected)
    for mine, theirs in zip(torch.autograd.grad(y, [x, ours.weight, ours.bias], direction),
                            torch.autograd.grad(expected, [x, ours.weight, ours.bias], direction)):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_features_stay_in_the_layout_of_their_grid():
    """A layer that falls back to another layout makes all that follow copy."""
    net = DualModalUNet({"a": (16, 16, 12), "b": (18, 14, 12)}, **{**NETWORK, "patch": 1})
    seen = []
    for block in net.modules():
        if isinstance(block, ResBlock):
            block.register_forward_hook(lambda _, given, made: seen.append((given[0], made)))
    x = {name: torch.randn(1, 1, *size) for name, size in (("a", (16, 16, 12)), ("b", (18, 14, 12)))}
    net(x, {name: torch.tensor([3]) for name in x})
    fine = [each for pair in seen for each in pair if layout(each.shape[2:]) == torch.channels_last_3d]
    assert len(fine) > 10 and len(fine) < 2 * len(seen)
    assert all(each.is_contiguous(memory_format=torch.channels_last_3d) for each in fine)


@pytest.mark.parametrize("refine", [False, True])
def test_gradient_checkpointing_keeps_the_gradient_and_less_memory(refine):
    torch.manual_seed(0)
    net = (RefineNet if refine else DualModalUNet)(SIZES, **{**NETWORK, "dropout": 0.2})
    for parameter in net.parameters():  # nothing is at its starting zero
        nn.init.normal_(parameter, std=0.1)
    x = {name: torch.randn(1, 1, *size) for name, size in SIZES.items()}
    found, kept = [], []
    for recompute in (False, True):
        net.recompute(recompute)
        torch.manual_seed(1)  # the same features are dropped
        with Work() as memory:
            made = net("a", "b", x["a"], x["b"]) if refine else net(x, dict.fromkeys(x, torch.tensor([3])), {"b"})["b"]
        kept.append(memory.now)
        made.square().mean().backward()
        found.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
        net.zero_grad()
    assert len(found[0]) > 20 and found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)
    assert kept[1] < 0.6 * kept[0]
