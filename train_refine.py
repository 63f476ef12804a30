"""Stage 2: refine each modality from the other one and from the coarse volume of the frozen stage-1 model.

    python main.py --refine --resume_path ./checkpoints/best_model.pth

Leaves checkpoints/best_refine.pth and last_refine.pth (with the backbone inside), and in results/refine/ log.csv,
metrics.csv of the test subjects, sample grids and the refined volumes.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from data.split import write_split
from data.study import Study, steps_per_epoch, training_batch
from models.backbone import Backbone
from models.diffusion import Purpose, keyed_generator
from models.losses import blend_weights, microstructure_loss, structure_loss, tissue_loss
from models.perceptual import PerceptualLoss, cached_weights, load_perceptual_loss
from models.refine import RefineNet
from opt import small
from refinement import Refinement, coarse_on_new_subjects, report, write_samples
from train import SAMPLE_OPTIONS, augmentation, due, load_batch, model_facts, parts, total_steps
from train import STAGE as STAGE_1
from utils.checkpoint import (
    FILES,
    UNFIT,
    Checkpoint,
    CheckpointError,
    Kept,
    content_hash,
    read_checkpoint,
    refuse_another_run,
)
from utils.distributed import any_rank, first_on_each_machine, parallel, rank, share, summed, to_device, wait, writes
from utils.ema import EMA
from utils.logger import Log
from utils.metrics import psnr, summary, write_metrics
from utils.optimise import Interrupted, Optimiser, StopRequest, TrainingError, number_type
from utils.record import write_record

save_every = 100  # steps between two sample grids in results/

STAGE = "stage 2"
LOSSES = ("tissue_loss", "structure_loss", "microstructure_loss", "perceptual_loss")
LOG_COLUMNS = ("kind", "step", "epoch", "loss", *LOSSES, "perceptual_share", "gradient_norm", "learning_rate", "psnr",
               "ssim")
# What may change when a run continues: how long it is, where it writes, how it is looked at, and all of stage 1
FREE_OPTIONS = SAMPLE_OPTIONS | {
                "refine", "resume_path", "check", "data_root", "cache_dir", "epochs", "refine_epochs", "max_steps",
                "max_minutes", "checkpoint_dir", "result_dir", "checkpoint_every", "validate_every", "num_samples",
                "tensorboard", "accumulate", "gradient_checkpointing", "perceptual_weight", "vgg_weights",
                "vgg_download", "loss", "timesteps", "prediction", "timestep_coupling", "condition_on_group",
                "device", "optimiser", "learning_rate"}
VGG = "weights of VGG16 (opt.vgg_weights; opt.perceptual_weight = 0 to go without)"  # a fingerprint of the run
# What a stage-2 checkpoint keeps of the backbone's
BACKBONE_FACTS = ("stage", "step", "options", "sizes", "network", "fingerprints", "ranges", "affines", "groups")
# What must be the same in both stages, or subjects that the backbone was trained on would be tested on
DATA_OPTIONS = ("modalities", "image_size", "resize", "reduce", "intensity", "folds", "fold",
                "validation_fraction", "seed")


def fit_blend(network: RefineNet, work: Refinement) -> None:
    """Start the residual path of each direction from the best linear blend of its candidates, or without from nothing.

    Fitted on the validation subjects: on the training subjects the coarse volumes look better than they will be.
    """
    members = work.study.roles["validation"]
    truth = {name: volume.to(work.device) for name, volume in work.study.volumes(members).items()}
    for source, target in network.directions:
        candidates = network.candidates(truth[source], work.coarse(target, members).to(work.device))
        found = blend_weights(truth[target], candidates)
        network.direction(source, target).blend.copy_(found if work.opt.residual else torch.zeros_like(found))


def loss_weights(opt) -> dict[str, float]:
    """What each of the losses counts in their sum."""
    return dict(zip(LOSSES, (1.0, opt.structure_weight, opt.microstructure_weight, opt.perceptual_weight)))


def refinement_losses(network: nn.Module, work: Refinement, batch: list[int], step: int,
                      sums: dict[str, torch.Tensor]) -> Iterator[Callable[[], torch.Tensor]]:
    """The loss of a batch in parts whose sum over the ranks is that of the whole.

    sums: each of the losses is added to, means over the batch and both directions; 0 where their weight is.
    """
    directions = work.backbone.network.directions
    jobs = [(direction, place) for direction in directions for place in range(len(batch))]
    for (source, target), places, factor in parts(work.opt, jobs):
        weight = factor * len(places) / len(batch) / len(directions)
        yield functools.partial(direction_loss, network, work, batch, step, source, target, places, weight, sums)


def direction_loss(network: nn.Module, work: Refinement, batch: list[int], step: int, source: str, target: str,
                   places: list[int], weight: float, sums: dict[str, torch.Tensor]) -> torch.Tensor:
    """`weight` times the loss in one direction, mean over the pairs at these places of a batch; the losses that it is
    made of, times `weight`, are added to `sums`."""
    opt, weights, members = work.opt, loss_weights(work.opt), [batch[place] for place in places]
    transform = augmentation(opt, work.study, step, places)
    truth, masks = load_batch(work.study, members, transform, work.device)
    coarse = work.varied_coarse(target, members, step, places)
    coarse = to_device(transform.volume(target, coarse) if transform else coarse, work.device)
    with work.autocast():
        refined = network(source, target, truth[source], coarse)
    losses = {"tissue_loss": tissue_loss(refined, truth[target], masks[target], opt.pattern_weight)}
    for name, term in zip(LOSSES[1:], (structure_loss, microstructure_loss, work.perceptual)):
        if weights[name] and term:
            losses[name] = term(refined, truth[target])
    for name, value in losses.items():
        sums[name] = sums[name] + weight * value.detach()
    return weight * sum(weights[name] * value for name, value in losses.items())


def train_step(network: nn.Module, ema: EMA, optimiser: Optimiser, work: Refinement, batch: list[int],
               step: int) -> dict[str, float]:
    """One step of the optimiser on both directions; returns what is logged."""
    torch.manual_seed(keyed_generator(work.opt.seed, Purpose.DROPOUT, step, rank()).initial_seed())
    sums = dict.fromkeys(LOSSES, torch.zeros((), device=work.device))
    values = optimiser.update(network, refinement_losses(network, work, batch, step, sums), step,
                              [work.study.pairs[i].name for i in batch])
    if values["taken"]:
        ema.update(network)
    found = dict(zip(LOSSES, summed(*torch.stack(list(sums.values())).tolist())))
    share_of_it = work.opt.perceptual_weight * found["perceptual_loss"] / values["loss"] if values["loss"] else 0.0
    return {**values, **found, "perceptual_share": share_of_it}


def validation_psnr(network: RefineNet, work: Refinement) -> float:
    """Mean PSNR in dB of the refined validation volumes over both directions."""
    values = []
    with contextlib.suppress(Interrupted):  # the ranks meet in the sum, which is then that of a part
        for i in work.watch(share(work.study.roles["validation"])):
            truth = work.study.volumes([i])
            values += [psnr((work.refined(network, source, target, [i]) - truth[target])[0].numpy())
                       for source, target in network.directions]
    total, count = summed(sum(values), len(values))
    return total / max(1, count)


def open_start(opt) -> dict:
    """The content of opt.resume_path, a checkpoint of either stage. Raises CheckpointError with the way out."""
    try:
        return read_checkpoint(Path(opt.resume_path), (STAGE_1, STAGE))
    except CheckpointError as error:
        others = [path for name in FILES[STAGE] if (path := Path(opt.checkpoint_dir) / name).is_file()
                  and path != Path(opt.resume_path)]
        hint = (f"\nTo go on with the refinement there, set opt.resume_path to {' or '.join(map(str, others))}, which "
                "holds its backbone" if others else "")
        raise CheckpointError(f"{error}{hint}") from error


def open_backbone(opt, study: Study, device: torch.device, state: dict, dtype: torch.dtype) -> Backbone:
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
        return Backbone.from_checkpoint(stage_1, device, dtype)
    except UNFIT as error:
        raise CheckpointError(f"{opt.resume_path}: its weights do not fit its own network ({error})") from error


def new_network(opt, study: Study, backbone: Backbone) -> RefineNet:
    """The refinement network as training starts: from the backbone's trunk, or from random weights keyed by the seed.
    """
    torch.manual_seed(opt.seed)
    network = RefineNet(study.sizes, **opt.network_arguments()).to(backbone.device)
    network.set_means(study.mean_volumes())
    network.recompute(opt.gradient_checkpointing)
    if opt.warm_start:
        network.start_from(backbone.network, backbone.diffusion.timesteps // 2)
    return network


def open_refined(state: dict, device: torch.device) -> RefineNet:
    """The trained network (its EMA) of a stage-2 checkpoint's content."""
    network = RefineNet(state["sizes"], **state["network"])
    network.load_state_dict(state["ema"]["model"])
    return network.to(device).eval().requires_grad_(False)


