"""Stage 2: refine each modality from the other one and from the coarse volume of the frozen stage-1 model.

    python main.py --refine --resume_path ./checkpoints/best_model.pth

Leaves checkpoints/best_refine.pth and last_refine.pth (with the backbone inside), and in results/refine/ log.csv,
metrics.csv of the test subjects, sample grids and the refined volumes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.coarse import CoarseVolumes
from data.grids import spacing_of
from data.intensity import brain_region, to_units
from data.split import write_split
from data.study import Study, epoch_batches
from data.volumes import write_volume
from models.backbone import Backbone
from models.diffusion import Purpose, keyed_generator
from models.losses import blend_weights, microstructure_loss, tissue_loss
from models.refine import RefineNet
from models.samplers import spacing
from train import STAGE as STAGE_1
from train import augmentation, continue_run, load_batch, model_facts, parts, total_steps
from utils.checkpoint import Checkpoint, CheckpointError, content_hash, read_checkpoint, refuse_another_run
from utils.ema import EMA
from utils.figures import Panel, save_grid
from utils.logger import Log
from utils.metrics import psnr, score, summary, write_metrics
from utils.optimise import Optimiser, StopRequest, use_bfloat16

save_every = 100  # steps between two sample grids in results/

STAGE = "stage 2"
COARSE_BATCH = 8  # samples drawn at once
LOG_COLUMNS = ("kind", "step", "epoch", "loss", "tissue_loss", "microstructure_loss", "gradient_norm", "learning_rate",
               "psnr")
# What may change when a run continues: how long it is, where it writes, how it is looked at, and all of stage 1
FREE_OPTIONS = {"refine", "resume_path", "check", "data_root", "cache_dir", "epochs", "refine_epochs", "max_steps",
                "max_minutes", "checkpoint_dir", "result_dir", "checkpoint_every", "validate_every", "num_samples",
                "accumulate", "loss", "timesteps", "prediction", "timestep_coupling", "device", "learning_rate"}
# What must be the same in both stages, or subjects that the backbone was trained on would be tested on
DATA_OPTIONS = ("modalities", "image_size", "resize", "reduce", "intensity", "folds", "fold",
                "validation_fraction", "seed")


class Refinement:
    """What every part of stage 2 works with: settings, study, coarse volumes, mean volumes, and where it computes."""

    def __init__(self, opt, study: Study, backbone: Backbone, backbone_hash: str):
        self.opt, self.study, self.backbone = opt, study, backbone
        self.device, self.bfloat16 = backbone.device, backbone.bfloat16
        diffusion = backbone.diffusion
        sampler = (backbone_hash, diffusion.prediction, backbone.coupling, opt.coarse, opt.coarse_samples, opt.sampler,
                   spacing(diffusion.timesteps, opt.sampling_steps, opt.sampler), opt.eta, opt.seed, self.bfloat16,
                   study.fingerprint)
        key = hashlib.sha256(repr(sampler).encode()).hexdigest()[:24]
        names = [pair.name for pair in study.pairs]
        self.coarse = CoarseVolumes(Path(opt.cache_dir) / "coarse" / key, names, backbone.network.directions)
        self.coarse.prepare(self._sample_coarse, max(1, COARSE_BATCH // opt.coarse_samples),
                            lambda batches: tqdm(batches, desc="coarse volumes", unit="batch", disable=not batches))
        self.means = {name: volume.to(self.device) for name, volume in study.mean_volumes().items()}

    def _sample_coarse(self, source: str, target: str, batch: list[int]) -> np.ndarray:
        """Means (B, X, Y, Z) of opt.coarse_samples samples of the target for each of these pairs."""
        opt, repeats = self.opt, self.opt.coarse_samples
        keys = [(opt.seed, Purpose.COARSE, i, k) for i in batch for k in range(repeats)]
        given = {}
        if opt.coarse == "given":
            given[source] = self.study.volumes(batch)[source].repeat_interleave(repeats, dim=0)
        samples = self.backbone.sample(keys, self.study.sizes, opt.sampling_steps, opt.sampler, opt.eta,
                                       given)[target][:, 0]
        return samples.unflatten(0, (len(batch), repeats)).mean(dim=1).cpu().numpy()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    @torch.no_grad()
    def refined(self, network: RefineNet, source: str, target: str, positions: list[int]) -> torch.Tensor:
        """Refined volumes (B, 1, X, Y, Z) in [-1, 1], on the CPU, made one pair at a time."""
        made = []
        for i in positions:
            volume = self.study.volumes([i])[source].to(self.device)
            coarse = self.coarse.volumes(source, target, [i]).to(self.device)
            with self.autocast():
                made.append(network(source, target, volume, coarse).clamp(-1, 1).cpu())
        return torch.cat(made)


def fit_blend(network: RefineNet, study: Study, coarse: CoarseVolumes) -> None:
    """Start the residual path of each direction from the best linear blend of its candidates.

    Fitted on the validation subjects: on the training subjects the coarse volumes look better than they will be.
    """
    members = study.roles["validation"]
    truth = study.volumes(members)
    for source, target in network.directions:
        made = coarse.volumes(source, target, members)
        device = network.direction(source, target).mean.device
        candidates = network.candidates(truth[source].to(device), made.to(device))
        network.direction(source, target).blend.copy_(blend_weights(truth[target].to(device), candidates))


def refinement_losses(network: RefineNet, work: Refinement, batch: list[int], step: int,
                      places: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tissue and microstructure loss of the pairs at these places of a batch, the mean over both directions.

    Sometimes the coarse volume is withheld (the mean volume stands in), so that refinement does not over-trust it.
    """
    opt, device = work.opt, work.device
    transform, members = augmentation(opt, work.study, step, places), [batch[place] for place in places]
    truth, masks = load_batch(work.study, members, transform, device)
    tissue = microstructure = torch.zeros((), device=device)
    for number, (source, target) in enumerate(network.directions):
        coarse = work.coarse.volumes(source, target, members)
        coarse = (transform.volume(target, coarse) if transform else coarse).to(device)
        draw = torch.rand(len(batch), generator=keyed_generator(opt.seed, Purpose.WITHHOLD, step, number))[places]
        withheld = (draw < opt.coarse_dropout)[:, None, None, None, None].to(device)
        coarse = torch.where(withheld, work.means[target], coarse)
        with work.autocast():
            refined = network(source, target, truth[source], coarse)
        tissue = tissue + tissue_loss(refined, truth[target], masks[target], opt.pattern_weight) / 2
        microstructure = microstructure + microstructure_loss(refined, truth[target]) / 2
    return tissue, microstructure


