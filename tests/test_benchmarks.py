"""The scripts behind the documentation's figures, on tiny data: they run, and their figures mean what they say."""

import functools
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

import main
from benchmarks import (
    ablation,
    augmentation,
    calibration,
    chart,
    comparison,
    cross_validate,
    equal_time,
    few_pairs,
    fuzz,
    gpu,
    group_difference,
    peers,
    realism,
    sampling,
    stage1_quality,
    step,
)
from data.study import read_study
from opt import PRESETS, opt
from synthesis.model import open_model
from tests.conftest import ROOT, SIZES, Child, arguments, read_csv, refine_arguments, run_code
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
    study, prior = stage1_quality.open_prior(grouped[1] / "best_model.pth", settings_of(grouped[0]))
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
        return main.main(command[2:])

    calls, variants = [], {"default": "", "other": "--coarse none"}
    monkeypatch.setattr(ablation, "run_child", run)
    own = SimpleNamespace(stage=2, steps=2, seeds=2, out=tmp_path)
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


def test_a_wrong_loss_is_not_within_tolerance():
    right = {1: 0.5, 2: 0.4}
    assert gpu.loss_difference({1: 0.5, 2: 0.42}, right, 2) == pytest.approx(0.05)
    assert gpu.loss_difference({1: 0.5, 2: 0.42}, right, 1) == 0
    assert gpu.loss_difference({1: 0.5}, right, 2) == math.inf
    assert [gpu.judge("", measured, 0.1, expected)["ok"] for measured, expected in
            ((0.1, None), (0.2, None), (28.0, 28.05), (28.0, 28.2), (math.nan, None), (math.inf, None), (None, None))
            ] == [True, False, True, False, False, False, False]
    assert gpu.judge("", 12.0, None)["ok"] is None


def test_kernels_are_summed_and_the_gpu_is_busy_where_one_runs():
    events = [{"name": name, "ts": start, "dur": duration} for name, start, duration in (
        ("sm90_xmma_fprop_implicit_gemm_f32", 0, 1000), ("Memcpy HtoD", 500, 1000),  # overlap for 500
        ("sm90_xmma_fprop_implicit_gemm_f32", 4000, 2000), ("vectorized_elementwise_kernel", 4500, 1000),  # inside
        ("sum_kernel", 6000, 500), ("cudnn::ops::nchwToNhwcKernel", 7000, 500))]
    found = gpu.kernel_table(list(reversed(events)), 2)
    assert found["busy_ms"] == pytest.approx((1.5 + 2 + 0.5 + 0.5) / 2) and found["kernels"] == 3
    assert {name: share for name, share in found["shares"].items() if share} == pytest.approx(
        {"convolutions": 0.5, "copies": 1 / 6, "others": 1 / 6, "norm and SiLU": 0.5 / 6, "changes of layout": 0.5 / 6})
    assert found["longest"][0] == {"name": events[0]["name"], "ms": 1.5, "calls": 1, "share": 0.5}
    assert gpu.kernel_table([], 2)["busy_ms"] is None


def test_profiled_steps_are_those_after_the_warm_up(tmp_path, capsys, monkeypatch):
    table, found = step.write_random_study(tmp_path, SIZES, 3), []
    settings = settings_of([*arguments(table, tmp_path), *step.NOTHING_BUT_STEPS])
    monkeypatch.setattr(gpu, "DEVICE_EVENTS", {"cpu_op"})  # there are no kernels on a CPU
    step.measure(1, 5, 5, settings, lambda stage: found.extend(
        gpu.profile_steps(stage, 2, steps) for steps in (1, 3)) or found[1])
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["busy_ms"] > 0 and row["shares"]["convolutions"] > 0.1 and len(row["longest"]) == gpu.LONGEST
    assert found[0]["kernels"] == pytest.approx(found[1]["kernels"], rel=0.2)


