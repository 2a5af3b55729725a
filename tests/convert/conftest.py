"""State dicts as other libraries write them, at tiny size: names and shapes written out by hand, random numbers."""

import numpy as np
import pytest

D, H, DEPTH, PATCH, SIDE = 16, 24, 2, 4, 3  # width, hidden units, blocks, patch, native grid of SIDE x SIDE
N = SIDE * SIDE


def _linear(name, outputs, inputs, bias=True):
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def _norm(name):
    return {f"{name}.weight": (D,), f"{name}.bias": (D,)}


def _blocks(prefix, parts):
    return {
        f"{prefix.replace('{i}', str(i))}{key}": shape
        for i in range(DEPTH)
        for part in parts
        for key, shape in part.items()
    }


def _patch(name, bias=True):
    return {f"{name}.weight": (D, 3, PATCH, PATCH)} | ({f"{name}.bias": (D,)} if bias else {})


def _plain(gains=("ls1.gamma", "ls2.gamma"), mlp=None, qkv_bias=True, prefix="blocks.{i}."):
    """Blocks as DINO, DINOv2, timm and DeiT name them."""
    mlp = mlp or [_linear("mlp.fc1", H, D), _linear("mlp.fc2", D, H)]
    parts = [_norm("norm1"), _linear("attn.qkv", 3 * D, D, qkv_bias), _linear("attn.proj", D, D)]
    parts += [{gains[0]: (D,)}] if gains else []
    parts += [_norm("norm2"), *mlp]
    return _blocks(prefix, parts + ([{gains[1]: (D,)}] if gains else []))


def _dinov2(registers=0, swiglu=False):
    tokens = {"cls_token": (1, 1, D), "pos_embed": (1, 1 + N, D)}
    tokens |= {"register_tokens": (1, registers, D)} if registers else {}
    mlp = [_linear("mlp.w12", 2 * H, D), _linear("mlp.w3", D, H)] if swiglu else None
    return tokens | {"mask_token": (1, D)} | _patch("patch_embed.proj") | _plain(mlp=mlp) | _norm("norm")


def _timm(cls=True, registers=0, rows=N, swiglu=False, final=("norm",), head=True, patch_bias=True, **blocks):
    out = {"cls_token": (1, 1, D)} if cls else {}
    out |= {"reg_token": (1, registers, D)} if registers else {}
    out |= {"pos_embed": (1, rows, D)} if rows else {}
    mlp = [_linear("mlp.fc1", 2 * H, D), _linear("mlp.fc2", D, H)] if swiglu else None
    out |= _patch("patch_embed.proj", patch_bias) | _plain(mlp=mlp, **blocks)
    for name in final:
        out |= _norm(name)
    return out | (_linear("head", 5, D) if head else {})


def _attn_pool():
    out = {"attn_pool.latent": (1, 1, D)} | _norm("attn_pool.norm")
    for name, rows, columns in (("q", D, D), ("kv", 2 * D, D), ("proj", D, D), ("mlp.fc1", H, D), ("mlp.fc2", D, H)):
        out |= _linear(f"attn_pool.{name}", rows, columns)
    return out


def _huggingface(registers=0, swiglu=False, live=False, wrapper="", mask=True):
    """`live`: the names that a 5.x model has in memory; `wrapper`: those of a classifier."""
    e, attention = "embeddings.", "attention." if live else "attention.attention."
    out = {f"{e}cls_token": (1, 1, D)} | ({f"{e}mask_token": (1, D)} if mask else {})
    out |= {f"{e}position_embeddings": (1, 1 + N, D)}
    out |= {f"{e}register_tokens": (1, registers, D)} if registers else {}
    out |= _patch(f"{e}patch_embeddings.projection")
    names = ("q_proj", "k_proj", "v_proj") if live else ("query", "key", "value")
    parts = [_norm("norm1"), *(_linear(attention + name, D, D) for name in names)]
    parts += [_linear("attention.o_proj" if live else "attention.output.dense", D, D), {"layer_scale1.lambda1": (D,)}]
    parts += [_norm("norm2")]
    if swiglu and live:
        parts += [_linear("mlp.gate_proj", H, D), _linear("mlp.up_proj", H, D), _linear("mlp.down_proj", D, H)]
    elif swiglu:
        parts += [_linear("mlp.weights_in", 2 * H, D), _linear("mlp.weights_out", D, H)]
    else:
        parts += [_linear("mlp.fc1", H, D), _linear("mlp.fc2", D, H)]
    parts += [{"layer_scale2.lambda1": (D,)}]
    out |= _blocks("encoder.layer.{i}.", parts) | _norm("layernorm")
    if not wrapper:
        return out
    return {f"{wrapper}.{key}": shape for key, shape in out.items()} | _linear("classifier", 5, 2 * D)


