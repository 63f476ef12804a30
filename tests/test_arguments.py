"""The command line and the help made from the comments of opt.py."""


import pytest

from opt import PRESETS, Options, small
from utils.arguments import comments, parse_arguments


def parse(*words: str, opt: Options | None = None) -> Options:
    return parse_arguments(opt or small(), PRESETS, list(words), "test")


def test_the_command_line_overrides_edits_which_override_the_preset():
    edited = small()
    edited.epochs, edited.seed, edited.exclude = 7, 3, ["sub-01"]
    chosen = parse("--preset", "paper", "--seed", "4", opt=edited)
    assert (chosen.epochs, chosen.seed, chosen.base_channels, chosen.exclude) == (7, 4, 64, ["sub-01"])
    assert edited.seed == 3
    edited.lerning_rate = 1.0  # validate() refuses it
    assert "lerning_rate" in parse("--preset", "paper", opt=edited).edited & parse(opt=edited).edited


@pytest.mark.parametrize("words, name, value", [
    (["--refine"], "refine", True), (["--no-refine"], "refine", False), (["--image_size", "64"], "image_size", 64),
    (["--image_size", "64", "64", "32"], "image_size", (64, 64, 32)), (["--fusion", "late"], "fusion", "late"),
    (["--image_size", "64x64x32"], "image_size", (64, 64, 32)), (["--reduce", "std"], "reduce", "std"),
    (["--image_size", "fmri=32x32x18", "dmri=48"], "image_size", {"fmri": (32, 32, 18), "dmri": 48}),
    (["--modalities", "t1", "flair"], "modalities", ("t1", "flair")), (["--eta", "1e-3"], "eta", 1e-3),
    (["--bids_suffix", "fmri=desc-a=b"], "bids_suffix", {"fmri": "desc-a=b"}),
    (["--region_labels", "a=1,2", "b=2"], "region_labels", {"a": (1, 2), "b": 2}),
    (["--pattern_labels", "3", "7"], "pattern_labels", (3, 7)),
    (["--reduce", "fmri=mean", "dmri=b0"], "reduce", {"fmri": "mean", "dmri": "b0"})])
def test_values_on_the_command_line(words, name, value):
    assert getattr(parse(*words), name) == value


def test_the_help_explains_every_setting_and_a_misspelt_option_is_refused(capsys):
    texts = comments(Options)
    assert list(texts) == list(small().as_dict()) and all(heading and text for heading, text in texts.values())
    assert texts["exclude"][0] == "Data" and "largest component above" in texts["intensity"][1]  # its third line
    with pytest.raises(SystemExit, match="0"):
        parse("--help")
    printed = capsys.readouterr().out
    assert "passes over the training pairs" in printed and all(f"--{name}" in printed for name in texts)
    with pytest.raises(SystemExit, match="2"):
        parse("--lerning_rate", "1")
    assert "unrecognized arguments: --lerning_rate 1 (did you mean --learning_rate?)" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        parse("--image-size=8x8x8")
    assert "--image-size=8x8x8 (did you mean --image_size?)" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        parse("pairs.csv")
    assert capsys.readouterr().err.endswith("unrecognized arguments: pairs.csv\n")