def find_perceptual_loss(opt, device: torch.device) -> PerceptualLoss | None:
    """The loss on VGG16's features where it is wanted and its weights are at hand; else says once what is left out."""
    if not opt.perceptual_weight:
        return None
    perceptual = load_perceptual_loss(opt.vgg_weights, opt.vgg_download)
    if perceptual is None:
        print(f"note: there are no weights of VGG16 at {cached_weights()}: the loss on their features is left out. Put "
              "torchvision's file there, name one in opt.vgg_weights, or set opt.vgg_download = True to fetch it")
        return None
    return perceptual.to(device)


def review(run: Checkpoint, smooth: RefineNet, work: Refinement, log: Log, total: int, stop: StopRequest) -> bool:
    """What is due after a step: validation, which chooses the best, and pictures. False where a stop came first."""
    per_epoch = steps_per_epoch(work.study.roles["train"], work.opt.batch_size)
    epoch = math.ceil(run.step / per_epoch)
    if due(run.step, per_epoch * work.opt.validate_every, total):
        value = validation_psnr(smooth, work)
        if stop.agreed():
            return False
        if not math.isfinite(value):
            raise TrainingError(f"step {run.step}: the validation is not finite. Start again in another "
                                "opt.checkpoint_dir with a lower learning rate or opt.precision = \"fp32\"")
        log.write("validation", run.step, epoch=epoch, psnr=value)
        tqdm.write(f"step {run.step:6d}  epoch {epoch:4d}  validation PSNR {value:.2f} dB")
        if value > run.best_value:
            run.best_value = value
            run.save(run.best)
    if due(run.step, save_every, total):
        if writes():
            with contextlib.suppress(Interrupted):  # the ranks meet below
                picture, scores = write_samples(smooth, work, log.path.parent, run.step)
                log.write("samples", run.step, epoch=epoch, **scores)
                log.picture(picture, run.step)
        return not stop.agreed()
    return True


