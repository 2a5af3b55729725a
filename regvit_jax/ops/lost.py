"""LOST: one object in an image from the signs of dot products between its patch features, without any training.

    found = discover(features_hwd, patch_size=16, image_size=(353, 500))
    found.box                                   # (x1, y1, x2, y2) in pixels
    boxes = lost(features_bhwd)                 # a batch of one grid, on the device: boxes in patches, and the maps

A patch that points the same way as few others is likely on an object, since backgrounds are large: the one with the
lowest degree is the seed, other low-degree patches that agree with it vote for the mask, and the part of the mask that
holds the seed is boxed.
Source: Simeoni et al. 2021, with the choices of their code; bias and normalisation as Darcet et al. and Jiang et al.
use them on other networks.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from regvit_jax.trees import Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["box", "seed", "degree", "similarity", "expansion", "mask"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Discovery:
    """What was found; a leading batch axis B where the features had one.

    Attributes:
      box: from `lost`, (B, 4) int32 in patches, y0 x0 y1 x1, the last two exclusive; from `discover`, (4,) in pixels,
        x1 y1 x2 y2: int64, or float64 where the scale is no integer.
      seed: () or (B,) int32, index of the seed patch, row-major.
      degree: (h, w) int32, how many other patches have a positive product with this one.
      similarity: (h, w) float32, products with the seed.
      expansion: (h, w) float32, summed products with the patches that vote.
      mask: (h, w) bool, the connected part of expansion > 0 that holds the seed.
    """

    box: Any
    seed: Any
    degree: Any
    similarity: Any
    expansion: Any
    mask: Any


def discover(
    features_hwd: Array,
    *,
    patch_size: int | tuple[float, float],
    image_size: tuple[int, int] | None = None,
    k_patches: int = 100,
    bias: float = 0.0,
    normalize: bool = False,
) -> Discovery:
    """LOST on one image.

    Args:
      features_hwd: (h, w, D), such as the keys of the last block (`capture=("block11/k",)`), patches only.
      patch_size: pixels a patch, one number or (height, width), which need not be whole.
      image_size: (height, width) of the image before it was padded to whole patches: the far corner of the box is
        clipped to it; None: not clipped.
      k_patches, bias, normalize: see `lost`.

    Returns:
      A Discovery of NumPy arrays, its box in pixels.

    Raises:
      ValueError: for features that are not (h, w, D) or not finite.
    """
    features_hwd = jnp.asarray(features_hwd)
    if features_hwd.ndim != 3:
        raise ValueError(f"features are (h, w, D), got {features_hwd.shape}; for a batch there is `lost`")
    if not bool(jnp.isfinite(features_hwd).all()):
        raise ValueError("the features are not finite")
    batch = lost(features_hwd[None], k_patches=k_patches, bias=bias, normalize=normalize)
    found = jax.tree.map(lambda x: np.asarray(x)[0], batch)
    return dataclasses.replace(found, box=pixels(found.box, patch_size, image_size))


@functools.partial(jax.jit, static_argnames=("k_patches", "normalize"))
def lost(features_bhwd: Array, *, k_patches: int = 100, bias: float = 0.0, normalize: bool = False) -> Discovery:
    """LOST on a batch of images of one grid.

    Products are float32 at the highest precision, whatever the features' dtype: coarser ones flip signs, and all that
    follows is made of signs. Equal degrees rank by place, the first patch of the image first. If the seed has no
    positive product with itself (zero features, a large negative bias), the box is the seed's own patch.

    Args:
      features_bhwd: (B, h, w, D).
      k_patches: so many patches of lowest degree may vote; all of them if there are not so many.
      bias: added to every product. Below 0 it raises the bar where a common direction makes nearly all products
        positive. Values are not published for any network: report yours, and that it was tuned.
      normalize: features of length 1.
    """
    return jax.vmap(functools.partial(_lost, k_patches=k_patches, bias=bias, normalize=normalize))(features_bhwd)


def pixels(
    box_y0x0y1x1: np.ndarray, patch_size: int | tuple[float, float], image_size: tuple[int, int] | None = None
) -> np.ndarray:
    """(…, 4) x1 y1 x2 y2 in pixels of boxes in patches: int64, or float64 if a scale is no integer.

    The far corner is clipped to `image_size` (height, width), the near one, which lies inside by itself, is not.
    """
    rows, columns = (patch_size, patch_size) if np.ndim(patch_size) == 0 else patch_size
    whole = all(float(scale).is_integer() for scale in (rows, columns))
    scale = np.array([columns, rows, columns, rows], np.int64 if whole else np.float64)
    box = np.asarray(box_y0x0y1x1).astype(np.int64)[..., [1, 0, 3, 2]] * scale
    if image_size is not None:
        height, width = image_size
        box[..., 2:] = np.minimum(box[..., 2:], [width, height])
    return box


def _lost(features_hwd, *, k_patches, bias, normalize) -> Discovery:
    h, w, _ = features_hwd.shape
    features_nd = features_hwd.reshape(h * w, -1).astype(jnp.float32)
    if normalize:
        length_n1 = jnp.linalg.norm(features_nd, axis=1, keepdims=True)
        features_nd = features_nd / jnp.maximum(length_n1, 1e-12)
    gram_nn = jnp.matmul(features_nd, features_nd.T, precision=jax.lax.Precision.HIGHEST) + bias
    positive_nn = gram_nn > 0
    degree_n = positive_nn.sum(axis=1, dtype=jnp.int32) - jnp.diagonal(positive_nn).astype(jnp.int32)
    order_n = jnp.argsort(degree_n, stable=True)
    seed = order_n[0]
    rank_n = jnp.zeros_like(order_n).at[order_n].set(jnp.arange(h * w))
    votes_n = (rank_n < k_patches) & positive_nn[seed]
    # A masked sum, as a product would be: exact where the reference is, since nothing but zeros is added.
    expansion_n = jnp.sum(jnp.where(votes_n[:, None], gram_nn, 0.0), axis=0)
    start_hw = (jnp.arange(h * w) == seed).reshape(h, w)
    inside_hw = (expansion_n > 0).reshape(h, w)
    part_hw = flood(start_hw & inside_hw, inside_hw)
    part_hw = jnp.where(part_hw.any() & positive_nn[seed, seed], part_hw, start_hw)
    return Discovery(
        box=box_of(part_hw),
        seed=seed.astype(jnp.int32),
        degree=degree_n.reshape(h, w),
        similarity=gram_nn[seed].reshape(h, w),
        expansion=expansion_n.reshape(h, w),
        mask=part_hw,
    )


def flood(start_hw: Array, mask_hw: Array) -> Array:
    """(h, w) bool: the patches of `mask_hw` reached from those of `start_hw` by going up, down, left or right."""

    def grown(reached_hw):
        padded = jnp.pad(reached_hw, 1)
        around = padded[2:, 1:-1] | padded[:-2, 1:-1] | padded[1:-1, 2:] | padded[1:-1, :-2]
        return (reached_hw | around) & mask_hw

    def step(carry):
        reached_hw, _ = carry
        larger_hw = grown(reached_hw)
        return larger_hw, (larger_hw != reached_hw).any()

    return jax.lax.while_loop(lambda carry: carry[1], step, (start_hw & mask_hw, jnp.bool_(True)))[0]


def box_of(mask_hw: Array) -> Array:
    """(4,) int32 y0 x0 y1 x1 around what is True, the last two exclusive."""

    def ends(line):
        length = line.shape[0]
        return jnp.argmax(line), length - jnp.argmax(line[::-1])

    (y0, y1), (x0, x1) = ends(mask_hw.any(axis=1)), ends(mask_hw.any(axis=0))
    return jnp.stack([y0, x0, y1, x1]).astype(jnp.int32)
