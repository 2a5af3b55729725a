"""Parameter groups: what the optimiser does with one parameter, decided from its path."""

import dataclasses
import fnmatch

import numpy as np

from regvit_jax.trees import is_stacked

# Every tensor of this clipping group (every layer of a stacked one) is clipped by its own norm.
PER_TENSOR = "tensor"

# fnmatch patterns of path components. A parameter is not decayed if any component of its path matches.
NO_DECAY_TOKENS = ("cls_token", "register_tokens", "mask_token", "pos_embed")
NO_DECAY = ("bias", "*norm*", "gamma", "logit_scale", "logit_bias", *NO_DECAY_TOKENS)

# What comes before block 0: layer 0 of layer-wise learning rate decay.
EMBEDDINGS = ("patch_embed", "token_embed", "pre_norm", *NO_DECAY_TOKENS)


@dataclasses.dataclass(frozen=True)
class Group:
    """What one parameter gets.

    Attributes:
      lr_mult: multiplies the learning rate (and with it the decay). For a stacked parameter it may be a vector of one
          number a layer: any 1-D sequence, kept as a tuple so that groups compare and hash.
      lr_schedule: name of the schedule among those given to the Optimizer.
      wd_mult: multiplies the weight decay; 0 also exempts from LAMB's trust ratio.
      clip_group: parameters of one name share one gradient norm; PER_TENSOR: none share.
      frozen: True: never updated, no optimiser state. n: untouched, moments included, until n steps were done.
    """

    lr_mult: float | tuple[float, ...] = 1.0
    lr_schedule: str = "lr"
    wd_mult: float = 1.0
    clip_group: str = "all"
    frozen: bool | int = False

    def __post_init__(self):
        mult = np.asarray(self.lr_mult, np.float64)
        if mult.ndim > 1:
            raise ValueError(f"lr_mult is a number or a vector of one number a layer, got shape {mult.shape}")
        object.__setattr__(self, "lr_mult", tuple(mult.tolist()) if mult.ndim else float(mult))
        if not isinstance(self.frozen, bool | int) or self.frozen < 0:
            raise ValueError(f"frozen is True, False or a number of steps (a Python int >= 0), got {self.frozen!r}")

    @property
    def thaw(self) -> int | None:
        """The first step that updates this parameter; None if no step does."""
        return None if self.frozen is True else int(self.frozen)

    def scale_lr(self, factor: float) -> "Group":
        """The same group with its learning rate (of every layer) multiplied by `factor`."""
        return dataclasses.replace(self, lr_mult=factor * np.asarray(self.lr_mult))

    def lr_mult_of(self, path: str, shape: tuple[int, ...]) -> float | np.ndarray:
        """The multiplier in a form that broadcasts against the leaf: a number, or float32 (depth, 1, ...).

        Raises:
          ValueError: if a vector meets a leaf that is not stacked, or one of another depth.
        """
        if not isinstance(self.lr_mult, tuple):
            return self.lr_mult
        if not is_stacked(path) or len(self.lr_mult) != shape[0]:
            raise ValueError(
                f"{path}: lr_mult has {len(self.lr_mult)} layers but the parameter of shape {tuple(shape)} is "
                f"{'stacked to another depth' if is_stacked(path) else 'not stacked: give one number'}"
            )
        return np.asarray(self.lr_mult, np.float32).reshape(-1, *[1] * (len(shape) - 1))


def default_group(path: str, *, depth: int, layer_decay: float = 1.0, no_decay: tuple[str, ...] = NO_DECAY) -> Group:
    """Layer-wise learning rate decay and the list of parameters without weight decay.

    The multiplier is layer_decay ** (depth + 1 - layer): layer 0 for what comes before the blocks (EMBEDDINGS), i + 1
    for block i, depth + 1 for everything after (final norm, head). A recipe adjusts the result:
    `dataclasses.replace(group, clip_group=...)`, `group.scale_lr(0.2)`.

    Args:
      path: name of the leaf, "blocks/attn/qkv/kernel"; a prefix ("backbone/blocks/...") changes nothing.
      depth: number of blocks of the trunk that the leaf belongs to.
      layer_decay: 1 gives every layer the same rate.
      no_decay: fnmatch patterns of path components. DINOv2 decays its tokens: ("bias", "*norm*", "gamma").

    Source: BEiT and DINOv2 for layer decay; DeiT for the list.
    """
    parts = path.split("/")
    if layer_decay == 1.0:
        lr_mult = 1.0
    elif is_stacked(path):
        lr_mult = layer_decay ** np.arange(depth, 0, -1, dtype=np.float64)
    else:
        lr_mult = layer_decay ** (depth + 1) if _matches(parts, EMBEDDINGS) else 1.0
    return Group(lr_mult=lr_mult, wd_mult=0.0 if _matches(parts, no_decay) else 1.0)


def _matches(parts: list[str], patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(part, pattern) for part in parts for pattern in patterns)
