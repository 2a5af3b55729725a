"""timm's VisionTransformer: with and without class token, registers with and without positions, token and average
pooling."""

from regvit_jax.convert.table import Family, Row, fused_qkv, linear, norm, patch_embed

ROWS = (
    *patch_embed("patch_embed.proj"),
    Row("cls_token", ("cls_token",)),
    Row("register_tokens", ("reg_token",)),
    Row("pos_embed", ("pos_embed",)),
    *norm("pre_norm", "norm_pre"),
    *norm("blocks/norm1", "blocks.{i}.norm1"),
    *fused_qkv("blocks.{i}.attn.qkv"),
    *linear("blocks/attn/proj", "blocks.{i}.attn.proj"),
    Row("blocks/ls1/gamma", ("blocks.{i}.ls1.gamma",)),
    *norm("blocks/norm2", "blocks.{i}.norm2"),
    *linear("blocks/mlp/fc1", "blocks.{i}.mlp.fc1"),
    *linear("blocks/mlp/fc2", "blocks.{i}.mlp.fc2"),
    Row("blocks/ls2/gamma", ("blocks.{i}.ls2.gamma",)),
    *norm("norm", "norm"),
    *norm("fc_norm", "fc_norm"),
    *linear("head", "head"),
)


def _configure(shapes):
    pooled = "fc_norm/scale" in shapes or "cls_token" not in shapes
    # Only CLIP's towers have a norm before the blocks, and they use the larger epsilon.
    return {
        "resampler": "antialias",
        "pool": "avg" if pooled else "token",
        "norm_eps": 1e-5 if "pre_norm/scale" in shapes else 1e-6,
    }


FAMILY = Family(name="timm", rows=ROWS, configure=_configure)
