"""The moving average of the weights."""

import torch
from torch import nn

from training.ema import EMA


def test_ema_warms_up_converges_and_copies_buffers():
    model = nn.BatchNorm1d(2)
    ema = EMA(model, 0.9)
    nn.init.constant_(model.weight, 11.0)
    model.running_mean.fill_(5.0)
    ema.update(model)
    torch.testing.assert_close(ema.model.weight, torch.full((2,), 1 + 10 * (1 - 2 / 11)))
    assert (ema.model.running_mean == 5).all() and not ema.model.weight.requires_grad and not ema.model.training
    for _ in range(200):
        ema.update(model)
    torch.testing.assert_close(ema.model.weight, torch.full((2,), 11.0))
