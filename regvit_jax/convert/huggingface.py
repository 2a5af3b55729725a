"""Hugging Face Dinov2 and Dinov2WithRegisters: the names of their files (4.x and 5.x write the same), and those that a
live 5.x model has in memory."""

from regvit_jax.convert import huggingface_config
from regvit_jax.convert.fit import Holds
from regvit_jax.convert.rows import Row, block, linear, mlp, norm, patch_embed
from regvit_jax.convert.table import Family

_QKV = tuple(f"attention.attention.{part}" for part in ("query", "key", "value"))

ROWS = (
    *patch_embed("embeddings.patch_embeddings.projection"),
    Row("cls_token", ("embeddings.cls_token",)),
    Row("register_tokens", ("embeddings.register_tokens",)),
    Row("mask_token", ("embeddings.mask_token",)),
    Row("pos_embed", ("embeddings.position_embeddings",)),
    *block(
        "encoder.layer.{i}.",
        attention=[
            *linear("blocks/attn/qkv", *_QKV, form="qkv_parts"),
            *linear("blocks/attn/proj", "attention.output.dense"),
        ],
        mlp=[
            *mlp("mlp.fc1", "mlp.fc2", "gelu"),
            *mlp("mlp.weights_in", "mlp.weights_out", "swiglu"),
            # In memory, 5.x splits the gated layer in two.
            *linear("blocks/mlp/fc1", "mlp.gate_proj", "mlp.up_proj", form="halves", mlp="swiglu"),
        ],
        gains=("layer_scale1.lambda1", "layer_scale2.lambda1"),
    ),
    *norm("norm", "layernorm"),
    *linear("head", "classifier"),
)


def _configure(shapes):
    # Both classes hard-code the output size; only the one with registers filters against aliasing.
    return {"resampler": "antialias" if "register_tokens" in shapes else "bicubic"}


FAMILY = Family(
    name="huggingface",
    rows=ROWS,
    configure=_configure,
    holds=Holds(
        position=("cls",),
        mask_token="always",
        layerscale="always",
        activations=("gelu", "gelu_tanh", "quick_gelu", "swiglu"),
        heads=("token_avg",),
        norm_eps=None,
    ),
    rename=(
        (r"^(dinov2_with_registers|dinov2)\.", ""),
        (r"\.attention\.q_proj\.", ".attention.attention.query."),
        (r"\.attention\.k_proj\.", ".attention.attention.key."),
        (r"\.attention\.v_proj\.", ".attention.attention.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.mlp\.down_proj\.", ".mlp.weights_out."),
    ),
    from_files=huggingface_config.read,
    to_files=huggingface_config.write,
    prefix=huggingface_config.prefix,
    kind="safetensors",
    means="Hugging Face: head count and activation stand in config.json",
)
