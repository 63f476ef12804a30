"""Find the pairs of a study, in a table or a BIDS tree, and what is wrong with them."""

import csv
import dataclasses
import fnmatch
import functools
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.problems import DataError, Problem
from utils.files import expanded, read_text
from utils.stop import interruptible

BIDS_SUFFIX = {"fmri": "bold", "dmri": "dwi"}  # the suffix of any other modality is its own name, e.g. T1w
MISSING = {"", "n/a", "na", "nan", "none", "null", "#n/a", "<na>"}  # in a cell, in any case
MAX_ROWS = 500_000  # of a table: each takes about a kilobyte of memory
MAX_NAME = 150  # bytes, of the 255 of a file name
Sessions = dict[str, tuple[str, dict[str, Path]]]  # canonical label -> label as found, modality -> file


@dataclass(frozen=True)
class Pair:
    """The scans of one visit of one subject, of both modalities or, if it is incomplete, of one. paths: modality ->
    NIfTI file.

    subject and session are what {subject} and {session} stand for in opt.pattern_file and opt.region_file: sub-01 and
    2, with and without their prefix.
    """

    subject: str
    session: str
    group: str
    fold: int | None
    paths: dict[str, str]  # of type str, because a hundred thousand of type Path take seconds

    @property
    def files(self) -> dict[str, Path]:
        return {modality: Path(path) for modality, path in self.paths.items()}

    @property
    def name(self) -> str:
        """sub-01 or sub-01_ses-2: the label in figures, tables and file names."""
        return self.subject + (f"_ses-{self.session}" if self.session else "")

    def file_of(self, path: str) -> Path:
        """The path of a setting, in which {subject} and {session} are this pair's."""
        return Path(path.replace("{subject}", self.subject).replace("{session}", self.session))

    @property
    def person(self) -> str:
        """The subject, equal for all spellings: sub-01, 01 and 1 are one person, and so are A7 and a7."""
        return _canonical(self.subject, "sub")

    @property
    def key(self) -> tuple[str, str]:
        """Person and session, equal for all spellings of one visit."""
        return self.person, _canonical(self.session, "ses")

    @property
    def is_complete(self) -> bool:
        return len(self.paths) == 2

    @property
    def in_mni(self) -> bool:
        """Whether its files are named so: an affine cannot tell."""
        return all("_space-MNI" in file.name for file in self.files.values())


@functools.lru_cache(2**20)
def _canonical(label: str, prefix: str) -> str:
    """Lower case, without prefix and zeros in front: sub-01, sub01, 01 and 1 become 1. S1.05 is not S1.5."""
    bare = re.sub(rf"^({prefix}(-|[_ ]?(?=\d)))+", "", label.strip().lower())
    return re.sub(r"^0+(?=\d)", "", bare)


def described(visits: list[Pair]) -> str:
    """How many there are."""
    complete = sum(visit.is_complete for visit in visits)
    more = f" and {len(visits) - complete} with one scan" if complete < len(visits) else ""
    return f"{complete} pair{'' if complete == 1 else 's'}{more}"


