"""What a format has a place for, and a network reshaped to fit it without changing what it computes.

A part that a format always has is written with its neutral value (LayerScale 1, bias 0, position row 0, mask token 0).
Positions of tokens before the patches are added into those tokens where there is no row for them. A head without a
place is left out. Nothing else is changed: what a format would compute otherwise is refused.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from regvit_jax.models.config import ViTConfig

Flat = dict[str, np.ndarray]

_HEAD = ("head/", "fc_norm/", "attn_pool/")


@dataclasses.dataclass(frozen=True)
class Holds:
    """What a format can express; "always", "optional" or "never" for each part.

    Attributes:
      position: conventions of its position rows, the preferred one first.
      activations: of the MLP.
      heads: which `ViTConfig.pool` its head may look at; () for a format without head.
      square: whether the native grid must be square (its code takes the root of the number of rows).
      norm_eps: {config: the epsilon that its code uses}; None where the epsilon is written down.
      both_norms: whether there may be a final norm and a norm of the pooled vector.
    """

    position: tuple[str, ...]
    class_token: str = "always"
    registers: str = "optional"
    mask_token: str = "never"
    layerscale: str = "optional"
    patch_bias: str = "always"
    qkv_bias: str = "optional"
    pre_norm: str = "never"
    final_norm: str = "always"
    fc_norm: str = "never"
    activations: tuple[str, ...] = ("gelu",)
    heads: tuple[str, ...] = ()
    square: bool = True
    norm_eps: Callable[[ViTConfig], float] | None = lambda config: 1e-6
    both_norms: bool = True


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A network as a format holds it.

    Attributes:
      config, flat: architecture and {our name: array}; the same tokens, and the same logits if there is a head.
      added: names of arrays that only state a neutral value.
      notes: what was folded, added or left out, for people.
      resampler: how its code resamples positions where that differs from the model's; else None.
    """

    config: ViTConfig
    flat: Flat
    added: frozenset[str]
    notes: tuple[str, ...]
    resampler: str | None = None


def fit(family: str, holds: Holds, config: ViTConfig, flat: Flat) -> Fitted:
    """The same network with exactly the parts that a format has.

    Args:
      family: its name, for messages.
      holds: what it can express.
      config, flat: the network, float arrays by our names.

    Raises:
      ValueError: if the format would compute something else; says what and where it can go instead.
    """
    config, flat, notes = _head(config, dict(flat), holds)
    problems = list(_problems(config, holds))
    if problems:
        raise ValueError(
            f"{family} cannot hold this model: it has {'; '.join(problems)}. format='regvit' holds every model"
        )
    config, flat, position = _position(config, flat, holds)
    before = set(flat)
    config, flat, parts = _parts(config, flat, holds)
    added = frozenset(flat.keys() - before)
    return Fitted(config, flat, added, (*notes, *position, *parts))


def _problems(config: ViTConfig, holds: Holds):
    for part in ("registers", "pre_norm", "fc_norm"):
        if getattr(config, part) and getattr(holds, part) == "never":
            yield part.replace("_", "-") if part != "registers" else "registers"
    if config.layerscale is not None and holds.layerscale == "never":
        yield "LayerScale"
    if not config.class_token and holds.class_token == "always":
        yield "no class token"
    if not config.final_norm and holds.final_norm == "always":
        yield "no final norm"
    if config.activation not in holds.activations:
        yield f"activation {config.activation}"
    if holds.square and config.grid[0] != config.grid[1]:
        yield f"a native grid of {config.grid[0]} x {config.grid[1]}, not a square one"
    if config.final_norm and config.fc_norm and not holds.both_norms:
        yield "a final norm and a norm of the pooled vector"
    if config.pool == "map" and config.activation == "swiglu":
        yield "attention pooling with SwiGLU"
    if holds.norm_eps is not None and config.norm_eps != holds.norm_eps(config):
        yield f"norm epsilon {config.norm_eps:g}, not {holds.norm_eps(config):g}"