def test_a_rehearsal_of_the_gpu_finds_a_wrong_loss_and_a_program_that_fails(tmp_path, monkeypatch, capsys):
    def child(program, words, folder, limit, **environment):
        run_file = f"import runpy; runpy.run_path({program[0]!r}, run_name='__main__')"
        code = program[1] if program[0] == "-c" else run_file
        done = Child(list(words), f"import os; os.chdir({str(folder)!r})\n{code}").wait()
        log = Path(next((word for word in words if "/refine fp32/result" in word), "=").split("=")[1], "refine/log.csv")
        if log.exists():
            lines = [line.split(",") for line in log.read_text().splitlines()]
            lines[5][3] = str(1.01 * float(lines[5][3]))
            log.write_text("\n".join(map(",".join, lines)))
        if any("/sample fp32/" in word for word in words):
            return 2, "PDS cannot go on:\nno such device"
        return done.returncode, done.stdout + done.stderr

    row = {"stage": 1, "sizes": "", "batch_size": 1, "ranks": 1, "precision": "float32", "seconds_per_step": 0.25,
           "pairs_per_second": 4.0, "loading": 0.1, "operations": 1.0, "tflop": 1.0, "tflop_per_second": 4.0,
           "peak_gib": 1.0,
           **gpu.kernel_table([{"name": "fprop", "ts": 0, "dur": 100_000}], 1)}
    monkeypatch.setattr(gpu, "child", child)
    monkeypatch.setattr(step, "run_case", lambda *_, **__: row)
    monkeypatch.setattr("sys.argv", ["gpu", "--rehearse", "--out", str(tmp_path)])
    monkeypatch.setitem(gpu.SECONDS, "paper", 1e6)
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert ended.value.code == 1 and report["not run"] == ["paper 2 fp32"]
    failed = [row for row in report["correctness"] if not row["ok"]]
    assert len(report["correctness"]) == 8 and [row["name"] for row in failed] == [
        "refine: 8 losses, fp32, CPU again", "sample.py: volumes, fp32, CPU again"]
    assert failed[0]["measured"] == pytest.approx(0.01, rel=1e-3) and failed[1]["note"].endswith("no such device")
    assert report["speed"][0]["busy"] == pytest.approx(0.4)
    assert len(report["demo"]) == 6 and all(row["measured"] and row["ok"] is None for row in report["demo"])
    assert capsys.readouterr().out == (tmp_path / "gpu.md").read_text()


def test_without_a_gpu_it_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu"])
    with pytest.raises(SystemExit, match="no GPU here"):
        gpu.main()


@pytest.mark.parametrize("stage, most", [(1, 750), (2, 1200)])
def test_a_step_of_the_default_network_has_few_operations(stage, most, tmp_path, capsys):
    """A GPU is bound by their number in a network this small."""
    own = [f"--{each}_dir={tmp_path / each}" for each in ("cache", "checkpoint", "result")]
    settings = settings_of(["--device=cpu", "--precision=fp32", *step.NOTHING_BUT_STEPS, *own])
    settings.data_root = str(step.write_random_study(tmp_path, settings.image_sizes(), settings.batch_size))
    step.measure(stage, 1, 1, settings)
    assert 0.5 * most < json.loads(capsys.readouterr().out.splitlines()[-1])["operations"] <= most


def test_augmentation_draws_as_many_pairs_of_each_group_and_its_classifier_learns():
    random, groups = np.random.default_rng(0), np.array(["A"] * 30 + ["B"] * 30)
    volumes, others, noise = random.normal(size=(3, 60, 50)) + np.where(groups == "B", [[1], [1], [0]], 0)[..., None]
    draw = augmentation.draw_alike(groups, np.repeat(["A", "B"], [10, 5]), random)
    assert sorted(groups[draw]) == ["A"] * 10 + ["B"] * 5 and len(set(draw)) == 15
    related, unrelated = augmentation.accuracies((volumes, groups), [(others, groups), (noise, groups)])
    assert related > 0.9 and abs(unrelated - 0.5) < 0.2
    with pytest.raises(UserError, match="draw more"):
        augmentation.draw_alike(groups, np.array(["A"] * 40), random)


def test_translated_pairs_have_one_real_volume_each(grouped):
    settings = settings_of([*grouped[0], "--resume_path", str(grouped[1] / "best_refine.pth")])
    study, model = read_study(settings), open_model(settings, torch.device("cpu"))
    features, groups = augmentation.translated(model, study)
    members, first = study.roles["train"], np.prod(SIZES["fmri"])
    assert groups.tolist() == [study.pairs[i].group for i in members for _ in range(2)]
    real = np.stack([augmentation.features_of(volume[0, 0].numpy() for volume in study.volumes([i]).values())
                     for i in members for _ in range(2)])
    same = [[np.array_equal(a, b) for a, b in ((made[:first], truth[:first]), (made[first:], truth[first:]))]
            for made, truth in zip(features, real)]
    assert same == [[True, False], [False, True]] * len(members)


