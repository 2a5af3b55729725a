"""Loaded weights made to fit the network that a config describes: what can be adapted is adapted and said, all else is
refused with the keys to set."""

import dataclasses
import logging
import math
from typing import Any

import jax.numpy as jnp

from regvit_jax.convert.graft import add_registers, resize
from regvit_jax.models.config import ViTConfig
from regvit_jax.models.model import Model
from regvit_jax.trees import Array, Tree, named, unname

# What no adaptation gets around. Every one is a key of config.model.
ARCHITECTURE = (
    "width depth num_heads mlp_dim activation patch_size class_token registers position layerscale pre_norm norm_eps "
    "final_norm"
).split()
# Of `adapt`: (what a family may lack, the value that changes nothing).
NEUTRAL = {
    "patch_embed/bias": 0.0,
    "blocks/attn/qkv/bias": 0.0,
    "blocks/ls1/gamma": 1.0,
    "blocks/ls2/gamma": 1.0,
}


def adapt(model: Model, vit: ViTConfig, where: str = "init_from") -> tuple[Model, list[str]]:
    """A model with the architecture of `vit`, and a sentence for everything that was changed.

    Exact, so that the tokens stay the same at the sizes they were trained for: parts that the weights lack get values
    that change nothing (LayerScale of ones, biases and a class position of zeros), a position that the config has no
    row for goes into its token. Not exact: registers are added, freshly initialised, where there are none; positions
    are resampled to the config's image size by the rule of the weights, and at other sizes by the config's from then
    on. Left out: a mask token that is not wanted, a head of other classes or another pooling. What only the config
    has (mask token, head) is not in the result: `graft` takes it from fresh parameters.

    Args:
      model: any Model; arrays may be traced.
      vit: what the config asks for.
      where: the config key that named the weights, for messages.

    Raises:
      ValueError: for differences that cannot be adapted; names the keys of config.model and the values to set.
    """
    _check(model.config, vit, where)
    notes: list[str] = []
    if vit.registers and not model.config.registers:
        model, notes = add_registers(model, vit.registers)
    position = vit.position
    if position == "all" and not vit.registers:
        position = "cls" if vit.class_token else "patches"
    model, moved = _move_positions(model, position)
    theirs = model.config
    model, resized = resize(model, vit.image_size)
    notes = [*notes, *moved, *resized]
    if vit.resampler != theirs.resampler and vit.position != "none":
        now, then = vit.resampler, theirs.resampler
        notes.append(f"positions at other sizes are resampled by {now!r} from now on, not by {then!r}")
    flat = named(model.params)
    flat, changed = _parts(flat, theirs, vit)
    notes += changed
    return dataclasses.replace(model, params=unname(flat), config=vit, origin=None), notes


def graft(fresh: Tree, model: Model, vit: ViTConfig) -> Tree:
    """`fresh` parameters, float32, with those of a loaded model in their place, adapted where it was not yet.

    Raises:
      ValueError: as `adapt` does.
    """
    ours = named(fresh)
    taken = named(adapt(model, vit)[0].params)
    wrong = [name for name, leaf in taken.items() if name not in ours or leaf.shape != ours[name].shape]
    if wrong:
        raise ValueError(f"init_from: {', '.join(wrong[:4])} do not fit the network that config.model describes")
    return unname(ours | {name: jnp.asarray(leaf, jnp.float32) for name, leaf in taken.items()})


def tell(where: str, notes: list[str], model: Model, preprocessing: Any) -> None:
    """Logs what was adapted, and warns where pixels are prepared otherwise than these weights know them."""
    for note in notes:
        logging.info("%s: %s", where, note)
    for name in ("mean", "std"):
        theirs, ours = getattr(model.preprocessing, name), getattr(preprocessing, name)
        if not same_pixels(theirs, ours):
            logging.warning("%s expects pixels with %s %s, config.data.%s=%s", where, name, theirs, name, ours)


