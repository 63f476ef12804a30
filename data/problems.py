"""Problems of a study: one form for everything that can be wrong, from the table of pairs to the voxels."""

from dataclasses import dataclass, replace

from utils.errors import UserError

SHOWN = 30  # problems in one message
SMALLEST_AXIS = 11  # voxels: the Gaussian window of SSIM (sigma 1.5, truncated at 3.5 sigma) must fit into a volume


@dataclass(frozen=True)
class Problem:
    """A problem with a study. fatal: training cannot start; otherwise it is only reported."""

    where: str  # the file, the line of a table, or the option
    what: str
    remedy: str
    subject: str = ""
    fatal: bool = True

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.remedy}"


def or_leave_out(problem: Problem, is_complete: bool) -> Problem:
    """The problem of a visit, which can be done without if it is incomplete."""
    remedy = f'{problem.remedy}; or opt.incomplete = "leave_out", which leaves out all visits with one scan'
    return problem if is_complete or not problem.fatal else replace(problem, remedy=remedy)


class DataError(UserError):
    """A study, or one of its files, cannot be used for the reasons in `problems`."""

    def __init__(self, *problems: Problem):
        lines = [f"{'' if problem.fatal else 'note: '}{problem}" for problem in problems[:SHOWN]]
        if len(problems) > SHOWN:
            lines.append(f"and {len(problems) - SHOWN} more")
        super().__init__("\n".join(lines))
        self.problems = problems


class VolumeError(DataError):
    """A file cannot be used as a volume."""

    def __init__(self, where: object, what: str, remedy: str):
        super().__init__(Problem(str(where), what, remedy))


def raise_if_fatal(problems: list[Problem]) -> list[Problem]:
    """Raise one DataError if any problem is fatal: these first, then the others, which may explain them."""
    if any(problem.fatal for problem in problems):
        raise DataError(*sorted(problems, key=lambda problem: not problem.fatal))
    return problems


def print_notes(problems: list[Problem]) -> None:
    """A line for all problems of a kind."""
    kinds = {}
    for problem in problems:
        kinds.setdefault((problem.what, problem.remedy), []).append(problem.where)
    for (what, remedy), where in kinds.items():
        print(f"note: {', '.join(where)}: {what}; {remedy}")
