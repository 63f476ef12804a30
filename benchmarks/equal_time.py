"""Do two stages beat a plain regression of the same network, if both have the same time in all?

    python -m benchmarks.equal_time --minutes 6 12 24 --seeds 3                         [any options of main.py]
    python -m benchmarks.equal_time --minutes 20 --data_root pairs.csv --arms "regression only" "two stages"

Trains every arm, length and seed with `python main.py` in folders of their own. Minutes become steps by each arm's own
time per step (benchmarks/step.py; all arms in turn, the best of three rounds), and are divided between the stages as
opt.epochs to opt.refine_epochs of equally many steps; the samples that the published form refines count. Validation and
pictures do not, in any arm. Scores the best model on the test subjects, and for the demo on 120 new ones rendered like
the demo's. Run the same command to resume. Writes scores.csv, table.md and curves.png.
"""

import argparse
import csv
import itertools
import json
import shlex
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.ablation import run_main
from benchmarks.augmentation import new_subjects
from benchmarks.comparison import save_report
from benchmarks.step import run_case
from data.cache import load_volume
from data.pairs import Pair
from data.study import find_study, read_study
from models.diffusion import name_key
from opt import PRESETS, opt
from synthesis.model import open_model
from training.launch import choose_device
from utils.arguments import parse_arguments
from utils.files import write_table, write_text
from utils.metrics import METRICS, score

REFERENCE = "regression only"
STEPS, ROUNDS = 16, 3  # timed, and how often; steps with incomplete visits take longer
ARMS = {  # name -> options of both stages; a regression has a stage 1 of one step, because stage 2 asks for a model
    REFERENCE: "--coarse none", "two stages": "",
    "published form": "--coarse joint --timestep_coupling shared --prediction epsilon --loss l1 --fusion late "
                      "--res_blocks 2 --output_blocks 1 --structure_weight 0 --optimiser adam --learning_rate 2e-3 "
                      "--refine_optimiser adam"}  # on patches: on single voxels it would take eight times as long
COLUMNS = ("arm", "minutes", "seed", "measured_minutes", "steps_1", "steps_2", "subject", "direction", *METRICS)


def plan(options: list[str]) -> dict:
    """Options of an arm, seconds per step of both stages and of all coarse volumes, and the share of stage 1."""
    settings = parse_arguments(opt, PRESETS, options, "")
    cases = [run_case(options, stage, steps=STEPS, own_data=settings.coarse != "joint") for stage in (1, 2)]
    first, second = (case["seconds_per_step"] for case in cases)
    steps = (0 if settings.coarse == "none" else settings.epochs), settings.refine_epochs
    # a joint sample evaluates both directions, forwards only: a third of a step of stage 2 per batch and evaluation
    pairs = sum(visit.is_complete for visit in find_study(settings)[0])
    drawn = pairs / settings.batch_size * settings.sampling_steps / 3 * second
    return {"options": options, "first": first, "second": second, "peak_gib": max(case["peak_gib"] for case in cases),
            "share": steps[0] * first / (steps[0] * first + steps[1] * second),
            "coarse": drawn if settings.coarse == "joint" else 0.0}


def train(folder: Path, costs: dict, minutes: float, options: list[str]) -> dict:
    """Train both stages unless they are finished; returns steps and the minutes that it took, by the clock."""
    path, seconds = folder / "run.json", 60 * minutes - costs["coarse"]
    steps = [max(1, round(seconds * share / costs[stage]))
             for stage, share in (("first", costs["share"]), ("second", 1 - costs["share"]))]
    run = {"steps_1": steps[0], "steps_2": steps[1], "measured_minutes": 0.0, "finished": False}
    run |= json.loads(path.read_text()) if path.exists() else {}
    if not run["finished"]:
        start = time.perf_counter()
        try:
            run_main(folder, steps[0], options)
            run_main(folder, steps[1], [*options, "--refine", f"--resume_path={folder / 'best_model.pth'}"])
            run["finished"] = True
        finally:  # what was interrupted counts
            run["measured_minutes"] += (time.perf_counter() - start) / 60
            write_text(path, json.dumps(run))
    return {name: run[name] for name in ("steps_1", "steps_2", "measured_minutes")}


