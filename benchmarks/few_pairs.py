"""What are incomplete visits worth, where few pairs are complete?

    python -m benchmarks.few_pairs --minutes 10 --pairs 5 10 20 41 --seeds 3                  [any options of main.py]
    python -m benchmarks.few_pairs --minutes 10 --pairs 10 --test_folds 1 2 --data_root pairs.csv --modalities t1 flair

Keeps the pairs of so many training subjects complete, and takes one of both scans, in turn, from the others; the
numbers of validation and test subjects stay, and visits that lack a scan from the start are left out. Three arms of
equal total time (benchmarks/equal_time.py): a plain regression on the complete pairs, both stages on the complete
pairs, and both stages on all visits. Scored on 120 new subjects for the demo, else on the test subjects of each fold:
not on the validation subjects, which choose the best model of each arm. Run the same command to resume. Writes
scores.csv, table.md and curves.png.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import equal_time
from benchmarks.augmentation import new_subjects
from benchmarks.comparison import save_report
from data.study import find_study, split_study
from opt import PRESETS, opt
from utils.arguments import parse_arguments
from utils.errors import UserError
from utils.files import write_table

ALL = "two stages, all visits"
ARMS = {"regression, complete pairs": "--coarse none --incomplete leave_out",
        "two stages, complete pairs": "--incomplete leave_out", ALL: "--incomplete use"}


def write_study(path: Path, settings, complete: int) -> list[str]:
    """Write a table of the study in which so many training pairs are complete; returns the options to read it with."""
    visits, _, _ = find_study(settings)
    pairs, roles, _ = split_study(settings, [visit for visit in visits if visit.is_complete])
    train, validated = (sorted({pairs[i].person for i in roles[role]}) for role in ("train", "validation"))
    order = np.random.default_rng(0).permutation(train).tolist()  # the same subjects are complete for all seeds
    if settings.folds == 1 or not 0 < complete <= len(order):
        raise SystemExit(f"--pairs {complete}: the study has {len(order)} training subjects with complete pairs; and "
                         "opt.folds must be 2 or more")
    places, rows = {person: place for place, person in enumerate(order)}, []
    for i, pair in enumerate(pairs):
        place = places.get(pair.person, 0)
        kept = settings.modalities if place < complete else settings.modalities[place % 2:][:1]
        rows.append({"subject": pair.subject, "session": pair.session, "group": pair.group,
                     "fold": 0 if i in roles["test"] else 1, **{name: pair.files[name].absolute() for name in kept}})
    write_table(path, ("subject", "session", "group", "fold", *settings.modalities), rows)
    return [f"--data_root={path}", "--fold=0", f"--validation_fraction={len(validated) / (len(validated) + complete)}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--minutes", type=float, required=True, help="total length of each arm")
    parser.add_argument("--pairs", type=int, nargs="+", required=True, help="numbers of complete training pairs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--test_folds", type=int, nargs="+", help="tested in turn; without it, opt.fold")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--out", type=Path, default=Path("results/few_pairs"))
    own, base = parser.parse_known_args()
    settings, studies, rows, text = parse_arguments(opt, PRESETS, base, ""), {}, [], ""
    own.out, folds = own.out.resolve(), own.test_folds or [settings.fold]
    for complete, fold in itertools.product(own.pairs, folds):
        settings.fold, out = fold, own.out / f"{complete} pairs, fold {fold}"
        try:
            studies[out] = {"pairs": complete, "fold": fold}, base + write_study(out / "pairs.csv", settings, complete)
        except UserError as error:
            raise SystemExit(str(error)) from None
    with tempfile.TemporaryDirectory() as folder:
        new = new_subjects(settings, Path(folder))
        for out, (study, options) in studies.items():
            before, one = rows, argparse.Namespace(out=out, minutes=[own.minutes], seeds=own.seeds)
            for found in equal_time.compare(one, options, {arm: ARMS[arm] for arm in own.arms}, new):
                rows = before + [{**study, **row} for row in found]
                write_table(own.out / "scores.csv", tuple(rows[0]), rows)
                text = save_report(own.out, rows, ALL, "pairs", "complete pairs; other training visits have one scan")
    print(text, end="")


if __name__ == "__main__":
    main()
