"""Which settings are worth it: variants of one stage, trained with equal steps, over several seeds.

    python -m benchmarks.ablation --steps 200 --seeds 3                                 [any options of main.py]
    python -m benchmarks.ablation --stage 2 --steps 200 --variants default "regression only" "joint prior"
    python -m benchmarks.ablation --steps 200 --variants default L1 --add "L1=--loss l1 --learning_rate 5e-4"

Trains every variant and seed with `python main.py` in a folder of its own; stage 2 refines one stage 1 per seed, of the
same length. Run the same command to resume. Writes runs.csv, with the last scores of validation subjects in each
log.csv ("validation": x0 error in stage 1, PSNR in stage 2; "psnr" and "ssim": of samples), and table.md: mean and
standard deviation over seeds, and the default minus each variant, paired by seed, with its 95 % interval.
"""

import argparse
import csv
import itertools
import json
import shlex
import sys
from pathlib import Path

import numpy as np

from benchmarks import STAGE_1_FIRST, run_child
from utils.files import write_table, write_text
from utils.metrics import gain_text

VARIANTS = {
    1: {"default": "", "Adam": "--optimiser adam --learning_rate 2e-3",
        "timesteps shared": "--timestep_coupling shared", "epsilon": "--prediction epsilon",
        "fusion late": "--fusion late", "loss L1": "--loss l1", "pattern weight 0": "--pattern_weight 0",
        "published topology": "--fusion late --res_blocks 2 --output_blocks 1 --patch_size 1"},
    2: {"default": "", "regression only": "--coarse none", "joint prior": "--coarse joint",
        "no microstructure loss": "--microstructure_weight 0", "no structure loss": "--structure_weight 0",
        "Adam": "--refine_optimiser adam"}}
COLUMNS = ("variant", "seed", "steps", "validation", "psnr", "ssim")


def scores(folder: Path, stage: int, steps: int) -> dict:
    """The scores in log.csv after so many steps; empty where the run has not got there."""
    name, metric = ("stage1", "x0_error") if stage == 1 else ("refine", "psnr")
    try:
        with open(folder / name / "log.csv", newline="") as file:
            rows = {row["kind"]: row for row in csv.DictReader(file) if int(row["step"]) == steps}
        return {"steps": steps, "validation": float(rows["validation"][metric]),
                "psnr": float(rows["samples"]["psnr"]), "ssim": float(rows["samples"]["ssim"])}
    except (FileNotFoundError, KeyError):
        return {}


def run_main(folder: Path, steps: int, options: list[str]) -> None:
    """Train or resume a run of so many steps in a folder, in a child process. Exits where it fails or is stopped."""
    print(f"---- {folder.name}: {steps} steps", flush=True)
    command = [sys.executable, "main.py", "--no-tensorboard", *STAGE_1_FIRST, *options, f"--max_steps={steps}",
               "--epochs=99999", "--refine_epochs=99999", f"--checkpoint_dir={folder}", f"--result_dir={folder}"]
    if run_child(command):
        raise SystemExit(f"{folder}: training failed or was stopped; run the same command to resume")


def train(folder: Path, stage: int, steps: int, options: list[str]) -> dict:
    """Train or resume a run, unless it is finished; returns its scores."""
    if not scores(folder, stage, steps):
        run_main(folder, steps, ["--num_samples=8", *options])
    return scores(folder, stage, steps)


def keep_to_plan(path: Path, runs: dict[str, list]) -> None:
    """Write name -> stage, steps and options of each run. Exits where --out holds another ablation."""
    plan = json.loads(path.read_text()) if path.exists() else {}
    if other := [name for name, run in runs.items() if plan.get(name, run) != run]:
        raise SystemExit(f"{path}: {', '.join(other)} was run with other options or steps; choose another --out")
    write_text(path, json.dumps(plan | runs, indent=1))


def table(rows: list[dict]) -> str:
    """Markdown, one line per variant."""
    columns, by_variant = COLUMNS[3:], {}
    for row in rows:
        by_variant.setdefault(row["variant"], {})[row["seed"]] = row
    heads = ["variant", "steps", *columns, *(f"default minus variant: {column}" for column in columns)]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for variant, runs in by_variant.items():
        cells, gains = [variant, str(next(iter(runs.values()))["steps"])], []
        seeds = sorted(runs.keys() & by_variant.get("default", {}).keys()) if variant != "default" else []
        for column in columns:
            values = [run[column] for run in runs.values()]
            cells.append(f"{np.mean(values):.4g} +- {np.std(values, ddof=1) if len(values) > 1 else np.nan:.2g}")
            pairs = [[by_variant[name][seed][column] for seed in seeds] for name in ("default", variant)]
            gains.append(gain_text(*pairs, "+.3g") if seeds else "")
        lines.append(f"| {' | '.join([*cells, *gains])} |")
    return "\n".join(lines)


def ablate(own: argparse.Namespace, base: list[str], variants: dict[str, str]) -> None:
    """base: options of all runs; variants: name -> the options that differ."""
    runs = {"stage 1": [1, own.steps, base]} if own.stage == 2 else {}
    runs |= {name: [own.stage, own.steps, base + shlex.split(options)] for name, options in variants.items()}
    keep_to_plan(own.out / "plan.json", runs)
    rows = []
    for seed, (name, (stage, steps, options)) in itertools.product(range(own.seeds), runs.items()):
        prior = own.out / f"stage 1, seed {seed}" / "best_model.pth"
        options = [*options, f"--seed={seed}", *(["--refine", f"--resume_path={prior}"] if stage == 2 else [])]
        found = train(own.out / f"{name}, seed {seed}", stage, steps, options)
        if name in variants:
            rows.append({"variant": name, "seed": seed, **found})
            write_table(own.out / "runs.csv", COLUMNS, rows)
            write_text(own.out / "table.md", table(rows) + "\n")
    print(table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--stage", type=int, choices=(1, 2), default=1)
    parser.add_argument("--steps", type=int, required=True, help="of every run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", help="names; without it, all")
    parser.add_argument("--add", action="append", default=[], metavar="NAME=OPTIONS", help="a variant of your own")
    parser.add_argument("--out", type=Path, default=Path("results/ablation"))
    own, base = parser.parse_known_args()
    known = VARIANTS[own.stage] | dict(each.split("=", 1) for each in own.add)
    if not set(own.variants or ()) <= set(known):
        parser.error(f"--variants: choose from {', '.join(known)}")
    ablate(own, base, {name: known[name] for name in own.variants or known})


if __name__ == "__main__":
    main()