def test_realism_costs_error_and_a_spectrum_knows_blur(grouped, capsys):
    real = np.random.default_rng(0).normal(size=(24, 24, 20))
    blurred = gaussian_filter(real, 1)
    assert realism.texture(real, real) == (1, 0) and realism.texture(real + 0, 2 * real)[0] == pytest.approx(0.25)
    assert realism.texture(10**0.5 * real, real)[1] == pytest.approx(10)  # ten times the power at every frequency
    power, distance = realism.texture(blurred, real)
    assert power < 0.1 and distance > 5
    realism.report(grouped[1] / "best_refine.pth", settings_of(grouped[0]))
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if "->" in line]
    assert [float(row[2]) for row in rows] == 2 * list(realism.REALISM)
    assert float(rows[0][3]) > float(rows[4][3])


def test_equal_time_trains_every_arm_and_pairs_by_subject(grouped, tmp_path, monkeypatch):
    def run(command):
        calls.append(command)
        return main.main(command[2:])

    calls, arms = [], {name: equal_time.ARMS[name] for name in (equal_time.REFERENCE, "two stages")}
    seconds = itertools.chain([2.0] * 4, itertools.repeat(1.0))  # the machine is busy in the first round
    monkeypatch.setattr(ablation, "run_child", run)
    monkeypatch.setattr(equal_time, "run_case", lambda options, stage, **_: {"seconds_per_step": next(seconds),
                                                                               "peak_gib": 1.0})
    own = SimpleNamespace(minutes=[4 / 60], seeds=2, out=tmp_path)
    options = [word for word in grouped[0] if word != "--max_steps"][:-1]
    for _ in range(2):  # finished runs are not repeated
        *_, found = equal_time.compare(own, options, arms, [])
    rows = read_csv(tmp_path / "scores.csv")
    assert len(calls) == 8 and len(rows) == 2 * 2 * 2 * 2  # arms, seeds, test subjects, directions
    assert {(row["arm"], row["steps_1"], row["steps_2"]) for row in rows} == {
        (equal_time.REFERENCE, "1", "4"), ("two stages", "2", "2")}
    assert [row["seed"] for row in found] == [0] * 8 + [1] * 8


