"""The output of sample.py: a BIDS derivatives tree of synthesised volumes, each with a JSON sidecar.

A sidecar is written after its volume and holds a checksum of both, so an incomplete or damaged volume is recognised.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
from tqdm import tqdm

from data.pairs import Pair
from data.volumes import read_header, save_image, write_volume
from utils.errors import UserError
from utils.files import open_regular, read_json, write_text

# datatype, task, suffix: in derivatives, BIDS names a single functional or diffusion volume only as a reference volume
DATATYPES = {"fmri": ("func", "task-synth", "sbref"), "dmri": ("dwi", "", "sbref")}
ANATOMICAL = {"t1": "T1w", "t1w": "T1w", "t2": "T2w", "t2w": "T2w", "flair": "FLAIR", "pd": "PDw", "pdw": "PDw"}
README = """The volumes in this folder were synthesised by PDS (Pattern-aware Diffusion Synthesis), sample.py. They are
not measurements and not for diagnosis. The JSON file of each volume lists the model, the settings and the seed.\n"""
NOT_IN_LABELS = re.compile("[^0-9A-Za-z]")
Visit = tuple[Pair, dict[str, tuple[Path, dict]]]  # and its scans: modality -> cache file, metadata (data/cache.py)


def volume_path(folder: Path, pair: Pair, modality: str, description: str = "synth") -> Path:
    """The path of a volume in a tree, for example sub-01/dwi/sub-01_desc-synth_sbref.nii.gz."""
    datatype, task, suffix = DATATYPES.get(modality, ("anat", "", ANATOMICAL.get(modality.lower(), modality)))
    names = zip(("sub", "ses"), pair.name.removeprefix("sub-").split("_ses-"))
    labels = [f"{entity}-{NOT_IN_LABELS.sub('', name)}" for entity, name in names]
    name = "_".join(filter(None, (*labels, task, f"desc-{description}", suffix)))
    return folder.joinpath(*labels, datatype, f"{name}.nii.gz")


def refuse_name_clashes(folder: Path, pairs: list[Pair]) -> None:
    """Raise UserError for visits whose BIDS name is empty or equals another's."""
    paths = [volume_path(folder, pair, "").parents[1] for pair in pairs]
    count, empty = Counter(paths), {"sub-", "ses-"}
    if bad := [pair.name for pair, path in zip(pairs, paths) if count[path] > 1 or empty & {*path.parts[-2:]}]:
        raise UserError(f"{', '.join(bad)}: BIDS names have letters and digits only; without the other characters, "
                        "these names are empty or equal: rename the subjects, sessions or groups")


def start_tree(folder: Path, provenance: dict) -> None:
    """Write the files that describe a tree. Raises UserError, before, if it holds volumes of another provenance."""
    found = parameters(folder) or provenance
    if different := ", ".join(name for name in provenance if found.get(name) != provenance[name]):
        raise UserError(f"{folder}: holds volumes of another model or other settings ({different}), which are kept: "
                        "set opt.sample_dir to another folder, or move this one")
    description = {"Name": "PDS synthesis", "BIDSVersion": "1.9.0", "DatasetType": "derivative",
                   "GeneratedBy": [{"Name": "PDS", "Description": "sample.py", "Parameters": provenance}]}
    write_text(folder / "README", README)
    write_text(folder / ".bidsignore", "*.csv\n*.png\n")
    write_text(folder / "dataset_description.json", json.dumps(description, indent=2) + "\n")


def parameters(folder: Path) -> dict:
    """The provenance of the first complete volume in a tree; empty where there is none."""
    return next((sidecar["MadeWith"] for _, sidecar in read_sidecars(folder)), {})


def read_sidecars(folder: Path, description: str = "synth") -> Iterator[tuple[Path, dict]]:
    """(path, content of the sidecar) of all complete volumes in a tree with this description, sorted by path."""
    paths = sorted(folder.glob(f"sub-*/**/*_desc-{description}_*.nii.gz"))
    return ((path, sidecar) for path in paths if (sidecar := read_sidecar(path)))


def read_sidecar(path: Path) -> dict:
    """The content of a volume's sidecar; empty unless both are there and undamaged."""
    try:
        sidecar = read_json(path.with_suffix("").with_suffix(".json"))
        return sidecar if sidecar.pop("Checksum") == _checksum(path, sidecar) else {}
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return {}


def json_scores(scores: dict[str, dict[str, float]]) -> dict[str, dict[str, float | str]]:
    """Scores for a sidecar: NaN and infinity, which JSON does not have, as words that float() reads."""
    return {region: {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
            for region, values in scores.items()}


def scores_in(sidecar: dict) -> dict[str, dict[str, float]]:
    """The scores in a sidecar; empty without a truth."""
    return {region: {name: float(value) for name, value in values.items()}
            for region, values in sidecar.get("Scores", {}).items()}


def is_complete(path: Path, provenance: dict) -> bool:
    """Whether an undamaged volume with this provenance exists. One with another provenance is removed, with a note."""
    made_with = read_sidecar(path).get("MadeWith", {})
    if not made_with or provenance.items() <= made_with.items():
        return bool(made_with)
    tqdm.write(f"note: {path.name}: replaced, because its source, truth or number of samples changed")
    path.unlink()
    path.with_suffix("").with_suffix(".json").unlink()
    return False


def write(path: Path, volume: np.ndarray, affine: np.ndarray, frame: Path | None = None, like: Path | None = None,
          **sidecar: object) -> None:
    """Write a volume (X, Y, Z) in the frame of a file, or on its own grid with the codes of `like`, and its sidecar.

    Raises UserError, VolumeError.
    """
    if not np.isfinite(volume).all():
        raise UserError(f"{path}: the model makes values that are not finite; it is not written. Use another "
                        'opt.resume_path, or opt.precision = "fp32"')
    if frame:
        write_volume(path, volume, affine, frame)
    else:
        image = nib.Nifti1Image(volume.astype(np.float32), affine)
        codes = [int(read_header(like)[name]) for name in ("sform_code", "qform_code")] if like else []
        for form, code in zip((image.set_sform, image.set_qform), codes if any(codes) else (1, 1)):  # 1: scanner space
            form(affine, code)
        image.header.set_xyzt_units("mm")
        save_image(path, image)
    sidecar |= {"Description": "Synthesised by PDS; not a measurement", "SkullStripped": False,
                "Sources": [like.name] if like else [], **({"TaskName": "synth"} if "_task-" in path.name else {})}
    sidecar["Checksum"] = _checksum(path, sidecar)
    write_text(path.with_suffix("").with_suffix(".json"), json.dumps(sidecar, indent=2) + "\n")


def _checksum(path: Path, sidecar: dict) -> str:
    with open_regular(path) as volume:
        return hashlib.sha256(volume.read() + json.dumps(sidecar, sort_keys=True).encode()).hexdigest()
