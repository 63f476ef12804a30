"""Use a trained model: translate subjects of whom one modality is missing, or draw new pairs.

    python sample.py --resume_path ./checkpoints/best_refine.pth --data_root new_subjects.csv
    python sample.py --resume_path ./checkpoints/best_model.pth --joint_samples 20
    torchrun --nproc-per-node 4 sample.py ...                                    the same, on four devices

Leaves a BIDS derivatives tree in opt.sample_dir: volumes, a JSON beside each, metrics.csv where the truth is there,
and a page of pictures. What is there already, whole and made the same way, is not made again. Exit status: as that of
main.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from tqdm import tqdm

import train
import train_refine
from data.cache import Reading, cached_volume, load_volume
from data.grids import spacing_of
from data.intensity import brain_region, scale, to_units
from data.pairs import Pair, find_visits
from data.problems import refuse
from data.volumes import read_volume, save_image, write_volume
from models.backbone import Backbone
from models.diffusion import Purpose
from models.refine import RefineNet
from opt import PRESETS, OptionError, opt
from program import FINISHED, choose_device, guarded
from utils.arguments import parse_arguments
from utils.checkpoint import UNFIT, CheckpointError, content_hash, read_checkpoint
from utils.distributed import first_on_each_machine, joined, share, wait, writes
from utils.figures import Panel, save_grid
from utils.files import make_writable, remove_strays, sole_writer, write_text
from utils.metrics import score, write_metrics
from utils.optimise import Interrupted, StopRequest, leave, number_type

DATATYPE = {"fmri": ("func", "boldref"), "dmri": ("dwi", "dwi")}  # other modalities: anat, and their own name
DESCRIPTION = {"Name": "PDS synthesis", "BIDSVersion": "1.9.0", "DatasetType": "derivative",
               "GeneratedBy": [{"Name": "PDS", "Description": "Pattern-aware Diffusion Synthesis: sample.py"}]}
SHOWN = 12  # volumes on the page of pictures


@dataclass
class Job:
    """One volume to make: `target` of a visit from its `source`, or of a joint sample where there is none."""

    pair: Pair
    source: str
    target: str
    key: int  # of the noise

    def path(self, folder: Path, description: str = "synth") -> Path:
        datatype, suffix = DATATYPE.get(self.target, ("anat", self.target))
        visit = folder / self.pair.name.split("_ses-")[0]
        if self.pair.session:
            visit = visit / self.pair.name.split("_", 1)[1]
        return visit / datatype / f"{self.pair.name}_desc-{description}_{suffix}.nii.gz"


class Model:
    """A trained model of either stage, and how it samples: stage 2 as it was trained, stage 1 as `opt` says."""

    def __init__(self, state: dict, opt, device: torch.device):
        if not isinstance(state.get("affines"), dict):
            raise CheckpointError(f"{opt.resume_path}: is of an earlier version, which does not keep where the grids "
                                  "lie in space; train again to use it here")
        stage_1 = state if state["stage"] == train.STAGE else state["backbone"]
        how = opt.resolved() if state["stage"] == train.STAGE else state["options"]
        self.state, self.stage, self.sizes, self.refiner = state, state["stage"], dict(state["sizes"]), None
        self.cache = Path(opt.cache_dir)
        try:
            self.backbone = Backbone.from_checkpoint(stage_1, device, number_type(opt.precision, device))
            if state["stage"] == train_refine.STAGE:
                self.refiner: RefineNet | None = train_refine.open_refined(state, device)
            self.seed, self.coarse, self.count = how["seed"], how["coarse"], how["coarse_samples"]
            self.sampler = {"steps": how["sampling_steps"], "sampler": how["sampler"], "eta": how["eta"]}
            saved = state["options"]
            self.readings = {name: Reading(name, tuple(size), saved["reduce"][name], saved["resize"],
                                           saved["intensity"][name]) for name, size in state["sizes"].items()}
        except UNFIT as error:
            raise CheckpointError(f"{opt.resume_path}: does not fit this version of PDS ({error})") from error
        if self.stage == train.STAGE:  # what only stage 2 has learnt to use
            self.coarse = "given"
        weights = content_hash(self.refiner or self.backbone.network)
        self.how = {"Stage": self.stage, "Weights": weights, "Sampler": self.sampler, "Seed": self.seed,
                    "Prior": self.coarse, "Samples": self.count}

    def samples(self, source: str, target: str, volume: torch.Tensor, key: int, count: int,
                watch: Callable) -> torch.Tensor:
        """Samples (count, 1, X, Y, Z) of the target by the prior, keyed by (seed, key, number)."""
        keys = [(self.seed, Purpose.COARSE, key, k) for k in range(count)]
        given = {source: volume.expand(count, -1, -1, -1, -1)} if self.coarse == "given" else None
        return self.backbone.sample(keys, self.sizes, **self.sampler, given=given, progress=watch)[target]

    @torch.no_grad()
    def translate(self, source: str, target: str, volume: torch.Tensor, key: int, uncertain: int,
                  watch: Callable) -> tuple[np.ndarray, np.ndarray | None]:
        """A source (1, 1, X, Y, Z) in [-1, 1] -> (target (X, Y, Z) in [-1, 1], standard deviation of `uncertain`)."""
        volume = volume.to(self.backbone.device)
        if self.coarse == "none":
            drawn = self.refiner.direction(source, target).mean
        else:
            drawn = self.samples(source, target, volume, key, max(self.count, uncertain), watch)
        made = self._refine(source, target, volume, drawn[:self.count].mean(dim=0, keepdim=True))
        apart = None
        if uncertain > 1:
            apart = torch.cat([self._refine(source, target, volume, each[None]) for each in drawn]).std(dim=0)
        return made[0, 0].cpu().numpy(), None if apart is None else apart[0].cpu().numpy()

    def _refine(self, source: str, target: str, volume: torch.Tensor, coarse: torch.Tensor) -> torch.Tensor:
        if self.refiner is None:
            return coarse.float()
        with self.backbone.autocast():
            return self.refiner(source, target, volume, coarse).clamp(-1, 1).float()


def translations(opt, model: Model) -> list[Job]:
    """What to make of each visit in opt.data_root: the modality it lacks, or, to be scored, both."""
    names = tuple(model.sizes)
    visits, problems = find_visits(Path(opt.data_root), names, tuple(opt.exclude), opt.bids_suffix)
    for note in refuse(problems):
        print(f"note: {note}")
    complete = [pair for pair in visits if len(pair.files) == 2]
    jobs = []
    for pair in visits:  # complete pairs have the noise that the trainer gives them
        key = complete.index(pair) if pair in complete else 2**20 + zlib.crc32(pair.name.encode())
        jobs += [Job(pair, source, target, key) for source, target in (names, names[::-1]) if source in pair.files]
    return jobs


def scores(job: Job, made: np.ndarray, truth: np.ndarray) -> list[dict]:
    """Rows of metrics.csv, as the trainer's: in the whole volume, and in the brain."""
    return [{"subject": job.pair.name, "direction": f"{job.source}->{job.target}", "volume": "synthesised",
             "region": region, **values}
            for region, values in score(made, truth, {"brain": brain_region(truth)}).items()]