def find_pairs(data_root: Path, modalities: tuple[str, str], exclude: tuple[str, ...] = (),
               suffixes: dict[str, str] | None = None, share_scans: bool = False,
               needed: int = 2) -> tuple[list[Pair], list[Problem]]:
    """Return the pairs of a study, sorted by name, and all problems found.

    data_root, exclude, suffixes, share_scans: as in opt.py (suffixes: opt.bids_suffix).
    needed: of the two scans of a visit; each visit that has fewer is a problem, which is not fatal. Where none is
    needed, a table may have one column only.
    """
    try:
        if os.path.isdir(data_root):
            visits, problems = _from_bids(data_root, modalities, BIDS_SUFFIX | (suffixes or {}), share_scans)
        else:
            visits, problems = _from_table(data_root, modalities, needed)
    except DataError as error:
        return [], list(error.problems)
    known = {label for visit in visits for label in (visit.name, visit.person)} | {
        _canonical(problem.subject, "sub") for problem in problems}  # whose files cannot be read
    problems += [Problem(f"opt.exclude names {label}", "there is no such subject", "correct or remove it")
                 for label in exclude if not {label, _canonical(label, "sub")} & known]
    excluded = {*exclude, *(_canonical(label, "sub") for label in exclude)}
    visits = sorted((visit for visit in visits if not {visit.name, visit.person} & excluded),
                    key=lambda visit: visit.name)
    pairs = [visit for visit in visits if len(visit.paths) >= needed]
    problems = [problem for problem in problems
                if not {problem.subject, _canonical(problem.subject, "sub")} & excluded] + _conflicts(pairs)
    left_out = [visit for visit in visits if len(visit.paths) < needed]
    found = {}
    for visit in left_out:
        found.setdefault(visit.key, set()).update(visit.paths)
    for visit in left_out:
        in_two_rows = len(found[visit.key]) == len(modalities)
        missing = " and no ".join(modality for modality in modalities if modality not in visit.paths)
        other = '; opt.incomplete = "use" trains on the other scan' if visit.paths else ""
        problems.append(Problem(visit.name, f"left out because it has no {missing}", "put both scans into one row"
                                if in_two_rows else "if there is such a file, give it the same subject and "
                                f"session{other}", visit.name, fatal=False))
        problems += [Problem(path, "no such file", "correct its path; sample.py will need it", visit.name, fatal=False)
                     for path in visit.paths.values() if not os.path.exists(path)]
    if needed and not any(pair.is_complete for pair in pairs) and not any(problem.fatal for problem in problems):
        problems.append(Problem(str(data_root), f"no subject has both {' and '.join(modalities)}", "give a BIDS tree "
                                "or a table; check opt.modalities (its columns), opt.bids_suffix and opt.exclude"))
    return pairs, problems


def _conflicts(visits: list[Pair]) -> list[Problem]:
    """Names that cannot become file names, visits listed twice, and files used twice."""
    listed, by_file, problems = {}, {}, []
    for visit in visits:
        person, name = visit.person, visit.name
        if not re.fullmatch(r"[\w.+-]+", name) or not _is_file_name(name):
            problems.append(Problem(repr(name), "subject and session become file names: only letters that the "
                                    f"locale has, digits and . _ + - are allowed, {MAX_NAME} bytes at most (a letter "
                                    "takes 1 to 4)", "rename the subject, or set PYTHONUTF8=1", name))
        others = [listed.setdefault(key, visit) for key in (visit.key, name)]
        if other := next((other for other in others if other is not visit), None):
            halves = visit.paths.keys().isdisjoint(other.paths)
            problems.append(Problem(f"{name} and {other.name}", "are the same visit of the same subject",
                                    f"{'put both scans into one row' if halves else 'keep only one of them'}, or fill "
                                    "the session column; if they are two people, rename one: case and zeros in front "
                                    "do not count", name))
        for modality, path in visit.paths.items():
            *owner, its_name, its_path = by_file.setdefault(_identity(path), (person, modality, name, path))
            if owner != [person, modality] and os.path.realpath(path) == os.path.realpath(its_path):
                problems.append(Problem(path, f"is both the {owner[1]} of {its_name} and the {modality} of {name}",
                                        "correct one of the two paths", name))
    return problems


def _identity(path: str) -> str | tuple[int, int]:
    """Equal for all paths that lead to one file; a realpath of each would take seconds."""
    try:
        status = os.stat(path)
    except OSError:  # it is reported where it is read
        return os.path.normpath(path)
    return status.st_dev, status.st_ino


def _is_file_name(name: str) -> bool:
    try:
        return len(os.fsencode(name)) <= MAX_NAME
    except UnicodeEncodeError:
        return False


