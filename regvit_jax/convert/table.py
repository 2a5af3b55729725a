"""Key tables: rows that say which source array is which of our parameters, and the strict reader that applies them."""

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping

import numpy as np

from regvit_jax.data.transforms import Preprocess
from regvit_jax.models.config import ViTConfig
from regvit_jax.models.model import abstract_params
from regvit_jax.models.zoo import SIZES
from regvit_jax.trees import named, unname

StateDict = Mapping[str, np.ndarray]


def _patches(weight: np.ndarray) -> np.ndarray:
    """(D, 3, p, p) convolution -> (p * p * 3, D), rows ordered (py, px, channel)."""
    return weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0])


def _fused(weight: np.ndarray) -> np.ndarray:
    """(3D, D) rows [q; k; v] -> (D, 3, D)."""
    return weight.reshape(3, -1, weight.shape[1]).transpose(2, 0, 1)


# How source arrays become ours. Linear layers are (out, in) there and (in, out) here.
FORMS: dict[str, Callable[..., np.ndarray]] = {
    "raw": lambda a: a,
    "linear": lambda a: a.T,
    "patches": _patches,
    "qkv_kernel": _fused,
    "qkv_bias": lambda a: a.reshape(3, -1),
    "qkv_parts_kernel": lambda q, k, v: np.stack([q.T, k.T, v.T], axis=1),
    "qkv_parts_bias": lambda q, k, v: np.stack([q, k, v]),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One of our parameters and where it comes from.

    Attributes:
      target: our name; one below "blocks/" is stacked from every block.
      sources: the source's keys, "{i}" standing for the block number.
      form: which entry of FORMS turns them into ours.
    """

    target: str
    sources: tuple[str, ...]
    form: str = "raw"


def norm(target: str, source: str) -> list[Row]:
    """The two rows of a LayerNorm."""
    return [Row(f"{target}/scale", (f"{source}.weight",)), Row(f"{target}/bias", (f"{source}.bias",))]


def linear(target: str, source: str) -> list[Row]:
    """The two rows of a linear layer."""
    return [Row(f"{target}/kernel", (f"{source}.weight",), "linear"), Row(f"{target}/bias", (f"{source}.bias",))]


def patch_embed(source: str) -> list[Row]:
    return [Row("patch_embed/kernel", (f"{source}.weight",), "patches"), Row("patch_embed/bias", (f"{source}.bias",))]


def fused_qkv(source: str) -> list[Row]:
    target = "blocks/attn/qkv"
    return [
        Row(f"{target}/kernel", (f"{source}.weight",), "qkv_kernel"),
        Row(f"{target}/bias", (f"{source}.bias",), "qkv_bias"),
    ]


@dataclasses.dataclass(frozen=True)
class Family:
    """A naming scheme of released weights.

    Attributes:
      name: as users give it.
      rows: the key table. Rows whose keys are all absent are parts that this model does not have.
      configure: {our name: shape} -> fields of ViTConfig that
        follow from the family, not from a shape.
      rename: (pattern, replacement) regular expressions applied to keys first: chunked block names, wrapper prefixes.
      crop_ratio: of the evaluation crop these weights were made for.
    """

    name: str
    rows: tuple[Row, ...]
    configure: Callable[[dict[str, tuple[int, ...]]], dict]
    rename: tuple[tuple[str, str], ...] = ()
    crop_ratio: float = 0.875

    def keys(self, state: StateDict) -> dict[str, str]:
        """{name after `rename`: original key}."""
        out: dict[str, str] = {}
        for key in state:
            new = key
            for pattern, replacement in self.rename:
                new = re.sub(pattern, replacement, new)
            if new in out:
                raise ValueError(f"{self.name}: keys {out[new]!r} and {key!r} both mean {new!r}")
            out[new] = key
        return out

    def unexplained(self, state: StateDict) -> list[str]:
        """Keys that no row of the table consumes."""
        keys = self.keys(state)
        depth = _depth(keys)
        known = {source.format(i=i) for row in self.rows for source in row.sources for i in range(depth)}
        return [keys[key] for key in keys if key not in known]

    def read(self, state: StateDict, **overrides) -> tuple[ViTConfig, dict, Preprocess]:
        """Architecture, parameters and preprocessing of a state dict.

        Args:
          state: {name: array} with torch shapes.
          **overrides: fields of ViTConfig that keys cannot tell (num_heads of an unusual width) or that differ
          (resampler).

        Raises:
          ValueError: if a key is not consumed, a parameter not filled, or a shape not right; names them and the nearest
            keys.
        """
        leftover = self.unexplained(state)
        if leftover:
            raise ValueError(
                f"{self.name}: {len(leftover)} keys are not part of this family: {', '.join(leftover[:8])}"
            )
        keys = self.keys(state)
        flat = self._arrays({new: np.asarray(state[old]) for new, old in keys.items()})
        shapes = {name: a.shape for name, a in flat.items()}
        config = ViTConfig(**(_from_shapes(self.name, shapes, overrides) | self.configure(shapes) | overrides))
        self._check(config, shapes, list(state))
        return config, unname(flat), Preprocess(size=min(config.image_size), crop_ratio=self.crop_ratio)

    def _arrays(self, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        depth = _depth(state)
        out: dict[str, np.ndarray] = {}
        for row in self.rows:
            stacked = row.target.startswith("blocks/")
            wanted = [[s.format(i=i) for s in row.sources] for i in range(depth)] if stacked else [list(row.sources)]
            absent = [key for keys in wanted for key in keys if key not in state]
            if len(absent) == sum(map(len, wanted)):
                continue
            if absent:
                raise ValueError(
                    f"{self.name}: {row.target} is incomplete, the state dict has no {', '.join(absent[:8])}"
                )
            try:
                parts = [FORMS[row.form](*(state[key] for key in keys)) for keys in wanted]
                value = np.stack(parts) if stacked else parts[0]
            except (ValueError, IndexError) as error:
                shapes = {key: state[key].shape for key in wanted[0]}
                raise ValueError(f"{self.name}: {row.target} cannot be made from {shapes}: {error}") from error
            if row.target in out:
                raise ValueError(f"{self.name}: two sources fill {row.target}")
            out[row.target] = np.ascontiguousarray(value, dtype=np.float32)
        return out

    def _check(self, config: ViTConfig, shapes: dict[str, tuple[int, ...]], keys: list[str]) -> None:
        wanted = {name: leaf.shape for name, leaf in named(abstract_params(config)).items()}
        problems = []
        for name in sorted(wanted.keys() - shapes.keys()):
            sources = [s for row in self.rows if row.target == name for s in row.sources]
            near = difflib.get_close_matches(sources[0].format(i=0), keys, n=2) if sources else []
            problems.append(
                f"{name} is not filled (expected from {sources or 'no key of this family'}; nearest keys: {near})"
            )
        problems += [f"{name} has no place in this architecture" for name in sorted(shapes.keys() - wanted.keys())]
        problems += [
            f"{n} is {shapes[n]}, expected {wanted[n]}"
            for n in sorted(wanted.keys() & shapes.keys())
            if wanted[n] != shapes[n]
        ]
        if problems:
            raise ValueError(f"{self.name}: the state dict does not fit the architecture: " + "; ".join(problems[:8]))


def _depth(keys) -> int:
    """Number of blocks: one more than the highest index behind blocks. / layer. ."""
    numbers = [int(m[1]) for key in keys if (m := re.search(r"(?:blocks|layer)\.(\d+)\.", key))]
    return max(numbers, default=-1) + 1


def _from_shapes(family: str, shapes: dict[str, tuple[int, ...]], overrides: dict) -> dict:
    """The fields of ViTConfig that shapes decide."""
    for name in ("patch_embed/kernel", "blocks/mlp/fc2/kernel"):
        if name not in shapes:
            raise ValueError(f"{family}: the state dict has no {name}: this is not a Vision Transformer of this family")
    patch_rows, width = shapes["patch_embed/kernel"]
    depth, mlp_dim, _ = shapes["blocks/mlp/fc2/kernel"]
    registers = shapes.get("register_tokens", (1, 0))[1]
    class_token = "cls_token" in shapes
    patch_size = int(round((patch_rows / 3) ** 0.5))
    rows = shapes["pos_embed"][1]
    position, prefix = _position(rows, class_token, registers)
    side = int(round((rows - prefix) ** 0.5))
    heads = {w: h for w, _, h in SIZES.values()}
    if width not in heads and "num_heads" not in overrides:
        raise ValueError(
            f"{family}: width {width} is not a standard one and a state dict does not hold the head count: pass "
            "num_heads="
        )
    return {
        "width": width,
        "depth": depth,
        "num_heads": heads.get(width, 1),
        "mlp_dim": mlp_dim,
        "activation": "swiglu" if shapes["blocks/mlp/fc1/kernel"][-1] == 2 * mlp_dim else "gelu",
        "patch_size": patch_size,
        "image_size": (side * patch_size, side * patch_size),
        "registers": registers,
        "class_token": class_token,
        "position": position,
        "layerscale": 1.0 if "blocks/ls1/gamma" in shapes else None,
        "pre_norm": "pre_norm/scale" in shapes,
        "patch_bias": "patch_embed/bias" in shapes,
        "qkv_bias": "blocks/attn/qkv/bias" in shapes,
        "mask_token": "mask_token" in shapes,
        "final_norm": "norm/scale" in shapes,
        "fc_norm": "fc_norm/scale" in shapes,
        "num_classes": shapes["head/kernel"][1] if "head/kernel" in shapes else 0,
    }


def _position(rows: int, class_token: bool, registers: int) -> tuple[str, int]:
    """Which tokens the position rows belong to: the reading under which the patches fill a square.

    Raises:
      ValueError: if none does.
    """
    readings = {"patches": 0, "cls": 1 if class_token else 0, "all": int(class_token) + registers}
    for position, prefix in readings.items():
        if int(round(max(rows - prefix, 0) ** 0.5)) ** 2 == rows - prefix:
            return position, prefix
    raise ValueError(
        f"{rows} position rows leave no square grid of patches, with or without class token and {registers} registers"
    )
