"""Which volumes belong together: the pairs of a study, from a table or a BIDS tree, and what is wrong with them."""

from __future__ import annotations

import csv
import re
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
        return _spelling(self.subject, "sub-")

    @property
    def visit(self) -> tuple[str, str]:
        """The same for every spelling of one visit."""
        return self.person, _spelling(self.session, "ses-")


def _spelling(label: str, prefix: str) -> str:
    return re.sub(r"0*(\d+)", r"\1", label.strip().lower().removeprefix(prefix), flags=re.ASCII)


def find_pairs(data_root: Path, modalities: tuple[str, str], exclude: tuple[str, ...] = (),
               suffixes: dict[str, str] | None = None) -> tuple[list[Pair], list[Problem]]:
    """The study's complete pairs, sorted by name, and all that is wrong with the rest or with these.

    data_root: a CSV/TSV file, or the folder of a BIDS tree. exclude: subjects or names of pairs to leave out.
    suffixes: modality -> how its file names end in a BIDS tree, before .nii.gz; a pattern may have * in it.
    """
    if data_root.is_file():
        found, problems = _from_table(data_root, modalities)
    elif data_root.is_dir():
        found, problems = _from_bids(data_root, modalities, BIDS_SUFFIX | (suffixes or {}))
    else:
        found, problems = [], [Problem(f"opt.data_root = {str(data_root)!r}", "there is no such file or folder",
                                       "give a CSV or TSV file, or the folder of a BIDS tree")]
    found = _without(found, exclude, problems)
    pairs = []
    for pair in sorted(found, key=lambda each: each.name):
        missing = [name for name in modalities if name not in pair.files]
        if missing:
            problems.append(Problem(pair.name, f"left out, it has no {' and no '.join(missing)}",
                                    "add the file if there is one", pair.name, fatal=False))
        else:
            pairs.append(pair)
    if not pairs and not any(problem.fatal for problem in problems):
        problems.append(Problem(f"opt.data_root = {str(data_root)!r}",
                                f"no subject has both {' and '.join(modalities)}",
                                "set opt.modalities to the study's column names or BIDS suffixes"))
    return pairs, [*problems, *_doubles(pairs)]


def _without(found: list[Pair], exclude: tuple[str, ...], problems: list[Problem]) -> list[Pair]:
    """What is left after leaving out what `exclude` names; a name that nothing answers to is a problem."""
    out = {label: [pair.name for pair in found if label == pair.name or _spelling(label, "sub-") == pair.person]
           for label in exclude}
    problems += [Problem(f"opt.exclude names {label}", "there is no such subject", "correct or remove it")
                 for label, names in out.items() if not names]
    gone = {name for names in out.values() for name in names}
    return [pair for pair in found if pair.name not in gone]


def _doubles(pairs: list[Pair]) -> list[Problem]:
    visits, files, problems = {}, {}, []
    for pair in pairs:
        if not re.fullmatch(r"[\w.+-]+", pair.name):
            problems.append(Problem(repr(pair.name), "subject and session may only have letters, digits and . _ + - in "
                                    "them, because they become file names", "rename it in the manifest", pair.name))
        if (first := visits.setdefault(pair.visit, pair)) is not pair:
            problems.append(Problem(f"{pair.name} and {first.name}", "are the same visit of the same subject",
                                    "keep one of them, or give each its session", pair.name))
        owners = {}
        for file in pair.files.values():
            owner = files.setdefault(file.resolve(), pair)
            if owner is not pair:
                problems.append(Problem(str(file), f"belongs to {owner.name} and to {pair.name}",
                                        "correct one of the two paths", pair.name))
            if owners.setdefault(file.resolve(), file) is not file:
                problems.append(Problem(str(file), f"{pair.name}: one file stands for both modalities",
                                        "correct one of the two paths", pair.name))
    return problems


def _from_table(table: Path, modalities: tuple[str, str]) -> tuple[list[Pair], list[Problem]]:
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter="\t" if table.suffix == ".tsv" else ",", restval="")
            rows, columns = list(reader), [name.strip() for name in reader.fieldnames or ()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        return [], [Problem(f"opt.data_root = {str(table)!r}", f"cannot be read as a table ({error})",
                            "give a CSV or TSV file, or the folder of a BIDS tree")]
    if absent := [name for name in ("subject", *modalities) if name not in columns]:
        others = [name for name in columns if name not in ("subject", *OPTIONAL)]
        if any(";" in name for name in columns):
            return [], [Problem(str(table), "its columns are separated by semicolons",
                                "save it with commas, or as .tsv with tabs")]
        return [], [Problem(str(table),
                            f"has no column {', '.join(absent)}, only {', '.join(columns) or 'none at all'}",
                            f"set opt.modalities to two of {', '.join(others) or 'its columns'}")]
    pairs, problems = [], []
    for line, row in enumerate(rows, start=2):
        cells = {(key or "").strip(): value.strip() for key, value in row.items() if isinstance(value, str)}
        fold = cells.get("fold", "")
        if not cells["subject"]:
            problems.append(Problem(f"{table.name} line {line}", "left out, it names no subject", "fill the column",
                                    fatal=False))
        elif fold and not (fold.isdecimal() and fold.isascii()):
            problems.append(Problem(f"{table} line {line}", f"fold {fold!r} is not a number from 0 upwards",
                                    "correct it", cells["subject"]))
        else:
            files = {name: table.parent / cells[name] for name in modalities if cells[name]}
            pairs.append(Pair(cells["subject"], cells.get("session", ""), cells.get("group", ""),
                              int(fold) if fold else None, files))
    return pairs, problems


def _from_bids(tree: Path, modalities: tuple[str, str], suffixes: dict[str, str]) -> tuple[list[Pair], list[Problem]]:
    groups, problems, visits = _participants(tree), [], {}
    ends = {name: suffixes.get(name, name) for name in modalities}
    for name, suffix in ends.items():
        for file in sorted([*tree.glob(f"sub-*/**/*_{suffix}.nii.gz"), *tree.glob(f"sub-*/**/*_{suffix}.nii")]):
            subject = file.relative_to(tree).parts[0]
            session = re.search(r"[/_]ses-([^/_]+)", file.relative_to(tree).as_posix())
            visit = visits.setdefault((subject, session[1] if session else ""), {})
            if name in visit:
                problems.append(Problem(str(file.relative_to(tree)), f"left out, {visit[name].name} of the same visit "
                                        "is used", "name the one you want with opt.bids_suffix", subject, fatal=False))
            visit.setdefault(name, file)
    if not visits:
        wanted = " or ".join(f"*_{suffix}.nii.gz" for suffix in ends.values())
        problems.append(Problem(f"opt.data_root = {str(tree)!r}", f"no {wanted} below sub-*",
                                "give a BIDS tree, or a CSV with the columns subject," + ",".join(modalities)))
    return [Pair(subject, session, groups.get(subject, ""), None, files)
            for (subject, session), files in visits.items()], problems


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
