"""Weights files: .safetensors, .npz and folders read strictly, the right state dict of a checkpoint, atomic writing."""

import hashlib
import json
import os
import random
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from regvit_jax.convert import files, flatfiles
from regvit_jax.convert.files import WeightsError

A = np.arange(6, dtype=np.float32).reshape(2, 3)
STATE = {
    "b.weight": A,
    "a.half": np.array([1, 2, 3], np.float16),
    "brain": np.array([1, 1e30], ml_dtypes.bfloat16),
    "wide": np.array([1e300]),
    "count": np.array(7, np.int64),
    "bytes": np.array([0, 255], np.uint8),
    "mask": np.array([True, False, True]),
    "none": np.zeros((0, 3), np.float32),
    "column": A.T,
}
METADATA = {"format": "pt", "é": '"\n'}
KINDS = ("safetensors", "pth", "npz")


def same(state, expected):
    assert set(state) == set(expected)
    for name, array in expected.items():
        assert state[name].dtype == array.dtype, name
        np.testing.assert_array_equal(state[name], array, err_msg=name, strict=True)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    files.write(path, STATE, METADATA)
    weights = files.read(path)
    same(weights.state, STATE)
    assert not any(array.flags.writeable for array in weights.state.values())
    assert (weights.metadata, weights.config, weights.dropped, weights.container) == (METADATA, None, {}, "")
    assert weights.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    files.write(path, STATE)
    assert files.read(path).metadata == {}


def test_safetensors_are_those_of_the_format_s_own_library(tmp_path):
    plain = {name: array for name, array in STATE.items() if name != "brain"}
    files.write(tmp_path / "ours.safetensors", plain, {"format": "pt"})
    same(load_file(tmp_path / "ours.safetensors"), plain)
    save_file({name: np.ascontiguousarray(a).reshape(a.shape) for name, a in plain.items()}, tmp_path / "t.safetensors")
    same(files.read(tmp_path / "t.safetensors").state, plain)


def test_safetensors_bytes_depend_on_the_content_only(tmp_path):
    files.write(tmp_path / "a.safetensors", STATE, METADATA)
    files.write(tmp_path / "b.safetensors", dict(reversed(STATE.items())), dict(reversed(METADATA.items())))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def lie(path: Path, data: bytes = b"\0" * 8, **header) -> Path:
    """A .safetensors file with this header."""
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype="F32", shape=(2,), data_offsets=(0, 8), **more) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets} | more


HEADERS = {
    "sizes do not fit": dict(w=entry(shape=(3,))),
    "past the end": dict(w=entry(shape=(4,), data_offsets=(0, 16))),
    "bytes left over": dict(w=entry(shape=(1,), data_offsets=(0, 4))),
    "a hole": dict(w=entry(shape=(1,), data_offsets=(4, 8))),
    "overlap": dict(v=entry(), w=entry()),
    "backwards": dict(w=entry(shape=(0,), data_offsets=(8, 0))),
    "negative": dict(w=entry(shape=(-1, -2))),
    "a shape that overflows": dict(w=entry(shape=(1 << 40, 1 << 40, 0), data_offsets=(0, 0)), v=entry()),
    "a broken number": dict(w=entry(shape=(2.0,))),
    "a truth for a number": dict(w=entry(shape=(2, True))),
    "a text for a shape": dict(w=entry(shape="2")),
    "three offsets": dict(w=entry(data_offsets=(0, 8, 8))),
    "unknown dtype": dict(w=entry(dtype="Q7")),
    "8-bit floats": dict(w=entry(dtype="F8_E4M3", shape=(8,))),
    "a list for a dtype": dict(w=entry(dtype=["F32"])),
    "one more field": dict(w=entry(strides=(1,))),
    "no table": dict(w=[1]),
    "metadata that is no text": dict(w=entry(), __metadata__={"a": 1}),
    "truths that are none": dict(w=entry(dtype="BOOL", shape=(8,))),
}


