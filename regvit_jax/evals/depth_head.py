"""The head of a depth probe: a linear map to 256 bins of depth at each patch, read off as their weighted mean; its
loss and its optimiser. Several heads, stacked on axis 0, are trained at once on the same features, each with its own
learning rate.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from regvit_jax.evals.dense import padding, resize_matrix
from regvit_jax.losses import log_gradient_loss, sig_loss
from regvit_jax.trees import Array, Tree

BINS = 256
ENLARGED = 4  # bins are read off at so many times the resolution of the patches
PADDINGS = ("stretch", "crop")

_FLOOR = 0.1  # added to every bin, so that none is ever switched off for all
_LAST_LR = 1e-8  # of the peak
_FIRST_LR = 1e-3
_ONE_CYCLE = (0.95, 0.85, 0.3)  # beta1 at both ends, at the turn, and where it turns


def probe_blocks(depth: int, layers: int) -> tuple[int, ...]:
    """The blocks that a probe of 1 or 4 layers reads in a network of `depth` blocks: the last, or the ends of its
    quarters.

    Raises:
      ValueError: for four layers of fewer blocks.
    """
    if layers == 1:
        return (depth - 1,)
    if depth < layers:
        raise ValueError(f"layers={layers} needs a network of {layers} blocks or more, this one has {depth}: use 1")
    if (depth, layers) == (24, 4):
        return (4, 11, 17, 23)  # as published, though the quarter ends at 5
    return tuple((i + 1) * depth // layers - 1 for i in range(layers))


def init_heads(key: Array, channels: int, heads: int) -> Tree:
    """{"kernel": (heads, channels, BINS), "bias": (heads, BINS)}, all heads alike, as torch starts a convolution."""
    bound = 1 / math.sqrt(channels)
    key_kernel, key_bias = jax.random.split(key)
    kernel = jax.random.uniform(key_kernel, (channels, BINS), minval=-bound, maxval=bound)
    bias = jax.random.uniform(key_bias, (BINS,), minval=-bound, maxval=bound)
    return {"kernel": jnp.repeat(kernel[None], heads, axis=0), "bias": jnp.repeat(bias[None], heads, axis=0)}


def read_depth(head: Tree, features_bhwc: Array, rows: np.ndarray, columns: np.ndarray, ends: tuple) -> Array:
    """Depth maps of a batch.

    The published head enlarges the features four times, then maps them to bins. Both are linear and act on different
    axes, so that the order does not matter; the other way round takes a fraction of the memory.

    Args:
      head: {"kernel": (C, BINS), "bias": (BINS,)}.
      features_bhwc: of the patches.
      rows, columns: (H, 4h) and (W, 4w) of `output_matrices`.
      ends: (nearest, farthest) metres, the depths of the first and the last bin.

    Returns:
      (B, H, W) float32 metres: sum_k p_k b_k, b = linspace(*ends), p = (relu(z) + 0.1), divided by its sum.
    """
    h, w = features_bhwc.shape[1:3]
    bins_k = jnp.linspace(*ends, BINS, dtype=jnp.float32)
    logits = _dot("bhwc,ck->bhwk", features_bhwc, head["kernel"]) + head["bias"]
    logits = _dot("ih,bhwk->biwk", resize_matrix(ENLARGED * h, h), logits)
    logits = _dot("jw,biwk->bijk", resize_matrix(ENLARGED * w, w), logits)
    weights = jax.nn.relu(logits) + _FLOOR
    depth = jnp.sum(weights * bins_k, axis=-1) / jnp.sum(weights, axis=-1)
    return _dot("yi,bij,xj->byx", rows, depth, columns)


def output_matrices(
    image: tuple[int, int], target: tuple[int, int], patch: int, mode: str
) -> tuple[np.ndarray, np.ndarray]:
    """Matrices of the rows and the columns of the last resize, from 4 h x 4 w to the size of the ground truth.

    mode "stretch" takes what was computed for the padded image for the image itself, as was published: it is then a
    percent or two too small. "crop" cuts the padding off. A target of another size than the image is reached from
    there.
    """
    matrices = []
    for length, wanted, (before, after) in zip(image, target, padding(image, patch), strict=True):
        padded = before + length + after
        matrix = resize_matrix(length if mode == "stretch" else padded, ENLARGED * (padded // patch))
        if mode == "crop":
            matrix = matrix[before : before + length]
        matrices.append(matrix if wanted == length else resize_matrix(wanted, length) @ matrix)
    return tuple(matrices)


@dataclasses.dataclass(frozen=True)
class ProbeLoss:
    """The loss of stacked heads, as `fit` calls it: the mean is what is told, the sum is what gives gradients, so that
    each head is trained as if it were alone. The first `first` steps leave the variance out."""

    ends: tuple[float, float]
    padding: str
    patch: int
    gradient_loss: float
    first: int

    def __call__(self, heads: Tree, features_bhwc: Array, batch: dict[str, Array], step: Array) -> tuple[Array, Tree]:
        target = batch["depth"]
        matrices = output_matrices(target.shape[1:], target.shape[1:], self.patch, self.padding)
        variance = jnp.where(step < self.first, 0.0, 1.0)

        def one(head):
            depth = read_depth(head, features_bhwc, *matrices, self.ends)
            loss = sig_loss(depth, target, variance=variance)
            return loss + self.gradient_loss * log_gradient_loss(depth, target) if self.gradient_loss else loss

        losses_n = jax.vmap(one)(heads)
        total = jnp.sum(losses_n)
        return total + jax.lax.stop_gradient(jnp.mean(losses_n) - total), heads


@functools.lru_cache(maxsize=16)
def optimizer(
    lr: tuple[float, ...], *, steps: int, warmup_steps: int, weight_decay: float, clip: float, beta1_cycle: bool
) -> optax.GradientTransformation:
    """AdamW for stacked heads: head i has the peak rate lr[i], and its gradient is clipped by its own norm.

    Args:
      clip: largest L2 norm of a gradient; 0: none is clipped.
      beta1_cycle: Adam's first beta as `one_cycle` says, not .9.
    """
    adam = optax.scale_by_adam()
    if beta1_cycle:
        adam = optax.inject_hyperparams(optax.scale_by_adam)(b1=lambda step: one_cycle(step, steps))
    one = optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        adam,
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_schedule(lambda step: -lr_factor(step, steps, warmup_steps)),
    )
    lr_n = np.array(lr, np.float32)

    def update(grads, state, heads):
        updates, state = jax.vmap(one.update)(grads, state, heads)
        return jax.tree.map(lambda u: u * lr_n.reshape(-1, *[1] * (u.ndim - 1)), updates), state

    return optax.GradientTransformation(jax.vmap(one.init), update)


def lr_factor(step: Array, steps: int, warmup_steps: int) -> Array:
    """Share of the peak rate at `step`: a cosine from 1 to 1e-8 over all steps, times a line from 1e-3 to 1 over the
    first ones. So the peak itself is never reached."""
    step = jnp.asarray(step, jnp.float32)
    cosine = _LAST_LR + (1 - _LAST_LR) * 0.5 * (1 + jnp.cos(jnp.pi * step / steps))
    if not warmup_steps:
        return cosine
    return cosine * jnp.minimum(_FIRST_LR + (1 - _FIRST_LR) * step / warmup_steps, 1.0)


def one_cycle(step: Array, steps: int) -> Array:
    """Adam's first beta at `step`: .95, down to .85 after three tenths of the steps, and back, along cosines."""
    ends, turn, share = _ONE_CYCLE
    last_down, last = share * steps - 1, steps - 1
    step = jnp.asarray(step, jnp.float32)
    down = step / max(last_down, 1e-6)
    up = (step - last_down) / max(last - last_down, 1e-6)
    progress = jnp.clip(jnp.where(step <= last_down, down, 1 - up), 0.0, 1.0)
    return turn + (ends - turn) * 0.5 * (1 + jnp.cos(jnp.pi * progress))


def _dot(subscripts, *operands):
    # The default precision of an accelerator would move depths by centimetres.
    return jnp.einsum(subscripts, *operands, precision=jax.lax.Precision.HIGHEST)
