"""Depth losses: values by hand, what each ignores, and gradients where nothing or everything is right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regvit_jax.losses import log_gradient_loss, sig_loss

TARGET = np.random.default_rng(0).uniform(0.5, 9.0, (2, 5, 6)).astype(np.float32)
DEPTH = TARGET * np.random.default_rng(1).uniform(0.5, 2.0, TARGET.shape).astype(np.float32)
# Compiled as a whole: one operation after the other takes longer to compile.
GRADIENT = jax.jit(jax.value_and_grad(sig_loss))


def log_ratios(depth, target):
    return np.log(depth.astype(np.float64) + 1e-3) - np.log(target.astype(np.float64) + 1e-3)


def test_two_pixels_by_hand():
    """g = ln 2 and 0: mean ln 2 / 2, unbiased variance ln² 2 / 2."""
    depth, target = jnp.array([[[2.001, 3.0]]]), jnp.array([[[1.0, 3.0]]])
    log2 = np.log(2.0)
    np.testing.assert_allclose(sig_loss(depth, target), np.sqrt(log2**2 / 2 + 0.15 * log2**2 / 4), rtol=1e-6)
    np.testing.assert_allclose(sig_loss(depth, target, variance=0.0), np.sqrt(0.15) * log2 / 2, rtol=1e-6)


def test_all_valid_pixels_of_the_batch_are_one_population():
    target = TARGET.copy()
    target[0, :3] = 0
    g = log_ratios(DEPTH, target)[target > 0]
    want = np.sqrt(g.var(ddof=1) + 0.15 * g.mean() ** 2)
    np.testing.assert_allclose(sig_loss(DEPTH, target), want, rtol=1e-5)
    of_each = [np.sqrt(part.var(ddof=1) + 0.15 * part.mean() ** 2) for part in (g[:12], g[12:])]
    assert abs(want - np.mean(of_each)) > 1e-3, "the mean over images would be another number"


def test_a_wrong_scale_costs_its_logarithm():
    np.testing.assert_allclose(sig_loss(1.5 * TARGET, TARGET), np.sqrt(0.15) * np.log(1.5), rtol=2e-3)


def test_what_is_not_valid_counts_for_nothing_whatever_stands_there():
    mask = TARGET > 3.0
    lied = np.where(mask, TARGET, np.nan).astype(np.float32)
    odd = np.where(mask, DEPTH, -np.inf).astype(np.float32)
    for loss in (sig_loss, log_gradient_loss):
        value, grad = jax.jit(jax.value_and_grad(loss))(jnp.asarray(odd), lied, mask)
        np.testing.assert_allclose(value, loss(DEPTH, np.where(mask, TARGET, 0)), rtol=1e-6)
        assert (np.asarray(grad)[~mask] == 0).all() and np.isfinite(grad).all()


@pytest.mark.parametrize("valid", [0, 1])
def test_no_pixel_or_one_gives_no_nan(valid):
    target = np.zeros((1, 3, 3), np.float32)
    target[0, 0, :valid] = 2.0
    value, grad = GRADIENT(jnp.full((1, 3, 3), 4.0), target)
    # One pixel has no variance; what is left is its own logarithm.
    np.testing.assert_allclose(value, valid * np.sqrt(0.15) * np.log(4.001 / 2.001), rtol=1e-6)
    assert np.isfinite(grad).all() and np.count_nonzero(grad) == valid
    assert log_gradient_loss(jnp.full((1, 3, 3), 4.0), target) == 0


def test_an_exact_prediction_has_no_gradient():
    value, grad = GRADIENT(jnp.asarray(TARGET), TARGET)
    assert value == 0 and (np.asarray(grad) == 0).all()


def test_gradient_is_the_slope():
    direction = np.random.default_rng(2).normal(size=DEPTH.shape)
    grad = GRADIENT(jnp.asarray(DEPTH), TARGET)[1]

    def at(t):
        g = log_ratios(DEPTH + t * direction, TARGET)
        return np.sqrt(g.var(ddof=1) + 0.15 * g.mean() ** 2)

    np.testing.assert_allclose(np.sum(np.asarray(grad) * direction), (at(1e-5) - at(-1e-5)) / 2e-5, rtol=1e-3)


def test_edges_by_hand():
    """A step of ln 2 between two columns of a flat map of 4 x 4: 4 pairs of 16 pixels; at stride 2, 2 pairs of 4."""
    target = np.full((1, 4, 4), 1.0, np.float32)
    depth = target.copy()
    depth[:, :, 2:] = 2.001
    np.testing.assert_allclose(log_gradient_loss(depth, target, strides=(1,)), 4 * np.log(2.0) / 16, rtol=1e-5)
    np.testing.assert_allclose(
        log_gradient_loss(depth, target, strides=(1, 2)), (4 / 16 + 2 / 4) * np.log(2.0), rtol=1e-5
    )
    target[:, :, 1] = 0  # the pairs across the step are gone
    assert log_gradient_loss(depth, target, strides=(1,)) == 0


def test_edges_of_a_batch_are_those_of_its_images():
    """The loss is spatial: the images of a batch are not compared with each other."""
    one, two = (log_gradient_loss(DEPTH[i : i + 1], TARGET[i : i + 1]) for i in (0, 1))
    np.testing.assert_allclose(log_gradient_loss(DEPTH, TARGET), (one + two) / 2, rtol=1e-5)
    assert log_gradient_loss(3.0 * TARGET, TARGET) < 0.01 < one


def test_other_shapes_are_refused():
    for loss in (sig_loss, log_gradient_loss):
        with pytest.raises(ValueError, match=r"\(2, 5, 6\).*\(2, 5, 6, 1\)"):
            loss(DEPTH, TARGET[..., None])
