"""DINO (2021): a plain ViT, no registers, no LayerScale; full checkpoints hold the projection head beside it."""

from regvit_jax.convert.fit import Holds
from regvit_jax.convert.rows import Row, block, fused_attention, mlp, norm, patch_embed
from regvit_jax.convert.table import Family

ROWS = (
    *patch_embed("patch_embed.proj"),
    Row("cls_token", ("cls_token",)),
    Row("pos_embed", ("pos_embed",)),
    *block("blocks.{i}.", attention=fused_attention(), mlp=mlp("mlp.fc1", "mlp.fc2", "gelu"), gains=None),
    *norm("norm", "norm"),
)

FAMILY = Family(
    name="dino",
    rows=ROWS,
    configure=lambda shapes: {"resampler": "bicubic_offset", "token_init_std": 0.02},
    holds=Holds(position=("cls",), registers="never", layerscale="never", qkv_bias="always"),
    rename=((r"^(module\.)?(backbone\.)?", ""),),
    dropped=((r"(^|\.)head\.(mlp|last_layer)\b", "projection head of self-supervised training"),),
    means="DINO: positions resampled from scale factors",
)
