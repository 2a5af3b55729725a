"""Hugging Face Dinov2 and Dinov2WithRegisters, in the names of their files (transformers 4.x and 5.x write the
same)."""

from regvit_jax.convert.table import Family, Row, linear, norm, patch_embed

_LAYER = "encoder.layer.{i}."
_QKV = tuple(f"{_LAYER}attention.attention.{part}" for part in ("query", "key", "value"))

ROWS = (
    *patch_embed("embeddings.patch_embeddings.projection"),
    Row("cls_token", ("embeddings.cls_token",)),
    Row("register_tokens", ("embeddings.register_tokens",)),
    Row("mask_token", ("embeddings.mask_token",)),
    Row("pos_embed", ("embeddings.position_embeddings",)),
    *norm("blocks/norm1", _LAYER + "norm1"),
    Row("blocks/attn/qkv/kernel", tuple(f"{part}.weight" for part in _QKV), "qkv_parts_kernel"),
    Row("blocks/attn/qkv/bias", tuple(f"{part}.bias" for part in _QKV), "qkv_parts_bias"),
    *linear("blocks/attn/proj", _LAYER + "attention.output.dense"),
    Row("blocks/ls1/gamma", (_LAYER + "layer_scale1.lambda1",)),
    *norm("blocks/norm2", _LAYER + "norm2"),
    *linear("blocks/mlp/fc1", _LAYER + "mlp.fc1"),
    *linear("blocks/mlp/fc2", _LAYER + "mlp.fc2"),
    *linear("blocks/mlp/fc1", _LAYER + "mlp.weights_in"),
    *linear("blocks/mlp/fc2", _LAYER + "mlp.weights_out"),
    Row("blocks/ls2/gamma", (_LAYER + "layer_scale2.lambda1",)),
    *norm("norm", "layernorm"),
)


def _configure(shapes):
    # Both classes hard-code the output size; only the one with registers filters against aliasing.
    return {"resampler": "antialias" if "register_tokens" in shapes else "bicubic"}


FAMILY = Family(name="huggingface", rows=ROWS, configure=_configure)
