"""Names of models: what each one's architecture is, and `create_model`.

vit_{ti,s,b,l,h,g}{8,14,16}[_swiglu][_regR]     plain pre-norm ViTs, any R
dinov2_vit{s,b,l,g}14[_regR]                    DINOv2 (released with R = 0 and R = 4)
deit3_vit{ti,s,m,b,l}16[_regR], deit3_vith14    DeiT-III
"""

import dataclasses
import difflib
import re
from typing import Any

import jax

from regvit_jax.data.transforms import Preprocess
from regvit_jax.models.config import Execution, ViTConfig
from regvit_jax.models.model import Model, init_params
from regvit_jax.sharding import jit_once

# width, depth, heads. Ti and H as in DeiT and ViT; g is DINOv2's "giant2".
SIZES = {
    "ti": (192, 12, 3),
    "s": (384, 12, 6),
    "m": (512, 12, 8),
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
    "h": (1280, 32, 16),
    "g": (1536, 40, 24),
}
_VIT = re.compile(r"vit_(ti|s|b|l|h|g)(8|14|16)(_swiglu)?(?:_reg(\d+))?")
_DINOV2 = re.compile(r"dinov2_vit(s|b|l|g)(14)(?:_reg(\d+))?")
_DEIT3 = re.compile(r"deit3_vit(ti16|s16|m16|b16|l16|h14)(?:_reg(\d+))?")


def swiglu_dim(width: int) -> int:
    """Hidden units of DINOv2's SwiGLU: two thirds of 4 D, rounded up to a multiple of 8."""
    return -(-int(4 * width * 2 / 3) // 8) * 8


def list_models() -> list[str]:
    """Every name, with 0 and 4 registers. `create_model` takes any other `_regR` too."""
    plain = [
        f"vit_{size}{p}{mlp}"
        for size in ("ti", "s", "b", "l", "h", "g")
        for p in (8, 14, 16)
        for mlp in ("", "_swiglu")
    ]
    plain = [name for name in plain if not (name.startswith("vit_g") and name.endswith("_swiglu"))]
    dinov2 = [f"dinov2_vit{size}14" for size in "sblg"]
    deit3 = ["deit3_vit" + size for size in ("ti16", "s16", "m16", "b16", "l16", "h14")]
    return sorted(name + suffix for name in plain + dinov2 + deit3 for suffix in ("", "_reg4"))


def config_of(name: str, **changes: Any) -> ViTConfig:
    """The architecture behind a name, with fields of `ViTConfig` changed.

    Raises:
      ValueError: for an unknown name (with the nearest known ones) or an unknown field.
    """
    fields = _fields(name)
    if name.startswith("dinov2") and "resampler" not in changes:
        # Those without registers keep the older resampler.
        fields["resampler"] = "antialias" if changes.get("registers", fields["registers"]) else "bicubic_offset"
    unknown = set(changes) - {f.name for f in dataclasses.fields(ViTConfig)}
    if unknown:
        known = ", ".join(f.name for f in dataclasses.fields(ViTConfig))
        raise ValueError(f"{name}: unknown option {sorted(unknown)}; ViTConfig has {known}")
    return ViTConfig(**(fields | changes))


def create_model(
    name: str, *, image_size: int | tuple[int, int] | None = None, seed: int = 0, dtype: str = "float32", **changes: Any
) -> Model:
    """A freshly initialised Model.

    Args:
      name: one of `list_models()`, or any `_regR` variant of one.
      image_size: side or (height, width) in pixels at which positions are native; default the name's own.
      seed: of the initialisation; same seed, same parameters, on any device.
      dtype: "float32" or "bfloat16", of the computation; parameters are float32.
      **changes: fields of `ViTConfig`, such as registers=8, num_classes=1000, drop_path=0.1.
    """
    if image_size is not None:
        changes["image_size"] = image_size
    config = config_of(name, **changes)
    params = jit_once(lambda key: init_params(config, key))(jax.random.key(seed))
    return Model(params, config, Execution(dtype=dtype), preprocessing_of(name, config))


def preprocessing_of(name: str, config: ViTConfig) -> Preprocess:
    """How images are prepared for a named model: DeiT-III crops nothing, the others keep 7/8 of the short side."""
    return Preprocess(size=min(config.image_size), crop_ratio=1.0 if name.startswith("deit3") else 0.875)


def _fields(name: str) -> dict[str, Any]:
    if match := _VIT.fullmatch(name):
        size, patch, swiglu, registers = match.groups()
        fields = _size(size, swiglu=bool(swiglu) or size == "g") | {"patch_size": int(patch)}
    elif match := _DINOV2.fullmatch(name):
        size, _, registers = match.groups()
        # Hub models are built with gain 1 and a 37 x 37 grid.
        fields = _size(size, swiglu=size == "g") | {"image_size": (518, 518), "layerscale": 1.0, "mask_token": True}
    elif match := _DEIT3.fullmatch(name):
        size, registers = match.groups()
        fields = _size(size[:-2]) | {"patch_size": int(size[-2:]), "position": "patches", "layerscale": 1e-4}
        fields |= {"resampler": "bicubic", "drop_path_uniform": True, "token_init_std": 0.02, "num_classes": 1000}
    else:
        near = difflib.get_close_matches(name, list_models(), n=3, cutoff=0.4)
        raise ValueError(f"unknown model {name!r}; nearest: {', '.join(near) or 'none'}. rv.list_models() has them all")
    return fields | {"registers": int(registers or 0)}


def _size(size: str, swiglu: bool = False) -> dict[str, Any]:
    width, depth, heads = SIZES[size]
    mlp = {"mlp_dim": swiglu_dim(width), "activation": "swiglu"} if swiglu else {"mlp_dim": 4 * width}
    return {"width": width, "depth": depth, "num_heads": heads, **mlp}
