"""Logistic regression on frozen features: the protocol of DINOv2, which table 1 of the registers paper uses too.

The features of the class token after the final norm, as they are; the whole image's short side at the model's size, the
centre cut out. The head minimises

    C * (sum of the cross-entropies) + |W|^2 / 2        (scikit-learn's convention; the bias is free)

for 45 values of C. The best one is chosen on a tenth of the training set that is held out, or on a validation set;
then the head is fitted to all of both. `linear` solves the same problem on standardised features, with a short list of
penalties.
"""

import dataclasses
import logging
import time

import jax
import numpy as np
from jax.sharding import Mesh

from regvit_jax import sharding, stopping
from regvit_jax.evals import Evaluator, option
from regvit_jax.evals.convex_fit import fit, logits, place, place_mask, prepare, score, split, standard_of, zero_head
from regvit_jax.evals.features import Features, extract, labelled_pair
from regvit_jax.evals.metrics import mean_average_precision_11, mean_per_class, tops
from regvit_jax.trees import Tree

C_GRID = tuple(float(value) for value in 10.0 ** np.linspace(-6, 5, 45))
CHOICES = ("held_out", "eval")

# With a weak penalty the loss of separable classes goes towards zero, and so does the gradient: the usual tolerance
# would end there too early.
_TOLERANCE = 1e-5

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogReg(Evaluator):
    """Accuracy of L2-regularised logistic regression. See the top of the file.

    Metrics: "top1", "top5" (with more than 5 classes), "mean_per_class" (of the top-1 accuracies), and "C", the value
    that was chosen.
    """

    TRUTH = "label"

    feature: str = option(
        "cls", "what the classifier sees: cls | mean_patch, of the last block or another: block-4/cls"
    )
    C: tuple[float, ...] = option(C_GRID, "weights of the data against the penalty, to choose from")
    choose_on: str = option("held_out", "where C is chosen: held_out (a tenth of `data`) | eval (on the numbers told)")
    val_data: str = option("", "source on which C is chosen, and which the last fit learns from too; empty: none")
    crop_ratio: float = option(1.0, "of the preparation of images, see Preprocess; 0: as the model's own says")
    max_iter: int = option(1000, "most L-BFGS steps of one fit")

    def __post_init__(self):
        super().__post_init__()
        self.check("C", bool(self.C) and min(self.C, default=0.0) > 0, "one or more positive numbers")
        self.check("choose_on", self.choose_on in CHOICES, f"one of {', '.join(CHOICES)}")
        self.check("val_data", not self.val_data or self.choose_on == "held_out", "empty with choose_on='eval'")
        self.check("crop_ratio", 0 <= self.crop_ratio <= 1, "in (0, 1], or 0")
        self.check("max_iter", self.max_iter >= 1, "at least 1")

    def run(self, model, *, mesh, out_dir) -> dict[str, float]:
        if self.crop_ratio:
            spec = dataclasses.replace(model.preprocessing, crop_ratio=self.crop_ratio)
            model = dataclasses.replace(model, preprocessing=spec)
        train, test = labelled_pair(self, model, (self.feature,), mesh)
        return logistic_regression(
            train.arrays[self.feature],
            train.labels,
            test.arrays[self.feature],
            test.labels,
            num_classes=train.num_classes,
            C=self.C,
            validation=self._validation(model, train, mesh),
            choose_on=self.choose_on,
            max_iter=self.max_iter,
            mesh=mesh,
        )

    def _validation(self, model, train: Features, mesh):
        if not self.val_data:
            return None
        found = extract(
            model,
            self.val_data,
            outputs=(self.feature,),
            batch_size=self.batch_size,
            mesh=mesh,
            cache_dir=self.cache_dir,
            workers=self.workers,
            max_bad=self.max_bad,
        ).labelled()
        if found.class_names != train.class_names:
            raise ValueError(f"val_data={self.val_data!r} and {self.data!r} do not have the same classes")
        return found.arrays[self.feature], found.labels


