"""Accuracy of the model's own classification head: nothing is fitted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from regvit_jax import sharding
from regvit_jax.data.augment import normalize
from regvit_jax.evals import Evaluator
from regvit_jax.evals.features import batches, leave_out, place, source_of
from regvit_jax.evals.metrics import top_k_hits
from regvit_jax.losses import one_hot, softmax_xent
from regvit_jax.models.model import Model
from regvit_jax.trees import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accuracy(Evaluator):
    """Metrics: "top1", "top5" (with more than 5 classes) and "loss" (cross-entropy, nats), over samples with a
    label."""

    NEEDS = ("eval_data",)
    TRUTH = "label"

    def run(self, model, *, mesh, out_dir) -> dict[str, float]:
        source = source_of(self.eval_data)
        classes = model.config.num_classes
        if not classes:
            raise ValueError("this model has no classification head: measure it by knn or linear")
        if source.num_classes != classes:
            raise ValueError(f"the head has {classes} classes, {self.eval_data!r} has {source.num_classes}")
        model = place(model, mesh)
        totals: list[tuple[dict, Array]] = []
        with jax.set_mesh(mesh):
            for batch in batches(
                source, model.preprocessing, batch_size=self.batch_size, mesh=mesh, workers=self.workers
            ):
                totals.append((_count(model, batch), batch["index"]))
            found, index = zip(*sharding.gather(totals), strict=True)
        leave_out(source, self.eval_data, np.concatenate(index), self.max_bad)
        sums = {name: float(np.sum([part[name] for part in found], dtype=np.float64)) for name in found[0]}
        count = sums.pop("count")
        if not count:
            raise ValueError(f"{self.eval_data!r} has no labels, so there is nothing to be right about")
        return {name: total / count for name, total in sums.items()}


@jax.jit
def _count(model: Model, batch: dict[str, Array]) -> dict[str, Array]:
    """Sums over the labelled rows of a batch."""
    valid = (batch["index"] >= 0) & (batch["label"] >= 0)
    spec = model.preprocessing
    logits = model.logits(normalize(batch["image"], spec.mean, spec.std))
    loss_b = softmax_xent(logits, one_hot(batch["label"], logits.shape[1]))
    hits = top_k_hits(logits, batch["label"], valid)
    return hits | {"loss": jnp.sum(loss_b * valid), "count": jnp.sum(valid)}


EVALUATOR = Accuracy
