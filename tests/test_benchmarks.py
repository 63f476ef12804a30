"""The scripts behind the documentation's figures, on tiny data: they run, and their figures mean what they say."""

import functools
import json
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import main
from benchmarks import ablation, augmentation, group_difference, sampling, stage1_quality, step
from data.study import read_study
from opt import PRESETS, opt
from tests.conftest import SIZES, arguments, read_csv, refine_arguments
from utils.arguments import parse_arguments
from utils.errors import UserError
from utils.files import write_table

settings_of = functools.partial(parse_arguments, opt, PRESETS, description="test")


@pytest.fixture(scope="module")
def grouped(study_csv, tmp_path_factory):
    """The options of a tiny run of both stages on a study with two groups, and its checkpoints."""
    folder, table = tmp_path_factory.mktemp("grouped"), study_csv.with_name("grouped.csv")
    rows = [{**row, "group": ("NC", "AD")[i % 2]} for i, row in enumerate(read_csv(study_csv))]
    write_table(table, tuple(rows[0]), rows)
    for words in (arguments, refine_arguments):
        assert main.main(words(table, folder, "--max_steps", "2")) == 0
    return arguments(table, folder, "--max_steps", "2"), folder / "checkpoints"


def test_quality_of_stage_1_is_printed_and_perfect_for_a_prior_that_samples_the_truth(grouped, monkeypatch, capsys):
    monkeypatch.setattr(stage1_quality, "JOINT", 3)
    settings = settings_of(grouped[0])
    stage1_quality.report(grouped[1] / "best_model.pth", settings)
    printed = capsys.readouterr().out
    assert "fmri->dmri: one sample" in printed and "another subject's source" in printed and "joint dmri" in printed
    study = read_study(settings)
    perfect = SimpleNamespace(sample=lambda keys, *_: study.volumes([key[2] % len(study.pairs) for key in keys]),
                              expected=lambda target, source: next(
                                  study.volumes([i])[target] for i in range(len(study.pairs)) for other in SIZES
                                  if torch.equal(study.volumes([i])[other], source)),
                              network=SimpleNamespace(directions=[("fmri", "dmri"), ("dmri", "fmri")]))
    for row in stage1_quality.translation_scores(perfect, study, settings, [0, 1]):
        assert row["psnr_single"] == row["psnr_expected"] == float("inf")
        assert row["psnr_mean"] > 120  # but for the rounding of a mean of 8
        assert row["psnr_swapped"] < 60 and row["share"] > 0
    for values in stage1_quality.joint_scores(perfect, study, settings, 24).values():
        assert abs(values["mean_shift"]) < 1e-6 and values["std_ratio"] == pytest.approx(1, abs=1e-3)
        assert values["spread_ratio"] == pytest.approx(1, rel=0.3) and values["nearest"] < values["nearest_real"]


def test_samplers_are_compared_with_their_limit(grouped):
    study, prior = stage1_quality.open_run(grouped[1] / "best_model.pth", settings_of(grouped[0]))
    rows = sampling.compare(prior, study, 0, (("dpmpp", 5), ("ddim", 5)), ("dpmpp", 40))
    assert {row["kind"] for row in rows} == {"joint", "given fmri", "given dmri"}
    for row in rows:
        assert (row["error"] == 0) == (row["steps"] == 40) and np.isfinite(row["psnr"]) == (row["kind"] != "joint")
    assert sampling.table(rows).count("\n| ") == 3


def test_group_difference_is_projected_on_the_real_one(grouped, capsys):
    groups, (real, unrelated) = np.array(["NC", "NC", "AD", "AD"]), np.random.default_rng(0).normal(size=(2, 4, 500))
    assert group_difference.kept(0.5 * real + 3, real, groups) == pytest.approx((0.5, 0.5, 0.5))
    assert abs(group_difference.kept(unrelated, real, groups)[0]) < 0.2
    group_difference.report(grouped[1] / "best_refine.pth", settings_of(grouped[0]))
    printed = capsys.readouterr().out
    assert "1 NC, 1 AD" in printed and printed.count("100% (100% .. 100%)") == 2 and printed.count("refined") == 2


def test_ablation_trains_every_variant_and_seed_once(grouped, tmp_path, monkeypatch):
    def run(command):
        calls.append(command)
        return subprocess.CompletedProcess(command, main.main(command[2:]))

    calls, variants = [], {"default": "", "other": "--coarse none"}
    monkeypatch.setattr(ablation, "subprocess", SimpleNamespace(run=run))
    own = SimpleNamespace(stage=2, steps=2, minutes=None, seeds=2, out=tmp_path)
    for _ in range(2):  # finished runs are not repeated
        ablation.ablate(own, grouped[0], variants)
    rows = read_csv(tmp_path / "runs.csv")
    assert [f"{row['variant']} {row['seed']}" for row in rows] == ["default 0", "other 0", "default 1", "other 1"]
    assert len({row["validation"] for row in rows}) == 4 and len(calls) == 6  # with a stage 1 for each seed
    assert (tmp_path / "table.md").read_text().count("\n| ") == 2
    with pytest.raises(SystemExit, match="choose another --out"):
        ablation.ablate(own, [*grouped[0], "--loss", "l1"], variants)


@pytest.mark.parametrize("stage", [1, 2])
def test_cost_of_a_step(stage, tmp_path, capsys):
    table = step.write_random_study(tmp_path, SIZES, 3)
    step.measure(stage, 1, 2, settings_of([*arguments(table, tmp_path), *step.NOTHING_BUT_STEPS]))
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(row["seconds"]) == 2 and 0 < row["loading"] < 1 and row["tflop"] > 0 and row["peak_gib"] > 0.1
    assert f"| tiny | {stage} | 12x13x11/16x17x14 | 2 | 1 | float32 |" in step.table([{"preset": "tiny", **row}])


def test_augmentation_draws_as_many_pairs_of_each_group_and_its_classifier_learns():
    random, groups = np.random.default_rng(0), np.array(["A"] * 30 + ["B"] * 30)
    volumes, others, noise = random.normal(size=(3, 60, 50)) + np.where(groups == "B", [[1], [1], [0]], 0)[..., None]
    draw = augmentation.draw_alike(groups, np.repeat(["A", "B"], [10, 5]), random)
    assert sorted(groups[draw]) == ["A"] * 10 + ["B"] * 5 and len(set(draw)) == 15
    related, unrelated = augmentation.accuracies((volumes, groups), [(others, groups), (noise, groups)])
    assert related > 0.9 and abs(unrelated - 0.5) < 0.2
    with pytest.raises(UserError, match="draw more"):
        augmentation.draw_alike(groups, np.array(["A"] * 40), random)
