"""By norm: what evaluators share that tell outlier patches from normal ones.

A patch is an outlier where the norm of its residual stream after one block, before the final norm, exceeds a cut-off.
The cut-off is one number a network: given, or found by a rule of `ops.outliers` in training images.
"""

import dataclasses
import functools

import jax
import numpy as np
from jax.sharding import Mesh

from regvit_jax import sharding
from regvit_jax.data.augment import normalize
from regvit_jax.data.sources import Source, Subset
from regvit_jax.evals import Evaluator, option
from regvit_jax.evals.features import batches, place, source_of
from regvit_jax.models.model import Model
from regvit_jax.ops.outliers import RULES, cutoff, token_norms
from regvit_jax.trees import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByNorm(Evaluator):
    """The options of an evaluator that looks at outliers and normal patches apart. See the top of the file."""

    block: int = option(-1, "block to look at, from the end if negative; the last one of DINOv2-L shrinks outliers: -2")
    rule: str = option("mad", "what is an outlier: mad | sigma | percentile | otsu | absolute, see ops.outliers")
    value: float = option(-1.0, "parameter of the rule; negative: its usual one (absolute has none)")
    calibrate: int = option(
        1024, "number of training images, the first ones, in which a rule finds its cut-off; 0: all"
    )

    def __post_init__(self):
        super().__post_init__()
        self.check("rule", self.rule in RULES, f"one of {', '.join(RULES)}")
        self.check("value", self.rule != "absolute" or self.value > 0, "positive with rule='absolute'")
        self.check("calibrate", self.calibrate >= 0, "0 or more")

    def check_block(self, model: Model) -> None:
        """Raises ValueError if the network has no such block."""
        depth = model.config.depth
        if not -depth <= self.block < depth:
            raise ValueError(f"block={self.block}: this network has {depth} blocks")

    def limit(self, model: Model, mesh: Mesh) -> float:
        """The cut-off. All processes must call it: but for rule='absolute' it looks at training images."""
        if self.rule == "absolute":
            return float(self.value)
        source = source_of(self.data)
        first = Subset(source, 0, min(self.calibrate or len(source), len(source)))
        norms = patch_norms(model, first, self.block, batch_size=self.batch_size, mesh=mesh, workers=self.workers)
        return self.limit_of(norms)

    def limit_of(self, norms: np.ndarray) -> float:
        """The cut-off that the rule finds in norms of patches."""
        return float(cutoff(norms, self.rule, None if self.value < 0 else self.value))


def patch_norms(
    model: Model, source: Source, block: int, *, batch_size: int, mesh: Mesh, workers: int = 0
) -> np.ndarray:
    """(M, P) float32: the norm of every patch after `block`, of the images of a source that can be read, in no order.

    Raises:
      ValueError: if a norm is not finite.
    """
    model, parts = place(model, mesh), []
    with jax.set_mesh(mesh):
        for batch in batches(source, model.preprocessing, batch_size=batch_size, mesh=mesh, workers=workers):
            index, norms = sharding.gather((batch["index"], _patch_norms(model, batch["image"], block)))
            parts.append(norms[index >= 0])
    norms = np.concatenate(parts)
    check_finite(norms, model)
    return norms


def check_finite(values: np.ndarray, model: Model) -> None:
    """Raises ValueError if tokens, or their norms, are not finite: (images, …)."""
    bad = len(values) - int(np.isfinite(values).reshape(len(values), -1).all(axis=1).sum())
    if bad:
        raise ValueError(
            f"tokens are NaN or infinite in {bad} of {len(values)} images: the weights have diverged, or the dtype "
            f"{model.run.dtype} is too narrow for them"
        )


@functools.partial(jax.jit, static_argnums=2)
def _patch_norms(model: Model, images_u8: Array, block: int) -> Array:
    spec, name = model.preprocessing, f"block{block}"
    _, found = model.module()(normalize(images_u8, spec.mean, spec.std), capture=(name,))
    return sharding.constrain(token_norms(found[name][:, model.config.prefix :]), sharding.BATCH)
