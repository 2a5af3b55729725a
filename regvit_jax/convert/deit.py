"""DeiT-III as released: positions on patches only, LayerScale under the names gamma_1 and gamma_2, a class head."""

from regvit_jax.convert.fit import Holds
from regvit_jax.convert.rows import Row, block, fused_attention, linear, mlp, norm, patch_embed
from regvit_jax.convert.table import Family

ROWS = (
    *patch_embed("patch_embed.proj"),
    Row("cls_token", ("cls_token",)),
    # The released models have none; the reproduction with registers (TMLR 2025) calls them so.
    Row("register_tokens", ("reg_tokens",)),
    Row("pos_embed", ("pos_embed",)),
    *block(
        "blocks.{i}.",
        attention=fused_attention(),
        mlp=mlp("mlp.fc1", "mlp.fc2", "gelu"),
        gains=("gamma_1", "gamma_2"),
    ),
    *norm("norm", "norm"),
    *linear("head", "head"),
)

FAMILY = Family(
    name="deit3",
    rows=ROWS,
    configure=lambda shapes: {"resampler": "bicubic", "drop_path_uniform": True, "token_init_std": 0.02},
    holds=Holds(position=("patches",), layerscale="always", qkv_bias="always", heads=("token",)),
    signs=("blocks/ls1/gamma",),
    rename=((r"^module\.", ""),),
    crop_ratio=1.0,
    means="DeiT-III: positions on patches only",
)
