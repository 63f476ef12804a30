"""What sample.py leaves: a BIDS derivatives tree of synthesised volumes, with a JSON beside each.

A volume's JSON is written after it, and holds its checksum: what is there with a JSON that agrees is whole.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from data.pairs import Pair
from data.problems import PairError, Problem
from data.volumes import save_image
from utils.files import FileError, write_text

# In derivatives, BIDS has no name for a 3-D volume of diffusion or functional data but that of a reference volume
DATATYPE = {"fmri": ("func", "task-synth", "sbref"), "dmri": ("dwi", "", "sbref")}
ANATOMICAL = {"t1": "T1w", "t1w": "T1w", "t2": "T2w", "t2w": "T2w", "flair": "FLAIR", "pd": "PDw", "pdw": "PDw"}
DESCRIPTION = {"Name": "PDS synthesis", "BIDSVersion": "1.9.0", "DatasetType": "derivative"}
GENERATED_BY = {"Name": "PDS", "Description": "Pattern-aware Diffusion Synthesis: sample.py"}
README = """Volumes in this folder were synthesised by PDS (Pattern-aware Diffusion Synthesis), sample.py. They are no
measurements, and not for diagnosis. The JSON beside each says with which model, settings and seed it was made.
"""
NOT_BIDS = "*.csv\n*.png\n"  # what .bidsignore tells validators to pass over


def label(text: str) -> str:
    """What BIDS allows in a label: letters and digits only."""
    return re.sub(r"[^0-9A-Za-z]", "", text)


def volume_path(folder: Path, pair: Pair, modality: str, description: str) -> Path:
    """Where a volume of a visit goes, for example sub-01/dwi/sub-01_desc-synth_sbref.nii.gz."""
    datatype, task, suffix = DATATYPE.get(modality, ("anat", "", ANATOMICAL.get(modality.lower(), modality)))
    visit = [f"sub-{label(pair.subject.removeprefix('sub-'))}"]
    if pair.session:
        visit.append(f"ses-{label(pair.session.removeprefix('ses-'))}")
    name = "_".join(filter(None, (*visit, task, f"desc-{description}", suffix)))
    return folder.joinpath(*visit, datatype, f"{name}.nii.gz")


@dataclass(frozen=True)
class Job:
    """One volume to make: `target` of a visit from its `source`, or of a joint sample where there is none."""

    pair: Pair
    source: str
    target: str
    key: tuple[int, ...]  # of the noise
    folder: Path

    def path(self, description: str = "synth") -> Path:
        return volume_path(self.folder, self.pair, self.target, description)

    @property
    def direction(self) -> str:
        return f"{self.source}->{self.target}"


def refuse_same_place(pairs: list[Pair], modality: str) -> None:
    """Raise PairError where visits, without what BIDS does not allow in labels, have the same name or none."""
    owner, problems = {}, []
    for pair in pairs:
        if not label(pair.subject.removeprefix("sub-")):
            problems.append(Problem(pair.name, "has no letter from a to z and no digit in it, which is all that BIDS "
                                    "allows in names", "rename it", pair.name))
        first = owner.setdefault(volume_path(Path(), pair, modality, "synth"), pair)
        if first is not pair:
            problems.append(Problem(f"{first.name} and {pair.name}", "have the same name in BIDS, which only allows "
                                    "letters and digits in it", "rename one of them", pair.name))
    if problems:
        raise PairError(*problems)


def begin_tree(folder: Path, how: dict) -> None:
    """Write dataset_description.json and what goes with it. how: model and settings that the whole tree is made with.

    Raises FileError where the folder holds volumes that were made otherwise: they are left as they are.
    """
    path = folder / "dataset_description.json"
    wanted = {**DESCRIPTION, "GeneratedBy": [{**GENERATED_BY, "Parameters": how}]}
    if any(folder.glob("sub-*")):
        found = parameters(folder) or next((facts["MadeWith"] for _, facts in all_told(folder, "synth")), how)
        if told := ", ".join(name for name in how if found.get(name) != how[name]):
            raise FileError(f"{folder}: holds volumes that were made with another model or other settings ({told}). "
                            "They are left as they are: set opt.sample_dir to another folder, or move this one away")
    write_text(folder / "README", README)
    write_text(folder / ".bidsignore", NOT_BIDS)
    write_text(path, json.dumps(wanted, indent=2) + "\n")


def parameters(folder: Path) -> dict:
    """What a tree says that its volumes were made with; nothing where it cannot be read."""
    try:
        return dict(json.loads((folder / "dataset_description.json").read_text())["GeneratedBy"][0]["Parameters"])
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def remove(path: Path) -> None:
    """Remove a volume with its JSON, where they are."""
    for each in (beside(path), path):
        each.unlink(missing_ok=True)


def all_told(folder: Path, description: str) -> Iterator[tuple[Path, dict]]:
    """All volumes of this description that have a JSON as it was written, and what that says, sorted by path."""
    for path in sorted(folder.glob(f"sub-*/**/*_desc-{description}_*.nii.gz")):
        if facts := told(path):
            yield path, facts


def write_on_grid(path: Path, volume: np.ndarray, affine: np.ndarray, like: nib.Nifti1Header | None = None) -> None:
    """Write a volume (X, Y, Z) on a grid of its own; like: a header whose codes tell which space it is in."""
    image = nib.Nifti1Image(volume.astype(np.float32), affine)
    for form, code in (("sform", "sform_code"), ("qform", "qform_code")):
        getattr(image, f"set_{form}")(affine, code=int(like[code]) if like else 1)
    image.header.set_xyzt_units("mm")
    save_image(path, image)


def beside(path: Path) -> Path:
    """The JSON of a volume."""
    return path.with_name(path.name.replace(".nii.gz", ".json"))


def tell(path: Path, made_with: dict, sources: list[str], **more: object) -> None:
    """Write the JSON beside a volume, which says that all of it is there."""
    facts = {"Description": "Synthesised by PDS; no measurement", "Sources": sources, "SkullStripped": False,
             **({"TaskName": "synth"} if "_task-synth_" in path.name else {}), "MadeWith": made_with,
             "SHA256": hashlib.sha256(path.read_bytes()).hexdigest(), **more}
    write_text(beside(path), json.dumps({**facts, "Checksum": _checksum(facts)}, indent=2) + "\n")


def _checksum(facts: dict) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def told(path: Path) -> dict:
    """What the JSON beside a volume says; nothing where there is none, or not as it was written."""
    try:
        facts = json.loads(beside(path).read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) and facts.pop("Checksum", None) == _checksum(facts) else {}


def whole(path: Path, made_with: dict) -> bool:
    """Whether a volume is there as it was written, and was made this way."""
    facts = told(path)
    try:
        return (facts.get("MadeWith") == made_with
                and facts.get("SHA256") == hashlib.sha256(path.read_bytes()).hexdigest())
    except OSError:
        return False