def scores(checkpoint: Path, pairs: list[Pair], settings) -> list[dict]:
    """The whole-volume scores (METRICS) of every pair and direction."""
    settings.resume_path, rows = str(checkpoint), []
    model = open_model(settings, choose_device(settings.device))
    for pair, (source, target) in itertools.product(pairs, model.prior.network.directions):
        volumes = {modality: load_volume(file)
                   for modality, (file, _) in model.read(pair.files, Path(settings.cache_dir)).items()}
        made = model.translate(source, target, volumes[source][None], [name_key(pair.name)])["synth"][0]
        rows.append({"subject": pair.name, "direction": f"{source}->{target}",
                     **score(made, volumes[target], {})["volume"]})
    return rows


def tested_pairs(settings) -> list[Pair]:
    study = read_study(settings)
    return [study.pairs[i] for i in study.roles["test"]]


def compare(own: argparse.Namespace, base: list[str], arms: dict[str, str], new: list[Pair]) -> Iterator[list[dict]]:
    """Train and score the arms one by one; yields all rows of scores.csv so far. new: pairs to score on; without any,
    the test subjects of each seed's split."""
    rows, own.out = [], own.out.resolve()
    path = own.out / "plan.json"
    options = {arm: base + shlex.split(words) for arm, words in arms.items()}
    costs = json.loads(path.read_text()) if path.exists() else {}
    if other := [arm for arm, words in options.items() if arm in costs and costs[arm]["options"] != words]:
        raise SystemExit(f"{path}: {', '.join(other)} was planned with other options; choose another --out")
    new_arms = [arm for arm in options if arm not in costs]
    for _, arm in itertools.product(range(ROUNDS), new_arms):  # in turn: the load of a machine changes
        found = plan(options[arm])
        costs[arm] = min(costs.get(arm, found), found, key=lambda cost: cost["second"] / (1 - cost["share"]))
    write_text(path, json.dumps(costs, indent=1))
    for seed, minutes, (arm, words) in itertools.product(range(own.seeds), own.minutes, options.items()):
        words = [*words, f"--seed={seed}"]
        folder = own.out / f"{arm}, {minutes:g} min, seed {seed}"
        run = {"arm": arm, "minutes": minutes, "seed": seed, **train(folder, costs[arm], minutes, words)}
        kept = folder / "scores.csv"
        if not kept.exists():
            settings = parse_arguments(opt, PRESETS, words, "")
            found = scores(folder / "best_refine.pth", new or tested_pairs(settings), settings)
            write_table(kept, COLUMNS, [{**run, **row} for row in found])
        with open(kept, newline="") as file:
            rows += [{**row, **run, "psnr": float(row["psnr"]), "ssim": float(row["ssim"])}
                     for row in csv.DictReader(file)]
        write_table(own.out / "scores.csv", COLUMNS, rows)
        yield rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--minutes", type=float, nargs="+", required=True, help="total lengths")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", help="names; without it, all")
    parser.add_argument("--add", action="append", default=[], metavar="NAME=OPTIONS", help="an arm of your own")
    parser.add_argument("--out", type=Path, default=Path("results/equal_time"))
    own, base = parser.parse_known_args()
    base = ["--incomplete=leave_out", *base]  # the arms learn from the same pairs
    known = ARMS | dict(each.split("=", 1) for each in own.add)
    if not set(own.arms or ()) <= set(known):
        parser.error(f"--arms: choose from {', '.join(known)}")
    arms, settings = {name: known[name] for name in own.arms or known}, parse_arguments(opt, PRESETS, base, "")
    with tempfile.TemporaryDirectory() as folder:
        new = new_subjects(settings, Path(folder))
        for rows in compare(own, base, arms, new):
            text = save_report(own.out, rows, REFERENCE, "minutes", "minutes of training, both stages together")
    print(text, end="")


if __name__ == "__main__":
    main()
