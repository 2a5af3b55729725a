"""The heads of the grid of linear classifiers: what each sees, their joint loss and optimiser, and their accuracies.

Heads that see the same are one kernel (F, L, C) over L learning rates, so that all of them take one matrix product. The
loss is the sum over heads: the gradient of each is that of its own.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from regvit_jax import sharding
from regvit_jax.evals.convex_fit import local_rows
from regvit_jax.evals.features import Features, multiple_of, pooled
from regvit_jax.losses import one_hot, softmax_xent, top_k_correct
from regvit_jax.models.model import Model
from regvit_jax.trees import Array, Tree

_MOMENTUM, _STD = 0.9, 0.01


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the heads see: parts of one wide feature, the class tokens of the last blocks, oldest first, and the mean
    patch token of the last one.

    members: (blocks, avgpool) of each group of heads: how many class tokens, and whether the mean patch (0 or 1).
    """

    members: tuple[tuple[int, int], ...]

    @property
    def last(self) -> int:
        """Class tokens in the wide feature."""
        return max(blocks for blocks, _ in self.members)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The parts of the wide feature, in order, as `features.extract` names them."""
        earlier = tuple(f"block-{back}/cls" for back in range(self.last, 1, -1))
        return (*earlier, "cls", *["mean_patch"] * any(avgpool for _, avgpool in self.members))

    def parts(self, wide_bf: Array) -> dict[str, Array]:
        """{name: (B, F) what the heads of a group see} of the wide feature."""
        width = wide_bf.shape[1] // len(self.outputs)
        return {
            name(*member): wide_bf[:, (self.last - member[0]) * width : (self.last + member[1]) * width]
            for member in self.members
        }


def name(blocks: int, avgpool: int) -> str:
    """Of a group of heads."""
    return f"{blocks}_blocks" + "_avgpool" * avgpool


@dataclasses.dataclass(frozen=True)
class FrozenFeatures:
    """The wide feature of a batch of images, as `train_head` calls it."""

    outputs: tuple[str, ...]

    def __call__(self, model: Model, batch: Mapping[str, Array]) -> Array:
        found = pooled(model, batch["image"], self.outputs, True)
        return jnp.concatenate([found[output] for output in self.outputs], axis=1)


@dataclasses.dataclass(frozen=True)
class KeptFeatures:
    """The wide feature of a batch of features that are computed already."""

    outputs: tuple[str, ...]

    def __call__(self, model: None, batch: Mapping[str, Array]) -> Array:
        return jnp.concatenate([batch[output].astype(jnp.float32) for output in self.outputs], axis=1)


@dataclasses.dataclass(frozen=True)
class GridLoss:
    """The sum of the heads' mean cross-entropies, as `train_head` calls it; what is told is that of the best head.

    Rows without a label (-1) count for nothing. A head that diverges is left alone: it disturbs no other.
    """

    inputs: Inputs

    def __call__(self, heads: Tree, wide_bf: Array, batch: Mapping[str, Array], step: Array) -> tuple[Array, Tree]:
        weight_b = (batch["label"] >= 0).astype(jnp.float32)
        losses = []
        for group, x_bf in self.inputs.parts(wide_bf).items():
            losses_bl = _losses(_scores(heads[group], x_bf), batch["label"])
            losses.append(jnp.sum(losses_bl * weight_b[:, None], axis=0) / jnp.maximum(jnp.sum(weight_b), 1.0))
        losses_h = jnp.concatenate(losses)
        finite = jnp.isfinite(losses_h)
        total = jnp.sum(jnp.where(finite, losses_h, 0.0))
        best = jnp.min(jnp.where(finite, losses_h, jnp.inf))
        return total + jax.lax.stop_gradient(best - total), heads


def init_heads(key: Array, inputs: Inputs, width: int, rates: int, classes: int) -> Tree:
    """{group: {"kernel": (F, rates, classes), "bias": (rates, classes)}}: N(0, 0.01) and 0, as published."""
    heads = {}
    for number, (blocks, avgpool) in enumerate(inputs.members):
        shape = (blocks + avgpool) * width, rates, classes
        kernel = _STD * jax.random.normal(jax.random.fold_in(key, number), shape, jnp.float32)
        heads[name(blocks, avgpool)] = {"kernel": kernel, "bias": jnp.zeros(shape[1:], jnp.float32)}
    return heads


@functools.lru_cache(maxsize=16)
def sgd(lr: tuple[float, ...], steps: int) -> optax.GradientTransformation:
    """SGD with momentum .9 as torch has it; head l of each group has the rate lr[l], which a cosine takes to 0 over all
    steps."""
    lr_l1 = np.array(lr, np.float32)[:, None]

    def init(heads):
        return {"momentum": jax.tree.map(jnp.zeros_like, heads), "step": jnp.zeros((), jnp.int32)}

    def update(grads, state, heads):
        momentum = jax.tree.map(lambda m, g: _MOMENTUM * m + g, state["momentum"], grads)
        rate_l1 = lr_l1 * 0.5 * (1 + jnp.cos(jnp.pi * state["step"] / steps))
        updates = jax.tree.map(lambda m: -rate_l1 * m, momentum)
        return updates, {"momentum": momentum, "step": state["step"] + 1}

    return optax.GradientTransformation(init, update)


def measure(heads: Tree, inputs: Inputs, features: Features, *, batch_size: int, mesh: Mesh) -> dict[str, np.ndarray]:
    """{"top1", "top5", "loss"}: (H,) means over the samples for each head, group by group in the order of `inputs`."""
    n = len(features.labels)
    rows = multiple_of(mesh, min(batch_size, n))
    sums = []
    with jax.set_mesh(mesh):
        for start in range(0, n, rows):
            part = {output: features.arrays[output][start : start + rows] for output in inputs.outputs}
            part["label"] = features.labels[start : start + rows]
            part["valid"] = np.ones(len(part["label"]), bool)
            batch = sharding.put({key: local_rows(values, rows) for key, values in part.items()}, mesh)
            sums.append(_sums(heads, batch, inputs))
            if len(sums) > 1:
                jax.block_until_ready(sums[-2])  # Else all batches would lie on the devices at once.
        found = sharding.gather(sums)
    return {key: np.sum([one[key] for one in found], axis=0, dtype=np.float64) / n for key in found[0]}


@functools.partial(jax.jit, static_argnums=2)
def _sums(heads, batch, inputs):
    """{metric: (H,)} sums over the valid rows."""
    wide_bf, labels_b = KeptFeatures(inputs.outputs)(None, batch), batch["label"]
    sums = {"top1": [], "top5": [], "loss": []}
    for group, x_bf in inputs.parts(wide_bf).items():
        scores_blc = _scores(heads[group], x_bf)
        right = {f"top{k}": jax.vmap(lambda s, k=k: top_k_correct(s, labels_b, k), 1, 1)(scores_blc) for k in (1, 5)}
        for key, values_bl in (right | {"loss": _losses(scores_blc, labels_b)}).items():
            sums[key].append(jnp.sum(jnp.where(batch["valid"][:, None], values_bl, 0), axis=0))
    return {key: sharding.constrain(jnp.concatenate(values)) for key, values in sums.items()}


def _scores(head, x_bf):
    """(B, L, C) of one group, by one matrix product."""
    # The default precision of an accelerator would train other heads than that of a CPU.
    flat = jnp.matmul(x_bf, head["kernel"].reshape(x_bf.shape[1], -1), precision=jax.lax.Precision.HIGHEST)
    return flat.reshape(len(x_bf), *head["bias"].shape) + head["bias"]


def _losses(scores_blc, labels_b):
    """(B, L) nats; 0 for a row without a label."""
    targets_bc = one_hot(labels_b, scores_blc.shape[2])
    return softmax_xent(scores_blc, jnp.broadcast_to(targets_bc[:, None], scores_blc.shape))
