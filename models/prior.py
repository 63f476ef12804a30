"""The stage-1 model in one place: network, diffusion process and groups; its loss, its denoiser, its samples."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.diffusion import Diffusion, Volumes, keyed_noise
from models.losses import pattern_aware_loss
from models.samplers import Denoiser, Sampling, ddim, dpmpp, timestep_spacing
from models.translator import Translator, known
from models.unet import DualModalUNet, NetworkConfig
from utils.device import to_device
from utils.stop import Interrupted, stop
from utils.tensors import build

EXPECTED_WEIGHT = 4.0  # in the loss (docs/results.md)


@dataclass(frozen=True, eq=False)
class Prior:
    """The joint prior of both modalities. Volumes are {modality: (B, 1, X, Y, Z)} in [-1, 1].

    network: DualModalUNet, bare or in DistributedDataParallel. coupling: of the timesteps, as in opt.timestep_coupling.
    groups: the names of the diagnostic groups that the network distinguishes; empty without opt.condition_on_group.
    """

    network: nn.Module
    diffusion: Diffusion
    coupling: str
    sizes: dict[str, tuple[int, int, int]]
    device: torch.device
    dtype: torch.dtype
    groups: tuple[str, ...] = ()

    @classmethod
    def from_checkpoint(cls, state: dict, device: torch.device, dtype: torch.dtype) -> "Prior":
        """The frozen EMA model of a stage-1 checkpoint's content. Raises one of UNFIT (utils/tensors.py) where its
        weights do not fit."""
        groups, options = tuple(state.get("groups", ())), state["options"]
        network = build(lambda: DualModalUNet(state["sizes"], NetworkConfig(**state["network"]), len(groups)),
                        state["ema"]["model"])
        return cls(network.to(device).eval().requires_grad_(False),
                   Diffusion(options["timesteps"], options["prediction"]), options["timestep_coupling"],
                   network.sizes, device, dtype, groups)

    def autocast(self) -> torch.autocast:
        """The context in which the networks of both stages run."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def predict(self, xt: Volumes, t: Volumes, targets=None, group: Tensor | None = None) -> Volumes:
        """The network's prediction (epsilon or v) for each target."""
        with self.autocast():
            return self.network(xt, t, targets, group)

    def expects(self, target: str, t: Volumes) -> Tensor:
        """Whether the network learns the expected volume at these timesteps, (B,) bool: then the target has no noise.
        """
        (source,) = t.keys() - {target}
        return (t[source] == 0) & (t[target] == self.diffusion.timesteps) & self.has_expected_volume

    def loss(self, target: str, x0: Volumes, noise: Volumes, t: Volumes, expected: Tensor, group: Tensor | None,
             mask: Tensor, pattern_weight: float, kind: str) -> Tensor:
        """The pattern-aware loss (B,) of predicting one modality from both noisy volumes. mask: (B, 1, X, Y, Z).

        Where x0 is NaN, nothing is known: the network sees background, and any prediction is right.
        expected: from `expects`, (B,); the target's noise is 0 there. Expected volumes count EXPECTED_WEIGHT times:
        where noise is predicted, errors are several times as large.
        """
        unknown, x0 = x0[target].isnan(), {modality: known(volume) for modality, volume in x0.items()}
        xt = {modality: self.diffusion.add_noise(x0[modality], noise[modality], t[modality]) for modality in x0}
        xt[target] = xt[target].masked_fill(expected.view(-1, 1, 1, 1, 1), 0)  # at T, not even its last trace of x0
        predicted = self.predict(xt, t, {target}, group)[target]
        wanted = torch.where(unknown, predicted.detach(), self.diffusion.target(x0[target], noise[target], t[target]))
        weights = 1 + (EXPECTED_WEIGHT - 1) * expected
        return weights * pattern_aware_loss(predicted, wanted, mask, pattern_weight, kind)

    @property
    def has_expected_volume(self) -> bool:
        """Whether one evaluation at t = T translates: an error of epsilon would be magnified by 1 / sqrt(alpha_bar_T),
        over 20,000 for T = 1000, and with shared timesteps the source is noise at T, too."""
        return self.diffusion.prediction == "v" and self.coupling == "independent"

    def expected(self, target: str, volume: Tensor, flips: bool = False) -> Tensor:
        """The expected volume E[x0 | source] of a modality (models/translator.py), from source volumes."""
        with self.autocast():
            translator = Translator(self.network, self.diffusion.timesteps)
            return translator.translate(target, volume.to(self.device), flips=flips)

    def translate(self, target: str, volume: Tensor, keys: list[tuple[int, ...]], sampling: Sampling,
                  flips: bool = False) -> Tensor:
        """The expected volume, or one sample per key where the model has none."""
        if self.has_expected_volume:
            return self.expected(target, volume, flips)
        return self.sample(keys, sampling, {self.network.source(target): volume})[target]

    def group_indices(self, groups: list[str]) -> Tensor:
        """The networks' numbers (B,) of these groups: from 1, and 0 for every other name."""
        return to_device(torch.tensor([self.groups.index(group) + 1 if group in self.groups else 0
                                       for group in groups]), self.device)

    def denoiser(self, noise: Volumes, given: Volumes, group: Tensor | None = None,
                 record: list | None = None) -> Denoiser:
        """A function (volumes, t) -> estimates of x0, of every modality that is not given.

        With independent timesteps the network sees a given modality clean, at t = 0; with shared timesteps it is
        replaced at every step by its noised version. At T it sees no noise, as in training: the first estimate of a
        translation is the expected volume. record: collects (t, noisy volumes, estimates) of the first sample, as
        arrays (X, Y, Z). Raises Interrupted once a stop is requested.
        """
        wanted, independent = noise.keys() - given.keys(), self.coupling == "independent"

        def denoise(x: Volumes, now: int) -> Volumes:
            if stop:
                raise Interrupted
            xt = dict(x)
            t = {modality: torch.full((len(volume),), now, device=self.device) for modality, volume in noise.items()}
            for modality, volume in given.items():
                if independent:
                    xt[modality], t[modality] = volume, torch.zeros_like(t[modality])
                else:
                    xt[modality] = self.diffusion.add_noise(volume, noise[modality], t[modality])
            if given and now == self.diffusion.timesteps and self.has_expected_volume:
                xt |= {modality: torch.zeros_like(xt[modality]) for modality in wanted}
            output = self.predict(xt, t, wanted, group)
            x0 = {modality: self.diffusion.to_x0(xt[modality], output[modality].to(xt[modality].dtype), t[modality])
                  for modality in noise if modality in wanted}
            if record is not None:
                record.append((now, *({modality: volume[0, 0].float().cpu().numpy()
                                       for modality, volume in volumes.items()} for volumes in (xt, x0))))
            return x0

        return denoise

    @torch.no_grad()
    def sample(self, keys: list[tuple[int, ...]], sampling: Sampling, given: Volumes | None = None,
               groups: list[str] | None = None, record: list | None = None) -> Volumes:
        """One sample of every modality per noise key; given modalities stay as they are.

        groups: the group of each sample, by name. record: as for `denoiser`.
        """
        noise = {modality: volume.to(self.device) for modality, volume in keyed_noise(self.sizes, *keys).items()}
        given = {modality: known(volume).to(self.device) for modality, volume in (given or {}).items()}
        denoise = self.denoiser(noise, given, self.group_indices(groups) if groups else None, record)
        times = timestep_spacing(self.diffusion.timesteps, sampling.steps, sampling.sampler)
        if sampling.sampler == "dpmpp":
            return {**dpmpp(denoise, noise, times, self.diffusion.alpha_bar), **given}

        def fresh_noise(t: int) -> Volumes:
            fresh = keyed_noise(self.sizes, *((*key, t) for key in keys))
            return {modality: volume.to(self.device) for modality, volume in fresh.items()}

        return {**ddim(denoise, noise, times, self.diffusion.alpha_bar, sampling.eta, fresh_noise), **given}
