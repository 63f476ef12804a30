"""What training is expected to need, against what it needs."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import estimate
import main
from estimate import Work, expect, free_memory, remedies, step_cost
from models.unet import DualModalUNet
from opt import small
from tests.conftest import SIZES, arguments

CPU = torch.device("cpu")


@pytest.fixture
def settings():
    """As few settings as make a network of several levels; attention apart, its FLOP are counted by hand."""
    found = small()
    found.image_size, found.base_channels, found.attention_tokens, found.batch_size = SIZES, 8, 0, 2
    found.timestep_coupling = "shared"
    return found


def test_arithmetic_and_memory_are_those_of_a_real_step(settings):
    network, batch = DualModalUNet(SIZES, **settings.network_arguments()), settings.batch_size
    x, t = ({name: torch.randn(batch, 1, *size) for name, size in SIZES.items()},
            {name: torch.ones(batch) for name in SIZES})

    def step() -> None:
        for target in SIZES:
            network(x, t, {target})[target].square().mean().backward()

    with FlopCounterMode(display=False) as counter:
        step()
    network.zero_grad()
    with Work() as memory:
        step()
    cost = step_cost(settings, SIZES, torch.float32)
    parameters = sum(p.numel() for p in network.parameters())
    assert cost.parameters == parameters
    assert cost.flop == pytest.approx(counter.get_total_flops(), rel=0.01)
    features = memory.peak - 4 * parameters
    assert cost.memory - estimate.PROGRAM == pytest.approx(20 * parameters + estimate.KEPT_FREE * features, rel=0.05)


def test_what_lowers_memory_and_what_costs_time(settings):
    settings.image_size, settings.base_channels, settings.batch_size = 32, 16, 8
    sizes = settings.image_sizes()
    usual = step_cost(settings, sizes, torch.float32)
    assert step_cost(settings, sizes, torch.bfloat16).memory < usual.memory
    settings.accumulate = 8
    parts = step_cost(settings, sizes, torch.float32)
    assert parts.memory < usual.memory and parts.flop == pytest.approx(usual.flop)
    settings.accumulate, settings.gradient_checkpointing = 1, True
    again = step_cost(settings, sizes, torch.float32)
    assert again.memory < usual.memory and 1.1 * usual.flop < again.flop < 1.4 * usual.flop


def test_attention_is_counted(settings):
    without = step_cost(settings, SIZES, torch.float32).flop
    settings.attention_tokens = 10_000
    settings.unet_depth = 2
    with_attention = step_cost(settings, SIZES, torch.float32).flop
    settings.attention_tokens = 0
    difference = with_attention - step_cost(settings, SIZES, torch.float32).flop
    tokens = [math.prod((-(-n // settings.patch_size) + 1) // 2 for n in size) for size in SIZES.values()]
    products = sum(14 * settings.batch_size * n**2 * 16 for n in tokens)
    projections = sum(3 * 2 * settings.batch_size * n * 4 * 16**2 for n in tokens)
    assert without > 0 and difference == pytest.approx(products + projections, rel=0.05)


def test_time_is_arithmetic_over_speed(settings, monkeypatch):
    monkeypatch.setattr(estimate, "convolution_rate", lambda *_: 1e9)
    found = expect(settings, SIZES, 100, 5, CPU, torch.float32)
    assert found.step == pytest.approx(step_cost(settings, SIZES, torch.float32).flop / 1e9 / estimate.CONVOLUTIONS)
    assert found.epoch == pytest.approx(5 * found.step) and found.whole == pytest.approx(100 * found.step)


def test_speed_is_measured():
    assert 1e8 < estimate.convolution_rate(8, (12, 12, 12), 2, CPU, torch.float32) < 1e15


def test_free_memory_is_some():
    found = free_memory(CPU)
    assert found is None or 0 < found[0] <= found[1]


def test_remedies_are_those_that_are_left(settings):
    assert remedies(settings)[:2] == ["opt.accumulate = 2", "opt.gradient_checkpointing = True"]
    settings.accumulate, settings.gradient_checkpointing, settings.batch_size = 2, True, 1
    assert not any("accumulate" in each or "checkpointing" in each or "batch" in each for each in remedies(settings))


def test_a_run_that_will_not_fit_is_refused_before_it_starts(study_csv, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(estimate, "free_memory", lambda device: (2**18, 2**19))
    monkeypatch.setattr(estimate, "convolution_rate", None)  # nothing is allocated before
    assert main.main(arguments(study_csv, tmp_path, "--max_steps", "1")) == 2
    told = capsys.readouterr().err
    assert "this cannot fit" in told and "will need about" in told and "opt.gradient_checkpointing = True" in told
    assert not list((tmp_path / "checkpoints").iterdir())
    monkeypatch.undo()
    monkeypatch.setattr(estimate, "free_memory", lambda device: (2**20, 2**40))
    assert main.main(arguments(study_csv, tmp_path, "--max_steps", "1")) == 0
    assert "note: training will need about" in capsys.readouterr().out
