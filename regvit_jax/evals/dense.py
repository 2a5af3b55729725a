"""Dense probes: what segmentation and depth share. Patch features of a frozen network, and a head fitted to them while
images are augmented on the host.

    head = fit(model, source, transform, init_head=…, loss=…, tx=optax.adamw(1e-3), steps=2000, batch_size=16, seed=0,
               mesh=mesh, features=dict(blocks=(-1,), norm=True, cls=False), label="segmentation probe")
    features = dense_features(model, images_u8, blocks=(-1,), norm=True, cls=False)         # (B, h, w, D)

Nothing is cached: every step sees new crops, so the network runs in every step, in one compilation with the head's
update.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from regvit_jax.data.augment import normalize
from regvit_jax.data.feed import feed
from regvit_jax.data.loader import Transform
from regvit_jax.data.sources import Source
from regvit_jax.evals import Evaluator
from regvit_jax.evals.head_training import STATISTICS as STATISTICS
from regvit_jax.evals.head_training import Loss, train_head
from regvit_jax.evals.saved import Saved
from regvit_jax.models.model import Model
from regvit_jax.trees import Array, Tree

# What `token_matrix` knows to do about padding.
PADDINGS = ("stretch", "crop")


def block_numbers(blocks: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """Block numbers from 0, in depth order; negative ones count from the end.

    Raises:
      ValueError: for none, for a block that is not there or is named twice.
    """
    bad = [block for block in blocks if not -depth <= block < depth]
    if bad:
        raise ValueError(f"blocks: the model has blocks 0 to {depth - 1} (or -{depth} to -1), not {bad[0]}")
    found = sorted({block % depth for block in blocks})
    if not found or len(found) < len(blocks):
        raise ValueError(f"blocks: one or more different blocks of {depth}, got {tuple(blocks)}")
    return tuple(found)


def padding(size: tuple[int, ...], patch: int) -> tuple[tuple[int, int], ...]:
    """((top, bottom), (left, right)) pixels that centre an image of (H, W) in whole patches; an odd one goes behind."""
    gaps = [-length % patch for length in size]
    return tuple((gap // 2, gap - gap // 2) for gap in gaps)


def dense_features(model: Model, images_u8: Array, *, blocks: tuple[int, ...], norm: bool, cls: bool) -> Array:
    """(B, h, w, C) float32 patch features, for use inside jit; no gradient reaches the network.

    Images are normalised as the model says, then surrounded by zeros to whole patches, as in DINOv2. Registers are
    computed and dropped.

    Args:
      images_u8: (B, H, W, 3), values 0 to 255, any size.
      blocks: outputs of these blocks, side by side in depth order; static.
      norm: after the network's final norm, each of them; otherwise of the residual stream.
      cls: the class token after the patch features of every block, the same at each patch: twice the channels.

    Raises:
      ValueError: for blocks or a class token that the model has not.
    """
    if cls and not model.config.class_token:
        raise ValueError("cls=True needs a class token, and this model has none")
    spec, module = model.preprocessing, model.module()
    images = normalize(images_u8, spec.mean, spec.std)
    images = jnp.pad(images, ((0, 0), *padding(images.shape[1:3], model.config.patch_size), (0, 0)))
    names = tuple(f"block{block}" for block in block_numbers(blocks, model.config.depth))
    tokens, found = module(images, capture=names)
    parts = []
    for name in names:
        level = module.split(module.normalize(found[name]) if norm else found[name], tokens.grid)
        parts.append(level.map())
        if cls:
            parts.append(jnp.broadcast_to(level.cls[:, None, None], parts[-1].shape))
    return jax.lax.stop_gradient(jnp.concatenate(parts, axis=-1).astype(jnp.float32))


def channels(model: Model, *, blocks: tuple[int, ...], cls: bool, **_) -> int:
    """C of `dense_features`."""
    return len(block_numbers(blocks, model.config.depth)) * model.config.width * (2 if cls else 1)


def resize_matrix(new: int, old: int) -> np.ndarray:
    """(new, old) float32: bilinear resizing of one axis as a matrix; its rows sum to 1.

    Pixel centres are aligned, nothing is antialiased, and beyond the outermost centres the border value is repeated:
    torch's `interpolate(align_corners=False)` and OpenCV's. An image is resized by `rows @ image @ columns.T`.
    """
    place_n = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, old - 1)
    low_n = np.minimum(place_n.astype(int), max(old - 2, 0))
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new), low_n), 1 - (place_n - low_n))
    np.add.at(matrix, (np.arange(new), np.minimum(low_n + 1, old - 1)), place_n - low_n)
    return matrix.astype(np.float32)


def token_matrix(length: int, patch: int, mode: str) -> np.ndarray:
    """(length, tokens) float32: values of the tokens along one axis of an image, resized to its pixels.

    The image was padded to whole patches. `mode` "stretch" takes what was computed for the padded image for the image
    itself, as was published: it is then a percent or two too small. "crop" cuts the padding off, which is exact.
    """
    ((before, after),) = padding((length,), patch)
    padded = before + length + after
    if mode == "stretch":
        return resize_matrix(length, padded // patch)
    return resize_matrix(padded, padded // patch)[before : before + length]


def fit(
    model: Model,
    source: Source,
    transform: Transform,
    *,
    init_head: Callable[[Array], Tree],
    loss: Loss,
    tx: optax.GradientTransformation,
    steps: int,
    batch_size: int,
    seed: int,
    mesh: Mesh,
    workers: int = 0,
    features: Mapping[str, Any],
    label: str,
    max_bad: float = Evaluator.max_bad,
    source_spec: str = "",
    saved: Saved | None = None,
) -> Tree:
    """A head trained on the features of a frozen network. All processes make this call; each gets the same head.

    `loss` and `tx` are parts of a compiled step, which is found again if they are equal to those of an earlier call: a
    frozen dataclass with `__call__`, and a cached function that makes the optimiser.

    Args:
      transform: sample, rng -> arrays of fixed shapes, "image" uint8 (H, W, 3) among them; all of them reach `loss`.
      init_head: key -> the head, a dict of float32 arrays; under `STATISTICS` what is not trained.
      loss: (head, (B, h, w, C) features, batch, step from 0) -> (scalar, the head with new statistics). The batch is
        that of all devices; a mean over it is one over all.
      tx: updates everything but the statistics.
      batch_size: over all devices. Where the mesh does not divide it, a batch has more rows, which count for nothing.
      seed: of the head, of the order of samples and of their augmentation.
      features: blocks, norm and cls of `dense_features`.
      label: what the log calls it.
      max_bad: share of the samples that may be unreadable; others take their place.
      source_spec: the string of `source`, under which results.json counts unreadable samples.
      saved: where the state is kept, and whence it goes on, see `train_head`.

    Returns:
      The head, replicated over the mesh.

    Raises:
      ValueError: if the loss is not finite, or more samples are unreadable than that.
    """

    def open_feed(first, rows):
        return feed(
            source,
            transform,
            mesh,
            fields=(),
            seed=seed,
            batch_size=rows,
            start_step=first,
            stop_step=steps,
            workers=workers,
            max_bad=max_bad,
            key="max_bad of this evaluator",
        )

    return train_head(
        model,
        open_feed,
        features=_Patches(features["blocks"], features["norm"], features["cls"]),
        init_head=init_head,
        loss=loss,
        tx=tx,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        mesh=mesh,
        label=label,
        source_spec=source_spec,
        saved=saved,
    )


@dataclasses.dataclass(frozen=True)
class _Patches:
    """`dense_features` of a batch, as `train_head` calls it."""

    blocks: tuple[int, ...]
    norm: bool
    cls: bool

    def __call__(self, model: Model, batch: Mapping[str, Array]) -> Array:
        return dense_features(model, batch["image"], blocks=self.blocks, norm=self.norm, cls=self.cls)
