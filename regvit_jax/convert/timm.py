"""timm's VisionTransformer: with and without class token, registers with and without positions, SwiGLU packed into
fc1, token, average and attention pooling. Its other classes are refused by name."""

from regvit_jax.convert import timm_config
from regvit_jax.convert.fit import Holds
from regvit_jax.convert.rows import Row, block, fused_attention, linear, mlp, norm, patch_embed
from regvit_jax.convert.table import Family

ROWS = (
    *patch_embed("patch_embed.proj"),
    Row("cls_token", ("cls_token",)),
    Row("register_tokens", ("reg_token",)),
    Row("pos_embed", ("pos_embed",)),
    *norm("pre_norm", "norm_pre"),
    *block(
        "blocks.{i}.",
        attention=fused_attention(),
        mlp=mlp("mlp.fc1", "mlp.fc2"),
        gains=("ls1.gamma", "ls2.gamma"),
    ),
    *norm("norm", "norm"),
    Row("attn_pool/latent", ("attn_pool.latent",)),
    *linear("attn_pool/q", "attn_pool.q"),
    *linear("attn_pool/kv", "attn_pool.kv"),
    *linear("attn_pool/proj", "attn_pool.proj"),
    *norm("attn_pool/norm", "attn_pool.norm"),
    *linear("attn_pool/mlp/fc1", "attn_pool.mlp.fc1"),
    *linear("attn_pool/mlp/fc2", "attn_pool.mlp.fc2"),
    *norm("fc_norm", "fc_norm"),
    *linear("head", "head"),
)

# Keys that only other classes of timm have.
REFUSED = (
    (r"\.attn\.lambda_q1$", "differential attention"),
    (r"\.attn\.(q|k)_norm\.", "attention with normalised queries and keys"),
    (r"\.(attns|ffns)\.\d", "parallel blocks"),
    (r"\.(in_proj|attn_out_proj|mlp_out_proj|qkv_mlp_in_proj)\.", "parallel scaling blocks"),
    (r"^embeds\.", "the NaFlexVit class"),
    (r"\.attn\.(q_bias|v_bias|q_proj|bias_mask)|\.mlp\.fc1_[gx]\.|^rope\.", "the Eva class (rotary positions)"),
    (r"relative_position|rel_pos", "relative positions"),
    (r"^dist_token$|^head_dist\.", "a distillation token"),
    (r"^patch_embed\.backbone\.", "a convolutional stem (hybrid)"),
    (r"^layers\.\d+\.blocks\.", "a hierarchical transformer such as Swin"),
    (r"^pos_embed_[xy]$|^patch_embed\.norm\.", "another patch or position embedding"),
)


def _configure(shapes):
    pool = "avg" if "fc_norm/scale" in shapes or "cls_token" not in shapes else "token"
    # Only CLIP's towers have a norm before the blocks, and they use the larger epsilon.
    return {
        "resampler": "antialias",
        "pool": "map" if "attn_pool/latent" in shapes else pool,
        "norm_eps": 1e-5 if "pre_norm/scale" in shapes else 1e-6,
    }


FAMILY = Family(
    name="timm",
    rows=ROWS,
    configure=_configure,
    holds=Holds(
        position=("patches", "all", "none"),
        class_token="optional",
        mask_token="never",
        patch_bias="optional",
        pre_norm="optional",
        final_norm="optional",
        fc_norm="optional",
        activations=("gelu", "swiglu"),
        heads=("token", "avg", "map"),
        square=False,
        both_norms=False,
        norm_eps=lambda config: 1e-5 if config.pre_norm else 1e-6,
    ),
    rename=((r"^(module\.)?(_orig_mod\.)?", ""),),
    refused=tuple((pattern, f"{what}: only timm's VisionTransformer class is read") for pattern, what in REFUSED),
    widths={256: 4, 320: 5, 640: 10, 832: 13, 896: 14, 1152: 16},
    from_files=timm_config.read,
    to_files=timm_config.write,
    kind="safetensors",
    means="timm: positions resampled with antialias",
)
