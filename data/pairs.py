"""Which volumes belong together: the pairs of a study, from a table or a BIDS tree, and what is wrong with them."""

from __future__ import annotations

import csv
import fnmatch
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.problems import Problem

BIDS_SUFFIX = {"fmri": "bold", "dmri": "dwi"}  # other modalities are looked for by their own name, e.g. T1w
OPTIONAL = ("session", "group", "fold")


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
        """The same for every spelling of one subject: sub-01, 01 and 1 are one person, and so are A07 and a7."""
        return _spelling(self.subject, "sub")

    @property
    def visit(self) -> tuple[str, str]:
        """The same for every spelling of one visit."""
        return self.person, _spelling(self.session, "ses")


def _spelling(label: str, prefix: str) -> str:
    """Lower case, without prefix and leading zeros: sub-01, sub01, 01 and 1 are the same."""
    bare = re.sub(rf"^{prefix}(-|[_ ]?(?=\d))", "", label.strip().lower())
    return re.sub(r"0*(\d+)", r"\1", bare, flags=re.ASCII)


def find_pairs(data_root: Path, modalities: tuple[str, str], exclude: tuple[str, ...] = (),
               suffixes: dict[str, str] | None = None) -> tuple[list[Pair], list[Problem]]:
    """The complete pairs among `find_visits`; the rest is told as a problem that is not fatal."""
    found, problems = find_visits(data_root, modalities, exclude, suffixes, modalities)
    pairs = [pair for pair in found if len(pair.files) == len(modalities)]
    problems += [Problem(pair.name, f"left out, it has no {' and no '.join(set(modalities) - set(pair.files))}",
                         "add the file if there is one, under the same subject and session", pair.name, fatal=False)
                 for pair in found if pair not in pairs]
    if not pairs and not any(problem.fatal for problem in problems):
        problems.append(Problem(f"opt.data_root = {str(data_root)!r}",
                                f"no subject has both {' and '.join(modalities)}",
                                "set opt.modalities to the study's column names or BIDS suffixes, and see opt.exclude"))
    return pairs, problems


def find_visits(data_root: Path, modalities: tuple[str, str], exclude: tuple[str, ...] = (),
                suffixes: dict[str, str] | None = None,
                needed: tuple[str, ...] = ()) -> tuple[list[Pair], list[Problem]]:
    """All visits, sorted by name, with one modality or both, and all that is wrong with them.

    data_root: a CSV/TSV file, or the folder of a BIDS tree. exclude: subjects or names of pairs to leave out.
    suffixes: modality -> how its file names end in a BIDS tree, before .nii.gz; a pattern may have * in it.
    needed: modalities that a table must have a column for.
    """
    root = f"opt.data_root = {str(data_root)!r}"
    try:
        is_folder = stat.S_ISDIR(data_root.stat().st_mode)
    except OSError as error:
        return [], [Problem(root, f"there is no such file or folder ({error.strerror})",
                            "give a CSV or TSV file, or the folder of a BIDS tree")]
    found, problems = (_from_bids(data_root, modalities, BIDS_SUFFIX | (suffixes or {})) if is_folder
                       else _from_table(data_root, modalities, needed))
    found, problems = _without(found, problems, exclude)
    found.sort(key=lambda each: each.name)
    return found, [*problems, *_doubles([pair for pair in found if set(needed) <= set(pair.files)])]


def _without(found: list[Pair], problems: list[Problem],
             exclude: tuple[str, ...]) -> tuple[list[Pair], list[Problem]]:
    """What is left without what `exclude` names, and without its problems; a name that nothing answers to is one."""
    out = {label: [pair.name for pair in found if label == pair.name or _spelling(label, "sub") == pair.person]
           for label in exclude}
    gone = {name for names in out.values() for name in names}
    unknown = [Problem(f"opt.exclude names {label}", "there is no such subject", "correct or remove it")
               for label, names in out.items() if not names]
    return ([pair for pair in found if pair.name not in gone],
            [problem for problem in problems if problem.subject not in gone] + unknown)


def _doubles(pairs: list[Pair]) -> list[Problem]:
    visits, names, files, problems = {}, {}, {}, []
    for pair in pairs:
        if not re.fullmatch(r"[\w.+-]{1,100}", pair.name):
            problems.append(Problem(repr(pair.name), "subject and session may only have letters, digits and . _ + - in "
                                    "them, 100 at most, because they become file names", "rename it in the manifest",
                                    pair.name))
        first, namesake = visits.setdefault(pair.visit, pair), names.setdefault(pair.name, pair)
        if first is not pair or namesake is not pair:
            problems.append(Problem(f"{pair.name} and {(first if first is not pair else namesake).name}",
                                    "are the same visit of the same subject",
                                    "keep one of them, or give each its session", pair.name))
        for name, file in pair.files.items():
            owner, its_name = files.setdefault(os.path.realpath(file), (pair, name))
            if owner.person != pair.person:
                problems.append(Problem(str(file), f"belongs to {owner.name} and to {pair.name}",
                                        "correct one of the two paths", pair.name))
            elif its_name != name:
                problems.append(Problem(str(file), f"{pair.name}: one file stands for both modalities",
                                        "correct one of the two paths", pair.name))
    return problems


