"""IoU and CorLoc by hand and against recorded values of LOST's evaluation."""

import pathlib

import numpy as np
import pytest

from regvit_jax.evals.box_metrics import corloc, iou

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "lost.npz")


def test_against_the_original():
    ends = np.cumsum(GOLDEN["iou/gt_count"])
    truth = np.split(GOLDEN["iou/gt"], ends[:-1])
    values = np.concatenate([iou(box, boxes) for box, boxes in zip(GOLDEN["iou/pred"], truth, strict=True)])
    np.testing.assert_allclose(values, GOLDEN["iou/iou"], rtol=1e-6, atol=1e-7)
    hits = [bool((iou(box, boxes) >= 0.5).any()) for box, boxes in zip(GOLDEN["iou/pred"], truth, strict=True)]
    np.testing.assert_array_equal(hits, GOLDEN["iou/hit"])
    assert 100 * corloc(GOLDEN["iou/pred"], truth) == pytest.approx(float(GOLDEN["iou/corloc_percent"]))


def test_by_hand():
    np.testing.assert_allclose(iou([0, 0, 2, 2], [[1, 1, 3, 3], [0, 0, 2, 2], [5, 5, 6, 6]]), [1 / 7, 1, 0], atol=1e-6)
    assert corloc([np.array([0, 0, 10, 10])], [np.array([[0, 0, 10, 20]])]) == 1.0  # exactly one half is a hit
    empty = np.zeros((0, 4))
    assert corloc([np.array([0, 0, 1, 1])] * 2, [empty, np.array([[5, 5, 6, 6]])]) == 0.0
    with pytest.raises(ValueError, match="no image has a true box"):
        corloc([np.array([0, 0, 1, 1])], [empty])
