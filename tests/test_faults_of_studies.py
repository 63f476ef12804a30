"""Studies as people send them: tables, BIDS trees, headers and intensities that are odd but legal, or wrong.

Each test is named after its row in docs/reliability.md, "Studies as people send them" (S1 .. S13, B5, B7, H8, H11).
"""

import csv
import gzip
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import main
from data.cache import Reading, cached_volume, identical_scans, to_grid
from data.check import check_study
from data.intensity import normalise
from data.pairs import MISSING, _natural, find_pairs
from data.problems import DataError, VolumeError, raise_if_fatal
from data.split import split_subjects, write_split
from data.volumes import Scan, read_volume
from opt import small
from tests.conftest import AFFINE, BOTH, CHILD, ball, save, write_pairs

T1_BOLD = ("T1w", "fmri")


def touch(tree: Path, *files: str) -> Path:
    for file in files:
        (tree / file).parent.mkdir(parents=True, exist_ok=True)
        (tree / file).touch()
    return tree


def write(folder: Path, text: str, name: str = "pairs.csv") -> Path:
    (folder / name).write_bytes(text.encode())
    return folder / name


def refusal(root: Path, modalities: tuple[str, str] = BOTH, **more) -> str:
    with pytest.raises(DataError) as refused:
        raise_if_fatal(find_pairs(root, modalities, **more)[1])
    return str(refused.value)


# ---- S1, S2, S5, S6, S11: tables


@pytest.mark.parametrize("table, group, said", [
    ("participant_id\tage\tsex\nsub-01\t70\tF\n", "", False), ("participant_id\nsub-1\n", "", False),
    ("participant_id\tgroup\n01\tn/a\n", "", False), ("participant_id\tgroup\nsub-01\tAD\nsub-77\tNC\n", "AD", False),
    ("participant_id\tage\nsub-77\t70\n", "", False), ("participant_id\tgroup\nsub-77\tAD\n", "", True)])
def test_s1_participants_without_groups(tmp_path, table, group, said):
    tree = touch(tmp_path, "sub-01/func/sub-01_task-rest_bold.nii.gz", "sub-01/dwi/sub-01_dwi.nii.gz")
    (tree / "participants.tsv").write_text(table)
    (pair,), problems = find_pairs(tree, BOTH)
    assert pair.group == group and bool(problems) == said


@pytest.mark.parametrize("word", sorted({*MISSING, "N/A", "NaN", " n/a ", "NULL"}))
def test_s2_words_for_missing_mean_missing_in_every_column(tmp_path, word):
    for delimiter in ",\t":
        rows = [["subject", "session", "group", "fold", "fmri", "dmri"], ["1", word, word, word, "a", "b"],
                ["2", "1", "AD", "", "c", word], [word, "", "", "", "d", "e"]]
        table = write(tmp_path, "\n".join(map(delimiter.join, rows)))
        pairs, problems = find_pairs(table, BOTH, needed=0)
        assert [(pair.name, pair.group, pair.fold, [*pair.files]) for pair in pairs] == [
            ("sub-1", "", None, ["fmri", "dmri"]), ("sub-2_ses-1", "AD", None, ["fmri"])]
        assert [problem.what for problem in problems] == ["left out because it names no subject"]
    tree = touch(tmp_path / "bids", "sub-01/func/sub-01_bold.nii.gz", "sub-01/dwi/sub-01_dwi.nii.gz")
    (tree / "participants.tsv").write_text(f"participant_id\tgroup\nsub-01\t{word}\n")
    assert [pair.group for pair in find_pairs(tree, BOTH)[0]] == [""]


@pytest.mark.parametrize("text", [
    "subject,fmri,dmri,,\n1,a,b,,\n,,,,\n", 'subject, fmri, dmri\n1, "a", "b"\n',
    "subject,age,age,fmri,dmri\n1,2,3,a,b\n",
    "\ufeffsubject;fmri;dmri\r\n1;a;b\r\n", "subject\tnote, long\tfmri\tdmri\n1\tx, y\ta\tb\n",
    "subject,,fmri,dmri,\n1,x,a,b\n", '"subject","fmri","dmri"\n"1","a","b"\n', "subject,fmri,dmri\n1,a,b,,\n\n\n",
    "subject,fmri,dmri\r1,a,b\r", "sep=;\nsubject;fmri;dmri\n1;a;b\n", "\n\nsubject,fmri,dmri\n1,a,b\n",
    'subject;fmri;dmri;"age, in years, at, scan"\n1;a;b;70\n', "subject\tfmri\tdmri,,,,,\n1\ta\tb\n"][:-1])
