"""A study ready for training: its pairs, decoded once, normalised to [-1, 1] and split by subject."""

import functools
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.alignment import Alignment, align, misalignment
from data.atlas import LabelImage, empty_regions, outside_rois, pattern_mask, roi_centres, uses_rois
from data.cache import Reading, cached_volume, doubts, identical_scans, load_volume
from data.demo import COMPLETE, DEMO_ROOT, write_demo
from data.grids import spacing_of
from data.pairs import Pair, find_pairs
from data.problems import DataError, Problem, or_leave_out, print_notes, raise_if_fatal
from data.split import add_incomplete, split_subjects
from utils.device import to_device
from utils.errors import UserError
from utils.files import remove_temporary_files
from utils.stop import interruptible

CPU = torch.device("cpu")


class Study:
    """The pairs of two modalities. Volumes and masks come as {modality: tensor (B, 1, X, Y, Z)}.

    ranges[modality]: (N, 2) intensities, in file units, that became -1 and 1; affines[modality]: N of (4, 4); both None
    for a scan that an incomplete visit lacks: its volume is NaN, as if the scan saw nothing. problems: warnings.
    seen_scans: hashes of the scans of all roles but "test". Raises VolumeError, DataError if a scan is there twice, and
    Interrupted between two pairs.
    """

    def __init__(self, pairs: list[Pair], roles: dict[str, list[int]], readings: dict[str, Reading],
                 alignment: Alignment, cache_dir: Path):
        self.pairs, self.roles, self.modalities, self.alignment = pairs, roles, tuple(readings), alignment
        self.sizes = {modality: tuple(reading.size) for modality, reading in readings.items()}
        self.ranges, self.affines, self._files, self._masks = ({modality: [] for modality in readings}
                                                               for _ in range(4))
        self.has_pattern, self.problems, scans, data_hash = [False] * len(pairs), [], [], hashlib.sha256()
        self._kept = {}  # on a GPU: see keep_on
        for pair in interruptible(tqdm(pairs, desc="reading volumes", unit="pair", disable=None)):
            for modality in readings.keys() - pair.files:
                for each in (self._files, self.ranges, self.affines):
                    each[modality].append(None)
            for modality, (file, metadata) in _decode(pair, readings, alignment, cache_dir).items():
                self._files[modality].append(file)
                self.ranges[modality].append((metadata["low"], metadata["high"]))
                self.affines[modality].append(np.array(metadata["affine"]))
                scans.append((pair, modality, metadata["scan"], metadata["content"]))
                affine = np.round(metadata["affine"], 3) + 0.0  # no negative zeros: they would hash differently
                data_hash.update(f"{pair.name} {modality} {metadata['content']} {affine.tolist()}".encode())
                self.problems += doubts(pair, modality, metadata["doubts"])
        raise_if_fatal(identical_scans(scans))
        self.split = {role: [pairs[i].name for i in members] for role, members in roles.items()}
        split_hash = hashlib.sha256(json.dumps(self.split).encode())
        used = {name for role, names in self.split.items() if role != "test" for name in names}
        self.seen_scans = sorted({scan for pair, _, scan, _ in scans if pair.name in used})
        self.identity = {"data": data_hash.hexdigest(), "split": split_hash.hexdigest()}

    @property
    def trained_on(self) -> list[int]:
        """The positions of all visits that a model may have seen."""
        return self.roles["train"] + self.roles.get("incomplete", [])

    def has(self, modality: str, i: int) -> bool:
        """Whether pair i has this scan."""
        return modality in self.pairs[i].files

    def set_pattern(self, opt) -> None:
        """Make the masks of opt.pattern_networks or opt.pattern_file. Raises UserError where they cannot be right."""
        centres, shared, labels = roi_centres(opt.pattern_networks), {}, set()  # pairs on the same grid share a mask
        read_labels = functools.lru_cache(1)(LabelImage)  # only the last: each subject may have its own

        def mask_for(modality: str, i: int, source: str) -> torch.Tensor:
            size, affine = self.sizes[modality], self.affines[modality][i]
            key = size, source, affine.round(4).tobytes() if source else b""
            if key not in shared:
                mask = np.zeros(size, dtype=bool)
                if source and opt.pattern_file:
                    image = read_labels(Path(source))
                    labels.update(image.labels)
                    mask = image.mask(tuple(opt.pattern_labels), size, affine)
                elif source:
                    mask = pattern_mask(size, affine, centres, opt.pattern_radius)
                    if not mask.any():
                        raise DataError(outside_rois(self.pairs[i], self.pairs[i].files[modality]))
                shared[key] = torch.from_numpy(mask)[None]
            return shared[key]

        self._masks = {modality: [] for modality in self.modalities}
        for i, pair in enumerate(self.pairs):
            source = "the ROIs" if uses_rois(opt, pair) else ""
            if opt.pattern_file:
                file = pair.file_of(opt.pattern_file)  # often made from the scan that an incomplete visit lacks
                source = str(file) if pair.is_complete or file.exists() else ""
            for modality in self.modalities:
                self._masks[modality].append(mask_for(modality, i, source if modality in pair.files else ""))
            self.has_pattern[i] = any(bool(masks[i].any()) for masks in self._masks.values())
        wrong = sorted(set(opt.pattern_labels) - labels)
        if opt.pattern_file and (wrong or not any(self.has_pattern)):  # a subject may have none: a patient's control
            what = f"labels {', '.join(map(str, wrong))} of opt.pattern_labels" if wrong else "labels over the volumes"
            raise UserError(f"opt.pattern_file = {opt.pattern_file!r}: no pair has {what}; the images have "
                            f"{', '.join(map(str, sorted(labels)[:20])) or 'none'}. Correct one of them")

    def pattern_fingerprint(self) -> str:
        """Hash of all pattern masks."""
        digests = [hashlib.sha256(mask.numpy()).digest() for masks in self._masks.values() for mask in masks]
        return hashlib.sha256(b"".join(digests)).hexdigest()

    def misaligned_pairs(self) -> list[Problem]:
        """A warning for each pair that is overlaid edge to edge although its two fields of view differ."""
        if self.alignment.how != "grid":
            return []
        grids = [zip(affines, self.sizes.values()) for affines in zip(*self.affines.values())]
        return [warning for pair, two in zip(self.pairs, grids)
                if pair.is_complete and (warning := misalignment(pair, *two))]

    @functools.cached_property
    def extent(self) -> torch.Tensor:
        """(3,) mm: size of the common box, or the median of the first modality's fields of view."""
        modality = self.modalities[0]
        lengths = [spacing_of(affine) * self.sizes[modality] for affine in self.affines[modality] if affine is not None]
        return torch.from_numpy(np.median(lengths, axis=0))

    def volumes(self, positions: list[int], device: torch.device = CPU) -> dict[str, torch.Tensor]:
        """{modality: (B, 1, X, Y, Z)} float32 in [-1, 1], on the device; NaN where a scan sees nothing.

        Raises VolumeError if one has become unreadable.
        """
        if self._kept and device == self._kept["device"]:
            return self._from_kept("volumes", positions)
        return {modality: to_device(torch.from_numpy(np.stack([
            load_volume(files[i]) if files[i] else np.full(self.sizes[modality], np.nan, np.float32)
            for i in positions])[:, None]), device) for modality, files in self._files.items()}

    def masks(self, positions: list[int], device: torch.device = CPU) -> dict[str, torch.Tensor]:
        """{modality: (B, 1, X, Y, Z)} pattern masks, 0 or 1, on the device; all 0 for a pair that has none."""
        if self._kept and device == self._kept["device"]:
            return {modality: masks.float() for modality, masks in self._from_kept("masks", positions).items()}
        return {modality: to_device(torch.stack([masks[i] for i in positions]), device).float()
                for modality, masks in self._masks.items()}

    def keep_on(self, device: torch.device, room: int) -> None:
        """Keep volumes and masks on a device, so that no step reads a file, if they take at most `room` bytes."""
        different = {modality: {id(mask): mask for mask in masks} for modality, masks in self._masks.items()}
        voxels = {modality: math.prod(size) for modality, size in self.sizes.items()}
        if sum((4 * len(self.pairs) + len(different[modality])) * n for modality, n in voxels.items()) > room:
            return
        volumes = {modality: torch.empty(len(self.pairs), 1, *size, device=device)
                   for modality, size in self.sizes.items()}
        for i in interruptible(range(len(self.pairs))):  # one by one: the computer may have less memory than the GPU
            for modality, volume in self.volumes([i]).items():
                volumes[modality][i].copy_(volume[0])
        self._kept = {
            "volumes": {modality: (each, range(len(self.pairs))) for modality, each in volumes.items()},
            "masks": {modality: (to_device(torch.stack(list(masks.values())), device),
                                 [list(masks).index(id(mask)) for mask in self._masks[modality]])
                      for modality, masks in different.items()},
            "device": device}

    def _from_kept(self, what: str, positions: list[int]) -> dict[str, torch.Tensor]:
        return {modality: kept[to_device(torch.tensor([places[i] for i in positions]), kept.device)]
                for modality, (kept, places) in self._kept[what].items()}

    def mean_volumes(self, groups: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
        """{modality: (1 + groups, 1, X, Y, Z)} mean of all training volumes, then of those of each group."""
        def mean(files: list[Path]) -> torch.Tensor:
            total = known = 0.0  # a voxel's mean is over those that see it; -1 where none does
            for file in files:
                volume = load_volume(file).astype(np.float64)
                total, known = total + np.nan_to_num(volume), known + ~np.isnan(volume)
            return torch.from_numpy(np.where(known > 0, total / np.maximum(known, 1), -1)).float()

        members = [self.trained_on, *([i for i in self.trained_on if self.pairs[i].group == group] for group in groups)]
        return {modality: torch.stack([mean([files[i] for i in positions if files[i]])
                                       for positions in members])[:, None] for modality, files in self._files.items()}

    def train_range(self, modality: str) -> tuple[float, float]:
        """Medians over the training volumes of the intensities that became -1 and 1: the units of synthetic volumes."""
        return tuple(np.median([self.ranges[modality][i] for i in self.roles["train"]], axis=0).tolist())


def _decode(pair: Pair, readings: dict[str, Reading], alignment: Alignment, cache_dir: Path) -> dict:
    """modality -> cache file and metadata of each scan. Raises DataError, which says how to go on without the visit."""
    try:
        return {modality: cached_volume(pair.files[modality], reading, cache_dir)
                for modality, reading in alignment.readings(readings, pair.files).items()}
    except DataError as error:
        raise DataError(*(or_leave_out(problem, pair.is_complete) for problem in error.problems)) from error


def find_study(opt) -> tuple[list[Pair], list[Problem], dict[str, Reading]]:
    """Return the pairs in opt.data_root, all problems, and how each modality is read; write the demo on first use."""
    root = Path(opt.data_root)
    if root == Path(DEMO_ROOT) and not (root / COMPLETE).exists():
        print(f"Writing the demo data set to {root} ...")
        remove_temporary_files(root)  # of a process that was killed
        write_demo(root)
    pairs, problems = find_pairs(root, tuple(opt.modalities), tuple(opt.exclude), opt.bids_suffix,
                                 opt.share_scans, needed=1 if opt.incomplete == "use" else 2)
    try:
        sizes = opt.image_sizes()
    except UserError as error:  # only with --check, which suggests sizes: otherwise opt.validate refuses them
        given = "image_size" in opt.edited
        problems.append(Problem("opt.image_size", str(error) if given else f"not given for {', '.join(opt.modalities)}",
                                "set it as suggested", "all", fatal=given))
        sizes = dict.fromkeys(opt.modalities)
    reduce, intensity = opt.per_modality("reduce"), opt.per_modality("intensity")
    return pairs, problems, {name: Reading(name, sizes[name], reduce[name], opt.resize, intensity[name])
                             for name in opt.modalities}


def split_study(opt, visits: list[Pair]) -> tuple[list[Pair], dict[str, list[int]], list[Problem]]:
    """Return the visits that take part, their roles, and warnings. Raises DataError."""
    pairs = [visit for visit in visits if visit.is_complete]
    roles = split_subjects(pairs, opt.folds, opt.fold, opt.validation_fraction, opt.seed)
    pairs, warnings = add_incomplete(pairs, roles, [visit for visit in visits if not visit.is_complete],
                                     opt.fold if opt.folds > 1 else None)
    if opt.condition_on_group:
        learnt = {"", *(pairs[i].group for i in roles["train"])}
        warnings += [Problem(pairs[i].name, f"is trained on without its group, {pairs[i].group}: no training pair is "
                             "of this group", "correct its group if that is wrong", pairs[i].name, fatal=False)
                     for i in roles.get("incomplete", []) if pairs[i].group not in learnt]
    return pairs, roles, warnings


def read_study(opt) -> Study:
    """Find, split and decode the pairs in opt.data_root; print warnings. Raises DataError, UserError, Interrupted."""
    pairs, problems, readings = find_study(opt)
    warnings = raise_if_fatal(problems)
    pairs, roles, left_out = split_study(opt, pairs)
    study = Study(pairs, roles, readings, align(opt, pairs), Path(opt.cache_dir))
    scored = [pairs[i] for i in roles["test"] if opt.refine]
    print_notes(warnings + left_out + study.problems + empty_regions(opt, scored))
    study.set_pattern(opt)
    if opt.pattern_weight and (opt.pattern_file or opt.pattern_networks) and not all(study.has_pattern):
        why, remedy = (("have no such label in opt.pattern_file", "") if opt.pattern_file else
                       ("are not known to be in MNI space, as the ROIs are", '. Set opt.space = "mni" if they are in '
                        "it, or opt.pattern_file to a label image of your own"))
        print(f"note: {study.has_pattern.count(False)} of {len(pairs)} visits {why}: all their voxels have the same "
              f"weight in the loss{remedy}")
    if misaligned := study.misaligned_pairs():
        print(f"note: {len(misaligned)} of {len(pairs)} pairs are misaligned, for example {misaligned[0]}")
    if opt.folds == 1:
        print("note: opt.folds = 1: the training subjects are also tested on; scores say nothing about new subjects")
    return study
