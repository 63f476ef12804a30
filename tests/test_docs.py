"""README and docs are true: settings, options, files, commands and the table of hyperparameters."""

import dataclasses
import re
import shlex

from docs.generate import settings_page
from opt import PRESETS, Options, opt, paper, small
from tests.conftest import ROOT
from utils.arguments import parse_arguments

README = (ROOT / "README.md").read_text()
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text()
         for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *ROOT.glob("docs/*.md"))}
TEXT = "\n".join(PAGES.values())
SETTINGS = {field.name for field in dataclasses.fields(Options)}
OTHER_OPTIONS = {"nnodes", "nproc-per-node", "rdzv-backend", "rdzv-endpoint", "rdzv-id", "nodes", "ntasks-per-node",
                 "gpus-per-node", "signal", "logdir", "cov", "name"}  # of torchrun, sbatch, TensorBoard and pytest
FILES = r"\b((?:data|models|training|synthesis|utils|tests|benchmarks|docs)/[\w.]+\.(?:py|md|png))\b|`(\w+\.(?:py|md))`"


def test_the_page_of_settings_is_up_to_date():
    assert settings_page() == PAGES["docs/settings.md"], "run python -m docs.generate"


def test_named_settings_and_options_exist():
    named = set(re.findall(r"\bopt\.([a-z_]+)", TEXT)) | set(re.findall(r"--([a-z][a-z_0-9-]*)", TEXT))
    in_benchmarks = "\n".join(path.read_text() for path in ROOT.glob("benchmarks/*.py"))
    known = SETTINGS | OTHER_OPTIONS | set(re.findall(r'"--([\w-]+)"', in_benchmarks))
    assert named - {"py", "preset", "help", "names_affecting"} <= known


def test_named_files_and_links_exist():
    assert not [path for match in re.findall(FILES, TEXT) for path in match
                if path and not ((ROOT / path).exists() or (ROOT / "tests" / path).exists())]
    for page, text in PAGES.items():
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT / page).parent.joinpath(link).exists(), (page, link)


def test_every_module_has_a_line_in_contributing_and_the_readme_is_short():
    packages = (".", "benchmarks", "data", "docs", "models", "synthesis", "training", "utils")
    modules = [path.relative_to(ROOT).as_posix() for package in packages for path in (ROOT / package).glob("*.py")]
    assert not [module for module in modules if f"`{module}`" not in PAGES["CONTRIBUTING.md"]
                and not module.endswith("__init__.py")]
    assert len(README.splitlines()) <= 220 and len(README.split()) <= 2000
    assert not [line for line in README.splitlines() if len(line) > 120 and not line.startswith(("|", "!["))]


def test_every_command_parses():
    text = TEXT.replace("\\\n", " ")
    lines = [line for block in text.split("\n```")[1::2] for line in block.splitlines()]  # every other one is code
    lines += [" ".join(command.split()) for command in re.findall(r"`((?:python|torchrun|srun) [^`]*)`", text)]
    programs = 0
    for words in (shlex.split(line, comments=True) for line in lines if re.match("(python|torchrun|srun) ", line)):
        if script := next((word for word in words if word in ("main.py", "sample.py")), ""):
            rest = [word for word in words[words.index(script) + 1:] if word not in ("...", "--help")]
            parse_arguments(opt, PRESETS, rest, "").validate()
            programs += 1
        elif words[1] == "-m" and words[2] not in ("pytest", "venv"):
            text = (ROOT / f"{words[2].replace('.', '/')}.py").read_text()
            assert all(word[2:] in SETTINGS or f'"{word}"' in text for word in words if word.startswith("--")), words
    assert programs >= 7


def test_the_table_of_hyperparameters_is_true():
    checked = set()
    for first, *columns in (line.split("|")[1:4] for line in README.splitlines() if line.startswith("| `")):
        names = re.findall(r"`(\w+)`", first)
        for column, preset in zip(columns, (small(), paper())) if names and set(names) <= SETTINGS else ():
            values = ["x".join(map(str, size)) for size in preset.image_sizes().values()] if names == ["image_size"] \
                else [str(getattr(preset, name)) for name in names]
            for text, value in zip(column.split(","), values, strict=True):
                assert text.strip() == value or float(text) == float(value), first
            checked.update(names)
    assert {"image_size", "learning_rate", "batch_size", "sampling_steps", "unet_depth", "base_channels"} <= checked
