"""Stage 1: train the dual-modal diffusion model, a joint prior of both modalities that also translates.

    python main.py

Leaves checkpoints/best_model.pth and last_model.pth, and in results/stage1/ log.csv, sample grids and their volumes.
Volumes are {modality: (B, 1, X, Y, Z)} in [-1, 1].
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.augment import PairTransform
from data.pairs import Pair
from data.split import write_split
from data.study import Study, steps_per_epoch, training_batch
from models.backbone import Backbone
from models.diffusion import Diffusion, Purpose, keyed_generator, keyed_noise, training_timesteps
from models.losses import pattern_aware_loss, x0_error
from models.unet import DualModalUNet
from opt import OptionError, small
from pictures import draw_pattern, write_samples
from utils.checkpoint import Checkpoint
from utils.distributed import any_rank, parallel, rank, share, summed, to_device, wait, writes
from utils.ema import EMA
from utils.logger import Log
from utils.optimise import Interrupted, Optimiser, StopRequest, TrainingError, number_type
from utils.record import write_record

save_every = 100  # steps between two sample grids in results/

STAGE = "stage 1"
GROUP_WITHHELD = 0.1  # fraction of the draws in which neither modality is given and the network is not told the group
FEWEST_OF_A_GROUP = 5  # training pairs whose mean volume the network is told
VALIDATION_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # fractions of T at which the error in x0 is taken
LOG_COLUMNS = ("kind", "step", "epoch", "loss", "gradient_norm", "learning_rate", "x0_error", "psnr", "ssim")
SAMPLE_OPTIONS = {"sample_dir", "joint_samples", "output_space", "uncertainty_samples"}  # of sample.py
# What may change when a run continues: how long it is, where it writes, how it is looked at, and all of stage 2
FREE_OPTIONS = SAMPLE_OPTIONS | {
                "refine", "resume_path", "check", "data_root", "cache_dir", "epochs", "max_steps", "max_minutes",
                "checkpoint_dir", "result_dir", "checkpoint_every", "validate_every", "num_samples", "tensorboard",
                "sampler", "sampling_steps", "eta", "accumulate", "gradient_checkpointing", "device",
                "refine_optimiser", "refine_learning_rate", "refine_epochs", "structure_weight",
                "microstructure_weight", "perceptual_weight", "vgg_weights", "vgg_download", "coarse",
                "coarse_samples", "coarse_dropout", "residual", "warm_start"}


def model_facts(opt, study: Study) -> dict:
    """What a checkpoint says about its run: enough to rebuild the network, to recognise the run, and to write units."""
    return {"options": opt.resolved(), "sizes": dict(study.sizes), "network": opt.network_arguments(),
            "fingerprints": {"data": study.fingerprint, "split": study.split_fingerprint,
                             "pattern": study.pattern_fingerprint() if opt.pattern_weight else ""},
            "ranges": {name: study.train_range(name) for name in study.modalities},
            "affines": {name: study.affines[name][study.roles["train"][0]].tolist() for name in study.modalities}}


def groups_to_learn(opt, pairs: list[Pair], roles: dict[str, list[int]]) -> tuple[str, ...]:
    """The groups that the network is told apart, none without opt.condition_on_group. Raises OptionError."""
    if not opt.condition_on_group:
        return ()
    counts = Counter(pairs[i].group for i in roles["train"])
    groups = tuple(sorted(set(counts) - {""}))
    if len(groups) < 2:
        raise OptionError(f"opt.condition_on_group = True: the training pairs are of {len(groups)} groups; fill the "
                          "column group of the table (or of participants.tsv) with two or more")
    if few := [f"{name} ({counts[name]})" for name in groups if counts[name] < FEWEST_OF_A_GROUP]:
        raise OptionError(f"opt.condition_on_group = True: the network is told the mean volume of a group, which must "
                          f"not be that of single subjects, but of {', '.join(few)} there are fewer than "
                          f"{FEWEST_OF_A_GROUP} training pairs; correct the labels, join groups, or empty theirs")
    return groups


def stage_1_facts(opt, study: Study, groups: tuple[str, ...]) -> dict:
    """As `model_facts`, with the groups that the network is told."""
    facts = {**model_facts(opt, study), "groups": list(groups)}
    if groups:
        of_pairs = [(pair.name, pair.group) for pair in study.pairs]
        facts["fingerprints"]["groups"] = hashlib.sha256(json.dumps(of_pairs).encode()).hexdigest()
    return facts


def total_steps(opt, epochs: int, pairs: int) -> int:
    """Steps of a whole run."""
    steps = epochs * math.ceil(pairs / opt.batch_size)
    return min(steps, opt.max_steps) if opt.max_steps else steps


def due(step: int, every: int, total: int) -> bool:
    """Whether something that is done every so many steps, and at the end, is done after this many."""
    return step % every == 0 or step == total


def parts(opt, jobs: list[tuple[object, int]]) -> Iterator[tuple[object, list[int], float]]:
    """This rank's share of the jobs of a step, (what is predicted, place 0 .. B - 1 in the batch), as (what, places,
    factor): one part for each that is predicted, or opt.accumulate of them.

    factor: of the part's loss: 1, or 0 where there are fewer jobs than ranks and one is computed only to be there when
    gradients are exchanged.
    """
    mine = share(jobs)
    for what in dict.fromkeys(what for what, _ in mine or jobs[:1]):
        places = [place for each, place in mine or jobs[:1] if each == what]
        for part in np.array_split(places, min(opt.accumulate, len(places))):
            yield what, part.tolist(), float(bool(mine))


def augmentation(opt, study: Study, step: int, places: list[int]) -> PairTransform | None:
    """What opt.augment does to the pairs at these places of a batch; keyed by (seed, step, place), None for nothing."""
    if not opt.augment:
        return None
    return PairTransform(opt.augment, study.modalities, study.extent,
                         [keyed_generator(opt.seed, Purpose.AUGMENT, step, place) for place in places])


def load_batch(study: Study, batch: list[int], transform: PairTransform | None,
               device: torch.device) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Volumes and pattern masks of these pairs, {modality: (B, 1, X, Y, Z)}, augmented, on the device."""
    volumes, masks = study.volumes(batch), study.masks(batch)
    if transform:
        volumes = {name: transform.volume(name, volume) for name, volume in volumes.items()}
        masks = {name: transform.mask(mask) for name, mask in masks.items()}
    return ({name: to_device(volume, device) for name, volume in volumes.items()},
            {name: to_device(mask, device) for name, mask in masks.items()})


