"""Finding the pairs of a study in tables and BIDS trees."""

import os
from pathlib import Path

import pytest

from data.pairs import find_pairs
from data.problems import DataError, raise_if_fatal
from tests.conftest import BOTH, write_pairs


def refused(data_root: Path, *more) -> str:
    """The message that refuses a study."""
    with pytest.raises(DataError) as refusal:
        raise_if_fatal(find_pairs(data_root, BOTH, *more)[1])
    return str(refusal.value)


def write(folder: Path, content: str) -> Path:
    (folder / "pairs.csv").write_bytes(content.encode("latin-1"))
    return folder / "pairs.csv"


@pytest.fixture
def tree(tmp_path) -> Path:
    """A BIDS tree of empty files: sub-01 with two sessions, sub-02 with one."""
    for visit in ("sub-01/ses-1", "sub-01/ses-2", "sub-02/ses-1"):
        for name in ("func/{}_task-rest_bold.nii.gz", "dwi/{}_dwi.nii.gz"):
            file = tmp_path / "bids" / visit / name.format(visit.replace("/", "_"))
            file.parent.mkdir(parents=True)
            file.touch()
    return tmp_path / "bids"


def test_a_table_gives_names_files_groups_and_folds_and_visits_of_one_person_in_any_spelling(tmp_path):
    pairs, problems = find_pairs(write_pairs(tmp_path, subjects=3), BOTH)
    assert [pair.name for pair in pairs] == ["sub-01", "sub-02", "sub-03"] and problems == []
    table = write(tmp_path, "\xef\xbb\xbfsubject\t session\tgroup\tfold\tfmri\tdmri\r\n7\t ses-2\tAD\t3\ta\tb \r\n")
    (pair,), _ = find_pairs(table, BOTH)
    assert (pair.name, pair.group, pair.fold) == ("sub-7_ses-2", "AD", 3)
    assert pair.files == {"fmri": tmp_path / "a", "dmri": tmp_path / "b"}
    table = write(tmp_path, "subject,fmri,dmri\nsub-01_ses-1,a,b\nsub-01_ses-2,c,d\nsub01,e,d\n")  # they share a scan
    pairs, problems = find_pairs(table, BOTH)
    assert [(pair.person, pair.session) for pair in pairs] == [("1", "1"), ("1", "2"), ("1", "")] and problems == []


def test_a_bids_tree_gives_sessions_and_the_first_file_of_each_visit_or_those_with_a_chosen_suffix(tree):
    for name in ("task-zzz_bold.nii.gz", "task-zzz_desc-preproc_bold.nii.gz", "space-MNI_FA.nii"):
        (tree / f"sub-01/ses-1/func/sub-01_ses-1_{name}").touch()
    pairs, warnings = find_pairs(tree, BOTH)
    assert [pair.name for pair in pairs] == ["sub-01_ses-1", "sub-01_ses-2", "sub-02_ses-1"]
    assert "task-rest" in pairs[0].files["fmri"].name and len(warnings) == 2
    assert all("task-zzz" in each.where and "opt.bids_suffix" in each.remedy and not each.fatal for each in warnings)
    (pair,), _ = find_pairs(tree, ("fmri", "FA"), suffixes={"fmri": "desc-preproc_bold"})
    assert pair.name == "sub-01_ses-1" and "desc-preproc" in pair.files["fmri"].name
    assert len(find_pairs(tree, ("a", "b"), suffixes={"a": "task-*_bold", "b": "dwi"})[0]) == 3


def test_a_visit_without_one_modality_is_listed_and_left_out(tree, tmp_path):
    (tree / "sub-02/ses-1/dwi/sub-02_ses-1_dwi.nii.gz").unlink()
    pairs, (warning,) = find_pairs(tree, BOTH)
    assert len(pairs) == 2 and warning.subject == "sub-02_ses-1" and not warning.fatal and "no dmri" in warning.what
    table = write(tmp_path, "subject,fmri,dmri\n1,a,b\n2,c,\n,d,e\n")
    pairs, problems = find_pairs(table, BOTH)
    assert len(pairs) == 1 and not any(problem.fatal for problem in problems)
    assert {problem.where for problem in problems} == {"sub-2", f"{tmp_path}/c", f"{tmp_path}/pairs.csv line 4"}
    assert [problem.where for problem in problems if problem.what == "no such file"] == [f"{tmp_path}/c"]
    for root, complete, where in ((tree, 2, []), (table, 1, [f"{tmp_path}/pairs.csv line 4"])):
        visits, problems = find_pairs(root, BOTH, needed=1)
        assert [visit.is_complete for visit in visits] == [True] * complete + [False]
        assert [problem.where for problem in problems] == where
    assert "no subject has both" in str(find_pairs(write(tmp_path, "subject,fmri,dmri\n1,a,\n"), BOTH,
                                                   needed=1)[1][0])
    (halves,) = find_pairs(write(tmp_path, "subject,fmri,dmri\n1,a,b\n2,c,\n02,,d\n"), BOTH, needed=1)[1]
    assert halves.fatal and "put both scans into one row" in halves.remedy
    assert "needs one column dmri" in str(find_pairs(write(tmp_path, "subject,fmri\n1,a\n"), BOTH,
                                                     needed=1)[1][0])
    table = write(tmp_path, "subject,fmri,dmri\n1,a,b\n2,c,\n,d,e\n")
    assert len(find_pairs(tree, BOTH, needed=0)[0]) == 3 and len(find_pairs(table, BOTH, needed=0)[0]) == 2
    assert len(find_pairs(write(tmp_path, "subject,fmri\n1,a\n"), BOTH, needed=0)[0]) == 1


