"""The demo data set."""

import hashlib
import time

import nibabel as nib
import numpy as np
import pytest

from benchmarks import demo_ceiling
from data import demo
from data.study import find_study
from opt import Options
from utils.stop import Interrupted, stop

RECORDED = "2c77e105073b12d54aaddb83995f44421fa25730384bd5418942b72279b553b8"


def test_the_demo_never_changes():
    """Frozen, so that figures stay comparable: both scans of the first and the last subject, as they are written."""
    digest = hashlib.sha256()
    for number in (0, 59):
        for image in demo.scan(demo.Anatomy(number)).values():
            digest.update(np.ascontiguousarray(image.dataobj).tobytes())
    assert demo.SUBJECTS == 60 and digest.hexdigest() == RECORDED


def test_the_demo_is_written_on_first_use_as_a_bids_tree_in_mni_space_and_its_ceiling(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "SUBJECTS", 3)
    monkeypatch.chdir(tmp_path)
    pairs, problems, _ = find_study(Options())
    assert [pair.group for pair in pairs] == ["NC", "MCI", "AD"] and problems == []
    image = nib.load(pairs[0].files["dmri"])
    assert image.shape == (48, 48, 30) and image.header["sform_code"] == 4
    assert (tmp_path / "data/demo" / demo.COMPLETE).exists()
    rows = [f"sub-{number:02d},fmri->dmri,{volume},volume,{psnr}" for number in (1, 2)
            for volume, psnr in (("mean", 20), ("refined", 24))]
    (tmp_path / "metrics.csv").write_text("\n".join(["subject,direction,volume,region,psnr", *rows]))
    demo_ceiling.main(tmp_path / "metrics.csv", tmp_path / "data/demo")
    line = capsys.readouterr().out.splitlines()[-1]
    best = float(line.split()[3])
    assert 27 < best < 31 and f"{4 / (best - 20):4.0%}" in line and "+4.00 dB" in line


def test_a_stop_ends_the_writing_before_it_is_complete(tmp_path, monkeypatch):
    rendered = []
    monkeypatch.setattr(demo, "scan", lambda subject: rendered.append(subject) or time.sleep(0.05) or {})
    monkeypatch.setattr(stop, "reason", "a test")
    with pytest.raises(Interrupted):
        demo.write_demo(tmp_path / "demo")
    assert len(rendered) < 30 and not (tmp_path / "demo" / demo.COMPLETE).exists()
