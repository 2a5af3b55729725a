"""DINOv2: a student learns from crops, and from patches it does not see, what a moving average of itself says about
whole images. DINO (v1) is a setting of its keys.

Rows of a forward pass over crops are ordered (G, crop, b): group by group, and inside a group crop by crop. What the
reference computes per GPU is computed per group of b = batch_size / G images: masks, stochastic depth, KoLeo.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from regvit_jax.data import augment, masking
from regvit_jax.data.multicrop import multi_crop
from regvit_jax.data.multicrop_host import MultiCropTransform, SquareTransform
from regvit_jax.flops import forward_flops, head_flops
from regvit_jax.losses import dino_loss, ibot_loss, koleo_loss
from regvit_jax.models.config import ViTConfig
from regvit_jax.models.layers import branches, kept, subsets
from regvit_jax.models.model import Model, init_params
from regvit_jax.models.prototype_head import apply_head, init_head
from regvit_jax.models.vit import Tokens, drop_rates
from regvit_jax.optim import Group, ema_update
from regvit_jax.optim.schedules import Schedule
from regvit_jax.recipes import dinov2_alarms, dinov2_config, dinov2_schedules, dinov2_start, dinov2_teacher
from regvit_jax.recipes import start as starts
from regvit_jax.recipes.base import Batch, Recipe
from regvit_jax.sharding import constrain_examples
from regvit_jax.trees import Array, Tree

# Stated where the common defaults are for another method: DINOv2's ViT-L/16 on ImageNet-1k, with registers.
DEFAULTS = {
    "model.name": "vit_l16_reg4", "model.mask_token": True, "model.layerscale": 1e-5,
    "model.drop_path": 0.3, "model.drop_path_uniform": True,
    "batch_size": 2048, "total_steps": 125_000, "data.crop": "none",
    "optim.lr": 4e-3, "optim.end_lr": 1e-6, "optim.warmup_steps": 12_500, "optim.layer_decay": 0.9,
    "optim.weight_decay": 0.04, "optim.clip_norm": 3.0,
}  # fmt: skip


class DINOv2(Recipe):
    """Self-distillation without labels.

    Params: {"backbone", "dino_head"[, "ibot_head"]}. Extras: {"teacher": the same tree, "center": {loss: (K,)}}.
    In a distillation the teacher is a frozen tree of another network, and {"ema": as params} averages the student.

    Source: DINOv2 (Oquab et al. 2023) and its code; registers (Darcet et al. 2024) join both networks and no loss.
    """

    Config = dinov2_config.DINOv2Config
    DEFAULTS = DEFAULTS
    WHEN_NOT_FINITE = dinov2_alarms.WHEN_NOT_FINITE
    AUGMENTS_ON = ("device", "host")
    couples_examples = (
        "masks, KoLeo and the balance of the teacher's targets run over the batch, so that the mean over micro-batches "
        "would be another loss; use more devices, remat='full' or a smaller batch_size"
    )

    def __init__(self, config: ConfigDict):
        super().__init__(config)
        self.options = o = config.dinov2
        self.vit = dataclasses.replace(self.vit, num_classes=0)  # a classifier has no part in this
        dinov2_config.validate(config, self.vit)
        self.crops = dinov2_config.crops(o, self.vit)
        self.heads = dinov2_config.heads(o, self.vit)
        # Until `prepare` is given another one, the teacher is as large as the student.
        self.teacher = dinov2_start.Networks(self.vit, self.heads)
        self.grid = self.vit.grid_of((self.crops.global_size,) * 2)
        self.views = {"global": 2} | ({"local": self.crops.local_crops} if self.crops.local_crops else {})
        self.temperature = dinov2_schedules.teacher_temperature(config)
        self.momentum = dinov2_schedules.momentum(config)

    @property
    def source_size(self) -> int:
        """Side of the square that the host delivers for crops on the device."""
        return self.options.source_size or round(1.5 * self.crops.global_size)

    @property
    def input_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        b, side = self.config.batch_size, self.source_size
        if self.config.data.augment_on == "device":
            image, size = (b, side, side, 3), (b, 2)
            return {"image": jax.ShapeDtypeStruct(image, jnp.uint8), "size": jax.ShapeDtypeStruct(size, jnp.int32)}
        sizes = {"global": self.crops.global_size, "local": self.crops.local_size}
        return {
            name: jax.ShapeDtypeStruct((b, count, sizes[name], sizes[name], 3), jnp.uint8)
            for name, count in self.views.items()
        }

    @property
    def transform(self) -> Callable:
        if self.config.data.augment_on == "host":
            return MultiCropTransform(self.crops)
        return SquareTransform(self.source_size, self.config.data.interpolation)

    @classmethod
    def paths(cls, config: ConfigDict) -> dict[str, str]:
        path = config.dinov2.distill_from
        return super().paths(config) | ({"distill_from": path} if path else {})

    def prepare(self, loaded: dict[str, Any]) -> dict[str, Any]:
        o, ready = self.options, super().prepare(loaded)
        if o.init_heads and "init_from" in loaded:
            ready["heads"] = dinov2_start.heads_of(loaded["init_from:heads"], self.heads, self.config.init_from)
        if "distill_from" in loaded:
            model = loaded["distill_from"]
            self.teacher, ready["teacher"], notes = dinov2_start.teacher_of(
                model, loaded["distill_from:heads"], self.teacher, o,
                side=self.crops.global_size, preprocessing=self.preprocessing, dtype=self.run.dtype,
            )  # fmt: skip
            starts.tell("distill_from", notes, model, self.preprocessing)
        if o.distill_from and o.ibot_weight:
            rows, k = self.config.groups * self._bound, self.heads[self._head_of("ibot")].prototypes
            logging.info(
                "distillation compares all %d patches of the global crops: %d prototypes of each are %.1f GiB of the "
                "teacher's logits, over all devices", rows, k, 4 * rows * k / 2**30,
            )  # fmt: skip
        return ready

    def init(self, key: Array, loaded: dict[str, Any]) -> tuple[Tree, Tree]:
        backbone_key, *head_keys = jax.random.split(key, 1 + len(self.heads))
        backbone = init_params(self.vit, backbone_key)
        if "init_from" in loaded:
            backbone = starts.graft(backbone, loaded["init_from"], self.vit)
        heads = {name: init_head(self.heads[name], k) for name, k in zip(self.heads, head_keys, strict=True)}
        if "heads" in loaded:
            heads = jax.tree.map(jnp.asarray, loaded["heads"])
        params = {"backbone": backbone} | heads
        if not self.options.distill_from:
            return params, {"teacher": params, "center": self._centers()}
        teacher = jax.tree.map(jnp.asarray, loaded["teacher"]) if "teacher" in loaded else params
        return params, {"teacher": teacher, "ema": params, "center": self._centers()}

    def augment(self, batch: Batch, key: Array, step: Array) -> Batch:
        """{"global", "local": (G crops b, S, S, 3) normalised, "masks": of the global crops, "drop": {kind: what
        stochastic depth drops}}; masks and drop only where they are on."""
        crop_key, mask_key, *drop_keys = jax.random.split(key, 2 + len(self.views))
        images = self._cut(batch, crop_key)
        out = {name: self._rows(images[name]) for name in self.views}
        if self.options.mask_prob:
            out["masks"] = self._draw_masks(mask_key)
        if self.vit.drop_path:
            drawn = zip(self.views.items(), drop_keys, strict=True)
            out["drop"] = {name: self._draw_drops(k, crops) for (name, crops), k in drawn}
        return out

    def loss(self, params: Tree, extras: Tree, batch: Batch, key: Array, step: Array) -> tuple[Array, dict]:
        o, masks = self.options, batch["masks"] if self.options.mask_prob else None
        temperature = self.temperature(step)
        teacher = self._targets(extras, batch["global"], masks, temperature)
        seen = self._student(params["backbone"], batch, masks)
        views = {name: self._by_view(tokens.cls, self.views[name]) for name, tokens in seen.items()}

        terms = {}
        if o.dino_weight:
            logits = {name: self._head(params, "dino", cls) for name, cls in views.items()}
            pairs = dino_loss(
                logits["global"], logits["local"] if "local" in logits else None, teacher.dino,
                temperature=o.student_temp,
            )  # fmt: skip
            terms |= {f"dino_{name}": o.dino_weight * value for name, value in pairs.items() if name in views}
        if o.ibot_weight:
            logits = self._head(params, "ibot", self._masked(seen["global"], masks))
            crops = 2 * self.config.batch_size
            # Without masks every patch counts, those of a crop together as much as masked ones do.
            weights = jnp.full(logits.shape[:-1], 1 / np.prod(self.grid)) if masks is None else masks.weight
            value = ibot_loss(logits, teacher.ibot, weights, crops=crops, temperature=o.student_temp)
            terms["ibot"] = o.ibot_weight * value
        if o.koleo_weight:
            groups = views["global"].reshape(2, self.config.groups, -1, self.vit.width)
            terms["koleo"] = o.koleo_weight * sum(koleo_loss(view) for view in groups)

        watched = dinov2_teacher.health(teacher.ibot if teacher.dino is None else teacher.dino)
        watched |= {"teacher_temp": temperature, "momentum": self.momentum(step)}
        return sum(terms.values()), {"metrics": terms | watched, "means": teacher.means}

    def after_update(self, params: Tree, extras: Tree, aux: dict, step: Array) -> Tree:
        o, momentum = self.options, self.momentum(step)
        averaged = "ema" if o.distill_from else "teacher"
        decays = dict.fromkeys(params, momentum)
        if o.freeze_backbone:
            # To the last bit what it was: when the trunk thaws, teacher and student start from the same one.
            decays["backbone"] = jnp.where(step < o.freeze_backbone, 1.0, momentum)
        return extras | {
            averaged: {name: ema_update(extras[averaged][name], params[name], decays[name]) for name in params},
            "center": dinov2_teacher.moved(extras["center"], aux["means"], self.options.center_momentum),
        }

    def schedules(self) -> dict[str, Schedule]:
        return dinov2_schedules.rates(self.config)

    def param_groups(self, path: str) -> Group:
        return dinov2_schedules.group_of(path, self.config, self.vit.depth)

    def alarms(self, step: int, values: Mapping[str, float]) -> dict[str, str]:
        watched = self._head_of("dino" if self.options.dino_weight else "ibot")
        return dinov2_alarms.alarms(self.config, self.heads[watched].prototypes, step, values)

    def train_flops(self) -> float:
        """Teacher and student, crops and heads; what stochastic depth leaves out does not count, and neither do
        augmentation and losses."""
        sizes = {"global": self.crops.global_size, "local": self.crops.local_size}
        total = 2 * forward_flops(self.teacher.vit, sizes["global"])
        passes = 1 if self._trunk_is_fixed else 3
        for name, crops in self.views.items():
            total += passes * crops * forward_flops(self.vit, sizes[name], kept=self._share_kept(crops))
        group = self.config.batch_size // self.config.groups
        rows = {"dino": sum(self.views.values()), "ibot": self._bound / group}
        for name in self._losses:
            teacher_rows = 2 if name == "dino" else rows[name]
            head = self._head_of(name)
            total += 3 * rows[name] * head_flops(self.heads[head]) + teacher_rows * head_flops(self.teacher.heads[head])
        return total

    def eval_model(self, params: Tree, extras: Tree) -> Model:
        return self._network(extras["ema" if self.options.distill_from else "teacher"]["backbone"], self.vit)

    # What the methods above are made of.

    @property
    def _losses(self) -> tuple[str, ...]:
        """Those with prototypes."""
        return tuple(name for name in ("dino", "ibot") if self.options[f"{name}_weight"])

    @property
    def _trunk_is_fixed(self) -> bool:
        """Whether the heads alone are trained: then no backward pass runs through the trunk."""
        return self.options.freeze_backbone >= self.config.total_steps

    @property
    def _bound(self) -> int:
        """M: the masked patches of one group are at most so many; all of them where nothing is masked."""
        o, crops = self.options, 2 * self.config.batch_size // self.config.groups
        if not o.mask_prob:
            return crops * int(np.prod(self.grid))
        return masking.upper_bound(crops, int(np.prod(self.grid)), probability=o.mask_prob, ratio=tuple(o.mask_ratio))

    def _targets(self, extras: Tree, images: Array, masks, temperature: Array) -> dinov2_teacher.Targets:
        """Of the teacher, who sees whole images and drops nothing."""
        teacher = jax.lax.stop_gradient(extras["teacher"])
        tokens = self._network(teacher["backbone"], self.teacher.vit)(images)
        inputs = {"dino": lambda: self._by_view(tokens.cls, 2), "ibot": lambda: self._masked(tokens, masks)}
        # In float32, as the softmax at a low temperature wants them.
        heads = self.teacher.heads
        logits = {name: self._head(teacher, name, inputs[name](), jnp.float32, heads) for name in self._losses}
        valid = None if masks is None else masks.valid
        return dinov2_teacher.targets(self.options, logits, valid, extras["center"], temperature)

    def _student(self, backbone: Tree, batch: Batch, masks) -> dict[str, Tokens]:
        """{kind of crop: tokens}; the global crops with patches masked, the local ones whole."""
        backbone = jax.lax.stop_gradient(backbone) if self._trunk_is_fixed else backbone
        drop = batch["drop"] if self.vit.drop_path else dict.fromkeys(self.views)
        model = self._network(backbone, self.vit)
        mask = None if masks is None else constrain_examples(masks.mask.reshape(-1, masks.mask.shape[-1]))
        patch_masks = {"global": mask, "local": None}
        return {name: model(batch[name], patch_mask=patch_masks[name], key=drop[name]) for name in self.views}

    def _network(self, backbone: Tree, vit: ViTConfig) -> Model:
        return Model(backbone, vit, self.run, self.preprocessing)

    def _head_of(self, loss: str) -> str:
        return "ibot_head" if loss == "ibot" and self.options.separate_head else "dino_head"

    def _head(self, params: Tree, loss: str, x: Array, logits_dtype=None, heads=None) -> Array:
        name = self._head_of(loss)
        return apply_head((heads or self.heads)[name], params[name], x, self.run.dtype, logits_dtype)

    def _cut(self, batch: Batch, key: Array) -> dict[str, Array]:
        """{"global": (B, 2, S, S, 3), "local": (B, L, s, s, 3)}, normalised."""
        mean, std = self.preprocessing.mean, self.preprocessing.std
        if self.config.data.augment_on == "host":
            return {name: augment.normalize(batch[name], mean, std) for name in self.views}
        return multi_crop(key, batch["image"], batch["size"], self.crops, mean, std)

    def _draw_masks(self, key: Array) -> masking.Masks:
        o = self.options
        return masking.block_masks(
            key,
            groups=self.config.groups,
            crops=2 * self.config.batch_size // self.config.groups,
            grid=self.grid,
            max_area=masking.max_block_area(self.crops.global_size, self.vit.patch_size),
            probability=o.mask_prob,
            ratio=tuple(o.mask_ratio),
        )

    def _draw_drops(self, key: Array, crops: int):
        rows, rates = crops * self.config.batch_size, drop_rates(self.vit)
        if self.options.drop == "sample":
            return branches(key, rows, rates)
        return subsets(key, self.config.groups, rows // self.config.groups, rates)

    def _share_kept(self, crops: int) -> float:
        """Of the blocks' branches, what is computed for one kind of crop."""
        rows = crops * self.config.batch_size // self.config.groups
        if not self.vit.drop_path or self.options.drop == "sample":
            return 1.0
        return float(np.mean([kept(rows, rate) / rows for rate in drop_rates(self.vit)]))

    def _rows(self, x: Array) -> Array:
        """(B, crops, …) -> (G crops b, …), in the order of this file."""
        grouped = x.reshape(self.config.groups, -1, *x.shape[1:]).swapaxes(1, 2)
        return constrain_examples(grouped.reshape(-1, *x.shape[2:]))

    def _by_view(self, x: Array, crops: int) -> Array:
        """(G crops b, D) -> (crops, B, D)."""
        grouped = x.reshape(self.config.groups, crops, -1, x.shape[-1]).swapaxes(0, 1)
        return constrain_examples(grouped.reshape(crops, -1, x.shape[-1]), axis=1)

    def _masked(self, tokens: Tokens, masks: masking.Masks | None) -> Array:
        """(G, M, D): the patches on the list of masked ones, gathered before any head sees them; without masks all."""
        patches = tokens.patches.reshape(self.config.groups, -1, tokens.patches.shape[-1])
        if masks is None:
            return constrain_examples(patches)
        take = jax.vmap(lambda x, i: x.at[i].get(indices_are_sorted=True, mode="promise_in_bounds"))
        return constrain_examples(take(constrain_examples(patches), constrain_examples(masks.index)))

    def _centers(self) -> Tree:
        if self.options.centering == "sinkhorn":
            return {}
        return {name: jnp.zeros(self.heads[self._head_of(name)].prototypes) for name in self._losses}
