"""What changes over a DINOv2 run, and what the optimiser does with which parameter."""

import dataclasses

import jax.numpy as jnp
from ml_collections import ConfigDict

from regvit_jax.optim import PER_TENSOR, Group, default_group, lr_schedule, schedule
from regvit_jax.optim.schedules import Schedule
from regvit_jax.recipes.dinov2_config import LR_SCALING

# Tokens and positions are decayed, and so are both factors of the prototypes.
NO_DECAY = ("bias", "*norm*", "gamma")


def rates(config: ConfigDict) -> dict[str, Schedule]:
    """The schedules of the optimiser by name: "lr", "wd" and, where the rate holds the prototypes, "last_layer_lr".

    "backbone_lr" is that of a trunk that starts later than its heads: its own warm-up begins when it does.
    """
    o, total = config.dinov2, config.total_steps
    plain = lr_schedule(scaled(config), total)
    decay = schedule("cosine", config.optim.weight_decay, total, 0, end=o.weight_decay_end)
    found = {"lr": plain, "wd": decay}
    if o.freeze_by == "lr" and o.freeze_last_layer:
        found["last_layer_lr"] = lambda step: jnp.where(step < o.freeze_last_layer, 0.0, plain(step))
    if o.freeze_backbone:
        rise = schedule("constant", 1.0, total, min(config.optim.warmup_steps, total))
        found["backbone_lr"] = lambda step: plain(step) * rise(step - o.freeze_backbone)
    return found


def scaled(config: ConfigDict) -> ConfigDict:
    """config.optim with the learning rate for this batch."""
    optim, reference = config.optim.copy_and_resolve_references(), LR_SCALING[config.dinov2.lr_scaling]
    if reference:
        share = config.batch_size / reference
        optim.lr *= share**0.5 if config.dinov2.lr_scaling == "sqrt" else share
    return optim


def teacher_temperature(config: ConfigDict) -> Schedule:
    """Linear from the first update to the last of the warm-up, which has the final value; then constant.

    A run that is shorter than the warm-up ends on the way.
    """
    o = config.dinov2
    stages = o.teacher_temp_warmup // o.teacher_temp_every
    stage = schedule("constant", o.teacher_temp, max(stages, 1), stages, start=o.teacher_temp_start)
    return lambda step: stage(jnp.asarray(step) // o.teacher_temp_every)


def momentum(config: ConfigDict) -> Schedule:
    """Of the teacher's moving average: a cosine over the whole run."""
    return schedule("cosine", config.dinov2.momentum, config.total_steps, 0, end=config.dinov2.momentum_end)


def group_of(path: str, config: ConfigDict, depth: int) -> Group:
    """What one parameter gets.

    Args:
      path: its name below params: backbone/…, dino_head/… or ibot_head/….
      config: of the run.
      depth: of the backbone.

    Source: DINOv2's fused parameter groups; DINO (v1) by the keys that say so.
    """
    o = config.dinov2
    network = path.partition("/")[0]
    group = default_group(path, depth=depth, layer_decay=config.optim.layer_decay, no_decay=NO_DECAY)
    group = dataclasses.replace(group, clip_group=PER_TENSOR if o.clip == "tensor" else network)
    if "/patch_embed/" in path:
        group = group.scale_lr(o.patch_embed_lr)
    if network == "backbone" and o.freeze_backbone:
        # No moments are kept of what never moves.
        frozen = o.freeze_backbone >= config.total_steps or o.freeze_backbone
        group = dataclasses.replace(group, frozen=frozen, lr_schedule="backbone_lr")
    if "/last_layer/" in path:
        by_rate = o.freeze_by == "lr"
        if by_rate and o.freeze_last_layer:
            group = dataclasses.replace(group, lr_schedule="last_layer_lr")
        never = path.endswith("/g") and not o.train_norms
        group = dataclasses.replace(group, frozen=never or (0 if by_rate else o.freeze_last_layer))
    return group
