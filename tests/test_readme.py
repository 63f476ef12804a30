"""README and docs name only what exists: settings, options, files, commands; and what is generated is up to date."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections import Counter

import numpy as np
from PIL import Image

from docs import generate
from opt import PRESETS, Options, opt, paper, small
from tests.conftest import ROOT
from utils.arguments import parse_arguments
from utils.metrics import COLUMNS

README = (ROOT / "README.md").read_text()
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text()
         for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *ROOT.glob("docs/*.md"))}
TEXT = "\n".join(PAGES.values())
# options of torchrun and sbatch
LAUNCHERS = {"nnodes", "nproc-per-node", "rdzv-backend", "rdzv-endpoint", "rdzv-id", "nodes", "ntasks-per-node",
             "gpus-per-node", "signal", "logdir"}
SETTINGS = {each.name for each in dataclasses.fields(Options)}


def test_settings_and_options_exist():
    named = set(re.findall(r"\bopt\.([a-z_]+)", TEXT)) | set(re.findall(r"--([a-z][a-z_0-9-]*)", TEXT))
    own = {word for name in ("ablation", "refine_ablation", "step", "ranks", "kills")
           for word in re.findall(r'"--([a-z0-9]+)"', (ROOT / f"benchmarks/{name}.py").read_text())}
    assert named - {"py", "preset", "help", "cov", "name"} - own - LAUNCHERS <= SETTINGS
    words = set(re.findall(r"\w+", README))
    assert {"image_size", "learning_rate", "timesteps", "unet_depth", "base_channels"} <= words


FILES = r"\b((?:data|models|utils|tests|benchmarks|docs)/[\w.]+\.(?:py|md|png))\b|`(\w+\.(?:py|md))`"


def test_files_and_links_exist():
    for path in {first or second for first, second in re.findall(FILES, TEXT)}:
        assert (ROOT / path).exists(), path
    for page, text in PAGES.items():
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT / page).parent.joinpath(link).exists(), (page, link)


def commands() -> list[list[str]]:
    """The words of every command in README and docs that starts a program of this project."""
    text = TEXT.replace("\\\n", " ")
    blocks = [line for block in text.split("\n```")[1::2] for line in block.splitlines()]  # every other one is code
    inline = [" ".join(each.split()) for each in re.findall(r"`((?:python|torchrun|srun)\b[^`]*)`", text)]
    found = [shlex.split(line, comments=True) for line in [*blocks, *inline]
             if re.match(r"(python|torchrun|srun|pip|ruff|\.ci/run|tensorboard)\b|\.ci", line)]
    return [words for words in found if len(words) > 1]  # else it is only mentioned


def test_every_command_is_understood():
    seen = Counter()
    for words in commands():
        script = next((word for word in words if word in ("main.py", "sample.py")), "")
        if script:
            rest = [word for word in words[words.index(script) + 1:] if word not in ("...", "--help")]
            settings = parse_arguments(opt, PRESETS, rest, "")
            settings.validate()
        elif words[:2] == ["python", "-m"]:
            module = words[2]
            assert module in ("pytest", "venv") or (ROOT / f"{module.replace('.', '/')}.py").exists(), words
            for option in (word for word in words[3:] if word.startswith("--") and module.startswith("benchmarks")):
                assert option[2:] in SETTINGS or f'"{option}"' in (ROOT / f"{module.replace('.', '/')}.py").read_text()
        else:
            assert words[0] in ("pip", "ruff", ".ci/run", "tensorboard", "python"), words
        seen[script or words[0]] += 1
    assert seen["main.py"] > 8 and seen["sample.py"] >= 2 and seen["python"] > 10


def test_what_is_generated_is_up_to_date(tmp_path):
    generate.generate(tmp_path)
    assert (tmp_path / "settings.md").read_text() == PAGES["docs/settings.md"], "run python -m docs.generate"
    drawn, kept = (np.asarray(Image.open(folder / "architecture.png")) for folder in (tmp_path, ROOT / "docs"))
    assert drawn.shape == kept.shape and np.mean(drawn != kept) < 0.02, "run python -m docs.generate"


def test_every_module_has_its_line():
    """CONTRIBUTING.md's map of the code is complete."""
    modules = [path.relative_to(ROOT).as_posix() for folder in (".", "models", "data", "utils")
               for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py"]
    assert len(modules) > 30
    assert not [name for name in modules if f"`{name}`" not in PAGES["CONTRIBUTING.md"]]


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
