"""`regvit convert --verify=torch` where PyTorch is: the original in a process of its own, and how far away it is."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers

import regvit_jax as rv
from regvit_jax import cli
from regvit_jax.convert import verify

pytestmark = pytest.mark.parity


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr("regvit_jax.main.set_up_logging", lambda: None)
    monkeypatch.setattr("regvit_jax.convert.certificate.outputs", lambda model: [])  # Two compilations each.


@pytest.fixture
def metas_file(draw, tmp_path):
    """f(registers, **fields): a checkpoint as a training run leaves it, written by PyTorch."""

    def write(family="dinov2", **fields):
        model = rv.create_model("dinov2_vits14", width=64, depth=2, num_heads=1, mlp_dim=256, image_size=56, **fields)
        rng = np.random.default_rng(0)
        state = {key: draw(key, array.shape, rng) for key, array in rv.to_torch(model, family).items()}
        tensors = {f"backbone.{key}": torch.from_numpy(array) for key, array in state.items()}
        torch.save({"teacher": tensors, "iteration": 3}, tmp_path / "meta.pth")
        return tmp_path / "meta.pth"

    return write


def test_metas_file_beside_timms_own_importer(metas_file, child_with_timm, tmp_path, capsys):
    file = metas_file(registers=4)
    out = tmp_path / "out"
    # What is added later is not of the original: the comparison is of the weights as they were read.
    assert (
        cli.main(["convert", str(file), str(out), "--to=timm", "--num_heads=1", "--image_size=70", "--verify=torch"])
        == 0
    )
    assert "equals the original (torch" in capsys.readouterr().out
    said = json.loads((out / "certificate.json").read_text())["verify"]
    assert said["library"].keys() == {"torch", "timm"} and said["read_by"].startswith("torch 2.")
    assert said["sizes"].keys() == {"56x56", "28x42"} and said["left_out"] == {} and said["agrees"] is True
    for found in said["sizes"].values():
        assert len(found["blocks"]) == 2 and "logits" not in found
        assert all(0 < part["max_abs"] < 2e-5 for part in (*found["blocks"], found["tokens"]))
        assert all(0 < part["max_rel"] < 2e-5 for part in (*found["blocks"], found["tokens"]))


def test_what_timm_resamples_otherwise_is_left_out(metas_file, child_with_timm):
    file = metas_file()
    said = verify.against_torch(rv.load_model(file, num_heads=1), file)
    assert list(said["sizes"]) == ["56x56"] and said["agrees"] is True
    assert said["left_out"] == {"28x42": "timm resamples positions as antialias, this model as bicubic_offset"}


def test_hugging_faces_folder_beside_transformers(randomised, tmp_path, monkeypatch):
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14, num_labels=5
    )
    theirs = randomised(lambda: transformers.Dinov2WithRegistersForImageClassification(config))
    theirs.save_pretrained(tmp_path / "theirs")
    given, run = [], verify._in_a_child
    monkeypatch.setattr(verify, "_in_a_child", lambda *request: given.append(run(*request)) or given[0])
    command = ["convert", str(tmp_path / "theirs"), str(tmp_path / "out"), "--to=dinov2", "--verify=torch"]
    assert cli.main(command) == 0
    said = json.loads((tmp_path / "out" / "certificate.json").read_text())["verify"]
    assert said["library"].keys() == {"torch", "transformers"} and said["agrees"] is True
    assert said["sizes"].keys() == {"56x56", "28x42"}
    assert all(found[part]["max_abs"] < 2e-5 for found in said["sizes"].values() for part in ("tokens", "logits"))

    # Two heads of 32 taken for one of 64: the same shapes, another network.
    monkeypatch.setattr(verify, "_in_a_child", lambda *request: given[0])
    wrong = rv.load_model(tmp_path / "theirs")
    wrong = dataclasses.replace(wrong, config=dataclasses.replace(wrong.config, num_heads=1))
    found = verify.against_torch(wrong, tmp_path / "theirs")
    assert found["agrees"] is False and found["sizes"]["56x56"]["tokens"]["max_rel"] > 0.01
