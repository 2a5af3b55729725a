"""DINOv2 as Meta releases it (hub .pth, plain or chunked block names; teacher checkpoints' `backbone.` prefix)."""

from regvit_jax.convert.fit import Holds
from regvit_jax.convert.rows import Row, block, fused_attention, mlp, norm, patch_embed
from regvit_jax.convert.table import Family

ROWS = (
    *patch_embed("patch_embed.proj"),
    Row("cls_token", ("cls_token",)),
    Row("register_tokens", ("register_tokens",)),
    Row("mask_token", ("mask_token",)),
    Row("pos_embed", ("pos_embed",)),
    *block(
        "blocks.{i}.",
        attention=fused_attention(),
        mlp=[*mlp("mlp.fc1", "mlp.fc2", "gelu"), *mlp("mlp.w12", "mlp.w3", "swiglu")],
        gains=("ls1.gamma", "ls2.gamma"),
    ),
    *norm("norm", "norm"),
)


def _configure(shapes):
    # Models with registers were released with the antialiased resampler, the first ones with the scale-factor one.
    return {"resampler": "antialias" if "register_tokens" in shapes else "bicubic_offset"}


FAMILY = Family(
    name="dinov2",
    rows=ROWS,
    configure=_configure,
    holds=Holds(position=("cls",), mask_token="always", activations=("gelu", "swiglu")),
    # What tells it from other libraries that use the same names for a plain ViT.
    signs=("mask_token", "register_tokens", "blocks/ls1/gamma"),
    # In chunked names the second number is already the block's index in the whole network.
    rename=((r"^(module\.)?(backbone\.)?", ""), (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.")),
    dropped=((r"(^|\.)(dino_head|ibot_head)\.", "projection head of self-supervised training"),),
    means="DINOv2: the older resampler of positions without registers, the antialiased one with",
)
