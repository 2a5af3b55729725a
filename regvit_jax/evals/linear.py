"""Linear probe: multinomial logistic regression on frozen features, fitted to its optimum.

There is no learning rate and no schedule: full-batch L-BFGS solves a convex problem, the same on every machine to
rounding. The one choice, the strength of the L2 penalty, is made on a tenth of the training set that the candidates
have not seen; then the head is fitted to all of it.
"""

import dataclasses
import functools
import logging
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from regvit_jax import sharding, stopping
from regvit_jax.evals import Evaluator, option
from regvit_jax.evals.features import labelled_pair, multiple_of
from regvit_jax.evals.metrics import top_k_hits, tops
from regvit_jax.losses import one_hot, softmax_xent
from regvit_jax.trees import Array

HELD_OUT = 10  # one sample in so many chooses the penalty
_SEED = 0
# Of the gradient, in units where the curvature is about 1: the loss is then within about 1e-6 nats of the optimum.
_TOLERANCE = 3e-4

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(Evaluator):
    """Accuracy of a linear classifier on the features after the final norm. See the top of the file.

    Metrics: "top1", "top5" (with more than 5 classes), and "l2", the penalty that was chosen.
    """

    features: tuple[str, ...] = option(
        ("cls", "mean_patch"), "what the classifier sees, side by side: cls | mean_patch | block-4/cls"
    )
    l2: tuple[float, ...] = option(
        (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5, 1e-6), "penalties to choose from: l2 / 2 * |W|^2 beside the mean loss"
    )
    max_iter: int = option(500, "most L-BFGS steps of one fit")

    def __post_init__(self):
        super().__post_init__()
        self.check("features", bool(self.features), "one or more features")
        self.check("l2", bool(self.l2) and min(self.l2, default=0.0) > 0, "one or more positive numbers")
        self.check("max_iter", self.max_iter >= 1, "at least 1")

    def run(self, model, *, mesh, out_dir) -> dict[str, float]:
        train, test = labelled_pair(self, model, self.features, mesh)
        return linear_accuracy(
            train.joined(self.features),
            train.labels,
            test.joined(self.features),
            test.labels,
            num_classes=train.num_classes,
            l2=self.l2,
            max_iter=self.max_iter,
            mesh=mesh,
        )


def linear_accuracy(
    train_nd: np.ndarray,
    train_labels_n: np.ndarray,
    test_md: np.ndarray,
    test_labels_m: np.ndarray,
    *,
    num_classes: int,
    l2: tuple[float, ...],
    max_iter: int = 200,
    mesh: Mesh,
) -> dict[str, float]:
    """{"top1", "top5", "l2"} on the test rows of a head fitted to the training rows; arrays equal on every process."""
    start = time.monotonic()
    n = len(train_nd)
    mean_d, std_d = _statistics(train_nd)
    with jax.set_mesh(mesh):
        x, y = _place((train_nd - mean_d) / std_d, train_labels_n, mesh)
        rotation = _principal_axes(x, n, mesh)
        problem = x, y, *rotation
        head = sharding.replicate(_zero_head(train_nd.shape[1], num_classes), mesh)
        chosen = l2[0]
        if len(l2) > 1 and n > 1:
            used, held_out = (_place_mask(mask, mesh) for mask in _split(n))
            judged = {}
            # From strong to weak, each fit starts at the optimum of the one before.
            for strength in sorted(l2, reverse=True):
                stopping.poll()
                head = fit(*problem, used, strength, head, max_iter)[0]
                hits, loss = sharding.gather(_score(x, y, held_out, head))
                judged[strength] = int(hits["top1"]), -float(loss)
            chosen = max(judged, key=judged.get)
            shares = ", ".join(
                f"{strength:g}: {hits / max(1, n // HELD_OUT):.3f}" for strength, (hits, _) in judged.items()
            )
            edge = ", at the edge of the choice" if chosen in (min(l2), max(l2)) else ""
            _log.info("linear probe: l2=%g chosen by top-1 on held-out samples (%s)%s", chosen, shares, edge)
        everything = _place_mask(np.ones(n, bool), mesh)
        head, steps, _ = sharding.gather(fit(*problem, everything, chosen, head, max_iter))
        if steps >= max_iter:
            _log.warning(
                "linear probe: not converged after %d steps (max_iter); a stronger l2 converges sooner", max_iter
            )
        x, y = _place((test_md - mean_d) / std_d, test_labels_m, mesh)
        valid = _place_mask(np.ones(len(test_md), bool), mesh)
        hits, _ = sharding.gather(_score(x, y, valid, sharding.replicate(head, mesh)))
    _log.info(
        "linear probe: %d x %d features, %d classes, in %.1f s", *train_nd.shape, num_classes, time.monotonic() - start
    )
    return {f"top{k}": int(hits[f"top{k}"]) / len(test_md) for k in tops(num_classes)} | {"l2": float(chosen)}


