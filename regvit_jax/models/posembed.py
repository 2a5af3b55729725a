"""Position rows at any patch grid: the three bicubic resamplers under which weights were released, and 2-D sines and
cosines.

Each resampler is separable: out = R grid C^T, with two small matrices that depend on sizes only and are built in
  float64 on
the host. Gradients flow through the product.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from regvit_jax.trees import Array


def resample(grid_hwd: Array, size: tuple[int, int], method: str) -> Array:
    """Position rows of a native (h0, w0) grid at another grid.

    Args:
      grid_hwd: (h0, w0, D), computed in float32 whatever its dtype.
      size: (h, w) wanted. At the native size the rows are returned untouched.
      method: "antialias": torch bicubic with antialias (Keys a = -0.5, weights renormalised at the border);
        "bicubic": without (a = -0.75, border clamped); "bicubic_offset": the same with coordinates taken from the scale
        (n + 0.1) / n0, as the DINO line of models passes it.

    Returns:
      (h, w, D) float32.

    Source: torch.nn.functional.interpolate as called by DINOv2, DINO, timm, DeiT-III and Hugging Face; one table of
    which family uses which is in `ViTConfig.resampler`.
    """
    grid_hwd = grid_hwd.astype(jnp.float32)
    h0, w0, _ = grid_hwd.shape
    if (h0, w0) == tuple(size):
        return grid_hwd
    rows, columns = _weights(h0, size[0], method), _weights(w0, size[1], method)
    return jnp.einsum("yh,xw,hwd->yxd", rows, columns, grid_hwd, precision=jax.lax.Precision.HIGHEST)


def sincos(grid: tuple[int, int], width: int) -> np.ndarray:
    """(h * w, D) float32: a quarter of the channels each for sin(x), cos(x), sin(y), cos(y) at geometric frequencies.

    Source: the fixed two-dimensional encoding of MoCo v3 and of the "better plain ViT" baseline.
    """
    frequency = 1.0 / 10_000.0 ** (np.arange(width // 4) / max(width // 4 - 1, 1))
    y, x = (axis.reshape(-1, 1) * frequency for axis in np.mgrid[: grid[0], : grid[1]].astype(np.float64))
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1).astype(np.float32)


@functools.lru_cache(maxsize=256)
def _weights(n0: int, n: int, method: str) -> np.ndarray:
    """(n, n0) float32: row i holds the weights of the source rows in output row i."""
    return (_antialias_weights(n0, n) if method == "antialias" else _clamped_weights(n0, n, method)).astype(np.float32)


def _antialias_weights(n0: int, n: int) -> np.ndarray:
    scale = n0 / n
    stretch = max(scale, 1.0)
    centre = (np.arange(n) + 0.5) * scale
    weights = _keys((np.arange(n0) + 0.5 - centre[:, None]) / stretch, a=-0.5)
    return weights / weights.sum(axis=1, keepdims=True)


def _clamped_weights(n0: int, n: int, method: str) -> np.ndarray:
    scale = n0 / (n + 0.1) if method == "bicubic_offset" else n0 / n
    source = (np.arange(n) + 0.5) * scale - 0.5
    first = np.floor(source).astype(int)
    weights = np.zeros((n, n0))
    for tap in range(-1, 3):
        index = np.clip(first + tap, 0, n0 - 1)
        np.add.at(weights, (np.arange(n), index), _keys(source - (first + tap), a=-0.75))
    return weights


def _keys(u: np.ndarray, a: float) -> np.ndarray:
    """The cubic convolution kernel of Keys (1981)."""
    u = np.abs(u)
    near = (a + 2) * u**3 - (a + 3) * u**2 + 1
    far = a * u**3 - 5 * a * u**2 + 8 * a * u - 4 * a
    return np.where(u <= 1, near, np.where(u < 2, far, 0.0))