def test_few_pairs_takes_scans_away_and_compares_by_subject(grouped, tmp_path, monkeypatch, capsys):
    roles = []

    def compare(own, options, arms, new) -> Iterator[list[dict]]:
        study = read_study(settings_of(options))
        roles.append({name: [study.pairs[i].name for i in places] for name, places in study.roles.items()})
        assert not new and own.minutes == [1.0]
        yield [{"arm": arm, "seed": seed, "subject": f"sub-{n}", "direction": direction, "ssim": 0.5,
                "psnr": 20 + n + seed + (0.4 + 0.1 * n) * (arm == few_pairs.ALL)}
               for arm in arms for seed in (0, 1) for n in range(3) for direction in ("fmri->dmri", "dmri->fmri")]

    monkeypatch.setattr(equal_time, "compare", compare)
    monkeypatch.setattr("sys.argv", ["x", "--minutes", "1", "--pairs", "1", "3", "--test_folds", "2", "1",
                                     "--out", str(tmp_path), *grouped[0]])
    few_pairs.main()
    for i, found in enumerate(roles):
        study = read_study(settings_of([*grouped[0], f"--fold={(2, 1)[i % 2]}"]))
        whole = {name: [study.pairs[n].name for n in places] for name, places in study.roles.items()}
        assert found["test"] == whole["test"] and len(found["validation"]) == len(whole["validation"])
        assert (len(found["train"]), len(found.get("incomplete", []))) == ((1, 2), (3, 0))[i // 2]
    assert len(roles) == 4 and roles[0]["test"] != roles[1]["test"]
    rows = read_csv(tmp_path / "1 pairs, fold 2/pairs.csv")
    assert sorted(name for row in rows for name in SIZES if not row[name]) == ["dmri", "fmri"]
    printed = capsys.readouterr().out
    assert printed.count("| 4 | 21.50 | 0.500 | +0.50 (+0.40 .. +0.60) | +0.50, +0.50, +0.50, +0.50 | "
                         "+0.000") == 2 * 2 * 2
    assert {(row["pairs"], row["fold"]) for row in read_csv(tmp_path / "scores.csv")} == {
        (pairs, fold) for pairs in "13" for fold in "12"}
    assert printed.count("| 4 | 22.00 | 0.500 |  |  |  |") == 4 and (tmp_path / "curves.png").exists()
    for wrong, message in ((("4", "1"), "--pairs 4: the study has 3 training subjects"), (("1", "7"), "opt.fold = 7")):
        monkeypatch.setattr("sys.argv", ["x", "--minutes", "1", "--pairs", wrong[0], "--test_folds", wrong[1],
                                         "--out", str(tmp_path), *grouped[0]])
        with pytest.raises(SystemExit, match=message):
            few_pairs.main()
    assert len(roles) == 4  # refused before anything is trained


def test_a_comparison_is_paired_by_subject_and_run():
    """Each seed has its own test subjects, and an arm may have fewer seeds than the reference."""
    rows = [{"arm": arm, "minutes": 6, "seed": seed, "subject": f"{seed}{n}", "direction": "a->b", "weights": weights,
             "psnr": 20 + 5 * seed + n + gain * n, "ssim": 0.5 + gain / 100}
            for arm, seed, gain, weights in (("two", 0, 1, 100), ("two", 1, 1, 300), ("one", 0, 0, None))
            for n in range(1, 4)]
    header, _, two, one = (line.split(" | ") for line in comparison.table(rows, "arm", "two", "minutes",
                                                                          costs={"weights": 0}).splitlines())
    assert header[6:8] == ["two better by, dB", "each run, dB"]
    assert two[:6] == ["| 6", "a->b", "two", "2", "26.50", "0.510"] and two[-1] == "200 |"
    assert one[3:5] == ["1", "22.00"] and one[6].startswith("+2.00 (+1.") and one[7] == "+2.00"
    assert one[8].startswith("+0.010 (") and one[-1] == " |"


def test_a_chart_has_round_ticks_that_include_all_points(tmp_path):
    assert chart.ticks(23.1, 28.2) == pytest.approx([23, 24, 25, 26, 27, 28, 29])
    assert chart.ticks(0, 0.034) == pytest.approx([0, 0.01, 0.02, 0.03, 0.04])
    chart.save_chart(tmp_path / "chart.png", {"one": np.array([[6, 27.0]])}, "x", "y")
    pixels = np.asarray(Image.open(tmp_path / "chart.png"))
    assert (pixels == (0, 114, 178)).all(axis=2).sum() > 20
    chart.save_chart(tmp_path / "chart.png", {40 * "a long name ": np.array([[6, 27.0]])}, "x", "y")
    pixels = np.asarray(Image.open(tmp_path / "chart.png"))
    assert (pixels[:, -5:] == 255).all() and pixels.shape[1] > 2000  # no name is cut off


def test_changed_files_are_survived_and_counted():
    done = run_code("import sys; from benchmarks import fuzz; fuzz.main()", "--checkpoints", "3", "--volumes", "2",
                    "--tables", "3", "--seed", "1")
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines()
            if line.startswith(("| checkpoints", "| volumes", "| tables"))]
    assert [(row[0][2:], int(row[1]), int(row[7])) for row in rows] == [
        ("checkpoints", 3, 0), ("volumes", 2, 0), ("tables", 3, 0)]


def test_a_case_that_fails_is_counted_and_shown(tmp_path):
    status, _ = fuzz.in_a_child(lambda words: 1 / len(words), [], tmp_path / "log.txt")
    assert status == 1 and "ZeroDivisionError" in (tmp_path / "log.txt").read_text()
    assert fuzz.in_a_child(lambda words: os.kill(os.getpid(), 9), [], tmp_path / "log.txt")[0] == -9