def _from_table(table: Path, modalities: tuple[str, str],
                needed: tuple[str, ...]) -> tuple[list[Pair], list[Problem]]:
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            delimiter = "\t" if "\t" in file.readline() else ","
            file.seek(0)
            reader = csv.DictReader(file, delimiter=delimiter, restval="", strict=True)
            rows = [(reader.line_num, row) for row in reader]
            columns = [name.strip() for name in reader.fieldnames or ()]
    except (OSError, UnicodeError, csv.Error) as error:
        return [], [Problem(f"opt.data_root = {str(table)!r}", f"cannot be read as a table ({error})",
                            "give a CSV or TSV file, or the folder of a BIDS tree")]
    needed = needed or tuple(name for name in modalities if name in columns) or modalities
    if problem := _wrong_columns(table, columns, needed):
        return [], [problem]
    pairs, problems = [], []
    for line, row in rows:
        cells = {(key or "").strip(): value.strip() for key, value in row.items() if isinstance(value, str)}
        subject, _, session = cells["subject"].partition("_ses-")
        fold, where = cells.get("fold", ""), f"{table} line {line}"
        if not subject:
            problems.append(Problem(where, "left out, it names no subject", "fill the column", fatal=False))
            continue
        known = bool(fold) and fold.isdecimal() and fold.isascii()
        files = {name: table.parent / cells[name] for name in modalities if cells.get(name)}
        pair = Pair(subject, cells.get("session", "") or session, cells.get("group", ""), int(fold) if known else None,
                    files)
        if fold and not known:
            problems.append(Problem(where, f"fold {fold!r} is not a number from 0 upwards", "correct it", pair.name))
        if any("\0" in cell for cell in cells.values()):
            problems.append(Problem(where, "has a NUL character in it", "write the table again as text", pair.name))
        else:
            pairs.append(pair)
    return pairs, problems


def _wrong_columns(table: Path, columns: list[str], modalities: Sequence[str]) -> Problem | None:
    if any(";" in name for name in columns):
        return Problem(str(table), "its columns are separated by semicolons",
                       "save it with commas, or as .tsv with tabs")
    if absent := [name for name in ("subject", *modalities) if name not in columns]:
        others = [name for name in columns if name not in ("subject", *OPTIONAL)]
        return Problem(str(table), f"has no column {', '.join(absent)}, only {', '.join(columns) or 'none at all'}",
                       "name the column of the subjects so" if "subject" in absent else
                       f"set opt.modalities to two of {', '.join(others) or 'its columns'}")
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        return Problem(str(table), f"has the column {', '.join(twice)} twice", "keep one of them")
    return None


def _from_bids(tree: Path, modalities: tuple[str, str], suffixes: dict[str, str]) -> tuple[list[Pair], list[Problem]]:
    problems, visits = [], {}
    ends = {name: suffixes.get(name, name) for name in modalities}
    files = sorted(file for folder in sorted(tree.glob("sub-*")) for file in _files_below(folder, problems))
    for name, suffix in ends.items():
        for file in files:
            if not any(fnmatch.fnmatchcase(file.name, f"*_{suffix}{ending}") for ending in (".nii.gz", ".nii")):
                continue
            subject, inside = file.relative_to(tree).parts[0], file.relative_to(tree).as_posix()
            sessions = set(re.findall(r"(?:^|[/_])ses-([^/_]+)", inside))
            if not file.name.startswith(f"{subject}_") or len(sessions) > 1:
                problems.append(Problem(inside, "its name and its folder tell different subjects or sessions",
                                        "move or rename it", subject))
                continue
            visit = visits.setdefault((subject, "".join(sessions)), {})
            if name in visit:
                problems.append(Problem(inside, f"left out, {visit[name].name} of the same visit is used",
                                        "name the one you want with opt.bids_suffix", subject, fatal=False))
            visit.setdefault(name, file)
    if not visits and not problems:
        wanted = " or ".join(f"*_{suffix}.nii.gz" for suffix in ends.values())
        problems.append(Problem(f"opt.data_root = {str(tree)!r}", f"no {wanted} below sub-*",
                                "give a BIDS tree, or a CSV with the columns subject," + ",".join(modalities)))
    groups = _participants(tree, problems)
    pairs = [Pair(subject, session, groups.get(_spelling(subject, "sub"), ""), None, found)
             for (subject, session), found in visits.items()]
    if groups and pairs and not any(pair.group for pair in pairs):
        problems.append(Problem(str(tree / "participants.tsv"), "its groups belong to none of the subjects",
                                "compare participant_id with the folders' names", fatal=False))
    return pairs, problems


def _files_below(folder: Path, problems: list[Problem], seen: frozenset[str] = frozenset()) -> Iterator[Path]:
    """All files below a folder, through links to folders, without hidden ones; what cannot be read is a problem."""
    here = os.path.realpath(folder)
    if here in seen:  # a link back to where we came from
        return
    try:
        entries = list(os.scandir(folder))
    except NotADirectoryError:
        return
    except OSError as error:
        problems.append(Problem(str(folder), f"cannot be read ({error.strerror})", "ask for permission, or exclude it",
                                folder.name))
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _files_below(folder / entry.name, problems, seen | {here})
        else:
            yield folder / entry.name


def _participants(tree: Path, problems: list[Problem]) -> dict[str, str]:
    """participants.tsv: spelling of the subject -> group; empty where there is none."""
    table = tree / "participants.tsv"
    if not table.exists():
        return {}
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            rows = [{(key or "").strip(): value for key, value in row.items()}
                    for row in csv.DictReader(file, delimiter="\t", strict=True)]
        if rows and "participant_id" not in rows[0]:
            raise csv.Error("it has no column participant_id between tabs")
    except (OSError, UnicodeError, csv.Error) as error:
        problems.append(Problem(str(table), f"cannot be read ({error})", "groups are taken as unknown; mend it",
                                fatal=False))
        return {}
    return {_spelling(row["participant_id"], "sub"): (row.get("group") or "").strip()
            for row in rows if row["participant_id"]}


def in_mni_space(pair: Pair) -> bool:
    """Whether the files say so: a BIDS entity space-MNI... in both names. An affine cannot tell."""
    return all("_space-MNI" in file.name for file in pair.files.values())
