"""Finding pairs and splitting subjects; the D rows of the list of faults bear their ids."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.pairs import Pair, find_pairs
from data.problems import PairError, refuse
from data.split import split_subjects, write_split
from tests.conftest import BOTH, LGG, TRACTOR, needs_shared, write_pairs


def refused(found: tuple) -> str:
    """The message with which training would refuse what `find_pairs` found."""
    with pytest.raises(PairError) as refusal:
        refuse(found[1])
    return str(refusal.value)


def bids_tree(folder: Path, visits: list[tuple[str, str]]) -> Path:
    """A BIDS tree of empty files; visits: (subject, session)."""
    for subject, session in visits:
        for kind, suffix in (("func", "task-rest_bold"), ("dwi", "dwi")):
            place = folder / subject / session / kind
            place.mkdir(parents=True)
            (place / f"{subject}_{session}_{suffix}.nii.gz").write_bytes(b"")
    return folder


def test_a_table_and_a_bids_tree_find_the_same(tmp_path):
    table, _ = find_pairs(write_pairs(tmp_path / "csv", subjects=3), BOTH)
    tree = bids_tree(tmp_path / "bids", [(pair.subject, "ses-1") for pair in table])
    (tree / "participants.tsv").write_text("participant_id\tgroup\nsub-02\tAD\n")
    pairs, problems = find_pairs(tree, BOTH)
    assert [pair.name for pair in pairs] == [f"{pair.name}_ses-1" for pair in table] and problems == []
    assert [pair.group for pair in pairs] == ["", "AD", ""]
    (tree / "sub-01/ses-1/func/sub-01_ses-1_task-zzz_bold.nii.gz").write_bytes(b"")
    pairs, problems = find_pairs(tree, BOTH)
    assert len(pairs) == 3 and "task-zzz" in problems[0].where and "opt.bids_suffix" in problems[0].remedy


def test_suffixes_of_a_bids_tree_can_be_chosen(tmp_path):
    tree = bids_tree(tmp_path, [("sub-01", "ses-1"), ("sub-01", "ses-2")])
    for name in ("space-MNI_desc-preproc_bold.nii.gz", "space-MNI_FA.nii"):
        (tree / "sub-01/ses-2/func" / f"sub-01_ses-2_{name}").write_bytes(b"")
    pairs, _ = find_pairs(tree, ("fmri", "FA"), suffixes={"fmri": "desc-preproc_bold"})
    assert [pair.name for pair in pairs] == ["sub-01_ses-2"]
    assert pairs[0].files["fmri"].name == "sub-01_ses-2_space-MNI_desc-preproc_bold.nii.gz"
    pairs, _ = find_pairs(tree, ("a", "b"), suffixes={"a": "task-*_bold", "b": "dwi"})
    assert len(pairs) == 2


def test_D7_one_side_missing_is_listed_and_left_out(tmp_path):
    tree = bids_tree(tmp_path / "bids", [("sub-01", "ses-1"), ("sub-02", "ses-1")])
    (tree / "sub-02/ses-1/dwi/sub-02_ses-1_dwi.nii.gz").unlink()
    pairs, problems = find_pairs(tree, BOTH)
    assert [pair.name for pair in pairs] == ["sub-01_ses-1"]
    assert [(p.subject, p.fatal) for p in problems] == [("sub-02_ses-1", False)] and "no dmri" in problems[0].what
    (tmp_path / "pairs.csv").write_text("subject,fmri,dmri\n1,a,b\n2,c,\n,d,e\n")
    pairs, problems = find_pairs(tmp_path / "pairs.csv", BOTH)
    assert len(pairs) == 1 and {p.where for p in problems} == {"sub-2", f"{tmp_path}/pairs.csv line 4"}
    assert not any(problem.fatal for problem in problems)


@pytest.mark.parametrize("content, message", [
    ("subject,fmri,dmri\nsub-1,a,b\nsub-01,c,d\n", "same visit"),
    ("subject,session,fmri,dmri\n1,1,a,b\n1,ses-01,c,d\n", "same visit"),
    ("subject,session,fmri,dmri\n1,1,a,b\n1,ses-1,c,d\n", "same visit"),
    ("subject,fmri,dmri\nA07,a,b\nsub-a7,c,d\n", "same visit"),
    ("subject,session,fmri,dmri\nsub-01_ses-1,,a,b\nsub-01,1,c,d\n", "same visit"),
    ("subject,fmri,dmri\n1,a,b\n2,a,d\n", "belongs to sub-1 and to sub-2"),
    ("subject,fmri,dmri\n1,a,a\n", "stands for both"),
    ("subject,fmri,dmri\n1,a,./a\n", "stands for both"),
    ("subject,fmri,dmri\n/../x,a,b\n", "because they become file names")])
def test_D8_what_stands_twice_is_refused(tmp_path, content, message):
    (tmp_path / "pairs.csv").write_text(content)
    assert message in refused(find_pairs(tmp_path / "pairs.csv", BOTH))


@pytest.mark.parametrize("content, message", [
    ("subject,t1,flair\n1,a,b\n", "set opt.modalities to two of t1, flair"),
    ("subject,fmri,dmri\n1,a,\n", "no subject has both"),
    ("", "no column subject"),
    ("subject,fmri,dmri,fold\n1,a,b,x\n", "fold 'x' is not a number"),
    ("subject;fmri;dmri\n1;a;b\n", "separated by semicolons"),
    ("subject,fmri,dmri,fmri\n1,a,b,c\n", "has the column fmri twice"),
    ("participant_id,fmri,dmri\n1,a,b\n", "name the column of the subjects so"),
    ("subject,fmri,dmri,group\n1,a,b,\"MCI\n2,c,d,NC\n", "cannot be read as a table"),
    ("subject,fmri,dmri\n1,a\0,b\n", "NUL"),
    ("\0\xff\n\0\n", "opt.data_root|no column")])
def test_unusable_tables_are_refused(tmp_path, content, message):
    (tmp_path / "pairs.csv").write_bytes(content.encode("latin-1"))
    assert any(part in refused(find_pairs(tmp_path / "pairs.csv", BOTH)) for part in message.split("|"))


def test_all_problems_of_a_table_come_at_once(tmp_path):
    (tmp_path / "pairs.csv").write_text("subject,fmri,dmri,fold\n1,a,b,x\n2,c,c,0\n3,d,e,0\n03,f,g,1\n")
    message = refused(find_pairs(tmp_path / "pairs.csv", BOTH))
    assert len(message.splitlines()) == 3


def test_a_missing_study_is_refused(tmp_path):
    assert "no such file or folder" in refused(find_pairs(tmp_path / "nowhere", BOTH))
    assert "give a BIDS tree" in refused(find_pairs(tmp_path, BOTH))


def test_subjects_and_visits_can_be_left_out(tmp_path):
    tree = bids_tree(tmp_path, [("sub-01", "ses-1"), ("sub-01", "ses-2"), ("sub-02", "ses-1")])
    assert [pair.name for pair in find_pairs(tree, BOTH, ("1",))[0]] == ["sub-02_ses-1"]
    assert [pair.name for pair in find_pairs(tree, BOTH, ("sub-01_ses-2",))[0]] == ["sub-01_ses-1", "sub-02_ses-1"]
    (tmp_path / "pairs.csv").write_text("subject,fmri,dmri,fold\n1,a,b,x\n2,c,d,0\n")
    pairs, problems = find_pairs(tmp_path / "pairs.csv", BOTH, ("sub-01",))
    assert len(pairs) == 1 and problems == []  # what is left out has no problems any more
    assert "opt.exclude names sub-9" in refused(find_pairs(tree, BOTH, ("sub-9",)))


def test_D8_visits_named_in_the_subject_column_are_of_one_person(tmp_path):
    (tmp_path / "pairs.csv").write_text("subject,fmri,dmri\nsub-01_ses-1,a,b\nsub-01_ses-2,c,d\nsub01,e,f\n")
    pairs, problems = find_pairs(tmp_path / "pairs.csv", BOTH)
    assert len({pair.person for pair in pairs}) == 1 and [pair.session for pair in pairs] == ["1", "2", ""]
    assert problems == []


def test_one_scan_may_serve_two_visits_of_one_person(tmp_path):
    (tmp_path / "pairs.csv").write_text("subject,session,fmri,dmri\n1,1,a,b\n1,2,c,b\n")
    assert find_pairs(tmp_path / "pairs.csv", BOTH)[1] == []


def test_bids_files_in_the_wrong_place_hidden_or_behind_links(tmp_path):
    tree = bids_tree(tmp_path / "bids", [("sub-01", "ses-1"), ("sub-02", "ses-1")])
    (tree / "sub-01/ses-1/func/._sub-01_ses-1_task-rest_bold.nii.gz").write_bytes(b"mac")
    (tree / "sub-02/ses-1/func").rename(tmp_path / "elsewhere")
    (tree / "sub-02/ses-1/func").symlink_to(tmp_path / "elsewhere")
    (tree / "sub-02/loop").symlink_to(tree / "sub-02")
    pairs, problems = find_pairs(tree, BOTH)
    assert len(pairs) == 2 and problems == []
    (tmp_path / "elsewhere/sub-02_ses-1_task-rest_bold.nii.gz").rename(tmp_path / "elsewhere/sub-03_ses-1_bold.nii.gz")
    assert "its name and its folder tell different subjects" in refused(find_pairs(tree, BOTH))


def test_a_folder_that_cannot_be_read_is_a_problem(tmp_path, monkeypatch):
    tree = bids_tree(tmp_path, [("sub-01", "ses-1"), ("sub-02", "ses-1")])
    scandir = os.scandir

    def denied(folder):
        if Path(folder).name == "dwi" and "sub-02" in str(folder):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", denied)
    assert "sub-02/ses-1/dwi: cannot be read (Permission denied)" in refused(find_pairs(tree, BOTH))


@pytest.mark.parametrize("content, note", [
    ("participant_id \tgroup\nsub-1\tAD\n2\tNC\n", None), ("participant_id,group\nsub-01,AD\n", "no column"),
    ("participant_id\tgroup\nsub-77\tAD\n", "belong to none")])
def test_groups_are_found_or_missed_aloud(tmp_path, content, note):
    tree = bids_tree(tmp_path, [("sub-01", "ses-1"), ("sub-02", "ses-1")])
    (tree / "participants.tsv").write_text(content)
    pairs, problems = find_pairs(tree, BOTH)
    assert [pair.group for pair in pairs] == (["", ""] if note else ["AD", "NC"])
    assert [problem.fatal for problem in problems] == ([False] if note else [])
    assert note is None or note in problems[0].what


# ---- the split

manifests = st.lists(st.tuples(st.integers(1, 40), st.sampled_from(["{}", "sub-{}", "sub-{:02d}", "{:03d}"]),
                               st.sampled_from(["", "1", "2"]), st.sampled_from(["", "NC", "AD"])),
                     min_size=1, max_size=60)


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(manifests, st.integers(2, 6), st.integers(0, 5), st.integers(0, 3))
def test_D8_no_subject_is_on_both_sides_of_a_split(tmp_path, rows, folds, fold, seed):
    """1,000 random manifests with sessions and several spellings of the same subject, through the program's own way."""
    with open(tmp_path / "pairs.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("subject", "session", "group", *BOTH))
        for place, (number, style, session, group) in enumerate(rows):
            table.writerow((style.format(number), session, group, f"a{place}", f"b{place}"))
    pairs, problems = find_pairs(tmp_path / "pairs.csv", BOTH)
    assert len(pairs) == len(rows)
    visits = [(number, session) for number, _, session, _ in rows]
    assert bool(problems) == (len(set(visits)) < len(visits))  # the same visit twice is refused, nothing else is
    person = {style.format(number): number for number, style, _, _ in rows}
    try:
        roles = split_subjects(pairs, folds, fold % folds, 0.2, seed)  # holds even if the refusal is overlooked
    except PairError:
        assert len(set(person.values())) < 2 * folds
        return
    people = {role: {person[pairs[i].subject] for i in members} for role, members in roles.items()}
    assert sorted(i for members in roles.values() for i in members) == list(range(len(pairs)))
    assert not people["train"] & people["test"] and not people["train"] & people["validation"]
    assert not people["test"] & people["validation"] and people["test"] and people["validation"] and people["train"]


def study_pairs(count: int, **fields) -> list[Pair]:
    return [Pair(f"sub-{n:02d}", "", "AD" if n % 3 == 0 else "NC", fields.get("fold", lambda n: None)(n), {})
            for n in range(count)]


def test_folds_cover_everyone_once_and_keep_the_groups():
    pairs = study_pairs(30)
    tests = [split_subjects(pairs, 5, fold, 0.2, 0)["test"] for fold in range(5)]
    assert sorted(i for test in tests for i in test) == list(range(30))
    assert all(sum(pairs[i].group == "AD" for i in test) == 2 for test in tests)
    assert split_subjects(pairs, 5, 0, 0.2, 0) == split_subjects(pairs, 5, 0, 0.2, 0)
    assert tests[0] != split_subjects(pairs, 5, 0, 0.2, 1)["test"]


@pytest.mark.parametrize("groups, folds", [(2, 2), (2, 4), (3, 3), (5, 5), (3, 5), (2, 3)])
def test_no_fold_is_of_one_group_only(groups, folds):
    pairs = [Pair(f"sub-{n:02d}", "", f"group {n % groups}", None, {}) for n in range(groups * folds * 2)]
    for fold in range(folds):
        tested = [pairs[i].group for i in split_subjects(pairs, folds, fold, 0.2, 0)["test"]]
        assert {tested.count(f"group {n}") for n in range(groups)} == {2}


def test_own_folds_one_fold_and_too_few(tmp_path):
    own = study_pairs(9, fold=lambda n: n % 3)
    roles = split_subjects(own, 3, 1, 0.2, 0)
    assert roles["test"] == [1, 4, 7]
    write_split(tmp_path / "split.csv", own, roles)
    assert [row["role"] for row in csv.DictReader((tmp_path / "split.csv").read_text().splitlines())].count("test") == 3
    with pytest.raises(PairError, match="fill it for all or for none"):
        split_subjects([*own, Pair("sub-77", "", "", None, {})], 3, 1, 0.2, 0)
    assert len(split_subjects(own, 3, 1, 0.95, 0)["train"]) == 1
    torn = [*own, Pair("sub-00", "2", "", 2, {})]
    with pytest.raises(PairError, match="in different folds"):
        split_subjects(torn, 3, 1, 0.2, 0)
    assert split_subjects(own, 1, 0, 0.2, 0) == {role: list(range(9)) for role in ("train", "validation", "test")}
    with pytest.raises(PairError, match=r"set opt.fold to one of the study's own folds, \[0, 1, 2\]"):
        split_subjects(own, 5, 4, 0.2, 0)
    with pytest.raises(PairError, match="opt.folds lower"):
        split_subjects(study_pairs(2), 5, 0, 0.2, 0)


@needs_shared
def test_real_studies():
    pairs, problems = find_pairs(LGG, ("t1", "flair"))
    assert len(pairs) == 64 and problems == []
    pairs, problems = find_pairs(TRACTOR, BOTH)
    assert [pair.name for pair in pairs] == ["sub-01"] and problems == []
