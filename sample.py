"""Use a trained model: translate subjects who lack one modality, or draw new pairs.

    python sample.py --resume_path ./checkpoints/best_refine.pth --data_root new_subjects.csv
    python sample.py --resume_path ./checkpoints/best_model.pth --joint_samples 20
    torchrun --nproc-per-node 4 sample.py ...                                    the same on four devices

Writes a BIDS derivatives tree to opt.sample_dir: volumes with JSON sidecars, tables, pictures. Run the same command to
resume: volumes that are complete, and would be the same again, are kept. Exit status: as of main.py.
"""

import contextlib
import hashlib
import itertools
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.alignment import misalignment
from data.atlas import empty_regions, region_masks
from data.cache import doubts, load_volume
from data.intensity import brain_region, to_units
from data.pairs import Pair, find_pairs
from data.problems import DataError, Problem, print_notes, raise_if_fatal
from models.diffusion import name_key
from opt import PRESETS, names_affecting, opt
from synthesis import derivatives
from synthesis.model import TrainedModel, open_model
from synthesis.report import save_pictures, write_pair_tables, write_scores
from training.distributed import is_main_rank, local_main_first, process_group, shard, stop_requested_on_any_rank
from training.launch import FINISHED, choose_device, run_program
from utils.arguments import parse_arguments
from utils.errors import UserError
from utils.files import lock_folders, make_writable, remove_temporary_files
from utils.metrics import score
from utils.stop import Interrupted, exit_with, interruptible, stop

FIRST = ("resume_path", "data_root", "average_flips", *names_affecting("sample.py"))  # in --help


def read_visits(opt, model: TrainedModel) -> list[derivatives.Visit]:
    """Decode the volumes in opt.data_root. Raises UserError and Interrupted."""
    pairs, problems = find_pairs(Path(opt.data_root), model.modalities, tuple(opt.exclude), opt.bids_suffix,
                                 opt.share_scans, needed=0)
    notes, visits, modalities = raise_if_fatal(problems), [], " or ".join(model.modalities)
    notes += [Problem(pair.name, f"left out because it has no {modalities}", "fill in a file", fatal=False)
              for pair in pairs if not pair.files]
    for pair in interruptible(tqdm([pair for pair in pairs if pair.files], desc="reading", unit="visit", disable=None)):
        try:
            scans = model.read(pair.files, Path(opt.cache_dir))
        except DataError as error:
            raise UserError(f"{error}.\nThe model's training decides how files are read (opt.image_size, opt.resize, "
                            "...), not opt.py: only correct the file, or exclude the subject (opt.exclude)") from error
        grids = [(np.array(metadata["affine"]), model.readings[name].size) for name, (_, metadata) in scans.items()]
        if model.alignment.how == "grid" and len(grids) > 1 and (note := misalignment(pair, *grids)):
            notes.append(note)
        for modality, (_, metadata) in scans.items():
            notes += doubts(pair, modality, metadata["doubts"])
        visits.append((pair, scans))
    if not visits:
        raise UserError(f"opt.data_root = {opt.data_root!r}: no visit has a file of {modalities}; give a CSV with one "
                        "of these columns, or a BIDS tree (opt.bids_suffix)")
    print_notes(notes + empty_regions(opt, [pair for pair, scans in visits if len(scans) > 1]))
    return visits


def new_pairs(opt, model: TrainedModel) -> list[derivatives.Visit]:
    """opt.joint_samples new pairs of each group."""
    labels = {group: derivatives.NOT_IN_LABELS.sub("", group)[:30] or f"group{n}"
              for n, group in enumerate(model.prior.groups, start=1)} or {"": ""}
    return [(Pair(f"sub-synth{label}{number:06d}", "", group, None, {}), {})
            for group, label in labels.items() for number in range(1, opt.joint_samples + 1)]


