"""Strict reading: what the golden files of one network give across families, and every complaint in full."""

import dataclasses
import pathlib

import numpy as np
import pytest

import regvit_jax as rv
from regvit_jax.convert import FAMILIES, family_of, files, graft
from regvit_jax.convert.detect import detect
from regvit_jax.convert.shapes import readings

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key[3:]: file[key] for key in file if key.startswith("sd/")}


@pytest.mark.parametrize(
    ("source", "family", "target"),
    [
        ("dinov2_mlp_reg4", "huggingface", "hf_dinov2_with_registers_mlp"),
        ("hf_dinov2_with_registers_mlp", "dinov2", "dinov2_mlp_reg4"),
        ("dinov2_mlp_reg4", "timm", "timm_vit_reg4_cls_mlp"),
        ("hf_dinov2_with_registers_swiglu", "timm", "timm_vit_reg4_cls_swiglu"),
    ],
)
def test_one_network_is_written_as_the_other_libraries_wrote_it(source, family, target, same):
    model = rv.from_torch(golden(source), num_heads=4)
    same(rv.to_torch(model, family), golden(target), ordered=False)


def test_chunked_names_and_prefixes_are_those_of_the_plain_network(theirs):
    _, chunked = theirs("dinov2, teacher, chunked")
    assert "backbone.blocks.1.1.norm1.weight" in chunked
    read = rv.from_torch(chunked, num_heads=2)
    plain = rv.to_torch(dataclasses.replace(read, origin=None), "dinov2")
    np.testing.assert_array_equal(plain["blocks.1.norm1.weight"], chunked["backbone.blocks.1.1.norm1.weight"])
    assert len(plain) == sum(key.startswith("backbone.") for key in chunked) == len(read.origin.keys)


def test_new_registers_of_prefixed_weights_get_the_prefix(theirs):
    _, state = theirs("dinov2")
    model = rv.from_torch({f"module.backbone.{key}": array for key, array in state.items()}, num_heads=2)
    written = rv.to_torch(graft.add_registers(model, 2)[0])
    assert written.keys() - {f"module.backbone.{key}" for key in state} == {"module.backbone.register_tokens"}


class TestStrictness:
    def test_a_foreign_key_is_named_with_the_nearest(self, theirs):
        _, state = theirs("dinov2")
        state["norm.weigth"] = state.pop("norm.weight")
        with pytest.raises(ValueError, match=r"1 keys are not part.*norm\.weigth \(nearest: norm\.weight\)"):
            rv.from_torch(state, "dinov2", num_heads=2)

    @pytest.mark.parametrize(
        ("key", "message"),
        [
            ("blocks.0.attn.lambda_q1", "differential attention"),
            ("blocks.1.attn.q_norm.weight", "normalised queries"),
            ("blocks.1.attn.q_bias", "Eva class"),
            ("embeds.proj.weight", "NaFlexVit"),
            ("dist_token", "distillation token"),
        ],
    )
    def test_relatives_of_timms_class_are_refused_by_name(self, key, message, theirs):
        _, state = theirs("timm, class token")
        with pytest.raises(ValueError, match=f"{message}.*only timm's VisionTransformer class is read"):
            rv.from_torch(state | {key: np.zeros(16)}, "timm", num_heads=2)
        with pytest.raises(ValueError, match=message):
            rv.from_torch(state | {key: np.zeros(16)}, num_heads=2)

    def test_integers_are_no_weights(self, theirs):
        _, state = theirs("dinov2")
        state["norm.bias"] = state["norm.bias"].astype(np.int32)
        with pytest.raises(ValueError, match="norm.bias is int32; weights are float32"):
            rv.from_torch(state, "dinov2", num_heads=2)

    def test_a_block_of_another_shape_is_named(self, theirs):
        _, state = theirs("dinov2")
        state["blocks.1.norm1.bias"] = state["blocks.1.norm1.bias"][:-1]
        with pytest.raises(ValueError, match=r"blocks/norm1/bias cannot be made.*block 1 has shape \(15,\)"):
            rv.from_torch(state, "dinov2", num_heads=2)

    def test_two_names_of_one_parameter_are_named(self, theirs):
        _, state = theirs("dinov2")
        with pytest.raises(ValueError, match=r"'module\.norm\.bias'.*both mean 'norm\.bias'"):
            rv.from_torch(state | {"module.norm.bias": state["norm.bias"]}, "dinov2", num_heads=2)

    def test_doubles_are_rounded_and_it_is_noted(self, theirs):
        family, state = theirs("dinov2", np.float64)
        model = rv.from_torch(state, family, num_heads=2)
        assert model.origin.notes == ("float64 arrays were rounded to float32",)

    def test_an_unknown_family_lists_the_known(self, theirs):
        with pytest.raises(ValueError, match=", ".join(FAMILIES)):
            rv.from_torch(theirs("dinov2")[1], "dinov4")


