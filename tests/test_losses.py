"""The losses: known values, scikit-image's SSIM, and the weights of VGG16."""

import hashlib
from unittest.mock import Mock

import pytest
import torch

from models import losses
from models.losses import PerceptualLoss, load_perceptual_loss, microstructure_loss, structure_loss, tissue_loss
from utils.errors import UserError
from utils.metrics import score


def test_known_errors_have_known_losses():
    prediction, truth, mask = torch.zeros(2, 1, 2, 2, 2), torch.ones(2, 1, 2, 2, 2), torch.zeros(2, 1, 2, 2, 2)
    mask[:, :, 0], truth[1] = 1, 3
    assert losses.pattern_aware_loss(prediction, truth, mask, 0.0).tolist() == [1, 3]
    assert losses.pattern_aware_loss(prediction, truth, mask, 1.0).tolist() == [1.5, 4.5]
    assert losses.pattern_aware_loss(prediction, truth, mask, 1.0, "l2").tolist() == [1.5, 13.5]
    assert losses.x0_error(prediction, truth).tolist() == [1, 3]
    assert tissue_loss(truth + 0.5, truth, 0 * mask, 1.0).item() == pytest.approx(0.75)
    assert tissue_loss(truth + 0.5, truth, mask, 1.0).item() == pytest.approx(1.125)
    assert microstructure_loss(truth + 0.5, truth).item() == pytest.approx(0.5)  # values differ, gradients do not
    assert tissue_loss(truth, truth, mask, 1.0) == microstructure_loss(truth, truth) == 0
    alternating, ramp = torch.tensor([1.0, -1.0]).repeat(1, 1, 3, 5, 2), torch.linspace(0, 1, 4).expand(1, 1, 3, 5, 4)
    assert microstructure_loss(alternating, 0 * alternating) > microstructure_loss(ramp, 0 * ramp)


def test_structure_loss_is_one_minus_the_ssim_of_scikit_image():
    truth = torch.rand(2, 1, 13, 11, 16) * 2 - 1
    refined = (truth + 0.3 * torch.randn(truth.shape)).clamp(-1, 1)
    expected = [score(a[0].numpy(), b[0].numpy(), {})["volume"]["ssim"] for a, b in zip(refined, truth)]
    assert structure_loss(refined, truth).item() == pytest.approx(1 - sum(expected) / 2, abs=1e-5)
    assert structure_loss(truth, truth).item() == pytest.approx(0, abs=1e-6)


def test_the_perceptual_loss_grows_with_the_difference_and_is_a_mean_over_pairs(vgg_weights):
    loss, truth = PerceptualLoss({**vgg_weights, "classifier.0.weight": torch.zeros(1)}), torch.rand(3, 1, 12, 13, 11)
    refined = (truth + 0.1 * torch.randn(truth.shape)).requires_grad_()
    near = loss(refined, truth)
    near.backward()
    assert loss(truth, truth) == 0 < near < loss(-truth, truth) and refined.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    split = loss(refined[:1], truth[:1]) / 3 + loss(refined[1:], truth[1:]) * 2 / 3
    assert split.item() == pytest.approx(near.item(), rel=1e-5)


def test_unusable_weights_are_refused(tmp_path, vgg_weights):
    for name, content in (("nan", {**vgg_weights, "features.0.bias": torch.full((64,), float("nan"))}),
                          ("list", [1, 2]), ("shape", {"features.0.weight": torch.zeros(3)})):
        torch.save(content, tmp_path / name)
    (tmp_path / "html").write_bytes(b"<html>")
    for name in ("nan", "list", "shape", "html", "missing"):
        with pytest.raises(UserError, match=f"{name}: .*opt.vgg_weights"):
            load_perceptual_loss(str(tmp_path / name), False)


def test_weights_are_downloaded_only_on_request_and_checked(tmp_path, vgg_weights, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=OSError("no network")))
    cached = tmp_path / "hub/checkpoints/vgg16-397923af.pth"
    with pytest.raises(UserError, match="no network"):
        load_perceptual_loss("", True)
    cached.parent.mkdir(parents=True, exist_ok=True)
    torch.save(vgg_weights, cached)
    with pytest.raises(UserError, match="its hash is not the one in its name"):
        load_perceptual_loss("", False)
    digest = hashlib.sha256(cached.read_bytes()).hexdigest()
    cached.rename(cached.with_name(f"vgg16-{digest[:8]}.pth"))
    monkeypatch.setattr(losses, "VGG16_URL", f"https://example.org/vgg16-{digest[:8]}.pth")
    assert isinstance(load_perceptual_loss("", False), PerceptualLoss)
