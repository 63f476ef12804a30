"""Grids of volumes, (X, Y, Z) in RAS order and [-1, 1]: three orthogonal slices each; L, R, P, A mark the sides."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_erosion

from utils.files import replace_file

HEIGHT, GAP, TEXT, BAR = 120, 4, 20, 160  # pixels: tallest slice, gaps, letters, colour bars
GREY, ORANGE, OUTLINE = (200, 200, 200), np.array([255.0, 140, 0]), np.array([255.0, 200, 0])
UNKNOWN = np.array([50.0, 70, 60])  # greenish grey: outside the field of view
LARGEST = 0.5  # of [-1, 1]: the end of the colour scales of differences and deviations
VIEWS = ((2, [0, 1], "LR"), (1, [0, 2], "LR"), (0, [1, 2], "PA"))  # axial, coronal, sagittal: normal, axes, sides
# kind of panel: colours at equal distances, values of the first and the last, legend
SCALES = {"grey": (((0, 0, 0), (255, 255, 255)), -1, 1, ""),
          "difference": (((90, 200, 255), (20, 70, 200), (0, 0, 0), (210, 40, 20), (255, 190, 60)), -LARGEST,
                         LARGEST, "difference; blue is too dark, red too bright"),
          "deviation": (((0, 0, 0), (120, 0, 90), (230, 60, 40), (255, 190, 60), (255, 255, 235)), 0.0,
                        LARGEST, "standard deviation")}


@dataclass
class Panel:
    """One volume of a grid. kind: "grey" (-1 black, 1 white), "difference" or "deviation" (colours up to LARGEST)."""

    volume: np.ndarray  # (X, Y, Z); NaN where nothing is known
    spacing: np.ndarray  # (3,) mm
    caption: str = ""
    kind: str = "grey"
    overlay: np.ndarray | None = None  # bool (X, Y, Z), drawn in orange; selects the slices with most of it
    outline: np.ndarray | None = None  # bool (X, Y, Z), its border is drawn in yellow

    def sizes(self) -> np.ndarray:
        """Width and height of the three views in pixels, int (3, 2)."""
        extents = np.array(self.volume.shape) * self.spacing
        sizes = np.array([extents[axes] for _, axes, _ in VIEWS]) * HEIGHT / max(extents[1:])
        return sizes.round().astype(int).clip(1)


def _colour(values: np.ndarray, kind: str) -> np.ndarray:
    """Convert values (height, width) to colours (height, width, 3) in 0 .. 255."""
    colours, low, high, _ = SCALES[kind]
    places = np.linspace(low, high, len(colours))
    pixels = np.stack([np.interp(values, places, channel) for channel in zip(*colours)], axis=-1)
    return np.where(np.isnan(values)[..., None], UNKNOWN, pixels)


def _draw(canvas: Image.Image, panel: Panel, left: int, top: int) -> None:
    """Draw the slices and the caption of a panel, up and front at the top."""
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(TEXT - 2)
    draw.text((left + 2, top + HEIGHT), panel.caption, GREY, font)
    for (axis, _, sides), size in zip(VIEWS, panel.sizes().tolist()):
        index = panel.volume.shape[axis] * (7 if axis == 0 else 8) // 16  # beside the fissure between the hemispheres
        if panel.overlay is not None:
            index = int(panel.overlay.sum(axis=tuple({0, 1, 2} - {axis})).argmax())
        values, overlay, outline = (None if each is None else np.rot90(each.take(index, axis))
                                    for each in (panel.volume, panel.overlay, panel.outline))
        pixels = _colour(values, panel.kind)
        if overlay is not None:
            pixels[overlay] = 0.6 * pixels[overlay] + 0.4 * ORANGE
        pixels = np.array(Image.fromarray(pixels.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC))
        if outline is not None:
            inside = np.asarray(Image.fromarray(outline).resize(size, Image.Resampling.NEAREST))
            pixels[inside & ~binary_erosion(inside)] = OUTLINE
        y, right = top + (HEIGHT - size[1]) // 2, left + size[0]
        canvas.paste(Image.fromarray(pixels), (left, y))
        for side, x, anchor in zip(sides, (left + 1, right - 1), ("la", "ra")):
            draw.text((x, y), side, GREY, font, anchor, stroke_width=1, stroke_fill="black")
        left = right + GAP


def save_grid(path: Path, title: str, columns: list[str], rows: list[tuple[str, list[Panel | None]]]) -> None:
    """Write a PNG: title, column names, rows of (label, a panel or None per column), colour bars. Raises UserError."""
    shown = [panel for _, row in rows for panel in row if panel]
    kinds = [kind for kind in SCALES if kind != "grey" and any(panel.kind == kind for panel in shown)]
    title += ". Neurological view: the subject's left is on the left"
    if any(np.isnan(panel.volume).any() for panel in shown):
        title += ". Greenish: outside the scan"
    font = ImageFont.load_default(TEXT)

    def longest(texts: list[str]) -> int:
        return int(max(font.getlength(line) for text in texts for line in text.split("\n")))

    left = longest([label for label, _ in rows]) + 4 * GAP
    width = max(longest(columns), *(panel.sizes()[:, 0].sum() for panel in shown)) + 4 * GAP
    height, top = HEIGHT + TEXT + 2 * GAP, 3 * TEXT + 3 * GAP
    bottom = top + len(rows) * height
    canvas = Image.new("RGB", (max(left + len(columns) * width, longest([title]) + 2 * GAP),
                               bottom + 2 * TEXT * len(kinds)))
    draw = ImageDraw.Draw(canvas)
    draw.text((GAP, GAP), title, "white", font)
    for column, name in enumerate(columns):
        draw.text((left + column * width, TEXT + 4 * GAP), name, (255, 210, 120), font)
    for row, (label, panels) in enumerate(rows):
        draw.multiline_text((GAP, top + row * height + HEIGHT // 4), label, (160, 210, 255), font)
        for column, panel in enumerate(panels):
            if panel:
                _draw(canvas, panel, left + column * width, top + row * height)
    for row, kind in enumerate(kinds):
        (_, low, high, words), y = SCALES[kind], bottom + 2 * TEXT * row
        bar = _colour(np.linspace(low, high, BAR)[None].repeat(TEXT, axis=0), kind)
        canvas.paste(Image.fromarray(bar.astype(np.uint8)), (left, y))
        draw.text((left + BAR + 2 * GAP, y), f"{low:g} to {high:g} (volumes: -1 to 1), {words}", "white", font)
    replace_file(path, lambda file: canvas.save(file, format="PNG"))