def test_all_folds_are_joined_and_an_interruption_changes_nothing(study_csv, tmp_path, monkeypatch, capsys):
    calls, stop_at = [], 4  # the second stage of fold 1

    def run(command: list[str]) -> int:
        calls.append(command)
        return 3 if len(calls) == stop_at else main.main(command[2:])
    monkeypatch.setattr(cross_validate, "run_child", run)
    table, first = study_csv.with_name("sessions.csv"), read_csv(study_csv)
    visits = [("sub-01", 1), ("sub-01", 2), ("sub-03", 1), ("sub-04", 1), ("sub-05", 1), ("sub-06", 1)]
    write_table(table, ("subject", "session", "group", *SIZES), [
        {**row, "subject": subject, "session": session, "group": "AD" if subject > "sub-03" else "NC"}
        for row, (subject, session) in zip(first, visits)])
    options = [*arguments(table, tmp_path), "--max_steps", "2"]
    for name in ("checkpoint", "result"):  # of each fold
        place = options.index(f"--{name}_dir")
        del options[place:place + 2]
    for name in ("interrupted", "not"):
        monkeypatch.setattr("sys.argv", ["x", "--out", str(tmp_path / name), *options])
        if name == "interrupted":
            with pytest.raises(SystemExit) as stopped:
                cross_validate.main()
            assert stopped.value.code == 3 and len(calls) == 4
        cross_validate.main()
    assert len(calls) == 4 + 4 + 6  # the finished fold is not repeated, the first stage of the second one is looked at
    for file in ("scores.csv", "table.csv", "table.md", "table.tex"):
        assert (tmp_path / "interrupted" / file).read_text() == (tmp_path / "not" / file).read_text()
    tested = [row for row in read_csv(tmp_path / "not/scores.csv") if row["volume"] == "refined"]
    assert len({row["fold"] for row in tested}) == 3 and len(tested) >= 2 * 6
    entries = {(row["what"], row["of"], row["score"], row["direction"]): row for row in
               read_csv(tmp_path / "not/table.csv")}
    assert entries["volume", "coarse", "psnr", "fmri->dmri"]["subjects"] == "5"
    assert {"AD", "NC", "1", "2", "brain"} <= {of for _, of, *_ in entries}
    assert "\\begin{tabular}" in (tmp_path / "not/table.tex").read_text()
    assert Image.open(tmp_path / "not/worst.png").size[1] > 6 * 120
    monkeypatch.setattr("sys.argv", [*sys.argv, "--seed", "1"])
    with pytest.raises(SystemExit, match="these folds have other options"):
        cross_validate.main()


def test_the_table_of_all_folds_averages_sessions_and_corrects_its_tests():
    assert cross_validate.holm([0.01, 0.04, math.nan, 0.03]) == pytest.approx([0.03, 0.06, math.nan, 0.06], nan_ok=True)
    scores = {"a": {"refined": [30, 32], "coarse": [28, 28]}, "b": {"refined": [35], "coarse": [36]},
              "c": {"refined": [29], "coarse": [26]}}
    rows = [{"fold": 0, "subject": subject, "session": str(visit), "group": "", "direction": "x->y", "volume": volume,
             "region": "volume", "psnr": value, "ssim": math.nan}
            for subject, volumes in scores.items() for volume, values in volumes.items()
            for visit, value in enumerate(values)]
    table = {(row["what"], row["of"], row["score"]): row for row in cross_validate.summarise(rows, ["psnr", "ssim"])}
    refined, coarse = table["volume", "refined", "psnr"], table["volume", "coarse", "psnr"]
    assert (refined["subjects"], refined["mean"]) == (3, pytest.approx(95 / 3)) and "gain" not in refined
    assert refined["deviation"] == pytest.approx(np.std([31, 35, 29], ddof=1))
    assert coarse["gain"] == pytest.approx((3 - 1 + 3) / 3) and coarse["p"] == coarse["p_holm"] == pytest.approx(0.5)
    assert table["session", "1", "psnr"]["mean"] == 32 and ("group", "", "psnr") not in table


def test_peers_learn_each_direction_and_are_compared_by_subject(grouped, tmp_path, monkeypatch, capsys):
    options, calls = [*grouped[0], "--augment", "flip", "affine"], []
    methods = (peers.PDS, "residual U-Net", "copy", "mean")

    def train(method: str, rate: float, minutes: float, role: str, settings) -> dict:
        calls.append((method, rate, role))
        return run_peer(method, rate, minutes, role, settings)

    def child(command: list[str], **_) -> SimpleNamespace:
        method, rate, minutes, role, *words = command[4:]
        found = train(method, float(rate), float(minutes), role, settings_of(words))
        return SimpleNamespace(returncode=0, stdout=json.dumps(found))

    def pds(folder: Path, minutes: float, settings, words: list[str]) -> dict:
        rows = [{**row, "psnr": row["psnr"] + 1} for row in peers.run_baseline("mean", settings)["rows"]]
        return {"rate": None, "minutes": minutes, "peak_gib": 1.0, "steps": 2, "parameters": 10**6, "rows": rows}
    run_peer = peers.run_peer
    monkeypatch.setattr(peers, "subprocess", SimpleNamespace(run=child, PIPE=subprocess.PIPE))
    monkeypatch.setattr(peers, "run_pds", pds)
    monkeypatch.setattr("sys.argv", ["x", "--minutes", "0.01", "--search_minutes", "0.005", "--rates", "1e-3", "1e-2",
                                     "--seeds", "1", "--out", str(tmp_path), "--methods", *methods, *options])
    for _ in range(2):  # finished runs are not repeated
        peers.main()
    assert len(calls) == 3 and {role for *_, role in calls} == {"validation", "test"}
    lines = [line.split(" | ") for line in (tmp_path / "table.md").read_text().splitlines()]
    assert len(lines) == 2 + 2 * len(methods)
    mean = next(line for line in lines if line[1:2] == ["mean"])
    assert "+1.00 (" in mean[lines[0].index(f"{peers.PDS} better by, dB")]
    assert len(read_csv(tmp_path / "scores.csv")) == 2 * 2 * len(methods)
    with pytest.raises(SystemExit, match="has other options"):
        monkeypatch.setattr("sys.argv", [*sys.argv, "--loss", "l1"])
        peers.main()


