"""Both stages on every fold, and the test subjects of all folds in one table.

    python -m benchmarks.cross_validate --folds 3
    python -m benchmarks.cross_validate --out results/my_study --data_root pairs.csv     [any options of main.py]

Run the same command again to resume; a fold that is finished is not repeated. In --out:

    fold-0, fold-1, ...     checkpoints and results of each, as main.py writes them
    scores.csv              metrics.csv of all folds, with fold, session and group
    table.csv, .md, .tex    means and deviations over subjects, gains of the refined volumes, regions, groups, sessions
    worst.png               the visits with the lowest PSNR

The unit is the subject: several sessions of one are averaged first. A gain is paired by subject, with a 95 % bootstrap
interval; p is of Wilcoxon's signed-rank test, with Holm's correction for all tests in the table.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

import numpy as np
from scipy.stats import wilcoxon

from benchmarks import STAGE_1_FIRST, run_child
from data.cache import load_volume
from data.grids import spacing_of
from data.pairs import Pair
from data.study import find_study
from models.diffusion import name_key
from opt import PRESETS, opt
from synthesis.model import open_model
from training.launch import STOPPED, choose_device
from utils.arguments import parse_arguments
from utils.errors import UserError
from utils.figures import Panel, save_grid
from utils.files import write_table, write_text
from utils.metrics import DIGITS, paired_gain, quality, score

OF_VISIT = ("fold", "subject", "session", "group", "direction", "volume", "region")  # columns that are no scores
REFINED, WHOLE = "refined", "volume"  # the volumes that are compared with the others; the region of the main table
TABLE_COLUMNS = ("what", "of", "direction", "score", "subjects", "mean", "deviation", "gain", "low", "high", "p",
                 "p_holm")
TESTED = ("psnr", "ssim")
WORST = 3  # visits per direction in the picture


def run_fold(fold: int, folder: Path, options: list[str]) -> list[dict]:
    """Train or resume both stages unless they are finished; returns the rows of metrics.csv."""
    metrics = folder / "results/refine/metrics.csv"
    best = folder / "checkpoints/best_model.pth"
    for more in ([], ["--refine", f"--resume_path={best}"]):
        if not metrics.exists():
            print(f"---- {folder.name}, stage {2 if more else 1}", flush=True)
            status = run_child([sys.executable, "main.py", *STAGE_1_FIRST, *options, f"--fold={fold}",
                                f"--checkpoint_dir={best.parent}", f"--result_dir={folder / 'results'}", *more])
            if status:
                raise SystemExit(status if status == STOPPED else f"{folder}: training failed; see the message above")
    with open(metrics, newline="") as file:
        return list(csv.DictReader(file))


def over_subjects(rows: list[dict], name: str) -> dict[str, float]:
    """Subject -> a score, the mean of its sessions."""
    values = {}
    for row in rows:
        values.setdefault(row["subject"], []).append(row[name])
    return {subject: float(np.mean(each)) for subject, each in values.items()}


def holm(p: list[float]) -> list[float]:
    """Holm's step-down correction (1979) of p values; NaN, where nothing was tested, stays NaN."""
    values, corrected, largest = np.asarray(p, float), np.full(len(p), np.nan), 0.0
    order = [i for i in np.argsort(values) if not np.isnan(values[i])]
    for place, i in enumerate(order):
        corrected[i] = largest = max(largest, min(1.0, (len(order) - place) * values[i]))
    return corrected.tolist()