@pytest.mark.parametrize("fault", HEADERS)
def test_a_safetensors_header_that_lies_is_refused(tmp_path, fault):
    with pytest.raises(WeightsError):
        files.read(lie(tmp_path / "a.safetensors", b"\0" * 7 + b"\2", **HEADERS[fault]))


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 1 << 63) + b"{}",
        struct.pack("<Q", 100_000_001) + b"{}",
        struct.pack("<Q", 2) + b"{",
        struct.pack("<Q", 200_000) + b'{"a":' + b"[" * 199_995,
        struct.pack("<Q", 38) + b'{"a":{"dtype":"F32"},"a":{"dtype":""}}',
        struct.pack("<Q", 10_004) + b'{"' + b"a" * 10_000 + b'"}',
        struct.pack("<Q", 9_007) + b'{"a": ' + b"9" * 9_000 + b"}",
        struct.pack("<Q", 5) + b'{"\xff"}',
        b"{" * 9,
    ],
    ids=["2**63", "over 100 MB", "cut", "nested", "a key twice", "no JSON", "a long number", "no UTF-8", "short"],
)
def test_a_header_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(WeightsError):
        files.read(tmp_path / "a.safetensors")


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_no_cut_is_read_and_no_flipped_byte_does_harm(tmp_path, kind):
    path, rng = tmp_path / f"a.{kind}", random.Random(0)
    files.write(path, STATE, METADATA)
    whole = path.read_bytes()
    for at in rng.sample(range(1, len(whole)), 50):
        path.write_bytes(whole[:at])
        with pytest.raises(WeightsError):
            files.read(path)
    for at in rng.sample(range(len(whole)), 200):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ rng.randrange(1, 256)]) + whole[at + 1 :])
        try:
            weights = files.read(path)
        except WeightsError:
            continue
        assert sum(array.nbytes for array in weights.state.values()) <= len(whole)
        if kind == "npz":  # every member has a checksum
            same(weights.state, STATE)


def test_npz_of_others(tmp_path):
    plain = {name: array for name, array in STATE.items() if name != "brain"} | {"big": A.astype(">f4")}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **plain)
        same(files.read(tmp_path / "a.npz").state, plain | {"big": A})
    np.savez(tmp_path / "a.npz", brain=STATE["brain"])  # NumPy forgets what these two bytes were
    with pytest.raises(WeightsError, match="bfloat16"):
        files.read(tmp_path / "a.npz")