def _head(config: ViTConfig, flat: Flat, holds: Holds) -> tuple[ViTConfig, Flat, list[str]]:
    if config.pool in holds.heads or not (config.num_classes or config.pool == "map" or config.fc_norm):
        return config, flat, []
    widened = config.num_classes and config.class_token and "token_avg" in holds.heads
    if widened and not config.fc_norm and config.pool != "map":
        kernel = flat["head/kernel"]
        halves = [kernel, np.zeros_like(kernel)] if config.pool == "token" else [np.zeros_like(kernel), kernel]
        flat["head/kernel"] = np.concatenate(halves)
        note = "the head was widened with zeros: it looks at class token and mean patch together there"
        return dataclasses.replace(config, pool="token_avg"), flat, [note]
    if not config.final_norm:  # Then the norm of the pooled vector is no mere part of the head.
        return config, flat, []
    flat = {name: array for name, array in flat.items() if not name.startswith(_HEAD)}
    pool = "token" if config.class_token else "avg"
    what = f"the head ({config.num_classes} classes)" if config.num_classes else f"the {config.pool} pooling"
    without = dataclasses.replace(config, num_classes=0, pool=pool, fc_norm=False)
    return without, flat, [f"{what} has no place there and was left out"]


def _position(config: ViTConfig, flat: Flat, holds: Holds) -> tuple[ViTConfig, Flat, list[str]]:
    """Position rows in a convention of the format."""
    same = not config.registers and {config.position, *holds.position} >= {"cls", "all"}
    if config.position in holds.position or same:
        return config, flat, []
    target = holds.position[0]
    patches = config.grid[0] * config.grid[1]
    flat = dict(flat)
    if config.position == "none":
        rows, notes = np.zeros((1, patches, config.width), np.float32), ["position rows of zeros were added"]
    else:
        rows, notes = flat["pos_embed"], []
    before, rows = rows[:, : config.position_prefix], rows[:, config.position_prefix :]
    keep = 1 if target == "cls" else 0
    if target == "cls" and before.shape[1] == 0:
        before = np.zeros_like(rows[:, :1])
        notes.append("a position row of zeros was added for the class token")
    start = 0
    for name, count in (("cls_token", int(config.class_token)), ("register_tokens", config.registers)):
        own = before[:, max(start, keep) : start + count]
        if own.size:
            flat[name] = flat[name] + own
            notes.append(f"the position of {name.replace('_', ' ')} was added into it")
        start += count
    flat["pos_embed"] = np.concatenate([before[:, :keep], rows], axis=1)
    return dataclasses.replace(config, position=target), flat, notes


def _parts(config: ViTConfig, flat: Flat, holds: Holds) -> tuple[ViTConfig, Flat, list[str]]:
    d, depth, notes = config.width, config.depth, []
    if not config.mask_token and holds.mask_token == "always":
        flat |= {"mask_token": np.zeros((1, d), np.float32)}
        config = dataclasses.replace(config, mask_token=True)
        notes.append("a mask token of zeros was added")
    if config.mask_token and holds.mask_token == "never":
        flat = {name: array for name, array in flat.items() if name != "mask_token"}
        config = dataclasses.replace(config, mask_token=False)
        notes.append("the mask token has no place there and was left out")
    if config.layerscale is None and holds.layerscale == "always":
        flat |= {f"blocks/ls{n}/gamma": np.ones((depth, d), np.float32) for n in (1, 2)}
        config = dataclasses.replace(config, layerscale=1.0)
        notes.append("LayerScale of ones was added")
    if not config.patch_bias and holds.patch_bias == "always":
        flat |= {"patch_embed/bias": np.zeros((d,), np.float32)}
        config = dataclasses.replace(config, patch_bias=True)
        notes.append("a patch bias of zeros was added")
    if not config.qkv_bias and holds.qkv_bias == "always":
        flat |= {"blocks/attn/qkv/bias": np.zeros((depth, 3, d), np.float32)}
        config = dataclasses.replace(config, qkv_bias=True)
        notes.append("a bias of zeros was added to queries, keys and values")
    return config, flat, notes