def synthesise(opt, model: TrainedModel, visits: list[derivatives.Visit], folder: Path, provenance: dict) -> None:
    """Write the missing volumes of this rank's shard, with scores where the target is known. Raises Interrupted.

    The batches do not depend on what exists, so a volume has the same last bits whenever it is synthesised.
    """
    batches = [(source, members[start:start + opt.batch_size]) for source in (*model.modalities, "")  # "": new pairs
               for members in [[visit for visit in visits if source in (visit[1] or ("",))]]
               for start in range(0, len(members), opt.batch_size)]
    for source, batch in interruptible(tqdm(shard(batches), desc="synthesising", unit="batch", disable=None)):
        targets = [modality for modality in model.modalities if modality != source]
        samples, missing, regions = opt.uncertainty_samples if source else 0, [], {}
        for (i, (pair, scans)), target, kind in itertools.product(enumerate(batch), targets, ("synth", "std")):
            made_with = {**provenance, "Scans": {name: [metadata["content"], np.round(metadata["affine"], 3).tolist()]
                                                 for name, (_, metadata) in scans.items()}}
            if kind == "std" and samples:
                made_with["uncertainty_samples"] = samples
            if kind == "synth" and target in scans and opt.region_file:
                regions[i, target] = region_masks(opt, pair, model.readings[target].size,
                                                  np.array(scans[target][1]["affine"]))
                made_with["Regions"] = {name: hashlib.sha256(mask).hexdigest()  # in others, there would be other scores
                                        for name, mask in regions[i, target].items()}
            path = derivatives.volume_path(folder, pair, target, kind)
            if not derivatives.is_complete(path, made_with) and (samples or kind == "synth"):
                missing.append((i, target, kind, path, made_with))
        names = [pair.name for pair, _ in batch]
        if missing and source:
            sources = np.stack([load_volume(scans[source][0]) for _, scans in batch])
            made = model.translate(source, *targets, sources, [name_key(name) for name in names],
                                   opt.average_flips, opt.realism, samples)
        elif missing:
            made = model.draw([int(name[-6:]) for name in names], [pair.group for pair, _ in batch])  # their number
        for i, target, kind, path, made_with in missing:
            (pair, scans), volume, (low, high) = batch[i], made[kind if source else target][i], model.ranges[target]
            affines = {modality: np.array(metadata["affine"]) for modality, (_, metadata) in scans.items()}
            affine, scores = affines.get(target, model.affines[target]), {}
            if target in scans and kind == "synth":
                truth = load_volume(scans[target][0])
                scores = score(volume, truth, {"brain": brain_region(truth), **regions.get((i, target), {})})
            elif source and target not in scans:  # lies to the source as in the first training pair
                affine = affines[source] @ np.linalg.inv(model.affines[source]) @ affine
            volume = volume * (high - low) / 2 if kind == "std" else to_units(volume, low, high)
            frame = pair.files.get(source if opt.output_space == "source" else target)
            derivatives.write(path, volume, affine, frame, pair.files.get(source), MadeWith=made_with, Group=pair.group,
                              Subject=pair.name, Direction=f"{source}->{target}",
                              TrainedOn=model.has_seen(scans), Scores=derivatives.json_scores(scores))


def run(settings) -> int:
    """Open the model, synthesise what is missing, and report; returns the exit status."""
    settings.validate()
    stop.set_time_limit(settings.max_minutes)
    joint, device = settings.joint_samples > 0, choose_device(settings.device)
    folder = Path(settings.sample_dir) / ("joint" if joint else "translated")
    with process_group(device), contextlib.ExitStack() as stack:
        model = open_model(settings, device)
        how = ("average_flips", "realism", "output_space")
        provenance = model.provenance | ({} if joint else {name: getattr(settings, name) for name in how})
        with local_main_first():
            visits = (new_pairs if joint else read_visits)(settings, model)
            derivatives.refuse_name_clashes(folder, [pair for pair, _ in visits])
            make_writable(folder, settings.cache_dir)
            if is_main_rank():
                stack.enter_context(lock_folders(folder))
                derivatives.start_tree(folder, provenance)
            for each in (folder, Path(settings.cache_dir)):
                remove_temporary_files(each)
        with contextlib.suppress(Interrupted):  # the ranks meet below
            synthesise(settings, model, visits, folder, provenance)
        if stop_requested_on_any_rank():
            raise Interrupted
        if is_main_rank():
            if joint:
                write_pair_tables(folder, model.modalities)
                print(f"Check for copies of training volumes: python -m benchmarks.memorisation {folder} --resume_path "
                      f"{settings.resume_path}")
            else:
                write_scores(folder)
            save_pictures(folder, visits, model)
            missing = sum(modality not in pair.files for pair, _ in visits for modality in model.modalities)
            what = "new pairs" if joint else f"visits ({missing} scans were missing)"
            print(f"{len(visits)} {what}: the synthesised volumes are in {folder}, and pictures in "
                  f"{folder / 'synthesis.png'}")
    return FINISHED


def main(argv: list[str]) -> int:
    return run_program(run, parse_arguments(opt, PRESETS, argv, __doc__.splitlines()[0], FIRST))


if __name__ == "__main__":
    exit_with(main(sys.argv[1:]))