def _deit3(registers=0):
    out = {"cls_token": (1, 1, D), "pos_embed": (1, N, D)}
    out |= {"reg_tokens": (1, registers, D)} if registers else {}
    return out | _patch("patch_embed.proj") | _plain(("gamma_1", "gamma_2")) | _norm("norm") | _linear("head", 5, D)


def _dino():
    out = {"cls_token": (1, 1, D), "pos_embed": (1, 1 + N, D)} | _patch("patch_embed.proj")
    return out | _plain(gains=None) | _norm("norm")


def _below(prefix, shapes):
    return {prefix + key: shape for key, shape in shapes.items()}


def _chunked(shapes):
    """Training names: the block's number stands behind that of its chunk."""
    return {key.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.1."): s for key, s in shapes.items()}


_HEAD = {"mlp.0.weight": (8, D), "mlp.0.bias": (8,), "last_layer.weight_g": (9, 1), "last_layer.weight_v": (9, 8)}

# name: (family, {key: shape})
SHAPES = {
    "dinov2": ("dinov2", _dinov2()),
    "dinov2, 4 registers": ("dinov2", _dinov2(4)),
    "dinov2, SwiGLU": ("dinov2", _dinov2(2, swiglu=True)),
    "dinov2, teacher, chunked": (
        "dinov2",
        _below("backbone.", _chunked(_dinov2(4))) | _below("dino_head.", _HEAD) | _below("ibot_head.", _HEAD),
    ),
    "timm, class token": ("timm", _timm(rows=1 + N)),
    "timm, registers without positions": ("timm", _timm(registers=3, head=False)),
    "timm, registers with positions": ("timm", _timm(registers=2, rows=3 + N)),
    "timm, average, fc_norm": ("timm", _timm(cls=False, registers=4, final=("fc_norm",))),
    "timm, average, positions on registers": (
        "timm",
        _timm(cls=False, registers=1, rows=1 + N, gains=None, qkv_bias=False),
    ),
    "timm, attention pooling": ("timm", _timm(cls=False, registers=4) | _attn_pool()),
    "timm, SwiGLU": ("timm", _timm(registers=3, swiglu=True)),
    "timm, CLIP's": ("timm", _timm(rows=1 + N, patch_bias=False, gains=None) | _norm("norm_pre")),
    "Hugging Face": ("huggingface", _huggingface()),
    "Hugging Face, no mask token": ("huggingface", _huggingface(mask=False)),
    "Hugging Face, registers": ("huggingface", _huggingface(4)),
    "Hugging Face, SwiGLU": ("huggingface", _huggingface(4, swiglu=True)),
    "Hugging Face, live": ("huggingface", _huggingface(4, live=True)),
    "Hugging Face, live, SwiGLU": ("huggingface", _huggingface(4, swiglu=True, live=True)),
    "Hugging Face, classifier": ("huggingface", _huggingface(wrapper="dinov2")),
    "Hugging Face, classifier, registers": ("huggingface", _huggingface(4, wrapper="dinov2_with_registers")),
    "deit3": ("deit3", _deit3()),
    "deit3, registers": ("deit3", _deit3(4)),
    "dino": ("dino", _dino()),
    "dino, full checkpoint": ("dino", _below("module.backbone.", _dino()) | _below("module.head.", _HEAD)),
}


def _theirs(name, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    family, shapes = SHAPES[name]
    gain = ("norm1.weight", "norm2.weight", "norm.weight", "layernorm.weight")
    return family, {
        key: (float(key.endswith(gain)) + 0.3 * rng.normal(size=shape)).astype(dtype) for key, shape in shapes.items()
    }


@pytest.fixture(scope="session", params=list(SHAPES))
def variant(request):
    """Every name that `theirs` takes, one after the other."""
    return request.param


@pytest.fixture(scope="session")
def theirs():
    """theirs(name, dtype=float32, seed=0) -> (family, state dict); width 16, 2 heads, a native grid of 3 x 3."""
    return _theirs


@pytest.fixture(scope="session")
def same():
    """same(got, want): equal keys in equal order, dtypes, shapes and bits, contiguous."""

    def check(got, want, ordered=True):
        assert list(got) == list(want) if ordered else set(got) == set(want)
        for key in want:
            assert (got[key].dtype, got[key].shape) == (want[key].dtype, want[key].shape), key
            assert got[key].tobytes() == want[key].tobytes(), key
            assert got[key].flags.c_contiguous, key

    return check
