"""The picture of object discovery: the box found beside the true ones, and the maps it was made of."""

import pathlib

import numpy as np

from regvit_jax.evals.box_metrics import iou
from regvit_jax.evals.discovery_images import Photo
from regvit_jax.evals.pictures import grid, short

FOUND, TRUE = "#e8262a", "#ffe14d"


def draw(path: pathlib.Path, shown: list[tuple[Photo, np.ndarray]], maps: list[dict[str, np.ndarray]]) -> None:
    """A row a photo: the photo with its boxes, then its maps, each on a scale of its own.

    Args:
      shown: photos with the box found, x1 y1 x2 y2 in pixels of the file.
      maps: of each photo, {heading: (h, w)}.
    """
    rows, titles = [], []
    for (photo, box), own in zip(shown, maps, strict=True):
        true = [(*(corner * photo.scale), TRUE) for corner in photo.boxes]
        rows.append([(photo.pixels, {"boxes": [*true, (*(np.asarray(box) * photo.scale), FOUND)]}), *own.values()])
        best = f"IoU {iou(box, photo.boxes).max():.2f}" if len(photo.boxes) else "no true box"
        titles.append(f"{short(photo.name)}\n{best}")
    legend = [(FOUND, "found"), (TRUE, "true")]
    grid(path, rows, ["image", *maps[0]], titles, legend)
