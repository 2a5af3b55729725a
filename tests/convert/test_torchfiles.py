""".pth without PyTorch: files of torch.save read exactly, damaged ones refused, and written for torch.load."""

import collections
import io
import os
import pickle
import pickletools
import random
import shutil
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from regvit_jax.convert import archive, files
from regvit_jax.convert.files import WeightsError

GOLDEN = Path(__file__).parents[1] / "golden"
N = np.arange(24, dtype=np.float32)
# What torch_zip.pth and torch_legacy.pth were made from.
MADE = {
    name: np.array([0, 1, 100]).astype(name)
    for name in ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8")
} | {
    "bfloat16": np.array([0, 1, 100], ml_dtypes.bfloat16),
    "bool": np.array([False, True, True]),
    "scalar": np.float32(3.5),
    "empty": np.zeros((0, 4), np.float32),
    "whole": N,
    "part": N[4:12].reshape(2, 4),
    "transposed": N.reshape(4, 6).T,
    "every_third": N[::3],
    "expanded": np.full(4, 5, np.float32),
    "parameter": N[:2],
}


def same(state, expected):
    assert set(state) == set(expected)
    for name, array in expected.items():
        assert state[name].dtype.name == np.asarray(array).dtype.name, name
        np.testing.assert_array_equal(state[name], array, err_msg=name, strict=True)


@pytest.mark.parametrize("file", ["torch_zip.pth", "torch_legacy.pth"])
def test_every_dtype_and_view_of_torch_save_is_read_exactly(file):
    weights = files.read(GOLDEN / file)
    same(weights.state, MADE)
    assert list(weights.state)[:3] == ["float64", "float32", "float16"]  # the order of the file
    assert (weights.container, weights.dropped, weights.metadata) == ("", {}, {})


def test_arrays_are_views_of_the_mapped_file_and_cannot_be_written():
    state = files.read(GOLDEN / "torch_zip.pth").state
    assert np.shares_memory(state["whole"], state["part"])
    base = state["whole"]
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(base, memoryview)
    with pytest.raises(ValueError, match="read-only"):
        state["part"][0] = 1


def test_a_training_checkpoint_gives_its_model_and_tells_what_it_left():
    weights = files.read(GOLDEN / "torch_training.pth")
    same(weights.state, {"weight": np.array([[1, 2]], np.float32), "bias": np.array([3], np.float32)})
    assert weights.container == "model"
    assert weights.dropped["args"] == "object of class argparse.Namespace"
    assert set(weights.dropped) == {"optimizer", "epoch", "best", "args"}


def read_or_refuse(path: Path):
    try:
        return files.read(path).state
    except WeightsError:
        return None


@pytest.mark.parametrize("file", ["torch_zip.pth", "torch_legacy.pth"])
def test_no_cut_is_read_and_no_flipped_byte_does_harm(tmp_path, file):
    """Only WeightsError comes out, and little memory goes in. A zip has checksums: there no change is ever missed."""
    whole, path, rng = (GOLDEN / file).read_bytes(), tmp_path / file, random.Random(0)
    original = files.read(GOLDEN / file).state
    tracemalloc.start()
    for at in rng.sample(range(1, len(whole)), 50):
        path.write_bytes(whole[:at])
        assert read_or_refuse(path) is None
    for i, at in enumerate(rng.sample(range(len(whole)), 200)):
        if i == 50:  # being watched makes it ten times slower
            assert tracemalloc.get_traced_memory()[1] < 16 << 20
            tracemalloc.stop()
        path.write_bytes(whole[:at] + bytes([whole[at] ^ rng.randrange(1, 256)]) + whole[at + 1 :])
        state = read_or_refuse(path)
        if state is not None and file != "torch_legacy.pth":
            same(state, original)


def test_what_is_no_file_is_said_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        files.read(tmp_path / "a.pth")
    (tmp_path / "a.pth").touch()
    with pytest.raises(WeightsError, match="empty"):
        files.read(tmp_path / "a.pth")


# Written files. The reader here is Python's own: zipfile and pickle, with PyTorch's four names played by NumPy.


