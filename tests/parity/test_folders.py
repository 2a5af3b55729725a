"""Files and folders: what the libraries save is read, what we write they load with their own functions."""

import jax
import numpy as np
import pytest
import timm
import torch
import transformers

import regvit_jax as rv
from regvit_jax import cli
from regvit_jax.convert import files
from regvit_jax.trees import named

pytestmark = pytest.mark.parity
SMALL = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, image_size=56, patch_size=14)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr("regvit_jax.main.set_up_logging", lambda: None)
    monkeypatch.setattr("regvit_jax.convert.certificate.outputs", lambda model: [])  # Two compilations each.


@pytest.fixture
def same():
    """f(found, expected): names, dtypes and bits of two tables of arrays or tensors."""

    def check(found, expected):
        assert set(found) == set(expected)
        for key in found:
            a, b = np.asarray(found[key]), np.asarray(expected[key])
            assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), key

    return check


@pytest.fixture
def random_ours(draw):
    """f(name, **fields): our model, every parameter at random."""

    def make(name, **fields):
        model, rng = rv.create_model(name, **fields), np.random.default_rng(3)
        for path, leaf in named(model.params).items():
            *above, last = path.split("/")
            node = model.params
            for part in above:
                node = node[part]
            node[last] = draw(path, leaf.shape, rng)
        return model

    return make


def tokens_of(model, x):
    with jax.default_matmul_precision("highest"):
        tokens = model(x)
    parts = [] if tokens.cls is None else [tokens.cls[:, None]]
    return np.concatenate([*parts, tokens.registers, tokens.patches], axis=1)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("Dinov2", {}),
        ("Dinov2WithRegisters", {"num_register_tokens": 2, "use_swiglu_ffn": True}),
        ("Dinov2WithRegisters", {"num_register_tokens": 4, "num_labels": 5}),
        ("Dinov2", {"num_labels": 5}),
    ],
)
def test_hugging_faces_folders_there_and_back(kind, fields, randomised, images, same, tmp_path):
    """save_pretrained -> load_model -> convert -> from_pretrained: the same files, class and outputs."""
    cls = getattr(transformers, kind + ("ForImageClassification" if "num_labels" in fields else "Model"))
    theirs = randomised(lambda: cls(getattr(transformers, kind + "Config")(**SMALL | fields)))
    theirs.save_pretrained(tmp_path / "theirs")
    on_disk = files.read(tmp_path / "theirs").state
    model = rv.load_model(tmp_path / "theirs")
    same(rv.to_torch(model), on_disk)
    live = {key: tensor.numpy() for key, tensor in theirs.state_dict().items()}
    same(named(rv.from_torch(live, num_heads=1).params), named(model.params))

    assert cli.main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--to=huggingface"]) == 0
    same(files.read(tmp_path / "ours").state, on_disk)
    again, found = cls.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(found.values()), found
    same(again.state_dict(), theirs.state_dict())
    auto = transformers.AutoModelForImageClassification if "num_labels" in fields else transformers.AutoModel
    again = auto.from_pretrained(tmp_path / "ours").eval()
    assert type(again) is cls
    x = images(56, 84)
    given = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    expected = again.base_model(given).last_hidden_state.numpy()
    np.testing.assert_allclose(tokens_of(model, x), expected, rtol=0, atol=2e-5)
    if "num_labels" in fields:
        np.testing.assert_allclose(model.logits(x), again(given).logits.numpy(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("registers", [0, 4])
def test_metas_file_becomes_a_folder_that_automodel_loads(registers, random_ours, images, tmp_path):
    """At the native size: away from it Hugging Face's class without registers resamples positions in another way."""
    fields = dict(width=64, depth=2, num_heads=1, mlp_dim=256, image_size=56, registers=registers)
    model = random_ours("dinov2_vits14", **fields)
    rv.save_model(model, tmp_path / "dinov2.pth", format="dinov2")
    loaded = torch.load(tmp_path / "dinov2.pth", weights_only=True)
    assert loaded["blocks.1.attn.qkv.weight"].shape == (192, 64)
    command = ["convert", str(tmp_path / "dinov2.pth"), str(tmp_path / "out"), "--to=huggingface"]
    assert cli.main(command) == 0
    theirs, found = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found.values()), found
    assert type(theirs).__name__ == ("Dinov2WithRegistersModel" if registers else "Dinov2Model")
    for size in [(56, 56), (56, 84)] if registers else [(56, 56)]:
        x = images(*size)
        expected = theirs.eval()(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).last_hidden_state
        np.testing.assert_allclose(tokens_of(model, x), expected.numpy(), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"position": "patches", "layerscale": 1.0, "registers": 4},
        {
            "position": "all",
            "registers": 2,
            "class_token": False,
            "pool": "avg",
            "final_norm": False,
            "fc_norm": True,
            "num_classes": 5,
        },
        {"activation": "swiglu", "mlp_dim": 168, "qkv_bias": False, "num_classes": 5},
        {"position": "none", "class_token": False, "pool": "map", "num_classes": 5},
        {"pre_norm": True, "patch_bias": False, "norm_eps": 1e-5, "image_size": (56, 84)},
    ],
)
def test_timm_loads_our_folders(fields, random_ours, images, tmp_path):
    fields = dict(width=64, depth=2, num_heads=4, mlp_dim=168, image_size=56) | fields
    model = random_ours("vit_s14", **fields)
    rv.save_model(model, tmp_path / "timm", format="timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    x = images(56, 84)
    given = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    tokens = theirs.forward_features(given)
    np.testing.assert_allclose(tokens_of(model, x), tokens.numpy(), rtol=0, atol=2e-5)
    if model.config.num_classes:
        logits = theirs.forward_head(tokens)
        np.testing.assert_allclose(model.logits(x), logits.numpy(), rtol=0, atol=2e-5)
