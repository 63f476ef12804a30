"""The table and the chart of a comparison: runs on the same subjects, paired by subject and seed."""

from pathlib import Path

import numpy as np

from benchmarks.chart import save_chart
from utils.files import write_text
from utils.metrics import DIGITS, gain_text

COMPARED = ("psnr", "ssim")


def by_subject(rows: list[dict], name: str) -> dict[str, dict[int, float]]:
    """subject -> seed -> score. Each seed may have subjects of its own."""
    values = {}
    for row in rows:
        values.setdefault(row["subject"], {})[row["seed"]] = row[name]
    return values


def differences(rows: list[dict], others: list[dict], name: str) -> dict[str, dict[int, float]]:
    """subject -> seed -> how much higher the score is in the first rows, where both have one."""
    first, second = by_subject(rows, name), by_subject(others, name)
    shared = {subject: seeds.keys() & second.get(subject, {}).keys() for subject, seeds in first.items()}
    return {subject: {seed: first[subject][seed] - second[subject][seed] for seed in sorted(seeds)}
            for subject, seeds in shared.items() if seeds}


def cells_of_gain(rows: list[dict], others: list[dict], name: str) -> tuple[str, str]:
    """How much higher the first rows' score is: mean over subjects (each the mean of its seeds) with its 95 % interval,
    and mean of each seed. Empty where both have no subject and seed in common, or are the same."""
    found, digits = differences(rows, others, name), DIGITS.get(name, 3)
    if not found or rows is others:
        return "", ""
    means = [np.mean(list(seeds.values())) for seeds in found.values()]
    of_seed = {}
    for seeds in found.values():
        for seed, value in seeds.items():
            of_seed.setdefault(seed, []).append(value)
    return (gain_text(means, np.zeros(len(means)), f"+.{digits}f"),
            ", ".join(f"{np.mean(of_seed[seed]):+.{digits}f}" for seed in sorted(of_seed)))


def table(rows: list[dict], what: str, reference: str, case: str = "", scores: tuple[str, ...] = COMPARED,
          costs: dict[str, int] | None = None) -> str:
    """Markdown: per case, direction and arm the scores, and how much better the reference is (`cells_of_gain`).

    what: the column that names the arm; case: a column of numbers, such as minutes; costs: columns of runs -> digits.
    """
    header = [*filter(None, (case, "direction", what)), "seeds", *scores, f"{reference} better by, dB", "each seed, dB",
              f"{reference} better by, SSIM", *(costs or {})]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    found = {}  # (case, direction) -> arm -> rows
    for row in rows:
        found.setdefault((row.get(case, 0.0), row["direction"]), {}).setdefault(row[what], []).append(row)
    for (number, direction), arms in sorted(found.items()):
        for arm, own in arms.items():
            cells = [f"{number:g}"] * bool(case) + [direction, arm, str(len({row["seed"] for row in own}))]
            for name in scores:
                means = [np.mean(list(seeds.values())) for seeds in by_subject(own, name).values()]
                cells.append(f"{np.nanmean(means):.{DIGITS.get(name, 3)}f}")
            (gain, seeds), (ssim, _) = (cells_of_gain(arms.get(reference, own), own, name) for name in COMPARED)
            cells += [gain, seeds, ssim]
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
