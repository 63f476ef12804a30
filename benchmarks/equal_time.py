"""Do two stages beat a plain regression of the same network, if both have the same time in all?

    python -m benchmarks.equal_time --minutes 6 12 24 --seeds 3                         [any options of main.py]
    python -m benchmarks.equal_time --minutes 20 --data_root pairs.csv --arms "regression only" "two stages"

Trains every arm, length and seed with `python main.py` in folders of their own. Minutes become steps by each arm's own
time per step (benchmarks/step.py); stage 1, and the samples that the published form refines, count. Validation and
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
from pathlib import Path

import numpy as np

from benchmarks.ablation import run_main
from benchmarks.augmentation import new_subjects
from benchmarks.chart import save_chart
from benchmarks.step import run_case
from data import demo
from data.cache import load_volume
from data.pairs import Pair
from data.study import find_study, read_study
from models.diffusion import name_key
from opt import PRESETS, opt
from synthesis.model import open_model
from training.launch import choose_device
from utils.arguments import parse_arguments
from utils.files import write_table, write_text
from utils.metrics import METRICS, paired_gain, score

REFERENCE = "regression only"
STEPS = 16  # timed: where visits are incomplete, steps take different times
ARMS = {  # name -> options of both stages; a regression has a stage 1 of one step, because stage 2 asks for a model
    REFERENCE: "--coarse none", "two stages": "",
    "published form": "--coarse joint --timestep_coupling shared --prediction epsilon --loss l1 --fusion late "
                      "--res_blocks 2 --output_blocks 1 --structure_weight 0 --optimiser adam --learning_rate 2e-3 "
                      "--refine_optimiser adam"}  # on patches: on single voxels it would take eight times as long
COLUMNS = ("arm", "minutes", "seed", "measured_minutes", "steps_1", "steps_2", "subject", "direction", *METRICS)


def plan(options: list[str]) -> dict:
    """Options of an arm, seconds per step of both stages and of all coarse volumes, and the share of stage 1."""
    settings = parse_arguments(opt, PRESETS, options, "")
    cases = [run_case(options, stage, steps=STEPS, own_data=True) for stage in (1, 2)]
    first, second = (case["seconds_per_step"] for case in cases)
    steps = (0 if settings.coarse == "none" else settings.epochs), settings.refine_epochs
    # a joint sample evaluates both directions, forwards only: a third of a step of stage 2 per batch and evaluation
    drawn = len(find_study(settings)[0]) / settings.batch_size * settings.sampling_steps / 3 * second
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


def table(rows: list[dict]) -> str:
    """Markdown: per length and arm the scores, mean over runs +- standard deviation between seeds, and the gain over
    the regression: of both directions, paired by seed and subject, with its 95 % interval over subjects."""
    runs = {}  # (minutes, arm) -> direction -> seed -> subject -> (psnr, ssim)
    for row in rows:
        run = runs.setdefault((row["minutes"], row["arm"]), {}).setdefault(row["direction"], {})
        run.setdefault(row["seed"], {})[row["subject"]] = np.array((row["psnr"], row["ssim"]))
    directions = sorted({row["direction"] for row in rows})
    lines = [f"| minutes | arm | {' | '.join(f'{direction}, dB / SSIM' for direction in directions)} | over the "
             f"{REFERENCE}, dB | each seed | over the {REFERENCE}, SSIM |", f"|{'---|' * (5 + len(directions))}"]
    for (minutes, arm), run in sorted(runs.items(), key=lambda item: (item[0][0], item[0][1] != REFERENCE)):
        cells, reference = [f"{minutes:g}", arm], runs.get((minutes, REFERENCE), {})
        for direction in directions:
            each = np.array([np.mean(list(subjects.values()), axis=0) for subjects in run[direction].values()])
            spread = each.std(axis=0, ddof=min(1, len(each) - 1))
            psnr, ssim = (f"{mean:.{digits}f}" + (f" +- {std:.{digits}f}" if len(each) > 1 else "")
                          for mean, std, digits in zip(each.mean(axis=0), spread, (2, 3)))
            cells.append(f"{psnr} / {ssim}")
        gains = {}  # subject -> seed -> gains of both directions
        compared = set(run[directions[0]]) & set(reference.get(directions[0], {})) if arm != REFERENCE else set()
        for direction, seed in itertools.product(directions, sorted(compared)):
            for subject, values in run[direction][seed].items():
                if subject in reference[direction].get(seed, {}):
                    gains.setdefault(subject, {}).setdefault(seed, []).append(
                        values - reference[direction][seed][subject])
        if gains:
            mean = np.array([np.mean(np.concatenate(list(each.values())), axis=0) for each in gains.values()])
            by_seed = [np.concatenate([each[seed] for each in gains.values() if seed in each])[:, 0].mean()
                       for seed in sorted(compared)]
            psnr_gain, ssim_gain = (paired_gain(column, np.zeros(len(column))) for column in mean.T)
            cells += ["{:+.2f} ({:+.2f} .. {:+.2f})".format(*psnr_gain),
                      ", ".join(f"{gain:+.2f}" for gain in by_seed),
                      "{:+.4f} ({:+.4f} .. {:+.4f})".format(*ssim_gain)]
        lines.append(f"| {' | '.join(cells + [''] * (5 + len(directions) - len(cells)))} |")
    return "\n".join(lines)


def curves(rows: list[dict]) -> dict[str, np.ndarray]:
    """arm -> points (lengths, 2): minutes, mean PSNR."""
    found = {}
    for row in rows:
        found.setdefault(row["arm"], {}).setdefault(row["minutes"], []).append(row["psnr"])
    return {arm: np.array(sorted((minutes, np.mean(values)) for minutes, values in lengths.items()))
            for arm, lengths in found.items()}


def pairs_of(role: str, settings) -> list[Pair]:
    study = read_study(settings)
    return [study.pairs[i] for i in study.roles[role]]


def compare(own: argparse.Namespace, base: list[str], arms: dict[str, str], new: list[Pair],
            role: str = "test") -> list[dict]:
    """Train and score all arms; returns the rows of scores.csv. new: pairs to score on; without any, those of this role
    in each seed's split."""
    rows, own.out = [], own.out.resolve()
    path = own.out / "plan.json"
    options = {arm: base + shlex.split(words) for arm, words in arms.items()}
    costs = json.loads(path.read_text()) if path.exists() else {}
    costs |= {arm: plan(words) for arm, words in options.items() if arm not in costs}
    if other := [arm for arm, words in options.items() if costs[arm]["options"] != words]:
        raise SystemExit(f"{path}: {', '.join(other)} was planned with other options; choose another --out")
    write_text(path, json.dumps(costs, indent=1))
    for seed, minutes, (arm, words) in itertools.product(range(own.seeds), own.minutes, options.items()):
        words = [*words, f"--seed={seed}"]
        folder = own.out / f"{arm}, {minutes:g} min, seed {seed}"
        run = {"arm": arm, "minutes": minutes, "seed": seed, **train(folder, costs[arm], minutes, words)}
        kept = folder / "scores.csv"
        if not kept.exists():
            settings = parse_arguments(opt, PRESETS, words, "")
            found = scores(folder / "best_refine.pth", new or pairs_of(role, settings), settings)
            write_table(kept, COLUMNS, [{**run, **row} for row in found])
        with open(kept, newline="") as file:
            rows += [{**row, **run, "psnr": float(row["psnr"]), "ssim": float(row["ssim"])}
                     for row in csv.DictReader(file)]
        write_table(own.out / "scores.csv", COLUMNS, rows)
        write_text(own.out / "table.md", table(rows) + "\n")
        save_chart(own.out / "curves.png", curves(rows), "minutes of training, both stages together",
                   f"PSNR (dB) on {len(new) or f'the {role}'} subjects, mean of both directions")
    print(table(rows))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--minutes", type=float, nargs="+", required=True, help="total lengths")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", help="names; without it, all")
    parser.add_argument("--add", action="append", default=[], metavar="NAME=OPTIONS", help="an arm of your own")
    parser.add_argument("--out", type=Path, default=Path("results/equal_time"))
    own, base = parser.parse_known_args()
    known = ARMS | dict(each.split("=", 1) for each in own.add)
    if not set(own.arms or ()) <= set(known):
        parser.error(f"--arms: choose from {', '.join(known)}")
    arms, settings = {name: known[name] for name in own.arms or known}, parse_arguments(opt, PRESETS, base, "")
    if settings.data_root == demo.DEMO_ROOT:
        with tempfile.TemporaryDirectory() as folder:
            compare(own, base, arms, new_subjects(Path(folder)))
        return
    compare(own, base, arms, [])


if __name__ == "__main__":
    main()
