"""The head of a segmentation probe: batch normalisation and a linear map to classes at each patch; its loss and its
optimiser.

Its logits are enlarged to pixels afterwards. Normalisation and linear map act on each token alone, so they are done
once a token, not once a pixel.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from regvit_jax import sharding
from regvit_jax.data.sources import IGNORE
from regvit_jax.evals.dense import STATISTICS, token_matrix
from regvit_jax.trees import Array, Tree

EPS = 1e-5
MOMENTUM = 0.1  # of the batch in the running statistics
MEANS = ("all", "known")

_INIT_STD = 0.01
_FIRST_LR = 1e-6  # of what the line would give
_CHUNK = 2**25  # pixels x classes that exist at once


def init_head(key: Array, channels: int, num_classes: int) -> Tree:
    """{"bn": {"scale", "bias"}, "conv": {"kernel" (channels, C), "bias"}, "statistics": {"mean", "var"}}, float32."""
    return {
        "bn": {"scale": jnp.ones(channels), "bias": jnp.zeros(channels)},
        "conv": {
            "kernel": _INIT_STD * jax.random.normal(key, (channels, num_classes)),
            "bias": jnp.zeros(num_classes),
        },
        STATISTICS: {"mean": jnp.zeros(channels), "var": jnp.ones(channels)},
    }


def token_logits(head: Tree, features_bhwc: Array) -> Array:
    """(B, h, w, C) float32, normalised by the running statistics."""
    return _classify(head, features_bhwc, **head[STATISTICS])


def train_logits(head: Tree, features_bhwc: Array) -> tuple[Array, Tree]:
    """(B, h, w, C) float32, normalised by the mean and variance over all tokens of the batch; and the head with running
    statistics that moved towards them, the variance as an unbiased estimate."""
    mean = features_bhwc.mean(axis=(0, 1, 2))
    var = jnp.square(features_bhwc - mean).mean(axis=(0, 1, 2))
    count = features_bhwc.size // features_bhwc.shape[-1]
    seen = {"mean": mean, "var": var * (count / max(count - 1, 1))}
    running = jax.tree.map(lambda old, new: (1 - MOMENTUM) * old + MOMENTUM * new, head[STATISTICS], seen)
    return _classify(head, features_bhwc, mean, var), head | {STATISTICS: running}


@dataclasses.dataclass(frozen=True)
class SegmentationLoss:
    """Cross-entropy over pixels, as `dense.fit` calls it: of logits resized to the mask, IGNORE left out.

    Attributes:
      patch: of the model, pixels.
      padding: see `dense.token_matrix`.
      mean: over "all" pixels, those that are ignored counting as 0 (as published), or over the "known" ones.
    """

    patch: int
    padding: str
    mean: str

    def __call__(self, head: Tree, features_bhwc: Array, batch: Mapping[str, Array], step: Array) -> tuple[Array, Tree]:
        mask = batch["mask"]
        logits, head = train_logits(head, features_bhwc)
        rows, columns = (token_matrix(length, self.patch, self.padding) for length in mask.shape[1:])
        total = cross_entropy(logits, mask, rows, columns).sum()
        count = mask.size if self.mean == "all" else jnp.maximum((mask != IGNORE).sum(), 1)
        return total / count, head


def cross_entropy(logits_bhwc: Array, mask: Array, rows: np.ndarray, columns: np.ndarray, chunk: int = _CHUNK) -> Array:
    """(B,) sums over the known pixels of masks (B, H, W), in nats.

    Pixels are made in groups of rows, forwards and once more backwards: of all of them, the logits of 16 crops of 512
    pixels and 150 classes would take 2.5 GB.

    Args:
      logits_bhwc: of the tokens. rows, columns: (H, h) and (W, w), how they become pixels.
      chunk: pixels times classes of a group.
    """
    batch, height, width = mask.shape
    groups = min(height, -(-mask.size * logits_bhwc.shape[-1] // chunk))
    group = -(-height // groups)
    missing = groups * group - height
    rows = np.pad(rows, ((0, missing), (0, 0))).reshape(groups, group, -1)
    mask = jnp.pad(mask, ((0, 0), (0, missing), (0, 0)), constant_values=IGNORE)
    mask = jnp.moveaxis(mask.reshape(batch, groups, group, width), 1, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(rows_rh, mask_brx):
        pixels = _dot("bhwc,rh->brwc", logits_bhwc, rows_rh)
        pixels = sharding.constrain(_dot("brwc,xw->brxc", pixels, columns), sharding.BATCH)
        hot = mask_brx[..., None] == jnp.arange(pixels.shape[-1], dtype=mask_brx.dtype)
        losses = jax.nn.logsumexp(pixels, axis=-1) - jnp.where(hot, pixels, 0.0).sum(axis=-1)
        return jnp.where(mask_brx == IGNORE, 0.0, losses).sum(axis=(1, 2))

    def add(total_b, xs):
        return total_b + one(*xs), None

    return jax.lax.scan(add, jnp.zeros(batch), (rows, mask))[0]


@functools.lru_cache(maxsize=16)
def optimizer(
    *, lr: float, betas: tuple[float, float], weight_decay: float, steps: int, warmup_steps: int
) -> optax.GradientTransformation:
    """AdamW on all parameters, the rate of `lr_factor`. Equal arguments give one object: see `dense.fit`."""
    return optax.adamw(
        lambda step: lr * lr_factor(step, steps, warmup_steps), *betas, weight_decay=weight_decay, mask=None
    )


def lr_factor(step: Array, steps: int, warmup_steps: int) -> Array:
    """Share of the peak rate at `step`: a line from 1 to 0 over all steps, times another from 1e-6 to 1 over the first
    ones."""
    step = jnp.asarray(step, jnp.float32)
    rise = _FIRST_LR + (1 - _FIRST_LR) * jnp.minimum(step / warmup_steps, 1.0) if warmup_steps else 1.0
    return (steps - step) / steps * rise


def _classify(head, features_bhwc, mean, var):
    bn, conv = head["bn"], head["conv"]
    normal = (features_bhwc - mean) * (jax.lax.rsqrt(var + EPS) * bn["scale"]) + bn["bias"]
    return _dot("bhwc,ck->bhwk", normal, conv["kernel"]) + conv["bias"]


def _dot(subscripts, *operands):
    # The default precision of an accelerator has too few digits for a sum over a thousand channels.
    return jnp.einsum(subscripts, *operands, precision=jax.lax.Precision.HIGHEST)
