"""Splitting subjects into training, validation and test sets, and the groups that can be learnt."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.pairs import Pair, find_pairs
from data.problems import DataError
from data.split import ROLES, add_incomplete, groups_to_learn, split_subjects, write_split
from tests.conftest import BOTH, read_csv

visits = st.tuples(st.integers(1, 40), st.sampled_from(["{}", "sub-{}", "sub-{:02d}", "{:03d}"]),
                   st.sampled_from(["", "1", "2"]), st.sampled_from(["", "NC", "AD"]))


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(visits, min_size=1, max_size=60), st.integers(2, 6), st.integers(0, 5), st.integers(0, 3))
def test_no_subject_has_two_roles(tmp_path, rows, folds, fold, seed):
    """1,000 random tables with sessions and several spellings of the same subject."""
    lines = [f"{style.format(number)},{session},{group},a{i},b{i}"
             for i, (number, style, session, group) in enumerate(rows)]
    (tmp_path / "pairs.csv").write_text("\n".join(["subject,session,group,fmri,dmri", *lines]))
    pairs, problems = find_pairs(tmp_path / "pairs.csv", BOTH)
    numbers = [int(pair.person) for pair in pairs]
    assert sorted(numbers) == sorted(number for number, *_ in rows)
    assert bool(problems) == (len({(number, session) for number, _, session, _ in rows}) < len(rows))
    try:
        roles = split_subjects(pairs, folds, fold % folds, 0.2, seed)  # also if the same visit is there twice
    except DataError:
        assert len(set(numbers)) < 2 * folds
        return
    people = {role: {numbers[i] for i in members} for role, members in roles.items()}
    assert tuple(roles) == ROLES and all(people.values())
    assert sorted(i for members in roles.values() for i in members) == list(range(len(pairs)))
    assert sum(map(len, people.values())) == len(set(numbers))


def study(count: int, folds: int = 0, groups: tuple[str, ...] = ("AD", "NC", "NC")) -> list[Pair]:
    return [Pair(f"sub-{n:02d}", "", groups[n % len(groups)], n % folds if folds else None, {}) for n in range(count)]


def test_the_split_is_seeded_and_the_same_in_every_version():
    assert split_subjects(study(30), 5, 0, 0.2, 0)["test"] != split_subjects(study(30), 5, 0, 0.2, 1)["test"]
    assert split_subjects(study(12), 3, 1, 0.3, 5) == {
        "train": [4, 5, 6, 7, 9, 10], "validation": [0, 11], "test": [1, 2, 3, 8]}


@pytest.mark.parametrize("groups, folds", [(2, 2), (2, 4), (3, 3), (5, 5), (3, 5), (2, 3)])
def test_folds_cover_all_subjects_once_and_each_has_all_groups(groups, folds):
    pairs = study(groups * folds * 2, groups=tuple("ABCDE"[:groups]))
    tests = [split_subjects(pairs, folds, fold, 0.2, 0)["test"] for fold in range(folds)]
    assert sorted(i for test in tests for i in test) == list(range(len(pairs)))
    for test in tests:
        assert sorted(pairs[i].group for i in test) == sorted(2 * "ABCDE"[:groups])


@pytest.mark.parametrize("folds, test, role", [(3, [1, 4, 7], "test"), (1, [*range(9)], "train+validation+test")])
def test_the_fold_column_or_a_single_fold_decides_and_the_split_is_written(tmp_path, folds, test, role):
    roles = split_subjects(study(9, 3), folds, folds // 2, 0.95, 0)
    assert roles["test"] == test and len(roles["train"]) == (1 if folds == 3 else 9)
    write_split(tmp_path / "split.csv", study(9, 3), roles)
    rows = read_csv(tmp_path / "split.csv")
    assert [i for i, row in enumerate(rows) if row["role"] == role] == test and rows[3]["group"] == "AD"


def test_a_fold_column_may_count_from_one_and_beyond_opt_folds():
    pairs = [dataclasses.replace(pair, fold=pair.fold + 1) for pair in study(18, 6)]
    assert [split_subjects(pairs, 5, fold, 0.2, 0)["test"] for fold in (1, 6)] == [[0, 6, 12], [5, 11, 17]]
    with pytest.raises(DataError, match=r"set opt.fold to one of \[1, 2, 3, 4, 5, 6\]"):
        split_subjects(pairs, 5, 0, 0.2, 0)


@pytest.mark.parametrize("pairs, folds, fold, message", [
    ([*study(9, 3), Pair("sub-77", "", "", None, {})], 3, 1, "fill it for all pairs or for none"),
    ([*study(9, 3), Pair("sub-00", "2", "", 2, {})], 3, 1, "in different folds"),
    (study(9, 1), 5, 0, "0 left for training and validation; use more folds; or set opt.folds to 1"),
    (study(9, 3), 5, 4, r"set opt.fold to one of \[0, 1, 2\]"),
    (study(2), 5, 0, "of 2 subjects with both scans, 1 would be tested and 1 left .* add subjects with both scans: .*; "
     "or set opt.folds to 1")])
def test_impossible_folds_are_refused(pairs, folds, fold, message):
    with pytest.raises(DataError, match=message):
        split_subjects(pairs, folds, fold, 0.2, 0)


def test_incomplete_visits_are_trained_on_alone_and_only_where_nobody_is_held_out():
    pairs, lacking = study(9, 3), [Pair(f"sub-{n}", "2", "", fold, {"fmri": Path("a")}) for n, fold in
                                   ((1, None), (0, None), (77, None), (78, 1), (79, 2))]
    roles = split_subjects(pairs, 3, 1, 0.2, 0)
    before, validated = {**roles}, pairs[roles["validation"][0]].person
    lacking.append(Pair(validated, "2", "", None, {"fmri": Path("a")}))
    everybody, notes = add_incomplete(pairs, roles, lacking, 1)
    assert roles.pop("incomplete") == [*range(9, len(everybody))] and roles == before and everybody[:9] == pairs
    assert [visit.subject for visit in everybody[9:]] == [name for name in ("sub-0", "sub-77", "sub-79")
                                                          if name != f"sub-{validated}"]
    assert {(note.subject, note.what.split()[-2]) for note in notes} >= {("sub-1_ses-2", "test"),
                                                                         ("sub-78_ses-2", "test")}
    assert not any(note.fatal for note in notes) and len(notes) + len(everybody) == 9 + 6
    assert len(add_incomplete(pairs, {role: [*range(9)] for role in ROLES}, lacking, None)[0]) == 15
    with pytest.raises(DataError, match="sub-0_ses-2: the sessions of one subject are in different folds"):
        add_incomplete(pairs, {**before}, [Pair("sub-0", "2", "", 1, {"fmri": Path("a")})], 1)
    with pytest.raises(DataError, match="sub-78_ses-2, sub-79_ses-2: the fold column is filled for visits with one"):
        add_incomplete(study(9), {**before}, lacking, 1)


def test_groups_are_learnt_only_if_large_enough():
    for count, condition, groups in ((15, True, ("AD", "NC")), (15, False, ())):
        opt = SimpleNamespace(condition_on_group=condition)
        assert groups_to_learn(opt, study(count), {"train": list(range(count))}) == groups
    for count, found in ((12, r"there are: AD \(4\), NC \(8\)"), (1, r"there are: AD \(1\)")):
        with pytest.raises(DataError, match=f"at least 5 training pairs each; {found}"):
            groups_to_learn(SimpleNamespace(condition_on_group=True), study(count), {"train": list(range(count))})
