"""Depth losses: the scale-invariant logarithmic loss that depth probes are trained with, and one on edges."""

import jax.numpy as jnp

from regvit_jax.trees import Array

_EPS = 1e-3  # metres, added before every logarithm


def sig_loss(
    depth_bhw: Array,
    target_bhw: Array,
    valid_bhw: Array | None = None,
    *,
    variance: float | Array = 1.0,
    mean: float = 0.15,
) -> Array:
    """Scale-invariant logarithmic loss: sqrt(var(g) + 0.15 mean(g)²), with g = ln(depth + 1 mm) - ln(target + 1 mm).

    All valid pixels of the batch are one population: a wrong scale of one image is variance, one that all images share
    is mean. The variance is the unbiased one.

    Args:
      depth_bhw: (B, H, W) metres, above -1 mm.
      target_bhw: (B, H, W) metres, of any value where it is not valid.
      valid_bhw: (B, H, W) bool, what counts; None: where the target is above 0.
      variance, mean: weights of the two terms; the first may be traced. A probe starts without the variance for 100
        steps: until its scale is roughly right.

    Returns:
      Scalar float32: 0, with a gradient of 0, where nothing is valid or all is exact.

    Source: Eigen et al. 2014; with these weights in AdaBins (Bhat et al. 2021) and in DINOv2's depth probes.
    """
    _same_shape(depth_bhw, target_bhw)
    valid = (target_bhw > 0) if valid_bhw is None else valid_bhw
    g = _log_ratio(depth_bhw, target_bhw, valid)
    count = jnp.sum(valid, dtype=jnp.float32)
    mean_g = jnp.sum(g) / jnp.maximum(count, 1.0)
    centred = jnp.where(valid, g - mean_g, 0.0)
    var_g = jnp.sum(centred**2) / jnp.maximum(count - 1.0, 1.0)
    return _safe_sqrt(variance * var_g + mean * mean_g**2)


def log_gradient_loss(
    depth_bhw: Array, target_bhw: Array, valid_bhw: Array | None = None, *, strides: tuple[int, ...] = (1, 2, 4, 8)
) -> Array:
    """Differences of g (as in `sig_loss`) between neighbours down and across: edges in the right place.

    For every stride s the maps are thinned to each s-th row and column; the absolute differences of valid neighbours
    are summed and divided by the number of valid pixels; the sum over strides is returned. A map that is wrong by one
    factor costs nothing.

    The gradient loss in the training code of DINOv2's depth probes differs along axes that are not rows and columns,
    and is 0 there for a batch of two: what was published is trained without it.

    Args:
      depth_bhw, target_bhw, valid_bhw: as in `sig_loss`.

    Returns:
      Scalar float32.

    Source: Li & Snavely 2018 (MegaDepth), eq. 4.
    """
    _same_shape(depth_bhw, target_bhw)
    valid = (target_bhw > 0) if valid_bhw is None else valid_bhw
    g = _log_ratio(depth_bhw, target_bhw, valid)
    total = jnp.zeros((), jnp.float32)
    for stride in strides:
        part, mask = g[:, ::stride, ::stride], valid[:, ::stride, ::stride]
        down = jnp.abs(part[:, 1:] - part[:, :-1]) * (mask[:, 1:] & mask[:, :-1])
        across = jnp.abs(part[:, :, 1:] - part[:, :, :-1]) * (mask[:, :, 1:] & mask[:, :, :-1])
        total += (jnp.sum(down) + jnp.sum(across)) / jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)
    return total


def _log_ratio(depth, target, valid):
    """g where valid, else 0."""
    # The inputs of the logarithms are replaced, not only their results: 0 times NaN would be NaN in the gradient.
    depth = jnp.where(valid, depth.astype(jnp.float32), 1.0)
    target = jnp.where(valid, target.astype(jnp.float32), 1.0)
    return jnp.log(depth + _EPS) - jnp.log(target + _EPS)


def _safe_sqrt(x):
    """sqrt whose gradient is 0, not infinite, at 0."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


def _same_shape(depth, target):
    if depth.shape != target.shape or depth.ndim != 3:
        raise ValueError(f"depth {depth.shape} and target {target.shape} must both be (B, H, W)")
