"""The demo data set and how far a perfect synthesis of it could get."""

from __future__ import annotations

import hashlib

import nibabel as nib
import numpy as np

from benchmarks import demo_ceiling
from data import phantom
from data.atlas import pattern_mask, roi_centres
from data.pairs import find_pairs
from tests.conftest import BOTH

RECORDED = "2c77e105073b12d54aaddb83995f44421fa25730384bd5418942b72279b553b8"


def test_the_demo_is_what_it_was():
    """Frozen, so that figures stay comparable: the first and the last subject, both scans, as they are written."""
    subjects = phantom.anatomies()
    assert len(subjects) == 60 and [s.group for s in subjects[:3]] == ["NC", "MCI", "AD"]
    digest = hashlib.sha256()
    for subject in (subjects[0], subjects[-1]):
        for image in phantom.scan(subject).values():
            digest.update(np.ascontiguousarray(image.dataobj).tobytes())
    assert digest.hexdigest() == RECORDED


def test_the_demo_has_what_it_promises():
    normal, ill = (next(s for s in phantom.anatomies() if s.group == group) for group in ("NC", "AD"))
    clean, noisy = (phantom.render(normal, "dmri", noise=each)[..., 0] for each in (False, True))
    assert 0.01 < (clean - noisy).std() < 0.05
    thick = phantom.Anatomy(**{**ill.__dict__, "group": "NC"})
    mask = pattern_mask(phantom.GRIDS["fmri"][0], phantom.affine_of("fmri"), roi_centres(("default",)), 8.0)
    thinned = (phantom.render(ill, "fmri", False) - phantom.render(thick, "fmri", False)).mean(-1)
    assert np.abs(thinned[mask]).mean() > 3 * np.abs(thinned[~mask]).mean()
    assert phantom.render(normal, "fmri").shape == (32, 32, 18, 4)


def test_a_new_study_of_the_demo_is_written_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(phantom, "SUBJECTS", 3)
    phantom.write_demo(tmp_path / "demo")
    pairs, notes = find_pairs(tmp_path / "demo", BOTH)
    assert len(pairs) == 3 and notes == [] and {pair.group for pair in pairs} == {"NC", "MCI", "AD"}
    image = nib.load(pairs[0].files["dmri"])
    assert image.shape == (48, 48, 30) and image.header["sform_code"] == 4
    assert (tmp_path / "demo" / phantom.COMPLETE).exists()


def test_the_ceiling_of_the_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(phantom, "SUBJECTS", 2)
    phantom.write_demo(tmp_path / "demo")
    with open(tmp_path / "metrics.csv", "w") as file:
        print("subject,direction,volume,region,psnr", file=file)
        for number in (1, 2):
            for volume, psnr in (("mean", 20), ("refined", 24)):
                print(f"sub-{number:02d},fmri->dmri,{volume},volume,{psnr}", file=file)
    demo_ceiling.main(tmp_path / "metrics.csv", tmp_path / "demo")
    line = capsys.readouterr().out.splitlines()[1]
    best = float(line.split()[3])
    assert 27 < best < 31 and f"{4 / (best - 20):4.0%}" in line and "+4.00 dB" in line