@pytest.mark.parametrize("content, message", [
    ("subject,fmri,dmri\nsub-1,a,b\nsub-01,c,d\n", "same visit"),
    ("subject,session,fmri,dmri\n1,1,a,b\n1,ses-01,c,d\n", "same visit"),
    ("subject,fmri,dmri\nA7,a,b\nsub-a7,c,d\n", "same visit"),
    ("subject,fmri,dmri\nsub1,a,b\nsub-sub1,c,d\n", "same visit"),
    ("subject,session,fmri,dmri\nsub-01_ses-1,,a,b\nsub-01,1,c,d\n", "same visit"),
    ("subject,fmri,dmri\n1,a,b\n2,a,d\n", "is both the fmri of sub-1 and the fmri of sub-2"),
    ("subject,fmri,dmri\n1,a,./a\n", "is both the fmri of sub-1 and the dmri of sub-1"),
    ("subject,fmri,dmri\n/../x,a,b\n", "become file names"),
    ("subject,t1,flair\n1,a,b\n", "needs one column fmri, dmri; it has subject, t1, flair"),
    ("subject,fmri,dmri\n1,a,\n", "no subject has both"),
    ("", "needs one column subject"),
    ("subject,fmri,dmri,fold\n1,a,b,x\n", "fold 'x' is not 0, 1"),
    ("subject|fmri|dmri\n1|a|b\n", "separated by commas, tabs or semicolons"),
    ("subject,fmri,dmri,fmri\n1,a,b,c\n", "needs one column fmri"),
    ("subject,fmri,dmri,group\n1,a,b,\"MCI\n2,c,d,NC\n", "cannot be read as a table"),
    ("subject,fmri,dmri\n1,a\0,b\n", "NUL"),
    ("\0\xff\n\0\n", "cannot be read as a table")])
def test_an_ambiguous_or_unusable_table_is_refused(tmp_path, content, message):
    assert message in refused(write(tmp_path, content))


def test_all_problems_are_reported_at_once_but_not_those_of_excluded_subjects(tree, tmp_path):
    table = write(tmp_path, "subject,fmri,dmri,fold\n1,a,b,x\n2,c,c,0\n3,d,e,0\n03,f,g,1\n")
    assert len(refused(table).splitlines()) == 3
    assert len(refused(table, ("sub-01", "2")).splitlines()) == 1
    assert [pair.name for pair in find_pairs(tree, BOTH, ("sub-01_ses-2",))[0]] == ["sub-01_ses-1", "sub-02_ses-1"]
    assert "opt.exclude names sub-9" in refused(tree, ("sub-9",))
    assert "nowhere: cannot be read" in refused(tmp_path / "nowhere") and "give a BIDS tree" in refused(tmp_path)


def test_hidden_files_links_loops_and_unreadable_folders_of_a_bids_tree(tree, tmp_path, monkeypatch):
    (tree / "sub-01/ses-1/func/._sub-01_ses-1_task-rest_bold.nii.gz").write_bytes(b"mac")
    (tree / "sub-02/ses-1/func").rename(tmp_path / "elsewhere")
    (tree / "sub-02/ses-1/func").symlink_to(tmp_path / "elsewhere")
    (tree / "sub-02/loop").symlink_to(tree / "sub-02")
    (tree / "sub-03.txt").touch()
    pairs, problems = find_pairs(tree, BOTH)
    assert len(pairs) == 3 and problems == []
    (tmp_path / "elsewhere/sub-02_ses-1_task-rest_bold.nii.gz").rename(tmp_path / "elsewhere/sub-03_ses-1_bold.nii.gz")
    assert "its name and its folder give different subjects" in refused(tree)
    denied = PermissionError(13, "Permission denied", str(tree / "sub-02"))  # the tests may run as root
    monkeypatch.setattr(os, "walk", lambda *_, onerror, **__: onerror(denied) or [])
    assert "sub-02: cannot be read (Permission denied)" in refused(tree)


@pytest.mark.parametrize("content, groups, warning", [
    ("participant_id \tgroup\nsub-1\tAD\n2\tNC\n", ["AD", "AD", "NC"], []),
    ("participant_id\tage\nsub-01\t70\n", [""] * 3, []),
    ("participant_id\tgroup\n\"sub-01\tAD\n", [""] * 3, ["fix it; until then all groups are unknown"]),
    ("participant_id,group\nsub-01,AD\n", [""] * 3, ["compare its tab-separated column participant_id with the names"]),
    ("participant_id\tgroup\nsub-77\tAD\n", [""] * 3, ["compare its tab-separated column participant_id with"])])
def test_participants_without_usable_groups_cause_a_warning(tree, content, groups, warning):
    (tree / "participants.tsv").write_text(content)
    pairs, problems = find_pairs(tree, BOTH)
    assert [pair.group for pair in pairs] == groups and len(problems) == len(warning)
    assert all(said in problem.remedy and not problem.fatal for said, problem in zip(warning, problems))