def train_step(network: RefineNet, ema: EMA, optimiser: Optimiser, work: Refinement, batch: list[int],
               step: int) -> dict[str, float]:
    """One step of the optimiser on both directions; returns what is logged."""
    torch.manual_seed(keyed_generator(work.opt.seed, Purpose.DROPOUT, step).initial_seed())
    sums = {"tissue_loss": 0.0, "microstructure_loss": 0.0}

    def losses() -> Iterator[torch.Tensor]:
        for places in parts(work.opt, batch):
            tissue, structure = refinement_losses(network, work, batch, step, places)
            share = len(places) / len(batch)
            for name, value in zip(sums, (tissue, structure)):
                sums[name] += share * value.item()
            yield share * (tissue + work.opt.microstructure_weight * structure)

    loss, norm = optimiser.update(losses(), step, [work.study.pairs[i].name for i in batch])
    ema.update(network)
    return {"loss": loss, **sums, "gradient_norm": norm, "learning_rate": optimiser.rate(step)}


def validation_psnr(network: RefineNet, work: Refinement) -> float:
    """Mean PSNR in dB of the refined validation volumes over both directions."""
    members, values = work.study.roles["validation"], []
    truth = work.study.volumes(members)
    for source, target in network.directions:
        errors = work.refined(network, source, target, members) - truth[target]
        values += [psnr(error.numpy()) for error in errors]
    return sum(values) / len(values)


