"""The README names only what exists: settings, options, files."""

from __future__ import annotations

import dataclasses
import re

import pytest

from opt import Options, paper, small
from tests.conftest import ROOT
from utils.metrics import COLUMNS

README = (ROOT / "README.md").read_text()
# options of torchrun and sbatch
LAUNCHERS = {"nnodes", "nproc-per-node", "rdzv-backend", "rdzv-endpoint", "rdzv-id", "nodes", "ntasks-per-node",
             "gpus-per-node", "signal"}
SETTINGS = {each.name for each in dataclasses.fields(Options)}


def test_settings_and_options_exist():
    named = set(re.findall(r"\bopt\.([a-z_]+)", README)) | set(re.findall(r"--([a-z][a-z_0-9-]*)", README))
    own = {word for name in ("ablation", "refine_ablation", "step", "ranks", "kills")
           for word in re.findall(r'"--([a-z0-9]+)"', (ROOT / f"benchmarks/{name}.py").read_text())}
    assert named - {"py", "preset", "help", "cov"} - own - LAUNCHERS <= SETTINGS
    words = set(re.findall(r"\w+", README))
    assert {"image_size", "learning_rate", "timesteps", "unet_depth", "base_channels"} <= words


FILES = r"\b((?:data|models|utils|tests|benchmarks|docs)/[\w.]+\.\w+)"


@pytest.mark.parametrize("path", sorted(set(re.findall(FILES, README))))
def test_files_exist(path):
    assert (ROOT / path).exists()


def test_the_constants_the_readme_names():
    for name in ("train.py", "train_refine.py"):
        assert re.search(r"^save_every = 100\b", (ROOT / name).read_text(), re.MULTILINE)
    assert ",".join(COLUMNS) in README


def test_the_table_of_hyperparameters_is_true():
    cells = {}
    for line in README.splitlines():
        if line.startswith("| `"):
            names, ours, theirs = (cell.strip() for cell in line.split("|")[1:4])
            cells[tuple(re.findall(r"`(\w+)`", names))] = (ours, theirs)
    for names, columns in cells.items():
        if not names or not set(names) <= SETTINGS:
            continue
        for column, preset in zip(columns, (small(), paper())):
            if names == ("image_size",):
                values = ["x".join(map(str, size)) for size in preset.image_sizes().values()]
            else:
                values = [str(getattr(preset, name)) for name in names]
            shown = [each.strip() for each in column.split(",")]
            assert len(shown) == len(values)
            for text, value in zip(shown, values):
                assert text == value or float(text) == float(value), names


def test_folders_for_outputs_exist_and_their_contents_are_ignored():
    ignored = (ROOT / ".gitignore").read_text()
    for name in ("checkpoints", "results"):
        assert (ROOT / name).is_dir() and f"/{name}/*" in ignored
