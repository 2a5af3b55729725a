"""Metrics of boxes: IoU and CorLoc, as object discovery counts them."""

from collections.abc import Sequence

import numpy as np

THRESHOLD = 0.5

_EPSILON = np.float32(1e-7)  # part of the published evaluation; below float32 resolution for boxes of pixels


def iou(box: np.ndarray, boxes_n4: np.ndarray) -> np.ndarray:
    """(n,) float32: intersection over union of one box with each of n, all x1 y1 x2 y2, the far edges exclusive."""
    box, boxes_n4 = np.asarray(box, np.float32), np.asarray(boxes_n4, np.float32).reshape(-1, 4)
    corner = np.maximum(box[:2], boxes_n4[:, :2]), np.minimum(box[2:], boxes_n4[:, 2:])
    inside_n = np.prod(np.maximum(corner[1] - corner[0], 0), axis=1)

    def area(boxes):
        return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1] + _EPSILON)

    return inside_n / (area(box) + area(boxes_n4) - inside_n + _EPSILON)


def corloc(predicted: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> float:
    """Share of images whose predicted box (4,) meets any of its true ones (n, 4) with an IoU of 0.5 or more.

    Images without a true box do not count.

    Raises:
      ValueError: if no image has one.
    """
    hits = [
        bool((iou(box, boxes) >= THRESHOLD).any()) for box, boxes in zip(predicted, truth, strict=True) if len(boxes)
    ]
    if not hits:
        raise ValueError("no image has a true box: there is nothing to be right about")
    return float(np.mean(hits))
