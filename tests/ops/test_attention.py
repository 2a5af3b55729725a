"""Attention: every path against a softmax made by hand, causal and segment masks, what half precision keeps exact."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regvit_jax.ops.attention import attention, attention_weights

B, N, H, K = 2, 6, 3, 4
SEGMENTS = np.array([[0, 0, 1, 1, 1, 2], [5, 3, 5, 3, 5, 3]])  # numbers only name; segments may interleave
MASKS = {
    "none": {},
    "causal": {"causal": True},
    "segments": {"segment_ids": SEGMENTS},
    "both": {"causal": True, "segment_ids": SEGMENTS},
}


@pytest.fixture(scope="module")
def qkv():
    rng = np.random.default_rng(0)
    return [rng.normal(size=(B, N, H, K)).astype(np.float32) for _ in range(3)]


def allowed(causal=False, segment_ids=None):
    """(B, N, N) bool, by loops."""
    see = np.zeros((B, N, N), bool)
    for b in range(B):
        for i in range(N):
            for j in range(N):
                same = segment_ids is None or segment_ids[b][i] == segment_ids[b][j]
                see[b, i, j] = same and (j <= i or not causal)
    return see


def by_hand(q, k, v, **mask):
    """Weights (B, H, N, N) and outputs (B, N, H, K) in float64, one query at a time."""
    see, weights, out = allowed(**mask), np.zeros((B, H, N, N)), np.zeros((B, N, H, K))
    for b, h, i in np.ndindex(B, H, N):
        scores = np.array([np.dot(q[b, i, h].astype(np.float64), k[b, j, h]) for j in range(N)]) / np.sqrt(K)
        e = np.where(see[b, i], np.exp(scores - scores[see[b, i]].max()), 0.0)
        weights[b, h, i] = e / e.sum()
        out[b, i, h] = weights[b, h, i] @ v[b, :, h]
    return weights, out


@pytest.mark.parametrize("mask", MASKS)
class TestEveryMask:
    @pytest.mark.parametrize("implementation", ["reference", "xla", "auto"])
    def test_output_is_the_softmax_made_by_hand(self, qkv, mask, implementation):
        out = attention(*qkv, implementation=implementation, **MASKS[mask])
        assert out.dtype == jnp.float32
        np.testing.assert_allclose(out, by_hand(*qkv, **MASKS[mask])[1], atol=2e-6)

    def test_weights_are_those_made_by_hand(self, qkv, mask):
        weights = attention_weights(*qkv[:2], **MASKS[mask])
        assert weights.shape == (B, H, N, N) and weights.dtype == jnp.float32
        np.testing.assert_allclose(weights, by_hand(*qkv, **MASKS[mask])[0], atol=1e-6)
        np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-6)

    def test_what_is_not_seen_weighs_exactly_nothing(self, qkv, mask):
        weights = np.asarray(attention_weights(*qkv[:2], **MASKS[mask]))
        see = np.broadcast_to(allowed(**MASKS[mask])[:, None], weights.shape)
        assert (weights[~see] == 0).all() and (weights[see] > 0).all()

    def test_chosen_rows_are_rows_of_the_whole_in_the_order_asked_for(self, qkv, mask):
        whole = attention_weights(*qkv[:2], **MASKS[mask])
        rows = attention_weights(*qkv[:2], rows=(4, 0, 5), **MASKS[mask])
        np.testing.assert_allclose(rows, np.asarray(whole)[:, :, [4, 0, 5]], atol=1e-7)


def test_gradients_of_both_paths_agree_and_are_finite(qkv):
    def loss(qkv, implementation):
        return jnp.sum(jnp.sin(attention(*qkv, implementation=implementation, **MASKS["both"])))

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    for ours, xla in zip(grad(qkv, "reference"), grad(qkv, "xla"), strict=True):
        assert np.isfinite(ours).all() and np.abs(ours).max() > 1e-3
        np.testing.assert_allclose(ours, xla, atol=2e-6)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_what_is_not_seen_cannot_leak(qkv, implementation):
    """Later tokens and other segments may hold anything, even the largest number there is."""
    q, k, v = (x.copy() for x in qkv)
    before = attention(q, k, v, implementation=implementation, causal=True, segment_ids=SEGMENTS)
    k[0, 3:] = v[0, 3:] = 1e30
    after = attention(q, k, v, implementation=implementation, causal=True, segment_ids=SEGMENTS)
    np.testing.assert_array_equal(before[0, :3], after[0, :3])


def test_large_scores_do_not_overflow(qkv):
    q, k, v = qkv
    for implementation in ("reference", "xla"):
        assert np.isfinite(attention(1e4 * q, 1e4 * k, v, implementation=implementation)).all()


@pytest.mark.parametrize("implementation", ["reference", "xla"])
class TestHalfPrecision:
    def test_softmax_stays_in_float32(self, qkv, implementation):
        half = [jnp.asarray(x, jnp.bfloat16) for x in qkv]
        text = str(jax.make_jaxpr(functools.partial(attention, implementation=implementation))(*half))
        assert re.findall(r"(\w+)\[[\d,]*\] = exp\b", text) == ["f32"]

    def test_many_equal_keys_share_without_drift(self, qkv, implementation):
        # 1024 equal weights of 1/1024: a softmax accumulated in bfloat16 would stop counting at 256.
        q = k = jnp.zeros((1, 1024, 1, 4), jnp.bfloat16)
        v = jnp.ones((1, 1024, 1, 4), jnp.bfloat16)
        out = attention(q, k, v, implementation=implementation)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_array_equal(out.astype(np.float32), 1.0)

    def test_output_is_near_the_exact_one(self, qkv, implementation):
        half = [jnp.asarray(x, jnp.bfloat16) for x in qkv]
        exact = by_hand(*(np.asarray(x, np.float64) for x in half))[1]
        np.testing.assert_allclose(attention(*half, implementation=implementation).astype(np.float32), exact, atol=0.02)


def test_weights_of_half_precision_are_float32_and_sum_to_one(qkv):
    half = [jnp.asarray(x, jnp.bfloat16) for x in qkv[:2]]
    weights = attention_weights(*half)
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-6)
    # Products of two bfloat16 are exact in float32, so nothing beyond the inputs is rounded.
    exact = by_hand(*(np.asarray(x, np.float64) for x in half), np.zeros((B, N, H, K)))[0]
    np.testing.assert_allclose(weights, exact, atol=1e-6)


class TestErrors:
    def test_an_unknown_implementation_lists_the_known(self, qkv):
        with pytest.raises(ValueError, match=r"'flash'.*auto, cudnn, xla, reference"):
            attention(*qkv, implementation="flash")

    def test_shapes_are_named(self, qkv):
        q, k, v = qkv
        with pytest.raises(ValueError, match=r"\(2, 6, 3, 4\).*\(2, 5, 3, 4\)"):
            attention(q, k[:, :5], v)
        with pytest.raises(ValueError, match="one shape"):
            attention(q[0], k[0], v[0])

    def test_segments_of_another_length_are_named(self, qkv):
        with pytest.raises(ValueError, match=r"segment_ids must be \(B, N\) = \(2, 6\); got \(2, 5\)"):
            attention(*qkv, segment_ids=SEGMENTS[:, :5])
