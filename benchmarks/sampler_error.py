"""How close are a few steps of each sampler to the limit of many steps?

    python -m benchmarks.sampler_error checkpoints/best_model.pth [any options of main.py, as the run had them]

Prints the root mean square error (volumes in [-1, 1], same noise, eta 0) to 500 steps of DPM-Solver++(2M), over the
first two validation subjects, for joint samples and for both translations.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from benchmarks.stage1_quality import open_run
from models.backbone import Backbone
from models.diffusion import Purpose
from opt import PRESETS, opt
from utils.arguments import parse_arguments

REFERENCE = ("dpmpp", 500)
COMPARED = (("dpmpp", 12), ("ddim", 12), ("ddim", 100), ("dpmpp", 20))


def errors(backbone: Backbone, study, seed: int, compared=COMPARED, reference=REFERENCE) -> dict[str, dict]:
    """{what is sampled: {(sampler, steps): root mean square error}}, in float32."""
    shown = study.roles["validation"][:2]
    keys, real, found = [(seed, Purpose.PICTURES, i) for i in shown], study.volumes(shown), {}
    for source in (None, *study.modalities):
        given = {source: real[source]} if source else {}
        made = [backbone.sample(keys, study.sizes, steps, sampler, 0.0, given)
                for sampler, steps in (reference, *compared)]
        wanted = [name for name in study.modalities if name != source]
        apart = [torch.cat([(each[name] - made[0][name]).flatten() for name in wanted]) for each in made[1:]]
        found[f"given {source}" if source else "joint"] = {
            how: float(each.square().mean().sqrt()) for how, each in zip(compared, apart)}
    return found


if __name__ == "__main__":
    settings = parse_arguments(opt, PRESETS, sys.argv[2:], __doc__.splitlines()[0])
    study, backbone = open_run(Path(sys.argv[1]), settings)
    backbone.bfloat16 = False
    for what, row in errors(backbone, study, settings.seed).items():
        print(f"{what}: " + ", ".join(f"{sampler} {steps}: {value:.4f}" for (sampler, steps), value in row.items()))
