"""What are incomplete visits worth, where few pairs are complete?

    python -m benchmarks.few_pairs --minutes 10 --pairs 5 10 20 41 --seeds 3                  [any options of main.py]
    python -m benchmarks.few_pairs --minutes 10 --pairs 10 --data_root pairs.csv --modalities t1 flair

Keeps the pairs of so many training subjects complete, and takes one of both scans, in turn, from the others; the
numbers of validation and test subjects stay, and visits that lack a scan from the start are left out. Three arms of
equal total time (benchmarks/equal_time.py): a plain regression on the complete pairs, both stages on the complete
pairs, and both stages on all visits. Scored on 120 new subjects for the demo, else on the validation subjects. Run the
same command to resume. Writes scores.csv, table.md and curves.png.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import equal_time
from benchmarks.augmentation import new_subjects
from benchmarks.chart import save_chart
from data import demo
from data.pairs import Pair
from data.study import find_study, split_study
from opt import PRESETS, opt
from utils.arguments import parse_arguments
from utils.files import write_table, write_text
from utils.metrics import DIGITS, paired_gain

ALL = "two stages, all visits"
ARMS = {"regression, complete pairs": "--coarse none --incomplete leave_out",
        "two stages, complete pairs": "--incomplete leave_out", ALL: ""}
SCORES = ("psnr", "ssim")


def write_study(path: Path, settings, complete: int) -> list[str]:
    """Write a table of the study in which so many training pairs are complete; returns the options to read it with."""
    visits, _, _ = find_study(settings)
    pairs, roles, _ = split_study(settings, [visit for visit in visits if visit.is_complete])
    train, validated = (sorted({pairs[i].person for i in roles[role]}) for role in ("train", "validation"))
    order = np.random.default_rng(0).permutation(train).tolist()  # the same subjects are complete for all seeds
    if not 0 < complete <= len(order):
        raise SystemExit(f"--pairs {complete}: the study has {len(order)} training subjects with complete pairs")
    rows, held_out = [], len(validated)
    for i, pair in enumerate(pairs):
        place = order.index(pair.person) if pair.person in order else 0
        kept = settings.modalities if place < complete else settings.modalities[place % 2:][:1]
        rows.append({"subject": pair.subject, "session": pair.session, "group": pair.group,
                     "fold": 0 if i in roles["test"] else 1, **{name: pair.files[name].absolute() for name in kept}})
    write_table(path, ("subject", "session", "group", "fold", *settings.modalities), rows)
    return [f"--data_root={path}", "--fold=0", f"--validation_fraction={held_out / (held_out + complete)}"]


def by_subject(rows: list[dict], complete: int, arm: str, direction: str, name: str) -> dict[str, float]:
    """subject -> mean score over the seeds."""
    found = {}
    for row in rows:
        if (row["pairs"], row["arm"], row["direction"]) == (complete, arm, direction):
            found.setdefault(row["subject"], []).append(float(row[name]))
    return {subject: float(np.mean(values)) for subject, values in found.items()}


def table(rows: list[dict]) -> str:
    """Markdown: scores of each arm, mean over seeds and subjects, and the gain of all visits by subject, with its 95 %
    interval, over each other arm."""
    lines = ["| complete pairs | direction | arm | seeds | psnr | ssim | all visits better by, dB | all visits better "
             f"by, ssim |\n|{'---|' * 8}"]
    for complete, direction in sorted({(row["pairs"], row["direction"]) for row in rows}):
        for arm in ARMS:
            cells, gains = [], []
            for name in SCORES:
                own, best = (by_subject(rows, complete, each, direction, name) for each in (arm, ALL))
                digits, both = DIGITS.get(name, 3), sorted(own.keys() & best.keys())
                cells.append(f"{np.mean(list(own.values())):.{digits}f}" if own else "")
                gain = paired_gain([best[subject] for subject in both], [own[subject] for subject in both]) \
                    if both and arm != ALL else ()
                gains.append("{:+.{d}f} ({:+.{d}f} .. {:+.{d}f})".format(*gain, d=digits) if gain else "")
            seeds = len({row["seed"] for row in rows if (row["pairs"], row["arm"]) == (complete, arm)})
            lines.append(f"| {complete} | {direction} | {arm} | {seeds} | {' | '.join(cells + gains)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--minutes", type=float, required=True, help="total length of each arm")
    parser.add_argument("--pairs", type=int, nargs="+", required=True, help="numbers of complete training pairs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--out", type=Path, default=Path("results/few_pairs"))
    own, base = parser.parse_known_args()
    settings, rows, new = parse_arguments(opt, PRESETS, base, ""), [], []
    own.out = own.out.resolve()
    with tempfile.TemporaryDirectory() as folder:
        if settings.data_root == demo.DEMO_ROOT:
            new: list[Pair] = new_subjects(Path(folder))
        for complete in own.pairs:
            out = own.out / f"{complete} pairs"
            options = base + write_study(out / "pairs.csv", settings, complete)
            one = argparse.Namespace(out=out, minutes=[own.minutes], seeds=own.seeds)
            found = equal_time.compare(one, options, {arm: ARMS[arm] for arm in own.arms}, new, "validation")
            rows += [{"pairs": complete, **row} for row in found]
            write_table(own.out / "scores.csv", tuple(rows[0]), rows)
            write_text(own.out / "table.md", table(rows))
            save_chart(own.out / "curves.png", {
                f"{arm}, {direction}": np.array([(n, np.mean(list(values.values()))) for n in own.pairs
                                                 if (values := by_subject(rows, n, arm, direction, "psnr"))])
                for arm in own.arms for direction in sorted({row["direction"] for row in rows})},
                "complete pairs; the other training visits have one scan", "PSNR (dB), mean over subjects and seeds")
    print(table(rows), end="")


if __name__ == "__main__":
    main()
