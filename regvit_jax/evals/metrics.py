"""Metrics of classification over scores that carry weights, so that padding counts for nothing."""

import jax.numpy as jnp

from regvit_jax.losses import top_k_correct
from regvit_jax.trees import Array


def tops(num_classes: int) -> tuple[int, ...]:
    """The k of the top-k accuracies worth a number: 1, and 5 where there are more than 5 classes."""
    return (1, 5) if num_classes > 5 else (1,)


def top_k_hits(scores_bc: Array, labels_b: Array, valid_b: Array) -> dict[str, Array]:
    """{"top1": count, "top5": count}: valid rows whose label is among the k best scores; ties rank by class number."""
    ks = tops(scores_bc.shape[-1])
    return {f"top{k}": jnp.sum(top_k_correct(scores_bc, labels_b, k) & valid_b, dtype=jnp.int32) for k in ks}
