"""Find the pairs of a study, in a table or a BIDS tree, and what is wrong with them."""

import csv
import dataclasses
import fnmatch
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path

from data.problems import DataError, Problem

BIDS_SUFFIX = {"fmri": "bold", "dmri": "dwi"}  # the suffix of any other modality is its own name, e.g. T1w


@dataclass(frozen=True)
class Pair:
    """Both scans of one visit of one subject. files: modality -> NIfTI file."""

    subject: str
    session: str
    group: str
    fold: int | None
    files: dict[str, Path]

    @property
    def name(self) -> str:
        """sub-01 or sub-01_ses-2: the label in figures, tables and file names."""
        subject = self.subject if self.subject.startswith("sub-") else f"sub-{self.subject}"
        return subject + (f"_ses-{self.session.removeprefix('ses-')}" if self.session else "")

    @property
    def person(self) -> str:
        """The subject, equal for all spellings: sub-01, 01 and 1 are one person, and so are A07 and a7."""
        return _canonical(self.subject, "sub")

    @property
    def in_mni(self) -> bool:
        """Whether its files are named so: an affine cannot tell."""
        return all("_space-MNI" in file.name for file in self.files.values())


def _canonical(label: str, prefix: str) -> str:
    """Lower case, without prefix and leading zeros: sub-01, sub01, 01 and 1 become 1."""
    bare = re.sub(rf"^{prefix}(-|[_ ]?(?=\d))", "", label.strip().lower())
    return re.sub(r"0*(\d+)", r"\1", bare, flags=re.ASCII)


def find_pairs(data_root: Path, modalities: tuple[str, str], exclude: tuple[str, ...] = (),
               suffixes: dict[str, str] | None = None, partial: bool = False) -> tuple[list[Pair], list[Problem]]:
    """Return the pairs of a study, sorted by name, and all problems found.

    data_root, exclude, suffixes: opt.data_root, opt.exclude and opt.bids_suffix.
    partial: also return visits that lack a modality; otherwise each of them is a problem, which is not fatal.
    """
    try:
        if os.path.isdir(data_root):
            visits, problems = _from_bids(data_root, modalities, BIDS_SUFFIX | (suffixes or {}))
        else:
            visits, problems = _from_table(data_root, modalities, partial)
    except DataError as error:
        return [], list(error.problems)
    excluded = set()
    for label in exclude:
        names = {visit.name for visit in visits if label == visit.name or _canonical(label, "sub") == visit.person}
        if not names:
            problems.append(Problem(f"opt.exclude names {label}", "there is no such subject", "correct or remove it"))
        excluded |= names
    visits = sorted((visit for visit in visits if visit.name not in excluded), key=lambda visit: visit.name)
    pairs = [visit for visit in visits if partial or len(visit.files) == len(modalities)]
    problems = [problem for problem in problems if problem.subject not in excluded] + _conflicts(pairs)
    if partial:
        return pairs, problems
    for visit in visits:
        if missing := [modality for modality in modalities if modality not in visit.files]:
            problems.append(Problem(visit.name, f"left out because it has no {' and no '.join(missing)}", "if there is "
                                    "such a file, give it the same subject and session", visit.name, fatal=False))
    if not pairs and not any(problem.fatal for problem in problems):
        problems.append(Problem(str(data_root), f"no subject has both {' and '.join(modalities)}", "give a BIDS tree "
                                "or a table; check opt.modalities (its columns), opt.bids_suffix and opt.exclude"))
    return pairs, problems


def _conflicts(visits: list[Pair]) -> list[Problem]:
    """Names that cannot become file names, visits listed twice, and files used twice."""
    listed, by_file, problems = {}, {}, []
    for visit in visits:
        if not re.fullmatch(r"[\w.+-]{1,100}", visit.name):
            problems.append(Problem(repr(visit.name), "subject and session become file names: only letters, digits and "
                                    ". _ + - are allowed, 100 characters at most", "rename the subject", visit.name))
        keys = (visit.person, _canonical(visit.session, "ses")), visit.name
        others = [listed.setdefault(key, visit) for key in keys]
        if other := next((other for other in others if other is not visit), None):
            problems.append(Problem(f"{visit.name} and {other.name}", "are the same visit of the same subject",
                                    "keep only one of them, or fill the session column", visit.name))
        for modality, file in visit.files.items():
            owner, its_modality = by_file.setdefault(os.path.realpath(file), (visit, modality))
            if owner.person != visit.person or its_modality != modality:
                problems.append(Problem(str(file), f"is both the {its_modality} of {owner.name} and the {modality} of "
                                        f"{visit.name}", "correct one of the two paths", visit.name))
    return problems


