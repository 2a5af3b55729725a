"""Metrics of segmentation, from one confusion matrix of a whole dataset."""

import numpy as np

from regvit_jax.data.sources import IGNORE


def confusion(truth: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """(C, C) int64: pixels of class i that were taken for class j. Pixels whose truth is IGNORE do not count.

    Args:
      truth, predicted: integers of one shape, below C.
    """
    known = truth != IGNORE
    pairs = truth[known].astype(np.int64) * num_classes + predicted[known]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_scores(confusion_cc: np.ndarray) -> dict[str, np.ndarray]:
    """{"iou", "acc"}: (C,) float64; "iou" is NaN for a class that is neither there nor predicted, "acc" (the share of
    its pixels that were found) for one that is not there."""
    right, true, predicted = np.diag(confusion_cc), confusion_cc.sum(axis=1), confusion_cc.sum(axis=0)
    with np.errstate(invalid="ignore"):
        return {"iou": right / (true + predicted - right).astype(float), "acc": right / true.astype(float)}


def summary(confusion_cc: np.ndarray) -> dict[str, float]:
    """{"miou", "macc", "aacc"}: means of `class_scores` over the classes that have one, and the share of all pixels
    that is right.

    Raises:
      ValueError: if no pixel counts.
    """
    if not confusion_cc.sum():
        raise ValueError(f"every pixel of the masks is {IGNORE}, which says to ignore it: there is nothing to measure")
    scores = class_scores(confusion_cc)
    right = float(np.trace(confusion_cc) / confusion_cc.sum())
    return {"miou": float(np.nanmean(scores["iou"])), "macc": float(np.nanmean(scores["acc"])), "aacc": right}
