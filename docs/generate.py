"""Write what in docs/ is made from the code: settings.md, and the figure of the architecture.

    python -m docs.generate
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from models.unet import DualModalUNet
from opt import Options, paper, small
from utils.arguments import comments, shown

FOLDER = Path(__file__).resolve().parent
COLOURS = {"in": (225, 225, 225), "block": (190, 215, 245), "attention": (250, 215, 160), "resample": (205, 235, 205),
           "out": (245, 200, 200)}
BOX, GAP, FONT = (190, 46), 26, 13


def settings_page() -> str:
    """docs/settings.md: every setting of opt.py with its default, what paper() has instead, and its comment."""
    lines = ["# Settings", "",
             "Every setting of `opt.py`, generated from it by `python -m docs.generate`. Set it there",
             "(`opt.name = value`), or for one run on the command line (`--name value`). Where `paper()` differs from",
             "`small()`, the default, its value stands in brackets."]
    default, published, heading = small(), paper(), ""
    texts = comments(Options)
    for setting in dataclasses.fields(Options):
        under, text = texts[setting.name]
        if under != heading:
            lines += ["", f"## {under}", "", "| setting | default | |", "|---|---|---|"]
            heading = under
        ours, theirs = (shown(getattr(preset, setting.name)) for preset in (default, published))
        value = f"`{ours}`" + (f" [`{theirs}`]" if theirs != ours else "")
        lines.append(f"| `{setting.name}` | {value} | {text.replace('|', ' or ')} |")
    return "\n".join(lines) + "\n"


def shapes(preset: Options, source: str, target: str) -> dict[str, tuple[int, ...]]:
    """Module of the network of one direction -> shape (C, X, Y, Z) of what it puts out, without computing anything."""
    sizes, found = preset.image_sizes(), {}

    def note(name: str, out: torch.Tensor) -> None:
        found.setdefault(name, tuple(out.shape[1:]))

    with torch.device("meta"):
        network = DualModalUNet(sizes, **preset.network_arguments())
        direction = network.direction(source, target)
        for name, module in direction.named_modules():
            if name:
                module.register_forward_hook(lambda _, __, out, name=name: note(name, out))
        volumes = [torch.zeros(1, 1, *sizes[name]) for name in (source, target)]
        direction(*volumes, torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    return found


def boxes(preset: Options, source: str, target: str) -> list[tuple[str, str, int, int, tuple[int, ...] | None]]:
    """(words, colour, column, row, shape) of every box of the figure."""
    found, sizes, depth = shapes(preset, source, target), preset.image_sizes(), preset.unet_depth
    drawn = [(f"noisy {source}, means,\nnoisy {target}", "in", 0, 0, (1, *sizes[source])),
             (f"patches of {preset.patch_size} voxels,\nstem", "block", 1, 0, found["body.stem"])]
    for level in range(depth):
        drawn.append((f"level {level}: {preset.res_blocks} residual", "block", 2, level,
                      found[f"body.down.{level}.{preset.res_blocks - 1}"]))
        if isinstance(found.get(f"body.attend.{level}.qkv"), tuple):
            drawn.append(("self-attention", "attention", 3, level, found[f"body.attend.{level}"]))
    drawn.append(("middle: 1 residual", "block", 4, depth - 1, found["body.middle"]))
    for level in range(depth - 1):
        drawn.append((f"level {level}: {preset.res_blocks} residual,\nwith the skip", "block", 4, level,
                      found[f"body.up.{level}.{preset.res_blocks - 1}"]))
    last = f"output.{preset.output_blocks - 1}"
    drawn += [(f"noisy {target}, mean,\nnoisy {source}", "in", 0, depth, (1, *sizes[target])),
              ("patches, stem", "block", 1, depth, found["target_stem"]),
              (f"resampled to the grid\nof {target}", "resample", 5, 0, (found["body.stem"][0],
                                                                        *found["target_stem"][1:])),
              (f"joined: {preset.output_blocks} residual", "block", 5, depth, found[last]),
              ("head, voxels", "block", 6, depth, (1, *sizes[target])),
              (f"+ gain(t) x noisy {target}\n= {preset.prediction} of {target}", "out", 6, 0, (1, *sizes[target])),
              ("timesteps (and group):\nembedded, added in\nevery residual block", "in", 0, 1, None)]
    return drawn


def draw_architecture(path: Path, preset: Options, source: str, target: str) -> None:
    """The network of one direction as boxes with their shapes; arrows are the way of the data."""
    drawn = boxes(preset, source, target)
    at = {(column, row): (GAP + column * (BOX[0] + GAP), 60 + row * (BOX[1] + 2 * GAP + FONT))
          for _, _, column, row, _ in drawn}
    size = max(x for x, _ in at.values()) + BOX[0] + GAP, max(y for _, y in at.values()) + BOX[1] + 3 * GAP
    canvas = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(FONT)
    depth = preset.unet_depth
    ways = [((0, 0), (1, 0)), ((1, 0), (2, 0)), ((4, 0), (5, 0)), ((0, depth), (1, depth)), ((1, depth), (5, depth)),
            ((5, 0), (5, depth)), ((5, depth), (6, depth)), ((6, depth), (6, 0))]
    for level in range(depth):
        right = [(3, level)] if (3, level) in at else []
        stops = [(2, level), *right, (4, level)]
        ways += list(zip(stops, stops[1:]))
        if level:
            ways += [((2, level - 1), (2, level)), ((4, level), (4, level - 1))]
    for start, end in ways:
        _arrow(draw, at[start], at[end])
    for words, colour, column, row, shape in drawn:
        x, y = at[column, row]
        draw.rounded_rectangle((x, y, x + BOX[0], y + BOX[1]), 6, fill=COLOURS[colour], outline="black")
        draw.multiline_text((x + BOX[0] / 2, y + BOX[1] / 2), words, fill="black", font=font, anchor="mm",
                            align="center", spacing=1)
        if shape:
            draw.text((x + BOX[0] / 2, y + BOX[1] + 2), f"{shape[0]} x {' x '.join(map(str, shape[1:]))}",
                      fill=(90, 90, 90), font=font, anchor="ma")
    draw.text((GAP, 14), f"One direction, {source} -> {target}, of small(): channels x X x Y x Z. The model has two "
              "such networks, one for each direction.", fill="black", font=ImageFont.load_default(FONT + 2))
    canvas.save(path)


def _arrow(draw: ImageDraw.ImageDraw, start: tuple[int, int], end: tuple[int, int]) -> None:
    (x0, y0), (x1, y1) = start, end
    if y0 == y1:
        points = (x0 + BOX[0], y0 + BOX[1] / 2), (x1, y1 + BOX[1] / 2)
        tip = [(x1, y1 + BOX[1] / 2), (x1 - 7, y1 + BOX[1] / 2 - 4), (x1 - 7, y1 + BOX[1] / 2 + 4)]
    else:
        down = 1 if y1 > y0 else -1
        begin, stop = (y0 + BOX[1], y1) if down > 0 else (y0, y1 + BOX[1])
        middle = x0 + BOX[0] * 0.85
        points = (middle, begin), (middle, stop)
        tip = [(middle, stop), (middle - 4, stop - 7 * down), (middle + 4, stop - 7 * down)]
    draw.line(points, fill="black", width=2)
    draw.polygon(tip, fill="black")


def generate(folder: Path) -> None:
    (folder / "settings.md").write_text(settings_page())
    draw_architecture(folder / "architecture.png", small(), "fmri", "dmri")


if __name__ == "__main__":
    generate(FOLDER)
