"""synthesis/derivatives.py: names in the tree, sidecars, completeness."""

import json
from pathlib import Path

import pytest

from data.pairs import Pair
from synthesis.derivatives import is_complete, refuse_name_clashes, volume_path, write
from tests.conftest import AFFINE, ball
from utils.errors import UserError

MADE_WITH = {"seed": 3, "Scans": {"fmri": "abc"}}


def pair(subject: str, session: str = "") -> Pair:
    return Pair(subject, session, "", None, {})


def test_volumes_have_bids_names_and_clashes_are_refused():
    assert volume_path(Path(), pair("sub-A_1", "2"), "fmri") \
        == Path("sub-A1/ses-2/func/sub-A1_ses-2_task-synth_desc-synth_sbref.nii.gz")
    assert volume_path(Path(), pair("1"), "t1", "std") == Path("sub-1/anat/sub-1_desc-std_T1w.nii.gz")
    refuse_name_clashes(Path(), [pair("a1"), pair("a1", "2"), pair("a2")])
    for pairs in ([pair("a_1"), pair("a1")], [pair("a"), pair("a")], [pair("__")], [pair("__", "1")], [pair("a", "_")]):
        with pytest.raises(UserError, match=pairs[0].name):
            refuse_name_clashes(Path(), pairs)


def test_only_an_undamaged_volume_of_the_same_provenance_is_complete(tmp_path, capsys):
    volume = volume_path(tmp_path, pair("sub-01"), "dmri")
    write(volume, ball(4, 5, 6), AFFINE, MadeWith=MADE_WITH, Subject="sub-01")
    file = volume.with_name("sub-01_desc-synth_sbref.json")
    sidecar, content = json.loads(file.read_text()), volume.read_bytes()
    assert is_complete(volume, MADE_WITH) and is_complete(volume, {"seed": 3}) and not capsys.readouterr().out
    for changed in ({**sidecar, "Subject": "x"}, {**sidecar, "MadeWith": 3}, {}, [], None):
        file.write_text(json.dumps(changed))
        assert not is_complete(volume, MADE_WITH)
    file.write_text(json.dumps(sidecar))
    volume.write_bytes(content[:-1])
    assert not is_complete(volume, MADE_WITH)
    volume.write_bytes(content)
    assert not is_complete(volume, {**MADE_WITH, "seed": 4}) and "replaced" in capsys.readouterr().out
    assert not volume.exists() and not file.exists() and not is_complete(volume, MADE_WITH)