def diffusion_losses(backbone: Backbone, opt, study: Study, batch: list[int],
                     step: int) -> Iterator[Callable[[], torch.Tensor]]:
    """The pattern-aware loss of a batch in parts whose sum over the ranks is that of the whole.

    A modality that is given (t = 0) is not predicted, and left out of the mean.
    """
    times = training_timesteps(opt.timestep_coupling, opt.timesteps, study.modalities,
                               [(opt.seed, Purpose.TIMESTEPS, step, place) for place in range(len(batch))])
    noisy = [(name, place) for name, t in times.items() for place in range(len(batch)) if t[place] > 0]
    counted = Counter(name for name, _ in noisy)
    for name, places, factor in parts(opt, noisy):
        weight = factor / counted[name] / len(times)
        yield functools.partial(direction_loss, backbone, opt, study, batch, step, name, places, times, weight)


def direction_loss(backbone: Backbone, opt, study: Study, batch: list[int], step: int, name: str, places: list[int],
                   times: dict[str, torch.Tensor], weight: float) -> torch.Tensor:
    """`weight` times the summed loss in the prediction of one modality, of the pairs at these places of a batch.

    The noise is keyed by (seed, step, place).
    """
    device, diffusion = backbone.device, backbone.diffusion
    x0, masks = load_batch(study, [batch[place] for place in places], augmentation(opt, study, step, places), device)
    noise = keyed_noise(study.sizes, *((opt.seed, Purpose.TRAINING, step, place) for place in places))
    noise = {each: to_device(volumes, device) for each, volumes in noise.items()}
    group = None
    if backbone.groups:  # a translation is not told
        group = backbone.numbered([told_group(opt, study, batch[place], step, place)
                                   if all(each[place] for each in times.values()) else "" for place in places])
    t = {each: to_device(drawn[places], device) for each, drawn in times.items()}
    xt = {each: diffusion.noisy(x0[each], noise[each], t[each]) for each in x0}
    predicted = backbone(xt, t, {name}, group)[name]
    target = diffusion.target(x0[name], noise[name], t[name])
    return weight * pattern_aware_loss(predicted, target, masks[name], opt.pattern_weight, opt.loss).sum()


