"""Classification losses: known values, DeiT-III's golden numbers, extreme logits, gradients."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import regvit_jax.losses
from regvit_jax.losses import bce, one_hot, softmax_xent, top_k_correct

GOLDEN = Path(__file__).parents[1] / "golden" / "deit3_losses.npz"


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN)


def test_logits_that_say_nothing_cost_log_c():
    uniform, targets = jnp.zeros((2, 5)), one_hot(jnp.array([0, 4]), 5, smoothing=0.1)
    np.testing.assert_allclose(softmax_xent(uniform, targets), np.log(5.0), rtol=1e-6)
    np.testing.assert_allclose(bce(uniform, targets), np.log(2.0), rtol=1e-6)


def test_deit3_pretraining_on_1k(golden):
    soft = golden["in1k_bce/soft"]
    labels = golden["labels"]
    mixed = 0.3 * one_hot(labels, 5) + 0.7 * one_hot(labels[::-1], 5)
    np.testing.assert_allclose(mixed, soft, atol=1e-7)
    losses = bce(golden["logits"], soft, binarize=True)
    np.testing.assert_allclose(losses.mean(), golden["in1k_bce/loss"], rtol=1e-6)
    np.testing.assert_array_equal(losses, bce(golden["logits"], golden["in1k_bce/binarised"]))


def test_deit3_pretraining_on_22k(golden):
    labels = golden["labels"]
    mixed = 0.7 * one_hot(labels, 5, 0.1) + 0.3 * one_hot(labels[::-1], 5, 0.1)
    np.testing.assert_allclose(mixed, golden["in22k_ce/soft"], atol=1e-7)
    np.testing.assert_allclose(softmax_xent(golden["logits"], mixed).mean(), golden["in22k_ce/loss"], rtol=1e-6)


def test_smoothing_keeps_the_sum_at_one():
    targets = one_hot(jnp.array([1]), 4, smoothing=0.2)
    np.testing.assert_allclose(targets, [[0.05, 0.85, 0.05, 0.05]], rtol=1e-6)
    np.testing.assert_array_equal(one_hot(jnp.array([-1]), 4), np.zeros((1, 4)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_huge_logits_stay_exact_in_every_dtype(dtype):
    logits = jnp.array([[3e4, -3e4], [-3e4, 3e4]], dtype)
    targets = one_hot(jnp.array([0, 0]), 2)
    # Right and sure costs nothing; wrong and sure costs the distance of the logits (per class, for bce).
    gap = float(logits[0, 0])
    np.testing.assert_allclose(softmax_xent(logits, targets), [0.0, 2 * gap])
    np.testing.assert_allclose(bce(logits, targets), [0.0, gap])
    assert softmax_xent(logits, targets).dtype == bce(logits, targets).dtype == jnp.float32


def test_half_precision_loses_only_its_input_rounding(golden):
    logits = jnp.asarray(golden["logits"], jnp.bfloat16)
    soft = golden["in22k_ce/soft"]
    np.testing.assert_array_equal(softmax_xent(logits, soft), softmax_xent(logits.astype(jnp.float32), soft))


def test_gradients_are_prediction_minus_target(golden):
    logits, soft = jnp.asarray(golden["logits"]), jnp.asarray(golden["in22k_ce/soft"])
    grad = jax.grad(lambda x: softmax_xent(x, soft).sum())(logits)
    np.testing.assert_allclose(grad, jax.nn.softmax(logits) - soft, atol=1e-6)
    grad = jax.grad(lambda x: bce(x, soft).sum())(logits)
    np.testing.assert_allclose(grad, (jax.nn.sigmoid(logits) - soft) / 5, atol=1e-6)


def test_integer_labels_are_refused():
    for loss in (softmax_xent, bce):
        with pytest.raises(ValueError, match="one_hot"):
            loss(jnp.zeros((4, 4)), jnp.zeros(4, jnp.int32))


def test_top_k():
    logits = jnp.array([[0.1, 0.9, 0.5], [0.1, 0.9, 0.5], [0.0, 0.0, 0.0]])
    labels = jnp.array([1, 2, 2])
    np.testing.assert_array_equal(top_k_correct(logits, labels), [True, False, False])
    np.testing.assert_array_equal(top_k_correct(logits, labels, k=2), [True, True, False])
    np.testing.assert_array_equal(top_k_correct(logits, labels, k=5), [True, True, True])


def test_every_name_of_the_table_resolves():
    for name in regvit_jax.losses.__all__:
        assert callable(getattr(regvit_jax.losses, name))
    with pytest.raises(AttributeError, match="no attribute 'nll'"):
        _ = regvit_jax.losses.nll