@pytest.mark.parametrize("method", ["residual U-Net", "DynUNet", "diffusion", "pix2pix"])
def test_a_peer_learns_what_it_sees(grouped, method):
    """Steps on one pair lower its losses; unknown voxels take no part."""
    torch.manual_seed(0)
    study = read_study(settings_of(grouped[0]))
    peer = peers.Peer(method, study, "fmri", "dmri", torch.device("cpu"))
    source, truth = peer.load([0])
    assert source.shape == truth.shape == (1, 1, 16, 24, 16) and truth.isnan().sum() == truth.numel() - 16 * 17 * 14
    optimiser, losses = torch.optim.Adam(peer.network.parameters(), 1e-3), []
    for _ in range(8):
        torch.manual_seed(1)
        loss, of_discriminator = peer.losses(source, truth)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        assert (of_discriminator is None) == (method != "pix2pix")
    assert losses[-1] < 0.9 * losses[0]
    made = peer.translate(0)
    assert made.shape == (16, 17, 14) and np.abs(made).max() <= 1


def test_crps_and_coverage_of_known_distributions(grouped, capsys):
    random = np.random.default_rng(0)
    truth, members = random.normal(0, 1, 4000), random.normal(0, 1, (40, 4000))
    exact = calibration.crps_of_normal(np.zeros(4000), np.ones(4000), truth)
    assert exact.mean() == pytest.approx(1 / np.sqrt(np.pi), abs=0.02)  # E of the CRPS of a right normal distribution
    assert calibration.crps_of_members(members, truth).mean() == pytest.approx(exact.mean(), abs=0.01)
    assert calibration.crps_of_members(members[:1], truth) == pytest.approx(np.abs(members[0] - truth))
    assert calibration.crps_of_normal(truth, np.zeros(4000), truth + 1) == pytest.approx(1)
    shape, brain = (20, 20, 10), np.ones((20, 20, 10), bool)
    truth = truth.reshape(shape)
    right = calibration.scores(("members", members.reshape(40, *shape)), truth, brain)
    normal = calibration.scores(("normal", np.zeros(shape), np.ones(shape)), truth, brain)
    for found in (right, normal):
        assert found["in_50%"] == pytest.approx(0.5, abs=0.03) and found["in_90%"] == pytest.approx(0.9, abs=0.03)
        assert found["crps_blocks"] == pytest.approx(1 / np.sqrt(np.pi) / 8, rel=0.2)  # 64 independent voxels
    one = calibration.scores(("members", np.zeros((1, *shape))), truth, brain)
    assert one["crps"] == pytest.approx(np.abs(truth).mean()) and math.isnan(one["in_50%"])
    options, checkpoint = grouped[0], str(grouped[1] / "best_refine.pth")
    calibration.report(checkpoint, settings_of([*options, "--uncertainty_samples", "3"]))
    lines = capsys.readouterr().out.splitlines()
    assert sum("->" in line for line in lines) == 2 * 4 and any("resampled residuals" in line for line in lines)
    with pytest.raises(UserError, match="the split: not the same"):
        calibration.report(checkpoint, settings_of([*options, "--uncertainty_samples", "3", "--fold", "1"]))


def test_a_signal_to_a_benchmark_stops_its_training_and_waits_for_it(tmp_path):
    child = ("import signal, sys, time, pathlib\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(3))\n"
             f"pathlib.Path('{tmp_path}/ready').touch()\ntime.sleep(60)")
    parent = subprocess.Popen([sys.executable, "-c", "import sys; from benchmarks import run_child\n"
                               "sys.exit(run_child([sys.executable, '-c', sys.argv[1]]))", child], cwd=ROOT)
    while not (tmp_path / "ready").exists():
        time.sleep(0.05)
    parent.terminate()
    assert parent.wait(30) == 3