def _read_table(table: Path, key: str, delimiters: str) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Return the column names and (line, column -> cell) of each row; a cell of MISSING is empty.

    Cells are separated by the delimiter that gives a column `key`. Raises DataError.
    """
    try:
        text = read_text(table).replace("\r\n", "\n").replace("\r", "\n")
        if "\0" in text:
            raise csv.Error("it contains a NUL character")
        delimiter = next((each for each in delimiters if key in _header(text, each)), delimiters[0])
        lines, found = _lines(text, delimiter), []
        _, columns = next(lines, (0, []))
        for line, cells in lines:
            if any(cells[len(columns):]) or len(found) == MAX_ROWS:
                raise csv.Error(f"line {line} has more cells than there are columns" if len(found) < MAX_ROWS else
                                f"it has more than {MAX_ROWS:,} rows")
            found.append((line, {column: "" if cell.casefold() in MISSING else cell
                                 for column, cell in zip(columns, cells)}))
        return columns, found
    except (OSError, UnicodeError, csv.Error) as error:
        raise DataError(Problem(str(table), f"cannot be read as a table ({getattr(error, 'strerror', None) or error})",
                                "set opt.data_root to a CSV or TSV file in UTF-8, or to the folder of a BIDS tree")
                        ) from error


def _lines(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of each row that has any, except Excel's "sep=;"."""
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True, strict=True)
    for row in reader:
        if any(cells := [cell.strip() for cell in row]) and not cells[0].startswith("sep="):
            yield reader.line_num, cells


def _header(text: str, delimiter: str) -> list[str]:
    """The first row; empty where it is no row with this delimiter."""
    try:
        return next(_lines(text, delimiter), (0, []))[1]
    except csv.Error:
        return []


def _from_table(table: Path, modalities: tuple[str, str], scans: int) -> tuple[list[Pair], list[Problem]]:
    columns, rows = _read_table(table, "subject", ",\t;")
    needed = ["subject", *([name for name in modalities if not scans and name in columns] or modalities)]
    if wrong := [name for name in ("subject", *modalities, "session", "group", "fold")
                 if columns.count(name) > 1 or (name in needed and name not in columns)]:
        raise DataError(Problem(str(table), f"needs one column {', '.join(wrong)}; it has {', '.join(columns)}",
                                'name its columns "subject" and as in opt.modalities, separated by commas, tabs or '
                                "semicolons"))
    visits, problems, folder = [], [], os.path.dirname(table)
    for line, cells in rows:
        where, fold = f"{table} line {line}", cells.get("fold", "")
        subject, _, session = cells.get("subject", "").partition("_ses-")
        if not subject:
            problems.append(Problem(where, "left out because it names no subject", "fill it in (NA and the like mean "
                                    "missing)", fatal=False))
            continue
        paths = {}
        visits.append(Pair(f"sub-{subject.removeprefix('sub-')}",
                           (cells.get("session") or session).removeprefix("ses-"), cells.get("group", ""),
                           int(fold) if fold.isdecimal() and fold.isascii() else None, paths))
        if fold and visits[-1].fold is None:
            problems.append(Problem(where, f"fold {fold!r} is not 0, 1, 2, ...", "correct it", visits[-1].name))
        for modality in modalities:
            try:
                if cells.get(modality):
                    paths[modality] = os.path.join(folder, expanded(cells[modality], folder))
            except ValueError as error:
                problems.append(Problem(f"{where}, column {modality}", f"{cells[modality]!r}: {error}", "correct it",
                                        visits[-1].name))
    return visits, problems


def _from_bids(tree: Path, modalities: tuple[str, str], suffixes: dict[str, str],
               share_scans: bool) -> tuple[list[Pair], list[Problem]]:
    (files, problems), subjects = _bids_files(tree), {}  # subject -> Sessions
    for file in files:
        matching = [modality for modality in modalities
                    if fnmatch.fnmatchcase(file.name.removesuffix(".gz"), f"*_{suffixes.get(modality, modality)}.nii")]
        subject, inside = file.relative_to(tree).parts[0], file.relative_to(tree).as_posix()
        sessions = {_canonical(label, "ses"): label for label in re.findall(r"(?:^|[/_])ses-([^/_]+)", inside)}
        if matching and (not file.name.startswith(f"{subject}_") or len(sessions) > 1):
            problems.append(Problem(inside, "its name and its folder give different subjects or sessions",
                                    "move or rename it", subject))
            continue
        for modality in matching:
            key, label = next(iter(sessions.items()), ("", ""))
            _, visit = subjects.setdefault(subject, {}).setdefault(key, (label, {}))
            if visit.setdefault(modality, file) is not file:
                problems.append(Problem(inside, f"left out because {visit[modality].name} of the same visit is used",
                                        "select one of them with opt.bids_suffix", subject, fatal=False))
    groups = _read_groups(tree / "participants.tsv", {_canonical(subject, "sub") for subject in subjects}, problems)
    for subject, sessions in subjects.items():
        problems += _share_scans(subject, sessions, modalities, share_scans)
    return [Pair(subject, session, groups.get(_canonical(subject, "sub"), ""), None,
                 {modality: str(found[modality]) for modality in modalities if modality in found})
            for subject, sessions in subjects.items() for session, found in sessions.values()], problems


