"""Settings that describe themselves: a field carries its range, its choices, and what a change of it affects."""

import copy
import dataclasses
import difflib
import operator
import types
import typing

from utils.files import expanded

AFFECTS = {  # a run resumes only while the settings that affect it keep their values
    "data": "the study and its split. Both stages must agree, or stage 2 would test on training subjects of stage 1",
    "training": "training of both stages",
    "stage 1": "training of stage 1; may change when stage 2 resumes",
    "stage 2": "training of stage 2; may change when stage 1 resumes",
    "network": "the network, which is that of stage 1 in both stages; may never change",
    "sampling": "how the prior samples, for stage 2 and for sample.py; may change when stage 1 resumes",
    "sample.py": "what sample.py writes; may always change",
    "nothing": "folders, memory, reports, the length of a run; may change, unless its row says otherwise",
}
LIMITS = {"at_least": operator.ge, "above": operator.gt, "below": operator.lt, "at_most": operator.le}


def setting(default: object, *, affects: str = "training", choices: tuple[str, ...] = (), per_modality: bool = False,
            path: bool = False, **limits: float) -> typing.Any:
    """A dataclass field. choices: words allowed, alone, in a tuple, or for each modality. limits: keys of LIMITS."""
    return dataclasses.field(default_factory=lambda: copy.copy(default), metadata={
        "affects": affects, "choices": choices, "per_modality": per_modality, "path": path, "limits": limits})


def path(default: str, affects: str = "nothing") -> typing.Any:
    """A dataclass field that is a path, in which ~ and $VARIABLES are replaced."""
    return setting(default, affects=affects, path=True)


class Settings:
    """Base of a settings dataclass with a method wrong_combinations(); edited: names set after it was made."""

    def __post_init__(self) -> None:
        self.__dict__["edited"] = set()

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        self.__dict__.setdefault("edited", set()).add(name)

    @classmethod
    def names_affecting(cls, *kinds: str) -> set[str]:
        """The names of the settings that affect any of these kinds (keys of AFFECTS)."""
        return {field.name for field in dataclasses.fields(cls) if field.metadata.get("affects", "training") in kinds}


def problems_of(settings: Settings) -> list[str]:
    """Every wrong name, type, value and combination: messages with option, value and remedy."""
    hints, problems = typing.get_type_hints(type(settings)), []
    for name in sorted(settings.edited - set(hints)):
        close = difflib.get_close_matches(name, hints, n=1)
        hint = f"did you mean opt.{close[0]}?" if close else "python main.py --help lists all settings"
        problems.append(f"opt.{name}: there is no such setting; {hint}")
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if remedy := _remedy(value, field, hints[field.name]):
            problems.append(f"opt.{field.name} = {value!r}: {remedy}")
    if all(_fits(getattr(settings, name), hint) for name, hint in hints.items()):  # combinations rely on it
        problems += settings.wrong_combinations()
    return problems


def expand_paths(settings: Settings) -> list[str]:
    """Replace ~ and $VARIABLES in paths; returns messages as `problems_of`."""
    problems = []
    for field in dataclasses.fields(settings):
        if field.metadata.get("path"):
            try:
                object.__setattr__(settings, field.name, expanded(getattr(settings, field.name)))
            except ValueError as error:
                problems.append(f"opt.{field.name} = {getattr(settings, field.name)!r}: {error}")
    return problems


def _remedy(value: typing.Any, field: dataclasses.Field, hint: object) -> str:
    """What the value must be instead; empty if it is right."""
    choices, limits = field.metadata.get("choices", ()), field.metadata.get("limits", {})
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
    elif not _fits(value, hint):
        return f"must be {'a finite float below 2**63' if hint is float else field.type}"
    words = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else (value,)
    if not _fits(value, hint) or (choices and any(word not in choices for word in words)):
        return f"choose from {', '.join(choices)}"
    wanted = " and ".join(f"{limit.replace('_', ' ')} {bound:,}" for limit, bound in limits.items())
    return "" if all(LIMITS[limit](value, bound) for limit, bound in limits.items()) else f"must be {wanted}"


def _fits(value: object, annotation: object) -> bool:
    """Whether a value has this type. A bool is not a number, an int is a float, NaN and infinity are neither."""
    arguments, kind = typing.get_args(annotation), typing.get_origin(annotation) or annotation
    if kind is typing.Literal:
        return isinstance(value, str) and value in arguments
    if kind is types.UnionType:
        return any(_fits(value, each) for each in arguments)
    if kind is tuple:
        return isinstance(value, (tuple, list)) and all(_fits(each, arguments[0]) for each in value if arguments)
    if kind in (int, float):
        return type(value) in (int, kind) and abs(value) < 2**63
    return isinstance(value, kind)
