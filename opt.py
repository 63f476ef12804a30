"""Every setting of PDS, in one object: `opt`. Edit it at the end of this file, then run `python main.py`.

    opt.resume_path = "./checkpoints/best_model.pth"
    opt.refine = True

`small()` is the default and trains on a laptop's CPU; `paper()` is the published configuration (arXiv 2511.04963).
Each setting can also be given for one run: `python main.py --refine --resume_path ./checkpoints/best_model.pth`;
`python main.py --help` prints the comments below. A run resumes only with the settings it was started with;
docs/settings.md says which may change.
"""
# ruff: noqa: RUF009 (setting() makes a dataclass field)

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from data.problems import SMALLEST_AXIS
from data.volumes import MAX_VOXELS
from utils.errors import UserError
from utils.settings import Settings, expand_paths, path, problems_of, setting


@dataclasses.dataclass
class Options(Settings):
    # ---- What to run
    refine: bool = setting(False, affects="nothing")  # False: stage 1, the diffusion model. True: stage 2, refinement
    # stage 1: the checkpoint to resume (empty: last_model.pth in checkpoint_dir). Stage 2: the stage-1 model to refine,
    # or a stage-2 checkpoint to resume
    resume_path: str = path("")
    check: bool = setting(False, affects="nothing")  # do not train: read every volume, report all problems of the study

    # ---- Data
    # a CSV/TSV file (columns: subject, one per modality; optional: session, group, fold) or a BIDS folder; the default
    # is a demo, written on first use
    data_root: str = path("./data/demo")
    modalities: tuple[str, ...] = setting(("fmri", "dmri"), affects="data")  # columns of the table, or BIDS names
    # BIDS: the end of a modality's file names before .nii.gz; * matches anything. Default: fmri=bold dmri=dwi, any
    # other modality its own name (T1w, FLAIR). Example: fmri=space-MNI152NLin2009cAsym_desc-preproc_bold
    bids_suffix: dict = setting({})
    share_scans: bool = False  # BIDS: a scan above the sessions (fMRIPrep's anat) belongs to each that has none itself
    exclude: tuple[str, ...] = ()  # subjects (sub-01) or single visits (sub-01_ses-2) to leave out
    # voxels along X, Y, Z in RAS order: one int, three ints, or one entry per modality. On the command line: 64,
    # 64x64x32, or fmri=32x32x18 dmri=48x48x30
    image_size: int | tuple | dict = setting({"fmri": (32, 32, 18), "dmri": (48, 48, 30)}, affects="data",
                                             per_modality=True)
    # how the two volumes of a pair come to lie over each other: "grid", edge to edge; "world", through their affines,
    # over a box that both see; "auto": "grid" if their fields of view coincide within a voxel in all pairs, or "world"
    align: Literal["auto", "grid", "world"] = setting("auto", affects="data")
    box_size: tuple[float, ...] = setting((), affects="data")  # mm along R, A, S of that box; (): from the study
    # edge to edge, volumes of another size than image_size: "none" refuses them; "resample" interpolates over the same
    # field of view; "pad_crop" keeps the voxels and pads or crops around the centre
    resize: Literal["none", "resample", "pad_crop"] = setting("none", affects="data")
    # 4-D to 3-D: mean, std or first over time; b0 or shell by b-value (needs the .bval beside it); or one per modality
    reduce: str | dict = setting("mean", affects="data", per_modality=True,
                                 choices=("mean", "std", "first", "b0", "shell"))
    # the intensities that map to -1 and 1: "percentile" (0.1 and 99.9, robust) or "minmax" of the volume, or of its
    # brain ("brain_percentile", "brain_minmax": largest component above Otsu's threshold); or one per modality
    intensity: str | dict = setting("percentile", affects="data", per_modality=True,
                                    choices=("percentile", "minmax", "brain_percentile", "brain_minmax"))
    # random, per pair and step: "flip" (left-right) and "affine" (5 degrees, 5 %, 3 mm; blurs a little, so not in the
    # last quarter), the same for both modalities, and "intensity" (a random grey-value curve), one per modality.
    # Example: ("flip", "affine", "intensity"); (): none
    augment: tuple[str, ...] = setting((), choices=("flip", "affine", "intensity"))
    # "auto": MNI for the demo and files named space-MNI..., else native; only MNI space has the networks of the
    # pattern-aware loss. "template": another space that all subjects share. "mni", "template": one box for all
    space: Literal["auto", "mni", "template", "native"] = "auto"
    # visits that lack one modality: "use" (in mean volumes, and as targets of stage 2; never in tests) or "leave_out"
    incomplete: Literal["use", "leave_out"] = setting("use", affects="data")
    cache_dir: str = path("./data/cache")  # decoded and coarse volumes; delete only between runs
    folds: int = setting(5, at_least=1, affects="data")  # how many; 1: train, validate and test on all
    fold: int = setting(0, at_least=0, affects="data")  # the fold held out for testing, 0 .. folds - 1
    # fraction of the other folds' subjects that is held out to choose the best checkpoint
    validation_fraction: float = setting(0.15, at_least=0, below=1, affects="data")

    # ---- Model (both stages: stage 2 fine-tunes the network of stage 1)
    # resolution levels; each halves the grid and doubles the channels
    unet_depth: int = setting(3, at_least=1, at_most=6, affects="network")
    # channels at the finest level; a multiple of 8
    base_channels: int = setting(32, at_least=8, at_most=1024, affects="network")
    res_blocks: int = setting(1, at_least=1, at_most=16, affects="network")  # residual blocks per level
    # residual blocks on the target's grid, where source features join
    output_blocks: int = setting(2, at_least=1, at_most=16, affects="network")
    # space-to-depth, in voxels: 1 is published, 2 much faster
    patch_size: int = setting(2, at_least=1, at_most=8, affects="network")
    # "late" (published): noisy target and source features meet only at the output; "early": the U-Net also receives the
    # target, the output the source
    fusion: Literal["late", "early"] = setting("early", affects="network")
    # self-attention on levels below the finest with at most this many positions; 0: off
    attention_tokens: int = setting(1024, at_least=0, affects="network")
    # dropout probability in the residual blocks
    dropout: float = setting(0.0, at_least=0, below=1, affects="network")

    # ---- Diffusion (stage 1)
    timesteps: int = setting(1000, at_least=2, at_most=10**6, affects="stage 1")  # T of the cosine noise schedule
    # "shared": one timestep for both modalities; "independent": one for each
    timestep_coupling: Literal["shared", "independent"] = setting("independent", affects="stage 1")
    prediction: Literal["epsilon", "v"] = setting("v", affects="stage 1")  # of the noise (epsilon), or v
    # also learn diagnostic groups (column group, or participants.tsv), so that sample.py can draw new pairs of each;
    # translations do not see the group: it may be unknown
    condition_on_group: bool = setting(False, affects="stage 1")
    # "dpmpp" is DPM-Solver++(2M): 12 steps are as close to the limit of many steps as 100 steps of "ddim"
    sampler: Literal["dpmpp", "ddim"] = setting("dpmpp", affects="sampling")
    sampling_steps: int = setting(12, at_least=1, affects="sampling")  # network evaluations per sample, 1 .. timesteps
    eta: float = setting(0.0, at_least=0, at_most=1, affects="sampling")  # DDIM: 0 deterministic, 1 ancestral sampling

    # ---- Losses
    loss: Literal["l1", "l2"] = setting("l2", affects="stage 1")  # stage 1: absolute (published) or squared error
    pattern_weight: float = setting(1.0, at_least=0)  # extra weight of voxels in disease-related brain networks; 0: off
    pattern_networks: tuple[str, ...] = ("cingulo-opercular", "default", "fronto-parietal")  # of Dosenbach's 160 ROIs
    pattern_radius: float = setting(5.0, above=0)  # mm around each ROI's centre
    # a NIfTI label image over the volumes to use instead of these ROIs, also in native space; in its path, {subject}
    # stands for sub-01, {session} for 2. The masks of a run may not change
    pattern_file: str = path("")
    pattern_labels: tuple[int, ...] = ()  # labels of pattern_file that get the extra weight; (): all except 0
    structure_weight: float = setting(0.1, at_least=0, affects="stage 2")  # stage 2: weight of 1 - SSIM; 0: off
    # stage 2: weight of the loss on the mean projections along the three axes; 0: off
    microstructure_weight: float = setting(0.1, at_least=0, affects="stage 2")
    # stage 2: weight of the loss on VGG16 features of these projections, if the VGG16 weights are available; 0: off. A
    # run that has them resumes only with the same weight
    perceptual_weight: float = setting(0.01, at_least=0, affects="nothing")
    vgg_weights: str = path("")  # torchvision's VGG16 state dict; empty: from torch.hub's cache
    vgg_download: bool = setting(False, affects="nothing")  # download the file into that cache if missing (528 MB)

    # ---- Training
    # stage 1: steps of "muon" take 1.15 times as long as those of "adam" (published), but far fewer are needed; "adam"
    # alone needs a learning_rate four times as high
    optimiser: Literal["adam", "muon"] = setting("muon", affects="stage 1")
    refine_optimiser: Literal["adam", "muon"] = setting("muon", affects="stage 2")  # of stage 2
    # stage 1: after warm-up and until the last quarter, in which it decays. With "muon", hidden layers have 20 times it
    learning_rate: float = setting(5e-4, above=0, at_most=1, affects="stage 1")
    refine_learning_rate: float = setting(1e-3, above=0, at_most=1, affects="stage 2")  # stage 2: as above
    batch_size: int = setting(4, at_least=1)  # pairs, or visits with one scan, per optimiser step of all ranks together
    # micro-batches that each batch is split into: less memory, the same gradient (except that dropout draws anew)
    accumulate: int = setting(1, at_least=1, affects="nothing")
    # store only the inputs of the residual blocks and recompute the rest: less memory, more time, the same gradient
    gradient_checkpointing: bool = setting(False, affects="nothing")
    epochs: int = setting(50, at_least=1, affects="nothing")  # stage 1: passes over the training pairs
    refine_epochs: int = setting(45, at_least=1, affects="nothing")  # stage 2: passes over the training pairs
    max_steps: int = setting(0, at_least=0, affects="nothing")  # stop earlier, after so many optimiser steps; 0: do not
    warmup_steps: int = setting(50, at_least=0)  # steps over which the learning rate rises to its peak
    ema_decay: float = setting(0.995, at_least=0, below=1)  # average of the weights: validated, sampled, saved as best
    gradient_clip: float = setting(1.0, at_least=0)  # largest gradient norm; 0: no clipping
    # "auto": bfloat16 if the GPU or CPU (AMX) multiplies matrices in it, else float32. "fp16": for GPUs before Ampere.
    # "fp32": float32 in every product; "tf32": in all but convolutions, which round their factors to 10 bits (GPUs)
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    device: str = setting("auto", affects="nothing")  # "auto", "cpu", "cuda", "cuda:1", ...
    seed: int = setting(0, at_least=0, affects="data")  # of the split, data order, initial weights and all noise

    # ---- Refinement (stage 2)
    # "expected": start with the weights of stage 1. For comparison, with random weights: "joint" also sees a joint
    # sample of stage 1, which does not know the source (published); "none" sees the source alone: a plain regression
    coarse: Literal["expected", "joint", "none"] = setting("expected", affects="stage 2")

    # ---- Output
    checkpoint_dir: str = path("./checkpoints")  # folder of {best,last}_{model,refine}.pth
    result_dir: str = path("./results")  # folder of figures, NIfTI volumes, log.csv, metrics.csv
    # a NIfTI label image over the volumes, with {subject} and {session} in its path as in pattern_file: metrics.csv of
    # stage 2 and of sample.py also gets the scores inside the regions of region_labels
    region_file: str = path("")
    # names of these regions and their labels, at least one. On the command line: tumour=1,2,4 edema=2
    region_labels: dict = setting({}, affects="nothing")
    # steps between saves; also at the end of an epoch
    checkpoint_every: int = setting(100, at_least=1, affects="nothing")
    validate_every: int = setting(10, at_least=1, affects="nothing")  # epochs between validations (also at the end)
    # largest part of the time for saves, validations and pictures; they wait where they would take more, but not at the
    # end. 1: always when due
    max_overhead: float = setting(0.05, at_least=0, at_most=1, affects="nothing")
    num_samples: int = setting(2, at_least=1, affects="nothing")  # subjects in a sample grid
    tensorboard: bool = setting(True, affects="nothing")  # also log there, if installed: tensorboard --logdir results
    # save and stop this many minutes after the program started; run the same command to resume. 0: no limit
    max_minutes: float = setting(0.0, at_least=0, affects="nothing")

    # ---- Using a trained model (python sample.py; resume_path is the model, of either stage)
    sample_dir: str = path("./results/synthesis", affects="sample.py")  # output folder, a BIDS derivatives tree
    # number of new pairs to draw from noise (per group, with condition_on_group); 0: translate the scans in data_root
    joint_samples: int = setting(0, at_least=0, below=10**6, affects="sample.py")
    # grid of a translation: the source file's, or the target file's (without one: training's, over the source's view)
    output_space: Literal["target", "source"] = setting("target", affects="sample.py")
    # translate the left-right mirrored source, too, and take the mean, for models trained with "flip". Takes twice the
    # time; also in stage 2's metrics.csv
    average_flips: bool = setting(False, affects="nothing")
    # 0: the expected volume, with the least error but blurry; 1: with the texture of a sample; or between
    realism: float = setting(0.0, at_least=0, at_most=1, affects="sample.py")
    # also write the voxel-wise standard deviation of this many samples; 0: none
    uncertainty_samples: int = setting(0, at_least=0, affects="sample.py")

    as_dict = dataclasses.asdict  # setting -> plain Python value, in the order of this file

    def image_sizes(self) -> dict[str, tuple[int, int, int]]:
        """`image_size` spelt out: modality -> (X, Y, Z) in voxels. Raises UserError."""
        size, modalities = self.image_size, tuple(self.modalities)
        if isinstance(size, (tuple, list)) and len(size) == 2 and any(isinstance(n, (tuple, list)) for n in size):
            sizes = dict(zip(modalities, size))
        else:
            sizes = size if isinstance(size, dict) else dict.fromkeys(modalities, size)
        if set(sizes) != set(modalities):
            raise UserError(f"opt.image_size = {size!r}: give one size, or one for each modality of {modalities}")
        sizes = {name: (sizes[name],) * 3 if isinstance(sizes[name], int) else sizes[name] for name in modalities}
        for axes in sizes.values():
            if not isinstance(axes, (tuple, list)) or len(axes) != 3 \
                    or not all(type(n) is int and n >= SMALLEST_AXIS for n in axes) or math.prod(axes) > MAX_VOXELS:
                raise UserError(f"opt.image_size = {size!r}: give an int, three ints, or one of these per modality, "
                                f"each axis at least {SMALLEST_AXIS} voxels, at most {MAX_VOXELS:,} in all")
        return {name: tuple(axes) for name, axes in sizes.items()}

    def per_modality(self, name: str) -> dict:
        """A setting such as `reduce` spelt out: modality -> its value. Raises UserError."""
        if name == "image_size":
            return self.image_sizes()
        value = getattr(self, name)
        choices = value if isinstance(value, dict) else dict.fromkeys(self.modalities, value)
        if set(choices) != set(self.modalities):
            raise UserError(f"opt.{name} = {value!r}: give one word, or one for each of {tuple(self.modalities)}")
        return {modality: choices[modality] for modality in self.modalities}

    def regions(self) -> dict[str, tuple[int, ...]]:
        """`region_labels` spelt out: name -> labels."""
        return {name: tuple(labels) if isinstance(labels, (tuple, list)) else (labels,)
                for name, labels in self.region_labels.items()}

    def resolved(self) -> dict:
        """As `as_dict`, with settings per modality spelt out: what a checkpoint keeps and a run is recognised by."""
        return {**self.as_dict(), **{name: self.per_modality(name) for name in PER_MODALITY}}

    def network_arguments(self) -> dict:
        """The arguments of the networks of both stages, besides the image sizes."""
        return {"channels": self.base_channels, "depth": self.unet_depth, "blocks": self.res_blocks,
                "output_blocks": self.output_blocks, "patch": self.patch_size, "fusion": self.fusion,
                "attention_tokens": self.attention_tokens, "dropout": self.dropout}

    def validate(self) -> None:
        """Expand paths; raise one UserError that lists every wrong name, type, value and combination."""
        if problems := problems_of(self) or expand_paths(self):
            raise UserError("\n".join(problems))

    def wrong_combinations(self) -> list[str]:
        modalities, suffixes = tuple(self.modalities), self.bids_suffix
        rules = [  # (setting, whether it is wrong, what to do)
            ("modalities", not len(modalities) == len(set(modalities)) == 2
             or not all(name.isidentifier() for name in modalities), "give two different names made of a-z, 0-9 and _"),
            ("modalities", len({name.lower().removesuffix("w") for name in modalities}) < len(set(modalities)),
             "they differ only in case or a w at the end, so sample.py would give both the same BIDS name"),
            ("bids_suffix", not set(suffixes) <= set(modalities)
             or not all(isinstance(end, str) and end and "/" not in end for end in suffixes.values()),
             f"name a modality of {modalities} and how its file names end, for example fmri=desc-preproc_bold"),
            ("box_size", self.box_size and (len(self.box_size) != 3 or min(self.box_size) < 10),
             "give three lengths in mm, 10 at least, or nothing: ()"),
            ("base_channels", self.base_channels % 8 != 0, "must be a multiple of 8, for group normalisation"),
            ("sampling_steps", self.sampling_steps > self.timesteps, f"must be 1 .. opt.timesteps = {self.timesteps}"),
            ("eta", self.eta > 0 and self.sampler != "ddim", 'must be 0 unless opt.sampler = "ddim"'),
            ("pattern_labels", any(label < 1 for label in self.pattern_labels) or
             (self.pattern_labels and not self.pattern_file), "set opt.pattern_file, and labels above 0 (background)"),
            ("region_labels", bool(self.region_labels) != bool(self.region_file) or not all(
                isinstance(name, str) and name not in ("", "volume", "brain", "pattern") and labels
                and all(type(label) is int and label > 0 for label in labels)
                for name, labels in self.regions().items()),
             "set opt.region_file, and new names with labels above 0, for example tumour=1,2,4 edema=2"),
            ("uncertainty_samples", self.uncertainty_samples == 1, "one sample has no deviation; use 2 or more, or 0"),
            ("refine", self.refine and not self.resume_path,
             'stage 2 needs a stage-1 model: set opt.resume_path, for example "./checkpoints/best_model.pth"'),
            ("device", self.device != "auto" and not self.device.startswith(("cpu", "cuda")),
             "use auto, cpu, cuda, or cuda:1 for the second GPU"),
        ]
        problems = [f"opt.{name} = {getattr(self, name)!r}: {remedy}" for name, wrong, remedy in rules if wrong]
        for name in PER_MODALITY:
            try:
                self.per_modality(name)
            except UserError as error:
                if not (self.check and name == "image_size"):  # the check suggests sizes
                    problems.append(str(error))
        return problems


