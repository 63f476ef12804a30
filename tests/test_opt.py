"""Settings: presets, refusals, and what each setting affects."""

import dataclasses
import math
import re

import pytest

from opt import names_affecting, paper, small
from utils.errors import UserError
from utils.settings import AFFECTS, problems_of

# As in earlier versions, so that runs resume with the same freedom. All others affect training of both stages.
AFFECTED = {
    "data": "modalities image_size align box_size resize reduce intensity incomplete folds fold validation_fraction "
            "seed",
    "stage 1": "loss timesteps prediction timestep_coupling condition_on_group optimiser learning_rate",
    "stage 2": "refine_optimiser refine_learning_rate structure_weight microstructure_weight coarse",
    "network": "unet_depth base_channels res_blocks output_blocks patch_size fusion attention_tokens dropout",
    "sampling": "sampler sampling_steps eta",
    "sample.py": "sample_dir joint_samples output_space realism uncertainty_samples",
    "nothing": "refine resume_path check data_root cache_dir epochs refine_epochs max_steps max_minutes checkpoint_dir "
               "result_dir checkpoint_every validate_every max_overhead num_samples tensorboard accumulate "
               "gradient_checkpointing device perceptual_weight vgg_weights vgg_download average_flips pattern_file "
               "region_file region_labels"}


def test_what_a_change_of_each_setting_affects():
    assert {kind: names_affecting(kind) for kind in AFFECTED} == {
        kind: set(names.split()) for kind, names in AFFECTED.items()}
    assert names_affecting(*AFFECTS) == set(small().as_dict())  # no other kind is in use


def test_both_presets_are_valid():
    for preset in (small, paper):
        preset().validate()
    assert paper().image_sizes() == {"fmri": (64, 64, 36), "dmri": (96, 96, 60)} and paper().timesteps == 1000


@pytest.mark.parametrize("name, value, remedy", [
    ("epochs", 2.5, "must be int"), ("epochs", True, "must be int"), ("epochs", 0, "must be at least 1"),
    ("learning_rate", math.nan, "must be a finite float"), ("learning_rate", 0, "must be above 0 and at most 1"),
    ("validation_fraction", 1.0, "must be at least 0 and below 1"), ("augment", "flip", "must be tuple[str, ...]"),
    ("sampling_steps", 2000, "1 .. opt.timesteps = 1000"), ("eta", 0.5, 'unless opt.sampler = "ddim"'),
    ("fusion", "middle", "choose from late, early"), ("augment", ("flip", "rotate"), "choose from flip, affine"),
    ("image_size", (64, 64), "each axis at least 11"), ("image_size", "big", "must be int | tuple | dict"),
    ("image_size", {"fmri": "big", "dmri": 64}, "give an int"), ("image_size", 1000, "at most"),
    ("image_size", {"t1": 64, "t2": 64}, "each modality of ('fmri', 'dmri')"),
    ("modalities", ("fmri", "fmri"), "two different names"), ("modalities", ("fmri", "d/mri"), "two different names"),
    ("modalities", ("T1", "t1w"), "the same BIDS name"), ("reduce", {"fmri": "mean"}, "one for each of"),
    ("intensity", {"t1": "minmax"}, "one for each of"), ("intensity", {"fmri": "minmax", "dmri": "max"}, "choose from"),
    ("pattern_labels", (0, 3), "above 0 (background)"),
    ("region_labels", {"edema": 2}, "set opt.region_file"), ("pattern_labels", (3,), "set opt.pattern_file"),
    ("bids_suffix", {"t1": "T1w"}, "fmri=desc-preproc_bold"), ("bids_suffix", {"fmri": "../x"}, "example fmri="),
    ("base_channels", 20, "multiple of 8"), ("joint_samples", 10**6, "below 1,000,000"),
    ("uncertainty_samples", 1, "2 or more"), ("refine", True, "best_model.pth"), ("device", "tpu", "use auto, cpu")])
def test_a_wrong_setting_is_refused_with_option_value_and_remedy(name, value, remedy):
    chosen = small()
    setattr(chosen, name, value)
    with pytest.raises(UserError, match=re.escape(f"opt.{name} = {value!r}: ")) as refusal:
        chosen.validate()
    assert remedy in str(refusal.value)


@pytest.mark.parametrize("labels", [{"brain": 1}, {"": 1}, {"edema": 0}, {"edema": ()}, {"edema": "T"}, {"edema": None},
                                    {"edema": (1, True)}, {3: 1}, {}])
def test_regions_need_new_names_and_labels(labels):
    chosen = dataclasses.replace(small(), region_file="labels.nii", region_labels=labels)
    with pytest.raises(UserError, match="opt.region_labels = .* new names with labels above 0"):
        chosen.validate()
    chosen = dataclasses.replace(chosen, region_labels={"tumour": (1, 2), "edema": 2})
    chosen.validate()
    assert chosen.regions() == {"tumour": (1, 2), "edema": (2,)}


def test_all_problems_are_reported_at_once():
    chosen = small()
    chosen.base_channels, chosen.timesteps, chosen.sizes = 20, 1, 3
    with pytest.raises(UserError, match=r"opt.sizes: there is no such setting; did you mean opt.resize\?") as refusal:
        chosen.validate()
    assert sorted(line.split()[0] for line in str(refusal.value).splitlines()) == [
        "opt.base_channels", "opt.sampling_steps", "opt.sizes:", "opt.timesteps"]  # it is below sampling_steps now
    chosen.check, chosen.fusion = True, "middle"  # combinations are not judged while a type is wrong
    assert [line.split()[0] for line in problems_of(chosen)] == ["opt.sizes:", "opt.fusion", "opt.timesteps"]
    dataclasses.replace(small(), image_size=3, check=True).validate()  # the check suggests sizes


def test_resolved_settings_spell_out_what_is_given_per_modality():
    for size in (64, [64, 64, 64], {"dmri": 64, "fmri": (64, 64, 64)}, (64, (64, 64, 64))):
        chosen = dataclasses.replace(small(), image_size=size, reduce={"dmri": "b0", "fmri": "std"})
        chosen.validate()
        resolved = chosen.resolved()
        assert list(resolved["image_size"].items()) == [("fmri", (64,) * 3), ("dmri", (64,) * 3)]
    assert resolved["reduce"] == {"fmri": "std", "dmri": "b0"}
    assert list(resolved) == list(chosen.as_dict()) and resolved["epochs"] == small().epochs
