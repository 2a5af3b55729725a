"""Meta's linear heads: counted by hand, joined to a network, written back as they were."""

import json

import jax
import numpy as np
import pytest

import regvit_jax as rv
from regvit_jax.convert import files, heads

D = 16
RNG = np.random.default_rng(5)


def linear(blocks):
    return {
        "weight": RNG.normal(size=(5, (1 + blocks) * D)).astype(np.float32),
        "bias": RNG.normal(size=5).astype(np.float32),
    }


SEGMENTATION = {
    "decode_head.conv_seg.weight": RNG.normal(size=(7, D, 1, 1)).astype(np.float32),
    "decode_head.conv_seg.bias": RNG.normal(size=7).astype(np.float32),
    **{
        f"decode_head.bn.{name}": RNG.normal(size=D).astype(np.float32)
        for name in ("weight", "bias", "running_mean", "running_var")
    },
    "decode_head.bn.num_batches_tracked": np.array(40000),
}
DEPTH = {
    "decode_head.conv_depth.weight": RNG.normal(size=(256, 2 * D, 1, 1)).astype(np.float32),
    "decode_head.conv_depth.bias": RNG.normal(size=256).astype(np.float32),
}


@pytest.fixture
def backbone(theirs, tmp_path):
    files.write(tmp_path / "backbone.pth", theirs("dinov2, 4 registers")[1])
    return tmp_path / "backbone.pth"


@pytest.mark.parametrize(
    "state", [linear(1), linear(4), DEPTH, SEGMENTATION], ids=["1 block", "4 blocks", "depth", "classes"]
)
def test_a_head_is_written_back_as_it_was(state, same, tmp_path):
    files.write(tmp_path / "head.pth", state)
    same(heads.read(files.read(tmp_path / "head.pth").state).to_torch(), state, ordered=False)


def test_a_batch_count_may_be_missing():
    state = {key: array for key, array in SEGMENTATION.items() if "num_batches" not in key}
    assert heads.read(state).to_torch().keys() == state.keys()


def test_a_one_layer_classifier_becomes_the_models_head(backbone, tmp_path):
    state = linear(1)
    files.write(tmp_path / "head.pth", state)
    model = rv.load_model(backbone, num_heads=2, head=tmp_path / "head.pth")
    assert (model.config.pool, model.config.num_classes) == ("token_avg", 5)
    assert "head.pth was attached" in model.origin.notes[0]
    images = RNG.normal(size=(2, 12, 8, 3)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        tokens = model(images)
        features = np.concatenate([tokens.cls, np.asarray(tokens.patches).mean(axis=1)], axis=1)
        np.testing.assert_allclose(model.logits(images), features @ state["weight"].T + state["bias"], atol=1e-4)
    assert all((array == state[key]).all() for key, array in heads.detach(model).to_torch().items())
    rv.save_model(model, tmp_path / "out", format="huggingface")
    written = files.read(tmp_path / "out").state
    np.testing.assert_array_equal(written["classifier.weight"], state["weight"])
    assert "dinov2_with_registers.layernorm.weight" in written
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["architectures"] == ["Dinov2WithRegistersForImageClassification"] and len(said["id2label"]) == 5


def test_a_four_layer_classifier_sees_four_class_tokens_and_the_last_patches(theirs):
    family, state = theirs("dinov2")
    for key in list(state):  # Four blocks of it: the same two twice.
        if key.startswith("blocks."):
            _, i, rest = key.split(".", 2)
            state[f"blocks.{int(i) + 2}.{rest}"] = state[key]
    model = rv.from_torch(state, family, num_heads=2)
    head = heads.read(linear(4))
    images = RNG.normal(size=(1, 12, 12, 3)).astype(np.float32)
    levels = rv.intermediate(model, images, (-4, -3, -2, -1), norm=True)
    features = np.concatenate([np.asarray(t.cls) for t in levels] + [np.asarray(levels[3].patches).mean(1)], axis=1)
    np.testing.assert_allclose(head.logits(model, images), features @ head.weight.T + head.bias, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="looks at 4 blocks and cannot be part of a model"):
        heads.attach(model, head)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": np.zeros((5, 32))}, "no head of DINOv2 has these keys"),
        (linear(1) | {"scale": np.zeros(1)}, "no head of DINOv2"),
        (linear(1) | {"bias": np.zeros(4, np.float32)}, "does not fit together"),
        (DEPTH | {"decode_head.conv_depth.weight": np.zeros((256, 32, 3, 3))}, "does not fit together"),
        (SEGMENTATION | {"decode_head.bn.running_mean": np.zeros(3)}, "does not fit together"),
        ({"decode_head.project.conv.weight": np.zeros(3)}, "no head of DINOv2"),
    ],
)
def test_another_head_is_refused(state, message):
    with pytest.raises(ValueError, match=message):
        heads.read(state)


def test_a_head_for_another_width_or_a_second_head_is_refused(backbone, theirs):
    model = rv.load_model(backbone, num_heads=2)
    wide = heads.LinearClassifier(np.zeros((5, 3 * D // 2), np.float32), np.zeros(5, np.float32))
    with pytest.raises(ValueError, match="24 inputs does not belong to a network of width 16"):
        heads.attach(model, wide)
    with pytest.raises(ValueError, match="a head of 5 classes already"):
        heads.attach(heads.attach(model, heads.read(linear(1))), heads.read(linear(1)))
    with pytest.raises(ValueError, match="no linear classifier"):
        heads.detach(model)