def _read_table(table: Path, delimiter: str = "") -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Return the column names and (line, column -> cell) of each row. Raises DataError."""
    try:
        text = table.read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise csv.Error("it contains a NUL character")
        delimiter = delimiter or ("\t" if "\t" in text.partition("\n")[0] else ",")
        reader = csv.DictReader(io.StringIO(text), delimiter=delimiter, restkey="", restval="", strict=True)
        return [column.strip() for column in reader.fieldnames or ()], [
            (reader.line_num, {column.strip(): cell.strip() for column, cell in row.items() if column})
            for row in reader]
    except (OSError, UnicodeError, csv.Error) as error:
        raise DataError(Problem(str(table), f"cannot be read as a table ({error})",
                                "set opt.data_root to a CSV or TSV file, or to the folder of a BIDS tree")) from error


def _from_table(table: Path, modalities: tuple[str, str], partial: bool) -> tuple[list[Pair], list[Problem]]:
    columns, rows = _read_table(table)
    needed = ["subject", *([name for name in modalities if partial and name in columns] or modalities)]
    if wrong := [name for name in ("subject", *modalities, "session", "group", "fold")
                 if columns.count(name) > 1 or (name in needed and name not in columns)]:
        raise DataError(Problem(str(table), f"needs one column {', '.join(wrong)}; it has {', '.join(columns)}",
                                'name its columns "subject" and as in opt.modalities, separated by commas or tabs'))
    visits, problems = [], []
    for line, cells in rows:
        where, fold = f"{table} line {line}", cells.get("fold", "")
        subject, _, session = cells["subject"].partition("_ses-")
        if not subject:
            problems.append(Problem(where, "left out because it names no subject", "fill it in", fatal=False))
            continue
        files = {modality: table.parent / cells[modality] for modality in modalities if cells.get(modality)}
        visits.append(Pair(subject, cells.get("session") or session, cells.get("group", ""),
                           int(fold) if fold.isdecimal() and fold.isascii() else None, files))
        if fold and visits[-1].fold is None:
            problems.append(Problem(where, f"fold {fold!r} is not 0, 1, 2, ...", "correct it", visits[-1].name))
    return visits, problems


def _from_bids(tree: Path, modalities: tuple[str, str], suffixes: dict[str, str]) -> tuple[list[Pair], list[Problem]]:
    (files, problems), visits = _bids_files(tree), {}
    for file in files:
        matching = [modality for modality in modalities
                    if fnmatch.fnmatchcase(file.name.removesuffix(".gz"), f"*_{suffixes.get(modality, modality)}.nii")]
        subject, inside = file.relative_to(tree).parts[0], file.relative_to(tree).as_posix()
        sessions = set(re.findall(r"(?:^|[/_])ses-([^/_]+)", inside))
        if matching and (not file.name.startswith(f"{subject}_") or len(sessions) > 1):
            problems.append(Problem(inside, "its name and its folder give different subjects or sessions",
                                    "move or rename it", subject))
            continue
        for modality in matching:
            first = visits.setdefault((subject, "".join(sessions)), {}).setdefault(modality, file)
            if first is not file:
                problems.append(Problem(inside, f"left out because {first.name} of the same visit is used",
                                        "select one of them with opt.bids_suffix", subject, fatal=False))
    groups = _read_groups(tree / "participants.tsv", {_canonical(subject, "sub") for subject, _ in visits}, problems)
    return [Pair(subject, session, groups.get(_canonical(subject, "sub"), ""), None,
                 {modality: found[modality] for modality in modalities if modality in found})
            for (subject, session), found in visits.items()], problems


def _bids_files(tree: Path) -> tuple[list[Path], list[Problem]]:
    """All files below sub-*, also in linked folders, except hidden ones; each unreadable folder is a problem."""
    def is_loop(path: Path) -> bool:
        return path.is_symlink() and os.path.realpath(path) in map(os.path.realpath, path.parents)

    files, errors = [], []
    for subject in tree.glob("sub-*"):
        for parent, folders, names in os.walk(subject, onerror=errors.append, followlinks=True):
            folders[:] = [name for name in folders if not name.startswith(".") and not is_loop(Path(parent, name))]
            files += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(files), [Problem(error.filename, f"cannot be read ({error.strerror})",
                                   "ask for permission, or exclude it", Path(error.filename).name)
                           for error in errors if not isinstance(error, NotADirectoryError)]


def _read_groups(table: Path, people: set[str], problems: list[Problem]) -> dict[str, str]:
    """Read participants.tsv, where there is one: person -> group."""
    try:
        columns, rows = _read_table(table, "\t") if os.path.exists(table) else ([], [])
    except DataError as error:
        problems += [dataclasses.replace(problem, remedy="fix it; until then all groups are unknown", fatal=False)
                     for problem in error.problems]
        return {}
    groups = {_canonical(cells["participant_id"], "sub"): cells.get("group", "") for _, cells in rows
              if cells.get("participant_id")}
    lost = any(groups.values()) and not any(groups.get(person) for person in people)
    if rows and people and (lost or "participant_id" not in columns):
        problems.append(Problem(str(table), "its groups belong to none of the subjects", "compare its tab-separated "
                                "column participant_id with the names of the folders", fatal=False))
    return groups
