"""What a run leaves to look at: pictures, curves, and what tells it apart."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from PIL import Image

import main
from opt import small
from tests.conftest import arguments, read_csv
from utils import board
from utils.figures import LARGEST, OUTLINE, Panel, save_chart, save_grid


def test_run_json_tells_a_run_apart(trained):
    for stage, folder in (("stage 1", "stage1"), ("stage 2", "refine")):
        told = json.loads((trained / "results" / folder / "run.json").read_text())
        assert told["stage"] == stage
        start = told["starts"][0]
        assert start["settings"].keys() == small().as_dict().keys() and start["step"] == 0
        assert start["changed"]["base_channels"] == 8 and "timesteps" not in start["changed"]
        assert start["versions"]["torch"] and start["machine"]["cores"] >= 1 and told["fingerprints"]["data"]
        roles = {row["subject"]: row["role"] for row in read_csv(trained / "results" / folder / "split.csv")}
        assert all(roles[name] == role for role, names in told["split"].items() for name in names)
        assert (trained / "results" / folder / "run_id.txt").read_text().strip() == told["run_id"]


def test_log_has_a_row_for_every_step_validation_and_grid(trained):
    for folder, metric in (("stage1", "x0_error"), ("refine", "psnr")):
        rows = read_csv(trained / "results" / folder / "log.csv")
        kinds = {kind: [row for row in rows if row["kind"] == kind] for kind in ("training", "validation", "samples")}
        assert [int(row["step"]) for row in kinds["training"]] == list(range(1, len(kinds["training"]) + 1))
        assert all(float(row[metric]) > 0 for row in kinds["validation"])
        assert kinds["samples"] and all(float(row["psnr"]) > 0 and float(row["ssim"]) <= 1 for row in kinds["samples"])
        assert {path.name for path in (trained / "results" / folder).glob("step_*.png")} == {
            f"step_{int(row['step']):06d}.png" for row in kinds["samples"]}


def test_the_strip_from_noise_is_drawn(trained):
    rows = [row for row in read_csv(trained / "results/stage1/log.csv") if row["kind"] == "samples"]
    strips = sorted((trained / "results/stage1").glob("denoising_*.png"))
    assert [path.name for path in strips] == [f"denoising_{int(row['step']):06d}.png" for row in rows]
    picture = np.asarray(Image.open(strips[-1]).convert("L"), dtype=float)
    assert picture.std() > 20


def grid(tmp_path, *panels: Panel) -> np.ndarray:
    save_grid(tmp_path / "grid.png", "title", [str(n) for n in range(len(panels))], [("row", list(panels))])
    return np.asarray(Image.open(tmp_path / "grid.png")).astype(int)


def test_a_difference_is_symmetric_and_has_a_colour_bar(tmp_path):
    """Too bright is red, too dark is blue, alike is black; the bar below has both ends."""
    shape, spacing = (20, 20, 20), np.ones(3)
    pictures = [grid(tmp_path, Panel(np.full(shape, value), spacing, kind="difference"))[60:150, 160:250]
                for value in (-LARGEST / 2, 0.0, LARGEST / 2)]
    red, blue = ([picture[..., channel].mean() for picture in pictures] for channel in (0, 2))
    assert red[2] > 150 > 30 > red[0] and blue[0] > 150 > 60 > blue[2] and red[1] < 10 and blue[1] < 10
    whole = grid(tmp_path, Panel(np.zeros(shape), spacing, kind="difference"))
    without = grid(tmp_path, Panel(np.zeros(shape), spacing))
    assert len(whole) > len(without) and whole[-25:, 150:310].max() > 200


def test_an_outline_is_a_border_and_keeps_the_slices(tmp_path):
    volume, mask = np.zeros((20, 20, 20)), np.zeros((20, 20, 20), dtype=bool)
    mask[4:16, 4:16, 4:16] = True
    picture = grid(tmp_path, Panel(volume, np.ones(3), outline=mask))
    yellow = (picture == OUTLINE).all(axis=-1)
    assert 200 < yellow.sum() < 0.1 * yellow.size
    rows, columns = np.nonzero(yellow[:, :280])
    assert not yellow[(rows.min() + rows.max()) // 2, (columns.min() + columns.max()) // 2]


def test_a_chart_has_its_points_on_the_diagonal(tmp_path):
    values = np.array([0.01, 0.1, 0.2])
    save_chart(tmp_path / "chart.png", "title", ("x", "y"), {"a": (values, values)})
    picture = np.asarray(Image.open(tmp_path / "chart.png")).astype(int)
    rows, columns = np.nonzero((picture == (31, 90, 180)).all(axis=-1) & (np.arange(picture.shape[0])[:, None] > 80))
    assert len(rows) > 100 and np.abs(rows + columns - np.median(rows + columns)).max() < 12


# ---- TensorBoard


def curves(folder) -> dict[str, list[tuple[int, float]]]:
    """tag -> (step, value) of all event files in a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), {"scalars": 0, "images": 0}).Reload()
    return {tag: [(each.step, each.value) for each in found.Scalars(tag)] for tag in found.Tags()["scalars"]} | {
        tag: [(each.step, each.width) for each in found.Images(tag)] for tag in found.Tags()["images"]}


def test_curves_and_grids_are_continued_not_doubled(study_csv, tmp_path, capsys):
    pytest.importorskip("tensorboard")
    words = arguments(study_csv, tmp_path, "--tensorboard")
    assert main.main([*words, "--max_steps", "2"]) == 0
    assert main.main([*words, "--max_steps", "4"]) == 0
    found, rows = curves(tmp_path / "results/stage1/tensorboard"), read_csv(tmp_path / "results/stage1/log.csv")
    losses = [(int(row["step"]), float(row["loss"])) for row in rows if row["kind"] == "training"]
    assert [step for step, _ in found["training/loss"]] == [1, 2, 3, 4] == [step for step, _ in losses]
    assert [value for _, value in found["training/loss"]] == pytest.approx([value for _, value in losses], rel=1e-4)
    assert len(found["validation/x0_error"]) == sum(row["kind"] == "validation" for row in rows)
    assert [step for step, _ in found["step"]] == [2, 4] and found["samples/psnr"]
    told = json.loads((tmp_path / "results/stage1/run.json").read_text())
    assert [start["step"] for start in told["starts"]] == [0, 2]
    assert [start["settings"]["max_steps"] for start in told["starts"]] == [2, 4]


def test_its_failure_stops_nothing_and_its_absence_is_told_once(tmp_path, capsys, monkeypatch):
    pytest.importorskip("tensorboard")
    written = board.Board(tmp_path, [], 0)
    monkeypatch.setattr(written._writer, "add_scalar", lambda *_: 1 / 0)
    for step in range(3):
        written.add("training", step, {"loss": 1.0})
    written.picture(tmp_path / "none.png", 3)
    assert capsys.readouterr().out.count("TensorBoard failed") == 1
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    absent = board.Board(tmp_path, [], 0)
    for step in range(3):
        absent.add("training", step, {"loss": 1.0})
    assert capsys.readouterr().out.count("not installed") == 1