def summarise(rows: list[dict], scores: list[str]) -> list[dict]:
    """Rows of table.csv: "what" (volume, region, group, session or fold), "of", direction, score, subjects, mean and
    deviation over them; in the rows of "volume" also the gain of the refined one with its interval and p values."""
    def values_of(key: str) -> list:
        return list(dict.fromkeys(row[key] for row in rows))

    whole, refined = ([row for row in rows if row[key] == value] for key, value in (("region", WHOLE),
                                                                                    ("volume", REFINED)))
    both = [row for row in whole if row["volume"] == REFINED]
    parts = [("volume", "volume", whole), ("region", "region", refined),
             *((key, key, both) for key in ("group", "session", "fold") if len(values_of(key)) > 1)]
    table = []
    for what, key, among in parts:
        for of in dict.fromkeys(row[key] for row in among):
            for direction in values_of("direction"):
                chosen = [row for row in among if row[key] == of and row["direction"] == direction]
                for name in scores if chosen else ():
                    found = over_subjects(chosen, name)
                    numbers = np.array([value for value in found.values() if not np.isnan(value)])
                    entry = {"what": what, "of": of, "direction": direction, "score": name, "subjects": len(numbers),
                             "mean": numbers.mean() if len(numbers) else np.nan,
                             "deviation": numbers.std(ddof=1) if len(numbers) > 1 else np.nan}
                    if what == "volume" and of != REFINED and name in TESTED:
                        better = over_subjects([row for row in both if row["direction"] == direction], name)
                        pairs = np.array([(better[subject], value) for subject, value in found.items()])
                        entry |= dict(zip(("gain", "low", "high"), paired_gain(*pairs.T)))
                        difference = pairs[:, 0] - pairs[:, 1]
                        difference = difference[~np.isnan(difference)]
                        entry["p"] = float(wilcoxon(difference).pvalue) if difference.any() else np.nan
                    table.append(entry)
    tested = [entry for entry in table if "p" in entry]
    for entry, p in zip(tested, holm([entry["p"] for entry in tested])):
        entry["p_holm"] = p
    return table


def cells_of(table: list[dict], scores: list[str]) -> list[tuple[list[str], list[list[str]]]]:
    """The table for people: per "what" a header and lines of cells."""
    def text(name: str, *values: float, form: str = "{} +- {}", sign: str = "") -> str:
        texts = ["-" if np.isnan(value) else f"{value:{sign}.{DIGITS.get(name, 3)}f}" for value in values]
        return form.format(*texts) if texts[0] != "-" else "-"

    parts = []
    for what in dict.fromkeys(entry["what"] for entry in table):
        part, lines = [entry for entry in table if entry["what"] == what], []
        tested = TESTED if what == "volume" else ()
        for of, direction in dict.fromkeys((entry["of"], entry["direction"]) for entry in part):
            entries = {entry["score"]: entry for entry in part if (entry["of"], entry["direction"]) == (of, direction)}
            subjects = max(entry["subjects"] for entry in entries.values())
            line = ["none" if of == "" else str(of), direction, str(subjects)]
            line += [text(name, entries[name]["mean"], entries[name]["deviation"]) for name in scores]
            for name in tested:
                entry = entries[name]
                line += ["", ""] if "gain" not in entry else [
                    text(name, entry["gain"], entry["low"], entry["high"], form="{} ({} .. {})", sign="+"),
                    f"{entry['p_holm']:.2g}"]
            lines.append(line)
        parts.append(([what, "direction", "subjects", *scores,
                       *(word for name in tested for word in (f"{name} of {REFINED} better by", "p"))], lines))
    return parts


def markdown(parts: list[tuple[list[str], list[list[str]]]]) -> str:
    return "\n".join(f"| {' | '.join(header)} |\n|{'---|' * len(header)}\n"
                     + "".join(f"| {' | '.join(line)} |\n" for line in lines) for header, lines in parts)


def latex(parts: list[tuple[list[str], list[list[str]]]]) -> str:
    """One tabular for each part, without packages."""
    replaced = {"\\": "\\textbackslash{}", "_": "\\_", "&": "\\&", "%": "\\%", "#": "\\#", "->": "$\\to$",
                "+-": "$\\pm$"}

    def row(cells: list[str]) -> str:
        for old, new in replaced.items():
            cells = [cell.replace(old, new) for cell in cells]
        return " & ".join(cells) + " \\\\\n"
    return "\n".join(f"\\begin{{tabular}}{{ll{'r' * (len(header) - 2)}}}\n\\hline\n{row(header)}\\hline\n"
                     f"{''.join(map(row, lines))}\\hline\n\\end{{tabular}}\n" for header, lines in parts)


