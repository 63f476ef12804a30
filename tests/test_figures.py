"""utils/figures.py: grids of volumes."""

import numpy as np
from PIL import Image, ImageFont

from utils.figures import GAP, LARGEST, OUTLINE, TEXT, Panel, save_grid

SHAPE, SPACING = (20, 20, 20), np.ones(3)
TOP, LEFT = 3 * TEXT + 3 * GAP, int(ImageFont.load_default(TEXT).getlength("row")) + 4 * GAP  # of the first cell


def draw(tmp_path, *panels: Panel | None) -> np.ndarray:
    save_grid(tmp_path / "grid.png", "title", [str(n) for n in range(len(panels))], [("row", list(panels))])
    return np.asarray(Image.open(tmp_path / "grid.png")).astype(int)


def test_a_grid_shows_each_volume_in_its_cell_and_its_right_side_on_the_right(tmp_path):
    volume = -np.ones(SHAPE)
    volume[12:, :, 12:] = 1  # right and up
    picture = draw(tmp_path, Panel(np.ones(SHAPE), SPACING), Panel(volume, SPACING), None)
    cells = picture[TOP:TOP + 120, LEFT:].mean(axis=-1)
    assert cells[:, :120].mean() > 240 and cells[:, -300:].mean() < 5 and not list(tmp_path.glob(".*"))
    coronal = cells[:, 376 + 124:376 + 244]  # the middle of the second cell's three views
    assert coronal[10:40, 80:110].mean() > 240 and coronal[60:].mean() < 5 and coronal[:, 20:60].mean() < 5


def test_differences_are_symmetric_and_have_a_colour_bar(tmp_path):
    """Too bright is red, too dark is blue, equal is black; the bar below has both ends."""
    pictures = [draw(tmp_path, Panel(np.full(SHAPE, value), SPACING, kind="difference"))
                for value in (-LARGEST / 2, 0.0, LARGEST / 2)]
    red, blue = ([picture[TOP + 4:TOP + 94, LEFT + 6:LEFT + 96, channel].mean() for picture in pictures]
                 for channel in (0, 2))
    assert red[2] > 150 > 30 > red[0] and blue[0] > 150 > 60 > blue[2] and red[1] < 10 and blue[1] < 10
    without_bar = draw(tmp_path, Panel(np.zeros(SHAPE), SPACING))
    assert pictures[1][-2 * TEXT:, LEFT:LEFT + 160].max() > 200 and len(pictures[1]) > len(without_bar)


def test_an_outline_is_a_border_and_an_overlay_selects_the_slices(tmp_path):
    mask = np.zeros(SHAPE, dtype=bool)
    mask[4:16, 4:16, 4:16] = True
    yellow = (draw(tmp_path, Panel(np.zeros(SHAPE), SPACING, outline=mask)) == OUTLINE).all(axis=-1)
    assert 200 < yellow.sum() < 0.1 * yellow.size
    rows, columns = np.nonzero(yellow[:, :LEFT + 126])
    assert not yellow[(rows.min() + rows.max()) // 2, (columns.min() + columns.max()) // 2]
    mask[6:, :, :], mask[:, 6:, :], mask[:, :, 6:] = False, False, False  # no middle slice shows the rest
    picture = draw(tmp_path, Panel(-np.ones(SHAPE), SPACING, overlay=mask))[TOP + 4:TOP + 124, LEFT:]
    assert all((picture[:, left:left + 120, 0] > 90).any() for left in (0, 124, 248))
