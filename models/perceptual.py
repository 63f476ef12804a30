"""The part of the microstructure loss that needs pretrained weights: VGG16 features of three orthogonal projections."""

from __future__ import annotations

import hashlib
import pickle
import struct
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import VGG16_Weights, vgg16

from models.losses import projections

LAYERS = (3, 8, 15)  # of VGG16's features: relu1_2, relu2_2, relu3_3 (Johnson et al. 2016)
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the images that it was trained on
NO_WEIGHTS = (OSError, pickle.UnpicklingError, struct.error, RuntimeError, EOFError, AttributeError, TypeError,
              ValueError, AssertionError, LookupError)  # what torch.load and a state dict that is none raise
URL = VGG16_Weights.IMAGENET1K_V1.url


class WeightsError(ValueError):
    """Weights of VGG16 that cannot be used; the message names the file, and what to do."""


class PerceptualLoss(nn.Module):
    """Relative distance of VGG16 features of the mean projections of two volumes (B, 1, X, Y, Z) in [-1, 1].

    weights: a state dict of torchvision's VGG16 (only "features..." is used); all is frozen. Raises RuntimeError, or
    another of NO_WEIGHTS, where it is none.
    """

    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        with torch.device("meta"):
            self.features = vgg16(weights=None).features[:LAYERS[-1] + 1]
        wanted = {name: f"features.{name}" for name in self.features.state_dict()}
        self.features.load_state_dict({name: weights[key].float() for name, key in wanted.items() if key in weights},
                                      assign=True)
        if not all(each.isfinite().all() for each in self.features.state_dict().values()):
            raise RuntimeError("it has values that are not finite")
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, refined: Tensor, truth: Tensor) -> Tensor:
        """Mean over pairs, views and layers of sum |difference of features| / sum |features of the truth|; no unit."""
        loss = refined.new_zeros(())
        for made, real in zip(projections(refined.float()), projections(truth.float())):
            made, real = (((each + 1) / 2 - self.mean) / self.deviation for each in (made, real))  # (B, 3, two axes)
            for number, layer in enumerate(self.features):
                made = layer(made)
                with torch.no_grad():
                    real = layer(real)
                if number in LAYERS:
                    size = real.abs().flatten(1).sum(dim=1) + 1e-6
                    loss = loss + ((made - real).abs().flatten(1).sum(dim=1) / size).mean()
        return loss / (3 * len(LAYERS))


def cached_weights() -> Path:
    """Where torchvision and torch.hub keep the weights of VGG16 on this machine."""
    return Path(torch.hub.get_dir()) / "checkpoints" / URL.rsplit("/", 1)[1]


def load_perceptual_loss(file: str, download: bool) -> PerceptualLoss | None:
    """With the weights in `file`, or in torch.hub's cache (there the hash in the file's name is checked).

    None where no file is given and the cache has none; with `download` it is fetched to there. Raises WeightsError.
    """
    path = Path(file).expanduser() if file else cached_weights()
    if not file and not there(path):
        if not download:
            return None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(path), hash_prefix=hash_in_name(path))
        except (OSError, RuntimeError) as error:  # no connection, no space, another hash
            raise WeightsError(f"opt.vgg_download = True: {URL} could not be fetched to {path} ({told(error)}); put "
                               "the file there yourself, or set opt.vgg_download = False") from error
    try:
        intact = file or hashlib.sha256(path.read_bytes()).hexdigest().startswith(hash_in_name(path))
        loss = PerceptualLoss(torch.load(path, map_location="cpu", weights_only=True)) if intact else None
    except NO_WEIGHTS as error:
        raise WeightsError(f"{path}: holds no weights of torchvision's VGG16 ({told(error)}); give opt.vgg_weights a "
                           'state dict of it, or "" to look in the cache of torch.hub') from error
    if not intact:
        raise WeightsError(f"{path}: is damaged, its hash is not that in its name; remove the file")
    return loss


def there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a folder that may not be looked into, a name too long: for us there is nothing
        return False


def hash_in_name(path: Path) -> str:
    """The first digits of the SHA-256 of a file of torchvision's, as its name has them."""
    return path.stem.rsplit("-", 1)[1]


def told(error: Exception) -> str:
    """What an error says, on one line."""
    return " ".join((str(error) or type(error).__name__).split())[:200]
