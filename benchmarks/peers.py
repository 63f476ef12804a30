"""Other methods on the same pairs, split, normalisation and minutes as PDS.

    pip install monai einops
    python -m benchmarks.peers --minutes 12 --seeds 3
    python -m benchmarks.peers --minutes 12 --out results/peers_lgg --data_root pairs.csv     [any options of main.py]

Each peer has a network per direction and half of the minutes for each; it sees the source resampled to the target's
grid, and learns from the training subjects of opt.fold, augmented as PDS's are. The networks are MONAI's, with
its defaults:

    residual U-Net     UNet with two residual units per level (Kerfoot et al. 2018); L1
    DynUNet            nnU-Net's network with residual blocks (Isensee et al. 2021); L1
    diffusion          DiffusionModelUNet on target and source (Pinaya et al. 2022), v, 1000 timesteps, DDIM; smaller
                       than its default, without attention, so that a CPU makes four times as many steps
    pix2pix            the residual U-Net with L1 and a 3-D patch discriminator (Isola et al. 2017), least squares
    copy, mean         the source resampled; the mean training volume

The rate of Adam, which decays linearly, is the best of --rates on the validation subjects after --search_minutes each.
PDS trains both stages in nine tenths of the minutes, divided as opt.epochs to opt.refine_epochs
(benchmarks/equal_time.py); the rest is for start, validation and pictures. All are scored on the test subjects, over
the whole volume. In --out: scores.csv and table.md. Finished runs are not repeated.
"""

import argparse
import itertools
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import equal_time
from benchmarks.comparison import table
from benchmarks.step import RSS_PER_GIB
from data.augment import PairTransform, load_batch
from data.study import Study, read_study
from models.diffusion import Purpose, keyed_generator
from models.layers import resize_to
from models.translator import known
from opt import PRESETS, opt
from training.batches import training_batch
from training.checkpoint import STAGE_2, read_checkpoint
from training.launch import choose_device
from training.optimise import DECAY_FRACTION
from utils.arguments import parse_arguments
from utils.files import write_table, write_text
from utils.metrics import score

PDS = "PDS, both stages"
PDS_TRAINS = 0.9  # of the minutes; the rest is for start, validation and pictures
LEVELS = 4  # of all networks; the grid is padded to a multiple of 2^(LEVELS - 1)
DDIM_STEPS, TIMESTEPS = 25, 1000
L1_WEIGHT = 100.0  # of pix2pix (Isola et al. 2017)
BETAS = {"pix2pix": (0.5, 0.999)}  # of Adam (Isola et al. 2017); of the others PyTorch's
METHODS = (PDS, "residual U-Net", "DynUNet", "diffusion", "pix2pix", "copy", "mean")


def build(method: str) -> nn.Module:
    """The network of one direction; volumes (B, channels, X, Y, Z)."""
    from monai.networks import nets
    if method == "DynUNet":
        return nets.DynUNet(3, 1, 1, [3] * LEVELS, [1] + [2] * (LEVELS - 1), [2] * (LEVELS - 1), res_block=True)
    if method == "diffusion":
        return nets.DiffusionModelUNet(3, 2, 1, channels=(16, 32, 64), attention_levels=(False,) * 3, num_res_blocks=1,
                                       norm_num_groups=16)
    return nets.UNet(3, 1, 1, [32 * 2**level for level in range(LEVELS)], [2] * (LEVELS - 1), num_res_units=2)


