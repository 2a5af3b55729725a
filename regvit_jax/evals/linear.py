"""Linear probe: multinomial logistic regression on frozen features, fitted to its optimum.

There is no learning rate and no schedule: full-batch L-BFGS solves a convex problem, the same on every machine to
rounding. The one choice, the strength of the L2 penalty, is made on a tenth of the training set that the candidates
have not seen; then the head is fitted to all of it.
"""

import dataclasses
import logging
import time

import jax
import numpy as np
from jax.sharding import Mesh

from regvit_jax import sharding, stopping
from regvit_jax.evals import Evaluator, option
from regvit_jax.evals.convex_fit import HELD_OUT, fit, place, place_mask, prepare, score, split, standard_of, zero_head
from regvit_jax.evals.features import labelled_pair
from regvit_jax.evals.metrics import tops

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(Evaluator):
    """Accuracy of a linear classifier on the features after the final norm. See the top of the file.

    Metrics: "top1", "top5" (with more than 5 classes), and "l2", the penalty that was chosen.
    """

    TRUTH = "label"

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
    standard = standard_of(train_nd, scale=True)
    layout = dict(num_classes=num_classes, mesh=mesh)
    with jax.set_mesh(mesh):
        rows = prepare(train_nd, train_labels_n, standard, **layout)
        head = sharding.replicate(zero_head(train_nd.shape[1], num_classes), mesh)
        chosen = l2[0]
        if len(l2) > 1 and n > 1:
            used, held_out = (place_mask(mask, **layout) for mask in split(n))
            judged = {}
            # From strong to weak, each fit starts at the optimum of the one before.
            for strength in sorted(l2, reverse=True):
                stopping.poll()
                head = fit(*rows, used, strength, head, max_iter)[0]
                sums = sharding.gather(score(rows.x_nd, rows.y_n, held_out, head))
                judged[strength] = int(sums["top1"]), -float(sums["loss"])
            chosen = max(judged, key=judged.get)
            shares = ", ".join(
                f"{strength:g}: {hits / max(1, n // HELD_OUT):.3f}" for strength, (hits, _) in judged.items()
            )
            edge = ", at the edge of the choice" if chosen in (min(l2), max(l2)) else ""
            _log.info("linear probe: l2=%g chosen by top-1 on held-out samples (%s)%s", chosen, shares, edge)
        everything = place_mask(np.ones(n, bool), **layout)
        head, steps, _ = sharding.gather(fit(*rows, everything, chosen, head, max_iter))
        if steps >= max_iter:
            _log.warning(
                "linear probe: not converged after %d steps (max_iter); a stronger l2 converges sooner", max_iter
            )
        valid = place_mask(np.ones(len(test_md), bool), **layout)
        placed = place(test_md, test_labels_m, standard, **layout)
        sums = sharding.gather(score(*placed, valid, sharding.replicate(head, mesh)))
    _log.info(
        "linear probe: %d x %d features, %d classes, in %.1f s", *train_nd.shape, num_classes, time.monotonic() - start
    )
    return {f"top{k}": int(sums[f"top{k}"]) / len(test_md) for k in tops(num_classes)} | {"l2": float(chosen)}


EVALUATOR = Linear
