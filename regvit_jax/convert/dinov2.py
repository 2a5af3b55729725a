"""DINOv2 as Meta releases it (hub .pth, plain or chunked block names; teacher checkpoints' `backbone.` prefix)."""

from regvit_jax.convert.table import Family, Row, fused_qkv, linear, norm, patch_embed

ROWS = (
    *patch_embed("patch_embed.proj"),
    Row("cls_token", ("cls_token",)),
    Row("register_tokens", ("register_tokens",)),
    Row("mask_token", ("mask_token",)),
    Row("pos_embed", ("pos_embed",)),
    *norm("blocks/norm1", "blocks.{i}.norm1"),
    *fused_qkv("blocks.{i}.attn.qkv"),
    *linear("blocks/attn/proj", "blocks.{i}.attn.proj"),
    Row("blocks/ls1/gamma", ("blocks.{i}.ls1.gamma",)),
    *norm("blocks/norm2", "blocks.{i}.norm2"),
    *linear("blocks/mlp/fc1", "blocks.{i}.mlp.fc1"),
    *linear("blocks/mlp/fc2", "blocks.{i}.mlp.fc2"),
    *linear("blocks/mlp/fc1", "blocks.{i}.mlp.w12"),
    *linear("blocks/mlp/fc2", "blocks.{i}.mlp.w3"),
    Row("blocks/ls2/gamma", ("blocks.{i}.ls2.gamma",)),
    *norm("norm", "norm"),
)


def _configure(shapes):
    # Models with registers were released with the antialiased resampler, the first ones with the scale-factor one.
    return {"resampler": "antialias" if "register_tokens" in shapes else "bicubic_offset"}


FAMILY = Family(
    name="dinov2",
    rows=ROWS,
    configure=_configure,
    # In chunked names the second number is already the block's index in the whole network.
    rename=((r"^(module\.)?(backbone\.)?", ""), (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.")),
)
