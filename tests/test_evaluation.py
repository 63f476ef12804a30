"""benchmarks/uncertainty.py and benchmarks/memorisation.py: what sample.py made is judged."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sample
from benchmarks import memorisation, uncertainty
from opt import PRESETS, opt
from synthesis.model import TrainedModel
from tests.conftest import BOTH, ball, decoded, read_csv
from tests.test_sample import rows_of, words, write_csv
from utils.arguments import parse_arguments
from utils.errors import UserError
from utils.stop import Interrupted, stop

settings_of = functools.partial(parse_arguments, opt, PRESETS, description="test")


def test_deviations_of_the_size_of_the_errors(tmp_path, capsys):
    errors = [size * np.sign(np.random.default_rng(0).normal(size=4000)) for size in (0.1, 0.2)]
    uncertainty.write_report(tmp_path, [{"subject": str(n), "direction": "a->b",
                                         **uncertainty.reliability(np.abs(error), error)}
                                        for n, error in enumerate(errors)])
    for row, size in zip(read_csv(tmp_path / "uncertainty.csv"), (0.1, 0.2)):
        assert (float(row["deviation"]), float(row["error"])) == pytest.approx((size, size), abs=1e-4)
    assert "a->b: standard deviation 0.158, error 0.158" in capsys.readouterr().out
    assert (tmp_path / "calibration.png").exists()


@pytest.mark.parametrize("space", ["target", "source"])
def test_uncertainty_of_translations(trained, study_csv, tmp_path, space):
    table = write_csv(tmp_path / "pairs.csv", rows_of(study_csv)[:2])
    command = words(trained / "checkpoints/best_refine.pth", table, tmp_path, "--output_space", space)
    assert sample.main([*command, "--uncertainty_samples", "3"]) == 0
    uncertainty.report(tmp_path / "out/translated", settings_of(command))
    rows = read_csv(tmp_path / "out/translated/uncertainty.csv")
    assert len(rows) == 4 and all(float(row["error"]) > 0 and float(row["deviation"]) > 0 for row in rows)
    with pytest.raises(UserError, match="no translations of"):
        uncertainty.report(tmp_path / "out/translated", settings_of(
            [*command, "--resume_path", str(trained / "checkpoints/best_model.pth")]))


def test_the_training_set_is_read_once_per_batch_and_a_stop_is_obeyed(monkeypatch):
    def volumes(positions: list[int]) -> dict[str, torch.Tensor]:
        loads.append(positions)
        return {"fmri": torch.from_numpy(np.stack([ball(4, 4, 4, seed=i) for i in positions])[:, None])}

    monkeypatch.setattr(memorisation, "BATCH", 2)
    loads, pairs = [], [SimpleNamespace(name=f"sub-{n}") for n in range(4)]
    study = SimpleNamespace(trained_on=[0, 1, 2, 3, 4], has=lambda modality, i: i < 4, pairs=pairs, volumes=volumes)
    nearest = functools.partial(memorisation.nearest_training_volumes, study, "fmri")
    found = nearest((ball(4, 4, 4, seed=n) + n for n in (3, 1, 0)), flips=False)
    assert len(loads) == 2 * 4 and [name for _, name in found] == ["sub-3", "sub-1", "sub-0"]
    assert [distance for distance, _ in found] == pytest.approx([3, 1, 0], abs=1e-5)
    mirrored = np.flip(ball(4, 4, 4, seed=2), 0)
    assert nearest(iter([mirrored]), flips=True) == [(0, "sub-2")]
    monkeypatch.setattr(stop, "reason", "test")
    with pytest.raises(Interrupted):
        nearest(iter([mirrored]), flips=True)


def test_copies_of_training_volumes_are_flagged(trained, study_csv, tmp_path, monkeypatch, capsys):
    def copy_and_negative(model: TrainedModel, numbers: list[int], groups: list[str]) -> dict[str, np.ndarray]:
        copies = {modality: decoded(study_csv.parent / f"{copied}_space-MNI_{modality}.nii.gz",
                                    model.readings[modality], tmp_path)[0] for modality in BOTH}
        return {modality: np.stack([copy, -copy]) for modality, copy in copies.items()}

    split = read_csv(trained / "results/stage1/split.csv")
    copied = next(row["subject"] for row in split if row["role"] == "train")
    monkeypatch.setattr(TrainedModel, "draw", copy_and_negative)
    command = words(trained / "checkpoints/best_model.pth", study_csv, tmp_path)
    assert sample.main([*command, "--joint_samples", "2"]) == 0
    at = command.index("--data_root")  # not given: the study that the model was trained on
    memorisation.report(tmp_path / "out/joint", settings_of(command[:at] + command[at + 2:]))
    for row in read_csv(tmp_path / "out/joint/memorisation.csv"):
        is_copy = row["subject"] == "sub-synth000001"
        assert (row["flagged"] == "yes") == (float(row["distance"]) < 0.05) == (row["nearest"] == copied) == is_copy
    assert capsys.readouterr().out.count("1 of 2 samples are closer to a training volume than any held-out") == 2
    table = write_csv(tmp_path / "pairs.csv", rows_of(study_csv)[1:])
    with pytest.raises(UserError, match="give --data_root"):
        memorisation.report(tmp_path / "out/joint", settings_of([*command, "--data_root", str(table)]))
