"""The training loop of both stages. Stage1 (train.py) and Stage2 (train_refine.py) say what is learned and shown."""

import contextlib
import dataclasses
import functools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.augment import PairTransform
from data.grids import spacing_of
from data.intensity import to_units
from data.problems import DataError
from data.split import write_split
from data.study import Study
from data.volumes import write_volume
from models.diffusion import Purpose, keyed_generator
from training.batches import steps_per_epoch, training_batch
from training.checkpoint import Checkpoint
from training.distributed import (
    all_reduce_sum,
    any_rank,
    is_main_rank,
    rank,
    shard,
    stop_requested_on_any_rank,
    sum_over_ranks,
    world_size,
    wrap_ddp,
)
from training.ema import EMA
from training.log import Log, write_run_record
from training.optimise import DECAY_FRACTION, Optimiser
from utils.device import Graphed, Numbers, one_ahead
from utils.errors import UserError
from utils.figures import Panel, save_grid
from utils.stop import Interrupted, stop

TIMED_STEPS = 10  # after the first step; then the time of an epoch is printed
MicroBatch = tuple[str, list[int], float]  # target; places in the batch, 0 .. B - 1; weight of its loss


class Stage:
    """What `fit` asks of a stage. Subclasses set the attributes below, and define

    begin(): what is done before the first step of this process
    load(target, places, batch, step): the data of a micro-batch, on the device
    loss(network, target, data): its loss, and terms for the log; `fit` records what it computes (utils/device.py)
    validate(network): (column, score) of this rank's share of the validation subjects; the mean over the columns of
        their means chooses the best model
    draw(network, step): write a sample grid; returns its path and mean scores
    finish(run): report on the finished run
    """

    name: str  # "stage 1" or "stage 2", as in checkpoints
    folder_name: str  # in opt.result_dir
    save_every: int  # steps between two sample grids
    columns: tuple[str, ...]  # of log.csv
    metrics: tuple[str, ...]  # the columns of the validation
    higher_is_better: bool
    complete: list[int]  # visits that it is trained on, as positions in study.pairs
    incomplete: list[int]  # visits with one scan that it is trained on, too

    network: nn.Module  # trained
    ema_model: nn.Module  # the moving average of its weights; `fit` sets it
    epochs: int
    learning_rate: float
    optimiser: str
    dtype: torch.dtype
    may_change: set[str]  # settings that may differ when a run resumes
    resume_from: Path | None  # a checkpoint outside opt.checkpoint_dir

    def __init__(self, opt, study: Study, device: torch.device):
        self.opt, self.study, self.device = opt, study, device
        self.folder = Path(opt.result_dir) / self.folder_name
        self.complete, self.incomplete = study.roles["train"], []
        first = study.roles["train"][0]
        self.metadata = {
            "options": opt.resolved(),
            "fingerprints": {**study.identity, "pattern": study.pattern_fingerprint() if opt.pattern_weight else ""},
            "ranges": {modality: study.train_range(modality) for modality in study.modalities},
            "affines": {modality: study.affines[modality][first].tolist() for modality in study.modalities},
            "alignment": dataclasses.asdict(study.alignment), "seen_scans": study.seen_scans}

    def micro_batches(self, batch: list[int]) -> list[MicroBatch]:
        """This rank's share of a step, in which each pair counts once per direction, an incomplete one once."""
        jobs = [(target, place) for target in self.study.modalities for place, i in enumerate(batch)
                if self.study.has(target, i)]
        return [(target, places, weight * len(places) / len(jobs))
                for target, places, weight in split_jobs(jobs, self.opt.accumulate)]

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self.complete, self.incomplete, self.opt.batch_size)

    def total_steps(self) -> int:
        """The steps of the whole run."""
        steps = self.epochs * self.steps_per_epoch
        return min(steps, self.opt.max_steps or steps)

    def transform(self, step: int, places: list[int]) -> PairTransform | None:
        """The random transform of opt.augment for these places in the batch, keyed by (seed, step, place); or None.

        "affine" interpolates, which blurs source and target: not while the learning rate decays, so that a network ends
        on volumes as sharp as those it is used for.
        """
        decays = step >= (1 - DECAY_FRACTION) * self.total_steps()
        kinds = [kind for kind in self.opt.augment if not (kind == "affine" and decays)]
        generators = [keyed_generator(self.opt.seed, Purpose.AUGMENT, step, place) for place in places]
        return PairTransform(kinds, self.study.modalities, self.study.extent, generators) if kinds else None

    def panel(self, modality: str, i: int, volume: np.ndarray, caption: str = "", **how: object) -> Panel:
        """A volume (X, Y, Z) on the grid of pair i, for a picture."""
        return Panel(volume, spacing_of(self.study.affines[modality][i]), caption, **how)

    def write_sample(self, modality: str, i: int, volume: np.ndarray, kind: str, step: int) -> None:
        """Write a synthesised volume (X, Y, Z) as NIfTI, in the frame of pair i and in the units of its modality."""
        path = self.folder / "samples" / f"step_{step:06d}" / f"{self.study.pairs[i].name}_{modality}_{kind}.nii.gz"
        write_volume(path, to_units(volume, *self.study.train_range(modality)), self.study.affines[modality][i],
                     self.study.pairs[i].files[modality])

    def write_grid(self, step: int, columns: list[str], rows: list, scores: list[dict]) -> tuple[Path, dict]:
        """Write a sample grid; returns its path and the mean scores."""
        path = self.folder / f"step_{step:06d}.png"
        legend = ". Yellow outline: disease-related networks" if any(self.study.has_pattern) else ""
        save_grid(path, f"{self.name.capitalize()}, step {step}, validation subjects{legend}", columns, rows)
        return path, {metric: float(np.nanmean([each[metric] for each in scores])) for metric in ("psnr", "ssim")}


