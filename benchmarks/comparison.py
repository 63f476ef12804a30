"""The table and the chart of a comparison: runs on the same subjects, paired by subject and run."""

from pathlib import Path

import numpy as np

from benchmarks.chart import save_chart
from utils.files import write_text
from utils.metrics import DIGITS, gain_text

COMPARED = ("psnr", "ssim")


Run = tuple[int, int]  # fold (0 where the arms have none) and seed


def run_of(row: dict) -> Run:
    return row.get("fold", 0), row["seed"]


def by_subject(rows: list[dict], name: str) -> dict[str, dict[Run, float]]:
    """subject -> run -> score. Each run may have subjects of its own."""
    values = {}
    for row in rows:
        values.setdefault(row["subject"], {})[run_of(row)] = row[name]
    return values


def differences(rows: list[dict], others: list[dict], name: str) -> dict[str, dict[Run, float]]:
    """subject -> run -> how much higher the score is in the first rows, where both have one."""
    first, second = by_subject(rows, name), by_subject(others, name)
    shared = {subject: runs.keys() & second.get(subject, {}).keys() for subject, runs in first.items()}
    return {subject: {run: first[subject][run] - second[subject][run] for run in sorted(runs)}
            for subject, runs in shared.items() if runs}


def cells_of_gain(rows: list[dict], others: list[dict], name: str) -> tuple[str, str]:
    """How much higher the first rows' score is: mean over subjects (each the mean of its runs) with its 95 % interval,
    and mean of each run. Empty where both have no subject and run in common, or are the same."""
    found, digits = differences(rows, others, name), DIGITS.get(name, 3)
    if not found or rows is others:
        return "", ""
    means = [np.mean(list(runs.values())) for runs in found.values()]
    of_run = {}
    for runs in found.values():
        for run, value in runs.items():
            of_run.setdefault(run, []).append(value)
    return (gain_text(means, np.zeros(len(means)), f"+.{digits}f"),
            ", ".join(f"{np.mean(of_run[run]):+.{digits}f}" for run in sorted(of_run)))


def table(rows: list[dict], what: str, reference: str, case: str = "", scores: tuple[str, ...] = COMPARED,
          costs: dict[str, int] | None = None) -> str:
    """Markdown: per case, direction and arm the scores, and how much better the reference is (`cells_of_gain`).

    what: the column that names the arm; case: a column of numbers, such as minutes; costs: columns of runs -> digits.
    """
    header = [*filter(None, (case, "direction", what)), "runs", *scores, f"{reference} better by, dB", "each run, dB",
              f"{reference} better by, SSIM", *(costs or {})]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    found = {}  # (case, direction) -> arm -> rows
    for row in rows:
        found.setdefault((row.get(case, 0.0), row["direction"]), {}).setdefault(row[what], []).append(row)
    for (number, direction), arms in sorted(found.items()):
        for arm, own in arms.items():
            cells = [f"{number:g}"] * bool(case) + [direction, arm, str(len({run_of(row) for row in own}))]
            for name in scores:
                means = [np.mean(list(runs.values())) for runs in by_subject(own, name).values()]
                cells.append(f"{np.nanmean(means):.{DIGITS.get(name, 3)}f}")
            (gain, of_runs), (ssim, _) = (cells_of_gain(arms.get(reference, own), own, name) for name in COMPARED)
            cells += [gain, of_runs, ssim]
            for name, digits in (costs or {}).items():
                known = [row[name] for row in own if row[name] is not None]
                cells.append(f"{np.mean(known):.{digits}f}" if known else "")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def save_report(folder: Path, rows: list[dict], reference: str, case: str, x_label: str) -> str:
    """Write table.md and curves.png, of arms in cases; returns the table."""
    points, text = {}, table(rows, "arm", reference, case)
    for row in rows:
        points.setdefault(f"{row['arm']}, {row['direction']}", {}).setdefault(row[case], []).append(row["psnr"])
    save_chart(folder / "curves.png", {name: np.array(sorted((x, np.mean(values)) for x, values in curve.items()))
                                       for name, curve in points.items()}, x_label, "PSNR (dB)")
    write_text(folder / "table.md", text)
    return text