class TestDetection:
    def test_every_family_is_found_or_asked_for(self, variant, theirs):
        family, state = theirs(variant)
        # With neither LayerScale nor head nor registers, DINO's names are timm's too; the head of a full one tells it.
        if variant == "dino":
            with pytest.raises(
                ValueError, match=r"several families \(timm, dino\): pass family=.*timm: positions.*dino: "
            ):
                detect(state)
            return
        found, why = detect(state, given=("num_heads",))
        assert found == family
        assert f"all {len(state)} keys" in why and all(f"not {other}: " in why for other in FAMILIES if other != family)

    def test_hugging_face_without_config_asks(self, theirs):
        _, state = theirs("Hugging Face, registers")
        with pytest.raises(ValueError, match="without config.json nothing tells.*family='huggingface'.*num_heads="):
            detect(state)

    def test_config_json_decides(self, theirs):
        _, state = theirs("dino")
        assert detect(state, {"config.json": {"architecture": "vit_small_patch16_224"}})[0] == "timm"
        assert detect(state, {"config.json": {"model_type": "dinov2"}})[0] == "huggingface"
        with pytest.raises(ValueError, match="model_type 'dinov3_vit'; known: dinov2"):
            detect(state, {"config.json": {"model_type": "dinov3_vit"}})
        with pytest.raises(ValueError, match="neither model_type"):
            detect(state, {"config.json": {}})

    def test_positions_tell_where_names_do_not(self, theirs):
        """DeiT-III's names with a row for the class token are nobody's."""
        _, state = theirs("deit3")
        state["pos_embed"] = np.zeros((1, 10, 16))
        with pytest.raises(ValueError, match="deit3: its position rows are for patches, which 10 rows are not"):
            detect(state)

    def test_a_head_alone_is_no_network(self):
        with pytest.raises(ValueError, match="head without its network.*head=file"):
            detect({"weight": np.zeros((10, 32)), "bias": np.zeros(10)})


def test_position_rows_have_one_reading_or_it_is_asked_for(theirs):
    timm = family_of("timm").holds.position
    assert readings(25, True, 4, timm) == [("patches", (5, 5))]
    assert readings(30, True, 4, timm) == [("all", (5, 5))]
    assert readings(26, True, 0, timm) == [("cls", (5, 5))]
    assert readings(25, False, 0, timm) == [("patches", (5, 5))]
    assert readings(9, True, 4, timm) == [("patches", (3, 3)), ("all", (2, 2))]
    assert readings(9, True, 4, timm, (2, 2)) == [("all", (2, 2))]
    assert readings(13, True, 0, timm, (3, 4)) == [("cls", (3, 4))]
    _, state = theirs("timm, registers without positions")
    state["reg_token"] = np.zeros((1, 4, 16))
    with pytest.raises(ValueError, match="9 position rows can mean patches with a grid of 3 x 3 or all.*image_size="):
        rv.from_torch(state, "timm", num_heads=2)
    assert rv.from_torch(state, "timm", num_heads=2, image_size=12).config.position == "patches"


def test_a_native_grid_that_is_no_square_is_given(theirs, tmp_path):
    _, state = theirs("timm, class token")
    state["pos_embed"] = np.zeros((1, 7, 16), np.float32)
    with pytest.raises(ValueError, match=r"image_size=\(height, width\)"):
        rv.from_torch(state, "timm", num_heads=2)
    model = rv.from_torch(state, "timm", num_heads=2, image_size=(8, 12))
    assert (model.config.grid, model.config.position) == ((2, 3), "cls")
    files.write(tmp_path / "a.npz", state)
    loaded = rv.load_model(tmp_path / "a.npz", num_heads=2, image_size=(8, 12))
    assert loaded.config == model.config and loaded.origin.notes == ()
