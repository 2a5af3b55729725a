"""KoLeo: spreads the features of a group of images by pushing every one away from its nearest neighbour."""

import jax
import jax.numpy as jnp

from regvit_jax.sharding import constrain_examples
from regvit_jax.trees import Array

EPS = 1e-8


def koleo_loss(x_gbd: Array) -> Array:
    """-log of the distance from each unit-length feature to its nearest neighbour in its group, averaged.

    Which neighbour is nearest has no gradient; the distance has, to both of its ends. Duplicates cost -log of about
    1e-8 sqrt(D), not infinity: the reference computes this in half precision, where 1e-8 is 0.

    Args:
      x_gbd: (G, b, D) features, any float dtype; computed in float32. The reference's group is the batch of one GPU,
        and it adds up the losses of the two global crops, each on its own.

    Returns:
      float32 scalar, the mean over groups.

    Raises:
      ValueError: for fewer than 2 images in a group, or another number of axes.

    Source: Sablayrolles et al. 2019 (the differential entropy estimate of Kozachenko and Leonenko), with the epsilons
    of the DINOv2 code.
    """
    if x_gbd.ndim != 3 or x_gbd.shape[1] < 2:
        raise ValueError(
            f"koleo_loss needs (G, b, D) with at least b = 2 images in a group, got {x_gbd.shape}: use fewer groups or "
            "a larger batch"
        )
    x = constrain_examples(x_gbd).astype(jnp.float32)
    # The square is bounded, not the root, whose slope at 0 is infinite.
    x = x / jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), EPS**2))
    fixed = jax.lax.stop_gradient(x)
    dots_gbb = jnp.einsum("gbd,gcd->gbc", fixed, fixed, precision=jax.lax.Precision.HIGHEST)
    own_bb = jnp.eye(x.shape[1], dtype=bool)
    nearest_gb = jnp.argmax(jnp.where(own_bb, -jnp.inf, dots_gbb), axis=-1)
    neighbours = jnp.take_along_axis(x, nearest_gb[..., None], axis=1)
    distances_gb = jnp.linalg.norm(x - neighbours + EPS, axis=-1)
    return -jnp.log(distances_gb + EPS).mean()
