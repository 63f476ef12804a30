"""`python main.py --check`: all problems of a study in one run."""

from __future__ import annotations

import csv
import gzip
import os
import shutil
import struct

import nibabel as nib
import numpy as np
import pytest

import main
from data import phantom
from tests.conftest import LGG, TRACTOR, needs_shared, run_program, save


def words(root, folder, *more: str) -> list[str]:
    return ["--check", "--data_root", str(root), "--result_dir", str(folder / "results"), "--cache_dir",
            str(folder / "cache"), *more]


def rows(folder) -> list[dict]:
    with open(folder / "results/check.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_study_that_is_ready(study_csv, tmp_path, capsys):
    sizes = ("--image_size", "fmri=12x13x11", "dmri=16x17x14")
    assert main.main(words(study_csv, tmp_path, *sizes)) == 0
    told = capsys.readouterr().out
    for word in ("6 pairs", "12x13x11 (6)", "14x14x14 (6)", "RAS (6)", "ready to train",
                 "suggested: --image_size fmri=12x13x11 dmri=16x17x14"):
        assert word in told
    assert rows(tmp_path) == [] and not list((tmp_path / "cache").glob("*"))


def test_the_suggested_size_is_the_one_that_works(study_csv, tmp_path, capsys):
    assert main.main(words(study_csv, tmp_path, "--modalities", "dmri", "fmri", "--image_size", "12")) == 2
    told = capsys.readouterr().out
    suggested = next(line for line in told.splitlines() if line.startswith("suggested:")).split()[1:]
    assert {row["file"] for row in rows(tmp_path)} == {"opt.image_size (fmri)", "opt.image_size (dmri)"}
    assert main.main(words(study_csv, tmp_path, "--modalities", "dmri", "fmri", *suggested)) == 0


@pytest.fixture
def broken_demo(tmp_path, monkeypatch):
    """A copy of the demo's first subjects with one fault each, and what has to be said about it."""
    monkeypatch.setattr(phantom, "SUBJECTS", 17)
    phantom.write_demo(tmp_path / "demo")

    def scan(number: int, modality: str):
        kind, name = phantom.NAMES[modality]
        return tmp_path / f"demo/sub-{number:02d}/{kind}/sub-{number:02d}_{name}.nii.gz"

    def rewrite(path, change) -> None:
        image = nib.load(path)
        voxels, affine = image.get_fdata(dtype=np.float32), image.affine.copy()
        save(path, *change(voxels, affine))

    def header(path, offset: int, content: bytes) -> None:
        plain = bytearray(gzip.decompress(path.read_bytes()))
        plain[offset:offset + len(content)] = content
        path.write_bytes(gzip.compress(plain))

    cut = scan(1, "fmri")
    cut.write_bytes(cut.read_bytes()[:-2000])
    flipped = bytearray(scan(2, "dmri").read_bytes())
    flipped[len(flipped) // 2] ^= 4
    scan(2, "dmri").write_bytes(flipped)
    scan(3, "fmri").write_bytes(b"")
    scan(4, "fmri").write_text("<html><body>Sign in</body></html>")
    scan(5, "dmri").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 99\n")
    header(scan(6, "dmri"), 42, struct.pack("<3h", 20000, 20000, 20000))
    rewrite(scan(7, "fmri"), lambda voxels, affine: (np.full_like(voxels, np.nan), affine))
    rewrite(scan(8, "dmri"), lambda voxels, affine: (np.full_like(voxels, 3), affine))
    rewrite(scan(9, "dmri"), lambda voxels, affine: (voxels[:-2], affine))
    scan(10, "dmri").unlink()
    shutil.copy(scan(12, "fmri"), scan(11, "fmri"))
    rewrite(scan(13, "fmri"), lambda voxels, affine: (voxels, affine + 1000 * np.eye(4)[:, [3, 0, 1, 2]].T))
    header(scan(14, "dmri"), 252, struct.pack("<2h", 0, 1) + bytes(24) + bytes(48))
    rewrite(scan(15, "fmri"), lambda voxels, affine: (np.where(voxels > 800, np.nan, voxels), affine))
    shutil.copytree(tmp_path / "demo/sub-16", tmp_path / "demo/sub-016")
    for file in (tmp_path / "demo/sub-016").rglob("*.nii.gz"):
        file.rename(file.with_name(file.name.replace("sub-16", "sub-016")))
    return tmp_path / "demo", {
        "sub-01": "cannot be read to its end", "sub-02": "cannot be read to its end", "sub-03": "is empty",
        "sub-04": "web page", "sub-05": "Git LFS pointer", "sub-06": "20000x20000x20000", "sub-07": "no finite voxel",
        "sub-08": "every voxel is 3", "sub-09": "has size 46x48x30, most have 48x48x30", "sub-10": "has no dmri",
        "sub-12": "holds the same scan as", "sub-13": "do not overlap in space", "sub-14": "no invertible matrix",
        "sub-15": "were NaN or infinite", "sub-16": "are the same visit"}


def test_a_broken_copy_of_the_demo_is_told_in_one_run(broken_demo, tmp_path):
    root, expected = broken_demo
    told = run_program(*words(root, tmp_path))
    assert told.returncode == 2 and "Traceback" not in told.stderr and "not ready" in told.stdout
    found = rows(tmp_path)
    for subject, what in expected.items():
        mine = [row for row in found if row["subject"] == subject]
        assert any(what in row["what"] for row in mine), (subject, mine)
        assert what in told.stdout and all(row["remedy"] for row in mine)
    # nobody is accused who is sound: the copies of a scan are named once, under the later one
    assert {row["subject"] for row in found} == set(expected)
    refused = {row["subject"] for row in found if row["fatal"] == "True"}
    assert set(expected) - refused == {"sub-10", "sub-13", "sub-15"}
    assert "suggested: --image_size fmri=32x32x18 dmri=48x48x30" in told.stdout


def test_every_problem_of_the_split_and_of_the_options_is_a_row(study_csv, tmp_path):
    wrong = ["--folds", "9", "--fold", "8", "--image_size", "12", "--exclude", "sub-99"]
    assert main.main(words(study_csv, tmp_path, *wrong)) == 2
    assert {row["file"].split(" =")[0] for row in rows(tmp_path)} == {
        "opt.image_size (fmri)", "opt.image_size (dmri)", "opt.folds", "opt.exclude names sub-99"}
    assert main.main(words(tmp_path / "nowhere", tmp_path)) == 2
    assert "no such file or folder" in rows(tmp_path)[0]["what"]


def test_large_and_mixed_sizes(tmp_path, capsys):
    random = np.random.default_rng(0)
    table = ["subject,a,b"]
    for number, size in enumerate([(120, 110, 100), (120, 110, 100), (120, 110, 96)]):
        for name in "ab":
            save(tmp_path / f"{number}{name}.nii", random.normal(size=size).astype(np.float32), np.eye(4))
        table.append(f"{number},{number}a.nii,{number}b.nii")
    (tmp_path / "pairs.csv").write_text("\n".join(table))
    assert main.main(words(tmp_path / "pairs.csv", tmp_path, "--modalities", "a", "b", "--folds", "1")) == 2
    told = capsys.readouterr().out
    assert 'opt.resize = "pad_crop" brings all to one' in told and "1.3 million voxels" in told
    assert "has size 120x110x96, most have 120x110x100" in told
    suggested = next(line for line in told.splitlines() if line.startswith("suggested:")).split()[1:]
    again = words(tmp_path / "pairs.csv", tmp_path, "--modalities", "a", "b", "--folds", "1", *suggested)
    assert main.main([*again, "--resize", "resample"]) == 0


@pytest.mark.parametrize("size", [(300, 300, 17), (16, 16, 8)])
def test_a_suggestion_is_never_refused(tmp_path, capsys, size):
    for name in "ab":
        save(tmp_path / f"{name}.nii", np.random.default_rng(ord(name)).normal(size=size).astype(np.float32), np.eye(4))
    (tmp_path / "pairs.csv").write_text("subject,a,b\n1,a.nii,b.nii\n")
    asked = words(tmp_path / "pairs.csv", tmp_path, "--modalities", "a", "b", "--folds", "1")
    assert main.main(asked) == 2
    told = capsys.readouterr().out
    assert 'the suggested size needs opt.resize = "resample"' in told
    suggested = next(line for line in told.splitlines() if line.startswith("suggested:")).split()[1:]
    assert main.main([*asked, *suggested, "--resize", "resample"]) == 0


def test_what_only_shows_on_the_grid_is_told(tmp_path):
    """pad_crop can cut away all that a volume has, or make two files one."""
    corner, inner = np.zeros((30, 30, 30), np.float32), np.random.default_rng(0).normal(9, 1, (12, 12, 12))
    corner[:4, :4, :4] = 7
    padded = np.pad(inner, 2, constant_values=inner.min())
    for name, voxels in {"a1": corner, "b1": inner, "a2": inner + 1, "b2": padded}.items():
        save(tmp_path / f"{name}.nii", voxels.astype(np.float32), np.eye(4))
    (tmp_path / "pairs.csv").write_text("subject,a,b\n1,a1.nii,b1.nii\n2,a2.nii,b2.nii\n")
    more = ("--modalities", "a", "b", "--image_size", "12", "--resize", "pad_crop", "--folds", "1")
    assert main.main(words(tmp_path / "pairs.csv", tmp_path, *more)) == 2
    found = {(row["subject"], row["what"].split()[0]) for row in rows(tmp_path) if row["fatal"] == "True"}
    assert found == {("sub-1", "every"), ("sub-2", "holds")}


def test_a_file_whose_name_is_no_text(tmp_path):
    folder = tmp_path / "tree/sub-01/anat"
    folder.mkdir(parents=True)
    for name in (b"sub-01_acq-\xe9_a.nii", b"sub-01_b.nii"):
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            file.write(b"no image")
    told = run_program(*words(tmp_path / "tree", tmp_path, "--modalities", "a", "b"))
    assert told.returncode == 2 and "Traceback" not in told.stderr and "acq-" in told.stdout


@needs_shared
def test_real_studies(tmp_path, capsys):
    assert main.main(words(LGG, tmp_path, "--modalities", "t1", "flair", "--image_size", "64x64x32")) == 0
    assert "LPS (64)" in capsys.readouterr().out
    assert main.main(words(TRACTOR, tmp_path)) == 2
    told = capsys.readouterr().out
    assert "suggested: --image_size fmri=64x64x30 dmri=96x96x60" in told and "opt.folds = 5" in told
    again = words(TRACTOR, tmp_path, "--folds", "1", "--image_size", "fmri=64x64x30", "dmri=96x96x60")
    assert main.main(again) == 0
    assert "fields of view differ by up to 63 mm" in capsys.readouterr().out
