"""Pictures: grids of volumes, three orthogonal slices each, in true proportions; and charts.

Letters mark the sides: left, right, posterior, anterior. Volumes are (X, Y, Z) in RAS order and [-1, 1].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_erosion
from torchvision.utils import make_grid

from utils.files import replace_file

HEIGHT = 120  # pixels of the tallest slice
GAP, LABEL, FONT = 4, 150, 14
CAPTION = FONT + 4  # pixels of the line under a cell
BAR = 160  # pixels of a colour bar
CHART = 420  # pixels of a chart's axes
COLOURS = ((31, 90, 180), (200, 80, 20), (20, 130, 70))
RED, OUTLINE = np.array([255.0, 40, 40]), np.array([255.0, 200, 0])
LARGEST = 0.5  # of [-1, 1]: where the colours of differences and deviations end
VIEWS = (((0, 1), "LR"), ((0, 2), "LR"), ((1, 2), "PA"))  # axial, coronal, sagittal: axes across and up; sides
# Colours at even distances over the range of a kind of panel, and what the legend says of it
SCALES = {"difference": (np.array([[90, 200, 255], [20, 70, 200], [0, 0, 0], [210, 40, 20], [255, 190, 60]], float),
                         -LARGEST, "difference: blue too dark, red too bright"),
          "deviation": (np.array([[0, 0, 0], [120, 0, 90], [230, 60, 40], [255, 190, 60], [255, 255, 235]], float),
                        0.0, "standard deviation")}


@dataclass
class Panel:
    """One volume of a grid. kind "grey": -1 black, 1 white; "difference" and "deviation": colours, up to LARGEST."""

    volume: np.ndarray  # (X, Y, Z)
    spacing: np.ndarray  # (3,) mm
    caption: str = ""
    kind: str = "grey"
    overlay: np.ndarray | None = None  # bool (X, Y, Z), drawn in red; the slices are then those with most of it
    outline: np.ndarray | None = None  # bool (X, Y, Z), whose border is drawn in yellow


def _slices(panel: Panel) -> Iterator[list[np.ndarray | None]]:
    """Axial, coronal and sagittal slice (height, width) with up and front at the top: of volume, overlay, outline."""
    x, y, z = (n // 2 for n in panel.volume.shape)
    x -= max(1, panel.volume.shape[0] // 16)  # beside the fissure between the hemispheres
    if panel.overlay is not None:
        x, y, z = (int(panel.overlay.sum(axis=others).argmax()) for others in ((1, 2), (0, 2), (0, 1)))
    for place in ((slice(None), slice(None), z), (slice(None), y), (x,)):
        yield [None if each is None else np.rot90(each[place])
               for each in (panel.volume, panel.overlay, panel.outline)]


def _coloured(values: np.ndarray, kind: str) -> np.ndarray:
    """Values (height, width) as they are drawn: (height, width, 3), 0 .. 255."""
    if kind == "grey":
        return np.repeat((np.clip(values[..., None], -1, 1) + 1) * 127.5, 3, axis=-1)
    colours, low, _ = SCALES[kind]
    place = np.clip((values - low) / (LARGEST - low), 0, 1) * (len(colours) - 1)
    return np.stack([np.interp(place, range(len(colours)), colours[:, c]) for c in range(3)], axis=-1)


def _draw(panel: Panel, width: int) -> torch.Tensor:
    """One cell, uint8 (3, HEIGHT + CAPTION, width)."""
    extents = np.array(panel.volume.shape) * panel.spacing
    scale = HEIGHT / max(extents[1], extents[2])
    cell, left, font = Image.new("RGB", (width, HEIGHT + CAPTION)), 0, ImageFont.load_default(FONT - 3)
    draw = ImageDraw.Draw(cell)
    for (view, overlay, outline), ((across, up), sides) in zip(_slices(panel), VIEWS):
        pixels = _coloured(view, panel.kind)
        if overlay is not None:
            pixels[overlay] = 0.6 * pixels[overlay] + 0.4 * RED
        size = (max(1, round(extents[across] * scale)), max(1, round(extents[up] * scale)))
        drawn = np.asarray(Image.fromarray(pixels.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)).copy()
        if outline is not None:
            inside = np.asarray(Image.fromarray(outline).resize(size, Image.Resampling.NEAREST))
            drawn[inside & ~binary_erosion(inside)] = OUTLINE
        top = (HEIGHT - size[1]) // 2
        cell.paste(Image.fromarray(drawn), (left, top))
        for side, place, anchor in zip(sides, (left + 1, left + size[0] - 1), ("la", "ra")):
            draw.text((place, top), side, fill=(200, 200, 200), font=font, anchor=anchor, stroke_width=1,
                      stroke_fill="black")
        left += size[0] + GAP
    draw.text((2, HEIGHT), panel.caption, fill=(200, 200, 200), font=ImageFont.load_default(FONT - 2))
    return torch.from_numpy(np.asarray(cell).copy()).permute(2, 0, 1)


def _width(panel: Panel) -> int:
    extents = np.array(panel.volume.shape) * panel.spacing
    scale = HEIGHT / max(extents[1], extents[2])
    return int(np.ceil((2 * extents[0] + extents[1]) * scale)) + 3 * GAP


def _legend(kinds: list[str]) -> Image.Image:
    """A colour bar for each kind of panel that is coloured, one below the other; nothing where none is."""
    legend, font = Image.new("RGB", (LABEL + 3 * BAR, 2 * FONT * len(kinds))), ImageFont.load_default(FONT - 2)
    draw = ImageDraw.Draw(legend)
    for row, kind in enumerate(kinds):
        _, low, words = SCALES[kind]
        bar = _coloured(np.linspace(low, LARGEST, BAR)[None].repeat(FONT, axis=0), kind)
        legend.paste(Image.fromarray(bar.astype(np.uint8)), (LABEL, 2 * FONT * row))
        draw.text((LABEL - GAP, 2 * FONT * row), f"{low:g}", fill="white", font=font, anchor="ra")
        draw.text((LABEL + BAR + GAP, 2 * FONT * row), f"{LARGEST:g}   {words}, of [-1, 1]", fill="white", font=font)
    return legend


def save_grid(path: Path, title: str, columns: list[str], rows: list[tuple[str, list[Panel | None]]]) -> None:
    """Write a PNG: a title, a header of column names, rows of (label, one panel per column or None), colour bars.

    Raises FileError.
    """
    panels = [panel for _, row in rows for panel in row]
    width = max(_width(panel) for panel in panels if panel)
    empty = torch.zeros(3, HEIGHT + CAPTION, width, dtype=torch.uint8)
    cells = make_grid([_draw(panel, width) if panel else empty for panel in panels], nrow=len(columns), padding=GAP)
    body = Image.fromarray(cells.permute(1, 2, 0).numpy())
    legend = _legend([kind for kind in SCALES if any(panel and panel.kind == kind for panel in panels)])
    font, top = ImageFont.load_default(FONT), 3 * FONT + 10
    title = f"{title}. Neurological view: the subject's left is on the left"
    canvas = Image.new("RGB", (max(LABEL + body.width, LABEL + int(font.getlength(title))),
                               top + body.height + legend.height))
    canvas.paste(body, (LABEL, top))
    canvas.paste(legend, (0, top + body.height))
    draw = ImageDraw.Draw(canvas)
    draw.text((6, 4), title, fill="white", font=font)
    for place, name in enumerate(columns):
        draw.text((LABEL + GAP + place * (width + GAP), 2 * FONT + 2), name, fill=(255, 210, 120), font=font)
    for place, (name, _) in enumerate(rows):
        y = top + GAP + place * (HEIGHT + CAPTION + GAP)
        draw.multiline_text((6, y + HEIGHT // 3), name, fill=(160, 210, 255), font=font)
    replace_file(path, lambda file: canvas.save(file, format="PNG"), 3 * canvas.width * canvas.height)


def save_chart(path: Path, title: str, axes: tuple[str, str], curves: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Write a PNG: curves, name -> (x, y) above 0, with both axes alike from 0, and the diagonal. Raises FileError."""
    most = max(float(np.max(values)) for curve in curves.values() for values in curve) * 1.05
    step = 10.0 ** np.floor(np.log10(most))
    step *= next(part for part in (0.1, 0.2, 0.5, 1.0) if most / (step * part) <= 10)
    canvas = Image.new("RGB", (CHART + 2 * FONT + LABEL, CHART + 8 * FONT), "white")
    draw, font, left, bottom = ImageDraw.Draw(canvas), ImageFont.load_default(FONT), 5 * FONT, CHART + 3 * FONT

    def at(x: float, y: float) -> tuple[float, float]:
        return left + x / most * CHART, bottom - y / most * CHART

    draw.text((FONT, FONT // 2), title, fill="black", font=font)
    for tick in np.arange(0, most, step):
        draw.line([at(tick, 0), at(tick, most)], fill=(225, 225, 225))
        draw.line([at(0, tick), at(most, tick)], fill=(225, 225, 225))
        draw.text(at(tick, 0), f"{tick:.3g}", fill="black", font=font, anchor="ma")
        draw.text((left - 4, at(0, tick)[1]), f"{tick:.3g}", fill="black", font=font, anchor="rm")
    draw.line([at(0, 0), at(most, most)], fill=(120, 120, 120))
    draw.text((left + CHART / 2, bottom + 2 * FONT), axes[0], fill="black", font=font, anchor="ma")
    draw.text((left, bottom - CHART - FONT - 4), axes[1], fill="black", font=font)
    for place, (name, (x, y)) in enumerate(curves.items()):
        colour = COLOURS[place % len(COLOURS)]
        draw.line([at(*point) for point in zip(x, y)], fill=colour, width=2)
        for across, up in map(at, x, y):
            draw.ellipse((across - 4, up - 4, across + 4, up + 4), fill=colour)
        draw.text((left + FONT, bottom - CHART + FONT * (1 + 1.4 * place)), name, fill=colour, font=font)
    replace_file(path, lambda file: canvas.save(file, format="PNG"), 3 * canvas.width * canvas.height)
