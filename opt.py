"""Every setting of PDS, in one object: `opt`. Edit it at the end of this file, then run `python main.py`.

    opt.resume_path = "./checkpoints/best_model.pth"
    opt.refine = True

`small()` is the default and trains on a laptop's CPU; `paper()` is the published configuration (arXiv 2511.04963).
Each setting can also be given for one run: `python main.py --refine --resume_path ./checkpoints/best_model.pth`;
`python main.py --help` prints the comments below.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Literal

MOST_VOXELS = 2**27  # of a volume, as in data/volumes.py
SMALLEST_AXIS = 11  # voxels: the Gaussian window of SSIM (sigma 1.5, cut at 3.5 sigma) must fit into the volume


class OptionError(ValueError):
    """A setting that cannot work; the message names the option, its value and the remedy."""


@dataclass
class Options:
    # ---- What to run
    # False: stage 1, the dual-modal diffusion model. True: stage 2, refinement on top of the model in resume_path
    refine: bool = False
    # stage 1: the run to continue (empty: last_model.pth of checkpoint_dir). Stage 2: the stage-1 model to refine,
    # or a stage-2 checkpoint to continue
    resume_path: str = ""
    # train nothing: read every volume to its end and report all problems of the study at once, with a summary
    check: bool = False

    # ---- Data
    # CSV/TSV (columns: subject, one per modality, optionally session, group, fold) or a BIDS tree.
    # The default is the demo, which is written there on first use
    data_root: str = "./data/demo"
    modalities: tuple[str, ...] = ("fmri", "dmri")  # the two modalities: column names, or fmri and dmri in a BIDS tree
    # BIDS: how a modality's file names end before .nii.gz. Known: fmri=bold dmri=dwi; others end in their own name
    # (T1w, FLAIR). For example fmri=space-MNI152NLin2009cAsym_desc-preproc_bold; * stands for anything
    bids_suffix: dict = field(default_factory=dict)
    exclude: tuple[str, ...] = ()  # subjects, or single visits (sub-01_ses-2), to leave out
    # voxels, in RAS order: one int, three ints, or one entry per modality. Every volume must have this size,
    # unless resize says otherwise. On the command line: 64, 64x64x32, or fmri=32x32x18 dmri=48x48x30
    image_size: int | tuple | dict = field(default_factory=lambda: {"fmri": (32, 32, 18), "dmri": (48, 48, 30)})
    # "none" refuses a volume of another size; "resample" interpolates it onto image_size over the same field of view;
    # "pad_crop" keeps its voxels and pads or cuts around its centre. Outputs go back to each file's own grid
    resize: Literal["none", "resample", "pad_crop"] = "none"
    # how a 4-D file becomes a volume: mean, std, first, b0 or shell (needs the .bval beside it), or one per modality
    reduce: str | dict = "mean"
    # which intensities become -1 and 1: "percentile" (0.1 and 99.9, robust against outliers) or "minmax" of a volume,
    # "brain_percentile" or "brain_minmax" of its brain (largest part above Otsu's threshold); or one per modality
    intensity: str | dict = "percentile"
    # at random, per pair and step: "flip" (left-right) and "affine" (5 degrees, 5 %, 3 mm), both modalities alike,
    # and "intensity" (bent scale of grey), each its own. For example ("flip", "affine", "intensity"); () for none
    augment: tuple[str, ...] = ()
    # where the volumes live: "mni", "native", or "auto" (MNI for the demo and for files named space-MNI...).
    # The brain networks of the pattern-aware loss are only known in MNI space
    space: Literal["auto", "mni", "native"] = "auto"
    cache_dir: str = "./data/cache"  # decoded and coarse volumes; can be deleted between runs, and are then made again
    folds: int = 5  # subjects are divided into this many folds; 1 trains and reports on everything
    fold: int = 0  # the fold that is held out for testing, 0 .. folds - 1
    validation_fraction: float = 0.15  # part of the other folds' subjects that chooses the best checkpoint

    # ---- Model (both stages)
    unet_depth: int = 3  # resolution levels; each further one halves the grid and doubles the channels
    base_channels: int = 32  # channels of the finest level
    res_blocks: int = 1  # residual blocks per level
    output_blocks: int = 2  # residual blocks on the target's grid, after the features of the source's grid arrived
    # the network works on blocks of this many voxels per axis (space-to-depth): 1 is published, 2 several times faster
    patch_size: int = 2
    # "late" (published): the noisy target meets the source's features at the output only;
    # "early": the body sees the target and the output the source, too
    fusion: Literal["late", "early"] = "early"
    attention_tokens: int = 1024  # self-attention on levels with at most this many positions; 0: none
    dropout: float = 0.0  # probability of dropping a feature inside the residual blocks

    # ---- Diffusion (stage 1)
    timesteps: int = 1000  # T of the cosine noise schedule
    timestep_coupling: Literal["shared", "independent"] = "independent"  # one t for both modalities, or one each
    prediction: Literal["epsilon", "v"] = "v"  # what the network predicts: the noise, or v (Salimans & Ho 2022)
    # stage 1 also learns the pairs' groups (column group, or participants.tsv), so that sample.py can draw new pairs of
    # each. Translations are not told the group: it is often what they are to help find
    condition_on_group: bool = False
    # "dpmpp", DPM-Solver++(2M): 12 of its steps are as close to the limit of many steps as 100 of "ddim"
    sampler: Literal["dpmpp", "ddim"] = "dpmpp"
    sampling_steps: int = 12  # network evaluations per sample
    eta: float = 0.0  # DDIM: 0 is deterministic, 1 is ancestral sampling

    # ---- Losses
    loss: Literal["l1", "l2"] = "l2"  # stage 1: squared, or absolute (published) error of the prediction
    pattern_weight: float = 1.0  # additional weight of voxels in the disease-related brain networks; 0 turns it off
    pattern_networks: tuple[str, ...] = ("cingulo-opercular", "default", "fronto-parietal")  # of Dosenbach's 160 ROIs
    pattern_radius: float = 5.0  # mm around each ROI's centre
    # instead of these ROIs, and in native space too: a NIfTI image of labels over the volumes; {subject} and {session}
    # in its path stand for those of each pair
    pattern_file: str = ""
    pattern_labels: tuple[int, ...] = ()  # the labels of pattern_file that count; (): all but 0
    structure_weight: float = 0.1  # stage 2: weight of 1 - SSIM; 0 turns it off
    microstructure_weight: float = 0.1  # stage 2: weight of the loss on three projections; 0 turns it off
    # stage 2: weight of the loss on VGG16's features of these projections, where its weights are at hand; 0: off
    perceptual_weight: float = 0.01
    vgg_weights: str = ""  # a file with torchvision's state dict of VGG16; empty: its file in the cache of torch.hub
    vgg_download: bool = False  # fetch them into that cache, 528 MB, where they are not there

    # ---- Training
    optimiser: Literal["adam", "muon"] = "adam"  # of stage 1; for "muon" halve the learning_rate
    # stage 2: "muon" ends 1.1 dB above "adam" (published) after 240 steps of the demo, each 1.15 times as long
    refine_optimiser: Literal["adam", "muon"] = "muon"
    # stage 1: Adam's peak rate, after the warm-up and before the cosine decay; Muon's is 20 times as high
    learning_rate: float = 2e-3
    refine_learning_rate: float = 1e-3  # stage 2: the same
    batch_size: int = 4  # pairs per step, of all ranks together
    # parts that a step's pairs are computed in, one after the other: less memory, and the same gradient (with dropout:
    # another draw of what is dropped)
    accumulate: int = 1
    # keep only the inputs of the networks' blocks until the backward pass, which computes the rest once more: less
    # memory, more time, the same gradient
    gradient_checkpointing: bool = False
    epochs: int = 120  # stage 1: passes over the training pairs
    refine_epochs: int = 120  # stage 2: passes over the training pairs
    max_steps: int = 0  # stop after this many optimiser steps; 0: as many as the epochs have
    warmup_steps: int = 50  # steps over which the learning rate rises
    ema_decay: float = 0.995  # moving average of the weights that is validated, sampled and kept as best
    gradient_clip: float = 1.0  # largest gradient norm; 0: no clipping
    # "auto": bfloat16 where the GPU or the processor (AMX) multiplies matrices in it, else float32. "fp16" (the loss is
    # scaled) is for GPUs before Ampere
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:1", ...
    seed: int = 0  # of the split, the order of the data, the first weights, and every noise

    # ---- Refinement (stage 2)
    # the coarse volume: "given" is sampled from the subject's own source, "joint" (published) from nothing; "none" is
    # the mean training volume, which tells what the prior is worth
    coarse: Literal["given", "joint", "none"] = "given"
    # samples of each target: training sees means of random parts of them, and what is refined in the end is their mean
    coarse_samples: int = 8
    coarse_dropout: float = 0.1  # probability that training replaces the coarse volume by the mean volume
    residual: bool = True  # the network adds to the best linear blend of coarse volume and source, not to nothing
    warm_start: bool = True  # start from the backbone's trunk instead of random weights

    # ---- Output
    checkpoint_dir: str = "./checkpoints"  # best_model.pth, last_model.pth, best_refine.pth, last_refine.pth
    result_dir: str = "./results"  # pictures, NIfTI volumes, log.csv, metrics.csv
    checkpoint_every: int = 100  # steps between two writings of last_*.pth (also written at the end of each epoch)
    validate_every: int = 10  # epochs between two validations (also at the end of the run)
    num_samples: int = 2  # subjects shown in a sample grid
    # curves and sample grids also for TensorBoard, where it is installed: tensorboard --logdir results
    tensorboard: bool = True
    # save and stop this many minutes after the start, reading included; the same command continues. 0: no limit
    max_minutes: float = 0.0

    # ---- Using a trained model (python sample.py; resume_path names the model, of either stage)
    sample_dir: str = "./results/synthesis"  # where the synthesised volumes go: a BIDS derivatives tree
    # this many new pairs from noise alone (of each group, with condition_on_group); 0: translate what data_root holds
    joint_samples: int = 0
    # grid of a translation: "target", the other modality's (its own file's, or that of training over the source's field
    # of view), or "source", that of the source's file
    output_space: Literal["target", "source"] = "target"
    # samples of the prior for each translation, given its source: what is made of their mean, and their voxel-wise
    # standard deviation, are written beside it; 0: none
    uncertainty_samples: int = 0

    def __post_init__(self) -> None:
        self.__dict__["edited"] = set()

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        self.__dict__.setdefault("edited", set()).add(name)

    def as_dict(self) -> dict:
        """Plain Python values of every setting, in the order of this file."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def image_sizes(self) -> dict[str, tuple[int, int, int]]:
        """`image_size` spelt out: modality -> (X, Y, Z) in voxels. Raises OptionError where it is none of its forms."""
        size, names = self.image_size, tuple(self.modalities)
        if isinstance(size, (tuple, list)) and len(size) == 2 and any(isinstance(n, (tuple, list)) for n in size):
            size = dict(zip(names, size))
        if not isinstance(size, dict):
            size = {name: size for name in names}
        if set(size) != set(names):
            raise OptionError(f"opt.image_size names the modalities {', '.join(map(str, size))}, but opt.modalities = "
                              f"{names}; give one size, or one for each of these two")
        return {name: _three_ints(size[name]) for name in names}

    def per_modality(self, name: str) -> dict[str, str]:
        """`reduce` or `intensity` spelt out: modality -> choice. Raises OptionError where it is not for both."""
        value = getattr(self, name)
        named = value if isinstance(value, dict) else {each: value for each in self.modalities}
        if set(named) != set(self.modalities):
            raise OptionError(f"opt.{name} = {value!r} must be one name, or one for each of {self.modalities}")
        return {each: named[each] for each in self.modalities}

    def resolved(self) -> dict:
        """As `as_dict`, with what is given per modality spelt out: what a run is recognised by and saved with."""
        return {**self.as_dict(), "image_size": self.image_sizes(),
                **{name: self.per_modality(name) for name in ("reduce", "intensity")}}

    def network_arguments(self) -> dict:
        """What the networks of both stages are built from, besides the image sizes."""
        return {"channels": self.base_channels, "depth": self.unet_depth, "blocks": self.res_blocks,
                "output_blocks": self.output_blocks, "patch": self.patch_size, "fusion": self.fusion,
                "attention_tokens": self.attention_tokens, "dropout": self.dropout}

    def validate(self) -> None:
        """Raise one OptionError that lists every wrong name, type, value and combination."""
        problems = [_unknown_name(name) for name in sorted(self.edited - set(self.as_dict()))]
        problems += _wrong_types(self) or [f"opt.{name} = {getattr(self, name)!r}: {remedy}"
                                           for name, wrong, remedy in _rules(self) if wrong]
        if not problems:
            sizes = () if self.check else (self.image_sizes,)  # the check suggests them
            for spell_out in (*sizes, lambda: self.per_modality("reduce"),
                              lambda: self.per_modality("intensity")):
                try:
                    spell_out()
                except OptionError as error:
                    problems.append(str(error))
        if problems:
            raise OptionError("\n".join(problems))


