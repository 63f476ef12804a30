"""What a checkpoint may hold: one rule for every field, and for its settings those of opt.py. Nothing is trusted."""

import dataclasses
import math
import re
import reprlib

from data.alignment import Alignment
from data.volumes import LARGEST, is_affine
from opt import Options, names_affecting
from utils.errors import UserError
from utils.settings import problems_of

OF_BOTH_STAGES = sorted(names_affecting("data", "network"))
MOST = 100_000  # values in the settings of a checkpoint, letters in one of them

def settings_of(options: object) -> Options:
    """The settings in a checkpoint; one that opt.py has got since has its default. Raises UserError."""
    if not isinstance(options, dict) or not options or not _is_short(options):
        raise UserError(f"options = {type(options).__name__}: must be settings")
    if unknown := options.keys() - {field.name for field in dataclasses.fields(Options)}:
        raise UserError(f"options: there is no such setting: {reprlib.repr(sorted(map(str, unknown)))}")
    settings = Options(**options)
    if problems := problems_of(settings):
        raise UserError("; ".join(f"options: {problem}" for problem in problems))
    settings.image_sizes()  # also where opt.check let them pass
    return settings


def problems_of_content(state: dict, parts: tuple[str, ...]) -> list[str]:
    """What is wrong with the fields of a checkpoint: messages with field, value and rule. parts: state dicts in it.

    Completes its settings, and adds "sizes" and "network", which follow from them.
    """
    try:
        settings = settings_of(state.get("options"))
    except UserError as error:
        return [str(error)]
    state |= {"options": settings.resolved(), "sizes": settings.image_sizes(), "network": settings.network_arguments()}

    def each(value: object, *shape: int) -> bool:
        return (isinstance(value, dict) and value.keys() == set(settings.modalities)
                and all(_numbers(numbers, *shape) for numbers in value.values()))

    groups, texts, seen = state.get("groups", []), state.get("fingerprints"), state.get("seen_scans", [])
    rules = {  # field -> whether it is right, what it must be
        "step": (type(state.get("step")) is int and 0 <= state["step"] < 2**63, "a count"),
        "best": (type(state.get("best")) is float and not math.isnan(state["best"]), "a number"),
        "run_id": (isinstance(state.get("run_id"), str) and re.fullmatch("[0-9a-f]{32}", state["run_id"]), "32 digits"),
        "fingerprints": (isinstance(texts, dict) and texts.keys() >= {"data", "split", "pattern"}
                         and all(isinstance(text, str) for text in texts.values()), "hashes of data, split, pattern"),
        "groups": (isinstance(groups, list) and all(isinstance(group, str) and group for group in groups)
                   and len({*groups}) == len(groups), "different names"),
        "ranges": (each(state.get("ranges"), 2) and all(low < high for low, high in state["ranges"].values()),
                   "a smallest and a largest intensity of each modality"),
        "affines": (each(state.get("affines"), 4, 4) and all(map(is_affine, state["affines"].values())),
                    "an invertible affine (4, 4), in mm, of each modality"),
        "seen_scans": (isinstance(seen, list) and all(isinstance(scan, str) for scan in seen), "hashes"),
        "alignment": (_is_alignment(state.get("alignment"), each), "as data/alignment.py writes it"),
        **{part: (isinstance(state.get(part), dict), "a state dict") for part in parts}}
    return [f"{name} = {reprlib.repr(state.get(name))}: must be {wanted}"
            for name, (right, wanted) in rules.items() if not right]


def _is_short(value: object) -> bool:
    """Whether plain values are few and short: a list that holds one list twice, and so on, has no end when shown."""
    values = [value]
    for seen, each in enumerate(values):  # grows meanwhile
        if seen == MOST:
            return False
        if isinstance(each, (list, tuple)):
            values += each
        elif isinstance(each, dict):
            values += [*each.keys(), *each.values()]
        elif not ((isinstance(each, str) and len(each) < MOST) or each is None
                  or (isinstance(each, (bool, int, float)) and not abs(each) > 2**64)):
            return False
    return True


def _numbers(value: object, *shape: int) -> bool:
    """Whether nested lists of this shape hold finite numbers."""
    if not shape:
        return type(value) in (int, float) and abs(value) < LARGEST  # NaN is not
    return (isinstance(value, (list, tuple)) and len(value) == shape[0]
            and all(_numbers(each, *shape[1:]) for each in value))


def _is_alignment(value: object, each) -> bool:
    if not isinstance(value, dict) or value.keys() != {field.name for field in dataclasses.fields(Alignment)}:
        return False
    if value["how"] == "grid":
        return value == dataclasses.asdict(Alignment())
    return (value["how"] == "world" and _numbers(value["box"], 3) and min(value["box"]) > 0
            and (value["centre"] in ((), []) or _numbers(value["centre"], 3)) and each(value["offsets"], 3))
