"""What can be wrong with a study: one form for everything between the manifest and the tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing to know about a study. fatal: training refuses to start; otherwise it is told and goes on."""

    where: str  # the file, the line of a table, or the option
    what: str
    remedy: str
    subject: str = ""
    fatal: bool = True

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.remedy}"


class DataError(ValueError):
    """A study, or one of its files, that cannot be used; `problems` says why, in full."""

    def __init__(self, *problems: Problem):
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


class PairError(DataError):
    """Pairs that cannot be found or split as asked."""


class VolumeError(DataError):
    """A file that cannot be used as a volume."""

    def __init__(self, where: object, what: str, remedy: str):
        super().__init__(Problem(str(where), what, remedy))


def refuse(problems: Iterable[Problem]) -> list[Problem]:
    """Raise one PairError for all fatal problems; returns the others, which are only to be told."""
    problems = list(problems)
    if fatal := [problem for problem in problems if problem.fatal]:
        raise PairError(*fatal)
    return problems
