"""What a DINOv2 step sees of a batch: crops, masks and the branches that stochastic depth leaves out, and in which
order all of it lies.

Rows of a forward pass over crops are ordered (G, crop, b): group by group, and inside a group crop by crop. What the
reference computes per GPU is computed per group of b = batch_size / G images: masks, stochastic depth, KoLeo.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from regvit_jax.data import augment, masking
from regvit_jax.data.multicrop import multi_crop
from regvit_jax.data.multicrop_host import MultiCropTransform, SquareTransform
from regvit_jax.data.transforms import Preprocess
from regvit_jax.models.config import ViTConfig
from regvit_jax.models.layers import branches, kept, subsets
from regvit_jax.models.vit import drop_rates
from regvit_jax.recipes import dinov2_config
from regvit_jax.recipes.base import Batch
from regvit_jax.sharding import constrain_examples
from regvit_jax.trees import Array


class Views:
    """The two global crops of every image and its local ones, as numbers and as rows.

    Attributes:
      crops: how they are cut.
      counts: {"global": 2, "local": local crops of an image}, of the kinds that there are.
      sizes: their sides in pixels.
      grid: (h, w) patches of a global crop.
    """

    def __init__(self, config: ConfigDict, vit: ViTConfig, preprocessing: Preprocess):
        """Args:
          config: of the run, validated.
          vit: the student.
          preprocessing: how pixels are normalised.

        Raises:
          ValueError: for crops that are not possible; names the key.
        """
        self.config, self.vit, self.preprocessing = config, vit, preprocessing
        self.crops = crops = dinov2_config.crops(config.dinov2, vit)
        self.counts = {"global": 2} | ({"local": crops.local_crops} if crops.local_crops else {})
        self.sizes = {kind: {"global": crops.global_size, "local": crops.local_size}[kind] for kind in self.counts}
        self.grid = vit.grid_of((crops.global_size,) * 2)

    # What the host delivers.

    @property
    def source_size(self) -> int:
        """Side of the square that the host delivers for crops on the device."""
        return self.config.dinov2.source_size or round(1.5 * self.crops.global_size)

    @property
    def input_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """See `Recipe.input_spec`."""
        b, side = self.config.batch_size, self.source_size
        if self.config.data.augment_on == "device":
            image, size = (b, side, side, 3), (b, 2)
            return {"image": jax.ShapeDtypeStruct(image, jnp.uint8), "size": jax.ShapeDtypeStruct(size, jnp.int32)}
        shapes = {kind: (b, count, self.sizes[kind], self.sizes[kind], 3) for kind, count in self.counts.items()}
        return {kind: jax.ShapeDtypeStruct(shape, jnp.uint8) for kind, shape in shapes.items()}

    @property
    def transform(self) -> Callable:
        """See `Recipe.transform`."""
        if self.config.data.augment_on == "host":
            return MultiCropTransform(self.crops)
        return SquareTransform(self.source_size, self.config.data.interpolation)

    # What is drawn for a step.

    @property
    def bound(self) -> int:
        """M: the masked patches of one group are at most so many; all of them where nothing is masked."""
        o, crops, patches = self.config.dinov2, 2 * self._group, int(np.prod(self.grid))
        if not o.mask_prob:
            return crops * patches
        return masking.upper_bound(crops, patches, probability=o.mask_prob, ratio=tuple(o.mask_ratio))

    def share_kept(self, kind: str) -> float:
        """Of the blocks' branches, what is computed for one kind of crop."""
        rows = self.counts[kind] * self._group
        if not self.vit.drop_path or self.config.dinov2.drop == "sample":
            return 1.0
        return float(np.mean([kept(rows, rate) / rows for rate in drop_rates(self.vit)]))

    def draw(self, batch: Batch, key: Array) -> Batch:
        """{"global", "local": (G crops b, S, S, 3) normalised, "masks": Masks of the global crops, "drop": {kind: what
        stochastic depth drops}}; None for masks and drops that are off."""
        crop_key, mask_key, *drop_keys = jax.random.split(key, 2 + len(self.counts))
        images = self._cut(batch, crop_key)
        drops = [self._drops(k, kind) for k, kind in zip(drop_keys, self.counts, strict=True)]
        return {kind: self.rows(images[kind]) for kind in self.counts} | {
            "masks": self._masks(mask_key) if self.config.dinov2.mask_prob else None,
            "drop": dict(zip(self.counts, drops, strict=True)),
        }

    def _cut(self, batch: Batch, key: Array) -> dict[str, Array]:
        """{"global": (B, 2, S, S, 3), "local": (B, L, s, s, 3)}, normalised."""
        mean, std = self.preprocessing.mean, self.preprocessing.std
        if self.config.data.augment_on == "host":
            return {kind: augment.normalize(batch[kind], mean, std) for kind in self.counts}
        return multi_crop(key, batch["image"], batch["size"], self.crops, mean, std)

    def _masks(self, key: Array) -> masking.Masks:
        o = self.config.dinov2
        return masking.block_masks(
            key,
            groups=self.config.groups,
            crops=2 * self._group,
            grid=self.grid,
            max_area=masking.max_block_area(self.crops.global_size, self.vit.patch_size),
            probability=o.mask_prob,
            ratio=tuple(o.mask_ratio),
        )

    def _drops(self, key: Array, kind: str):
        if not self.vit.drop_path:
            return None
        rows, rates = self.counts[kind] * self._group, drop_rates(self.vit)
        if self.config.dinov2.drop == "sample":
            return branches(key, self.config.groups * rows, rates)
        return subsets(key, self.config.groups, rows, rates)

    # In which order it lies.

    @property
    def _group(self) -> int:
        """b."""
        return self.config.batch_size // self.config.groups

    def rows(self, x: Array) -> Array:
        """(B, crops, …) -> (G crops b, …), in the order of this file."""
        grouped = x.reshape(self.config.groups, -1, *x.shape[1:]).swapaxes(1, 2)
        return constrain_examples(grouped.reshape(-1, *x.shape[2:]))

    def by_view(self, x: Array, crops: int) -> Array:
        """(G crops b, D) -> (crops, B, D)."""
        grouped = x.reshape(self.config.groups, crops, -1, x.shape[-1]).swapaxes(0, 1)
        return constrain_examples(grouped.reshape(crops, -1, x.shape[-1]), axis=1)

    def masked(self, patches: Array, masks: masking.Masks | None) -> Array:
        """(G 2 b, P, D) -> (G, M, D): the patches on the list of masked ones; without masks all of them."""
        grouped = constrain_examples(patches.reshape(self.config.groups, -1, patches.shape[-1]))
        if masks is None:
            return grouped
        take = jax.vmap(lambda x, i: x.at[i].get(indices_are_sorted=True, mode="promise_in_bounds"))
        return constrain_examples(take(grouped, constrain_examples(masks.index)))