def _three_ints(size: object) -> tuple[int, int, int]:
    axes = (size,) * 3 if isinstance(size, int) else tuple(size) if isinstance(size, (tuple, list)) else ()
    if len(axes) != 3 or not all(type(n) is int and n >= SMALLEST_AXIS for n in axes) \
            or math.prod(axes) > MOST_VOXELS:
        raise OptionError(f"opt.image_size = {size!r}: give an int, three ints, or one of these per modality, "
                          f"each axis at least {SMALLEST_AXIS} voxels, {MOST_VOXELS:,} in all at most")
    return axes


def _unknown_name(name: str) -> str:
    close = difflib.get_close_matches(name, [f.name for f in dataclasses.fields(Options)], n=1)
    hint = f"did you mean opt.{close[0]}?" if close else "python main.py --help lists the settings"
    return f"opt.{name}: there is no such setting; {hint}"


def _fits(value: object, annotation: object) -> bool:
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return value in typing.get_args(annotation)
    if origin is types.UnionType:
        return any(_fits(value, each) for each in typing.get_args(annotation))
    if origin is tuple:
        return isinstance(value, (tuple, list)) and all(_fits(each, typing.get_args(annotation)[0]) for each in value)
    if annotation is tuple:
        return isinstance(value, (tuple, list))
    if annotation in (int, float):  # a bool is no number here, an int is a float, NaN and infinity are nothing
        return type(value) in ((int,) if annotation is int else (int, float)) and abs(value) < 2**63
    return isinstance(value, annotation)


