"""Write docs/settings.md from opt.py: `python -m docs.generate`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from opt import Options, paper, small
from utils.arguments import comments, shown
from utils.settings import AFFECTS

HEAD = """# Settings

Every setting of `opt.py`, generated from it by `python -m docs.generate`. Set it there (`opt.name = value`), or for one
run on the command line (`--name value`). The value of `paper()` stands in brackets where it differs from the default,
`small()`. The last column is what a setting affects, and so when it may change: a run resumes only while the settings
that affect it have the values it was started with.

"""


def settings_page() -> str:
    """The page: a table under each heading of opt.py, with name, default, comment and effect of each setting."""
    default, published, texts, heading = small(), paper(), comments(Options), ""
    lines = [f"- **{kind}**: {meaning}" for kind, meaning in AFFECTS.items()]
    for field in dataclasses.fields(Options):
        if texts[field.name][0] != heading:
            heading = texts[field.name][0]
            lines += ["", f"## {heading}", "", "| setting | default | meaning | affects |", "|---|---|---|---|"]
        value, other = (shown(getattr(preset, field.name)) for preset in (default, published))
        values = (f"`{value}`" if value != "empty" else "(none)") + (f" [`{other}`]" if other != value else "")
        text = texts[field.name][1].replace("|", " or ")
        lines.append(f"| `{field.name}` | {values} | {text} | {field.metadata.get('affects', 'training')} |")
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("settings.md").write_text(settings_page())
