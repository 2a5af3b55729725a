"""Rows of a key table: one of our parameters, the source's keys for it, and the form between the two, both ways."""

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Form:
    """How source arrays (torch shapes) become one of ours, and back; the two are exact inverses.

    Attributes:
      ours: the source's arrays, in the order of a row's keys -> our array.
      theirs: our array -> the source's arrays.
    """

    ours: Callable[..., np.ndarray]
    theirs: Callable[[np.ndarray], tuple[np.ndarray, ...]]


def _patches(weight: np.ndarray) -> np.ndarray:
    """(D, 3, p, p) convolution -> (p * p * 3, D), rows ordered (py, px, channel)."""
    return weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0])


def _convolution(kernel: np.ndarray) -> np.ndarray:
    side = int(round((kernel.shape[0] / 3) ** 0.5))
    return kernel.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


def _fused(weight: np.ndarray) -> np.ndarray:
    """(3D, D) rows [q; k; v] -> (D, 3, D)."""
    return weight.reshape(3, -1, weight.shape[1]).transpose(2, 0, 1)


# Linear layers are (out, in) there and (in, out) here.
FORMS: dict[str, Form] = {
    "raw": Form(lambda a: a, lambda a: (a,)),
    "linear": Form(lambda a: a.T, lambda a: (a.T,)),
    "patches": Form(_patches, lambda a: (_convolution(a),)),
    "qkv_kernel": Form(_fused, lambda a: (a.transpose(1, 2, 0).reshape(-1, a.shape[0]),)),
    "qkv_bias": Form(lambda a: a.reshape(3, -1), lambda a: (a.reshape(-1),)),
    "qkv_parts_kernel": Form(
        lambda q, k, v: np.stack([q.T, k.T, v.T], axis=1), lambda a: tuple(a[:, i].T for i in range(3))
    ),
    "qkv_parts_bias": Form(lambda q, k, v: np.stack([q, k, v]), lambda a: tuple(a)),
    "halves_kernel": Form(
        lambda gate, value: np.concatenate([gate.T, value.T], axis=1),
        lambda a: tuple(half.T for half in np.split(a, 2, axis=1)),
    ),
    "halves_bias": Form(lambda gate, value: np.concatenate([gate, value]), lambda a: tuple(np.split(a, 2))),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One of our parameters and where it comes from.

    Attributes:
      target: our name; one below "blocks/" is stacked from every block.
      sources: the source's keys, "{i}" standing for the block number.
      form: which entry of FORMS lies between them.
      mlp: "gelu" or "swiglu": the row is for networks with that kind of MLP; "" for all. Of several rows with one
        target, the first that fits is written, unless the weights came under the names of another.
    """

    target: str
    sources: tuple[str, ...]
    form: str = "raw"
    mlp: str = ""

    @property
    def stacked(self) -> bool:
        return self.target.startswith("blocks/")

    def keys(self, block: int) -> tuple[str, ...]:
        return tuple(source.format(i=block) for source in self.sources)

    def fits(self, activation: str) -> bool:
        return self.mlp in ("", "swiglu" if activation == "swiglu" else "gelu")


def norm(target: str, source: str) -> list[Row]:
    """The two rows of a LayerNorm."""
    return [Row(f"{target}/scale", (f"{source}.weight",)), Row(f"{target}/bias", (f"{source}.bias",))]


def linear(target: str, *sources: str, form: str = "linear", mlp: str = "") -> list[Row]:
    """The two rows of a linear layer; several sources are its parts."""
    parts = "" if form == "linear" else form
    return [
        Row(f"{target}/kernel", tuple(f"{s}.weight" for s in sources), f"{parts}_kernel" if parts else "linear", mlp),
        Row(f"{target}/bias", tuple(f"{s}.bias" for s in sources), f"{parts}_bias" if parts else "raw", mlp),
    ]


def patch_embed(source: str) -> list[Row]:
    """The two rows of the patch convolution."""
    return [Row("patch_embed/kernel", (f"{source}.weight",), "patches"), Row("patch_embed/bias", (f"{source}.bias",))]


def block(prefix: str, *, attention: list[Row], mlp: list[Row], gains: tuple[str, str] | None, norms: str = "norm"):
    """The rows of one pre-norm block, in the order of its forward pass.

    Args:
      prefix: of every key, with "{i}".
      attention, mlp: rows of the two branches, keys relative to the prefix.
      gains: keys of the two LayerScale vectors, None where a family has none.
      norms: key of the two norms, without their number.
    """
    gain = [[Row(f"blocks/ls{n}/gamma", (key,))] for n, key in zip((1, 2), gains, strict=True)] if gains else [[], []]
    rows = [*norm("blocks/norm1", f"{norms}1"), *attention, *gain[0]]
    rows += [*norm("blocks/norm2", f"{norms}2"), *mlp, *gain[1]]
    return [dataclasses.replace(row, sources=tuple(prefix + source for source in row.sources)) for row in rows]


def fused_attention() -> list[Row]:
    """Attention as DINO, DINOv2, timm and DeiT name it: one qkv projection."""
    return [*linear("blocks/attn/qkv", "attn.qkv", form="qkv"), *linear("blocks/attn/proj", "attn.proj")]


def mlp(first: str, second: str, kind: str = "") -> list[Row]:
    """The two projections of an MLP."""
    return [*linear("blocks/mlp/fc1", first, mlp=kind), *linear("blocks/mlp/fc2", second, mlp=kind)]
