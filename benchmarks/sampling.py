"""Network evaluations and time of each sampler against quality.

    python -m benchmarks.sampling checkpoints/best_model.pth

For translations both ways and joint samples of the first validation subjects, eta 0, in float32: seconds per volume
(per pair for joint samples); root mean square error (volumes in [-1, 1], same noise) to many steps of DPM-Solver++(2M),
the limit that a sampler approximates; PSNR of single samples against the subject's real volume.
"""

import itertools
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import run_report
from benchmarks.stage1_quality import open_prior
from data.study import Study
from models.diffusion import Purpose
from models.prior import Prior
from models.samplers import Sampling
from utils.metrics import psnr

SUBJECTS = 4
LIMIT = ("dpmpp", 500)
COMPARED = (("dpmpp", 4), ("dpmpp", 8), ("dpmpp", 12), ("dpmpp", 20), ("ddim", 4), ("ddim", 12), ("ddim", 20),
            ("ddim", 100))


def compare(prior: Prior, study: Study, seed: int, compared=COMPARED, limit=LIMIT) -> list[dict]:
    """Rows of kind, sampler, steps, seconds, error and psnr (NaN for joint samples); the first of a kind is the limit.
    """
    shown, rows = study.roles["validation"][:SUBJECTS], []
    keys, real = [(seed, Purpose.PICTURES, i) for i in shown], study.volumes(shown)
    for source, (sampler, steps) in itertools.product((None, *study.modalities), (limit, *compared)):
        start = time.perf_counter()
        samples = prior.sample(keys, Sampling(sampler, steps), {source: real[source]} if source else {})
        samples = {modality: volume.cpu() for modality, volume in samples.items() if modality != source}
        seconds = (time.perf_counter() - start) / len(shown)
        if (sampler, steps) == limit:
            converged = samples
        errors = torch.cat([(samples[modality] - converged[modality]).flatten() for modality in samples])
        scores = [psnr(error.numpy()) for modality in samples for error in samples[modality] - real[modality]]
        rows.append({"kind": f"given {source}" if source else "joint", "sampler": sampler, "steps": steps,
                     "seconds": seconds, "error": float(errors.square().mean().sqrt()),
                     "psnr": float(np.mean(scores)) if source else float("nan")})
    return rows


def table(rows: list[dict]) -> str:
    """Markdown, one line per sampler and number of steps."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    lines = [f"| sampler, evaluations | {' | '.join(f'{kind}: s, error, dB' for kind in kinds)} |",
             f"|{'---|' * (len(kinds) + 1)}"]
    for sampler, steps in dict.fromkeys((row["sampler"], row["steps"]) for row in rows):
        cells = [f"{row['seconds']:.2f}, {row['error']:.4f}, " + (f"{row['psnr']:.2f}" if row["psnr"] > 0 else "-")
                 for row in rows if (row["sampler"], row["steps"]) == (sampler, steps)]
        lines.append(f"| {sampler}, {steps} | {' | '.join(cells)} |")
    return "\n".join(lines)


def report(checkpoint: Path, settings) -> None:
    settings.precision = "fp32"
    study, prior = open_prior(checkpoint, settings)
    print(table(compare(prior, study, settings.seed)))


if __name__ == "__main__":
    run_report(report, __doc__, "best_model.pth")