@functools.partial(jax.jit, static_argnums=(7,))
def fit(x_nd, y_n, axes_dd, variance_d, weight_n, l2, head, max_iter: int) -> tuple[dict, Array, Array]:
    """The head that minimises mean cross-entropy over rows of weight 1, plus l2 / 2 * |kernel|^2; the bias is free.

    The curvature of the loss is at most half the covariance of the features, plus l2 (Böhning 1992). In coordinates
    where that bound is the identity, L-BFGS needs a few dozen steps, however correlated the features are; the optimum
    is the same.

    Args:
      x_nd: standardised features. y_n: labels. weight_n: bool, the rows that count.
      axes_dd, variance_d: eigenvectors and eigenvalues of the covariance.
      head: {"kernel": (D, C), "bias": (C,)} to start from.

    Returns:
      head, number of steps, norm of the last gradient.
    """
    scale_d = jax.lax.rsqrt(0.5 * variance_d + l2)
    weight_n = weight_n.astype(jnp.float32)
    targets_nc = one_hot(y_n, head["bias"].shape[0])

    def head_of(point):
        return {"kernel": _dot(axes_dd, scale_d[:, None] * point["kernel"]), "bias": point["bias"]}

    def objective(point):
        head = head_of(point)
        losses_n = softmax_xent(_logits(x_nd, head), targets_nc)
        return jnp.sum(losses_n * weight_n) / jnp.sum(weight_n) + 0.5 * l2 * jnp.sum(head["kernel"] ** 2)

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry):
        point, state = carry
        value, grad = value_and_grad(point, state=state)
        updates, state = solver.update(grad, state, point, value=value, grad=grad, value_fn=objective)
        return optax.apply_updates(point, updates), state

    def size_of_gradient(state):
        return optax.tree.norm(optax.tree.get(state, "grad"))

    def unfinished(carry):
        steps = optax.tree.get(carry[1], "count")
        return (steps == 0) | ((steps < max_iter) & (size_of_gradient(carry[1]) > _TOLERANCE))

    start = {"kernel": _dot(axes_dd.T, head["kernel"]) / scale_d[:, None], "bias": head["bias"]}
    point, state = jax.lax.while_loop(unfinished, step, (start, solver.init(start)))
    # The next fit starts from this head: laid out otherwise than the first one, it would be compiled again.
    head = jax.tree.map(sharding.constrain, head_of(point))
    return head, optax.tree.get(state, "count"), size_of_gradient(state)


@jax.jit
def _score(x_nd, y_n, valid_n, head) -> tuple[dict[str, Array], Array]:
    """({"top1": count, …}, summed cross-entropy) of the valid rows."""
    logits_nc = _logits(x_nd, head)
    losses_n = softmax_xent(logits_nc, one_hot(y_n, logits_nc.shape[1]))
    return top_k_hits(logits_nc, y_n, valid_n), jnp.sum(losses_n * valid_n)


def _logits(x_nd, head):
    return _dot(x_nd, head["kernel"]) + head["bias"]


def _dot(a, b):
    # The default precision of an accelerator is too coarse for a line search.
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _statistics(x_nd):
    """(D,) mean and standard deviation, float32; 1 where a feature is constant."""
    mean_d = x_nd.mean(axis=0, dtype=np.float64)
    std_d = x_nd.std(axis=0, dtype=np.float64)
    constant = std_d <= 1e-6 * np.maximum(np.abs(mean_d), 1e-6)
    return mean_d.astype(np.float32), np.where(constant, 1.0, std_d).astype(np.float32)


def _principal_axes(x, n, mesh):
    """Eigenvectors (D, D) and eigenvalues (D,) of the covariance of standardised rows, on the mesh."""
    covariance = sharding.gather(jax.jit(lambda x: _dot(x.T, x) / n)(x)).astype(np.float64)
    values, vectors = np.linalg.eigh(covariance)
    return sharding.replicate((vectors.astype(np.float32), np.maximum(values, 0).astype(np.float32)), mesh)


def _split(n):
    """Boolean masks (N,) of the rows used and held out: a fixed random tenth, at least one."""
    held_out = np.zeros(n, bool)
    held_out[np.random.default_rng(_SEED).permutation(n)[: max(1, n // HELD_OUT)]] = True
    return ~held_out, held_out


def _zero_head(dim, num_classes):
    return {"kernel": np.zeros((dim, num_classes), np.float32), "bias": np.zeros(num_classes, np.float32)}


def _place(x_nd, labels_n, mesh):
    """Rows and labels over the mesh, with rows of zeros behind them where they do not divide."""
    placed = sharding.put({"x": _local(x_nd, mesh), "y": _local(labels_n.astype(np.int32), mesh)}, mesh)
    return placed["x"], placed["y"]


def _place_mask(mask_n, mesh):
    return sharding.put({"mask": _local(mask_n, mesh)}, mesh)["mask"]


def _local(array, mesh):
    """This process's rows of an array that all processes hold, padded with zeros to what the mesh can split."""
    rows = multiple_of(mesh, len(array))
    part = rows // jax.process_count()
    own = array[jax.process_index() * part : (jax.process_index() + 1) * part]
    return np.concatenate([own, np.zeros((part - len(own), *array.shape[1:]), array.dtype)])


EVALUATOR = Linear
