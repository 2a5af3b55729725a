"""What patch tokens still know of their place and their pixels: two linear probes, and measures of every patch.

Both probes read standardised patch tokens after the final norm and are fitted to all patches of the training images,
outliers among them: the position probe by a softmax over the h * w places of the grid, the pixel probe by least squares
on the 3 * p * p normalised values of the patch itself.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from regvit_jax import sharding
from regvit_jax.data.augment import normalize
from regvit_jax.data.sources import Source
from regvit_jax.evals.by_norm import check_finite
from regvit_jax.evals.convex_fit import Standard, fit, place_mask, prepare, zero_head
from regvit_jax.evals.features import batches, place
from regvit_jax.models.model import Model
from regvit_jax.ops.outliers import token_norms
from regvit_jax.trees import Array, Tree

# Of the variance of a direction: what is smaller is rounding of float32 sums, and least squares would divide by it.
_LEAST_VARIANCE = 1e-6


@dataclasses.dataclass(frozen=True)
class Moments:
    """First and second moments of n tokens x (D) and of their patches y (3 p p), float64, over all patches."""

    n: int
    mean_x: np.ndarray
    mean_y: np.ndarray
    cov_xx: np.ndarray
    cov_xy: np.ndarray


def collect(
    model: Model, source: Source, *, batch_size: int, mesh: Mesh, workers: int = 0
) -> tuple[np.ndarray, Moments, np.ndarray]:
    """(tokens (M, P, D) float32, Moments of them, index (M,)) of the images that can be read, by one pass."""
    model, tokens, places, sums = place(model, mesh), [], [], None
    with jax.set_mesh(mesh):
        for batch in batches(source, model.preprocessing, batch_size=batch_size, mesh=mesh, workers=workers):
            if sums is None:
                # Sums of squares about a rough mean: about zero, a channel that is nearly constant drowns in rounding.
                shift_d = sharding.replicate(sharding.gather(_rough_mean(model, batch)), mesh)
            index, x, found = sharding.gather((batch["index"], *_sums(model, batch, shift_d)))
            found = jax.tree.map(np.float64, found)
            sums = found if sums is None else jax.tree.map(np.add, sums, found)
            tokens.append(x[index >= 0])
            places.append(index[index >= 0])
    tokens = np.concatenate(tokens)
    check_finite(tokens, model)
    n = math.prod(tokens.shape[:2])
    x, y = sums["x"] / n, sums["y"] / n
    cov_xx, cov_xy = sums["xx"] / n - np.outer(x, x), sums["xy"] / n - np.outer(x, y)
    moments = Moments(n, x + sharding.gather(shift_d).astype(np.float64), y, cov_xx, cov_xy)
    return tokens, moments, np.concatenate(places)


def fit_probes(
    tokens_mpd: np.ndarray, moments: Moments, *, l2: float, ridge: float, max_iter: int, mesh: Mesh
) -> tuple[Tree, int]:
    """({"mean", "std", "position": head, "pixels": head}, steps that the position probe took); a head is {"kernel",
    "bias"} on standardised tokens.

    Args:
      l2: penalty of the position probe, l2 / 2 * |kernel|^2 beside the mean loss.
      ridge: of the pixel probe, on the scale of the variance of a standardised channel, which is 1.
      max_iter: most L-BFGS steps of the position probe.
    """
    images, patches, width = tokens_mpd.shape
    variance = np.diag(moments.cov_xx)
    constant = variance <= _LEAST_VARIANCE * np.maximum(moments.mean_x**2, _LEAST_VARIANCE)
    std = np.where(constant, 1.0, np.sqrt(np.maximum(variance, 0)))
    values, vectors = np.linalg.eigh(moments.cov_xx / np.outer(std, std))
    inverse = 1 / (np.maximum(values, 0) + ridge)
    pixels = vectors @ (inverse[:, None] * (vectors.T @ (moments.cov_xy / std[:, None])))
    standard = Standard(moments.mean_x.astype(np.float32), std.astype(np.float32))
    places = np.tile(np.arange(patches, dtype=np.int32), images)
    with jax.set_mesh(mesh):
        rows = prepare(tokens_mpd.reshape(-1, width), places, standard, num_classes=patches, mesh=mesh)
        everything = place_mask(np.ones(len(places), bool), patches, mesh)
        head = sharding.replicate(zero_head(width, patches), mesh)
        position, steps, _ = sharding.gather(fit(*rows, everything, l2, head, max_iter))
    probes = {
        "mean": standard.mean_d,
        "std": standard.std_d,
        "position": position,
        "pixels": {"kernel": pixels.astype(np.float32), "bias": moments.mean_y.astype(np.float32)},
    }
    return probes, int(steps)


def measure(
    model: Model, probes: Tree, source: Source, block: int, *, batch_size: int, mesh: Mesh, workers: int = 0
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """({measure: (M, h, w) float32}, index (M,)) of the images that can be read.

    Measures of a patch: "norm" of the residual stream after `block`; "cosine", to its two to four neighbours on the
    grid, mean, of what the patch projection makes of the pixels, before positions; "right", 1 where the position probe
    finds the place; "distance" in patches from there to the place it finds; "error", the L2 norm of what the pixel
    probe leaves of the normalised pixels; "plain", what their mean over the training set leaves.
    """
    model, parts, places = place(model, mesh), [], []
    with jax.set_mesh(mesh):
        probes = sharding.replicate(probes, mesh)
        for batch in batches(source, model.preprocessing, batch_size=batch_size, mesh=mesh, workers=workers):
            index, found = sharding.gather((batch["index"], _measure(model, probes, batch["image"], block)))
            places.append(index[index >= 0])
            parts.append({name: values[index >= 0] for name, values in found.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, np.concatenate(places)


def neighbour_cosine(x_bhwd: Array) -> Array:
    """(B, h, w) float32: mean cosine similarity of each cell with the cells above, below, left and right of it, those
    that exist. 0 for a grid of one cell."""
    x = x_bhwd.astype(jnp.float32)
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    total = count = jnp.zeros(x.shape[:3])
    for axis in (1, 2):
        before = (slice(None),) * axis + (slice(None, -1),)
        after = (slice(None),) * axis + (slice(1, None),)
        similar = jnp.sum(x[before] * x[after], axis=-1)
        total = total.at[before].add(similar).at[after].add(similar)
        count = count.at[before].add(1.0).at[after].add(1.0)
    return total / jnp.maximum(count, 1.0)


@jax.jit
def _rough_mean(model: Model, batch) -> Array:
    tokens = model.module()(_images(model, batch["image"]))
    valid = (batch["index"] >= 0).astype(jnp.float32)
    per_image = tokens.patches.astype(jnp.float32).mean(axis=1)
    return jnp.sum(per_image * valid[:, None], axis=0) / jnp.maximum(valid.sum(), 1.0)


@jax.jit
def _sums(model: Model, batch, shift_d) -> tuple[Array, dict[str, Array]]:
    """Tokens (B, P, D) float32, and sums over the patches of the images that count: x less the shift, y, products."""
    images = _images(model, batch["image"])
    tokens = model.module()(images).patches.astype(jnp.float32)
    weight = (batch["index"] >= 0).astype(jnp.float32)[:, None, None]
    x = ((tokens - shift_d) * weight).reshape(-1, tokens.shape[-1])
    y = (_pixels(images, model.config.patch_size) * weight).reshape(len(x), -1)
    sums = {"x": x.sum(axis=0), "y": y.sum(axis=0), "xx": _dot(x.T, x), "xy": _dot(x.T, y)}
    return sharding.constrain(tokens, sharding.BATCH), sums


@functools.partial(jax.jit, static_argnums=3)
def _measure(model: Model, probes: Tree, images_u8: Array, block: int) -> dict[str, Array]:
    images, module, stream = _images(model, images_u8), model.module(), f"block{block}"
    tokens, found = module(images, capture=(stream,))
    (h, w), patches = tokens.grid, math.prod(tokens.grid)
    x = (tokens.patches.astype(jnp.float32) - probes["mean"]) / probes["std"]
    guess_bp = jnp.argmax(_affine(x, probes["position"]), axis=-1)
    truth_p = jnp.arange(patches)
    y = _pixels(images, model.config.patch_size)
    projected = module.patch_embed(images, tokens.grid).reshape(-1, h, w, model.config.width)
    measures = {
        "norm": token_norms(found[stream][:, model.config.prefix :]),
        "cosine": neighbour_cosine(projected),
        "right": (guess_bp == truth_p).astype(jnp.float32),
        "distance": jnp.hypot(
            *((guess - truth).astype(jnp.float32) for guess, truth in _offsets(guess_bp, truth_p, w))
        ),
        "error": jnp.linalg.norm(y - _affine(x, probes["pixels"]), axis=-1),
        "plain": jnp.linalg.norm(y - probes["pixels"]["bias"], axis=-1),
    }
    return {name: sharding.constrain(values.reshape(-1, h, w), sharding.BATCH) for name, values in measures.items()}


def _offsets(guess, truth, w):
    return (guess // w, truth // w), (guess % w, truth % w)


def _images(model, images_u8):
    spec = model.preprocessing
    return normalize(images_u8, spec.mean, spec.std)


def _pixels(images, p):
    """(B, P, 3 p p) float32: the values of each patch, in the order of the patch projection's rows."""
    b, height, width, _ = images.shape
    h, w = height // p, width // p
    return images.reshape(b, h, p, w, p, 3).transpose(0, 1, 3, 2, 4, 5).reshape(b, h * w, -1)


def _affine(x, head):
    return _dot(x, head["kernel"]) + head["bias"]


def _dot(a, b):
    # The default precision of an accelerator is too coarse for sums of squares.
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