def report(network: RefineNet, work: Refinement) -> list[dict]:
    """Rows of metrics.csv: every test pair, direction, volume (refined, coarse, mean, source) and region."""
    study, rows = work.study, []
    for i in study.roles["test"]:
        real, masks = study.volumes([i]), study.masks([i])
        for source, target in network.directions:
            truth = real[target][0, 0].numpy()
            candidates = {"refined": work.refined(network, source, target, [i]),
                          "coarse": work.coarse.volumes(source, target, [i]), "mean": work.means[target].cpu()}
            if study.sizes[source] == study.sizes[target]:
                candidates["source"] = real[source]
            regions = {"brain": brain_region(truth), "pattern": masks[target][0, 0].numpy() > 0}
            for volume, candidate in candidates.items():
                for region, scores in score(candidate[0, 0].numpy(), truth, regions).items():
                    rows.append({"subject": study.pairs[i].name, "direction": f"{source}->{target}", "volume": volume,
                                 "region": region, **scores})
    return rows


def write_samples(network: RefineNet, work: Refinement, folder: Path, step: int) -> None:
    """A grid of source, coarse, refined, truth and absolute error for validation subjects; refined volumes as NIfTI."""
    study, rows = work.study, []
    for i in study.roles["validation"][:work.opt.num_samples]:
        pair, real = study.pairs[i], study.volumes([i])
        for source, target in network.directions:
            coarse, refined = work.coarse.volumes(source, target, [i]), work.refined(network, source, target, [i])
            spacing = {name: spacing_of(study.affines[name][i]) for name in (source, target)}
            quality = [f"{psnr((each - real[target]).numpy()):.2f} dB" for each in (coarse, refined)]
            error = (refined - real[target]).abs()
            rows.append((f"{pair.name}\n{source} -> {target}", [
                Panel(real[source][0, 0].numpy(), spacing[source]),
                Panel(coarse[0, 0].numpy(), spacing[target], quality[0]),
                Panel(refined[0, 0].numpy(), spacing[target], quality[1]),
                Panel(real[target][0, 0].numpy(), spacing[target]),
                Panel(error[0, 0].numpy(), spacing[target], f"mean {error.mean():.3f}; white is 1", kind="error")]))
            write_volume(folder / "samples" / f"step_{step:06d}" / f"{pair.name}_{target}_refined.nii.gz",
                         to_units(refined[0, 0].numpy(), *study.train_range(target)), study.affines[target][i],
                         pair.files[target])
    save_grid(folder / f"step_{step:06d}.png", f"Stage 2, step {step}: validation subjects",
              ["source", "coarse", "refined", "truth", "absolute error"], rows)


def open_backbone(opt, study: Study, device: torch.device, state: dict, bfloat16: bool) -> Backbone:
    """The frozen stage-1 model inside a checkpoint of either stage. Raises CheckpointError where the data differ."""
    stage_1 = state if state["stage"] == STAGE_1 else state["backbone"]
    refuse_another_run(Path(opt.resume_path), stage_1, {name: opt.resolved()[name] for name in DATA_OPTIONS},
                       {"data": study.fingerprint, "split": study.split_fingerprint})
    if opt.sampling_steps > stage_1["options"]["timesteps"]:
        raise CheckpointError(f"opt.sampling_steps = {opt.sampling_steps}: the backbone in {opt.resume_path} has "
                              f"{stage_1['options']['timesteps']} timesteps; choose at most that many")
    if opt.warm_start and stage_1["network"] != opt.network_arguments():
        differ = [f"{name} = {stage_1['network'][name]!r} there, {value!r} now"
                  for name, value in opt.network_arguments().items() if stage_1["network"][name] != value]
        raise CheckpointError(f"opt.warm_start = True: the backbone in {opt.resume_path} has another network "
                              f"({'; '.join(differ)}). Use the same settings, or opt.warm_start = False")
    try:
        return Backbone.from_checkpoint(stage_1, device, bfloat16)
    except RuntimeError as error:
        raise CheckpointError(f"{opt.resume_path}: its weights do not fit its own network ({error})") from error


class Kept:
    """A part of a checkpoint that never changes: the backbone's own facts and weights."""

    def __init__(self, state: dict):
        facts = ("stage", "step", "options", "sizes", "network", "fingerprints", "ranges")
        self.state = {key: state[key] for key in facts}
        self.state["ema"] = {"model": state["ema"]["model"]}

    def state_dict(self) -> dict:
        return self.state

    def load_state_dict(self, state: dict) -> None:
        self.state = state