class Peer:
    """One direction of a peer on a device."""

    def __init__(self, method: str, study: Study, source: str, target: str, device: torch.device):
        from monai.networks.nets import PatchDiscriminator
        from monai.networks.schedulers import DDIMScheduler, DDPMScheduler
        self.method, self.study, self.source, self.target, self.device = method, study, source, target, device
        self.network = build(method).to(device)
        layers = 3 if min(study.sizes[target]) >= 24 else 2  # as many as the grid allows
        self.discriminator = (PatchDiscriminator(3, 32, 2, num_layers_d=layers).to(device) if method == "pix2pix"
                              else None)
        self.noising, self.sampling = (
            (each(TIMESTEPS, prediction_type="v_prediction") for each in (DDPMScheduler, DDIMScheduler))
            if method == "diffusion" else (None, None))

    def load(self, batch: list[int], transform: PairTransform | None = None) -> tuple[Tensor, Tensor]:
        """Source on the target's grid, and truth with NaN where unknown; both padded, (B, 1, X, Y, Z)."""
        volumes, _ = load_batch(self.study, batch, transform, self.device)
        truth = volumes[self.target]
        source = resize_to(known(volumes[self.source]), truth.shape[2:])
        padding = [end for n in reversed(truth.shape[2:]) for end in (0, -n % 2 ** (LEVELS - 1))]
        return F.pad(source, padding, value=-1.0), F.pad(truth, padding, value=math.nan)

    def losses(self, source: Tensor, truth: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of the network, and of the discriminator."""
        wanted = known(truth)
        if self.method == "diffusion":
            noise = torch.randn_like(wanted)
            t = torch.randint(0, TIMESTEPS, (len(truth),), device=self.device)
            noisy = self.noising.add_noise(wanted, noise, t)
            velocity = self.noising.get_velocity(wanted, noise, t)
            return F.mse_loss(self.network(torch.cat([noisy, source], dim=1), t), velocity), None
        made = self.network(source)
        loss = (made - truth).abs().nanmean()
        if self.discriminator is None:
            return loss, None
        fake, real = (torch.cat([source, volume], dim=1) for volume in (made, wanted))
        judged = self.discriminator(fake.detach())[-1], self.discriminator(real)[-1]
        of_discriminator = (judged[0].square().mean() + (judged[1] - 1).square().mean()) / 2
        self.discriminator.requires_grad_(False)
        loss = L1_WEIGHT * loss + (self.discriminator(fake)[-1] - 1).square().mean()
        self.discriminator.requires_grad_(True)
        return loss, of_discriminator

    def train(self, rate: float, seconds: float, settings) -> int:
        """Train for so long, with PDS's batches and augmentation; returns the number of steps."""
        networks = [network for network in (self.network, self.discriminator) if network]
        optimisers = [torch.optim.Adam(network.parameters(), rate, BETAS.get(self.method, (0.9, 0.999)))
                      for network in networks]
        start, step = time.perf_counter(), 0
        self.network.train()
        while (done := (time.perf_counter() - start) / seconds) < 1:
            batch = training_batch(self.study.roles["train"], [], settings.batch_size, settings.seed, step)
            kinds = [kind for kind in settings.augment if not (kind == "affine" and done >= 1 - DECAY_FRACTION)]
            generators = [keyed_generator(settings.seed, Purpose.AUGMENT, step, place) for place in range(len(batch))]
            source, truth = self.load(batch, PairTransform(kinds, self.study.modalities, self.study.extent, generators)
                                      if kinds else None)
            losses = [loss for loss in self.losses(source, truth) if loss is not None]
            for optimiser, loss in zip(optimisers, losses):
                optimiser.param_groups[0]["lr"] = rate * (1 - done)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            step += 1
        return step

    @torch.no_grad()
    def translate(self, i: int) -> np.ndarray:
        """(X, Y, Z) in [-1, 1]."""
        source, _ = self.load([i])
        self.network.eval()
        if self.method == "diffusion":
            made = torch.randn(source.shape, generator=torch.Generator().manual_seed(i)).to(self.device)
            self.sampling.set_timesteps(DDIM_STEPS)
            for t in self.sampling.timesteps:
                velocity = self.network(torch.cat([made, source], dim=1), t[None].to(self.device))
                made, _ = self.sampling.step(velocity, t, made)
        else:
            made = self.network(source)
        X, Y, Z = self.study.sizes[self.target]
        return made[0, 0, :X, :Y, :Z].clamp(-1, 1).cpu().numpy()


def run_peer(method: str, rate: float, minutes: float, role: str, settings) -> dict:
    """Train both directions in this process; returns what it took, and the scores of the subjects of a role."""
    device, study, run, rows = choose_device(settings.device), read_study(settings), {"steps": 0, "parameters": 0}, []
    for source, target in (study.modalities, study.modalities[::-1]):
        torch.manual_seed(settings.seed)
        peer = Peer(method, study, source, target, device)
        run["steps"] += peer.train(rate, 60 * minutes / 2, settings)
        run["parameters"] += sum(p.numel() for p in peer.network.parameters())
        rows += score_all(study, role, source, target, peer.translate)
    peak = (torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / RSS_PER_GIB)
    return {"rate": rate, "minutes": minutes, "peak_gib": peak, **run, "rows": rows}


def score_all(study: Study, role: str, source: str, target: str, translate: Callable[[int], np.ndarray]) -> list[dict]:
    """Scores of the whole volumes of a role."""
    return [{"subject": study.pairs[i].name, "direction": f"{source}->{target}",
             **score(translate(i), study.volumes([i])[target][0, 0].numpy(), {})["volume"]} for i in study.roles[role]]


def run_baseline(method: str, settings) -> dict:
    """"copy" or "mean"."""
    study, rows = read_study(settings), []
    means = study.mean_volumes()
    for source, target in (study.modalities, study.modalities[::-1]):
        def translate(i: int, source=source, target=target) -> np.ndarray:
            made = means[target] if method == "mean" else resize_to(known(study.volumes([i])[source]),
                                                                    torch.Size(study.sizes[target]))
            return made[0, 0].numpy()
        rows += score_all(study, "test", source, target, translate)
    return {"rate": None, "minutes": 0.0, "peak_gib": None, "steps": 0, "parameters": 0, "rows": rows}


def run_pds(folder: Path, minutes: float, settings, options: list[str]) -> dict:
    """Both stages, and their scores."""
    costs = equal_time.plan(options)
    run = equal_time.train(folder, costs, PDS_TRAINS * minutes, options)
    pairs = equal_time.pairs_of("test", settings)
    rows = equal_time.scores(folder / "best_refine.pth", pairs, settings)
    network = read_checkpoint(folder / "best_refine.pth", (STAGE_2,))["ema"]["model"]
    return {"rate": None, "minutes": run["measured_minutes"], "peak_gib": costs["peak_gib"],
            "steps": run["steps_1"] + run["steps_2"],
            "parameters": sum(weight.numel() for name, weight in network.items() if not name.endswith("mean")),
            "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--minutes", type=float, required=True, help="of training, both directions together")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--search_minutes", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=Path("results/peers"))
    own, options = parser.parse_known_args()
    options = ["--incomplete=leave_out", *options]  # all methods learn from the same pairs
    own.out, rows, text = own.out.resolve(), [], ""

    def kept(name: str, words: list[str], make: Callable[[list[str]], dict]) -> dict:
        """A run from its file, or else made and written there."""
        path = own.out / f"{name}.json"
        found = json.loads(path.read_text()) if path.exists() else None
        if found and found["options"] != words:
            raise SystemExit(f"{path}: has other options, {found['options']}; use them, or another --out")
        if not found:
            print(f"---- {name}", flush=True)
            found = {"options": words, **make(words)}
            write_text(path, json.dumps(found))
        return found

    def train(method: str, rate: float, minutes: float, role: str) -> Callable[[list[str]], dict]:
        def make(words: list[str]) -> dict:  # in a process of its own, whose memory is measured
            case = [sys.executable, "-m", "benchmarks.peers", "--case", method, str(rate), str(minutes), role, *words]
            done = subprocess.run(case, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise SystemExit(f"{method}: failed; see the message above")
            return json.loads(done.stdout.splitlines()[-1])
        return make

    for seed, method in itertools.product(range(own.seeds), own.methods):
        words = [*options, f"--seed={seed}"]
        settings = parse_arguments(opt, PRESETS, words, "")
        name = f"{method}, seed {seed}"
        if method == PDS:
            run = kept(name, words, lambda words: run_pds(own.out / name, own.minutes, settings, words))  # noqa: B023
        elif method in ("copy", "mean"):
            run = kept(name, words, lambda words: run_baseline(method, settings))  # noqa: B023
        else:
            found = {rate: kept(f"{method}, rate {rate:g}", [*options, "--seed=0"],
                                train(method, rate, own.search_minutes, "validation")) for rate in own.rates}
            best = max(found, key=lambda rate: np.mean([row["psnr"] for row in found[rate]["rows"]]))
            run = kept(name, words, train(method, best, own.minutes, "test"))
        costs = {**{name: run[name] for name in ("minutes", "steps", "peak_gib")}, "weights": run["parameters"] or None}
        rows += [{"method": method, "seed": seed, **row, **costs} for row in run["rows"]]
        write_table(own.out / "scores.csv", tuple(rows[0]), rows, ".5f")
        names = tuple(name for name in run["rows"][0] if name not in ("subject", "direction"))
        text = table(rows, "method", PDS, scores=names, costs={"minutes": 1, "steps": 0, "weights": 0, "peak_gib": 1})
        write_text(own.out / "table.md", text)
    print(text, end="")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--case"]:
        method, rate, minutes, role = sys.argv[2:6]
        print(json.dumps(run_peer(method, float(rate), float(minutes), role,
                                  parse_arguments(opt, PRESETS, sys.argv[6:], ""))))
    else:
        main()
