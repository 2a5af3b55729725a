"""Scaled dot-product attention: a dispatcher, the reference path, and the weights that fused paths never return."""

import functools
import logging

import jax
import jax.numpy as jnp

from regvit_jax.ops import cudnn
from regvit_jax.trees import Array

IMPLEMENTATIONS = ("auto", "cudnn", "xla", "reference")

# From how many tokens "auto" prefers cuDNN. Measured at 261 tokens (ViT-L/14 at 224 px, 4 registers, one H100): 1.36
# times the images per second of XLA's attention forward, and a training step that fits into memory at all. Nothing was
# measured below that; the bound is where the (N, N) weights of a head are half as large as its q, k, v and output
# together (4 N K numbers, K = 64), and there is little left to save.
CUDNN_FROM = 128


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
      implementation: "reference" (explicit weights), "xla" (jax.nn.dot_product_attention), "cudnn" (fused, on NVIDIA
        GPUs, in half precision), "auto" (see `choose`). Where "cudnn" cannot run, "xla" does; the log says so once.

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
    if implementation in ("auto", "cudnn"):
        _, n, _, k = q_bnhk.shape
        device, dtype = cudnn.device_of(q_bnhk), jnp.result_type(q_bnhk).name
        path, why = choose(implementation, device, dtype, n, k, segmented=segment_ids is not None)
        if path == "cudnn":
            try:
                return cudnn.cudnn_attention(q_bnhk, k_bnhk, v_bnhk, causal=causal)
            except (NotImplementedError, RuntimeError) as error:
                why = str(error)
        if why:
            _tell(why, logging.WARNING if implementation == "cudnn" else logging.INFO)
    mask_b1nn = _mask(q_bnhk.shape[1], segment_ids, causal=False)
    return jax.nn.dot_product_attention(q_bnhk, k_bnhk, v_bnhk, mask=mask_b1nn, is_causal=causal, implementation="xla")


def choose(
    asked: str, device: cudnn.Device, dtype: str, tokens: int, head_dim: int, *, segmented: bool
) -> tuple[str, str | None]:
    """The path for "auto" or "cudnn", and what is worth telling about it.

    "auto" is cuDNN on a GPU that can, from CUDNN_FROM tokens on, and XLA elsewhere: on a CPU, on a TPU, for short
    sequences.

    Returns:
      ("cudnn" or "xla", why cuDNN was wanted and cannot; None if it can or was not wanted).
    """
    if asked == "auto" and (device.platform != "gpu" or tokens < CUDNN_FROM):
        return "xla", None
    why = cudnn.obstacle(device, dtype, head_dim, segmented)
    return ("xla", why) if why else ("cudnn", None)


@functools.lru_cache(maxsize=64)
def _tell(why: str, level: int) -> None:
    """Once a reason and process: a network has many blocks, and each is traced several times."""
    logging.log(level, "attention: XLA's path instead of cuDNN's: %s", why)


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
