"""The command line: every setting of `opt.py` as an option, with the comments of `opt.py` as its help."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import inspect
import re
import typing
from collections.abc import Callable
from typing import Literal

HEADING = re.compile(r"\s*# ---- (.+)")
COMMENT = re.compile(r"\s*# (.+)")
SETTING = re.compile(r"    (\w+): .+?(?:  # (.+))?$")


def comments(settings: type) -> dict[str, tuple[str, str]]:
    """The comments of a dataclass's source: field name -> (heading it stands under, its comment)."""
    found: dict[str, tuple[str, str]] = {}
    heading, pending = "", []
    for line in inspect.getsource(settings).splitlines():
        if match := HEADING.match(line):
            heading, pending = match[1], []
        elif match := COMMENT.match(line):
            pending.append(match[1])
        elif match := SETTING.match(line):
            found[match[1]] = (heading, " ".join([*pending, match[2] or ""]).strip())
            pending = []
        elif line.startswith("    def "):
            break
    return found


def parse_arguments(opt, presets: dict[str, Callable], argv: list[str], description: str):
    """The settings of one run: preset, then what was edited in opt.py, then the command line.

    opt: the edited settings object; presets: name -> function that makes one; argv: the words after the program's name.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--preset", choices=list(presets), help="the starting point that opt.py's edits apply to")
    texts, hints, groups = comments(type(opt)), typing.get_type_hints(type(opt)), {}
    for setting in dataclasses.fields(opt):
        heading, text = texts[setting.name]
        group = groups.setdefault(heading, None) or parser.add_argument_group(heading)
        groups[heading] = group
        default = shown(getattr(opt, setting.name)).replace("%", "%%")
        group.add_argument(f"--{setting.name}", default=argparse.SUPPRESS, **_kind(hints[setting.name]),
                           help=f"{text.replace('%', '%%')} [{default}]")
    given = vars(parser.parse_args(argv))
    preset = given.pop("preset", None)
    if preset:
        edits = {name: value for name, value in vars(opt).items() if name in opt.edited}
        opt = presets[preset]()
        given = {**edits, **given}
    settings = copy.deepcopy(opt)
    for name, value in given.items():
        setattr(settings, name, value)
    return settings


def shown(value: object) -> str:
    """A value as one would type it on the command line."""
    if isinstance(value, dict):
        return " ".join(f"{key}={shown(each)}" for key, each in value.items()) or "empty"
    if isinstance(value, (tuple, list)):
        return ("x" if value and isinstance(value[0], int) else " ").join(map(str, value)) or "empty"
    return str(value) or "empty"


def _kind(annotation: object) -> dict:
    """argparse's keywords for a setting of this type."""
    if annotation is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(annotation) is Literal:
        return {"choices": typing.get_args(annotation)}
    if typing.get_origin(annotation) is tuple:
        return {"nargs": "+", "action": _Words, "type": typing.get_args(annotation)[0]}
    if annotation is dict or dict in typing.get_args(annotation):
        return {"nargs": "+", "action": _PerModality, "metavar": "VALUE"}
    return {"type": annotation, "metavar": annotation.__name__.upper()}


class _Words(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))


class _PerModality(argparse.Action):
    """`64`, `64x64x32`, `64 64 32`, `mean`, or `fmri=32x32x18 dmri=48x48x30`."""

    def __call__(self, parser, namespace, values, option_string=None):
        if all("=" in word for word in values):
            value = {name: self._plain(text) for name, text in (word.split("=", 1) for word in values)}
        else:
            value = self._plain("x".join(values))
        setattr(namespace, self.dest, value)

    @staticmethod
    def _plain(text: str) -> object:
        if re.fullmatch(r"\d+([x,]\d+)*", text):
            numbers = tuple(map(int, re.split("[x,]", text)))
            return numbers if len(numbers) > 1 else numbers[0]
        return text
