"""`regvit convert`: the folder, its certificate and sidecar, what it prints, what it refuses to write over."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import regvit_jax as rv
from regvit_jax import cli, hub
from regvit_jax.convert import certificate, files, sidecar
from regvit_jax.models.config import ViTConfig


@pytest.fixture
def source(theirs, tmp_path):
    files.write(tmp_path / "teacher.pth", theirs("dinov2, teacher, chunked")[1])
    return tmp_path / "teacher.pth"


def test_the_command_leaves_a_folder_with_its_proof(source, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["convert", str(source), str(out), "--to=timm", "--num_heads=2", "--image_size=16"]) == 0
    printed = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        "model.safetensors",
        "model.safetensors.sidecar",
        "config.json",
        "certificate.json",
    }
    said = json.loads((out / "certificate.json").read_text())
    assert said["source"] == {"name": "teacher.pth", "sha256": files.sha256_of(source), "container": ""}
    assert said["family"]["name"] == "dinov2" and "not timm: " in said["family"]["why"]
    assert said["target"]["files"]["model.safetensors"] == files.sha256_of(out / "model.safetensors")
    state = files.read(source).state
    assert {*said["keys"]["consumed"], *said["keys"]["dropped"]} == set(state)
    assert set(said["keys"]["dropped"].values()) == {"projection head of self-supervised training"}
    assert said["keys"]["filled"]["blocks/attn/qkv/kernel"] == [2, 16, 3, 16]
    assert said["kept_aside"] == ["cls_token", "mask_token", "pos_embed"]
    assert "positions were resampled from 3 x 3 to 4 x 4 patches (antialias)" in said["notes"]
    assert (said["read_back"], said["verify"]) == ("exact", None)
    assert all(value < 1e-5 for value in said["without_sidecar"].values())
    # Anyone can compute the outputs again.
    model = rv.load_model(out)
    assert model.config == ViTConfig.from_json(said["config"])
    assert certificate.outputs(model) == said["outputs"]
    for part in ("dinov2 -> timm", "registers    4", "class token and patches, 4 x 4", "read back exact", "note: "):
        assert part in printed


def test_the_fixed_input_is_fixed():
    """By hand: 2654435761 i mod 2^32, scaled to [-2, 2)."""
    images = certificate.fixed_input((4, 8))
    assert (images.shape, images.dtype) == ((1, 4, 8, 3), np.float32)
    turns = [i * 2654435761 % 2**32 / 2**32 for i in (0, 1, 2, 95)]
    np.testing.assert_array_equal(images.reshape(-1)[[0, 1, 2, 95]], np.float32([4 * t - 2 for t in turns]))
    assert abs(images.mean()) < 0.1 and 1.0 < images.std() < 1.3


def test_a_fingerprint_sees_names_types_shapes_and_bits():
    a = {"x": np.zeros((2, 3), np.float32)}
    others = [
        {"y": np.zeros((2, 3), np.float32)},
        {"x": np.zeros((3, 2), np.float32)},
        {"x": np.zeros((2, 3), np.int32)},
        {"x": -a["x"]},
    ]
    assert len({certificate.fingerprint(tree) for tree in [a, *others]}) == 5
    assert certificate.fingerprint(a) == certificate.fingerprint({"x": a["x"].copy()})


def test_no_other_folder_is_written_over(source, theirs, tmp_path):
    out = tmp_path / "out"
    hub.convert(source, out, "dinov2", num_heads=2)
    assert (out / "model.pth").is_file()
    hub.convert(source, out, "dinov2", num_heads=2, kind="safetensors")  # The same weights again: the old file goes.
    assert not (out / "model.pth").exists() and (out / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="holds teacher.pth as dinov2, not teacher.pth as regvit"):
        hub.convert(source, out, "regvit", num_heads=2)
    files.write(tmp_path / "other.pth", theirs("dinov2, teacher, chunked", seed=1)[1])
    with pytest.raises(ValueError, match="holds teacher.pth as dinov2, not other.pth"):
        hub.convert(tmp_path / "other.pth", out, "dinov2", num_heads=2)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("")
    with pytest.raises(ValueError, match="exists and is not of a conversion"):
        hub.convert(source, tmp_path / "notes", "dinov2", num_heads=2)
    with pytest.raises(ValueError, match="makes a folder; leave out .pth"):
        hub.convert(source, tmp_path / "a.pth", "dinov2", num_heads=2)
    with pytest.raises(ValueError, match="format 'torch' cannot be written"):
        hub.convert(source, tmp_path / "b", "torch")


def test_our_own_folders_convert_too(source, tmp_path, same):
    """theirs -> our folder -> theirs: names and all; and the certificate says where it began."""
    hub.convert(source, tmp_path / "ours", "regvit", num_heads=2)
    said = hub.convert(tmp_path / "ours", tmp_path / "back", "dinov2")
    state = {key: array for key, array in files.read(source).state.items() if key.startswith("backbone.")}
    same(dict(files.read(tmp_path / "back").state), state)
    assert said["source"]["sha256"] == files.sha256_of(source)
    assert said["kept_aside"] == [] and said["without_sidecar"] is None


class TestSidecar:
    def test_it_holds_only_what_the_format_does_not(self, source, tmp_path):
        rv.save_model(rv.load_model(source, num_heads=2), tmp_path / "out", format="huggingface")
        assert load_file(tmp_path / "out" / "model.safetensors.sidecar") == {}

    def test_weights_that_were_changed_are_read_without_it(self, theirs, tmp_path, caplog):
        model = rv.from_torch(theirs("dinov2, SwiGLU")[1], num_heads=2)
        rv.save_model(model, tmp_path / "m.safetensors", format="timm")
        state = dict(files.read(tmp_path / "m.safetensors").state)
        state["cls_token"] = state["cls_token"] + 1
        files.write(tmp_path / "m.safetensors", state)
        read = rv.load_model(tmp_path / "m.safetensors", num_heads=2)
        assert "belongs to other weights" in caplog.text
        assert read.config.position == "patches"
        np.testing.assert_array_equal(read.params["cls_token"], state["cls_token"])

    def test_a_field_that_is_given_overrules_it(self, source, tmp_path):
        rv.save_model(rv.load_model(source, num_heads=2), tmp_path / "m.pth", format="dinov2")
        assert rv.load_model(tmp_path / "m.pth").config.num_heads == 2
        assert rv.load_model(tmp_path / "m.pth", num_heads=4).config.num_heads == 4

    @pytest.mark.parametrize("damage", [b"", b"no safetensors"])
    def test_a_damaged_one_is_named(self, damage, source, tmp_path):
        rv.save_model(rv.load_model(source, num_heads=2), tmp_path / "m.pth", format="dinov2")
        (tmp_path / "m.pth.sidecar").write_bytes(damage)
        with pytest.raises(ValueError, match="m.pth.sidecar is no readable sidecar.*remove it"):
            rv.load_model(tmp_path / "m.pth")

    def test_it_lies_beside_its_file(self, tmp_path):
        assert sidecar.path_of(tmp_path / "a.pth") == tmp_path / "a.pth.sidecar"
