"""Network evaluations and time of each sampler against quality.

    python -m benchmarks.sampling checkpoints/best_model.pth [any options of main.py, as the run had them]

For translations both ways and joint samples of the first validation subjects, eta 0, in float32: seconds for one volume
(of a pair for joint samples), the root mean square error (volumes in [-1, 1], same noise) to many steps of
DPM-Solver++(2M), which is what a sampler is to be near, and PSNR of single samples against the subject's real volume.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.stage1_quality import open_run
from data.study import Study
from models.backbone import Backbone
from models.diffusion import Purpose
from opt import PRESETS, opt
from utils.arguments import parse_arguments
from utils.metrics import psnr

SUBJECTS = 4
REFERENCE = ("dpmpp", 500)
COMPARED = (("dpmpp", 4), ("dpmpp", 8), ("dpmpp", 12), ("dpmpp", 20), ("ddim", 4), ("ddim", 12), ("ddim", 20),
            ("ddim", 100))


def compare(backbone: Backbone, study: Study, seed: int, compared=COMPARED, reference=REFERENCE) -> list[dict]:
    """Rows of what, sampler, steps, seconds, error, psnr (NaN for joint samples)."""
    shown = study.roles["validation"][:SUBJECTS]
    keys, real, rows = [(seed, Purpose.PICTURES, i) for i in shown], study.volumes(shown), []
    for source in (None, *study.modalities):
        given = {source: real[source]} if source else {}
        wanted = [name for name in study.modalities if name != source]
        limit = None
        for sampler, steps in (reference, *compared):
            start = time.perf_counter()
            made = backbone.sample(keys, study.sizes, steps, sampler, 0.0, given)
            made = {name: made[name].cpu() for name in wanted}
            seconds = (time.perf_counter() - start) / len(shown)
            limit = limit or made
            apart = torch.cat([(made[name] - limit[name]).flatten() for name in wanted])
            scores = [psnr(each.numpy()) for name in wanted for each in made[name] - real[name]] if source else [np.nan]
            rows.append({"what": f"given {source}" if source else "joint", "sampler": sampler, "steps": steps,
                         "seconds": seconds, "error": float(apart.square().mean().sqrt()), "psnr": np.mean(scores)})
    return rows


def table(rows: list[dict]) -> str:
    """Markdown, one line for each sampler and number of steps."""
    kinds = list(dict.fromkeys(row["what"] for row in rows))
    lines = [f"| sampler, evaluations | {' | '.join(f'{kind}: s, error, dB' for kind in kinds)} |",
             f"|{'---|' * (len(kinds) + 1)}"]
    for how in dict.fromkeys((row["sampler"], row["steps"]) for row in rows):
        cells = [f"{row['seconds']:.2f}, {row['error']:.4f}, "
                 + ("-" if np.isnan(row["psnr"]) else f"{row['psnr']:.2f}")
                 for row in rows if (row["sampler"], row["steps"]) == how]
        lines.append(f"| {how[0]}, {how[1]} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    settings = parse_arguments(opt, PRESETS, sys.argv[2:], __doc__.splitlines()[0])
    study, backbone = open_run(Path(sys.argv[1]), settings)
    backbone.dtype = torch.float32
    print(table(compare(backbone, study, settings.seed)))
