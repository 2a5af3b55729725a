"""Augmentation on the accelerator: normalise, flip, shift, mixup and cutmix of whole batches, with static shapes.

Every draw is made at global shape from the key that is passed, so neither the mesh nor the number of hosts changes it.
"""

import jax
import jax.numpy as jnp

from regvit_jax.losses.classification import one_hot
from regvit_jax.trees import Array


def normalize(images: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """(B, H, W, 3) float32, (images / 255 - mean) / std, of uint8 images."""
    return (images.astype(jnp.float32) / 255.0 - jnp.array(mean, jnp.float32)) / jnp.array(std, jnp.float32)


def flip(key: Array, images: Array) -> Array:
    """Each image of (B, H, W, 3) mirrored left to right with probability 1/2."""
    mirrored_b = jax.random.bernoulli(key, 0.5, images.shape[:1])
    return jnp.where(mirrored_b[:, None, None, None], images[:, :, ::-1], images)


def random_crop(key: Array, images: Array, pad: int, mode: str = "zeros") -> Array:
    """Each image of (B, H, W, 3) shifted by its own -pad..pad pixels down and across, uniformly; the shape stays.

    What comes in at the border is 0 (after `normalize`: the mean colour) or, with mode "reflect", the mirror image
    without the edge.

    Raises:
      ValueError: for another mode, or a reflection wider than the image.
    """
    if mode not in ("zeros", "reflect"):
        raise ValueError(f"mode is 'zeros' or 'reflect', not {mode!r}")
    batch, height, width, _ = images.shape
    if mode == "reflect" and pad >= min(height, width):
        raise ValueError(f"cannot reflect {pad} pixels of {height}x{width} images: pad must be smaller than both")
    if pad == 0:
        return images
    widths = ((0, 0), (pad, pad), (pad, pad), (0, 0))
    padded = jnp.pad(images, widths, mode="reflect" if mode == "reflect" else "constant")
    corner_b2 = jax.random.randint(key, (batch, 2), 0, 2 * pad + 1)

    def window(image, corner):
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (height, width, image.shape[-1]))

    return jax.vmap(window)(padded, corner_b2)


def mixup_cutmix(
    key: Array,
    images: Array,
    labels: Array,
    *,
    num_classes: int,
    mixup_alpha: float,
    cutmix_alpha: float,
    switch_prob: float = 0.5,
    prob: float = 1.0,
    smoothing: float = 0.0,
    groups: int = 1,
) -> tuple[Array, Array]:
    """Mixes every image with a partner, by blending (mixup) or by pasting a box (cutmix), and the targets in the same
    proportion.

    The batch is `groups` contiguous groups. Whether and how a group is mixed, its λ ~ Beta(alpha, alpha) and its box
    are drawn once for the group, as the references draw them once per GPU; the partner is the group in reverse. With
    both alphas positive, cutmix has probability `switch_prob`; an alpha of 0 turns its method off. The λ of cutmix is
    recomputed from the box, which the border clips.

    Args:
      images: (B, H, W, 3) float, normalised or not; returned in their dtype.
      labels: (B,) int; a label outside of [0, num_classes) has no hot class.
      prob: probability that a group is mixed at all.

    Returns:
      images (B, H, W, 3) and targets (B, num_classes) float32: λ of the own class and 1 - λ of the partner's, where hot
      is 1 - smoothing + smoothing / num_classes and the rest smoothing / num_classes.

    Raises:
      ValueError: if B is no multiple of `groups`.

    Source: Zhang et al. 2018 (mixup), Yun et al. 2019 (CutMix), with the conventions of timm that DeiT trains with.
    """
    batch, height, width, _ = images.shape
    if batch % groups:
        raise ValueError(f"a batch of {batch} images does not divide into {groups} groups")
    targets = one_hot(labels, num_classes, smoothing)
    if prob == 0 or (mixup_alpha == 0 and cutmix_alpha == 0):
        return images, targets
    key_mixed, key_which, key_lambda, key_box = jax.random.split(key, 4)
    mixed_g = jax.random.bernoulli(key_mixed, prob, (groups,))
    cut_prob = switch_prob if mixup_alpha > 0 and cutmix_alpha > 0 else float(cutmix_alpha > 0)
    cut_g = jax.random.bernoulli(key_which, cut_prob, (groups,))
    alpha_g = jnp.where(cut_g, cutmix_alpha, mixup_alpha)
    lambda_g = symmetric_beta(key_lambda, alpha_g)
    box_ghw = _boxes(key_box, lambda_g, height, width)
    lambda_g = jnp.where(cut_g, 1.0 - box_ghw.mean((1, 2), dtype=jnp.float32), lambda_g)

    # The weight of the own image at each pixel says it all: λ everywhere for mixup, 0 inside the box for cutmix, 1 for
    # neither.
    weight_ghw = jnp.where(cut_g[:, None, None], 1.0 - box_ghw, lambda_g[:, None, None])
    weight_ghw = jnp.where(mixed_g[:, None, None], weight_ghw, 1.0)
    lambda_g = jnp.where(mixed_g, lambda_g, 1.0)
    images = _mix(images, weight_ghw[:, None, :, :, None], groups).astype(images.dtype)
    return images, _mix(targets, lambda_g[:, None, None], groups)


def symmetric_beta(key: Array, alpha: Array) -> Array:
    """Samples of Beta(alpha, alpha), float32 of the shape of `alpha` > 0.

    Exact, and in closed form: the two rejection loops of `jax.random.beta` take seconds to compile. With n = 2 alpha,
    t = sqrt(n) c below is Student's t with n degrees of freedom, and 1/2 + t / (2 sqrt(n + t²)) is the Beta sample.

    Source: Bailey 1994 (polar generation of t); Devroye 1996, "Random variate generation in one line of code".
    """
    key_radius, key_angle = jax.random.split(key)
    tiny = jnp.finfo(jnp.float32).tiny
    radius = jax.random.uniform(key_radius, jnp.shape(alpha), minval=tiny)
    cosine = jnp.cos(2 * jnp.pi * jax.random.uniform(key_angle, jnp.shape(alpha)))
    # c² overflows for a small alpha, which is right: 1 / c² is then 0 and the sample 0 or 1.
    c_squared = jnp.expm1(-jnp.log(radius) / alpha) * cosine**2
    return 0.5 + 0.5 * jnp.sign(cosine) / jnp.sqrt(1.0 + 1.0 / c_squared)


def _mix(x: Array, weight: Array, groups: int) -> Array:
    """weight * x + (1 - weight) * partner, the group in reverse; `weight` broadcasts to (G, B/G, …)."""
    grouped = x.reshape(groups, -1, *x.shape[1:])
    return (grouped * weight + grouped[:, ::-1] * (1.0 - weight)).reshape(x.shape)


def _boxes(key: Array, lambda_g: Array, height: int, width: int) -> Array:
    """(G, H, W) bool: one box a group, about (1 - λ) of the area, centred on a random pixel, clipped at the border."""

    def inside(key, length):
        centre_g = jax.random.randint(key, lambda_g.shape, 0, length)
        # floor(cut / 2) on either side of the centre: a box of odd length loses one pixel, as in timm.
        half_g = (length * jnp.sqrt(1.0 - lambda_g)).astype(jnp.int32) // 2
        pixel = jnp.arange(length)
        return (pixel >= (centre_g - half_g)[:, None]) & (pixel < (centre_g + half_g)[:, None])

    key_rows, key_columns = jax.random.split(key)
    return inside(key_rows, height)[:, :, None] & inside(key_columns, width)[:, None, :]