def _share_scans(subject: str, sessions: Sessions, modalities: tuple[str, str], share_scans: bool) -> list[Problem]:
    """Give a scan that lies above the sessions to those that lack it: to the only one, or to all if share_scans."""
    _, above = sessions.get("", ("", {}))
    below, is_visit = [session for key, session in sessions.items() if key], len(above) == len(modalities)
    if not above or not below or (is_visit and not share_scans):
        return []
    problems, shared = [], share_scans or len(below) == 1
    for modality, file in above.items():
        lacking = [files for _, files in below if modality not in files]
        for files in lacking if shared else ():
            files[modality] = file
        if shared and not lacking and not is_visit:
            problems.append(Problem(str(file), "left out because each session has its own", "remove one of them if "
                                    "that is wrong", subject, fatal=False))
        elif lacking and not shared:
            problems.append(Problem(str(file), f"the {modality} of {subject} is in none of its sessions "
                                    f"{', '.join(label for label, _ in below)}", "set opt.share_scans = True to give "
                                    "it to every session that has none, or use a table", subject, fatal=False))
    if shared and not is_visit:
        del sessions[""]
    return problems


def _bids_files(tree: Path) -> tuple[list[Path], list[Problem]]:
    """All files below sub-*, also in linked folders, except hidden ones, in natural order (run-2 before run-10); each
    unreadable folder is a problem. A folder is visited once for each subject, however many links lead there, and links
    to a folder that the tree lies in are not followed."""
    files, problems, visited, real = [], [], set(), tree.resolve()
    around = {(status.st_dev, status.st_ino) for folder in (real, *real.parents) for status in [os.stat(folder)]}

    def cannot_read(error: OSError) -> None:
        problems.append(Problem(str(error.filename), f"cannot be read ({error.strerror})", "ask for permission, or "
                                "exclude the subject", "".join(Path(error.filename).relative_to(tree).parts[:1])))

    for parent, folders, names in interruptible(os.walk(tree, onerror=cannot_read, followlinks=True)):
        inside = Path(parent).relative_to(tree).parts
        folders[:] = [name for name in sorted(folders) if name.startswith("sub-" if not inside else "")
                      and not name.startswith(".")]
        try:
            status = os.stat(parent)
        except OSError as error:
            cannot_read(error)
            continue
        identity = status.st_dev, status.st_ino
        if (inside[:1], identity) in visited or (inside and identity in around):
            folders.clear()
            continue
        visited.add((inside[:1], identity))
        files += [Path(parent, name) for name in names if inside and not name.startswith(".")]
    return sorted(files, key=_natural), problems


def _natural(path: Path) -> list[tuple]:
    """A key that sorts numbers in a path by their value."""
    return [tuple(int(word) if number % 2 else word for number, word in enumerate(re.split(r"([0-9]+)", part)))
            for part in path.parts]


def _read_groups(table: Path, people: set[str], problems: list[Problem]) -> dict[str, str]:
    """Read participants.tsv, where there is one: person -> group."""
    try:
        columns, rows = _read_table(table, "participant_id", "\t") if os.path.lexists(table) else ([], [])
    except DataError as error:
        problems += [dataclasses.replace(problem, remedy="fix it; until then all groups are unknown", fatal=False)
                     for problem in error.problems]
        return {}
    groups = {_canonical(cells["participant_id"], "sub"): cells.get("group", "") for _, cells in rows
              if cells.get("participant_id")}
    lost = "group" in columns and people.isdisjoint(groups)
    if rows and people and (lost or "participant_id" not in columns):
        problems.append(Problem(str(table), "its groups belong to none of the subjects", "compare its tab-separated "
                                "column participant_id with the names of the folders", fatal=False))
    return groups
