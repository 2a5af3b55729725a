"""Models in and out: our own folder is exact, a workdir gives what its recipe chose, what does not fit is named."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import regvit_jax as rv
from regvit_jax import hub
from regvit_jax.checkpoint import Checkpoints
from regvit_jax.data.transforms import Preprocess
from regvit_jax.models.config import ViTConfig
from regvit_jax.models.model import Model, abstract_params
from regvit_jax.trees import map_named, named

VIT = ViTConfig(
    width=16,
    depth=2,
    num_heads=2,
    mlp_dim=32,
    patch_size=8,
    image_size=(16, 24),
    registers=3,
    num_classes=5,
    layerscale=0.1,
)
LOOK = Preprocess(size=16, crop_ratio=0.9, interpolation="bilinear", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


def filled(seed=0):
    """Random parameters, without compiling an initialisation."""
    rng = np.random.default_rng(seed)
    return map_named(lambda path, leaf: rng.normal(size=leaf.shape).astype(np.float32), abstract_params(VIT))


@pytest.fixture
def model():
    return Model(filled(), VIT, preprocessing=LOOK)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)  # Compares config, execution and preprocessing too.
    for path, leaf in named(got.params).items():
        expected = named(want.params)[path]
        assert leaf.dtype == expected.dtype and np.asarray(leaf).tobytes() == np.asarray(expected).tobytes(), path


def test_saving_and_loading_is_bitwise_with_everything_that_belongs_to_a_model(model, tmp_path):
    rv.save_model(model, tmp_path / "saved")
    loaded = rv.load_model(tmp_path / "saved")
    assert_same(loaded, model)
    images = np.random.default_rng(0).normal(size=(1, 16, 24, 3)).astype(np.float32)
    assert (loaded.logits(images) == model.logits(images)).all()
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {"model.json", "params.safetensors"}


def test_saving_again_replaces(model, tmp_path):
    rv.save_model(model, tmp_path)
    other = dataclasses.replace(model, params=filled(1))
    rv.save_model(other, tmp_path)
    assert_same(rv.load_model(tmp_path), other)


def test_bfloat16_weights_stay_bfloat16(model, tmp_path):
    half = model.astype("bfloat16")
    rv.save_model(half, tmp_path)
    assert_same(rv.load_model(tmp_path, dtype="bfloat16"), half)


def test_image_size_makes_another_size_native(model, tmp_path):
    rv.save_model(model, tmp_path)
    loaded = rv.load_model(tmp_path, image_size=32)
    assert loaded.config == dataclasses.replace(VIT, image_size=(32, 32))
    assert (loaded.preprocessing.size, loaded.preprocessing.crop_ratio) == (32, 0.9)
    # 3 and 2 patches became 4 and 4; the row of the class token is what it was.
    assert loaded.params["pos_embed"].shape == (1, 1 + 16, 16)
    np.testing.assert_array_equal(loaded.params["pos_embed"][:, 0], model.params["pos_embed"][:, 0])
    with pytest.raises(ValueError, match="20 is not a multiple of the patch size 8.*16 and 24"):
        rv.load_model(tmp_path, image_size=20)


def test_our_folder_takes_no_advice_on_what_it_is(model, tmp_path):
    rv.save_model(model, tmp_path)
    with pytest.raises(ValueError, match="says itself what it is: leave out family, num_heads"):
        rv.load_model(tmp_path, family="timm", num_heads=4)


def test_a_name_of_nothing_is_told_with_the_nearest():
    with pytest.raises(FileNotFoundError, match="dinov2_vits14_reg does not exist.*nearest: dinov2_vits14_reg4"):
        rv.load_model("dinov2_vits14_reg")
    with pytest.raises(ValueError, match="classifier without its network.*head='dinov2_vits14_linear'"):
        rv.load_model("dinov2_vits14_linear")


def test_a_folder_without_a_model_is_told(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="holds no model: expected model.json and params.safetensors.*checkpoints/"
    ):
        rv.load_model(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        rv.load_model(tmp_path)


def test_what_does_not_fit_is_named(model, tmp_path):
    rv.save_model(model, tmp_path)
    weights = load_file(tmp_path / "params.safetensors")
    del weights["norm/bias"]
    weights["extra"], weights["cls_token"] = np.zeros(1), np.zeros((1, 2))
    save_file(weights, tmp_path / "params.safetensors")
    with pytest.raises(ValueError) as error:
        rv.load_model(tmp_path)
    for part in (
        "norm/bias: expected (16,), found nothing",
        "extra: expected nothing, found (1,)",
        "cls_token: expected",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": 99}, "has format 99; this version reads 1"),
        ({"config": VIT.to_json() | {"moe": 8}}, r"unknown ViT config fields \['moe'\]"),
    ],
)
def test_a_description_of_another_version_is_refused(model, tmp_path, change, message):
    rv.save_model(model, tmp_path)
    description = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(description | change))
    with pytest.raises(ValueError, match=message):
        rv.load_model(tmp_path)


def test_an_unknown_format_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="'pth' cannot be written; known: 'regvit'"):
        rv.save_model(model, tmp_path, format="pth")


@pytest.mark.parametrize(
    "item, select, where",
    [
        ("params", lambda tree: tree, ("params", "")),
        ("extras", lambda tree: tree["ema"], ("extras", "ema/")),
        ("params", lambda tree: tree["student"]["backbone"], ("params", "student/backbone/")),
    ],
)
def test_a_workdir_gives_the_part_of_the_state_that_was_located(model, tmp_path, item, select, where):
    """`locate` gets trees of names, as training does; a checkpoint with that description is read back."""
    nest = {
        "": lambda t: t,
        "ema/": lambda t: {"ema": t, "centre": np.ones(3)},
        "student/backbone/": lambda t: {"student": {"backbone": t}},
    }
    whole = nest[where[1]](model.params)
    names = map_named(lambda path, _: f"{item}/{path}", whole)
    description = hub.locate(dataclasses.replace(model, params=select(names)))
    assert (description["item"], description["prefix"]) == where
    json.dumps(description)
    state = {"step": np.int32(4), "params": {}, "opt": {}, "extras": {}} | {item: jax.tree.map(jnp.asarray, whole)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, state, data={}, meta={"model": description}, wait=True)
    assert_same(rv.load_model(tmp_path), model)


def test_a_model_gathered_from_several_places_cannot_be_located(model):
    names = map_named(lambda path, _: f"params/{path}", model.params)
    names["norm"] = {"scale": "extras/norm/scale", "bias": "extras/norm/bias"}
    with pytest.raises(ValueError, match="must select one sub-tree of the state.*extras/.*params/"):
        hub.locate(dataclasses.replace(model, params=names))
