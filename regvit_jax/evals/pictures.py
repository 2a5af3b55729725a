"""Pictures that evaluators write: images and maps in a grid, one row a sample, as one PNG file.

    grid("out/depth.png", rows=[[photo, (depth, {"cmap": "viridis"})]], headings=["image", "depth"], titles=["a.jpg"])

Matplotlib's object interface is used: no window system, and no state shared with other pictures of the program.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Cell = np.ndarray | tuple[np.ndarray, Mapping[str, Any]] | None

_DPI = 110
_HIGHEST = 2.5  # of a cell, in widths
_GOLDEN = 0.6180339887
_IGNORED = np.array([[150, 150, 150], [205, 205, 205]], np.uint8)  # stripes


def grid(
    path: str | os.PathLike,
    rows: Sequence[Sequence[Cell]],
    headings: Sequence[str],
    titles: Sequence[str],
    legend: Sequence[tuple[Any, str]] | None = None,
    *,
    bars: Mapping[int, str] | None = None,
    side: float = 1.9,
) -> None:
    """Writes a PNG file, whole or not at all.

    Args:
      rows: cells, as many in each row: (H, W) or (H, W, 3) arrays, or (array, options of matplotlib's imshow), of which
        "boxes" is our own: [(x0, y0, x1, y1, colour), …] in pixels of the array, drawn over it; None leaves a gap.
      headings: over each column. titles: beside each row; any text, also with $.
      legend: (colour, text) pairs, shown below.
      bars: {column: text}: a scale of colours under that column, of its last map; give all of them one vmin and vmax.
      side: width of a cell, inches.
    """
    from matplotlib.figure import Figure

    heights = [side * min(_HIGHEST, max(_shape(c)[0] / _shape(c)[1] for c in row if c is not None)) for row in rows]
    bar_height = 0.12
    ratios = heights + [bar_height] * bool(bars)
    figure = Figure(figsize=(len(headings) * side, sum(ratios)))
    places = dict(left=0, right=1, bottom=0, top=1, wspace=0.05, hspace=0.05, height_ratios=ratios)
    axes = figure.subplots(len(ratios), len(headings), squeeze=False, gridspec_kw=places)
    shown = {}
    for line, row, title in zip(axes, rows, titles, strict=False):
        for column, (axis, cell) in enumerate(zip(line, row, strict=True)):
            axis.set(xticks=[], yticks=[])
            if cell is None:
                axis.set_frame_on(False)
            else:
                shown[column] = _draw(axis, cell)
        line[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=7, parse_math=False)
    for axis, heading in zip(axes[0], headings, strict=True):
        axis.set_title(heading, fontsize=9, parse_math=False)
    for column, axis in enumerate(axes[-1] if bars else ()):
        if column not in bars:
            axis.set_axis_off()
            continue
        figure.colorbar(shown[column], cax=axis, orientation="horizontal").ax.tick_params(labelsize=7)
        axis.set_xlabel(bars[column], fontsize=7, parse_math=False)
    if legend:
        from matplotlib.patches import Patch

        words = max(len(text) for _, text in legend)
        columns = max(1, min(len(legend), int(len(headings) * side * 15 / (words + 6))))
        handles = [Patch(facecolor=_colour(colour), label=_plain(text)) for colour, text in legend]
        below = (0.5, -0.45 / sum(ratios) if bars else -0.02 / sum(ratios))
        style = dict(loc="upper center", fontsize=7, frameon=False, handlelength=1.2, handleheight=1.0)
        figure.legend(handles=handles, ncols=columns, bbox_to_anchor=below, **style)
    save(path, figure)


def save(path: str | os.PathLike, figure) -> None:
    """Writes a matplotlib Figure as a PNG file, whole or not at all; makes its folder."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}")
    FigureCanvasAgg(figure).print_figure(unfinished, dpi=_DPI, format="png", bbox_inches="tight")
    os.replace(unfinished, path)


def short(name: str) -> str:
    """The file of a path, so short that it can stand beside an image."""
    name = os.path.basename(name)
    return name if len(name) <= 24 else name[:11] + "…" + name[-12:]


def class_colours(count: int) -> np.ndarray:
    """(count, 3) uint8: a colour for each class, the first twenty easy to tell apart; no greys."""
    import matplotlib

    vivid, pale = (np.array(matplotlib.colormaps["tab20"].colors)[start::2] for start in (0, 1))
    grey = 7  # of the ten hues
    first = np.concatenate([np.delete(vivid, grey, axis=0), np.delete(pale, grey, axis=0)])
    number = np.arange(max(count - len(first), 0))
    hsv = np.stack([number * _GOLDEN % 1, 0.55 + 0.4 * (number % 2), 0.55 + 0.2 * (number % 3)], axis=-1)
    colours = np.concatenate([first, matplotlib.colors.hsv_to_rgb(hsv)])[:count]
    return np.rint(colours * 255).astype(np.uint8)


def paint(classes: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) of a map of classes; what is no class (IGNORE) has grey stripes."""
    height, width = classes.shape
    stripe = (np.add.outer(np.arange(height), np.arange(width)) // max(2, min(height, width) // 40)) % 2
    known = classes < len(colours)
    return np.where(known[..., None], colours[np.where(known, classes, 0)], _IGNORED[stripe])


def _draw(axis, cell):
    array, options = cell if isinstance(cell, tuple) else (cell, {})
    options = dict(options)
    boxes = options.pop("boxes", ())
    if array.ndim == 2:
        options.setdefault("interpolation", "nearest")
    image = axis.imshow(array, **options)
    if len(boxes):
        from matplotlib.patches import Rectangle

        for x0, y0, x1, y1, colour in boxes:
            # imshow puts the centre of the first pixel at 0.
            corner, size = (x0 - 0.5, y0 - 0.5), (x1 - x0, y1 - y0)
            axis.add_patch(Rectangle(corner, *size, fill=False, edgecolor=_colour(colour), linewidth=1.5))
    return image


def _shape(cell):
    return (cell[0] if isinstance(cell, tuple) else cell).shape


def _colour(colour):
    """A name, or three values from 0 to 255."""
    return colour if isinstance(colour, str) else tuple(np.asarray(colour) / 255)


def _plain(text):
    return text.replace("$", r"\$")