def write_translation(path: Path, made: np.ndarray, model: Model, job: Job, affine: np.ndarray, space: str) -> None:
    """Write a volume of the target in its units. affine: of the source (RAS) as the model sees it.

    The target's grid lies to the source's as in the first training pair, or where its own file does if there is one.
    """
    grid = affine @ np.linalg.inv(model.state["affines"][job.source]) @ np.array(model.state["affines"][job.target])
    if space == "source" or job.target in job.pair.files:
        reference = job.pair.files[job.source if space == "source" else job.target]
        if space == "target":
            grid = np.array(cached_volume(reference, model.readings[job.target], model.cache)[1]["affine"])
        write_volume(path, made, grid, reference)
    else:
        write_on_grid(path, made, grid, nib.load(job.pair.files[job.source]).header)


def write_on_grid(path: Path, made: np.ndarray, affine: np.ndarray, like: nib.Nifti1Header | None = None) -> None:
    """Write a volume on a grid of its own; like: a header whose codes tell which space it is in."""
    image = nib.Nifti1Image(made.astype(np.float32), affine)
    for form, code in (("sform", "sform_code"), ("qform", "qform_code")):
        getattr(image, f"set_{form}")(affine, code=int(like[code]) if like else 1)
    image.header.set_xyzt_units("mm")
    save_image(path, image)


