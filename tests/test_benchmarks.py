"""The scripts that the README's figures come from, on tiny data: they run, and their figures mean what they say."""

from __future__ import annotations

import copy
import csv
import json

import numpy as np
import pytest
import torch

import main
from benchmarks import (
    ablation,
    augmentation,
    group_difference,
    loader_cost,
    ranks,
    refine_ablation,
    sampling,
    stage1_quality,
    step,
)
from models import layers
from models.backbone import Backbone
from opt import PRESETS, opt
from tests.conftest import arguments
from utils.arguments import parse_arguments
from utils.checkpoint import read_checkpoint


@pytest.fixture
def settings(study_csv, tmp_path):
    return parse_arguments(opt, PRESETS, arguments(study_csv, tmp_path), "test")


@pytest.fixture
def checkpoint(study_csv, tmp_path):
    assert main.main(arguments(study_csv, tmp_path, "--max_steps", "2")) == 0
    return tmp_path / "checkpoints/best_model.pth"


def test_quality_of_stage_1(checkpoint, settings, monkeypatch, capsys):
    monkeypatch.setattr(stage1_quality, "JOINT", 3)
    stage1_quality.report(checkpoint, settings)
    told = capsys.readouterr().out
    for words in ("fmri->dmri: one sample", "over the mean training volume", "over another subject's source",
                  "joint dmri: mean_shift"):
        assert words in told


class Copyist(Backbone):
    """Knows the answer: what it samples are the subjects themselves."""

    def __init__(self, network, study):
        super().__init__(network, None, "independent", torch.device("cpu"), torch.float32)
        self.study, self.calls = study, 0

    def sample(self, keys, sizes, steps, sampler, eta, given=None, progress=iter):
        places = [key[2] % len(self.study.pairs) for key in keys]
        return self.study.volumes(places)


def test_scores_of_a_perfect_model(settings):
    study = main.read_study(settings)
    network = ablation.Trial(settings, study, 1, torch.device("cpu")).smooth.network
    perfect = Copyist(network, study)
    for row in stage1_quality.translation_scores(perfect, study, settings, [0, 1], swapped=False):
        assert row["psnr_single"] == float("inf") and row["psnr_of_8"] > 120  # but for the rounding of a mean of 8
        assert max(row["inside"], row["outside"]) < 1e-6
    for values in stage1_quality.joint_scores(perfect, study, settings, 24).values():
        assert abs(values["mean_shift"]) < 1e-6 and values["std_ratio"] == pytest.approx(1, abs=1e-3)
        assert values["spread_ratio"] == pytest.approx(1, rel=0.3) and values["nearest"] < values["nearest_real"]


def test_ablation(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "FACTORS", {"default": {}, "pattern weight 0": {"pattern_weight": 0.0}})
    monkeypatch.setattr(ablation, "JOINT", 3)
    ablation.ablate(settings, 0.05, 2, tmp_path / "out", list(ablation.FACTORS))
    with open(tmp_path / "out/runs.csv", newline="") as file:
        runs = list(csv.DictReader(file))
    assert {(row["variant"], row["seed"]) for row in runs} == {(v, s) for v in ablation.FACTORS for s in "01"}
    assert len({row["x0_error"] for row in runs}) == 4  # the seed and the factor both count
    table = (tmp_path / "out/table.md").read_text()
    assert "default against pattern weight 0, inside the networks" in table and table.count("\n| ") == 2
    before = (tmp_path / "out/runs.csv").read_text()
    ablation.ablate(settings, 0.05, 2, tmp_path / "out", list(ablation.FACTORS))  # finished runs are not repeated
    assert (tmp_path / "out/runs.csv").read_text() == before


def test_cost_of_loading(settings, monkeypatch):
    monkeypatch.setattr(loader_cost, "STEPS", 4)
    seconds = loader_cost.measure(settings)
    assert {name: len(each) for name, each in seconds.items()} == {"cache": 4, "tensors": 4, "loading": 4}
    assert all((each > 0).all() for each in seconds.values())
    assert np.median(seconds["loading"]) < np.median(seconds["tensors"])


def test_errors_of_samplers(checkpoint, settings):
    study = main.read_study(settings)
    backbone = Backbone.from_checkpoint(read_checkpoint(checkpoint, ("stage 1",)), torch.device("cpu"), torch.float32)
    rows = sampling.compare(backbone, study, 0, (("dpmpp", 5), ("dpmpp", 40)), ("dpmpp", 40))
    assert {row["what"] for row in rows} == {"joint", "given fmri", "given dmri"}
    for row in rows:
        assert (row["error"] == 0) == (row["steps"] == 40) and row["seconds"] > 0
        assert np.isfinite(row["psnr"]) == (row["what"] != "joint")
    assert sampling.table(rows).count("\n") == 3  # two lines of heading, and one for each number of steps


def test_projection_of_group_differences():
    groups, generator = np.array(["NC", "NC", "AD", "AD"]), np.random.default_rng(0)
    real = generator.normal(size=(4, 500))
    assert group_difference.kept(real, real, groups) == (1, 1, 1)
    assert group_difference.kept(0.5 * real + 3, real, groups) == pytest.approx((0.5, 0.5, 0.5))
    other = group_difference.kept(generator.normal(size=(4, 500)), real, groups)
    assert other[1] < 0.1 and abs(other[0]) < 0.2


