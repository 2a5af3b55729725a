"""JSON files beside weights: what Hugging Face and timm say about a model, read and written."""

import json

import numpy as np
import pytest

import regvit_jax as rv
from regvit_jax.convert import family_of, files
from regvit_jax.data.transforms import Preprocess

# As transformers 5 writes it for a tiny Dinov2WithRegistersModel; one key is nobody's.
CONFIG = {
    "architectures": ["Dinov2WithRegistersModel"],
    "attention_probs_dropout_prob": 0.0,
    "drop_path_rate": 0.2,
    "hidden_act": "gelu_new",
    "hidden_size": 16,
    "image_size": 12,
    "layer_norm_eps": 1e-5,
    "layerscale_value": 0.5,
    "mlp_ratio": 1.5,
    "model_type": "dinov2_with_registers",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_register_tokens": 4,
    "patch_size": 4,
    "use_swiglu_ffn": False,
    "reshape_hidden_states": False,
}
LOOK = {
    "size": {"shortest_edge": 16},
    "crop_size": {"height": 12, "width": 12},
    "resample": 2,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
}


@pytest.fixture
def folder(theirs, tmp_path):
    files.write(tmp_path / "in.safetensors", theirs("Hugging Face, registers")[1])
    (tmp_path / "in").mkdir()
    (tmp_path / "in.safetensors").rename(tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "in" / "preprocessor_config.json").write_text(json.dumps(LOOK))
    return tmp_path / "in"


def test_hugging_faces_folder_says_what_keys_cannot(folder):
    model = rv.load_model(folder)
    c = model.config
    assert (c.num_heads, c.activation, c.norm_eps, c.layerscale) == (2, "gelu_tanh", 1e-5, 0.5)
    assert (c.drop_path, c.drop_path_uniform, c.resampler, c.registers) == (0.2, True, "antialias", 4)
    assert model.preprocessing == Preprocess(12, 0.75, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert "model_type dinov2_with_registers" in model.origin.why


def test_hugging_faces_folder_is_written_back_with_what_is_not_ours(folder, tmp_path):
    rv.save_model(rv.load_model(folder), tmp_path / "out", format="huggingface")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    changed = {"hidden_act": "gelu_pytorch_tanh"}  # Two names of one function.
    assert {key: written[key] for key in CONFIG} == CONFIG | changed
    look = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert {key: look[key] for key in LOOK} == LOOK
    assert files.read(tmp_path / "out").metadata["format"] == "pt"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, "config.json has num_hidden_layers 3, the weights 2"),
        ({"num_register_tokens": 8}, "num_register_tokens 8, the weights 4"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"model_type": "vit"}, "model_type 'vit'"),
        ({"image_size": 16}, "no grid of 4 x 4"),
        ({"num_attention_heads": 3}, "not a multiple of num_heads 3"),
        ({"use_swiglu_ffn": True}, "expected"),
    ],
)
def test_a_config_that_contradicts_the_weights_is_refused(folder, change, message):
    (folder / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(ValueError, match=message):
        rv.load_model(folder)


def test_a_classifier_keeps_its_labels(theirs):
    family = family_of("huggingface")
    said = CONFIG | {"id2label": {str(i): name for i, name in enumerate("abcde")}}
    said |= {"architectures": ["Dinov2WithRegistersForImageClassification"]}
    state = theirs("Hugging Face, classifier, registers")[1]
    reading = family.read(state, files={"config.json": said})
    assert (reading.config.num_classes, reading.config.pool) == (5, "token_avg")
    written = family.to_files(reading.config, reading.preprocessing, reading.origin.files)["config.json"]
    assert written["architectures"] == ["Dinov2WithRegistersForImageClassification"]
    assert written["id2label"]["2"] == "c" and written["label2id"]["c"] == 2


def test_the_ratio_that_gives_the_hidden_size():
    """1536 -> 4096 for SwiGLU (ratio 4), 64 -> 176; and a size that no ratio gives."""
    from regvit_jax.convert.huggingface_config import _ratio
    from regvit_jax.models.config import ViTConfig

    def ratio(width, hidden, activation):
        config = ViTConfig(width=width, depth=1, num_heads=1, mlp_dim=hidden, activation=activation)
        return _ratio(config)

    assert ratio(1536, 4096, "swiglu") == ratio(64, 176, "swiglu") == ratio(384, 1536, "gelu") == 4
    assert isinstance(ratio(384, 1536, "gelu"), int)
    with pytest.raises(ValueError, match="no mlp_ratio gives 177"):
        ratio(64, 177, "swiglu")


@pytest.mark.parametrize(
    ("name", "base", "args"),
    [
        (
            "timm, average, fc_norm",
            "vit_base_patch16_224",
            {"global_pool": "avg", "fc_norm": True, "class_token": False},
        ),
        ("timm, SwiGLU", "vit_giant_patch14_dinov2", {"mlp_ratio": 3.0, "no_embed_class": True, "reg_tokens": 3}),
        ("timm, CLIP's", "vit_base_patch16_clip_224", {"pre_norm": True, "init_values": None}),
        ("timm, attention pooling", "vit_base_patch16_224", {"global_pool": "map", "num_heads": 2}),
    ],
)
def test_timms_folder_names_an_architecture_and_all_its_arguments(name, base, args, theirs, tmp_path):
    family, state = theirs(name)
    model = rv.from_torch(state, family, num_heads=2)
    rv.save_model(model, tmp_path, format="timm")
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["architecture"] == base and said["num_classes"] == 5
    assert {key: said["model_args"][key] for key in args} == args
    (tmp_path / "model.safetensors.sidecar").unlink()
    again = rv.load_model(tmp_path)
    assert again.config == model.config and again.preprocessing == model.preprocessing


@pytest.mark.parametrize(
    ("change", "message"),
    [({"global_pool": "avgmax"}, "global_pool 'avgmax'"), ({"act_layer": "relu"}, "act_layer 'relu'")],
)
def test_what_timm_can_and_we_cannot_is_refused(change, message, theirs):
    said = {"architecture": "vit_base_patch16_224", "model_args": {"num_heads": 2} | change}
    with pytest.raises(ValueError, match=message):
        family_of("timm").read(theirs("timm, class token")[1], files={"config.json": said})


def test_broken_json_is_named(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json"):
        rv.load_model(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "preprocessor_config.json").write_bytes(np.array([255], np.uint8).tobytes())
    with pytest.raises(ValueError, match="preprocessor_config.json"):
        rv.load_model(folder)
