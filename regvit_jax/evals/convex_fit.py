"""Classifiers fitted to their optimum: the convex problem under `linear` and `logreg`, solved by full-batch L-BFGS over
a mesh, the same on every machine to rounding.

    rows = prepare(train_nd, labels_n, standard_of(train_nd, scale=True), num_classes=10, mesh=mesh)
    head, steps, gradient = fit(*rows, weight_n, 1e-3, zero_head(D, 10), 500)

Labels are numbers of classes, and the loss is softmax cross-entropy; or they are a row of 1, 0 and -1 a sample (several
classes at once, -1: does not count), and the loss is the sum of binary cross-entropies: one against the rest.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from regvit_jax import sharding
from regvit_jax.evals.features import multiple_of
from regvit_jax.evals.metrics import top_k_hits
from regvit_jax.losses import one_hot, softmax_xent
from regvit_jax.trees import Array, Tree

HELD_OUT = 10  # one sample in so many chooses the penalty
_SEED = 0
# Of the gradient, in units where the curvature is about 1: the loss is then within about 1e-6 nats of the optimum.
TOLERANCE = 3e-4
# Where so many steps together gain less than this share of the loss, float32 has no more to give.
_PATIENCE, _GAIN = 10, 1e-5
# Directions with less than this share of the largest variance are rounding, not curvature.
_SMALLEST_VARIANCE = 1e-7
# More logits on a device are computed in parts, so many rows at once.
_MOST_LOGITS = 2**27
_BLOCK = 4096
_ROWS_AT_ONCE = 2**16  # in statistics on the host


class Rows(NamedTuple):
    """Samples on the mesh, centred, with rows of zeros behind them; and the axes along which features vary.

    x_nd: (N, D) float32. y_n: (N,) int32 or (N, C) int8. axes_dd, variance_d: eigenvectors and eigenvalues of the
    covariance.
    """

    x_nd: Array
    y_n: Array
    axes_dd: Array
    variance_d: Array


class Standard(NamedTuple):
    """What is taken off features and what they are divided by; (D,) float32 each."""

    mean_d: np.ndarray
    std_d: np.ndarray


def standard_of(x_nd: np.ndarray, *, scale: bool) -> Standard:
    """Mean, and standard deviation (1 where a feature is constant, or everywhere without `scale`), computed in parts in
    float64; `x_nd` may be a file mapped into memory."""
    parts = [x_nd[start : start + _ROWS_AT_ONCE] for start in range(0, len(x_nd), _ROWS_AT_ONCE)]
    mean_d = sum(part.sum(axis=0, dtype=np.float64) for part in parts) / len(x_nd)
    if not scale:
        return Standard(mean_d.astype(np.float32), np.ones(len(mean_d), np.float32))
    square_d = sum(((part - mean_d) ** 2).sum(axis=0) for part in parts) / len(x_nd)
    std_d = np.sqrt(square_d)
    constant = std_d <= 1e-6 * np.maximum(np.abs(mean_d), 1e-6)
    return Standard(mean_d.astype(np.float32), np.where(constant, 1.0, std_d).astype(np.float32))


def prepare(x_nd: np.ndarray, labels_n: np.ndarray, standard: Standard, *, num_classes: int, mesh: Mesh) -> Rows:
    """The training set of `fit`; arrays are equal on every process. Call it inside `jax.set_mesh(mesh)`."""
    x, y = place(x_nd, labels_n, standard, num_classes=num_classes, mesh=mesh)
    covariance = sharding.gather(_covariance(x)).astype(np.float64) / len(x_nd)
    values, vectors = np.linalg.eigh(covariance)
    return Rows(x, y, *sharding.replicate((vectors.astype(np.float32), np.maximum(values, 0).astype(np.float32)), mesh))


def place(
    x_nd: np.ndarray, labels_n: np.ndarray, standard: Standard, *, num_classes: int, mesh: Mesh
) -> tuple[Array, Array]:
    """Standardised rows and their labels over the mesh, with rows of zeros behind them."""
    rows = _rows(len(x_nd), num_classes, mesh)
    placed = sharding.put(
        {
            "x": local_rows(x_nd, rows),
            "y": local_rows(labels_n.astype(np.int8 if labels_n.ndim == 2 else np.int32), rows),
        },
        mesh,
    )
    return _standardised(placed["x"], len(x_nd), *sharding.replicate(tuple(standard), mesh)), placed["y"]


def place_mask(mask_n: np.ndarray, num_classes: int, mesh: Mesh) -> Array:
    """Which rows of `place` count: of `mask_n`, and none behind it."""
    return sharding.put({"mask": local_rows(mask_n, _rows(len(mask_n), num_classes, mesh))}, mesh)["mask"]


def split(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Boolean masks (N,) of the rows used and held out: a fixed random tenth, at least one."""
    held_out = np.zeros(n, bool)
    held_out[np.random.default_rng(_SEED).permutation(n)[: max(1, n // HELD_OUT)]] = True
    return ~held_out, held_out


def zero_head(dim: int, num_classes: int) -> Tree:
    return {"kernel": np.zeros((dim, num_classes), np.float32), "bias": np.zeros(num_classes, np.float32)}


@functools.partial(jax.jit, static_argnums=(7,))
def fit(
    x_nd, y_n, axes_dd, variance_d, weight_n, l2, head, max_iter: int, tolerance=TOLERANCE
) -> tuple[dict, Array, Array]:
    """The head that minimises mean loss over rows of weight 1, plus l2 / 2 * |kernel|^2; the bias is free.

    The curvature of the loss is at most half the covariance of the features, plus l2 (Böhning 1992; of binary losses a
    quarter). In coordinates where that bound is the identity, L-BFGS needs a few dozen steps, however correlated the
    features are; the optimum is the same.

    Args:
      x_nd, y_n, axes_dd, variance_d: `Rows`.
      weight_n: bool, the rows that count.
      head: {"kernel": (D, C), "bias": (C,)} to start from.
      tolerance: norm of the gradient, in those coordinates, at which it ends.

    Returns:
      head, number of steps, norm of the last gradient.
    """
    scale_d = jax.lax.rsqrt(0.5 * variance_d + l2 + _SMALLEST_VARIANCE * jnp.max(variance_d))
    weight_n = weight_n.astype(jnp.float32)
    count = jnp.sum(weight_n)

    def head_of(point):
        return {"kernel": _dot(axes_dd, scale_d[:, None] * point["kernel"]), "bias": point["bias"]}

    def objective(point):
        head = head_of(point)

        def total(x, y, weight):
            return jnp.sum(_losses(logits(x, head), y) * weight)

        data = _summed(total, (x_nd, y_n, weight_n), head["bias"].shape[0])
        return data / count + 0.5 * l2 * jnp.sum(head["kernel"] ** 2)

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry):
        point, state, (reference, since) = carry
        value, grad = value_and_grad(point, state=state)
        updates, state = solver.update(grad, state, point, value=value, grad=grad, value_fn=objective)
        gained = value < reference * (1 - _GAIN)
        watch = jnp.where(gained, value, reference), jnp.where(gained, 0, since + 1)
        return optax.apply_updates(point, updates), state, watch

    def size_of_gradient(state):
        return optax.tree.norm(optax.tree.get(state, "grad"))

    def unfinished(carry):
        _, state, (_, since) = carry
        steps = optax.tree.get(state, "count")
        going = (size_of_gradient(state) > tolerance) & (since < _PATIENCE)
        return (steps == 0) | ((steps < max_iter) & going)

    start = {"kernel": _dot(axes_dd.T, head["kernel"]) / scale_d[:, None], "bias": head["bias"]}
    watch = jnp.float32(jnp.inf), jnp.int32(0)
    point, state, _ = jax.lax.while_loop(unfinished, step, (start, solver.init(start), watch))
    # The next fit starts from this head: laid out otherwise than the first one, it would be compiled again.
    head = jax.tree.map(sharding.constrain, head_of(point))
    return head, optax.tree.get(state, "count"), size_of_gradient(state)


@jax.jit
def score(x_nd: Array, y_n: Array, valid_n: Array, head: Tree) -> dict[str, Array]:
    """Sums over the valid rows: "top1" and "top5" right ones, "loss" nats, and (C,) right and all ones of each class,
    "class_hits" and "class_count". For labels that are numbers of classes."""
    classes = head["bias"].shape[0]

    def sums(x, y, valid):
        scores = logits(x, head)
        right = (jnp.argmax(scores, axis=1) == y) & valid
        return top_k_hits(scores, y, valid) | {
            "loss": jnp.sum(_losses(scores, y) * valid),
            "class_hits": jnp.zeros(classes, jnp.int32).at[y].add(right),
            "class_count": jnp.zeros(classes, jnp.int32).at[y].add(valid),
        }

    return _summed(sums, (x_nd, y_n, valid_n), classes)


@jax.jit
def logits(x_nd: Array, head: Tree) -> Array:
    """(N, C) scores."""
    return _dot(x_nd, head["kernel"]) + head["bias"]


def _losses(scores_nc, y_n):
    """(N,) nats."""
    if y_n.ndim == 1:
        return softmax_xent(scores_nc, one_hot(y_n, scores_nc.shape[1]))
    sign_nc = jnp.where(y_n > 0, 1.0, -1.0)
    return -jnp.sum(jax.nn.log_sigmoid(sign_nc * scores_nc) * (y_n >= 0), axis=1)


def _summed(fn: Callable, rows: tuple, classes: int) -> Tree:
    """The sums that `fn` makes over rows, part by part where their logits would fill the memory of a device."""
    devices = sharding.axis_size("data") * sharding.axis_size("fsdp")
    each = len(rows[0]) // devices
    if each * classes <= _MOST_LOGITS or each % _BLOCK:
        return fn(*rows)

    def cut(a):
        parts = a.reshape(devices, each // _BLOCK, _BLOCK, *a.shape[1:]).swapaxes(0, 1)
        return sharding.constrain(parts.reshape(-1, devices * _BLOCK, *a.shape[1:]), None, sharding.BATCH)

    parts = tuple(map(cut, rows))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(fn, *(p[0] for p in parts)))
    # Backwards, the logits of a part are computed again: all of them together are what must not be kept.
    return jax.lax.scan(
        lambda total, part: (jax.tree.map(jnp.add, total, jax.checkpoint(fn)(*part)), None), zeros, parts
    )[0]


def _dot(a, b):
    # The default precision of an accelerator is too coarse for a line search.
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _covariance(x_nd):
    return _dot(x_nd.T, x_nd)


@functools.partial(jax.jit, static_argnums=1)
def _standardised(x_nd, n, mean_d, std_d):
    standard_nd = (x_nd.astype(jnp.float32) - mean_d) / std_d
    return sharding.constrain(jnp.where(jnp.arange(len(x_nd))[:, None] < n, standard_nd, 0.0), sharding.BATCH)


def _rows(n, num_classes, mesh):
    """`n` rounded up to what the mesh can split, and where there are many logits, `_summed` too."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = multiple_of(mesh, n)
    if rows // devices * num_classes <= _MOST_LOGITS:
        return rows
    return multiple_of(mesh, -(-rows // (devices * _BLOCK)) * devices * _BLOCK)


def local_rows(array, rows):
    """This process's part of `rows` rows: of an array that all processes hold, and zeros behind it."""
    part = rows // jax.process_count()
    own = array[jax.process_index() * part : (jax.process_index() + 1) * part]
    if len(own) == part:
        return own
    return np.concatenate([own, np.zeros((part - len(own), *array.shape[1:]), array.dtype)])
