"""Classification losses: soft-target cross-entropy and binary cross-entropy, the targets they take, and top-k."""

import jax
import jax.numpy as jnp

from regvit_jax.trees import Array


def softmax_xent(logits_bc: Array, targets_bc: Array) -> Array:
    """Cross-entropy of softmax(logits) against a distribution over classes.

    Args:
      logits_bc: (B, C), any float dtype; computed in float32.
      targets_bc: (B, C) probabilities: one-hot, smoothed or mixed.

    Returns:
      (B,) float32, in nats.
    """
    _same_shape(logits_bc, targets_bc)
    log_probs_bc = jax.nn.log_softmax(logits_bc.astype(jnp.float32), axis=-1)
    return -jnp.sum(targets_bc.astype(jnp.float32) * log_probs_bc, axis=-1)


def bce(logits_bc: Array, targets_bc: Array, *, binarize: bool = False) -> Array:
    """Binary cross-entropy of every class on its own, averaged over the classes.

    Args:
      logits_bc: (B, C), any float dtype; computed in float32.
      targets_bc: (B, C) in [0, 1].
      binarize: every target above zero becomes 1: a mixed image shows both its classes. It takes targets without
          smoothing, which would make every class a positive.

    Returns:
      (B,) float32, in nats a class.

    Source: Wightman et al. 2021 (ResNet strikes back); with `binarize` as in DeiT-III (Touvron et al. 2022).
    """
    _same_shape(logits_bc, targets_bc)
    logits_bc, targets_bc = logits_bc.astype(jnp.float32), targets_bc.astype(jnp.float32)
    if binarize:
        targets_bc = (targets_bc > 0).astype(jnp.float32)
    losses_bc = -targets_bc * jax.nn.log_sigmoid(logits_bc) - (1.0 - targets_bc) * jax.nn.log_sigmoid(-logits_bc)
    return losses_bc.mean(axis=-1)


def one_hot(labels_b: Array, num_classes: int, smoothing: float = 0.0) -> Array:
    """(B, num_classes) float32 targets: 1 - smoothing + smoothing / C for the label, smoothing / C for the others.

    A label outside of [0, C), as padding has, gets smoothing / C everywhere: mask such rows by `valid_b`.
    """
    hot_bc = jax.nn.one_hot(labels_b, num_classes, dtype=jnp.float32)
    return hot_bc * (1.0 - smoothing) + smoothing / num_classes


def top_k_correct(logits_bc: Array, labels_b: Array, k: int = 1) -> Array:
    """(B,) bool: whether the label is among the k largest logits (all of them if k > C). Ties rank by class index."""
    _, best_bk = jax.lax.top_k(logits_bc, min(k, logits_bc.shape[-1]))
    return jnp.any(best_bk == labels_b[:, None], axis=-1)


def _same_shape(logits_bc: Array, targets_bc: Array) -> None:
    """Without this check integer labels (B,) would broadcast against (B, C) and train on nonsense when B = C."""
    if logits_bc.shape != targets_bc.shape:
        raise ValueError(
            f"targets of shape {targets_bc.shape} do not match logits of shape {logits_bc.shape}: "
            "turn integer labels into distributions with one_hot"
        )