@pytest.fixture
def grouped(study_csv, tmp_path):
    """Words of a tiny run on a study with two groups."""
    with open(study_csv, newline="") as file:
        rows = list(csv.DictReader(file))
    table = tmp_path / "grouped.csv"
    with open(table, "w", newline="") as file:
        lines = csv.DictWriter(file, ["subject", "fmri", "dmri", "group"])
        lines.writeheader()
        for number, row in enumerate(rows):
            files = {name: study_csv.parent / row[name] for name in ("fmri", "dmri")}
            lines.writerow({**row, **files, "group": ("NC", "AD")[number % 2]})
    return arguments(table, tmp_path)


def test_group_difference_of_a_run(grouped, tmp_path, capsys):
    assert main.main([*grouped, "--max_steps", "2"]) == 0
    resume = ["--resume_path", str(tmp_path / "checkpoints/best_model.pth")]
    assert main.main([*grouped, "--refine", *resume, "--max_steps", "2"]) == 0
    capsys.readouterr()
    refined = tmp_path / "checkpoints/best_refine.pth"
    group_difference.report(refined, parse_arguments(opt, PRESETS, grouped, "test"))
    told = capsys.readouterr().out
    assert "1 NC, 1 AD" in told and told.count("100% (100% .. 100%)") == 2 and told.count("refined") == 2


def test_ablation_of_stage_2(settings, tmp_path, monkeypatch):
    names = ("default", "joint prior", "no stage 1")
    monkeypatch.setattr(refine_ablation, "VARIANTS", {name: refine_ablation.VARIANTS[name] for name in names})
    refine_ablation.ablate(settings, 4.0, 0.1, 1, tmp_path / "out")
    with open(tmp_path / "out/subjects.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    by_variant = {row["variant"]: row for row in rows}
    assert set(by_variant) == set(names) and len({row["psnr"] for row in rows}) == len(rows)
    assert float(by_variant["no stage 1"]["stage1"]) == float(by_variant["no stage 1"]["sampling"]) == 0
    assert float(by_variant["joint prior"]["sampling"]) > 0
    assert (tmp_path / "out/table.md").read_text().count("\n| ") == 3
    before = (tmp_path / "out/subjects.csv").read_text()
    refine_ablation.ablate(settings, 4.0, 0.1, 1, tmp_path / "out")  # finished runs are not repeated
    assert (tmp_path / "out/subjects.csv").read_text() == before


def test_cost_of_a_step(settings):
    """Rows of both stages, in this process: what they hold, and that the parts are parts."""
    rows = [{**step.measure(settings, "tiny", stage, 2, plain=False), "family": "tiny"} for stage in (1, 2)]
    larger = copy.deepcopy(settings)
    larger.image_size = 24
    rows.append({**step.measure(larger, "tiny", 1, 1, plain=False), "family": "tiny"})
    step.add_exponents(rows)
    for row in rows:
        assert row["seconds_per_step"] > 0 and row["tflop"] > 0 and row["peak_gib"] > 0.1
        assert np.isfinite(row["fraction_of_conv"]) and row["conv_seconds"] > 0
    assert rows[1]["exponent"] is None and np.isfinite(rows[0]["exponent"])
    assert rows[2]["tflop"] > 2 * rows[0]["tflop"]  # 27,648 voxels against 5,524
    assert json.loads(json.dumps(rows)) == rows
    assert "| tiny | 1 | 12x13x11/16x17x14 | 2 | float32 |" in step.table(rows)


def test_plain_is_the_same_network(settings, monkeypatch):
    """What is compared with does the same arithmetic."""
    monkeypatch.setattr(layers, "layout", layers.layout)
    monkeypatch.setattr(layers.Conv3d, "forward", layers.Conv3d.forward)
    ours, plain = (step.measure(settings, "tiny", 1, 1, plain=each)["tflop"] for each in (False, True))
    assert plain == pytest.approx(ours, rel=0.1)


def test_throughput_of_ranks(study_csv, tmp_path):
    words = arguments(study_csv, tmp_path, "--image_size", "12")
    one, two = (ranks.run(count, 2, 4, 1, words) for count in (1, 2))  # stage 2, with Muon
    assert one["ranks"] == 1 and two["ranks"] == 2
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-4)
    assert len(one["seconds"]) == 1 and one["megabytes"] > 0


def test_augmentation_takes_as_many_pairs_of_each_group_and_its_classifier_learns():
    generator = np.random.default_rng(0)
    groups = np.array(["A"] * 30 + ["B"] * 30)
    volumes = generator.normal(0, 1, (60, 50)) + (groups == "B")[:, None]
    places = augmentation.alike(groups, np.array(["A", "A", "B"] * 5), generator)
    assert sorted(groups[places]) == ["A"] * 10 + ["B"] * 5 and len(set(places)) == 15
    tests = {"these": (generator.normal(0, 1, (60, 50)) + (groups == "B")[:, None], groups),
             "others": (generator.normal(0, 1, (60, 50)), groups)}
    found = augmentation.accuracies((volumes, groups), tests)
    assert found[0] > 0.9 and abs(found[1] - 0.5) < 0.2
    with pytest.raises(SystemExit, match="draw more"):
        augmentation.alike(groups, np.array(["A"] * 40), generator)