def same_pixels(theirs: tuple[float, ...], ours: tuple[float, ...]) -> bool:
    return all(math.isclose(a, b, abs_tol=1e-3) for a, b in zip(theirs, ours, strict=True))


def _check(theirs: ViTConfig, ours: ViTConfig, where: str) -> None:
    adaptable = {
        "registers": theirs.registers == 0,
        "position": "none" not in (theirs.position, ours.position) and (ours.position != "all" or not ours.registers),
        # Of two initial values the weights have neither; their absence is no value.
        "layerscale": theirs.layerscale is None or ours.layerscale is not None,
    }
    wrong = [
        name
        for name in ARCHITECTURE
        if getattr(theirs, name) != getattr(ours, name) and not (name in adaptable and adaptable[name])
    ]
    if wrong:
        there = ", ".join(f"config.model.{name}={getattr(theirs, name)!r}" for name in wrong)
        here = ", ".join(f"{name} {getattr(ours, name)!r}" for name in wrong)
        raise ValueError(f"{where} holds another network: set {there} (now {here})")


def _move_positions(model: Model, target: str) -> tuple[Model, list[str]]:
    """The model with position rows for `target`, "patches" or "cls", tokens unchanged."""
    config, notes = model.config, []
    if config.position in (target, "none") or (config.position == "all" and target == "cls" and not config.registers):
        return dataclasses.replace(model, config=dataclasses.replace(config, position=target)), []
    params, rows = dict(model.params), model.params["pos_embed"]
    before, patches = rows[:, : config.position_prefix], rows[:, config.position_prefix :]
    keep = int(target == "cls")
    if keep and not before.shape[1]:
        before = jnp.zeros_like(rows[:, :1])
        notes.append("a position of zeros was added for the class token")
    start = 0
    for name, count in (("cls_token", int(config.class_token)), ("register_tokens", config.registers)):
        own = before[:, max(start, keep) : start + count]
        if own.shape[1]:
            params[name] = params[name] + own
            notes.append(f"the position of {name.replace('_', ' ')} was added into it")
        start += count
    params["pos_embed"] = jnp.concatenate([before[:, :keep], patches], axis=1)
    return dataclasses.replace(model, params=params, config=dataclasses.replace(config, position=target)), notes


def _parts(flat: dict[str, Array], theirs: ViTConfig, ours: ViTConfig) -> tuple[dict[str, Array], list[str]]:
    d, notes = ours.width, []
    shapes = {"patch_embed/bias": (d,), "blocks/attn/qkv/bias": (ours.depth, 3, d)}
    wanted = {
        "patch_embed/bias": ours.patch_bias,
        "blocks/attn/qkv/bias": ours.qkv_bias,
        "blocks/ls1/gamma": ours.layerscale is not None,
        "blocks/ls2/gamma": ours.layerscale is not None,
    }
    for name, value in NEUTRAL.items():
        if wanted[name] and name not in flat:
            flat = flat | {name: jnp.full(shapes[name] if name in shapes else (ours.depth, d), value)}
            notes.append(f"{name} of {'ones' if value else 'zeros'} was added")
    if theirs.mask_token and not ours.mask_token:
        flat = {name: leaf for name, leaf in flat.items() if name != "mask_token"}
        notes.append("the mask token was left out")
    if ours.mask_token and "mask_token" not in flat:
        notes.append("the mask token starts afresh")
    if not _head_stays(theirs, ours):
        same = (theirs.pool, theirs.fc_norm) == (ours.pool, ours.fc_norm)
        parts = ("head/",) if same else ("head/", "fc_norm/", "attn_pool/")
        flat = {name: leaf for name, leaf in flat.items() if not name.startswith(parts)}
        if theirs.num_classes:
            notes.append(f"the head of {theirs.num_classes} classes was left out")
    return flat, notes


def _head_stays(theirs: ViTConfig, ours: ViTConfig) -> bool:
    return all(getattr(theirs, name) == getattr(ours, name) for name in ("num_classes", "pool", "fc_norm"))
