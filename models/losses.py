"""The losses: pattern-aware (stage 1); tissue, structure, microstructure (stage 2). Volumes are (B, 1, X, Y, Z)."""

import functools
import hashlib
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VGG16_Weights, vgg16

from utils.errors import UserError
from utils.files import open_regular
from utils.metrics import SSIM_RADIUS, SSIM_SIGMA
from utils.tensors import UNREADABLE, load_weights, one_line, read_tensors

SSIM_C1, SSIM_C2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # for a data range of 2
VGG16_URL = VGG16_Weights.IMAGENET1K_V1.url
VGG16_LAYERS = (3, 8, 15)  # relu1_2, relu2_2, relu3_3 (Johnson et al. 2016)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ERRORS = {"l1": torch.abs, "l2": torch.square}  # opt.loss -> of a voxel


def pattern_aware_loss(prediction: Tensor, target: Tensor, mask: Tensor, weight: float, kind: str = "l1") -> Tensor:
    """(B,) means over voxels of (1 + weight mask) |prediction - target| (arXiv 2511.04963), or another of ERRORS.

    mask: (B, 1, X, Y, Z), 1 inside the disease-related networks.
    """
    return ((1 + weight * mask) * ERRORS[kind](prediction - target)).mean(dim=(1, 2, 3, 4))


def tissue_loss(refined: Tensor, truth: Tensor, mask: Tensor, weight: float) -> Tensor:
    """Mean squared plus mean absolute error, weighted by (1 + weight mask) as in stage 1."""
    error = refined - truth
    return ((1 + weight * mask) * (error.square() + error.abs())).mean()


def projections(volume: Tensor) -> list[Tensor]:
    """The means of (B, 1, X, Y, Z) along each axis, almost free of noise: (B, 1, Y, Z), (B, 1, X, Z), (B, 1, X, Y)."""
    return [volume.mean(dim=axis) for axis in (2, 3, 4)]


def microstructure_loss(refined: Tensor, truth: Tensor) -> Tensor:
    """Mean absolute error of the three orthogonal mean projections and of their gradients."""
    loss = refined.new_zeros(())
    for difference in projections(refined - truth):  # (B, 1, two axes); the projection is linear
        loss = loss + difference.abs().mean() + sum(difference.diff(dim=along).abs().mean() for along in (2, 3))
    return loss / 3


def structure_loss(refined: Tensor, truth: Tensor) -> Tensor:
    """1 - SSIM (Wang et al. 2004; as a loss Zhao et al. 2017), as in utils/metrics.py: Gaussian window, range 2."""
    a, b = refined.float(), truth.float()
    maps = gaussian_means(torch.cat([a, b, a * a, b * b, a * b], dim=1))
    mean_a, mean_b, aa, bb, ab = maps.chunk(5, dim=1)
    var_a, var_b, cov = aa - mean_a**2, bb - mean_b**2, ab - mean_a * mean_b
    ssim = ((2 * mean_a * mean_b + SSIM_C1) * (2 * cov + SSIM_C2)
            / ((mean_a**2 + mean_b**2 + SSIM_C1) * (var_a + var_b + SSIM_C2)))
    return 1 - ssim.mean()


def gaussian_means(x: Tensor) -> Tensor:
    """Gaussian means of (B, C, X, Y, Z) wherever the whole window fits: each axis loses 2 SSIM_RADIUS voxels."""
    for axis in (2, 3, 4):  # a banded matrix per axis: much faster on a CPU than a convolution of few channels
        x = torch.movedim(torch.movedim(x, axis, -1) @ gaussian_band(x.shape[axis], x.device, x.dtype).T, -1, axis)
    return x


@functools.cache  # recorded steps read it, so it must stay
def gaussian_band(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(n - 2 SSIM_RADIUS, n): row k has the window's weights from column k on."""
    places = torch.arange(-SSIM_RADIUS, SSIM_RADIUS + 1, device=device, dtype=dtype)
    weights = torch.exp(-0.5 * (places / SSIM_SIGMA) ** 2)
    weights = weights / weights.sum()
    return torch.stack([F.pad(weights, (k, n - len(weights) - k)) for k in range(n - len(weights) + 1)])


def x0_error(x0: Tensor, truth: Tensor) -> Tensor:
    """Unweighted mean absolute error (B,) of an estimate of x0 where the truth is known; the same for all settings."""
    return (x0 - truth).abs().nanmean(dim=(1, 2, 3, 4))


class PerceptualLoss(nn.Module):
    """Relative distance of VGG16 features of the mean projections of two volumes (B, 1, X, Y, Z) in [-1, 1].

    weights: a state dict of torchvision's VGG16, of which only "features..." is used; all is frozen. Raises one of
    UNFIT (utils/tensors.py) where the weights do not fit or are not finite.
    """

    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        with torch.device("meta"):
            features = vgg16(weights=None).features[:VGG16_LAYERS[-1] + 1]
        self.features = features.to_empty(device="cpu")
        load_weights(self.features, {name: weights[f"features.{name}"] for name in features.state_dict()})
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, refined: Tensor, truth: Tensor) -> Tensor:
        """Mean over pairs, views and layers of sum |difference of features| / sum |features of the truth|; no unit."""
        loss = refined.new_zeros(())
        for made, real in zip(projections(refined.float()), projections(truth.float())):
            made, real = (((each + 1) / 2 - self.mean) / self.std for each in (made, real))  # (B, 3, two axes)
            for number, layer in enumerate(self.features):
                made = layer(made)
                with torch.no_grad():
                    real = layer(real)
                if number in VGG16_LAYERS:
                    size = real.abs().flatten(1).sum(dim=1) + 1e-6
                    loss = loss + ((made - real).abs().flatten(1).sum(dim=1) / size).mean()
        return loss / (3 * len(VGG16_LAYERS))


def load_perceptual_loss(file: str, download: bool) -> PerceptualLoss | None:
    """With the weights in `file`, or else in the cache of torch.hub, whose file name ends in its hash.

    Prints a note and returns None where there are none; with `download` they are fetched first. Raises UserError.
    """
    name = VGG16_URL.rsplit("/", 1)[1]  # vgg16-HASH.pth
    path = Path(file) if file else Path(torch.hub.get_dir()) / "checkpoints" / name
    try:
        if not file and not os.path.exists(path):  # False where the cache cannot even be looked at
            if not download:
                print(f"note: no weights of VGG16 at {path}: training without the loss on its features. Put "
                      "torchvision's file there, name one in opt.vgg_weights, or set opt.vgg_download = True")
                return None
            torch.hub.load_state_dict_from_url(VGG16_URL, map_location="cpu", check_hash=True, weights_only=True)
        if not file:
            with open_regular(path) as weights:
                if not hashlib.sha256(weights.read()).hexdigest().startswith(path.stem.rsplit("-", 1)[1]):
                    raise ValueError("damaged: its hash is not the one in its name")
        return PerceptualLoss(read_tensors(path, "a state dict"))
    except UNREADABLE as error:
        raise UserError(f"{path}: cannot be used as the weights of torchvision's VGG16 ({one_line(error)}). Put the "
                        f"file of {VGG16_URL} there, name it in opt.vgg_weights, or set opt.perceptual_weight = 0"
                        ) from error