def whole(path: Path, how: dict) -> dict | None:
    """What the JSON beside a volume says, where both are there, whole, and made this way; else None."""
    try:
        told = json.loads(path.with_name(path.name.replace(".nii.gz", ".json")).read_text())
        same = told["MadeWith"] == how and told["SHA256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return told if same else None


def tell(path: Path, how: dict, sources: list[str], rows: list[dict]) -> None:
    """Write the JSON beside a volume: last, so that its presence says that all of it is there."""
    told = {"Description": "Synthesised by PDS; no measurement", "Sources": sources, "MadeWith": how,
            "SHA256": hashlib.sha256(path.read_bytes()).hexdigest(), "Scores": rows}
    write_text(path.with_name(path.name.replace(".nii.gz", ".json")), json.dumps(told, indent=2) + "\n")


def translate(opt, model: Model, stop: StopRequest) -> list[tuple[Job, Path]]:
    """Make what is missing of this rank's share; returns all jobs with their files."""
    folder, jobs = Path(opt.sample_dir), translations(opt, model)
    how = {**model.how, "Space": opt.output_space, "UncertaintySamples": opt.uncertainty_samples}
    files = [(job, job.path(folder)) for job in jobs]
    for job, path in stop.watch(tqdm(share(files), desc="translating", unit="volume", disable=None)):
        inputs = {name: cached_volume(file, model.readings[name], model.cache) for name, file in job.pair.files.items()}
        made_with = {**how, "Source": inputs[job.source][1]["content"]}
        if whole(path, made_with):
            continue
        volume = torch.from_numpy(load_volume(inputs[job.source][0]))[None, None]
        made, apart = model.translate(job.source, job.target, volume, job.key, opt.uncertainty_samples, stop.watch)
        affine, (low, high) = np.array(inputs[job.source][1]["affine"]), model.state["ranges"][job.target]
        write_translation(path, to_units(made, low, high), model, job, affine, opt.output_space)
        if apart is not None:
            write_translation(job.path(folder, "std"), apart * (high - low) / 2, model, job, affine, opt.output_space)
        rows = scores(job, made, load_volume(inputs[job.target][0])) if job.target in inputs else []
        tell(path, made_with, [job.pair.files[job.source].name], rows)
    return files


def draw(opt, model: Model, stop: StopRequest) -> list[tuple[Job, Path]]:
    """New pairs from noise alone, in the geometry of the first training pair; returns all of them with their files."""
    folder, how = Path(opt.sample_dir), {**model.how, "Prior": "joint", "Seed": opt.seed}
    pairs = [Pair(f"sub-synth{n + 1:04d}", "", "", None, {}) for n in range(opt.joint_samples)]
    files = [[(Job(pair, "", name, n), Job(pair, "", name, n).path(folder)) for name in model.sizes]
             for n, pair in enumerate(pairs)]
    for both in stop.watch(tqdm(share(files), desc="drawing pairs", unit="pair", disable=None)):
        if all(whole(path, how) for _, path in both):
            continue
        made = model.backbone.sample([(opt.seed, Purpose.JOINT, both[0][0].key)], model.sizes, **model.sampler,
                                     progress=stop.watch)
        for job, path in both:
            write_on_grid(path, to_units(made[job.target][0, 0].cpu().numpy(), *model.state["ranges"][job.target]),
                          np.array(model.state["affines"][job.target]))
            tell(path, how, [], [])
    return [each for both in files for each in both]


def picture(files: list[tuple[Job, Path]], model: Model, path: Path) -> None:
    """One page of the first volumes: source, synthesised, and where it is known the truth and the absolute error."""
    rows = []
    for job, file in files[:SHOWN]:
        scan = read_volume(file, "first")
        made, panels = scale(scan.voxels, *model.state["ranges"][job.target]), []
        for name in filter(None, (job.source, job.target if job.target in job.pair.files else "")):
            voxels, facts = cached_volume(job.pair.files[name], model.readings[name], model.cache)
            panels.append(Panel(load_volume(voxels), spacing_of(np.array(facts["affine"]))))
        panels.insert(min(1, len(panels)), Panel(made, spacing_of(scan.affine)))
        if len(panels) == 3 and panels[2].volume.shape == made.shape:
            panels.append(Panel(np.abs(made - panels[2].volume), panels[2].spacing, "white is 1", kind="error"))
        panels += [None] * (4 - len(panels))
        rows.append((f"{job.pair.name}\n{f'{job.source} -> ' if job.source else ''}{job.target}", panels))
    columns = ["source", "synthesised", "truth", "absolute error"] if files[0][0].source else ["drawn", "", "", ""]
    save_grid(path, f"{len(files)} volumes, the first {len(rows)} of them", columns, rows)


def run(settings, stop: StopRequest) -> int:
    """Validate, open the model, make what is missing, and report; returns the exit status."""
    settings.validate()
    stop.end_after(settings.max_minutes)
    if not settings.resume_path:
        raise OptionError('sample.py needs a trained model: set opt.resume_path, for example "./checkpoints/'
                          'best_refine.pth"')
    device, folder = choose_device(settings.device), Path(settings.sample_dir)
    with joined(device), contextlib.ExitStack() as held:
        state = read_checkpoint(Path(settings.resume_path), (train.STAGE, train_refine.STAGE))
        model = Model(state, settings, device)
        make_writable(folder, settings.cache_dir)
        if writes():
            held.enter_context(sole_writer(settings.sample_dir))
            write_text(folder / "dataset_description.json", json.dumps(DESCRIPTION, indent=2) + "\n")
        with first_on_each_machine():
            for each in (folder, model.cache):
                remove_strays(each)
        files = (draw if settings.joint_samples else translate)(settings, model, stop)
        wait()
        if stop.agreed():
            raise Interrupted
        if writes() and files:
            rows = [row for _, path in files for row in json.loads(
                path.with_name(path.name.replace(".nii.gz", ".json")).read_text())["Scores"]]
            if rows:
                write_metrics(folder / "metrics.csv", rows)
            picture(files, model, folder / "synthesis.png")
        print(f"{len(files)} volumes are in {folder}; pictures: {folder / 'synthesis.png'}")
    return FINISHED


def main(argv: list[str]) -> int:
    return guarded(run, parse_arguments(opt, PRESETS, argv, __doc__.splitlines()[0]))


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