def may_record(opt, device: torch.device) -> bool:
    """Whether steps may be CUDA graphs: not with several ranks, whose exchange is NCCL's, nor with gradient
    checkpointing, which asks for the state of the random numbers."""
    return device.type == "cuda" and world_size() == 1 and not opt.gradient_checkpointing


def loaded_steps(stage: Stage, steps: Iterable[int]) -> Iterator[tuple[list[int], list[tuple[str, float, tuple]]]]:
    """For each step the visits of its batch, and target, weight and data of this rank's micro-batches."""
    for step in steps:
        batch = training_batch(stage.complete, stage.incomplete, stage.opt.batch_size, stage.opt.seed, step)
        yield batch, [(target, weight, stage.load(target, places, batch, step))
                      for target, places, weight in stage.micro_batches(batch)]


def train_step(stage: Stage, network: nn.Module, optimiser: Optimiser,
               loaded: list[tuple[str, float, tuple]]) -> tuple[list[str], Tensor]:
    """Forward, loss, backward, optimiser. Returns names and values of the loss and its terms, then gradient norm and
    loss scale, without a wait for the device."""
    sums = {}
    for number, (target, weight, data) in enumerate(loaded, start=1):
        network.require_backward_grad_sync = number == len(loaded)  # only DDP reads it
        loss, terms = stage.loss(network, target, data)
        weighted = {name: weight * value for name, value in {"loss": loss, **terms}.items()}
        optimiser.scale(weighted["loss"]).backward()
        for name, value in weighted.items():
            sums[name] = sums[name] + value.detach() if name in sums else value.detach()
    values = sum_over_ranks(torch.stack(list(sums.values())))
    norm = optimiser.step(values[0])
    return [*sums], torch.cat([values, norm[None], optimiser.loss_scale[None]])


