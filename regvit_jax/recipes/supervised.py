"""Supervised training with labels: softmax or binary cross-entropy, mixup and cutmix, stochastic depth, an average of
weights."""

import dataclasses

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from regvit_jax.config import key as field
from regvit_jax.data import augment
from regvit_jax.losses.classification import bce, one_hot, softmax_xent
from regvit_jax.models.layers import branches
from regvit_jax.models.model import Model, init_params
from regvit_jax.models.vit import drop_rates
from regvit_jax.optim import ema_update
from regvit_jax.recipes.base import Batch, Recipe
from regvit_jax.recipes.start import graft
from regvit_jax.trees import Array, Tree


@dataclasses.dataclass(frozen=True)
class SupervisedConfig:
    """config.supervised."""

    loss: str = field("softmax", "softmax | bce (targets above 0 count as 1, as DeiT-III does)")
    smoothing: float = field(0.0, "label smoothing, softmax only")
    flip: bool = field(True, "horizontal flip of half the images")
    crop_pad: int = field(
        0, "pixels by which an image is shifted at most, zeros behind; for small images instead of data.crop=rrc"
    )
    mixup: float = field(0.0, "alpha of mixup; 0 = off")
    cutmix: float = field(0.0, "alpha of cutmix; 0 = off")
    mix_prob: float = field(1.0, "chance that a group's images are mixed at all, where mixup or cutmix is on")
    switch_prob: float = field(0.5, "chance of cutmix where both are on")
    ema: float = field(0.0, "decay of the average of weights; 0 = none")
    eval_ema: bool = field(True, "evaluate and save the average, where there is one")


class Supervised(Recipe):
    """Cross-entropy on labels.

    Source: DeiT-III's recipe is a setting of these keys (its optimiser, LAMB, is not yet here).
    """

    Config = SupervisedConfig
    labelled = True

    def __init__(self, config: ConfigDict):
        super().__init__(config)
        s = self.options = config.supervised
        checks = [
            ("loss", s.loss in ("softmax", "bce"), "softmax or bce"),
            ("smoothing", 0 <= s.smoothing < 1, "in [0, 1)"),
            (
                "smoothing",
                s.loss == "softmax" or s.smoothing == 0,
                "0 with loss='bce': smoothing would make every class positive",
            ),
            ("crop_pad", s.crop_pad >= 0, "0 or more"),
            ("mixup", s.mixup >= 0, "0 or more"),
            ("cutmix", s.cutmix >= 0, "0 or more"),
            ("mix_prob", 0 <= s.mix_prob <= 1, "in [0, 1]"),
            ("switch_prob", 0 <= s.switch_prob <= 1, "in [0, 1]"),
            ("ema", 0 <= s.ema < 1, "in [0, 1)"),
        ]
        for name, good, allowed in checks:
            if not good:
                raise ValueError(f"config.supervised.{name}={s[name]!r} must be {allowed}")
        group = config.batch_size // config.groups
        if self.mixes and group % 2:
            raise ValueError(
                f"config.groups={config.groups}: mixup pairs images, a group of {group} has an odd one: change "
                "batch_size"
            )
        if self.vit.num_classes < 2:
            raise ValueError(
                f"config.data.train={config.data.train!r} has no classes to tell apart: supervised training "
                "needs labels, such as one sub-folder a class"
            )

    @property
    def mixes(self) -> bool:
        return self.options.mixup > 0 or self.options.cutmix > 0

    def init(self, key: Array, loaded: dict[str, Model]) -> tuple[Tree, Tree]:
        params = init_params(self.vit, key)
        if "init_from" in loaded:
            params = graft(params, loaded["init_from"], self.vit)
        return params, {"ema": params} if self.options.ema else {}

    def augment(self, batch: Batch, key: Array, step: Array) -> Batch:
        s, (crop_key, flip_key, mix_key, depth_key) = self.options, jax.random.split(key, 4)
        # With the examples, so that micro-batches drop what the whole batch would.
        alive = {"alive": branches(depth_key, len(batch["image"]), drop_rates(self.vit))} if self.vit.drop_path else {}
        images = augment.normalize(batch["image"], self.preprocessing.mean, self.preprocessing.std)
        if s.crop_pad:
            images = augment.random_crop(crop_key, images, s.crop_pad)
        if s.flip:
            images = augment.flip(flip_key, images)
        if not self.mixes:
            return {"image": images, "target": one_hot(batch["label"], self.vit.num_classes, s.smoothing)} | alive
        images, targets = augment.mixup_cutmix(
            mix_key,
            images,
            batch["label"],
            num_classes=self.vit.num_classes,
            mixup_alpha=s.mixup,
            cutmix_alpha=s.cutmix,
            switch_prob=s.switch_prob,
            prob=s.mix_prob,
            smoothing=s.smoothing,
            groups=self.config.groups,
        )
        return {"image": images, "target": targets} | alive

    def loss(self, params: Tree, extras: Tree, batch: Batch, key: Array, step: Array) -> tuple[Array, dict]:
        alive = batch["alive"] if self.vit.drop_path else None
        logits = self._model(params).logits(batch["image"], key=alive)
        loss_b = (
            softmax_xent(logits, batch["target"])
            if self.options.loss == "softmax"
            else bce(logits, batch["target"], binarize=True)
        )
        correct_b = logits.argmax(-1) == batch["target"].argmax(-1)
        return loss_b.mean(), {"metrics": {"accuracy": correct_b.astype(jnp.float32).mean()}}

    def after_update(self, params: Tree, extras: Tree, aux: dict, step: Array) -> Tree:
        return {"ema": ema_update(extras["ema"], params, self.options.ema)} if self.options.ema else extras

    def eval_model(self, params: Tree, extras: Tree) -> Model:
        return self._model(extras["ema"] if self.options.ema and self.options.eval_ema else params)

    def _model(self, params: Tree) -> Model:
        return Model(params, self.vit, self.run, self.preprocessing)
