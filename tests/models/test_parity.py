"""Our forward pass against the original PyTorch implementations, through the `Model` call that training and evaluation
use."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import regvit_jax as rv
from regvit_jax.convert import FAMILIES
from regvit_jax.trees import named

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
SIZES = ("70x70", "98x126", "42x56")
# file, family, prefix of its outputs, what its keys cannot tell
CASES = [
    ("dinov2_mlp_reg4", "dinov2", "out/off0.0_aa1/", {"resampler": "antialias"}),
    ("dinov2_mlp_reg4", "dinov2", "out/off0.1_aa0/", {"resampler": "bicubic_offset"}),
    ("dinov2_mlp_reg0", "dinov2", "out/off0.0_aa1/", {"resampler": "antialias"}),
    ("dinov2_mlp_reg0", "dinov2", "out/off0.1_aa0/", {}),
    ("hf_dinov2_with_registers_mlp", "huggingface", "out/", {}),
    ("hf_dinov2_with_registers_swiglu", "huggingface", "out/", {}),
    ("timm_vit_reg4_cls_mlp", "timm", "out/", {}),
    ("timm_vit_reg4_cls_swiglu", "timm", "out/", {}),
]


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def inputs():
    with np.load(GOLDEN / "inputs.npz") as f:
        return {size: f[size].transpose(0, 2, 3, 1) for size in SIZES}


def load(name):
    with np.load(GOLDEN / f"{name}.npz") as f:
        arrays = dict(f)
    return {k[3:]: v for k, v in arrays.items() if k.startswith("sd/")}, arrays


def sequence(tokens):
    """[cls, registers, patches] as the references return them."""
    return jnp.concatenate([tokens.cls[:, None], tokens.registers, tokens.patches], axis=1)


def close(actual, expected, atol):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=atol)


@pytest.mark.parametrize(("file", "family", "prefix", "config"), CASES)
def test_tokens_equal_the_reference_after_every_block_and_the_norm(file, family, prefix, config, inputs):
    state, golden = load(file)
    model = rv.from_torch(state, family, num_heads=4, **config)
    for size in SIZES:
        # Without captures all blocks run in one scan; with them the scan is cut, and must not change a number.
        close(sequence(model(inputs[size])), golden[f"{prefix}{size}/norm"], 2e-5)
        tokens, found = model(inputs[size], capture=("embed", "block0", "block1", "block2"))
        for name, value in found.items():
            close(value, golden[f"{prefix}{size}/{name}"], 5e-5)
        close(sequence(tokens), golden[f"{prefix}{size}/norm"], 2e-5)


@pytest.mark.parametrize(("file", "family", "prefix", "config"), CASES[::3])
def test_intermediate_returns_the_blocks_in_the_order_asked_for(file, family, prefix, config, inputs):
    state, golden = load(file)
    model = rv.from_torch(state, family, num_heads=4, **config)
    second, first = rv.intermediate(model, inputs["98x126"], blocks=(-2, 0))
    close(sequence(second), golden[f"{prefix}98x126/block1"], 5e-5)
    close(sequence(first), golden[f"{prefix}98x126/block0"], 5e-5)
    assert first.grid == (7, 9)
    (last,) = rv.intermediate(model, inputs["98x126"], blocks=(2,), norm=True)
    close(sequence(last), golden[f"{prefix}98x126/norm"], 2e-5)


@pytest.mark.parametrize(
    ("file", "family", "prefix"),
    [
        ("dinov2_mlp_reg4", "dinov2", "out_masked/off0.0_aa1/"),
        ("hf_dinov2_with_registers_mlp", "huggingface", "out_masked/"),
        ("hf_dinov2_with_registers_swiglu", "huggingface", "out_masked/"),
    ],
)
def test_masked_patches_equal_the_reference(file, family, prefix, inputs):
    state, golden = load(file)
    model = rv.from_torch(state, family, num_heads=4)
    tokens, found = model(inputs["98x126"], patch_mask=golden["mask/98x126"], capture=("embed",))
    close(found["embed"], golden[f"{prefix}98x126/embed"], 2e-5)
    close(sequence(tokens), golden[f"{prefix}98x126/norm"], 2e-5)


def test_attention_rows_equal_the_reference(inputs):
    state, golden = load("hf_dinov2_with_registers_mlp")
    model = rv.from_torch(state, "huggingface", num_heads=4)
    names = ("block0/attn", "block2/attn[cls,registers]")
    tokens, found = model(inputs["70x70"], capture=names)
    close(sequence(tokens), golden["out/70x70/norm"], 2e-5)
    close(found[names[0]], golden["attn/70x70/block0"], 5e-6)
    close(found[names[1]], golden["attn/70x70/block2"][:, :, :5], 5e-6)


def test_deit3_tokens_and_logits_equal_the_reference(inputs):
    state, golden = load("deit3_mlp")
    model = rv.from_torch(state, "deit3", num_heads=4)
    tokens, found = model(inputs["70x70"], capture=("embed", "block0", "block1", "block2"))
    for name, value in found.items():
        close(value, golden[f"out/70x70/{name}"], 5e-5)
    close(sequence(tokens), golden["out/70x70/norm"], 2e-5)
    close(model.logits(inputs["70x70"]), golden["out/70x70/logits"], 2e-5)


def test_one_network_under_three_names_is_one_tree():
    """The golden files hold the same network as DINOv2 and as Hugging Face; timm folds the class token's position
    away."""
    dinov2 = named(rv.from_torch(load("dinov2_mlp_reg4")[0], num_heads=4).params)
    hugging = named(rv.from_torch(load("hf_dinov2_with_registers_mlp")[0], num_heads=4).params)
    assert dinov2.keys() == hugging.keys()
    assert all((dinov2[name] == hugging[name]).all() for name in dinov2)
    timm = named(rv.from_torch(load("timm_vit_reg4_cls_mlp")[0], num_heads=4).params)
    np.testing.assert_array_equal(timm["cls_token"], dinov2["cls_token"] + dinov2["pos_embed"][:, :1])
    np.testing.assert_array_equal(timm["pos_embed"], dinov2["pos_embed"][:, 1:])
    assert all((timm[n] == dinov2[n]).all() for n in timm.keys() - {"cls_token", "pos_embed"})


def test_chunked_block_names_are_read():
    state, _ = load("dinov2_mlp_reg4")
    chunked = {re.sub(r"^blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}", k): v for k, v in state.items()}
    assert "blocks.1.2.norm1.weight" in chunked
    plain, read = (named(rv.from_torch(s, "dinov2", num_heads=4).params) for s in (state, chunked))
    assert all((plain[name] == read[name]).all() for name in plain)


class TestStrictness:
    def test_a_key_too_many_is_named(self):
        state = load("dinov2_mlp_reg4")[0] | {"blocks.0.attn.rel_pos": np.zeros(3)}
        with pytest.raises(ValueError, match=r"blocks\.0\.attn\.rel_pos"):
            rv.from_torch(state, "dinov2", num_heads=4)

    def test_a_key_too_few_is_named_with_the_nearest(self):
        state = load("dinov2_mlp_reg4")[0]
        state["norm.weigth"] = state.pop("norm.weight")
        with pytest.raises(ValueError, match=r"norm\.weigth"):
            rv.from_torch(state, "dinov2", num_heads=4)
        del state["norm.weigth"]
        with pytest.raises(ValueError, match=r"norm"):
            rv.from_torch(state, "dinov2", num_heads=4)

    def test_one_block_missing_is_named(self):
        state = load("dinov2_mlp_reg4")[0]
        del state["blocks.1.mlp.fc2.bias"]
        with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.fc2\.bias"):
            rv.from_torch(state, "dinov2", num_heads=4)

    def test_a_wrong_shape_is_named(self):
        state = load("dinov2_mlp_reg4")[0]
        state["norm.bias"] = state["norm.bias"][:-1]
        with pytest.raises(ValueError, match=r"norm/bias is \(63,\), expected \(64,\)"):
            rv.from_torch(state, "dinov2", num_heads=4)

    def test_an_unusual_width_asks_for_the_head_count(self):
        with pytest.raises(ValueError, match="num_heads="):
            rv.from_torch(load("dinov2_mlp_reg4")[0], "dinov2")

    def test_keys_of_two_families_list_the_candidates(self):
        state = load("dinov2_mlp_reg0")[0]
        del state["mask_token"]
        with pytest.raises(ValueError, match="dinov2, timm"):
            rv.from_torch(state, num_heads=4)

    def test_keys_of_no_family_list_the_families(self):
        with pytest.raises(ValueError, match=", ".join(FAMILIES)):
            rv.from_torch({"conv1.weight": np.zeros((64, 3, 7, 7))})
