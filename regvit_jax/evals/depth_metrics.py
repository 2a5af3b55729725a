"""Metrics of depth maps: of every image over its valid pixels, then averaged over images; and the masks of protocols.

    errors = depth_errors(depth_bhw, target_bhw, valid_mask(target_bhw, 1e-3, 10.0, "eigen"))     # {"rmse": (B,), …}

The mean over images of each image's RMSE is what the depth literature calls RMSE. The root of the mean squared error of
all pixels is another number, and never a smaller one where images have as many pixels.
"""

import jax.numpy as jnp
import numpy as np

from regvit_jax.trees import Array

# In the order in which they are reported. Metres for rmse and sq_rel; log10 and rmse_log have none.
METRICS = ("rmse", "abs_rel", "a1", "a2", "a3", "sq_rel", "rmse_log", "silog", "log10")
CROPS = ("none", "eigen", "garg")

_EIGEN_SIZE = (480, 640)
_EIGEN_BOX = np.s_[45:471, 41:601]
_GARG_ROWS, _GARG_COLUMNS = (0.40810811, 0.99189189), (0.03594771, 0.96405229)


def crop_mask(crop: str, height: int, width: int) -> np.ndarray:
    """(H, W) bool: the pixels that a protocol counts.

    none: all of them. eigen: the box of NYU Depth v2, rows 45 to 470 and columns 41 to 600 of 480 x 640. garg: the
    lower and inner part of KITTI frames, in shares of the size.

    Raises:
      ValueError: for another name, or for eigen at another size.
    """
    if crop not in CROPS:
        raise ValueError(f"crop is one of {', '.join(CROPS)}, not {crop!r}")
    mask = np.full((height, width), crop == "none")
    if crop == "eigen":
        if (height, width) != _EIGEN_SIZE:
            raise ValueError(
                f"the eigen crop is a box in depth maps of 480 x 640 (height x width), these have {height} x {width}: "
                f"use crop='none'"
            )
        mask[_EIGEN_BOX] = True
    elif crop == "garg":
        rows, columns = (
            slice(*(int(share * length) for share in shares))
            for shares, length in ((_GARG_ROWS, height), (_GARG_COLUMNS, width))
        )
        mask[rows, columns] = True
    return mask


def valid_mask(target_bhw: Array, min_depth: float, max_depth: float, crop: str = "none") -> Array:
    """(B, H, W) bool: min_depth < target < max_depth, inside the crop."""
    inside = (target_bhw > min_depth) & (target_bhw < max_depth)
    return inside & crop_mask(crop, *target_bhw.shape[1:])


def depth_errors(depth_bhw: Array, target_bhw: Array, valid_bhw: Array) -> dict[str, Array]:
    """Every metric of every image, and whether it has any pixel to measure on.

    With d the depth, t the target and means over the valid pixels of one image:

      a1, a2, a3     share of pixels with max(d / t, t / d) < 1.25, 1.25², 1.25³
      abs_rel        mean |d - t| / t                 sq_rel    mean (d - t)² / t
      rmse           sqrt(mean (d - t)²)              rmse_log  sqrt(mean (ln d - ln t)²)
      log10          mean |log10 d - log10 t|         silog     100 * standard deviation of ln d - ln t

    Args:
      depth_bhw: (B, H, W) metres above 0, clamped to the range of the protocol.
      target_bhw: (B, H, W) metres, above 0 where valid.
      valid_bhw: (B, H, W) bool.

    Returns:
      {metric: (B,) float32} and "images" (B,): 1.0, or 0.0 for an image without a valid pixel, whose metrics say
      nothing.
    """
    count_b = jnp.sum(valid_bhw, axis=(1, 2), dtype=jnp.float32)

    def mean(values_bhw):
        return jnp.sum(jnp.where(valid_bhw, values_bhw, 0.0), axis=(1, 2)) / jnp.maximum(count_b, 1.0)

    depth = jnp.where(valid_bhw, depth_bhw.astype(jnp.float32), 1.0)
    target = jnp.where(valid_bhw, target_bhw.astype(jnp.float32), 1.0)
    difference, log_ratio = depth - target, jnp.log(depth) - jnp.log(target)
    ratio = jnp.maximum(depth / target, target / depth)
    # Centred before it is squared: the difference of two large means would lose what is left of it in float32.
    centred = log_ratio - mean(log_ratio)[:, None, None]
    errors = {
        "rmse": jnp.sqrt(mean(difference**2)),
        "abs_rel": mean(jnp.abs(difference) / target),
        "sq_rel": mean(difference**2 / target),
        "rmse_log": jnp.sqrt(mean(log_ratio**2)),
        "silog": 100.0 * jnp.sqrt(mean(centred**2)),
        "log10": mean(jnp.abs(log_ratio)) / np.log(10.0).astype(np.float32),
    } | {f"a{k}": mean((ratio < 1.25**k).astype(jnp.float32)) for k in (1, 2, 3)}
    return {name: errors[name] for name in METRICS} | {"images": (count_b > 0).astype(jnp.float32)}


def averaged(errors: dict[str, np.ndarray]) -> dict[str, float]:
    """{metric: mean over the images that have a valid pixel}, summed in float64.

    Args:
      errors: of `depth_errors`, for any number of images.

    Raises:
      ValueError: if no image has one.
    """
    counted = np.asarray(errors["images"]) > 0
    if not counted.any():
        raise ValueError(
            "no image has a pixel of known depth in the range that is measured: check min_depth, max_depth, crop, and "
            "the unit in which the source reads depth (metres)"
        )
    return {name: float(np.mean(np.asarray(errors[name])[counted], dtype=np.float64)) for name in METRICS}
