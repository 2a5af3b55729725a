"""What the teacher says: targets for the student's class tokens and masked patches, and how healthy they are."""

import dataclasses

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from regvit_jax.losses import centered_softmax, sinkhorn_knopp, update_center
from regvit_jax.trees import Array, Tree


@dataclasses.dataclass(frozen=True)
class Targets:
    """Distributions over prototypes, without gradient, and the means that move the centres.

    Attributes:
      dino: (2, B, K) of the global crops' class tokens; None where that loss is off.
      ibot: (G, M, K) of the masked patches, anything for padding; None where that loss is off.
      means: {loss: (K,)} of the teacher's logits, where centring is by softmax.
    """

    dino: Array | None
    ibot: Array | None
    means: dict[str, Array]


jax.tree_util.register_dataclass(Targets, data_fields=["dino", "ibot", "means"], meta_fields=[])


def targets(
    options: ConfigDict, logits: dict[str, Array], valid_gm: Array | None, centers: Tree, temperature: Array
) -> Targets:
    """Sharpens and balances the teacher's logits.

    Args:
      options: config.dinov2.
      logits: {"dino": (2, B, K), "ibot": (G, M, K)}, of the losses that are on.
      valid_gm: (G, M) bool, which rows of "ibot" are patches and no padding.
      centers: {loss: (K,)} from the steps before, where centring is by softmax.
      temperature: of the teacher, now.
    """
    found, means = {"dino": None, "ibot": None}, {}
    for name, x in logits.items():
        valid = valid_gm if name == "ibot" else None
        if options.centering == "sinkhorn":
            found[name] = sinkhorn_knopp(x, temperature, iterations=options.sinkhorn_iterations, valid_n=valid)
        else:
            found[name] = centered_softmax(x, centers[name], temperature)
            means[name] = _mean(x, valid)
    return Targets(**found, means=means)


def moved(centers: Tree, means: dict[str, Array], momentum: float) -> Tree:
    """The centres for the next step."""
    return {name: update_center(center, means[name], momentum) for name, center in centers.items()}


def health(targets_rk: Array) -> dict[str, Array]:
    """Whether the teacher has collapsed, of the targets of any rows.

    teacher_entropy    mean entropy of one target in nats: log K where the teacher says nothing
    prototypes_used    exp(entropy of the mean target): how many prototypes share the work; 1 where all rows get the
                       same single one
    """
    rows = tuple(range(targets_rk.ndim - 1))
    return {
        "teacher_entropy": _entropy(targets_rk).mean(),
        "prototypes_used": jnp.exp(_entropy(targets_rk.mean(rows))),
    }


def _mean(x: Array, valid: Array | None) -> Array:
    """(K,) over the rows that count, wherever they lie."""
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    rows = tuple(range(x.ndim - 1))
    if valid is None:
        return x.mean(rows)
    return jnp.where(valid[..., None], x, 0.0).sum(rows) / jnp.maximum(valid.sum(), 1)


def _entropy(p: Array) -> Array:
    return jax.scipy.special.entr(p).sum(-1)
