"""Pictures: what was handed in is found in the file, in its place; nothing half-written stays."""

import numpy as np
import pytest
from PIL import Image

from regvit_jax.evals.pictures import class_colours, grid, paint, short

RED, GREEN, BLUE, SAND = (250, 10, 20), (10, 250, 20), (10, 20, 250), (220, 200, 90)


def flat(colour, height=8, width=8):
    return np.full((height, width, 3), colour, np.uint8)


def box_of(pixels, colour):
    """(top, bottom, left, right) of the pixels of a colour, and how many there are."""
    found = np.argwhere(np.abs(pixels.astype(int) - colour).sum(axis=-1) < 12)
    return *[int(v) for v in (found[:, 0].min(), found[:, 0].max(), found[:, 1].min(), found[:, 1].max())], len(found)


def read(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_cells_stand_where_they_were_put(tmp_path):
    path = tmp_path / "new" / "a.png"
    scale = {"cmap": "viridis", "vmin": 0, "vmax": 1}
    rows = [[flat(RED), flat(GREEN, 8, 16)], [flat(BLUE, 16, 8), None], [(np.full((4, 4), 0.5), scale), None]]
    grid(path, rows, ["first", "second $x"], ["a$b_c$.png", "two\nlines", ""])
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]
    pixels = read(path)
    red, green, blue = (box_of(pixels, colour) for colour in (RED, GREEN, BLUE))
    assert red[3] < green[2] and red[1] < blue[0] and green[1] < blue[0]
    # Shapes are kept: a square, twice as wide as high, twice as high as wide.
    for (top, bottom, left, right, count), ratio in ((red, 1), (green, 0.5), (blue, 2)):
        height, width = bottom - top + 1, right - left + 1
        assert height / width == pytest.approx(ratio, rel=0.05) and count > 0.9 * height * width > 4000
    assert box_of(pixels, (33, 145, 140))[0] > blue[1]
    assert box_of(pixels, (0, 0, 0))[2] < red[2], "the titles are left of the images"


def test_boxes_legend_and_scales_are_drawn(tmp_path):
    photo = (flat(SAND, 40, 40), {"boxes": [(10, 20, 30, 40, RED), (0, 0, 5, 5, "#0a14fa")]})
    scale = {"cmap": "viridis", "vmin": 0, "vmax": 1}
    legend = [(GREEN, "a class"), ("0.5", "of $ value")]
    grid(tmp_path / "a.png", [[photo, (np.zeros((4, 4)), scale)]], ["a", "b"], ["x"], legend, bars={1: "metres"})
    pixels = read(tmp_path / "a.png")
    photo, red, blue = (box_of(pixels, colour) for colour in (SAND, RED, BLUE))
    side = (photo[1] - photo[0] + 1) / 40
    top, bottom, left, right, _ = red
    assert np.allclose([top - photo[0], bottom - photo[0]], [20 * side, 40 * side], atol=4)
    assert np.allclose([left - photo[2], right - photo[2]], [10 * side, 30 * side], atol=4)
    assert blue[1] < top and blue[3] < left + 5
    assert box_of(pixels, GREEN)[0] > photo[1], "the legend is below"
    yellow = box_of(pixels, (253, 231, 37))
    assert yellow[0] > photo[1] and yellow[2] > photo[3], "the end of the scale, under the second column"


def test_a_picture_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.png"
    grid(path, [[flat(RED)]], ["a"], ["x"])
    before = path.read_bytes()
    with pytest.raises(ValueError):
        grid(path, [[(flat(RED), {"cmap": "no such map"})]], ["a"], ["x"])
    assert path.read_bytes() == before


def test_classes_have_colours_of_their_own():
    colours = class_colours(150).astype(int)
    assert colours.shape == (150, 3) and class_colours(150).dtype == np.uint8
    apart = np.abs(colours[:, None] - colours[None]).sum(axis=-1) + 1000 * np.eye(150, dtype=int)
    assert apart.min() > 0 and apart[:18, :18].min() > 30
    # No grey: that is what ignored pixels look like.
    assert np.ptp(colours, axis=1).min() > 20
    np.testing.assert_array_equal(class_colours(12), colours[:12])


def test_what_is_no_class_is_striped_grey():
    classes = np.zeros((64, 64), np.uint8)
    classes[:, 32:] = 255
    painted = paint(classes, np.uint8([RED]))
    assert (painted[:, :32] == RED).all()
    greys = {tuple(pixel) for pixel in painted[:, 32:].reshape(-1, 3).tolist()}
    assert len(greys) == 2 and all(r == g == b for r, g, b in greys)


def test_names_are_shortened_in_the_middle():
    assert short("/data/val/a.png") == "a.png"
    assert short("abcdefghijklmnopqrstuvwxyz.jpeg") == "abcdefghijk…tuvwxyz.jpeg"