def small() -> Options:
    """The default: minutes on two CPU cores; its choices are those that measured best on the demo."""
    return Options()


def paper() -> Options:
    """The published configuration (arXiv 2511.04963), as far as the paper states it."""
    return Options(
        image_size={"fmri": (64, 64, 36), "dmri": (96, 96, 60)}, unet_depth=4, base_channels=64, res_blocks=2,
        output_blocks=1, patch_size=1, fusion="late", attention_tokens=16384, timestep_coupling="shared",
        prediction="epsilon", loss="l1", sampler="ddim", sampling_steps=20, optimiser="adam", learning_rate=1e-6,
        refine_optimiser="adam", refine_learning_rate=1e-5, batch_size=1, epochs=300, refine_epochs=300,
        warmup_steps=500, ema_decay=0.9999, coarse="joint", structure_weight=0.0,
        validate_every=1, incomplete="leave_out")


PER_MODALITY = [field.name for field in dataclasses.fields(Options) if field.metadata.get("per_modality")]
PRESETS = {"small": small, "paper": paper}
names_affecting = Options.names_affecting

opt = small()
# ---- Edit below this line, for example:
# opt.data_root = "/data/my_study/pairs.csv"
# opt.resume_path = "./checkpoints/best_model.pth"
# opt.refine = True