def draw_worst(path: Path, rows: list[dict], pairs: dict[str, Pair], settings, folders: dict[int, Path]) -> None:
    """Source, refined, truth and difference of the visits with the lowest PSNR in each direction."""
    refined = [row for row in rows if (row["volume"], row["region"]) == (REFINED, WHOLE)]
    panels, device = [], choose_device(settings.device)
    for direction in dict.fromkeys(row["direction"] for row in refined):
        source, target = direction.split("->")
        candidates = [row for row in refined if row["direction"] == direction]
        for row in sorted(candidates, key=lambda row: row["psnr"])[:WORST]:
            settings.resume_path = str(folders[row["fold"]] / "checkpoints/best_refine.pth")
            pair, model = pairs[row["name"]], open_model(settings, device)
            scans = model.read(pair.files, Path(settings.cache_dir))
            volumes = {modality: load_volume(file) for modality, (file, _) in scans.items()}
            made = model.translate(source, target, volumes[source][None], [name_key(pair.name)],
                                   settings.average_flips)["synth"][0]
            spacing = {modality: spacing_of(np.array(metadata["affine"])) for modality, (_, metadata) in scans.items()}
            panels.append((f"{pair.name}\n{direction}\n{pair.group}", [
                Panel(volumes[source], spacing[source]),
                Panel(made, spacing[target], quality(score(made, volumes[target], {})[WHOLE])),
                Panel(volumes[target], spacing[target]),
                Panel(made - volumes[target], spacing[target], kind="difference")]))
    save_grid(path, "Test visits with the lowest PSNR", ["source", "refined", "truth", "refined minus truth"], panels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("results/cross_validation"))
    own, options = parser.parse_known_args()
    settings = parse_arguments(opt, PRESETS, options, "")
    try:
        settings.validate()
        pairs, _, _ = find_study(settings)
    except UserError as error:
        raise SystemExit(str(error)) from None
    folds = sorted({pair.fold for pair in pairs if pair.is_complete} - {None}) or list(range(settings.folds))
    if len(folds) < 2:
        raise SystemExit("opt.folds = 1: every subject would be trained on; set 2 or more")
    plan, text = own.out / "options.json", json.dumps(options)
    if plan.exists() and plan.read_text() != text:
        raise SystemExit(f"{plan}: these folds have other options, {plan.read_text()}; use them, or another --out")
    write_text(plan, text)
    folders, of, rows = {fold: own.out.resolve() / f"fold-{fold}" for fold in folds}, {p.name: p for p in pairs}, []
    for fold, folder in folders.items():
        for row in run_fold(fold, folder, options):
            pair = of[row.pop("subject")]
            values = {name: float(value) if value else np.nan for name, value in row.items() if name not in OF_VISIT}
            rows.append({**row, **values, "fold": fold, "name": pair.name, "subject": pair.subject,
                         "session": pair.session, "group": pair.group})
    scores = [name for name in rows[0] if name not in (*OF_VISIT, "name")]
    table = summarise(rows, scores)
    write_table(own.out / "scores.csv", (*OF_VISIT, *scores), rows, ".5f")
    write_table(own.out / "table.csv", TABLE_COLUMNS, table, ".5g")
    parts = cells_of(table, scores)
    write_text(own.out / "table.md", markdown(parts))
    write_text(own.out / "table.tex", latex(parts))
    draw_worst(own.out / "worst.png", rows, of, settings, folders)
    print(markdown(parts[:1]), f"\nAll tables and a picture: {own.out}", sep="")


if __name__ == "__main__":
    main()
