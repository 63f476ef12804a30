"""The command line: every setting of `opt.py` as an option, with the comments of `opt.py` as its help."""

import argparse
import copy
import difflib
import inspect
import re
import typing
from collections.abc import Callable

FIELD = re.compile(r"((?:^    # .+\n)*)^    (\w+): .+?(?:  # (.+))?$", re.MULTILINE)  # comments, name, comment


def comments(settings: type) -> dict[str, tuple[str, str]]:
    """The comments in a dataclass's source: field name -> (its heading, its comment)."""
    texts = {}
    for section in inspect.getsource(settings).split("    # ---- ")[1:]:
        heading, body = section.split("\n", 1)
        for above, name, beside in FIELD.findall(body):
            texts[name] = heading, " ".join([*re.findall("# (.+)", above), beside]).strip()
    return texts


def parse_arguments(opt, presets: dict[str, Callable], argv: list[str], description: str,
                    first: tuple[str, ...] = ()):
    """The settings of one run: a preset, overridden by the edits in opt.py (`opt`), overridden by the command line.
    first: the settings that --help shows first."""
    parser = argparse.ArgumentParser(usage="%(prog)s [--setting value ...]", description=description,
                                     allow_abbrev=False)
    parser.add_argument("--preset", choices=list(presets), help="start from this preset instead of the one in opt.py")
    hints, groups = typing.get_type_hints(type(opt)), {"": parser.add_argument_group("What people change first")}
    for name, (heading, text) in comments(type(opt)).items():
        heading = "" if name in first else f"Advanced: {heading}"
        groups[heading] = groups.get(heading) or parser.add_argument_group(heading)
        help_text = f"{text} [{shown(getattr(opt, name))}]".replace("%", "%%")
        groups[heading].add_argument(f"--{name}", default=argparse.SUPPRESS, help=help_text, **_keywords(hints[name]))
    found, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], [f"--{name}" for name in hints], 1)
        parser.error(" ".join(["unrecognized arguments:", *unknown, *(f"(did you mean {name}?)" for name in near)]))
    given = vars(found)
    preset = given.pop("preset")
    settings = presets[preset]() if preset else copy.deepcopy(opt)
    edits = {name: vars(opt)[name] for name in opt.edited}
    for name, value in {**edits, **{name: _value(given[name], hints[name]) for name in given}}.items():
        setattr(settings, name, value)
    return settings


def shown(value: object) -> str:
    """A value as typed on the command line."""
    if isinstance(value, dict):
        return " ".join(f"{key}={shown(item)}" for key, item in value.items()) or "empty"
    if isinstance(value, (tuple, list)):
        return ("x" if value and isinstance(value[0], int) else " ").join(map(str, value)) or "empty"
    return str(value) or "empty"


def _keywords(annotation: object) -> dict:
    """The keywords of add_argument for a setting of this type."""
    arguments, kind = typing.get_args(annotation), typing.get_origin(annotation) or annotation
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if kind is typing.Literal:
        return {"choices": arguments}
    if kind in (int, float, str):
        return {"type": kind, "metavar": kind.__name__.upper()}
    return {"nargs": "+", "metavar": "VALUE", "type": arguments[0] if kind is tuple else str}


def _value(words: object, annotation: object) -> object:
    """What the words after an option spell: `flip affine`, `64 64 32`, `64x64x32`, `fmri=32x32x18 dmri=48`, `mean`."""
    if not isinstance(words, list):
        return words
    if typing.get_origin(annotation) is tuple:
        return tuple(words)
    if all("=" in word for word in words):
        return {modality: _plain(text) for modality, text in (word.split("=", 1) for word in words)}
    return _plain("x".join(words))


def _plain(text: str) -> object:
    numbers = tuple(map(int, re.split("[x,]", text))) if re.fullmatch(r"\d+([x,]\d+)*", text) else (text,)
    return numbers if len(numbers) > 1 else numbers[0]
