"""DINOv2: a student learns from crops, and from patches it does not see, what a moving average of itself says about
whole images. DINO (v1) is a setting of its keys."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from regvit_jax.data.masking import Masks
from regvit_jax.flops import forward_flops, head_flops
from regvit_jax.losses import dino_loss, ibot_loss, koleo_loss
from regvit_jax.models.config import ViTConfig
from regvit_jax.models.model import Model, init_params
from regvit_jax.models.prototype_head import HeadConfig, apply_head, init_head
from regvit_jax.optim import Group, ema_update
from regvit_jax.optim.schedules import Schedule
from regvit_jax.recipes import dinov2_alarms, dinov2_config, dinov2_schedules, dinov2_start, dinov2_teacher
from regvit_jax.recipes import start as starts
from regvit_jax.recipes.base import Batch, Recipe
from regvit_jax.recipes.dinov2_batch import Views
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

    Attributes:
      options: config.dinov2.
      losses: those with prototypes that are on, of "dino" (class tokens) and "ibot" (masked patches).
      heads: the student's, by the name of their parameters.
      teacher: the teacher's architecture.
      views: how many crops there are, how large, and how they lie in a batch.
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
        self.losses = tuple(name for name in ("dino", "ibot") if o[f"{name}_weight"])
        self.heads = dinov2_config.heads(o, self.vit)
        # Until `prepare` is given another one, the teacher is as large as the student.
        self.teacher = dinov2_start.Networks(self.vit, self.heads)
        self.views = Views(config, self.vit, self.preprocessing)
        self.temperature = dinov2_schedules.teacher_temperature(config)
        self.momentum = dinov2_schedules.momentum(config)

    @property
    def input_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        return self.views.input_spec

    @property
    def transform(self) -> Callable:
        return self.views.transform

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
                side=self.views.crops.global_size, preprocessing=self.preprocessing, dtype=self.run.dtype,
            )  # fmt: skip
            starts.tell("distill_from", notes, model, self.preprocessing)
        if o.distill_from and o.ibot_weight:
            rows, k = self.config.groups * self.views.bound, self.heads[self.head_of("ibot")].prototypes
            logging.info(
                "distillation compares all %d patches of the global crops: %d prototypes of each are %.1f GiB of the "
                "teacher's logits, over all devices", rows, k, 4 * rows * k / 2**30,
            )  # fmt: skip
        return ready

    def init(self, key: Array, loaded: dict[str, Any]) -> tuple[Tree, Tree]:
        o = self.options
        backbone_key, *head_keys = jax.random.split(key, 1 + len(self.heads))
        backbone = init_params(self.vit, backbone_key)
        if "init_from" in loaded:
            backbone = starts.graft(backbone, loaded["init_from"], self.vit)
        heads = {name: init_head(self.heads[name], k) for name, k in zip(self.heads, head_keys, strict=True)}
        if "heads" in loaded:
            heads = jax.tree.map(jnp.asarray, loaded["heads"])
        params = {"backbone": backbone} | heads
        centred = () if o.centering == "sinkhorn" else self.losses
        centers = {loss: jnp.zeros(self.heads[self.head_of(loss)].prototypes) for loss in centred}
        if not o.distill_from:
            return params, {"teacher": params, "center": centers}
        teacher = jax.tree.map(jnp.asarray, loaded["teacher"]) if "teacher" in loaded else params
        return params, {"teacher": teacher, "ema": params, "center": centers}

    def augment(self, batch: Batch, key: Array, step: Array) -> Batch:
        return self.views.draw(batch, key)

    def loss(self, params: Tree, extras: Tree, batch: Batch, key: Array, step: Array) -> tuple[Array, dict]:
        masks, temperature = batch["masks"], self.temperature(step)
        teacher = jax.lax.stop_gradient(extras["teacher"])
        # In float32, as the softmax at a low temperature wants them.
        said = self.logits(teacher, self.teacher_tokens(teacher["backbone"], batch), self.teacher.heads, jnp.float32)
        targets = dinov2_teacher.targets(
            self.options, said, None if masks is None else masks.valid, extras["center"], temperature
        )
        seen = self.student_tokens(params["backbone"], batch, tuple(self.views.counts))
        terms = self.terms(seen, self.logits(params, seen, self.heads), targets, masks)
        watched = dinov2_teacher.health(targets.ibot if targets.dino is None else targets.dino)
        watched |= {"teacher_temp": temperature, "momentum": self.momentum(step)}
        return sum(terms.values()), {"metrics": terms | watched, "means": targets.means}

    # The parts of the loss, each of which can be run by itself.

    def teacher_tokens(self, backbone: Tree, batch: Batch) -> dict[str, Array]:
        """Of the teacher's trunk, which sees whole images and drops nothing: {"dino": (2, B, D) class tokens of the
        global crops, "ibot": (G, M, D) patches that the student does not see}, of the losses that are on."""
        tokens = self._network(backbone, self.teacher.vit)(batch["global"])
        found = {"dino": lambda: self.views.by_view(tokens.cls, 2)}
        found["ibot"] = lambda: self.views.masked(tokens.patches, batch["masks"])
        return {loss: found[loss]() for loss in self.losses}

    def student_tokens(self, backbone: Tree, batch: Batch, kinds: tuple[str, ...]) -> dict[str, Any]:
        """Of the student's trunk, for some kinds of crops: {"dino": {kind: (crops, B, D)}} class tokens and, where
        "global" is among them, which are seen with patches masked, {"ibot": (G, M, D)} these patches."""
        backbone = jax.lax.stop_gradient(backbone) if self._trunk_is_fixed else backbone
        model, masks = self._network(backbone, self.vit), batch["masks"]
        found = {"dino": {}}
        for kind in kinds:
            mask = None
            if kind == "global" and masks is not None:
                mask = constrain_examples(masks.mask.reshape(-1, masks.mask.shape[-1]))
            tokens = model(batch[kind], patch_mask=mask, key=batch["drop"][kind])
            found["dino"][kind] = self.views.by_view(tokens.cls, self.views.counts[kind])
            if kind == "global":
                found["ibot"] = self.views.masked(tokens.patches, masks)
        return found

    def logits(
        self, params: Tree, tokens: dict[str, Any], heads: dict[str, HeadConfig], dtype: Any = None
    ) -> dict[str, Any]:
        """{loss: logits (..., K) of each array of its tokens} of the losses that are on, under a network's heads.

        Only class tokens and masked patches come here: no array of all tokens times all prototypes is ever made.
        """
        names = {loss: self.head_of(loss) for loss in self.losses}
        return {loss: apply_head(heads[n], params[n], tokens[loss], self.run.dtype, dtype) for loss, n in names.items()}

    def terms(
        self, tokens: dict[str, Any], logits: dict[str, Any], targets: dinov2_teacher.Targets, masks: Masks | None
    ) -> dict[str, Array]:
        """The weighted terms of the loss, those that are on; `tokens` and `logits` are the student's."""
        o, found = self.options, {}
        if o.dino_weight:
            views = logits["dino"]
            pairs = dino_loss(
                views["global"], views["local"] if "local" in views else None, targets.dino, temperature=o.student_temp
            )
            found |= {f"dino_{kind}": o.dino_weight * pairs[kind] for kind in views}
        if o.ibot_weight:
            # Without masks every patch counts, those of a crop together as much as masked ones do.
            every = jnp.full(logits["ibot"].shape[:-1], 1 / np.prod(self.views.grid))
            value = ibot_loss(
                logits["ibot"], targets.ibot, every if masks is None else masks.weight,
                crops=2 * self.config.batch_size, temperature=o.student_temp,
            )  # fmt: skip
            found["ibot"] = o.ibot_weight * value
        if o.koleo_weight:
            groups = tokens["dino"]["global"].reshape(2, self.config.groups, -1, self.vit.width)
            found["koleo"] = o.koleo_weight * sum(koleo_loss(view) for view in groups)
        return found

    def after_update(self, params: Tree, extras: Tree, aux: dict, step: Array) -> Tree:
        o, momentum = self.options, self.momentum(step)
        averaged = "ema" if o.distill_from else "teacher"
        decays = dict.fromkeys(params, momentum)
        if o.freeze_backbone:
            # To the last bit what it was: when the trunk thaws, teacher and student start from the same one.
            decays["backbone"] = jnp.where(step < o.freeze_backbone, 1.0, momentum)
        return extras | {
            averaged: {name: ema_update(extras[averaged][name], params[name], decays[name]) for name in params},
            "center": dinov2_teacher.moved(extras["center"], aux["means"], o.center_momentum),
        }

    def schedules(self) -> dict[str, Schedule]:
        return dinov2_schedules.rates(self.config)

    def param_groups(self, path: str) -> Group:
        return dinov2_schedules.group_of(path, self.config, self.vit.depth)

    def alarms(self, step: int, values: Mapping[str, float]) -> dict[str, str]:
        watched = self.heads[self.head_of(self.losses[0])]
        return dinov2_alarms.alarms(self.config, watched.prototypes, step, values)

    def train_flops(self) -> float:
        """Teacher and student, crops and heads; what stochastic depth leaves out does not count, and neither do
        augmentation and losses."""
        views = self.views
        total = 2 * forward_flops(self.teacher.vit, views.sizes["global"])
        passes = 1 if self._trunk_is_fixed else 3
        for kind, crops in views.counts.items():
            total += passes * crops * forward_flops(self.vit, views.sizes[kind], kept=views.share_kept(kind))
        rows = {"dino": sum(views.counts.values()), "ibot": self.config.groups * views.bound / self.config.batch_size}
        for loss in self.losses:
            teacher_rows, head = 2 if loss == "dino" else rows[loss], self.head_of(loss)
            total += 3 * rows[loss] * head_flops(self.heads[head]) + teacher_rows * head_flops(self.teacher.heads[head])
        return total

    def eval_model(self, params: Tree, extras: Tree) -> Model:
        return self._network(extras["ema" if self.options.distill_from else "teacher"]["backbone"], self.vit)

    def head_of(self, loss: str) -> str:
        """The name of the head that a loss looks at."""
        return "ibot_head" if loss == "ibot" and self.options.separate_head else "dino_head"

    @property
    def _trunk_is_fixed(self) -> bool:
        """Whether the heads alone are trained: then no backward pass runs through the trunk."""
        return self.options.freeze_backbone >= self.config.total_steps

    def _network(self, backbone: Tree, vit: ViTConfig) -> Model:
        return Model(backbone, vit, self.run, self.preprocessing)