def told_group(opt, study: Study, i: int, step: int, place: int) -> str:
    """The group of pair i as training tells it: now and then not, so that the model also knows what is common to all.
    """
    drawn = torch.rand((), generator=keyed_generator(opt.seed, Purpose.GROUP, step, place))
    return "" if drawn < GROUP_WITHHELD else study.pairs[i].group


def train_step(backbone: Backbone, ema: EMA, optimiser: Optimiser, opt, study: Study, batch: list[int],
               step: int) -> dict[str, float]:
    """One step of the optimiser on both directions; returns what is logged."""
    torch.manual_seed(keyed_generator(opt.seed, Purpose.DROPOUT, step, rank()).initial_seed())
    values = optimiser.update(backbone.network, diffusion_losses(backbone, opt, study, batch, step), step,
                              [study.pairs[i].name for i in batch])
    if values["taken"]:
        ema.update(backbone.network)
    return values


@torch.no_grad()
def validate(backbone: Backbone, study: Study, seed: int, batch_size: int, watch: Callable = iter) -> float:
    """Unweighted mean absolute error in x0 on the validation subjects, with the same noise and timesteps every time.

    Both modalities are noised to the same t, so that the number is comparable between all settings. watch: may raise
    Interrupted between two batches, which leaves the error of a part.
    """
    device, diffusion, errors = backbone.device, backbone.diffusion, []
    members = study.roles["validation"]
    jobs = itertools.product(VALIDATION_TIMES, range(0, len(members), batch_size))
    with contextlib.suppress(Interrupted):  # the ranks meet in the sum
        for fraction, start in watch(share(list(jobs))):
            batch = members[start:start + batch_size]
            x0 = {name: to_device(volume, device) for name, volume in study.volumes(batch).items()}
            noise = keyed_noise(study.sizes, *((seed, Purpose.VALIDATION, i, round(100 * fraction)) for i in batch))
            time = max(1, round(fraction * diffusion.timesteps))
            t = {name: torch.full((len(batch),), time, device=device) for name in x0}
            xt = {name: diffusion.noisy(x0[name], to_device(noise[name], device), t[name]) for name in x0}
            for name, output in backbone(xt, t).items():
                errors += x0_error(diffusion.x0(xt[name], output, t[name]), x0[name]).tolist()
    total, count = summed(sum(errors), len(errors))
    return total / max(1, count)


def review(run: Checkpoint, smooth: Backbone, opt, study: Study, log: Log, total: int, stop: StopRequest) -> bool:
    """What is due after a step: validation, which chooses the best, and pictures. False where a stop came first."""
    per_epoch = steps_per_epoch(study.roles["train"], opt.batch_size)
    epoch = math.ceil(run.step / per_epoch)
    if due(run.step, per_epoch * opt.validate_every, total):
        error = validate(smooth, study, opt.seed, opt.batch_size, stop.watch)
        if stop.agreed():
            return False
        if not math.isfinite(error):
            raise TrainingError(f"step {run.step}: the validation is not finite. Start again in another "
                                "opt.checkpoint_dir with a lower learning rate or opt.precision = \"fp32\"")
        log.write("validation", run.step, epoch=epoch, x0_error=error)
        tqdm.write(f"step {run.step:6d}  epoch {epoch:4d}  validation x0 error {error:.4f}")
        if error < run.best_value:
            run.best_value = error
            run.save(run.best)
    if due(run.step, save_every, total):
        if writes():
            with contextlib.suppress(Interrupted):  # the ranks meet below
                picture, scores = write_samples(smooth, opt, study, log.path.parent, run.step, stop.watch)
                log.write("samples", run.step, epoch=epoch, **scores)
                log.picture(picture, run.step)
        return not stop.agreed()
    return True


