"""What realism costs: error against texture, along the line from the expected volume to a sample.

    python -m benchmarks.realism checkpoints/best_refine.pth

Translates the test subjects with opt.realism = 0, 0.25, 0.5, 0.75 and 1. Prints per direction: PSNR and SSIM; the power
at 0.25 .. 0.5 cycles per voxel over that of the real volume (1: as much texture, below: blur); and the log-spectral
distance, in dB: the root mean square difference of the radial power spectra, 10 log10 of each.
"""

from pathlib import Path

import numpy as np

from benchmarks import open_run, run_report
from models.diffusion import name_key
from utils.metrics import basic_scores, sharpness, spectrum

REALISM = (0.0, 0.25, 0.5, 0.75, 1.0)


def texture(made: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """Fine power of `made` over that of `real`, and their log-spectral distance in dB, where `real` is known."""
    made, real = (np.where(np.isnan(real), -1, volume) for volume in (made, real))
    ours, theirs = spectrum(made), spectrum(real)
    filled = theirs > 0
    decibels = 10 * np.log10(ours[filled] / theirs[filled])
    return 10 ** (sharpness(made, real) / 10), float(np.sqrt(np.mean(decibels**2)))


def report(checkpoint: Path, settings) -> None:
    settings.realism = max(REALISM)
    study, model = open_run(checkpoint, settings)
    print("| direction | realism | PSNR, dB | SSIM | fine power | log-spectral distance, dB |")
    print(f"|{'---|' * 6}")
    for source, target in model.prior.network.directions:
        for realism in REALISM:
            rows = []
            for i in study.roles["test"]:
                real = {modality: volume[:, 0].numpy() for modality, volume in study.volumes([i]).items()}
                key = name_key(study.pairs[i].name)
                made = model.translate(source, target, real[source], [key], realism=realism)["synth"][0]
                scores = basic_scores(made, real[target][0])
                rows.append((scores["psnr"], scores["ssim"], *texture(made, real[target][0])))
            psnr, ssim, power, distance = np.mean(rows, axis=0)
            print(f"| {source}->{target} | {realism:g} | {psnr:.2f} | {ssim:.3f} | {power:.2f} | {distance:.2f} |")


if __name__ == "__main__":
    run_report(report, __doc__, "best_model.pth or best_refine.pth")
