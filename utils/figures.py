"""Pictures: grids of volumes, three orthogonal slices each, in true proportions; and charts.

Neurological view: the subject's left is on the left (L and R mark it). Volumes are (X, Y, Z) in RAS order and [-1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.utils import make_grid

from utils.files import replace_file

HEIGHT = 120  # pixels of the tallest slice
GAP, LABEL, FONT = 4, 150, 14
CHART = 420  # pixels of a chart's axes
COLOURS = ((31, 90, 180), (200, 80, 20), (20, 130, 70))
RED = np.array([255.0, 40, 40])
HEAT = np.array([[0, 0, 0], [120, 0, 90], [230, 60, 40], [255, 190, 60], [255, 255, 235]], dtype=float)  # 0 .. 1


@dataclass
class Panel:
    """One volume of a grid. kind "grey": -1 black, 1 white; "error": absolute error, 0 black, 1 white."""

    volume: np.ndarray  # (X, Y, Z)
    spacing: np.ndarray  # (3,) mm
    caption: str = ""
    kind: str = "grey"
    overlay: np.ndarray | None = None  # bool (X, Y, Z), drawn in red; the slices are then those with most of it


def _slices(panel: Panel) -> list[np.ndarray]:
    """Axial, coronal and sagittal slice (height, width, 1 or 2) with up and front at the top: volume, and overlay."""
    x, y, z = (n // 2 for n in panel.volume.shape)
    x -= max(1, panel.volume.shape[0] // 16)  # beside the fissure between the hemispheres
    both = panel.volume[..., None]
    if panel.overlay is not None:
        x, y, z = (int(panel.overlay.sum(axis=others).argmax()) for others in ((1, 2), (0, 2), (0, 1)))
        both = np.stack([panel.volume, panel.overlay], axis=-1)
    return [np.rot90(both[:, :, z]), np.rot90(both[:, y, :]), np.rot90(both[x, :, :])]


def _draw(panel: Panel, width: int) -> torch.Tensor:
    """One cell, uint8 (3, HEIGHT + caption, width)."""
    extents = np.array(panel.volume.shape) * panel.spacing
    scale = HEIGHT / max(extents[1], extents[2])
    cell = Image.new("RGB", (width, HEIGHT + FONT + 4))
    left = 0
    for view, (across, up) in zip(_slices(panel), ((0, 1), (0, 2), (1, 2))):
        if panel.kind == "error":
            place = np.clip(view[..., 0], 0, 1) * (len(HEAT) - 1)
            pixels = np.stack([np.interp(place, range(len(HEAT)), HEAT[:, c]) for c in range(3)], axis=-1)
        else:
            pixels = np.repeat((np.clip(view[..., :1], -1, 1) + 1) * 127.5, 3, axis=-1)
            if panel.overlay is not None:
                marked = view[..., 1] > 0
                pixels[marked] = 0.6 * pixels[marked] + 0.4 * RED
        size = (max(1, round(extents[across] * scale)), max(1, round(extents[up] * scale)))
        drawn = Image.fromarray(pixels.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
        cell.paste(drawn, (left, (HEIGHT - size[1]) // 2))
        left += size[0] + GAP
    ImageDraw.Draw(cell).text((2, HEIGHT), panel.caption, fill=(200, 200, 200), font=ImageFont.load_default(FONT - 2))
    return torch.from_numpy(np.asarray(cell).copy()).permute(2, 0, 1)


def _width(panel: Panel) -> int:
    extents = np.array(panel.volume.shape) * panel.spacing
    scale = HEIGHT / max(extents[1], extents[2])
    return int(np.ceil((2 * extents[0] + extents[1]) * scale)) + 3 * GAP


def save_grid(path: Path, title: str, columns: list[str], rows: list[tuple[str, list[Panel | None]]]) -> None:
    """Write a PNG: a title, a header of column names, and rows of (label, one panel per column or None).

    Raises FileError.
    """
    panels = [panel for _, row in rows for panel in row]
    width = max(_width(panel) for panel in panels if panel)
    empty = torch.zeros(3, HEIGHT + FONT + 4, width, dtype=torch.uint8)
    cells = make_grid([_draw(panel, width) if panel else empty for panel in panels], nrow=len(columns), padding=GAP)
    body = Image.fromarray(cells.permute(1, 2, 0).numpy())
    font, top = ImageFont.load_default(FONT), 3 * FONT + 10
    canvas = Image.new("RGB", (LABEL + body.width, top + body.height))
    canvas.paste(body, (LABEL, top))
    draw = ImageDraw.Draw(canvas)
    draw.text((6, 4), title, fill="white", font=font)
    for place, name in enumerate(columns):
        draw.text((LABEL + GAP + place * (width + GAP), 2 * FONT + 2), name, fill=(255, 210, 120), font=font)
    for place, (name, row) in enumerate(rows):
        y = top + GAP + place * (HEIGHT + FONT + 4 + GAP)
        draw.multiline_text((6, y + HEIGHT // 3), name, fill=(160, 210, 255), font=font)
        for column, panel in enumerate(row):
            if panel:
                draw.text((LABEL + GAP + column * (width + GAP) + 1, y), "L", fill=(120, 120, 120), font=font)
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
        for point in zip(x, y):
            draw.circle(at(*point), 4, fill=colour)
        draw.text((left + FONT, bottom - CHART + FONT * (1 + 1.4 * place)), name, fill=colour, font=font)
    replace_file(path, lambda file: canvas.save(file, format="PNG"), 3 * canvas.width * canvas.height)
