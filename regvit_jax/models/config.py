"""What a Vision Transformer is (ViTConfig: architecture, stored with the weights) and how it is computed
(Execution)."""

import dataclasses
from typing import Any

POSITION_ROWS = ("patches", "cls", "all", "none")
RESAMPLERS = ("antialias", "bicubic", "bicubic_offset")
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "swiglu")
POOLS = ("token", "avg", "token_avg", "map")
DTYPES = ("float32", "bfloat16")
REMATS = ("none", "dots", "named", "full")
ATTENTIONS = ("auto", "cudnn", "xla", "reference")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Architecture of one Vision Transformer.

    Released weights differ in every one of these; all are kept through conversion.

    Attributes:
      width: D, the size of a token.
      depth: number of blocks.
      num_heads: attention heads; divides `width`.
      mlp_dim: hidden units of the MLP (of each half, for SwiGLU).
      patch_size: side of a square patch, pixels.
      image_size: (height, width) in pixels at which the position rows are native; an int means a square.
      registers: R, learnable tokens without position, used and discarded.
      class_token: whether token 0 is a class token.
      position: which tokens have a position row: "patches" (DeiT-III, timm no_embed_class), "cls" (class token and
        patches: DINOv2), "all" (registers too: timm's default), "none".
      resampler: how position rows reach another grid: "antialias" (registers models, timm), "bicubic" (Hugging Face
        Dinov2, DeiT-III), "bicubic_offset" (hub DINOv2 without registers, DINO v1).
      norm_eps: epsilon of every LayerNorm.
      activation: "gelu" is the exact (erf) form; "swiglu" is silu(gate) * value.
      layerscale: initial value of the per-channel gain on each branch; None for a model without.
      pre_norm: LayerNorm before the first block (CLIP).
      patch_bias, qkv_bias: whether these projections have a bias.
      mask_token: whether masked patches can be replaced by a learnt token.
      drop_path: highest stochastic-depth rate, used when the call gets a key.
      drop_path_uniform: every block at `drop_path` (DeiT-III), instead of a ramp from 0 (DINOv2, timm).
      final_norm: LayerNorm over all tokens at the end; without it `Tokens` are the residual stream.
      pool: what `logits` looks at: the class token, the mean of the patches, both side by side (2 D: DINOv2's linear
        classifier, Hugging Face), or an attention pool over the patches.
      fc_norm: LayerNorm on the pooled vector.
      num_classes: C of the head; 0 for none.
      token_init_std: of class and register tokens at initialisation.
      position_init: "normal" (std 0.02) or "sincos" (2-D sines and cosines; needs width divisible by 4).
    """

    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    patch_size: int = 14
    image_size: tuple[int, int] = (224, 224)
    registers: int = 0
    class_token: bool = True
    position: str = "cls"
    resampler: str = "antialias"
    norm_eps: float = 1e-6
    activation: str = "gelu"
    layerscale: float | None = None
    pre_norm: bool = False
    patch_bias: bool = True
    qkv_bias: bool = True
    mask_token: bool = False
    drop_path: float = 0.0
    drop_path_uniform: bool = False
    final_norm: bool = True
    pool: str = "token"
    fc_norm: bool = False
    num_classes: int = 0
    token_init_std: float = 1e-6
    position_init: str = "normal"

    def __post_init__(self):
        for name in ("width", "depth", "num_heads", "mlp_dim", "patch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        size = self.image_size
        size = (size, size) if isinstance(size, int) else tuple(int(s) for s in size)
        object.__setattr__(self, "image_size", size)
        self.grid_of(size)
        _one_of("position", self.position, POSITION_ROWS)
        _one_of("resampler", self.resampler, RESAMPLERS)
        _one_of("activation", self.activation, ACTIVATIONS)
        _one_of("pool", self.pool, POOLS)
        _one_of("position_init", self.position_init, ("normal", "sincos"))
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        if self.registers < 0:
            raise ValueError(f"registers must be 0 or more, got {self.registers}")
        if not self.class_token and (self.pool.startswith("token") or self.position == "cls"):
            raise ValueError(
                "without a class token, pool must be 'avg' or 'map' and position 'patches', 'all' or 'none'"
            )
        if self.fc_norm and self.pool == "token_avg":
            raise ValueError("pool='token_avg' has no norm of the pooled vector: fc_norm must be False")
        if self.position_init == "sincos" and self.width % 4:
            raise ValueError(f"position_init='sincos' needs a width divisible by 4, got {self.width}")
        if not 0.0 <= self.drop_path < 1.0:
            raise ValueError(f"drop_path must lie in [0, 1), got {self.drop_path}")

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the native patch grid."""
        return self.grid_of(self.image_size)

    @property
    def prefix(self) -> int:
        """Number of tokens before the patches: 1 + R, or R without a class token."""
        return int(self.class_token) + self.registers

    @property
    def position_prefix(self) -> int:
        """Number of position rows that belong to tokens before the patches."""
        return {"cls": 1, "all": self.prefix}.get(self.position, 0)

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    def grid_of(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) patches of an image of (H, W) pixels.

        Raises:
          ValueError: if a side is not a multiple of the patch; names the nearest sides that are.
        """
        p = self.patch_size
        for side, name in zip(image_size, ("height", "width"), strict=True):
            if side % p or side <= 0:
                below, above = side // p * p, (side // p + 1) * p
                nearest = f"{below} and {above}" if below > 0 else str(above)
                raise ValueError(
                    f"image {name} {side} is not a multiple of the patch size {p}; the nearest valid sizes are "
                    f"{nearest}"
                )
        return image_size[0] // p, image_size[1] // p

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "ViTConfig":
        """The config that `to_json` wrote.

        Raises:
          ValueError: if a field is unknown to this version.
        """
        unknown = set(fields) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(
                f"unknown ViT config fields {sorted(unknown)}: the file comes from another version of regvit_jax"
            )
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a network is computed. None of this changes a parameter, and only `dtype` changes numbers beyond rounding.

    Attributes:
      dtype: of the residual stream and the matrix products; norms, softmax and position resampling stay in float32.
      remat: what the backward pass recomputes: "none", "dots" (keeps matrix products, but those inside the attention),
        "named" (keeps q, k, v, the attention's output, the residual behind it and the hidden units before their
        activation: repeats no matrix product outside the attention) or "full" (keeps block inputs only).
      unroll: a Python loop over blocks instead of a scan: faster steps on a GPU, longer compilation.
      attention: "auto", "cudnn", "xla" or "reference" (see ops.attention).
    """

    dtype: str = "float32"
    remat: str = "none"
    unroll: bool = False
    attention: str = "auto"

    def __post_init__(self):
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("remat", self.remat, REMATS)
        _one_of("attention", self.attention, ATTENTIONS)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, known))}")
