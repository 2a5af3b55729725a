"""Meta's linear heads for DINOv2: image classes, depth, segmentation. Read from their files, written back exactly.

A classifier of one layer becomes the head of a Model (`attach`); the others are kept as what they are, for evaluators.
The DPT depth heads and multi-stage heads beyond these keys are not described and are refused.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from regvit_jax.models.model import Model, intermediate
from regvit_jax.trees import Array

StateDict = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class LinearClassifier:
    """Logits from class tokens of the last blocks and the mean patch of the last one, all after the final norm.

    Attributes:
      weight: (C, (1 + n) D), as in the file; n class tokens, the last block's last, then the mean patch.
      bias: (C,).
    """

    weight: np.ndarray
    bias: np.ndarray

    def blocks(self, width: int) -> int:
        """n, how many blocks it looks at: 1 or 4 in the released heads."""
        n, rest = divmod(self.weight.shape[1], width)
        if rest or n < 2:
            raise ValueError(f"a head of {self.weight.shape[1]} inputs does not belong to a network of width {width}")
        return n - 1

    def logits(self, model: Model, images: Array) -> Array:
        """(B, C) float32 of (B, H, W, 3) normalised images."""
        n = self.blocks(model.config.width)
        levels = intermediate(model, images, range(-n, 0), norm=True)
        features = [level.cls for level in levels] + [levels[-1].patches.mean(axis=1)]
        return jnp.concatenate(features, axis=-1).astype(jnp.float32) @ self.weight.T.astype(np.float32) + self.bias

    def to_torch(self) -> dict[str, np.ndarray]:
        return {"weight": self.weight, "bias": self.bias}


@dataclasses.dataclass(frozen=True, eq=False)
class DepthHead:
    """A 1 x 1 convolution to bins of depth; p = (relu(z) + 0.1) normalised, depth = sum of p times the bins.

    Attributes:
      weight: (256, channels, 1, 1), as in the file; channels are 2 D a level ([patch, class token]), 1 or 4 levels.
      bias: (256,).

    The range of the bins stands in no file: 0.001 to 10 m for NYU by the published configuration, 80 for KITTI.
    """

    weight: np.ndarray
    bias: np.ndarray

    def to_torch(self) -> dict[str, np.ndarray]:
        return {"decode_head.conv_depth.weight": self.weight, "decode_head.conv_depth.bias": self.bias}


@dataclasses.dataclass(frozen=True, eq=False)
class SegmentationHead:
    """A batch norm (epsilon 1e-5) and a 1 x 1 convolution to classes, on patches after the final norm.

    Attributes:
      scale, offset, mean, variance: (channels,), of the norm; channels are D, or 4 D for the multi-scale heads.
      batches: () int64, how many batches the running statistics have seen; None if the file does not say.
      weight: (C, channels, 1, 1), as in the file.
      bias: (C,).
    """

    scale: np.ndarray
    offset: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    batches: np.ndarray | None
    weight: np.ndarray
    bias: np.ndarray

    def to_torch(self) -> dict[str, np.ndarray]:
        out = {key: getattr(self, field) for key, field in _SEGMENTATION.items()}
        return {key: array for key, array in out.items() if array is not None}


_SEGMENTATION = {
    "decode_head.conv_seg.weight": "weight",
    "decode_head.conv_seg.bias": "bias",
    "decode_head.bn.weight": "scale",
    "decode_head.bn.bias": "offset",
    "decode_head.bn.running_mean": "mean",
    "decode_head.bn.running_var": "variance",
    "decode_head.bn.num_batches_tracked": "batches",
}


def read(state: StateDict) -> LinearClassifier | DepthHead | SegmentationHead:
    """The head whose keys these are; arrays keep their dtype.

    Raises:
      ValueError: for other keys, or shapes that such a head does not have.
    """
    keys = set(state)
    if keys == {"weight", "bias"}:
        head = LinearClassifier(np.asarray(state["weight"]), np.asarray(state["bias"]))
        return _shaped(head, head.weight.ndim == 2)
    if keys == {"decode_head.conv_depth.weight", "decode_head.conv_depth.bias"}:
        head = DepthHead(*(np.asarray(state[f"decode_head.conv_depth.{name}"]) for name in ("weight", "bias")))
        return _shaped(head, head.weight.ndim == 4 and head.weight.shape[2:] == (1, 1))
    if keys | {"decode_head.bn.num_batches_tracked"} == set(_SEGMENTATION):
        found = {field: np.asarray(state[key]) if key in state else None for key, field in _SEGMENTATION.items()}
        head = SegmentationHead(**found)
        channels = {a.shape for a in (head.scale, head.offset, head.mean, head.variance)}
        return _shaped(head, head.weight.ndim == 4 and channels == {head.weight.shape[1:2]})
    raise ValueError(
        "no head of DINOv2 has these keys: known are weight and bias (linear classifier), decode_head.conv_depth.* "
        f"(linear depth), decode_head.bn.* with decode_head.conv_seg.* (segmentation); found {sorted(keys)[:6]}"
    )


def attach(model: Model, head: LinearClassifier) -> Model:
    """The model with a one-layer classifier as its own head (pool "token_avg").

    Raises:
      ValueError: if the model has a head already, or the classifier looks at more blocks or another width.
    """
    if model.config.num_classes:
        raise ValueError(f"the model has a head of {model.config.num_classes} classes already")
    n = head.blocks(model.config.width)
    if n != 1:
        raise ValueError(
            f"this head looks at {n} blocks and cannot be part of a model: use LinearClassifier.logits(model, images)"
        )
    kernel, bias = (jnp.asarray(a, jnp.float32) for a in (head.weight.T, head.bias))
    config = dataclasses.replace(model.config, pool="token_avg", num_classes=len(head.bias))
    params = dict(model.params) | {"head": {"bias": bias, "kernel": kernel}}
    return dataclasses.replace(model, config=config, params=params)


def detach(model: Model) -> LinearClassifier:
    """The classifier of a model whose head looks at class token and mean patch.

    Raises:
      ValueError: for a model with another head or none.
    """
    if not model.config.num_classes or model.config.pool != "token_avg":
        raise ValueError("this model has no linear classifier on [class token, mean patch]")
    kernel, bias = (np.asarray(jax.device_get(model.params["head"][name])) for name in ("kernel", "bias"))
    return LinearClassifier(np.ascontiguousarray(kernel.T), bias)


def _shaped(head, fits: bool):
    if not fits or head.bias.shape != head.weight.shape[:1]:
        raise ValueError(f"a head with weight {head.weight.shape} and bias {head.bias.shape} does not fit together")
    return head
