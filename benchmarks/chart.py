"""A line chart, drawn with Pillow."""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.files import replace_file

SIZE, LEFT, TOP, GAP, BOTTOM = 420, 80, 40, 15, 70  # pixels: of the axes, and around them
TICKS = 6  # about so many on each axis
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "black", "grey")  # Okabe & Ito 2008


def ticks(low: float, high: float) -> np.ndarray:
    """Round numbers that reach from low or below to high or above."""
    if low == high:
        low, high = low - 1, high + 1
    size = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(size))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= size * (1 - 1e-9))
    return np.arange(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1) * step


def save_chart(path: Path, curves: dict[str, np.ndarray], x_label: str, y_label: str, diagonal: bool = False) -> None:
    """Save a chart of name -> points (N, 2). diagonal: both axes start at 0, and a grey line shows where x = y."""
    points = np.concatenate([*curves.values(), *([np.zeros((1, 2))] if diagonal else [])])
    columns = [points.ravel()] * 2 if diagonal else points.T
    axes = [ticks(column.min(), column.max()) for column in columns]
    font = ImageFont.load_default(14)
    width = max(SIZE + 2 * GAP + max(map(font.getlength, curves)), font.getlength(x_label), font.getlength(y_label))
    canvas = Image.new("RGB", (LEFT + math.ceil(width) + GAP, TOP + SIZE + BOTTOM), "white")
    draw = ImageDraw.Draw(canvas)

    def at(x: float, y: float) -> tuple[float, float]:
        right, up = ((value - axis[0]) / (axis[-1] - axis[0]) for value, axis in zip((x, y), axes))
        return LEFT + right * SIZE, TOP + SIZE - up * SIZE

    (left, right), (bottom, top) = ((axis[0], axis[-1]) for axis in axes)
    for x in axes[0]:
        draw.line([at(x, bottom), at(x, top)], (225, 225, 225))
        draw.text((at(x, bottom)[0], TOP + SIZE + 6), f"{x:.4g}", "black", font, "ma")
    for y in axes[1]:
        draw.line([at(left, y), at(right, y)], (225, 225, 225))
        draw.text((LEFT - 6, at(left, y)[1]), f"{y:.4g}", "black", font, "rm")
    if diagonal:
        draw.line([at(0, 0), at(right, top)], "grey")
    draw.text((LEFT, 15), y_label, "black", font)
    draw.text((LEFT, TOP + SIZE + 35), x_label, "black", font)
    for row, ((name, curve), colour) in enumerate(zip(curves.items(), COLOURS * len(curves))):
        draw.line([at(*point) for point in curve], colour, 2)
        for x, y in (at(*point) for point in curve):
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), colour)
        draw.text((LEFT + SIZE + GAP, TOP + 20 * row), name, colour, font)
    replace_file(path, lambda file: canvas.save(file, format="PNG"))
