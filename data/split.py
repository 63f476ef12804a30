"""Split subjects, never single scans, into training, validation and test sets."""

from collections import Counter
from pathlib import Path

import numpy as np

from data.pairs import Pair
from data.problems import DataError, Problem
from utils.files import write_table

ROLES = ("train", "validation", "test")
MIN_GROUP_PAIRS = 5  # in training: the network gets the mean volume of a group, which must not identify one subject


def split_subjects(pairs: list[Pair], folds: int, fold: int, validation_fraction: float,
                   seed: int) -> dict[str, list[int]]:
    """Return {role: positions in `pairs`}; each subject has one role, or all three with folds = 1. Raises DataError.

    The subjects of `fold` are tested. Folds are those of the fold column, or `folds` that spread each group evenly.
    """
    if folds == 1:
        return {role: list(range(len(pairs))) for role in ROLES}
    group_of = {pair.person: pair.group for pair in pairs}
    fold_of = {pair.person: pair.fold for pair in pairs}
    filled = sum(pair.fold is not None for pair in pairs)
    if 0 < filled < len(pairs):
        raise DataError(Problem("opt.folds", f"the fold column is filled for {filled} of {len(pairs)} pairs",
                                "fill it for all pairs or for none"))
    if torn := [pair.name for pair in pairs if fold_of[pair.person] != pair.fold]:
        raise DataError(_torn(torn))
    if not filled:
        order = _seeded_order(group_of, seed)
        counts = Counter((group_of[person], position % folds) for position, person in enumerate(order))
        if any(np.ptp([counts[group, n] for n in range(folds)]) > 1 for group in set(group_of.values())):
            order.sort(key=group_of.__getitem__)  # counted off group by group, the groups are spread more evenly
        fold_of = {person: position % folds for position, person in enumerate(order)}
    test = {person for person in group_of if fold_of[person] == fold}
    rest = [person for person in _seeded_order(group_of, seed + 1) if person not in test]
    if not test or len(rest) < 2:
        sizes = Counter(fold_of[person] for person in group_of)
        usable = [each for each in sorted(sizes) if len(group_of) - sizes[each] >= 2]
        raise DataError(Problem(f"opt.folds = {folds}, opt.fold = {fold}", f"of {len(group_of)} subjects with both "
                                f"scans, {len(test)} would be tested and {len(rest)} left for training and validation",
                                (f"set opt.fold to one of {usable}" if usable else "use more folds" if filled and
                                 len(group_of) > 2 else "add subjects with both scans: at least one is tested, one "
                                 "validated and one trained on")
                                + "; or set opt.folds to 1, which trains and tests on all subjects"))
    validation = rest[:max(1, min(round(validation_fraction * len(rest)), len(rest) - 1))]
    held_out = dict.fromkeys(test, "test") | dict.fromkeys(validation, "validation")
    role_of = [held_out.get(pair.person, "train") for pair in pairs]
    return {role: [i for i, its_role in enumerate(role_of) if its_role == role] for role in ROLES}


def add_incomplete(pairs: list[Pair], roles: dict[str, list[int]], incomplete: list[Pair],
                   test_fold: int | None) -> tuple[list[Pair], list[Problem]]:
    """Give visits that lack a modality the role "incomplete": they take part in training, and only there. Returns all
    pairs, the complete ones at their places, and a warning for each visit that is left out because its person is tested
    or validated on. test_fold: opt.fold; None with opt.folds = 1, where everybody is trained on. Raises DataError.
    """
    held_out, fold_of = {}, {pair.person: pair.fold for pair in pairs if pair.fold is not None}
    if torn := [visit.name for visit in incomplete if visit.fold not in (None, fold_of.get(visit.person, visit.fold))]:
        raise DataError(_torn(torn))
    if test_fold is not None:
        if not fold_of and (named := [visit.name for visit in incomplete if visit.fold is not None]):
            raise DataError(Problem(", ".join(named), "the fold column is filled for visits with one scan only",
                                    "fill it for all pairs or for none"))
        held_out = {visit.person: "test" for visit in incomplete if visit.fold == test_fold}
        held_out |= {pairs[i].person: role for role in ROLES[1:] for i in roles[role]}
    used = [visit for visit in incomplete if visit.person not in held_out]
    if used:
        roles["incomplete"] = list(range(len(pairs), len(pairs) + len(used)))
    return pairs + used, [
        Problem(visit.name, f"left out because it has only {', '.join(visit.files)}, and its subject is in the "
                f"{held_out[visit.person]} set", "no subject may be on both sides", visit.name, fatal=False)
        for visit in incomplete if visit.person in held_out]


def _torn(names: list[str]) -> Problem:
    return Problem(", ".join(names), "the sessions of one subject are in different folds",
                   "put them into the same fold")


def _seeded_order(group_of: dict[str, str], seed: int) -> list[str]:
    """All people in a random order that spreads each group evenly over it."""
    random, rank = np.random.default_rng(seed), {}
    for group in sorted(set(group_of.values())):
        members = sorted(person for person in group_of if group_of[person] == group)
        for place, member in enumerate(random.permutation(len(members))):
            rank[members[member]] = (place + 0.5) / len(members), group
    return sorted(rank, key=rank.__getitem__)


def groups_to_learn(opt, pairs: list[Pair], roles: dict[str, list[int]]) -> tuple[str, ...]:
    """The groups that the network is conditioned on; () unless opt.condition_on_group. Raises DataError."""
    if not opt.condition_on_group:
        return ()
    counts = Counter(pairs[i].group for i in roles["train"] if pairs[i].group)
    if len(counts) < 2 or min(counts.values()) < MIN_GROUP_PAIRS:
        found = ", ".join(f"{group} ({count})" for group, count in sorted(counts.items())) or "none"
        raise DataError(Problem("opt.condition_on_group = True", "needs two groups or more, with at least "
                                f"{MIN_GROUP_PAIRS} training pairs each; there are: {found}", "correct or merge labels "
                                "in the column group of the table (or participants.tsv), or set it to False", "all"))
    return tuple(sorted(counts))


def write_split(path: Path, pairs: list[Pair], roles: dict[str, list[int]]) -> None:
    """Write subject, session, group and role of each pair as CSV. Raises UserError."""
    members = {role: set(positions) for role, positions in roles.items()}
    write_table(path, ("subject", "session", "group", "role"), [
        {"subject": pair.subject, "session": pair.session, "group": pair.group,
         "role": "+".join(role for role in members if i in members[role])} for i, pair in enumerate(pairs)])
