"""Who is trained, validated and tested on: folds of subjects, never of single scans."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np

from data.pairs import Pair
from data.problems import PairError, Problem
from utils.files import write_table


def split_subjects(pairs: list[Pair], folds: int, fold: int, validation_fraction: float,
                   seed: int) -> dict[str, list[int]]:
    """Positions in `pairs` to train, validate and test on: {"train", "validation", "test"}; a subject is in one only.

    Subjects are dealt into `folds`, each group evenly; the pairs' own folds are used where every pair has one.
    With folds = 1 everything is in all three. Raises PairError where there are too few subjects.
    """
    if folds == 1:
        return {role: list(range(len(pairs))) for role in ("train", "validation", "test")}
    people, given = sorted({pair.person for pair in pairs}), [pair.name for pair in pairs if pair.fold is not None]
    if given and len(given) < len(pairs):
        raise _impossible("opt.folds", f"the fold column is filled for {len(given)} of {len(pairs)} pairs",
                          "fill it for all or for none")
    if given:
        fold_of = {pair.person: pair.fold for pair in pairs}
        if torn := [pair.name for pair in pairs if fold_of[pair.person] != pair.fold]:
            raise _impossible(", ".join(torn), "the sessions of one subject are in different folds", "give them one")
    else:
        fold_of = {person: place % folds for place, person in enumerate(_evened(pairs, _dealt(pairs, people, seed),
                                                                                folds))}
    test = {person for person in people if fold_of[person] == fold}
    rest = [person for person in _dealt(pairs, people, seed + 1) if person not in test]
    validation = set(rest[:max(1, min(round(validation_fraction * len(rest)), len(rest) - 1))])
    if not test or len(rest) < 2:
        remedy = "set opt.folds lower, or to 1, which trains and reports on everything"
        if given:
            remedy = (f"set opt.fold to one of the study's own folds, {sorted(set(fold_of.values()))} (and opt.folds "
                      "above it), or opt.folds to 1")
        raise _impossible(f"opt.folds = {folds}, opt.fold = {fold}", f"of {len(people)} subjects {len(test)} would be "
                          f"tested and {len(rest)} left to train and validate on", remedy)
    roles = {"train": [], "validation": [], "test": []}
    for position, pair in enumerate(pairs):
        role = "test" if pair.person in test else "validation" if pair.person in validation else "train"
        roles[role].append(position)
    return roles


def _impossible(where: str, what: str, remedy: str) -> PairError:
    return PairError(Problem(where, what, remedy))


def _dealt(pairs: list[Pair], people: list[str], seed: int) -> list[str]:
    """All people in a seeded random order in which the groups take turns in proportion to their sizes."""
    group_of = {pair.person: pair.group for pair in pairs}
    random = np.random.default_rng(seed)
    turn = {}
    for group in sorted(set(group_of.values())):
        members = [person for person in people if group_of[person] == group]
        for place, member in enumerate(random.permutation(len(members))):
            turn[members[member]] = ((place + 0.5) / len(members), group)
    return sorted(people, key=turn.__getitem__)


def _evened(pairs: list[Pair], people: list[str], folds: int) -> list[str]:
    """The same order, or group after group where the turns would deal some group unevenly: 2 groups into 2 folds."""
    group_of = {pair.person: pair.group for pair in pairs}
    counts = collections.Counter((group_of[person], place % folds) for place, person in enumerate(people))
    for group in set(group_of.values()):
        if np.ptp([counts[group, fold] for fold in range(folds)]) > 1:
            return sorted(people, key=group_of.__getitem__)
    return people


def write_split(path: Path, pairs: list[Pair], roles: dict[str, list[int]]) -> None:
    """Write subject, session, group and role of every pair as CSV. Raises FileError."""
    rows = [{"subject": pair.subject, "session": pair.session, "group": pair.group,
             "role": "+".join(name for name, members in roles.items() if position in members)}
            for position, pair in enumerate(pairs)]
    write_table(path, ("subject", "session", "group", "role"), rows)