def npz(path: Path, content: bytes, member="w.npy", compression=zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as out:
        out.writestr(member, content)
    return path


def npy(header: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + data


@pytest.mark.parametrize(
    "content",
    [
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n", b"cos\nsystem\n(S'exit'\ntR."),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }\n", b"1234"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }\n", b"1234"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }\n", b"12345"),
        npy("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }\n", b"1234"),
        npy("{'descr': '<U1', 'fortran_order': False, 'shape': (1,), }\n", b"1234"),
        npy("__import__('os').system('exit')\n"),
        npy("(" * 3000 + "\n"),
        npy("{'descr': '<f3', 'fortran_order': False, 'shape': (1,), }\n", b"123"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': 1, }\n", b"1234"),
        npy("{'descr': '<f4', 'fortran_order': 1, 'shape': (1,), }\n", b"1234"),
        npy("{'descr': '<f4', 'shape': (1,), }\n", b"1234"),
        b"plain",
    ],
    ids="objects terabyte negative byte records text program nested f3 shape order absent no-npy".split(),
)
def test_an_npz_that_lies_is_refused(tmp_path, content):
    with pytest.raises(WeightsError):
        files.read(npz(tmp_path / "a.npz", content))


def test_an_npz_bomb_is_refused_before_it_inflates(tmp_path, monkeypatch):
    monkeypatch.setattr(flatfiles, "INFLATED", 1 << 20)
    bomb = npy("{'descr': '|u1', 'fortran_order': False, 'shape': (2000000,), }\n", b"\0" * 2_000_000)
    with pytest.raises(WeightsError, match="inflate"):
        files.read(npz(tmp_path / "a.npz", bomb, compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(WeightsError, match="no .npy"):
        files.read(npz(tmp_path / "a.npz", b"", member="run.py"))


@pytest.fixture
def checkpoint(tmp_path):
    """Writes nested dicts of arrays as torch.save would: {"a": {"w": array}} through the names a/w of a flat file."""

    def make(root: dict) -> Path:
        flat = {}

        def pickled(value):
            if isinstance(value, dict):
                pairs = (_text(k) + pickled(v) for k, v in value.items())
                return b"}(" + b"".join(pairs) + b"u"
            if isinstance(value, str):
                return _text(value)
            flat[len(flat)] = value
            where = b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text(str(len(flat) - 1)) + _text("cpu")
            where += b"K" + bytes([value.size]) + b"tQ"
            return b"ctorch._utils\n_rebuild_tensor\n(" + where + b"K\0(K" + bytes([value.size]) + b"t(K\1ttR"

        with zipfile.ZipFile(tmp_path / "c.pth", "w") as out:
            out.writestr("archive/data.pkl", b"\x80\2" + pickled(root) + b".")
            for key, array in flat.items():
                out.writestr(f"archive/data/{key}", array.tobytes())
        return tmp_path / "c.pth"

    return make


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


ONE, TWO = np.ones(1, np.float32), np.full(2, 2, np.float32)


@pytest.mark.parametrize(
    ("root", "container"),
    [
        ({"w": ONE}, ""),
        ({"w": ONE, "note": "text"}, ""),
        ({"teacher": {"w": ONE}}, "teacher"),
        ({"student": {"w": TWO}, "teacher": {"w": ONE}, "dino_loss": {"center": TWO}}, "teacher"),
        ({"model": {"w": ONE}, "model_ema": {"w": TWO}, "optimizer": {"state": {"w": TWO}}}, "model"),
        ({"state_dict": {"w": ONE}, "epoch": "1"}, "state_dict"),
        ({"weights": {"w": ONE}}, "weights"),
        ({"nested": {"deep": {"w": ONE}}}, "nested.deep"),
    ],
)
def test_the_state_dict_is_found(checkpoint, root, container):
    weights = files.read(checkpoint(root))
    assert weights.container == container
    same(weights.state, {"w": ONE})
    everything = set(root) if not container else set(root) - {container.split(".")[0]}
    assert set(weights.dropped) == everything - {"w"}


def test_another_one_can_be_asked_for(checkpoint):
    path = checkpoint({"student": {"w": TWO}, "teacher": {"w": ONE}})
    same(files.read(path, container="student").state, {"w": TWO})
    with pytest.raises(WeightsError, match="'student', 'teacher'"):
        files.read(path, container="studnet")


@pytest.mark.parametrize(
    ("root", "said"),
    [
        ({"a": {"w": ONE}, "b": {"w": TWO}}, "container= one of 'a', 'b'"),
        ({"teacher": {"w": ONE}, "model": {"w": TWO}}, "container= one of 'teacher', 'model'"),
        ({"w": ONE, "extra": {"v": TWO}}, r"container= one of '' \(the top\), 'extra'"),
        ({"epoch": "3"}, "no tensors"),
        (ONE, "no state dict but one tensor"),
    ],
)
def test_what_cannot_be_told_is_asked(checkpoint, root, said):
    with pytest.raises(WeightsError, match=said):
        files.read(checkpoint(root))


def folder(path: Path, **contents) -> Path:
    path.mkdir()
    for file, content in contents.items():
        name = file.replace("__", "-").replace("_DOT_", ".")
        if isinstance(content, dict) and content and isinstance(next(iter(content.values())), np.ndarray):
            files.write(path / name, content)
        else:
            (path / name).write_text(json.dumps(content))
    return path


def test_a_hugging_face_folder_comes_with_its_config(tmp_path):
    path = folder(
        tmp_path / "f",
        config_DOT_json={"model_type": "dinov2"},
        model_DOT_safetensors={"w": ONE},
        pytorch_model_DOT_bin={"w": TWO},
    )
    weights = files.read(path)
    same(weights.state, {"w": ONE})
    assert weights.config == {"model_type": "dinov2"} and weights.files == (path / "model.safetensors",)
    (path / "model.safetensors").unlink()
    same(files.read(path).state, {"w": TWO})
    # A file that does not belong to the folder's model does not take its config.
    files.write(path / "other.pth", {"w": ONE})
    assert files.read(path / "other.pth").config is None
    (path / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="config.json"):
        files.read(path)


def test_a_folder_with_one_file_or_none_or_two(tmp_path):
    path = folder(tmp_path / "f", config_DOT_json={"lr": 1})
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        files.read(path)
    files.write(path / "a.pth", {"w": ONE})
    assert files.read(path).config is None  # a training workdir's config.json is another thing
    files.write(path / "b.pth", {"w": ONE})
    with pytest.raises(WeightsError, match="a.pth, b.pth"):
        files.read(path)


def sharded(path: Path, places: dict) -> Path:
    one, two = "model__00001__of__00002_DOT_safetensors", "model__00002__of__00002_DOT_safetensors"
    index = {"metadata": {"total_size": 12}, "weight_map": places}
    return folder(path, **{one: {"v": ONE}, two: {"w": TWO}}, model_DOT_safetensors_DOT_index_DOT_json=index)


SHARDS = {"v": "model-00001-of-00002.safetensors", "w": "model-00002-of-00002.safetensors"}


def test_shards_are_one_model(tmp_path):
    path = sharded(tmp_path / "f", SHARDS)
    weights = files.read(path)
    same(weights.state, {"v": ONE, "w": TWO})
    lines = "".join(f"{files.sha256_of(path / name)}  {name}\n" for name in sorted(SHARDS.values()))
    assert weights.sha256 == hashlib.sha256(lines.encode()).hexdigest()
    assert weights.sha256 == files.read(path / "model.safetensors.index.json").sha256
    (path / SHARDS["w"]).unlink()
    with pytest.raises(FileNotFoundError, match="00002-of-00002"):
        files.read(path)


@pytest.mark.parametrize(
    ("places", "said"),
    [
        (SHARDS | {"x": SHARDS["v"]}, "lacks 'x'"),
        ({"v": SHARDS["v"], "x": SHARDS["w"]}, "'w'|'x'"),
        ({"v": SHARDS["w"], "w": SHARDS["v"]}, "'v'|'w'"),
        (SHARDS | {"x": "../model.safetensors"}, "in the same folder"),
        (SHARDS | {"x": "/etc/passwd"}, "in the same folder"),
        (SHARDS | {"x": "config.json"}, "in the same folder"),
        (SHARDS | {"x": 3}, "weight_map"),
        ({}, "weight_map"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, places, said):
    with pytest.raises(WeightsError, match=said):
        files.read(sharded(tmp_path / "f", places))


def test_a_download_gone_wrong_is_recognised(tmp_path):
    for content in ("<!DOCTYPE html><html>", "version https://git-lfs.github.com/spec/v1\noid sha256:00\n"):
        (tmp_path / "a.pth").write_text(content)
        with pytest.raises(WeightsError, match="Git LFS"):
            files.read(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("path", "state", "metadata"),
    [
        ("a.onnx", {"w": ONE}, {}),
        ("a", {"w": ONE}, {}),
        ("a.npz", {"w": np.array(["text"])}, {}),
        ("a.safetensors", {"w": np.array([None])}, {}),
        ("a.safetensors", {"w": ONE.astype(np.complex128)}, {}),
        ("a.pth", {1: ONE}, {}),
        ("a.pth", {"half a pair \ud800": ONE}, {}),
        ("a.pth", {"w": ONE}, {"epoch": 3}),
    ],
)
def test_what_a_format_cannot_carry_is_refused_and_leaves_nothing(tmp_path, path, state, metadata):
    with pytest.raises(WeightsError):
        files.write(tmp_path / path, state, metadata)
    assert os.listdir(tmp_path) == []


def test_a_reader_keeps_its_numbers_while_the_file_is_replaced(tmp_path):
    files.write(tmp_path / "a.safetensors", {"w": A})
    before = files.read(tmp_path / "a.safetensors").state["w"]
    files.write(tmp_path / "a.safetensors", {"w": A + 1})
    np.testing.assert_array_equal(before, A)
    np.testing.assert_array_equal(files.read(tmp_path / "a.safetensors").state["w"], A + 1)