def new_run(opt, study: Study, state: dict, network: RefineNet, total: int, fingerprints: dict,
            dtype: torch.dtype) -> Checkpoint:
    """The run as it starts: what is trained, and beside it what a checkpoint keeps of the backbone in `state`."""
    ema = EMA(network, opt.ema_decay)
    optimiser = Optimiser(network, opt.refine_learning_rate, opt.warmup_steps, total, opt.gradient_clip,
                          opt.refine_optimiser, dtype == torch.float16)
    stage_1 = state if state["stage"] == STAGE_1 else state["backbone"]
    kept = Kept({**{key: stage_1[key] for key in BACKBONE_FACTS if key in stage_1},
                 "ema": {"model": stage_1["ema"]["model"]}})
    facts = model_facts(opt, study)
    facts["fingerprints"] |= fingerprints
    return Checkpoint(STAGE, Path(opt.checkpoint_dir), {"model": network, "ema": ema, "optimiser": optimiser,
                                                        "backbone": kept}, facts, worst=-math.inf)


def train_refine(opt, study: Study, device: torch.device, state: dict, stop: StopRequest) -> bool:
    """Train stage 2 on the backbone in `state` (a checkpoint's content); returns whether the run is finished."""
    dtype, members = number_type(opt.precision, device), study.roles["train"]
    backbone = open_backbone(opt, study, device, state, dtype)
    backbone_hash = content_hash(backbone.network)
    network = new_network(opt, study, backbone)
    per_epoch, total = steps_per_epoch(members, opt.batch_size), total_steps(opt, opt.refine_epochs, len(members))
    with first_on_each_machine():  # who may have to fetch a file
        perceptual = find_perceptual_loss(opt, device)
    vgg = f"{opt.perceptual_weight} {content_hash(perceptual)}" if perceptual else ""
    run = new_run(opt, study, state, network, total, {"backbone": backbone_hash, VGG: vgg}, dtype)
    ema, optimiser = run.parts["ema"], run.parts["optimiser"]
    continued = run.resume(Path(opt.resume_path) if state["stage"] == STAGE else None, FREE_OPTIONS)
    folder = Path(opt.result_dir) / "refine"
    log = Log(folder / "log.csv", LOG_COLUMNS, run.step, run.reviewed, run.run_id, opt.tensorboard)
    if writes():
        write_split(folder / "split.csv", study.pairs, study.roles)
        write_record(folder / "run.json", run, opt.resolved(), small().resolved(), study.split)
    work = Refinement(opt, study, backbone, backbone_hash, perceptual, stop)
    if stop.agreed():
        print(f"Stopped before training ({stop.reason}); the same command continues.", flush=True)
        wait()
        return False
    if not continued:
        for each in (network, ema.model):
            fit_blend(each, work)
        run.begin()
    trained = parallel(network, device)
    with tqdm(total=total, initial=run.step, unit="step") as bar:
        while (run.step < total or run.reviewed < run.step) and not stop.agreed():
            if run.reviewed == run.step:
                epoch = run.step // per_epoch + 1
                batch = training_batch(members, opt.batch_size, opt.seed, run.step)
                values = train_step(trained, ema, optimiser, work, batch, run.step)
                run.step += 1
                bar.update()
                bar.set_description(f"stage 2, epoch {epoch}/{opt.refine_epochs}")
                bar.set_postfix_str(f"loss {values['loss']:.4f}")
                log.write("training", run.step, epoch=epoch, **values)
            if review(run, ema.model, work, log, total, stop):  # else it is made up for when the run continues
                run.reviewed = run.step
                if due(run.step, per_epoch, total) or run.step % opt.checkpoint_every == 0:
                    run.save(run.last)
    if run.step < total or run.reviewed < run.step:
        run.save(run.last)
        print(f"Stopped at step {run.step} of {total} ({stop.reason}); the same command continues.", flush=True)
        wait()  # torchrun ends all ranks with the first that leaves: not while one is writing
        return False
    finish(run, ema.model, work, folder, stop)
    return True


def finish(run: Checkpoint, smooth: RefineNet, work: Refinement, folder: Path, stop: StopRequest) -> None:
    """Score the best model on the test subjects: metrics.csv, and a table. smooth: the average of the last step."""
    if any_rank(writes() and not run.best.exists()):  # a finished run, continued in another folder, or its best is gone
        value = validation_psnr(smooth, work)
        if stop.agreed():
            raise Interrupted
        run.stand_in(value)
    if not writes():
        return
    rows = report(open_refined(read_checkpoint(run.best, (STAGE,)), work.device), work)
    write_metrics(folder / "metrics.csv", rows)
    gap = f"{coarse_on_new_subjects(work)}\n" if work.opt.coarse != "none" else ""
    print(f"\nStage 2 is finished: {run.step} steps, best validation PSNR {run.best_value:.2f} dB. On the "
          f"{len(work.study.roles['test'])} test pairs:\n{summary(rows)}\n{gap}"
          f"Metrics: {folder / 'metrics.csv'}. Pictures: {folder}. Model: {run.best}\n"
          "To train longer, raise opt.refine_epochs.")
