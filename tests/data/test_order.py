"""Order: a bijection for every n, uniform, different in every epoch and seed, and frozen for good."""

import itertools

import numpy as np
import pytest

from regvit_jax.data.order import Order


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 65, 100, 1023, 1024, 1025])
def test_every_epoch_visits_every_sample_once(n):
    epochs = Order(n, seed=7).index(np.arange(3 * n)).reshape(3, n)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(n), (3, 1)))


def test_one_position_and_many_agree():
    order = Order(1000, seed=3)
    positions = np.array([[0, 1, 999], [1000, 123_456, 10**12]])
    assert order.index(positions).tolist() == [[order.index(int(p)) for p in row] for row in positions]
    assert order.index(positions).dtype == np.int64


def test_the_order_of_a_seed_never_changes():
    # Changing these numbers would change the data order of every run that resumes.
    assert Order(10, seed=0).index(np.arange(10)).tolist() == [3, 4, 0, 5, 6, 8, 1, 7, 9, 2]


def test_epochs_and_seeds_are_unrelated_and_far_from_the_identity():
    n = 20_000
    base, next_epoch, next_seed = (
        Order(n, 0).index(np.arange(n)),
        Order(n, 0).index(np.arange(n, 2 * n)),
        Order(n, 1).index(np.arange(n)),
    )
    for other in (np.arange(n), next_epoch, next_seed):
        # Two random permutations agree at about one place, and their correlation is within 4 / sqrt(n).
        assert (base == other).sum() < 10
        assert abs(np.corrcoef(base, other)[0, 1]) < 4 / np.sqrt(n)
    assert abs(np.corrcoef(base[:-1], base[1:])[0, 1]) < 4 / np.sqrt(n)


def test_every_permutation_of_four_is_equally_likely():
    epochs = 12_000
    seen = Order(4, 0).index(np.arange(4 * epochs)).reshape(epochs, 4)
    counts = [(seen == np.array(permutation)).all(axis=1).sum() for permutation in itertools.permutations(range(4))]
    expected = epochs / 24
    # Chi-squared with 23 degrees of freedom: above 49.7 once in a thousand.
    assert ((np.array(counts) - expected) ** 2 / expected).sum() < 49.7


def test_no_samples_and_negative_positions_are_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        Order(0, 0)
    with pytest.raises(ValueError, match="start at 0"):
        Order(5, 0).index(-1)
    with pytest.raises(ValueError, match="start at 0"):
        Order(5, 0).index(np.array([0, -1]))
