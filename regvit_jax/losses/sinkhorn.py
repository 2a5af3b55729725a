"""Teacher targets of DINO and iBOT: Sinkhorn-Knopp assignment, or a softmax around a running centre."""

import jax
import jax.numpy as jnp

from regvit_jax.sharding import constrain_examples
from regvit_jax.trees import Array


def sinkhorn_knopp(
    logits_nk: Array, temperature: Array | float, *, iterations: int = 3, valid_n: Array | None = None
) -> Array:
    """Assigns N samples to K prototypes so that every prototype is used as much as any other.

    Q = exp(logits / temperature) is scaled in turns so that every prototype gets 1 / K of the total and every sample
    1 / N; what comes out is a distribution over prototypes for each sample. The statistics run over all samples on all
    devices: N is the global batch.

    In this form a scaled Q is exp(logits / temperature + f_k + g_n), and only the potentials f and g are iterated.
    Constants (the total, K, N and the number of valid rows) cancel, any range of logits is safe in float32, and beside
    the result no array of the size of Q has to be kept.

    Args:
      logits_nk: (N, K), or with more leading axes, which all count as samples; any float dtype, computed in float32.
      temperature: scalar > 0, may be traced.
      iterations: rounds, each first over prototypes, then over samples.
      valid_n: (N,) bool, False for padding, which may hold anything; None where every row counts.

    Returns:
      (N, K) float32 targets without gradient; each valid row sums to 1, every other is 0.

    Raises:
      ValueError: for fewer than 1 iteration, or a `valid_n` of another shape than the rows.

    Source: Cuturi 2013; SwAV (Caron et al. 2020); DINOv2 (Oquab et al. 2023), section 4.
    """
    if iterations < 1:
        raise ValueError(f"sinkhorn_knopp needs at least 1 iteration, got {iterations}")
    samples = tuple(range(logits_nk.ndim - 1))
    if valid_n is not None and valid_n.shape != logits_nk.shape[:-1]:
        raise ValueError(f"valid_n of shape {valid_n.shape} does not match the rows of logits {logits_nk.shape}")
    x_nk = jax.lax.stop_gradient(constrain_examples(logits_nk) if logits_nk.ndim == 2 else logits_nk)
    x_nk = x_nk.astype(jnp.float32) / temperature
    if valid_n is not None:
        x_nk = jnp.where(valid_n[..., None], x_nk, -jnp.inf)
    g_n1 = 0.0
    for _ in range(iterations):
        f_k = -jax.nn.logsumexp(x_nk + g_n1, axis=samples)
        g_n1 = -jax.nn.logsumexp(x_nk + f_k, axis=-1, keepdims=True)
        if valid_n is not None:
            # A row of padding has no mass to scale; its potential must not turn -inf into NaN.
            g_n1 = jnp.where(valid_n[..., None], g_n1, 0.0)
    targets_nk = jnp.exp(x_nk + f_k + g_n1)
    return targets_nk if valid_n is None else jnp.where(valid_n[..., None], targets_nk, 0.0)


def centered_softmax(logits: Array, center_k: Array, temperature: Array | float) -> Array:
    """softmax((logits - center) / temperature) over the last axis, float32, without gradient.

    Args:
      logits: (..., K), any float dtype.
      center_k: (K,) float32, of the steps before this one: see `update_center`.
      temperature: scalar > 0, may be traced.

    Source: DINO (Caron et al. 2021), equation 1 and section 3.1.
    """
    logits, center_k = jax.lax.stop_gradient((logits.astype(jnp.float32), center_k.astype(jnp.float32)))
    return jax.nn.softmax((logits - center_k) / temperature, axis=-1)


def update_center(center_k: Array, mean_k: Array, momentum: float = 0.9) -> Array:
    """The centre for the next step, (K,) float32: momentum * center + (1 - momentum) * mean.

    The step that measures `mean_k`, the mean of its teacher logits over all rows that count, still uses the old centre:
    the centre is one step behind, as in the reference.

    Source: DINO (Caron et al. 2021), equation 4.
    """
    mean_k = jax.lax.stop_gradient(mean_k.astype(jnp.float32))
    return momentum * center_k.astype(jnp.float32) + (1.0 - momentum) * mean_k
