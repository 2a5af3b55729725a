"""Rules for outliers: by hand, against SciPy's quantities, and silent where there is nothing to find."""

import jax.numpy as jnp
import numpy as np
import pytest

from regvit_jax.ops.outliers import RULES, cutoff, token_norms


@pytest.fixture
def planted():
    """1,000 norms around 40 and 20 around 400, as DINOv2 has them, and which ones are which."""
    rng = np.random.default_rng(0)
    norms = np.concatenate([rng.normal(40, 6, 1000), rng.normal(400, 40, 20)]).astype(np.float32)
    return norms, np.arange(1020) >= 1000


def test_norms_are_float32_whatever_comes_in():
    tokens = jnp.full((2, 3, 4), 300.0, jnp.bfloat16)  # the squares would overflow float16, and lose digits in bfloat16
    norms = token_norms(tokens)
    assert norms.shape == (2, 3) and norms.dtype == jnp.float32
    np.testing.assert_allclose(norms, 600.0)


@pytest.mark.parametrize(("rule", "value"), [("absolute", 150.0), ("otsu", None), ("mad", None), ("percentile", 98.04)])
def test_planted_outliers_are_found_and_nothing_else(planted, rule, value):
    norms, planted_n = planted
    limit = float(cutoff(jnp.asarray(norms).reshape(10, 102), rule, value))
    np.testing.assert_array_equal(norms > limit, planted_n)


def test_limits_by_hand():
    norms = jnp.array([1.0, 2.0, 3.0, 4.0, 10.0])
    assert float(cutoff(norms, "sigma")) == pytest.approx(4.0 + 3 * np.std([1, 2, 3, 4, 10]), rel=1e-6)
    assert float(cutoff(norms, "percentile", 50.0)) == 3.0
    logs = np.log([1, 2, 3, 4, 10])
    spread = 1.4826 * np.median(np.abs(logs - np.log(3)))
    assert float(cutoff(norms, "mad", 2.0)) == pytest.approx(3 * np.exp(max(2 * spread, np.log(3))), rel=1e-5)
    # Nearly equal norms: twice the median is many deviations away, and still no artifact.
    assert float(cutoff(jnp.array([1.0, 1.0, 1.0, 1.001, 2.0]), "mad")) == pytest.approx(3.0, rel=1e-5)


def test_otsu_splits_in_the_middle_of_the_gap():
    norms = jnp.exp(jnp.array([0.0, 0.1, 0.2, 4.0, 4.1]))
    assert np.log(float(cutoff(norms, "otsu"))) == pytest.approx((0.2 + 4.0) / 2, abs=0.05)
    assert np.isfinite(float(cutoff(jnp.ones(7), "otsu")))


@pytest.mark.parametrize("tail", ["lognormal", "exponential", "student"])
def test_mad_is_silent_on_one_hump_with_a_long_tail(tail):
    rng = np.random.default_rng(1)
    draws = {
        "lognormal": rng.lognormal(3, 0.5, 20000),
        "exponential": 20 + rng.exponential(8, 20000),
        "student": 60 + 4 * rng.standard_t(3, 20000),
    }[tail]
    norms = jnp.asarray(np.abs(draws), jnp.float32)
    assert float((norms > cutoff(norms)).mean()) < 1e-4
    assert float((norms > cutoff(norms, "sigma")).mean()) > 5e-4  # which is why it is not the usual rule


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="no rule for outliers is called 'otus': there are absolute"):
        cutoff(jnp.ones(3), "otus")
    with pytest.raises(ValueError, match="'absolute' needs a value"):
        cutoff(jnp.ones(3), "absolute")
    assert set(RULES) == {"absolute", "sigma", "percentile", "otsu", "mad"}
