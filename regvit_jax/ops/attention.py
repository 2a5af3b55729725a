"""Scaled dot-product attention: a dispatcher, the reference path, and the weights that fused paths never return."""

import jax
import jax.numpy as jnp

from regvit_jax.trees import Array

IMPLEMENTATIONS = ("auto", "xla", "reference")


def attention(
    q_bnhk: Array,
    k_bnhk: Array,
    v_bnhk: Array,
    *,
    causal: bool = False,
    segment_ids: Array | None = None,
    implementation: str = "auto",
) -> Array:
    """softmax(q k^T / sqrt(K)) v, per head.

    Args:
      q_bnhk, k_bnhk, v_bnhk: (B, N, H, K), one float dtype. The softmax is taken in float32.
      causal: token i sees tokens 0..i only.
      segment_ids: (B, N) integers; tokens see only tokens of their own segment. None: one segment.
      implementation: "reference" (explicit weights), "xla" (jax.nn.dot_product_attention), "auto" (the best for the
        device).

    Returns:
      (B, N, H, K) in the dtype of `v_bnhk`.

    Raises:
      ValueError: for an unknown implementation or inputs that are not (B, N, H, K) of one shape.
    """
    _check(q_bnhk, k_bnhk, v_bnhk, segment_ids)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "reference":
        weights_bhqn = attention_weights(q_bnhk, k_bnhk, causal=causal, segment_ids=segment_ids)
        return jnp.einsum("bhqn,bnhk->bqhk", weights_bhqn.astype(v_bnhk.dtype), v_bnhk)
    mask_b1nn = _mask(q_bnhk.shape[1], segment_ids, causal=False)
    return jax.nn.dot_product_attention(q_bnhk, k_bnhk, v_bnhk, mask=mask_b1nn, is_causal=causal, implementation="xla")


def attention_weights(
    q_bnhk: Array,
    k_bnhk: Array,
    *,
    rows: tuple[int, ...] | None = None,
    causal: bool = False,
    segment_ids: Array | None = None,
) -> Array:
    """The attention of chosen queries over all keys, after the softmax.

    Args:
      q_bnhk, k_bnhk: (B, N, H, K).
      rows: positions of the queries wanted; None for all. Q rows cost (B, H, Q, N), so ask for few on long sequences.
      causal, segment_ids: as in `attention`.

    Returns:
      (B, H, Q, N) float32; each row sums to 1.
    """
    n = q_bnhk.shape[1]
    mask_b1nn = _mask(n, segment_ids, causal)
    if rows is not None:
        index = jnp.asarray(rows, jnp.int32)
        q_bnhk = q_bnhk[:, index]
        mask_b1nn = None if mask_b1nn is None else mask_b1nn[:, :, index]
    # Named so that the backward pass, too, multiplies in half precision: its cotangents are float32 like the logits.
    precision = jax.lax.DotAlgorithmPreset.BF16_BF16_F32 if q_bnhk.dtype == jnp.bfloat16 else None
    logits_bhqn = jnp.einsum("bqhk,bnhk->bhqn", q_bnhk, k_bnhk, precision=precision, preferred_element_type=jnp.float32)
    logits_bhqn = logits_bhqn * q_bnhk.shape[-1] ** -0.5
    if mask_b1nn is not None:
        logits_bhqn = jnp.where(mask_b1nn, logits_bhqn, -jnp.inf)
    return jax.nn.softmax(logits_bhqn, axis=-1)


def _mask(n: int, segment_ids: Array | None, causal: bool) -> Array | None:
    """(B or 1, 1, N, N) bool, True where query (axis 2) sees key (axis 3); None where everything is seen."""
    mask = jnp.tril(jnp.ones((1, 1, n, n), bool)) if causal else None
    if segment_ids is not None:
        same_b1nn = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        mask = same_b1nn if mask is None else mask & same_b1nn
    return mask


def _check(q: Array, k: Array, v: Array, segment_ids: Array | None) -> None:
    if q.ndim != 4 or not q.shape == k.shape == v.shape:
        raise ValueError(f"attention wants q, k, v of one shape (B, N, H, K); got {q.shape}, {k.shape}, {v.shape}")
    if segment_ids is not None and segment_ids.shape != q.shape[:2]:
        raise ValueError(f"segment_ids must be (B, N) = {q.shape[:2]}; got {segment_ids.shape}")