def test_s5_what_spreadsheets_write(tmp_path, text):
    (pair,), problems = find_pairs(write(tmp_path, text), BOTH)
    assert pair.files == {"fmri": tmp_path / "a", "dmri": tmp_path / "b"} and problems == []


@pytest.mark.parametrize("text, message", [
    ("\n1,a,b\n", "needs one column subject"),
    ("subject,site,fmri,dmri\nsub-01,Aachen, DE,a,b\n", "line 2 has more cells"),
    ("subject,fmri,dmri\n" + "1,a,b\n" * 500_001, "more than 500,000 rows"), ("a,b\n1,2\n", "it has a, b")])
def test_s5_what_would_be_misread_is_refused(tmp_path, text, message):
    assert message in refusal(write(tmp_path, text))


def test_s5_participants_with_the_line_ends_of_old_macs(tmp_path):
    touch(tmp_path, "sub-1/func/sub-1_bold.nii.gz", "sub-1/dwi/sub-1_dwi.nii.gz")
    (tmp_path / "participants.tsv").write_bytes(b"participant_id\tgroup\rsub-1\tAD\r")
    assert [pair.group for pair in find_pairs(tmp_path, BOTH)[0]] == ["AD"]


def test_s6_home_and_variables_in_cells_and_settings(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCANS", str(tmp_path / "scans"))
    text = "subject,fmri,dmri\n1,~/a,${SCANS}/b\n2,$SCANS/c,./~d\n"
    first, second = find_pairs(write(tmp_path, text), BOTH)[0]
    assert first.files == {"fmri": tmp_path / "home/a", "dmri": tmp_path / "scans/b"}
    assert second.files == {"fmri": tmp_path / "scans/c", "dmri": tmp_path / "~d"}
    (tmp_path / "cost$5.nii").touch()  # a name that is there is a name
    text = "subject,fmri,dmri\n1,cost$5.nii,b\n"
    assert find_pairs(write(tmp_path, text), BOTH)[0][0].files["fmri"] == tmp_path / "cost$5.nii"
    for cell in ("~nobody-here/a", "$NOT_SET/a", "x/${NOT_SET}"):
        said = refusal(write(tmp_path, f"subject,fmri,dmri\n1,{cell},b\n"))
        assert "line 2, column fmri" in said and repr(cell) in said
    monkeypatch.chdir(tmp_path)
    names = ("resume_path", "data_root", "cache_dir", "pattern_file", "vgg_weights", "checkpoint_dir", "result_dir",
             "sample_dir")
    for name in names:
        settings = small()
        setattr(settings, name, "~/x")
        settings.validate()
        assert getattr(settings, name) == str(tmp_path / "home/x")
        assert main.main([f"--{name}", "$NOT_SET/x"]) == 2 and f"opt.{name} = '$NOT_SET/x'" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cost$5.nii", "pairs.csv"]


def test_s11_letters_that_the_locale_lacks(tmp_path):
    code = "import sys, main; sys.exit(main.main(sys.argv[1:]))"
    table = write_pairs(tmp_path / "s")
    table.write_text(table.read_text().replace("sub-01_space-MNI_fmri", "sub-01_腦_fmri").replace("sub-02,", "Zoë,"))
    words = ["--check", "--data_root", str(table), "--result_dir", str(tmp_path / "r")]
    ascii_only = {**CHILD, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    done = subprocess.run([sys.executable, "-c", code, *words], env=ascii_only, capture_output=True, timeout=120)
    assert done.returncode == 2 and b"Traceback" not in done.stderr
    assert all(words in done.stdout for words in (b"column fmri", b"only letters that the locale has", b"PYTHONUTF8=1"))


@pytest.mark.parametrize("name, fits", [("腦" * 48, True), ("腦" * 90, False), ("é" * 73, True), ("ß" * 90, False),
                                        ("a" * 146, True), ("a" * 147, False), ("\U0001d6c2" * 40, False)])
def test_s11_names_are_as_long_as_files_may_be(tmp_path, name, fits):
    table = write(tmp_path, f"subject,fmri,dmri\n{name},a,b\n")
    if fits:
        assert find_pairs(table, BOTH)[1] == []
        (tmp_path / f"sub-{name}_{'m' * 30}_translated.nii.gz").touch()
    else:
        assert "150 bytes at most" in refusal(table)


def test_two_halves_of_a_visit_are_not_just_left_out(tmp_path):
    table = write(tmp_path, "subject,fmri,dmri\nsub-1,a,b\nsub-2,c,\nsub-2,,d\nsub-3,e,\nsub-4,f,\n4,g,\n")
    said = {problem.subject: problem.remedy for problem in find_pairs(table, BOTH)[1] if "left out" in problem.what}
    assert said["sub-2"] == "put both scans into one row" and "same subject and session" in said["sub-3"] and \
        said["sub-3"] == said["sub-4"]
    problem, other = (problem for problem in find_pairs(table, BOTH, needed=1)[1] if problem.fatal)
    assert problem.what == "are the same visit of the same subject" and "both scans into one row" in problem.remedy
    assert other.subject == "sub-4" and "keep only one of them" in other.remedy


# ---- S3, S4, H8, B5, B7: trees and names


def test_s3_a_scan_above_the_sessions(tmp_path):
    tree = touch(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz", "sub-01/ses-1/func/sub-01_ses-1_bold.nii.gz",
                 "sub-02/anat/sub-02_T1w.nii.gz", "sub-02/ses-1/func/sub-02_ses-1_bold.nii.gz",
                 "sub-02/ses-2/func/sub-02_ses-2_bold.nii.gz",
                 "sub-03/ses-01/anat/sub-03_ses-01_T1w.nii.gz", "sub-03/ses-1/func/sub-03_ses-1_bold.nii.gz",
                 "sub-04/ses-a/anat/sub-04_ses-a_T1w.nii.gz", "sub-04/func/sub-04_bold.nii.gz")
    pairs, problems = find_pairs(tree, T1_BOLD)
    assert [pair.name for pair in pairs] == ["sub-01_ses-1", "sub-03_ses-01", "sub-04_ses-a"]
    assert pairs[0].files["T1w"].name == "sub-01_T1w.nii.gz"
    said = "\n".join(map(str, problems))
    assert "the T1w of sub-02 is in none of its sessions 1, 2; set opt.share_scans = True" in said
    assert "sub-02_ses-2: left out because it has no T1w" in said
    pairs, problems = find_pairs(tree, T1_BOLD, share_scans=True)
    assert [pair.name for pair in pairs if pair.subject == "sub-02"] == ["sub-02_ses-1", "sub-02_ses-2"]
    assert problems == []
    touch(tree, "sub-05/anat/sub-05_T1w.nii.gz", "sub-05/func/sub-05_bold.nii.gz",  # a visit, and more than that
          "sub-05/ses-1/func/sub-05_ses-1_bold.nii.gz", "sub-05/ses-2/func/sub-05_ses-2_bold.nii.gz")
    names = [pair.name for pair in find_pairs(tree, T1_BOLD, share_scans=True)[0] if pair.subject == "sub-05"]
    assert names == ["sub-05", "sub-05_ses-1", "sub-05_ses-2"]
    pairs, _ = find_pairs(tree, T1_BOLD, ("sub-05",), share_scans=True)
    assert not [pair for pair in pairs if pair.subject == "sub-05"]
    touch(tree, "sub-02/ses-1/anat/sub-02_ses-1_T1w.nii.gz")  # its own comes first
    assert find_pairs(tree, T1_BOLD, share_scans=True)[0][1].files["T1w"].parent.parent.name == "ses-1"


def test_s3_the_notes_that_explain_are_told_where_no_pair_is_found(tmp_path):
    touch(tmp_path, "sub-1/anat/sub-1_T1w.nii.gz", "sub-1/ses-1/func/sub-1_ses-1_bold.nii.gz",
          "sub-1/ses-2/func/sub-1_ses-2_bold.nii.gz")
    said = refusal(tmp_path, T1_BOLD)
    assert said.startswith(str(tmp_path)) and "no subject has both" in said and "opt.share_scans" in said
    assert "sub-1_ses-2: left out because it has no T1w" in said


def test_s4_one_file_for_both_sessions_of_one_person_or_for_two_persons(tmp_path):
    file = save(tmp_path / "t1.nii", ball(12, 12, 12))
    rows = ["subject,session,T1w,fmri"]
    for subject, session in (("1", "1"), ("1", "2"), ("01", "3")):
        (tmp_path / f"{session}.nii").symlink_to(file)
        rows.append(f"{subject},{session},{session}.nii,{session}f.nii")
    pairs, problems = find_pairs(write(tmp_path, "\n".join(rows)), T1_BOLD)
    assert len(pairs) == 3 and problems == []
    assert identical_scans((pair, "T1w", "same", "same") for pair in pairs) == []
    (tmp_path / "linked").symlink_to(tmp_path)
    for path in ("2.nii", "linked/t1.nii", "linked/linked/1.nii"):
        other = find_pairs(write(tmp_path, "\n".join([rows[0], rows[1], f"2,1,{path},x"])), T1_BOLD)[1]
        assert ["is both the T1w of sub-1_ses-1 and the T1w of sub-2_ses-1" in str(problem)
                for problem in other] == [True], path
    (tmp_path / "hard.nii").hardlink_to(file)  # a copy, as git-annex and rsync make: its contents are compared later
    assert find_pairs(write(tmp_path, "\n".join([rows[0], rows[1], "2,1,hard.nii,x"])), T1_BOLD)[1] == []
    copies = find_pairs(write(tmp_path, "\n".join([rows[0], rows[1], "2,1,copy.nii,x"])), T1_BOLD)[0]
    (problem,) = identical_scans((pair, "T1w", "same", str(pair)) for pair in copies)
    assert "of sub-1_ses-1, but is the T1w of sub-2_ses-1" in problem.what and problem.fatal


@given(st.permutations([f"{entity}-{value}_" for entity in ("run", "echo", "acq", "dir", "rec", "part")
                        for value in ("1", "2", "10")]))
def test_s3_the_first_in_natural_order_is_used(names):
    ordered = sorted((Path(f"sub-1/func/sub-1_{name}bold.nii.gz") for name in names), key=_natural)
    assert [path.name.split("-")[2].split("_")[0] for path in ordered] == ["1", "2", "10"] * 6


def test_h8_links_of_a_tree(tmp_path):
    tree = touch(tmp_path / "t", "sub-1/func/sub-1_bold.nii.gz", "sub-1/dwi/sub-1_dwi.nii.gz",
                 "sub-3/func/sub-3_bold.nii.gz", "sub-3/dwi/sub-3_dwi.nii.gz")
    place = tree / "sub-1/deep"
    for _ in range(30):  # 2^30 ways to the last folder
        place.mkdir()
        (place / "a").symlink_to("b")
        place = place / "b"
    place.mkdir()
    (tree / "sub-1/up").symlink_to("..")
    (tree / "sub-1/through").symlink_to("func/sub-1_bold.nii.gz/x")
    (tree / "sub-1/self").symlink_to("self")
    (tree / "sub-2").symlink_to("sub-2")
    (tree / "sub-1/root").symlink_to("/")  # the whole disk
    start = time.monotonic()
    pairs, problems = find_pairs(tree, BOTH)
    assert [pair.name for pair in pairs] == ["sub-1", "sub-3"] and problems == [] and time.monotonic() - start < 5


def test_b5_subject_and_session_mean_the_same_in_tables_and_trees(tmp_path):
    tree = touch(tmp_path / "t", "sub-01/ses-2/func/sub-01_ses-2_bold.nii.gz",
                 "sub-01/ses-2/dwi/sub-01_ses-2_dwi.nii.gz")
    found = [find_pairs(tree, BOTH)[0]]
    for subject, session in (("01", "2"), ("sub-01", "ses-2"), ("sub-01_ses-2", "")):
        found.append(find_pairs(write(tmp_path, f"subject,session,fmri,dmri\n{subject},{session},a,b\n"), BOTH)[0])
    assert {(pair.subject, pair.session, pair.name) for pair, in found} == {("sub-01", "2", "sub-01_ses-2")}


@pytest.mark.parametrize("one, other, same", [
    ("S1.05", "S1.5", False), ("A07", "A7", False), ("1.10", "1.1", False), ("x-01", "x-1", False),
    ("010", "10", True), ("sub-007", "7", True), ("SUB-a1", "a1", True), ("0x1", "x1", False)])
def test_b7_who_is_the_same_person(tmp_path, one, other, same):
    table = write(tmp_path, f"subject,fmri,dmri\n{one},a,b\n{other},c,d\n")
    if same:
        assert "if they are two people, rename one" in refusal(table)
    else:
        assert len({pair.person for pair in find_pairs(table, BOTH)[0]}) == 2


def test_s13_a_hundred_thousand_rows(tmp_path):
    rows = [(f"P{number:06d}", number % 3, f"P{number:06d}/a.nii.gz", f"P{number:06d}/b.nii.gz")
            for number in range(100_000)]
    with open(tmp_path / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows([("subject", "group", *BOTH), *rows])
    start = time.process_time()
    pairs, problems = find_pairs(tmp_path / "pairs.csv", BOTH, exclude=tuple(row[0] for row in rows[:2000]))
    roles = split_subjects(pairs, 5, 0, 0.15, 0)
    write_split(tmp_path / "split.csv", pairs, roles)
    assert identical_scans((pair, modality, pair.name + modality, pair.name + modality)
                           for pair in pairs for modality in BOTH) == []
    assert len(pairs) == 98_000 and problems == [] and time.process_time() - start < 10


# ---- S7 .. S9, S12, H11: files and intensities (S10: test_volumes.py)

OTHERS = {"annex pointer": b"/annex/objects/MD5E-s123--abc.nii.gz\n", "annex link": b"../.git/annex/objects/x/y\n",
          "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "JSON": b' {"EchoTime": 0.1}',
          "web page": b"\n<!DOCTYPE html><html>", "PNG": b"\x89PNG\r\n\x1a\n" + bytes(600),
          "DICOM": bytes(128) + b"DICM", "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(600), "zip": b"PK\x03\x04" + bytes(600),
          "NRRD": b"NRRD0004\n",
          "bzip2": b"BZh91AY" + bytes(600), "PDF": b"%PDF-1.7", "tar": bytes(257) + b"ustar" + bytes(600)}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("packed", [False, True])
def test_s7_other_formats_are_named(tmp_path, kind, packed):
    path = tmp_path / "x.nii.gz"
    path.write_bytes(gzip.compress(OTHERS[kind]) if packed else OTHERS[kind])
    with pytest.raises(VolumeError) as refused:
        read_volume(path)
    said = str(refused.value)
    assert "rename" not in said and "not NIfTI" in said
    assert {"annex pointer": "datalad get or git annex get", "annex link": "git annex get", "lfs": "git lfs pull",
            "DICOM": "dcm2niix"}.get(kind, "") in said and (kind in said or "pointer" in said)


def test_s7_a_link_without_content_says_how_to_fetch_it(tmp_path):
    (tmp_path / "x.nii.gz").symlink_to("../.git/annex/objects/ab/cd/x.nii.gz")
    with pytest.raises(VolumeError, match="is a link to .*annex.*, which is not there; fetch .* datalad get"):
        read_volume(tmp_path / "x.nii.gz")


@pytest.mark.parametrize("values, reduce, doubted", [
    ("0 1 2", "b0", True), ("0 0.7 2.8", "b0", True), ("0, 10, 3", "b0", True), ("0 1000 2000", "b0", False),
    ("0 0 0", "b0", False), ("5 5 5", "b0", False), ("0 5 1000", "b0", False), ("0 1 2", "shell", None),
    ("0.0 0.5 1.0", "shell", None)])
def test_s12_b_values_in_ms_per_square_micrometre(tmp_path, values, reduce, doubted):
    path = save(tmp_path / "x_dwi.nii", ball(11, 12, 13, 3))
    (tmp_path / "x_dwi.bval").write_text(values)
    if doubted is None:
        with pytest.raises(VolumeError, match=r"no shell time point, its b-values go up to .*; give them in s/mm\^2"):
            read_volume(path, reduce)
        return
    assert any("count as b0" in what for what, _ in read_volume(path, reduce).doubts) == doubted
    _, metadata = cached_volume(path, Reading("dmri", (11, 12, 13), reduce), tmp_path / "cache")
    assert bool(metadata["doubts"]) == doubted


@pytest.mark.parametrize("intensity", ["percentile", "minmax", "brain_percentile", "brain_minmax"])
@pytest.mark.parametrize("make", [
    lambda v: v * 3e37, lambda v: v * -3e37, lambda v: v * 1e-42, lambda v: v + 2**31, lambda v: v * 1e-30,
    lambda v: np.where(np.indices(v.shape).sum(0) == 9, 1e12, v), lambda v: np.where(v > 12, 3.4e38, v),
    lambda v: np.where(np.indices(v.shape).sum(0) == 0, -3.4e38, v), lambda v: v * 1e14, lambda v: v * 1e-28])
def test_h11_extreme_values_are_finite_in_range_or_refused_by_name(tmp_path, make, intensity):
    with np.errstate(all="ignore"):
        path = save(tmp_path / "x.nii", make(ball(12, 13, 14).astype(np.float64)).astype(np.float32))
    try:
        volume, low, high, _ = to_grid(read_volume(path), path, Reading("fmri", (12, 13, 14), intensity=intensity))
    except VolumeError as error:
        assert "x.nii" in str(error)
    else:
        assert np.isfinite([low, high]).all() and np.abs(volume).max() <= 1 and np.unique(volume).size > 100


def test_h11_what_is_legal_stays_legal(tmp_path):
    voxels = ball(12, 12, 12)
    for make in (lambda v: v > 12, lambda v: v * 1e6, lambda v: v * 1e-6, lambda v: v + 1e4, lambda v: np.round(v)):
        volume, _, _ = normalise(make(voxels).astype(np.float32), tmp_path, "minmax")
        assert volume.min() == -1 and volume.max() == 1
    small = np.zeros((40, 40, 40))  # in a large field of view, resampled
    small[10:22, 10:22, 10:22] = 100 + 10 * np.random.default_rng(0).normal(size=(12, 12, 12))
    for noise, intensity in itertools.product((0, 1e-9, 1e-5), ("percentile", "minmax", "brain_percentile")):
        noisy = small + noise * np.random.default_rng(1).normal(size=small.shape)
        assert np.unique(normalise(noisy.astype(np.float32), tmp_path, intensity)[0]).size > 1000
    assert Scan(voxels, AFFINE).doubts == ()


def test_s9_and_others_are_told_by_training_and_by_the_check(tmp_path, capsys):
    table = write_pairs(tmp_path / "s")
    for number, change in enumerate((lambda header: header.set_sform(None, 0) or header.set_qform(None, 0),
                                     lambda header: header.set_qform(np.diag([-14.0, 14, 14, 1]), 1))):
        path = sorted((tmp_path / "s").glob("*fmri*"))[number]
        image = nib.load(path)
        voxels = np.asarray(image.dataobj)
        change(image.header)
        nib.save(nib.Nifti1Image(voxels, None, image.header), path)
    settings = small()
    settings.data_root, settings.result_dir, settings.check = str(table), str(tmp_path), True
    settings.image_size = {"fmri": (12, 13, 11), "dmri": (16, 17, 14)}
    check_study(settings)
    said = capsys.readouterr().out
    assert "its header gives no orientation" in said and "two orientations: sform RAS and qform LAS" in said


def test_h8_a_folder_without_permission_is_named(tmp_path, monkeypatch):
    tree = touch(tmp_path, "sub-1/func/sub-1_bold.nii.gz", "sub-1/dwi/sub-1_dwi.nii.gz")
    scandir = os.scandir

    def deny(path):
        if str(path).endswith("dwi"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    touch(tree, "sub-2/func/sub-2_bold.nii.gz", "sub-2/x/sub-2_dwi.nii.gz", "sub-3/func/sub-4_bold.nii.gz")
    said = refusal(tree)
    assert f"{tree}/sub-1/dwi: cannot be read (Permission denied)" in said and "sub-3" in said
    pairs, problems = find_pairs(tree, BOTH, ("sub-1", "3"))  # as the message says
    assert [pair.name for pair in pairs] == ["sub-2"] and problems == []
