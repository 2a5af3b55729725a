"""Theirs -> ours -> theirs and back, for every family, to the last bit; what is not expressible computes the same."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import regvit_jax as rv
from regvit_jax.convert import FAMILIES, family_of, files
from regvit_jax.data.transforms import Preprocess
from regvit_jax.models.config import ViTConfig
from regvit_jax.models.model import Model, abstract_params
from regvit_jax.trees import map_named, named

HEAD = ("dino_head", "ibot_head", "module.head")
LOOK = Preprocess(size=12, crop_ratio=0.9, interpolation="bilinear", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
BASE = ViTConfig(
    width=16, depth=2, num_heads=2, mlp_dim=64, patch_size=4, image_size=(12, 12), layerscale=0.1, drop_path=0.3
)
# Everything of ours that some family has no place for.
OURS = {
    "DINOv2's": {"registers": 2, "mask_token": True, "resampler": "bicubic_offset"},
    "DeiT-III's": {"position": "patches", "num_classes": 5, "token_init_std": 0.02, "drop_path_uniform": True},
    "positions on registers": {"registers": 2, "position": "all", "num_classes": 5, "pool": "avg"},
    "no LayerScale, no biases": {"layerscale": None, "qkv_bias": False, "patch_bias": False},
    "no positions": {"position": "none", "registers": 1},
    "two-part head": {"pool": "token_avg", "num_classes": 5, "registers": 1},
    "SwiGLU": {"activation": "swiglu", "mlp_dim": 48, "registers": 1},
    "another resampler": {"resampler": "bicubic", "registers": 1, "mask_token": True},
}


def ours(name, **changes):
    rng = np.random.default_rng(7)
    config = dataclasses.replace(BASE, **(OURS[name] | changes))

    def draw(path, leaf):
        return jnp.asarray(float(path.endswith("scale")) + 0.3 * rng.normal(size=leaf.shape), jnp.float32)

    return Model(map_named(draw, abstract_params(config)), config, preprocessing=LOOK)


def exact(got, want):
    assert (got.config, got.preprocessing) == (want.config, want.preprocessing)
    a, b = named(got.params), named(want.params)
    assert a.keys() == b.keys()
    for name in b:
        x, y = np.asarray(a[name]), np.asarray(b[name])
        assert (x.dtype, x.tobytes()) == (y.dtype, y.tobytes()), name


def kept(state):
    return {key: array for key, array in state.items() if not key.startswith(HEAD)}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_in_memory_every_key_comes_back_as_it_was(variant, dtype, theirs, same):
    family, state = theirs(variant, dtype)
    model = rv.from_torch(state, family, num_heads=2)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(model.params))
    assert set(model.origin.dropped) == {key for key in state if key.startswith(HEAD)}
    same(rv.to_torch(model), kept(state))


def test_without_its_record_a_model_is_written_under_the_plain_names(variant, theirs, same):
    family, state = theirs(variant)
    model = dataclasses.replace(rv.from_torch(state, family, num_heads=2), origin=None)
    written = rv.to_torch(model, family)
    again = rv.to_torch(rv.from_torch(written, family, num_heads=2), family)
    same(again, written)
    if not any(word in variant for word in ("teacher", "full", "live", "no mask")):
        same(written, state, ordered=False)


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "npz"])
@pytest.mark.parametrize(
    "name",
    ["dinov2, teacher, chunked", "Hugging Face, classifier, registers", "timm, average, fc_norm", "deit3", "dino"],
)
def test_through_files_and_our_own_folder_every_key_comes_back(name, suffix, theirs, same, tmp_path):
    family, state = theirs(name, np.float16)
    files.write(tmp_path / f"a.{suffix}", state)
    model = rv.load_model(tmp_path / f"a.{suffix}", family=family, num_heads=2)
    assert model.origin.source["sha256"] == files.sha256_of(tmp_path / f"a.{suffix}")
    rv.save_model(model, tmp_path / "ours")
    again = rv.load_model(tmp_path / "ours")
    exact(again, model)
    rv.save_model(again, tmp_path / f"b.{suffix}", format=family)
    same(files.read(tmp_path / f"b.{suffix}").state, kept(state), ordered=suffix != "safetensors")
    exact(rv.load_model(tmp_path / f"b.{suffix}"), model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", OURS)
def test_ours_comes_back_through_their_files(name, family, tmp_path):
    changes = {"dino": {"registers": 0, "layerscale": None, "position": "cls"}, "deit3": {"qkv_bias": True}}
    model = ours(name, **(changes[family] if family in changes else {}))
    if name == "SwiGLU" and family in ("deit3", "dino"):
        with pytest.raises(ValueError, match="activation swiglu"):
            rv.save_model(model, tmp_path / "out", format=family)
        assert not (tmp_path / "out").exists()
        return
    rv.save_model(model, tmp_path / "out", format=family)
    exact(rv.load_model(tmp_path / "out"), model)


def test_half_precision_weights_of_ours_come_back(tmp_path):
    model = ours("DINOv2's").astype("bfloat16")
    rv.save_model(model, tmp_path, format="timm")
    exact(rv.load_model(tmp_path, dtype="bfloat16"), model)


IMAGES = np.random.default_rng(0).normal(size=(1, 12, 12, 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "family", "first"),
    [
        ("DINOv2's", "timm", "patches"),
        ("positions on registers", "dinov2", "cls"),
        ("positions on registers", "deit3", "patches"),
        ("DeiT-III's", "huggingface", "cls"),
        ("no positions", "dinov2", "cls"),
        ("no positions", "deit3", "patches"),
    ],
)
def test_without_a_sidecar_the_same_enters_the_first_block(name, family, first):
    model = ours(name)
    read = rv.from_torch(rv.to_torch(model, family), family, num_heads=2)
    assert read.config.position == first != model.config.position
    got, want = (m.module().embed(jnp.asarray(IMAGES), (3, 3)) for m in (read, model))
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_without_a_sidecar_tokens_and_logits_are_the_same():
    """Positions folded, LayerScale and biases added, the head widened: all at once."""
    model = ours("DeiT-III's", layerscale=None, patch_bias=False)
    read = rv.from_torch(rv.to_torch(model, "huggingface"), "huggingface", num_heads=2)
    assert (read.config.pool, read.config.layerscale, read.config.patch_bias) == ("token_avg", 1.0, True)
    with jax.default_matmul_precision("highest"):
        for got, want in zip(jax.tree.leaves(read(IMAGES)), jax.tree.leaves(model(IMAGES)), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5)
        np.testing.assert_allclose(read.logits(IMAGES), model.logits(IMAGES), atol=1e-5)


def test_a_bias_that_is_added_is_zero():
    state = rv.to_torch(ours("no LayerScale, no biases"), "huggingface")
    assert not state["embeddings.patch_embeddings.projection.bias"].any()
    assert (state["encoder.layer.1.layer_scale2.lambda1"] == 1).all()
    assert not any(key.endswith("query.bias") for key in state)  # Hugging Face can do without.


def test_every_refusal_is_said_at_once():
    model = ours("SwiGLU", norm_eps=1e-5, image_size=(8, 12))
    with pytest.raises(ValueError) as error:
        rv.to_torch(model, "deit3")
    for part in ("deit3 cannot hold", "activation swiglu", "2 x 3", "norm epsilon 1e-05, not 1e-06", "format='regvit'"):
        assert part in str(error.value)


def test_changed_weights_are_not_rounded_to_their_old_format(theirs):
    family, state = theirs("dinov2", ml_dtypes.bfloat16)
    model = rv.from_torch(state, family, num_heads=2)
    finer = dict(model.params) | {"cls_token": model.params["cls_token"] + 1e-6}
    written = rv.to_torch(dataclasses.replace(model, params=finer))
    assert written["cls_token"].dtype == np.float32
    np.testing.assert_array_equal(written["cls_token"], finer["cls_token"])
    assert written["pos_embed"].dtype == ml_dtypes.bfloat16


def test_a_model_of_ours_has_no_family_to_go_back_to(theirs):
    with pytest.raises(ValueError, match="pass family="):
        rv.to_torch(ours("DINOv2's"))
    family, state = theirs("dinov2")
    through_a_map = jax.tree.map(lambda leaf: leaf, rv.from_torch(state, family, num_heads=2))
    assert through_a_map.origin is None


def test_every_form_is_undone():
    """The convolution and the fused projection, element by element."""
    rows = {row.target: row for row in family_of("dinov2").rows}
    from regvit_jax.convert.rows import FORMS

    form = FORMS[rows["patch_embed/kernel"].form]
    weight = np.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
    kernel = form.ours(weight)
    assert kernel[(1 * 4 + 2) * 3 + 0, 1] == weight[1, 0, 1, 2]
    np.testing.assert_array_equal(form.theirs(kernel)[0], weight)
    form = FORMS[rows["blocks/attn/qkv/kernel"].form]
    weight = np.arange(3 * 5 * 5).reshape(15, 5)
    kernel = form.ours(weight)
    assert kernel[4, 1, 2] == weight[5 + 2, 4]
    np.testing.assert_array_equal(form.theirs(kernel)[0], weight)
