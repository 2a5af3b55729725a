"""Metrics of classification over scores that carry weights, so that padding counts for nothing."""

import jax.numpy as jnp
import numpy as np

from regvit_jax.losses import top_k_correct
from regvit_jax.trees import Array


def tops(num_classes: int) -> tuple[int, ...]:
    """The k of the top-k accuracies worth a number: 1, and 5 where there are more than 5 classes."""
    return (1, 5) if num_classes > 5 else (1,)


def top_k_hits(scores_bc: Array, labels_b: Array, valid_b: Array) -> dict[str, Array]:
    """{"top1": count, "top5": count}: valid rows whose label is among the k best scores; ties rank by class number."""
    ks = tops(scores_bc.shape[-1])
    return {f"top{k}": jnp.sum(top_k_correct(scores_bc, labels_b, k) & valid_b, dtype=jnp.int32) for k in ks}


def mean_per_class(hits_c: np.ndarray, count_c: np.ndarray) -> float:
    """Mean over classes of the share that is right: every class weighs the same. Classes without samples are left out.

    Args:
      hits_c: (C,) samples of each class that are right. count_c: all of them.
    """
    there = np.asarray(count_c) > 0
    return float(np.mean(np.asarray(hits_c)[there] / np.asarray(count_c)[there]))


def average_precision_11(scores_n: np.ndarray, labels_n: np.ndarray) -> float:
    """Average precision of one class as in VOC2007: the mean, over the recalls 0, 0.1, … 1, of the best precision at
    that recall or a higher one. NaN without a positive.

    Args:
      scores_n: higher is more likely; equal scores rank in the order given.
      labels_n: 1 positive, 0 negative, -1 left out (VOC's difficult ones).

    Source: Everingham et al. 2010, section 4.2; recalls are compared as whole numbers, without rounding.
    """
    scores_n, labels_n = (
        np.asarray(scores_n)[np.asarray(labels_n) >= 0],
        np.asarray(labels_n)[np.asarray(labels_n) >= 0],
    )
    positives = int((labels_n > 0).sum())
    if not positives:
        return float("nan")
    found_n = np.cumsum(labels_n[np.argsort(-scores_n, kind="stable")] > 0)
    precision_n = found_n / np.arange(1, len(found_n) + 1)
    return float(np.mean([precision_n[10 * found_n >= tenth * positives].max() for tenth in range(11)]))


def mean_average_precision_11(scores_nc: np.ndarray, labels_nc: np.ndarray) -> float:
    """Mean of `average_precision_11` over the classes that have a positive; arrays are (N, C)."""
    return float(np.nanmean([average_precision_11(s, y) for s, y in zip(scores_nc.T, labels_nc.T, strict=True)]))