def train_refine(opt, study: Study, device: torch.device, state: dict) -> bool:
    """Train stage 2 on the backbone in `state` (a checkpoint's content); returns whether the run is finished."""
    backbone = open_backbone(opt, study, device, state, use_bfloat16(opt.precision, device))
    backbone_hash = content_hash(backbone.network)
    torch.manual_seed(opt.seed)
    network = RefineNet(study.sizes, **opt.network_arguments()).to(device)
    network.set_means(study.mean_volumes())
    if opt.warm_start:
        network.start_from(backbone.network, backbone.diffusion.timesteps // 2)
    members = study.roles["train"]
    steps_per_epoch, total = math.ceil(len(members) / opt.batch_size), total_steps(opt, opt.refine_epochs, len(members))
    facts = model_facts(opt, study)
    facts["fingerprints"]["backbone"] = backbone_hash
    ema = EMA(network, opt.ema_decay)
    optimiser = Optimiser(network, opt.refine_learning_rate, opt.warmup_steps, total, opt.gradient_clip)
    kept = Kept(state if state["stage"] == STAGE_1 else state["backbone"])
    run = Checkpoint(STAGE, {"model": network, "ema": ema, "optimiser": optimiser, "backbone": kept}, facts, -math.inf)
    last, best = (Path(opt.checkpoint_dir) / name for name in ("last_refine.pth", "best_refine.pth"))
    continued = continue_run(run, last, best, Path(opt.resume_path) if state["stage"] == STAGE else None, FREE_OPTIONS)
    folder = Path(opt.result_dir) / "refine"
    log = Log(folder / "log.csv", LOG_COLUMNS, run.step, run.run_id)
    write_split(folder / "split.csv", study.pairs, study.roles)
    work = Refinement(opt, study, backbone, backbone_hash)
    if not continued:
        for each in (network, ema.model):
            fit_blend(each, study, work.coarse)
        run.save(last)
    with StopRequest(opt.max_minutes) as stop, tqdm(total=total, initial=run.step, unit="step") as bar:
        for epoch in range(run.step // steps_per_epoch, opt.refine_epochs):
            batches = epoch_batches(members, opt.batch_size, opt.seed, epoch)
            for batch in batches[run.step % steps_per_epoch:]:
                if stop or run.step >= total:
                    break
                values = train_step(network, ema, optimiser, work, batch, run.step)
                run.step += 1
                bar.update()
                bar.set_description(f"stage 2, epoch {epoch + 1}/{opt.refine_epochs}")
                bar.set_postfix_str(f"loss {values['loss']:.4f}")
                log.write("training", run.step, epoch=epoch + 1, **values)
                ended = run.step == total or run.step % steps_per_epoch == 0
                if run.step == total or (ended and (epoch + 1) % opt.validate_every == 0):
                    value = validation_psnr(ema.model, work)
                    log.write("validation", run.step, epoch=epoch + 1, psnr=value)
                    bar.write(f"step {run.step:6d}  epoch {epoch + 1:4d}  validation PSNR {value:.2f} dB")
                    if value > run.best:
                        run.best = value
                        run.save(best)
                if run.step % save_every == 0 or run.step == total:
                    write_samples(ema.model, work, folder, run.step)
                if ended or run.step % opt.checkpoint_every == 0:
                    run.save(last)
    if run.step < total:
        run.save(last)
        print(f"Stopped at step {run.step} of {total} ({stop.reason}); the same command continues.")
        return False
    if not best.exists():  # a finished run, continued in another folder
        run.save(best)
    network.load_state_dict(read_checkpoint(best, (STAGE,))["ema"]["model"])
    rows = report(network, work)
    write_metrics(folder / "metrics.csv", rows)
    print(f"\nStage 2 is finished: {run.step} steps, best validation PSNR {run.best:.2f} dB. On the "
          f"{len(study.roles['test'])} test pairs:\n{summary(rows)}\n"
          f"Metrics: {folder / 'metrics.csv'}. Pictures: {folder}. Model: {best}\n"
          "To train longer, raise opt.refine_epochs.")
    return True
