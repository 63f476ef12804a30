"""Which volumes belong together, and who is trained, validated and tested on: pairs and the split by subject."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BIDS_SUFFIX = {"fmri": "bold", "dmri": "dwi"}  # other modalities are looked for by their own name, e.g. T1w
OPTIONAL = ("session", "group", "fold")


class PairError(ValueError):
    """A study that cannot be used; the message names the file or option, what is wrong, and what to do."""


@dataclass(frozen=True)
class Pair:
    """Both scans of one visit of one subject. `files`: modality -> NIfTI file."""

    subject: str
    session: str
    group: str
    fold: int | None
    files: dict[str, Path]

    @property
    def name(self) -> str:
        """sub-01, or sub-01_ses-2: the label in pictures, tables and file names."""
        subject = self.subject if self.subject.startswith("sub-") else f"sub-{self.subject}"
        return subject + (f"_ses-{self.session.removeprefix('ses-')}" if self.session else "")

    @property
    def person(self) -> str:
        """The same for every spelling of one subject: sub-01, 01 and 1 are one person."""
        bare = self.subject.strip().lower().removeprefix("sub-")
        return bare.lstrip("0") or "0" if bare.isdigit() else bare


def find_pairs(data_root: Path, modalities: tuple[str, str]) -> tuple[list[Pair], list[str]]:
    """The study's complete pairs, sorted by name, and a note on everything that was left out.

    data_root: a CSV/TSV file, or the folder of a BIDS tree. Raises PairError.
    """
    if data_root.is_file():
        found, notes = _from_table(data_root, modalities)
    elif data_root.is_dir():
        found, notes = _from_bids(data_root, modalities)
    else:
        raise PairError(f"opt.data_root = {str(data_root)!r}: there is no such file or folder")
    pairs = []
    for pair in sorted(found, key=lambda each: each.name):
        missing = [name for name in modalities if name not in pair.files]
        if missing:
            notes.append(f"{pair.name}: left out, it has no {' and no '.join(missing)}")
        else:
            pairs.append(pair)
    if not pairs:
        raise PairError(f"opt.data_root = {str(data_root)!r}: no subject has both {' and '.join(modalities)}; "
                        "set opt.modalities to the study's column names or BIDS suffixes"
                        + "".join(f"\n  {note}" for note in notes[:5]))
    _refuse_doubles(pairs)
    return pairs, notes


def _refuse_doubles(pairs: list[Pair]) -> None:
    visits, names, files = {}, set(), {}
    for pair in pairs:
        if not re.fullmatch(r"[\w.+-]+", pair.name):
            raise PairError(f"{pair.name!r}: subject and session may only have letters, digits and . _ + - in them, "
                            "because they become file names; rename it in the manifest")
        if pair.name in names:
            raise PairError(f"{pair.name} stands for two visits; give each its own subject or session")
        names.add(pair.name)
        visit = (pair.person, pair.session)
        if visit in visits:
            raise PairError(f"{pair.name} and {visits[visit]} are the same visit of the same subject; "
                            "keep one of them, or give each its session")
        visits[visit] = pair.name
        for file in pair.files.values():
            owner = files.setdefault(file.resolve(), pair.name)
            if owner != pair.name:
                raise PairError(f"{file} belongs to {owner} and to {pair.name}; correct one of the two paths")
        if len({file.resolve() for file in pair.files.values()}) < len(pair.files):
            raise PairError(f"{pair.name}: one file stands for both modalities; correct one of the two paths")


def _from_table(table: Path, modalities: tuple[str, str]) -> tuple[list[Pair], list[str]]:
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter="\t" if table.suffix == ".tsv" else ",", restval="")
            rows, columns = list(reader), [name.strip() for name in reader.fieldnames or ()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PairError(f"opt.data_root = {str(table)!r}: cannot be read as a table ({error}); "
                        "give a CSV or TSV file, or the folder of a BIDS tree") from error
    if absent := [name for name in ("subject", *modalities) if name not in columns]:
        others = [name for name in columns if name not in ("subject", *OPTIONAL)]
        if any(";" in name for name in columns):
            raise PairError(f"{table}: its columns are separated by semicolons; save it with commas, or "
                            "as .tsv with tabs")
        raise PairError(f"{table}: has no column {', '.join(absent)}; its columns are {', '.join(columns) or 'none'}. "
                        f"Set opt.modalities to two of {', '.join(others) or 'its columns'}")
    pairs, notes = [], []
    for line, row in enumerate(rows, start=2):
        cells = {(key or "").strip(): value.strip() for key, value in row.items() if isinstance(value, str)}
        if not cells["subject"]:
            notes.append(f"{table.name} line {line}: left out, it names no subject")
            continue
        fold = cells.get("fold", "")
        if fold and not (fold.isdecimal() and fold.isascii()):
            raise PairError(f"{table} line {line}: fold {fold!r} is not a number from 0 upwards")
        files = {name: table.parent / cells[name] for name in modalities if cells[name]}
        pairs.append(Pair(cells["subject"], cells.get("session", ""), cells.get("group", ""),
                          int(fold) if fold else None, files))
    return pairs, notes


def _from_bids(tree: Path, modalities: tuple[str, str]) -> tuple[list[Pair], list[str]]:
    groups, notes, visits = _participants(tree), [], {}
    for name in modalities:
        suffix = BIDS_SUFFIX.get(name, name)
        for file in sorted([*tree.glob(f"sub-*/**/*_{suffix}.nii.gz"), *tree.glob(f"sub-*/**/*_{suffix}.nii")]):
            subject = file.relative_to(tree).parts[0]
            session = re.search(r"[/_]ses-([^/_]+)", file.relative_to(tree).as_posix())
            visit = visits.setdefault((subject, session[1] if session else ""), {})
            if name in visit:
                notes.append(f"{file.relative_to(tree)}: left out, {visit[name].name} of the same visit is used")
            visit.setdefault(name, file)
    if not visits:
        wanted = " or ".join(f"*_{BIDS_SUFFIX.get(name, name)}.nii.gz" for name in modalities)
        raise PairError(f"opt.data_root = {str(tree)!r}: no {wanted} below sub-*; "
                        "give a BIDS tree, or a CSV with the columns subject," + ",".join(modalities))
    return [Pair(subject, session, groups.get(subject, ""), None, files)
            for (subject, session), files in visits.items()], notes


def _participants(tree: Path) -> dict[str, str]:
    table = tree / "participants.tsv"
    if not table.exists():
        return {}
    with open(table, newline="", encoding="utf-8-sig", errors="replace") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row.get("participant_id")]
    return {f"sub-{row['participant_id'].removeprefix('sub-')}": row.get("group") or "" for row in rows}


def in_mni_space(pair: Pair) -> bool:
    """Whether the files say so: a BIDS entity space-MNI... in both names. An affine cannot tell."""
    return all("_space-MNI" in file.name for file in pair.files.values())


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
        raise PairError(f"the fold column is filled for {len(given)} of {len(pairs)} pairs; fill it for all "
                        "or for none")
    if all(pair.fold is not None for pair in pairs):
        fold_of = {pair.person: pair.fold for pair in pairs}
        if torn := [pair.name for pair in pairs if fold_of[pair.person] != pair.fold]:
            raise PairError(f"{', '.join(torn)}: the sessions of one subject are in different folds; give them one")
    else:
        fold_of = {person: place % folds for place, person in enumerate(_dealt(pairs, people, seed))}
    test = {person for person in people if fold_of[person] == fold}
    rest = [person for person in _dealt(pairs, people, seed + 1) if person not in test]
    validation = set(rest[:max(1, min(round(validation_fraction * len(rest)), len(rest) - 1))])
    if not test or len(rest) < 2:
        raise PairError(f"opt.folds = {folds}, opt.fold = {fold}: of {len(people)} subjects {len(test)} would be "
                        f"tested and {len(rest)} left to train and validate on; set opt.folds lower, or to 1, "
                        "which trains and reports on everything"
                        + (f" (the study's own folds are {sorted(set(fold_of.values()))})" if given else ""))
    roles = {"train": [], "validation": [], "test": []}
    for position, pair in enumerate(pairs):
        role = "test" if pair.person in test else "validation" if pair.person in validation else "train"
        roles[role].append(position)
    return roles


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


def write_split(path: Path, pairs: list[Pair], roles: dict[str, list[int]]) -> None:
    """Write subject, session, group and role of every pair as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("subject", "session", "group", "role"))
        for position, pair in enumerate(pairs):
            role = "+".join(name for name, members in roles.items() if position in members)
            rows.writerow((pair.subject, pair.session, pair.group, role))
