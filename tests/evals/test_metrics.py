"""Means over classes and VOC2007's average precision: counted by hand."""

import numpy as np
import pytest

from regvit_jax.evals.metrics import average_precision_11, mean_average_precision_11, mean_per_class


def test_every_class_weighs_the_same():
    """9 of 10 and 1 of 2: 0.7, where 10 of 12 samples are right; a class without samples is left out."""
    assert mean_per_class(np.array([9, 1, 0]), np.array([10, 2, 0])) == pytest.approx(0.7)


def test_precision_at_eleven_recalls():
    """Ranked + - + + -: precisions 1, 1/2, 2/3, 3/4, 3/5 at recalls 1/3, 1/3, 2/3, 1, 1. The best from there on is 1
    for the recalls 0 to .3 (four of them), 3/4 for the other seven."""
    scores, labels = np.array([5, 4, 3, 2, 1.0]), np.array([1, 0, 1, 1, 0])
    assert average_precision_11(scores, labels) == pytest.approx((4 * 1 + 7 * 0.75) / 11)
    shuffled = np.array([3, 0, 4, 1, 2])
    assert average_precision_11(scores[shuffled], labels[shuffled]) == pytest.approx((4 * 1 + 7 * 0.75) / 11)


def test_a_recall_that_is_reached_exactly_counts():
    """Ten positives, a negative after the third: recall .3 is reached at precision 1, in whatever way .3 is rounded."""
    labels = np.array([1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1])
    assert average_precision_11(-np.arange(11.0), labels) == pytest.approx((4 * 1 + 7 * 10 / 11) / 11)


def test_what_does_not_count_does_not_count():
    """The difficult one stands first and is no mistake; with no positive at all there is no number."""
    assert average_precision_11(np.array([9, 2, 1.0]), np.array([-1, 1, 0])) == 1.0
    assert np.isnan(average_precision_11(np.array([1.0, 2.0]), np.array([0, -1])))


def test_the_mean_is_over_classes_that_have_a_positive():
    scores = np.array([[3.0, 1.0, 0.0], [2.0, 2.0, 0.0]])
    labels = np.array([[1, 1, 0], [0, 0, 0]])
    assert mean_average_precision_11(scores, labels) == pytest.approx((1 + 0.5) / 2)