def independent_load(path: Path):
    out = zipfile.ZipFile(path)
    assert out.testzip() is None
    kinds = {"Double": "f8", "Float": "f4", "Half": "f2", "Long": "i8", "Int": "i4", "Short": "i2", "Char": "i1"}
    kinds |= {"Byte": "u1", "Bool": "?", "BFloat16": ml_dtypes.bfloat16}

    def rebuild(data, offset, shape, stride, requires_grad, hooks):
        assert (requires_grad, hooks) == (False, {})
        view = np.lib.stride_tricks.as_strided(data[offset:], shape, [s * data.itemsize for s in stride])
        return view.copy()

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, attribute):
            known = {"OrderedDict": collections.OrderedDict, "_rebuild_tensor_v2": rebuild}
            known |= {f"{kind}Storage": np.dtype(dtype) for kind, dtype in kinds.items()}
            return known[attribute]

        def persistent_load(self, pid):
            data = np.frombuffer(out.read(f"archive/data/{pid[2]}"), pid[1])
            assert (pid[0], pid[3], pid[4]) == ("storage", "cpu", len(data))
            return data

    return Unpickler(io.BytesIO(out.read("archive/data.pkl"))).load()


def test_a_written_pth_is_what_torch_save_writes(tmp_path):
    files.write(tmp_path / "a.pth", MADE, {"made": "by", "us": "é\n"})
    loaded = independent_load(tmp_path / "a.pth")
    assert type(loaded) is collections.OrderedDict and list(loaded) == list(MADE)
    same(loaded, MADE)
    assert loaded.__dict__ == {"regvit_metadata": {"made": "by", "us": "é\n"}}
    weights = files.read(tmp_path / "a.pth")
    same(weights.state, MADE)
    assert weights.metadata == {"made": "by", "us": "é\n"}
    # The same opcodes as PyTorch's own file, so its restricted unpickler knows them.
    ours, theirs = (
        {opcode.name for opcode, _, _ in pickletools.genops(zipfile.ZipFile(path).read(member))}
        for path, member in [
            (tmp_path / "a.pth", "archive/data.pkl"),
            (GOLDEN / "torch_training.pth", "torch_training/data.pkl"),
        ]
    )
    assert ours - theirs <= {"BININT"}


def test_torch_reads_a_written_pth(tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra [parity]")
    files.write(tmp_path / "a.pth", MADE)
    for mapped in (False, True):
        loaded = torch.load(tmp_path / "a.pth", weights_only=True, mmap=mapped)
        half = loaded.pop("bfloat16")
        same({n: t.numpy() for n, t in loaded.items()}, {n: a for n, a in MADE.items() if n != "bfloat16"})
        np.testing.assert_array_equal(half.float().numpy(), [0, 1, 100])


def test_written_tensors_are_aligned_and_the_bytes_repeat(tmp_path):
    files.write(tmp_path / "a.pth", MADE)
    files.write(tmp_path / "b.pth", MADE)
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()
    members = archive.Archive(archive.map_file(tmp_path / "a.pth"), "a").members.values()
    assert len(members) == len(MADE) + 3 and all(member.start % 64 == 0 for member in members)


def test_files_over_4_gib_have_wide_sizes(tmp_path, monkeypatch):
    """With the limit brought down, every size and place is written and read in 64 bits."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    files.write(tmp_path / "a.pth", MADE)
    data = (tmp_path / "a.pth").read_bytes()
    assert b"PK\6\6" in data and data.count(b"\xff" * 8) > len(MADE)
    same(files.read(tmp_path / "a.pth").state, MADE)
    members = archive.Archive(archive.map_file(tmp_path / "a.pth"), "a").members.values()
    assert all(member.start % 64 == 0 for member in members)


def test_a_dtype_that_torch_lacks_is_refused_and_the_old_file_stays(tmp_path):
    files.write(tmp_path / "a.pth", {"w": N})
    with pytest.raises(WeightsError, match="uint16"):
        files.write(tmp_path / "a.pth", {"w": N, "v": np.zeros(2, np.uint16)})
    same(files.read(tmp_path / "a.pth").state, {"w": N})
    assert os.listdir(tmp_path) == ["a.pth"]


def test_the_golden_files_are_found_by_content_not_by_name(tmp_path):
    for file in ("torch_zip.pth", "torch_legacy.pth"):
        shutil.copy(GOLDEN / file, tmp_path / "model.bin")
        same(files.read(tmp_path / "model.bin").state, MADE)