def logistic_regression(
    train_nd: np.ndarray,
    train_labels_n: np.ndarray,
    test_md: np.ndarray,
    test_labels_m: np.ndarray,
    *,
    num_classes: int,
    C: tuple[float, ...] = C_GRID,
    metric: str = "",
    validation: tuple[np.ndarray, np.ndarray] | None = None,
    choose_on: str = "held_out",
    max_iter: int = 1000,
    mesh: Mesh,
) -> dict[str, float]:
    """{"top1", "top5", "mean_per_class", "C"} on the test rows, or {"map11", "C"} where samples have several classes.

    Args:
      train_nd, test_md: features, used as they are; arrays are equal on every process.
      train_labels_n, test_labels_m: (N,) numbers of classes; or (N, C) of 1 (shown), 0 (not) and -1 (does not count),
        for which one classifier a class is fitted against the rest, all with the same C.
      C: from which the best is taken, the smallest of equals; one alone is taken as it is.
      metric: what is best: a name of the result; empty: "top1", or "map11".
      validation: (features, labels) that C is chosen on; the last fit learns from them too. None: see `choose_on`.
      choose_on: "held_out", a fixed tenth of the training rows, or "eval", the test rows themselves.
      max_iter: most L-BFGS steps of one fit; each starts at the optimum of the one before.

    Raises:
      ValueError: for a metric or a `choose_on` that is not there.
    """
    several = train_labels_n.ndim == 2
    metric = metric or ("map11" if several else "top1")
    if metric not in (["map11"] if several else ["mean_per_class", *(f"top{k}" for k in tops(num_classes))]):
        raise ValueError(f"metric={metric!r} is not measured here: C cannot be chosen by it")
    if choose_on not in CHOICES:
        raise ValueError(f"choose_on is one of {', '.join(CHOICES)}, not {choose_on!r}")
    start, n = time.monotonic(), len(train_nd)
    x_nd, y_n = train_nd, train_labels_n
    if validation is not None:
        x_nd, y_n = np.concatenate([train_nd, validation[0]]), np.concatenate([train_labels_n, validation[1]])
    layout = dict(num_classes=num_classes, mesh=mesh)
    with jax.set_mesh(mesh):
        # Taking the mean off changes the bias only, which costs nothing; numbers near zero keep more digits.
        standard = standard_of(x_nd, scale=False)
        rows = prepare(x_nd, y_n, standard, **layout)
        test = *place(test_md, test_labels_m, standard, **layout), np.ones(len(test_md), bool), test_labels_m
        head = sharding.replicate(zero_head(x_nd.shape[1], num_classes), mesh)
        chosen = C[0]
        if len(C) > 1:
            used, judged_on = _choosing(x_nd, y_n, n, validation is not None, choose_on, rows, test)
            used_mask, judged = place_mask(used, **layout), {}
            for weight in sorted(C):
                stopping.poll()
                head, steps, _ = fit(*rows, used_mask, _l2(weight, used, y_n, num_classes), head, max_iter, _TOLERANCE)
                judged[weight] = _measured(*judged_on, head, **layout)[metric]
                _log.debug("C=%.3g: %s %.4f after %d steps", weight, metric, judged[weight], steps)
            chosen = max(sorted(judged), key=judged.get)
            edge = ", at the edge of the choice" if chosen in (min(C), max(C)) else ""
            _log.info("logistic regression: C=%.3g chosen by %s %.4f%s", chosen, metric, judged[chosen], edge)
        everything = np.ones(len(x_nd), bool)
        # From no head at all: what is told does not depend on the other values of C.
        head = sharding.replicate(zero_head(x_nd.shape[1], num_classes), mesh)
        l2 = _l2(chosen, everything, y_n, num_classes)
        head, steps, _ = fit(*rows, place_mask(everything, **layout), l2, head, max_iter, _TOLERANCE)
        if steps >= max_iter:
            _log.warning("logistic regression: not converged after %d steps (max_iter) with C=%.3g", max_iter, chosen)
        found = _measured(*test, head, **layout)
    _log.info(
        "logistic regression: %d x %d features, %d classes, %d values of C in %.1f s",
        *(*x_nd.shape, num_classes, len(C), time.monotonic() - start),
    )
    return found | {"C": float(chosen)}


def _choosing(x_nd, y_n, n, validated, choose_on, rows, test):
    """(mask of the rows that the fits use, what `_measured` takes to judge them)."""
    if choose_on == "eval":
        return np.ones(len(x_nd), bool), test
    used = np.arange(len(x_nd)) < n if validated else split(n)[0]
    return used, (rows.x_nd, rows.y_n, ~used, y_n)


def _l2(weight, used, labels, num_classes):
    """The penalty beside a mean that stands for `weight` before a sum."""
    # Of two classes, scikit-learn and cuML fit one vector w; as two, w / 2 and -w / 2, it would be penalised half as
    # much.
    return np.float32((2 if num_classes == 2 and labels.ndim == 1 else 1) / (weight * max(1, used.sum())))


def _measured(x, y, mask, labels, head: Tree, *, num_classes, mesh) -> dict[str, float]:
    """The metrics of the rows of `mask`; x and y are on the mesh, mask and labels on the host."""
    if labels.ndim == 2:
        scores = sharding.gather(logits(x, head))[: len(mask)][mask]
        return {"map11": mean_average_precision_11(scores, labels[mask])}
    sums = sharding.gather(score(x, y, place_mask(mask, num_classes, mesh), head))
    found = {f"top{k}": int(sums[f"top{k}"]) / int(mask.sum()) for k in tops(num_classes)}
    found["mean_per_class"] = mean_per_class(sums["class_hits"], sums["class_count"])
    return found


EVALUATOR = LogReg