def train(opt, study: Study, device: torch.device, stop: StopRequest) -> bool:
    """Train until the end or until asked to stop; returns whether the run is finished."""
    torch.manual_seed(opt.seed)
    groups = groups_to_learn(opt, study.pairs, study.roles)
    network = DualModalUNet(study.sizes, len(groups), **opt.network_arguments()).to(device)
    network.set_means(study.mean_volumes(groups))
    network.recompute(opt.gradient_checkpointing)
    members = study.roles["train"]
    per_epoch, total = steps_per_epoch(members, opt.batch_size), total_steps(opt, opt.epochs, len(members))
    diffusion, dtype = Diffusion(opt.timesteps, opt.prediction), number_type(opt.precision, device)
    ema = EMA(network, opt.ema_decay)
    optimiser = Optimiser(network, opt.learning_rate, opt.warmup_steps, total, opt.gradient_clip, opt.optimiser,
                          dtype == torch.float16)
    run = Checkpoint(STAGE, Path(opt.checkpoint_dir), {"model": network, "ema": ema, "optimiser": optimiser},
                     stage_1_facts(opt, study, groups), worst=math.inf)
    continued = run.resume(Path(opt.resume_path) if opt.resume_path else None, FREE_OPTIONS)
    backbone, smooth = (Backbone(each, diffusion, opt.timestep_coupling, device, dtype, groups)
                        for each in (parallel(network, device), ema.model))
    folder = Path(opt.result_dir) / "stage1"
    log = Log(folder / "log.csv", LOG_COLUMNS, run.step, run.reviewed, run.run_id, opt.tensorboard)
    if writes():
        write_split(folder / "split.csv", study.pairs, study.roles)
        write_record(folder / "run.json", run, opt.resolved(), small().resolved(), study.split)
        if opt.pattern_weight:
            draw_pattern(study, folder / "pattern_mask.png")
    if not continued:
        run.begin()
    with tqdm(total=total, initial=run.step, unit="step") as bar:
        while (run.step < total or run.reviewed < run.step) and not stop.agreed():
            if run.reviewed == run.step:
                epoch = run.step // per_epoch + 1
                batch = training_batch(members, opt.batch_size, opt.seed, run.step)
                values = train_step(backbone, ema, optimiser, opt, study, batch, run.step)
                run.step += 1
                bar.update()
                bar.set_description(f"stage 1, epoch {epoch}/{opt.epochs}")
                bar.set_postfix_str(f"loss {values['loss']:.4f}")
                log.write("training", run.step, epoch=epoch, **values)
            if review(run, smooth, opt, study, log, total, stop):  # else it is made up for when the run continues
                run.reviewed = run.step
                if due(run.step, per_epoch, total) or run.step % opt.checkpoint_every == 0:
                    run.save(run.last)
    if run.step < total or run.reviewed < run.step:
        run.save(run.last)
        print(f"Stopped at step {run.step} of {total} ({stop.reason}); the same command continues.", flush=True)
        wait()  # torchrun ends all ranks with the first that leaves: not while one is writing
        return False
    if any_rank(writes() and not run.best.exists()):  # a finished run, continued in another folder, or its best is gone
        value = validate(smooth, study, opt.seed, opt.batch_size, stop.watch)
        if stop.agreed():
            raise Interrupted
        run.stand_in(value)
    print(f"Stage 1 is finished: {run.step} of {total} steps, best x0 error {run.best_value:.4f}. To train longer, "
          f"raise opt.epochs.\nPictures: {folder}. Model: {run.best}\n"
          f"Next: the same command with --refine --resume_path {run.best}")
    return True