def _wrong_types(options: Options) -> list[str]:
    problems = []
    for name, annotation in typing.get_type_hints(Options).items():
        if not _fits(getattr(options, name), annotation):
            choices = typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()
            wanted = f"one of {', '.join(choices)}" if choices else getattr(annotation, "__name__", str(annotation))
            problems.append(f"opt.{name} = {getattr(options, name)!r}: must be {wanted}")
    return problems


def _rules(o: Options) -> list[tuple[str, bool, str]]:
    """(option, is it wrong, what to do) for all that the types do not say."""
    at_least_one = ("folds", "unet_depth", "base_channels", "res_blocks", "output_blocks", "patch_size", "batch_size",
                    "epochs", "refine_epochs", "checkpoint_every", "validate_every", "num_samples", "coarse_samples",
                    "accumulate")
    not_negative = ("attention_tokens", "eta", "pattern_weight", "structure_weight", "microstructure_weight",
                    "perceptual_weight", "max_steps", "warmup_steps", "gradient_clip", "max_minutes", "seed",
                    "joint_samples", "uncertainty_samples")
    fractions = ("validation_fraction", "dropout", "ema_decay", "coarse_dropout")
    names = {"reduce": ("mean", "std", "first", "b0", "shell"), "augment": ("flip", "affine", "intensity"),
             "intensity": ("percentile", "minmax", "brain_percentile", "brain_minmax")}
    chosen = {name: value.values() if isinstance(value := getattr(o, name), dict) else
              [value] if isinstance(value, str) else value for name in names}
    return [
        *((name, getattr(o, name) < 1, "must be at least 1") for name in at_least_one),
        *((name, getattr(o, name) < 0, "must not be negative") for name in not_negative),
        *((name, not 0 <= getattr(o, name) < 1, "must be at least 0 and below 1") for name in fractions),
        *((name, not 0 < getattr(o, name) <= 1, "must be above 0 and at most 1")
          for name in ("learning_rate", "refine_learning_rate")),
        ("modalities", len(o.modalities) != 2 or len(set(o.modalities)) != 2
         or not all(name.isidentifier() for name in o.modalities),
         "give two different names made of letters, digits and _"),
        *((name, not set(chosen[name]) <= set(names[name]), f"choose from {', '.join(names[name])}") for name in names),
        ("bids_suffix", not set(o.bids_suffix) <= set(o.modalities)
         or not all(isinstance(each, str) and each and "/" not in each for each in o.bids_suffix.values()),
         f"name a modality of {o.modalities} and how its file names end, for example fmri=desc-preproc_bold"),
        ("fold", not 0 <= o.fold < max(o.folds, 1), f"with opt.folds = {o.folds} it must be 0 .. {o.folds - 1}"),
        ("timesteps", o.timesteps < 2, "must be at least 2"),
        ("sampling_steps", not 1 <= o.sampling_steps <= o.timesteps,
         f"must be 1 .. opt.timesteps = {o.timesteps}"),
        ("pattern_radius", o.pattern_radius <= 0, "must be above 0 mm"),
        ("eta", o.eta > 1, "must be at most 1"),
        ("eta", o.eta > 0 and o.sampler != "ddim", 'only opt.sampler = "ddim" has it'),
        ("pattern_labels", bool(o.pattern_labels) and not o.pattern_file, "are labels of opt.pattern_file: set it too"),
        ("pattern_labels", any(label < 1 for label in o.pattern_labels), "0 is the background; give labels above it"),
        ("patch_size", o.patch_size > 8, "must be at most 8 voxels"),
        ("unet_depth", o.unet_depth > 6, "six levels shrink the volume 32-fold; choose fewer"),
        ("base_channels", o.base_channels % 8 != 0, "must be a multiple of 8 (group normalisation)"),
        ("joint_samples", o.joint_samples >= 10**6, "must be below a million"),
        ("uncertainty_samples", o.uncertainty_samples == 1, "one sample has no deviation; give two or more, or 0"),
        ("refine", o.refine and not o.resume_path,
         'stage 2 needs a trained backbone: set opt.resume_path, for example "./checkpoints/best_model.pth"'),
        ("device", o.device != "auto" and not o.device.startswith(("cpu", "cuda")), "choose auto, cpu or cuda[:N]"),
    ]


def small() -> Options:
    """The default: minutes on two CPU cores; its choices are those that measured best on the demo."""
    return Options()


def paper() -> Options:
    """The published configuration (arXiv 2511.04963), as far as the paper states it."""
    return Options(
        image_size={"fmri": (64, 64, 36), "dmri": (96, 96, 60)}, unet_depth=4, base_channels=64, res_blocks=2,
        output_blocks=1, patch_size=1, fusion="late", attention_tokens=16384, timestep_coupling="shared",
        prediction="epsilon", loss="l1", sampler="ddim", sampling_steps=20, learning_rate=1e-6,
        refine_optimiser="adam", refine_learning_rate=1e-5, batch_size=1, epochs=300, refine_epochs=300,
        warmup_steps=500, ema_decay=0.9999, coarse="joint", coarse_samples=1, structure_weight=0.0,
        validate_every=1)


PRESETS = {"small": small, "paper": paper}

opt = small()
# ---- Edit below this line, for example:
# opt.data_root = "/data/my_study/pairs.csv"
# opt.resume_path = "./checkpoints/best_model.pth"
# opt.refine = True
