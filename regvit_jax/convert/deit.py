"""DeiT-III as released: positions on patches only, LayerScale under the names gamma_1 and gamma_2, a class head."""

from regvit_jax.convert.table import Family, Row, fused_qkv, linear, norm, patch_embed

ROWS = (
    *patch_embed("patch_embed.proj"),
    Row("cls_token", ("cls_token",)),
    # The released models have none; the reproduction with registers (TMLR 2025) calls them so.
    Row("register_tokens", ("reg_tokens",)),
    Row("pos_embed", ("pos_embed",)),
    *norm("blocks/norm1", "blocks.{i}.norm1"),
    *fused_qkv("blocks.{i}.attn.qkv"),
    *linear("blocks/attn/proj", "blocks.{i}.attn.proj"),
    Row("blocks/ls1/gamma", ("blocks.{i}.gamma_1",)),
    *norm("blocks/norm2", "blocks.{i}.norm2"),
    *linear("blocks/mlp/fc1", "blocks.{i}.mlp.fc1"),
    *linear("blocks/mlp/fc2", "blocks.{i}.mlp.fc2"),
    Row("blocks/ls2/gamma", ("blocks.{i}.gamma_2",)),
    *norm("norm", "norm"),
    *linear("head", "head"),
)

FAMILY = Family(
    name="deit3",
    rows=ROWS,
    configure=lambda shapes: {"resampler": "bicubic", "drop_path_uniform": True},
    crop_ratio=1.0,
)
