"""Stage 2: train the stage-1 network on as a translator of each modality into the other one.

    python main.py --refine --resume_path ./checkpoints/best_model.pth

Writes checkpoints/best_refine.pth and last_refine.pth (with the backbone inside), and in results/refine/ log.csv,
metrics.csv of the test subjects, sample grids and the refined volumes. The loop is training/loop.py.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from data.atlas import region_masks
from data.augment import load_batch
from data.intensity import brain_region
from data.study import Study
from models.diffusion import Purpose
from models.losses import load_perceptual_loss, microstructure_loss, structure_loss, tissue_loss
from models.prior import Prior
from models.translator import Translator
from models.unet import DualModalUNet, NetworkConfig
from opt import names_affecting
from training.back_translation import error_spectra, texture, with_texture
from training.checkpoint import STAGE_1, STAGE_2, Checkpoint, content_hash, read_checkpoint, refuse_another_run
from training.coarse import CoarseVolumes
from training.distributed import is_main_rank, local_main_first, shard
from training.launch import set_precision
from training.loop import Stage
from utils.device import to_device
from utils.errors import UserError
from utils.metrics import basic_scores, psnr, quality, score, summary, write_metrics
from utils.stop import interruptible
from utils.tensors import UNFIT

save_every = 100  # steps between two sample grids in results/

BACKBONE_KEYS = ("stage", "step", "best", "run_id", "options", "fingerprints", "ranges", "affines", "groups",
                 "alignment")
VGG = "weights of VGG16 (opt.vgg_weights; opt.perceptual_weight = 0 trains without them)"  # a fingerprint of the run


class Stage2(Stage):
    """state: the content of opt.resume_path, a checkpoint of either stage."""

    name, folder_name, save_every = STAGE_2, "refine", save_every
    columns = ("kind", "step", "epoch", "loss", "tissue_loss", "structure_loss", "microstructure_loss",
               "perceptual_loss", "gradient_norm", "learning_rate", "psnr", "ssim")
    metrics, higher_is_better = ("psnr",), True

    def __init__(self, opt, study: Study, device: torch.device, state: dict):
        super().__init__(opt, study, device)
        self.dtype = set_precision(opt.precision, device)
        backbone = state if state["stage"] == STAGE_1 else state["backbone"]
        self.prior = open_prior(opt, study, backbone, device, self.dtype)
        prior_hash = content_hash(self.prior.network)
        self.coarse = CoarseVolumes(opt, study, self.prior, prior_hash)
        torch.manual_seed(opt.seed)
        network = DualModalUNet(study.sizes, NetworkConfig(**backbone["network"]), len(self.prior.groups)).to(device)
        if opt.coarse == "expected":  # start as the prior's answer
            network.load_state_dict(self.prior.network.state_dict())
        else:
            network.set_means({target: self.prior.network.net(target).mean for target in study.modalities})
        network.set_recompute(opt.gradient_checkpointing)
        self.network = Translator(network, self.prior.diffusion.timesteps)
        with local_main_first():  # one rank per machine downloads
            perceptual = load_perceptual_loss(opt.vgg_weights, opt.vgg_download) if opt.perceptual_weight else None
        self.perceptual = perceptual and perceptual.to(device)
        self.terms = {"structure_loss": (opt.structure_weight, structure_loss),
                      "microstructure_loss": (opt.microstructure_weight, microstructure_loss),
                      "perceptual_loss": (opt.perceptual_weight if self.perceptual else 0.0, self.perceptual)}
        self.epochs, self.learning_rate, self.optimiser = (opt.refine_epochs, opt.refine_learning_rate,
                                                           opt.refine_optimiser)
        self.metadata["fingerprints"] |= {
            "backbone": prior_hash,
            VGG: f"{opt.perceptual_weight} {content_hash(self.perceptual)}" if self.perceptual else ""}
        self.metadata["backbone"] = {**{key: backbone[key] for key in BACKBONE_KEYS if key in backbone},
                                     "ema": {"model": backbone["ema"]["model"]}}
        self.may_change = names_affecting("nothing", "stage 1", "sample.py")
        self.resume_from = Path(opt.resume_path) if state["stage"] == STAGE_2 else None
        if opt.coarse == "expected":
            self.incomplete = study.roles.get("incomplete", [])

    def begin(self) -> None:
        self.coarse.prepare()
        if self.incomplete:
            self.spectra = error_spectra(self.prior, self.study)

    def load(self, target: str, places: list[int], batch: list[int], step: int) -> tuple:
        """Source, truth, mask of the truth and, if the network is given one, coarse volume, each (B, 1, X, Y, Z); the
        indices of missing sources, and their texture."""
        members, transform = [batch[place] for place in places], self.transform(step, places)
        volumes, masks = load_batch(self.study, members, transform, self.device)
        coarse = self.coarse.input(target, members)
        if coarse is not None:
            coarse = to_device(coarse, self.device)
            coarse = transform.volume(target, coarse) if transform else coarse
        source = self.prior.network.source(target)
        absent = [place for place, i in enumerate(members) if not self.study.has(source, i)]
        keys = [(self.opt.seed, Purpose.TEXTURE, step, places[place]) for place in absent]
        noise = texture(self.spectra[source], self.study.sizes[source], *keys) if absent else torch.empty(0)
        return (volumes[source], volumes[target], masks[target], coarse,
                to_device(torch.tensor(absent, dtype=torch.long), self.device), to_device(noise, self.device))

    def loss(self, network: nn.Module, target: str, data: tuple) -> tuple[Tensor, dict[str, Tensor]]:
        source, truth, mask, coarse, absent, noise = data
        with self.prior.autocast():
            if len(absent):  # back-translation: a synthetic source, by the weights of this step, for a real target
                made = self.ema_model.translate(self.prior.network.source(target), truth[absent])
                source = source.index_copy(0, absent, with_texture(made.to(source.dtype), noise))
            refined = network(target, source, coarse)
        truth = torch.where(truth.isnan(), refined.detach(), truth)  # where nothing is known, any answer is right
        loss = tissue_loss(refined, truth, mask, self.opt.pattern_weight)
        logged = {"tissue_loss": loss}
        for name, (weight, term) in self.terms.items():
            if weight:
                logged[name] = term(refined, truth)
                loss = loss + weight * logged[name]
        return loss, logged

    def refined(self, network: Translator, target: str, i: int, flips: bool = False) -> Tensor:
        """The refined volume (1, 1, X, Y, Z) of pair i in [-1, 1], on the CPU."""
        source = self.study.volumes([i], self.device)[self.prior.network.source(target)]
        coarse = self.coarse.input(target, [i])
        coarse = coarse if coarse is None else coarse.to(self.device)
        with self.prior.autocast():
            return network.translate(target, source, coarse, flips).cpu()

    def validate(self, network: Translator) -> Iterator[tuple[str, float]]:
        """PSNR in dB of the refined validation volumes, both directions."""
        for i in interruptible(shard(self.study.roles["validation"])):
            truth = self.study.volumes([i])
            for _, target in self.prior.network.directions:
                yield "psnr", psnr((self.refined(network, target, i) - truth[target]).numpy())

    def draw(self, network: Translator, step: int) -> tuple[Path, dict[str, float]]:
        """Source, coarse, refined, truth and difference of validation subjects; the refined volumes as NIfTI."""
        study, rows, scores = self.study, [], []
        for i in interruptible(study.roles["validation"][:self.opt.num_samples]):
            pair, real, masks = study.pairs[i], study.volumes([i]), study.masks([i])
            for source, target in self.prior.network.directions:
                coarse, refined = self.coarse.volumes(target, [i]), self.refined(network, target, i)
                coarse, refined, truth = (each[0, 0].numpy() for each in (coarse, refined, real[target]))
                coarse_scores, refined_scores = (basic_scores(each, truth) for each in (coarse, refined))
                rows.append((f"{pair.name}\n{source} -> {target}\n{pair.group}", [
                    self.panel(source, i, real[source][0, 0].numpy()),
                    self.panel(target, i, coarse, quality(coarse_scores)),
                    self.panel(target, i, refined, quality(refined_scores)),
                    self.panel(target, i, truth, outline=masks[target][0, 0].numpy() > 0),
                    self.panel(target, i, refined - truth, kind="difference")]))
                scores.append(refined_scores)
                self.write_sample(target, i, refined, "refined", step)
        return self.write_grid(step, ["source", "coarse", "refined", "truth", "refined minus truth"], rows, scores)

    def finish(self, run: Checkpoint) -> None:
        """Score the best model on the test subjects: metrics.csv, and a table."""
        if not is_main_rank():
            return
        self.network.load_state_dict(read_checkpoint(run.best, (STAGE_2,))["ema"]["model"])
        rows = self.report(self.network.eval())
        write_metrics(self.folder / "metrics.csv", rows)
        print(f"\nStage 2 is finished: {run.step} steps, best validation PSNR {run.best_value:.2f} dB. On the "
              f"{len(self.study.roles['test'])} test pairs:\n{summary(rows)}\n"
              f"Metrics: {self.folder / 'metrics.csv'}. Pictures: {self.folder}. Model: {run.best}\n"
              f"Next: translate scans with python sample.py --resume_path {run.best} --data_root YOUR_SCANS\n"
              "Or train longer: the same command with higher opt.refine_epochs (or opt.max_steps, if it is set)")

    def report(self, network: Translator) -> list[dict]:
        """Rows of metrics.csv: every test pair, direction, volume (refined, coarse, mean, source) and region."""
        study, rows = self.study, []
        for i in interruptible(study.roles["test"]):
            real, masks = study.volumes([i]), study.masks([i])
            for source, target in self.prior.network.directions:
                truth = real[target][0, 0].numpy()
                regions = {"brain": brain_region(truth), "pattern": masks[target][0, 0].numpy() > 0,
                           **region_masks(self.opt, study.pairs[i], truth.shape, study.affines[target][i])}
                refined = self.refined(network, target, i, self.opt.average_flips)
                candidates = {"refined": refined, "coarse": self.coarse.volumes(target, [i]),
                              "mean": self.coarse.mean(target), "source": real[source]}
                if self.opt.coarse == "none":
                    del candidates["coarse"]
                if study.sizes[source] != study.sizes[target]:
                    del candidates["source"]
                rows += [{"subject": study.pairs[i].name, "direction": f"{source}->{target}", "volume": volume,
                          "region": region, **values} for volume, candidate in candidates.items()
                         for region, values in score(candidate[0, 0].numpy(), truth, regions).items()]
        return rows


def open_prior(opt, study: Study, backbone: dict, device: torch.device, dtype: torch.dtype) -> Prior:
    """The frozen stage-1 model. Raises UserError where it was trained on other data, or cannot start this stage 2."""
    options = opt.resolved()
    refuse_another_run(Path(opt.resume_path), backbone,
                       {name: options[name] for name in names_affecting("data", "network")},
                       study.identity, "Use the data and settings of its training, or another opt.resume_path")
    if opt.sampling_steps > backbone["options"]["timesteps"]:
        raise UserError(f"opt.sampling_steps = {opt.sampling_steps}: the backbone in {opt.resume_path} has "
                        f"{backbone['options']['timesteps']} timesteps; choose at most that many")
    try:
        prior = Prior.from_checkpoint(backbone, device, dtype)
    except UNFIT as error:
        raise UserError(f"{opt.resume_path}: its weights do not fit its own network ({error})") from error
    if opt.coarse == "expected" and not prior.has_expected_volume:
        raise UserError(f'opt.coarse = "expected": {opt.resume_path} was trained with opt.prediction = '
                        f"{prior.diffusion.prediction!r} and opt.timestep_coupling = {prior.coupling!r}, which have no "
                        "expected volume: at t = T, an error of epsilon is magnified thousands of times, and with "
                        'shared timesteps the source is noise, too. Use opt.coarse = "joint", or train stage 1 with '
                        '"v" and "independent"')
    return prior