def fit(stage: Stage) -> bool:
    """Train until the last step or until a stop is requested; returns whether the run is finished."""
    opt, study, per_epoch, total = stage.opt, stage.study, stage.steps_per_epoch, stage.total_steps()
    on_gpu = stage.device.type == "cuda"
    ema = EMA(stage.network, opt.ema_decay)
    stage.ema_model = ema.model
    optimiser = Optimiser(stage.network, stage.learning_rate, opt.warmup_steps, total, opt.gradient_clip,
                          stage.optimiser, stage.dtype == torch.float16)
    print(f"network     {sum(p.numel() for p in stage.network.parameters()) / 1e6:.1f} million parameters", flush=True)
    if only_in_means := {*study.trained_on} - {*stage.complete, *stage.incomplete}:
        print(f"note: visits with one scan ({len(only_in_means)}): here they are in the mean volumes only; stage 2, "
              'with opt.coarse = "expected", is trained on them')
    run = Checkpoint(stage.name, Path(opt.checkpoint_dir),
                     {"model": stage.network, "ema": ema, "optimiser": optimiser},
                     stage.metadata, initial_best=-math.inf if stage.higher_is_better else math.inf)
    resumed = run.resume(stage.resume_from, stage.may_change)
    log = Log(stage.folder / "log.csv", stage.columns, run.step, run.run_id, opt.tensorboard)
    if is_main_rank():
        write_split(stage.folder / "split.csv", study.pairs, study.roles)
        write_run_record(stage.folder / "run.json", run, opt.resolved(), type(opt)().resolved(), study.split)
    stage.begin()
    if not resumed:
        run.save(run.last)
    if on_gpu:
        study.keep_on(stage.device, torch.cuda.mem_get_info(stage.device)[0] // 4)
    network, finished, unread, start = wrap_ddp(stage.network, stage.device), False, None, run.step
    times = deque(maxlen=TIMED_STEPS + 1)
    pauses = Pauses({"validation": (per_epoch * opt.validate_every,), "pictures": (stage.save_every,),
                     "checkpoint": (opt.checkpoint_every, per_epoch)}, run.step, total, opt.max_overhead)

    take_step = functools.partial(train_step, stage, network, optimiser)
    if may_record(opt, stage.device):
        take_step = Graphed(take_step)

    def read_numbers() -> None:
        """Log the last step, whose numbers have come from the device by now."""
        nonlocal unread
        if unread is None:
            return
        (step, batch, names, numbers), unread = unread, None
        *values, norm, scale = numbers.read()
        values = dict(zip(names, values))
        where = f"step {step} with {', '.join(study.pairs[i].name for i in batch)}"
        taken, epoch = optimiser.judge(values["loss"], norm, scale, where), math.ceil(step / per_epoch)
        log.write("training", step, epoch=epoch, gradient_norm=norm, **values,
                  learning_rate=optimiser.learning_rate(step - 1) if taken else 0.0)
        bar.set_description(f"{stage.name}, epoch {epoch}/{stage.epochs}", refresh=False)
        bar.set_postfix_str(f"loss {values['loss']:.4f}", refresh=False)
        bar.update()

    def save(wait: bool = True) -> None:
        read_numbers()
        run.save(run.last)
        if wait:
            run.finish_writing()

    with tqdm(total=total, initial=run.step, unit="step") as bar, contextlib.ExitStack() as at_the_end, \
            saved_where_a_file_fails(save), \
            contextlib.closing(one_ahead(loaded_steps(stage, range(run.step, total)), on_gpu, stage.device)) as steps:
        at_the_end.callback(run.finish_writing)
        while not stop_requested_on_any_rank():
            # ---- Validate, draw and save, at the top: a resumed run first does what is due at its step
            if pauses.is_due("validation", run.step):
                read_numbers()
                with pauses.taking("validation"):
                    scores = means_over_ranks(stage.metrics, stage.validate(ema.model))
                    if stop_requested_on_any_rank():
                        break
                    record_validation(stage, run, log, math.ceil(run.step / per_epoch), scores)
            if pauses.is_due("pictures", run.step):
                read_numbers()
                with pauses.taking("pictures"), contextlib.suppress(Interrupted):  # the ranks meet below
                    if is_main_rank():
                        picture, scores = stage.draw(ema.model, run.step)
                        log.write("samples", run.step, epoch=math.ceil(run.step / per_epoch), **scores)
                        log.picture(picture, run.step)
                if stop_requested_on_any_rank():
                    break
            if pauses.is_due("checkpoint", run.step):
                with pauses.taking("checkpoint"):
                    save(wait=False)
            if run.step >= total:
                finished = True
                break

            # ---- One step: load, forward, loss, backward, optimiser. On a GPU, nothing here waits for it
            batch, loaded = next(steps)
            torch.manual_seed(keyed_generator(opt.seed, Purpose.DROPOUT, run.step, rank()).initial_seed())  # dropout
            optimiser.rate.fill_(optimiser.learning_rate(run.step))
            names, numbers = take_step(loaded)
            ema.update(stage.network)
            read_numbers()  # of the step before
            run.step += 1
            unread = run.step, batch, names, Numbers(numbers)
            times.append(time.perf_counter())
            if run.step == start + 1 + TIMED_STEPS:
                seconds = float(np.median(np.diff(times)))
                minutes = seconds * per_epoch / 60
                bar.write(f"time        {seconds:.3g} s per step, "
                          f"{minutes:{'.2g' if minutes < 10 else '.0f'}} min per epoch, "
                          f"{seconds * (total - run.step) / 60:.0f} min to go (without validation and pictures)"
                          + (f"\nmemory      {torch.cuda.max_memory_reserved(stage.device) / 2**30:.1f} GiB of the GPU"
                             if on_gpu else ""))
        if not finished:
            save()
    if not finished:
        print(f"Stopped at step {run.step} of {total} ({stop.reason}); run the same command to resume.", flush=True)
        return False
    stage.finish(run)
    return True


class Pauses:
    """What training pauses for, each every so many steps: kind -> numbers of steps. share: opt.max_overhead.

    Each kind waits where all its pauses would take more than a third of that share of the time of this process; at the
    last step nothing waits.
    """

    def __init__(self, every: dict[str, tuple[int, ...]], start: int, total: int, share: float):
        self.every, self.total, self.begin = every, total, time.monotonic()
        self.last, self.seconds = dict.fromkeys(every, max(0, start - 1)), dict.fromkeys(every, 0.0)
        self.share = share

    def is_due(self, kind: str, step: int) -> bool:
        """The same on all ranks: the clock of the main one counts."""
        last = self.last[kind]
        if step == last or not (step >= self.total or any(step // n > last // n for n in self.every[kind])):
            return False
        training = time.monotonic() - self.begin - sum(self.seconds.values())
        there_is_time = len(self.every) * (1 - self.share) * self.seconds[kind] <= self.share * training
        if step < self.total and not any_rank(is_main_rank() and there_is_time):
            return False
        self.last[kind] = step
        return True

    @contextlib.contextmanager
    def taking(self, kind: str) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self.seconds[kind] += time.monotonic() - begin


@contextlib.contextmanager
def saved_where_a_file_fails(save: Callable[[], None]) -> Iterator[None]:
    """Save the state before a file that cannot be read, which has not harmed it, ends the run."""
    try:
        yield
    except DataError:
        try:
            save()
        except UserError as error:
            print(f"note: {error}")
        raise


def split_jobs(jobs: list[tuple[str, int]], accumulate: int) -> list[MicroBatch]:
    """This rank's share of the jobs (target, place in the batch) of a step, one micro-batch or `accumulate` per target.

    The weight is 1. A rank without a job computes the first one with weight 0, so that DDP can synchronise.
    """
    mine, micro_batches = shard(jobs), []
    for target in dict.fromkeys(target for target, _ in mine or jobs[:1]):
        places = [place for each, place in mine or jobs[:1] if each == target]
        micro_batches += [(target, part.tolist(), float(bool(mine)))
                          for part in np.array_split(places, min(accumulate, len(places)))]
    return micro_batches


def means_over_ranks(columns: tuple[str, ...], scores: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The mean of each column over all ranks; of the scores so far where a stop is requested."""
    totals, counts = dict.fromkeys(columns, 0.0), dict.fromkeys(columns, 0)
    with contextlib.suppress(Interrupted):  # the ranks meet in the sum
        for column, value in scores:
            totals[column], counts[column] = totals[column] + value, counts[column] + 1
    sums = all_reduce_sum(*totals.values(), *counts.values())
    return {column: total / max(1, count) for column, total, count in zip(columns, sums, sums[len(columns):])}


def record_validation(stage: Stage, run: Checkpoint, log: Log, epoch: int, scores: dict[str, float]) -> None:
    """Log a validation, and save the best model. Raises UserError where a score is not finite."""
    value = float(np.mean(list(scores.values())))
    if not math.isfinite(value):
        raise UserError(f"step {run.step}: the validation is not finite. Start again in another opt.checkpoint_dir "
                        'with a lower learning rate or opt.precision = "fp32"')
    log.write("validation", run.step, epoch=epoch, **scores)
    words = ", ".join(f"{column} {score:.4f}" for column, score in scores.items())
    tqdm.write(f"step {run.step:6d}  epoch {epoch:4d}  validation {words}")
    if (value > run.best_value) if stage.higher_is_better else (value < run.best_value):
        run.best_value = value
        run.save(run.best)
