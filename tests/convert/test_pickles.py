"""Pickles as data: attacks are refused and never run, objects never built, lies about sizes and archives seen."""

import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from regvit_jax.convert import files, pickles
from regvit_jax.convert.files import WeightsError

GOLDEN = Path(__file__).parents[1] / "golden"


def same(state, expected):
    assert set(state) == set(expected)
    for name, array in expected.items():
        assert state[name].dtype.name == np.asarray(array).dtype.name, name
        np.testing.assert_array_equal(state[name], array, err_msg=name, strict=True)


# An assembler for pickles: values become their opcodes, bytes are opcodes already.


def op(value) -> bytes:
    match value:
        case bytes():
            return value
        case bool():
            return b"\x88" if value else b"\x89"
        case None:
            return b"N"
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case int():
            long = pickle.encode_long(value)
            return b"\x8a" + bytes([len(long)]) + long
        case tuple():
            return b"(" + b"".join(map(op, value)) + b"t"
        case list():
            return b"](" + b"".join(map(op, value)) + b"e"
        case dict():
            return b"}(" + b"".join(op(x) for pair in value.items() for x in pair) + b"u"


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def call(function: bytes, *arguments) -> bytes:
    return function + op(arguments) + b"R"


REBUILD, ORDERED = name("torch._utils", "_rebuild_tensor_v2"), call(name("collections", "OrderedDict"))


def storage(key="0", kind="FloatStorage", numel=4) -> bytes:
    return op(("storage", name("torch", kind), key, "cpu", numel)) + b"Q"


def tensor(offset=0, shape=(4,), stride=(1,), **of) -> bytes:
    return call(REBUILD, storage(**of), offset, shape, stride, False, ORDERED)


def save(path: Path, root, storages=None, more=None, compression=zipfile.ZIP_STORED) -> Path:
    """A file as torch.save leaves it, from opcodes."""
    storages = {"0": np.arange(4, dtype=np.float32)} if storages is None else storages
    with zipfile.ZipFile(path, "w", compression) as out:
        out.writestr("x/data.pkl", b"\x80\x02" + op(root) + b".")
        for key, array in storages.items():
            out.writestr(f"x/data/{key}", np.asarray(array).tobytes())
        for member, content in (more or {}).items():
            out.writestr(f"x/{member}", content)
    return path


class Reduce:
    """Pickled as the call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


ATTACKS = {
    "os.system": lambda run: pickle.dumps(Reduce(os.system, run)),
    "os.system, protocol 0": lambda run: pickle.dumps(Reduce(os.system, run), 0),
    "os.system, protocol 5": lambda run: pickle.dumps({"w": Reduce(os.system, run)}, 5),
    "eval": lambda run: pickle.dumps(Reduce(eval, f"__import__('os').system({run!r})"), 2),
    "exec": lambda run: pickle.dumps([Reduce(exec, f"import os; os.system({run!r})")], 2),
    "getattr of a module": lambda run: call(call(name("builtins", "getattr"), name("os", "path"), "os"), run) + b".",
    "nested in a tensor": lambda run: call(REBUILD, call(name("posix", "system"), run), 0, (1,), (1,), False, ORDERED),
    "name from the stack": lambda run: op("os") + op("system") + b"\x93" + op((run,)) + b"R.",
    "name through the memo": lambda run: op("os") + b"q\x07" + op("system") + b"h\x070\x93" + op((run,)) + b"R.",
    "name of python 2": lambda run: call(name("__builtin__", "apply"), name("os", "system"), (run,)) + b".",
    "blank in the module": lambda run: b"cos system\nx\n" + op((run,)) + b"R.",
    "escape in the module": lambda run: b"c\\x6fs\nsystem\n" + op((run,)) + b"R.",
    "a module below": lambda run: call(name("os.path", "genericpath.os.system"), run) + b".",
    "subprocess": lambda run: call(name("subprocess", "Popen"), run, -1, None, None, None, None, None, True) + b".",
    "pickle in pickle": lambda run: call(name("_pickle", "loads"), run) + b".",
    "torch.hub": lambda run: call(name("torch.hub", "load"), run) + b".",
    "a runner in numpy": lambda run: call(name("numpy.testing._private.utils", "runstring"), run, {}) + b".",
    "a function of no known module": lambda run: call(name("helpful", "setup"), run) + b".",
    "object.__new__ of a command": lambda run: name("os", "system") + op((run,)) + b"\x81.",
    "INST": lambda run: b"(" + op(run) + b"ios\nsystem\n.",
    "OBJ": lambda run: b"(" + name("os", "system") + op(run) + b"o.",
    "EXT1": lambda run: b"\x82\x01" + op((run,)) + b"R.",
    "PERSID": lambda run: b"P" + run.encode() + b"\n.",
    "another persistent id": lambda run: op(("module", run)) + b"Q.",
    "call of a tensor": lambda run: tensor() + op((run,)) + b"R.",
    "call of a text": lambda run: op("os.system") + op((run,)) + b"R.",
    "state of a tensor": lambda run: tensor() + op({"x": run}) + b"b.",
    "buffer outside": lambda run: b"\x97.",
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_an_attack_is_refused_and_not_run(tmp_path, attack, legacy):
    canary = tmp_path / "canary"
    payload = ATTACKS[attack](f"touch {canary}")
    path = tmp_path / "evil.pth"
    if legacy:
        whole = (GOLDEN / "torch_legacy.pth").read_bytes()
        path.write_bytes(whole[:21] + payload)  # behind the magic number and the protocol version
    else:
        save(path, payload.removesuffix(b"."))
    with pytest.raises(WeightsError):
        files.read(path)
    assert not canary.exists()


def test_the_attacks_would_run_in_python_s_own_pickle(tmp_path):
    """Otherwise the tests above show nothing."""
    canary = tmp_path / "canary"
    pickle.loads(ATTACKS["name through the memo"](f"touch {canary}"))
    assert canary.exists()


class Trap:
    """An object that does harm when it is built."""

    def __new__(cls, *_):
        raise AssertionError("built")

    def __setstate__(self, state):
        raise AssertionError("state set")


def test_objects_of_classes_are_noted_and_never_built(tmp_path):
    trap = name(Trap.__module__, "Trap")
    built = trap + op(()) + b"\x81" + op({"a": 1}) + b"b"
    root = {"model": {"w": tensor(), "odd": built}, "args": call(trap, 1), "cls": trap, "n": [1, (2, b"N")], "x": None}
    weights = files.read(save(tmp_path / "a.pth", root))
    assert list(weights.state) == ["w"]
    noted = f"object of class {Trap.__module__}.Trap"
    assert weights.dropped == {
        "odd": noted,
        "args": noted,
        "cls": f"name {Trap.__module__}.Trap",
        "n": "list of 2",
        "x": "nothing",
    }


LIES = {
    "past the end": dict(shape=(5,)),
    "offset past the end": dict(offset=1),
    "stride past the end": dict(shape=(2, 2), stride=(3, 1)),
    "huge stride": dict(shape=(2,), stride=(1 << 61,)),
    "negative size": dict(shape=(-4,)),
    "negative stride": dict(shape=(2,), stride=(-1,)),
    "negative offset": dict(offset=-1),
    "sizes without strides": dict(shape=(4,), stride=()),
    "a terabyte from four numbers": dict(shape=(1 << 20, 1 << 18), stride=(0, 0)),
    "impossible and empty": dict(shape=(0, 1 << 61)),
    "17 axes": dict(shape=(1,) * 17, stride=(1,) * 17),
    "storage of another size": dict(numel=3),
    "storage that is missing": dict(key="1"),
    "storage outside the archive": dict(key="../../../etc/passwd"),
    "size that is a truth": dict(shape=(True,)),
    "size of 500 digits": dict(shape=(10**500,)),
    "an unknown dtype": dict(kind="QInt8Storage"),
    "other dtype, other size": dict(kind="DoubleStorage"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_tensor_that_lies_is_refused_before_anything_is_allocated(tmp_path, lie):
    path = save(tmp_path / "a.pth", {"w": tensor(**LIES[lie])})
    tracemalloc.start()
    with pytest.raises(WeightsError):
        files.read(path)
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()


def test_bytes_that_are_no_truth_values_are_refused(tmp_path):
    path = save(tmp_path / "a.pth", {"w": tensor(kind="BoolStorage")}, {"0": np.array([0, 1, 2, 1], np.uint8)})
    with pytest.raises(WeightsError, match="bool"):
        files.read(path)


def test_bombs_of_nested_containers_stay_small(tmp_path):
    double = b"]q\x00" + b"0](h\x00h\x00eq\x00" * 200  # 2**200 leaves, if someone walked them
    tuples = b")q\x00" + b"0(h\x00h\x00tq\x00" * 200
    hashed = b"}" + tuples + b"K\x01s"  # hashing such a tuple takes for ever
    itself = b"}q\x01" + op("me") + b"h\x01s"
    root = {"model": {"w": tensor()}, "laughs": double, "key": hashed, "itself": itself}
    assert list(files.read(save(tmp_path / "a.pth", root)).state) == ["w"]


def test_a_pickle_may_not_be_endless(monkeypatch, tmp_path):
    monkeypatch.setattr(pickles, "MAX_OPCODES", 1000)
    with pytest.raises(WeightsError, match="opcodes"):
        files.read(save(tmp_path / "a.pth", b"]" + b"0]" * 1000))
    with pytest.raises(WeightsError, match="damaged|no end|end"):
        files.read(save(tmp_path / "b.pth", b"\x8d" + struct.pack("<Q", 1 << 62) + b"x"))  # a text of 4 EiB
    with pytest.raises(WeightsError, match="without an end"):
        files.read(save(tmp_path / "c.pth", b"c" + b"a" * 5000))


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("FloatStorage", np.arange(4, dtype=np.float32)),
        ("ShortStorage", np.array([1, -2, 300, 4], np.int16)),
        ("BFloat16Storage", np.array([1, 2, 3, 4], ml_dtypes.bfloat16)),
        ("ComplexFloatStorage", np.array([1 + 2j, 3, 4, 5j], np.complex64)),
        ("ByteStorage", np.arange(4, dtype=np.uint8)),
    ],
)
def test_big_endian_machines_numbers_are_turned(tmp_path, kind, values):
    unit = values.dtype.itemsize // (2 if values.dtype.kind == "c" else 1)
    turned = values.view(f"u{unit}").byteswap()
    path = save(tmp_path / "a.pth", {"w": tensor(kind=kind)}, {"0": turned}, {"byteorder": b"big"})
    same(files.read(path).state, {"w": values})


def test_a_storage_that_is_part_of_another_one(tmp_path):
    """Old files name the storage of a view by (key of the view, first element, size)."""
    part = op(("storage", name("torch", "FloatStorage"), "0", "cpu", 4, ("view", 1, 2))) + b"Q"
    path = save(tmp_path / "a.pth", {"w": call(REBUILD, part, 1, (1,), (1,), False, ORDERED)})
    same(files.read(path).state, {"w": np.array([2], np.float32)})
    path = save(tmp_path / "b.pth", {"w": call(REBUILD, part, 1, (2,), (1,), False, ORDERED)})
    with pytest.raises(WeightsError, match="reaches"):
        files.read(path)


def test_one_untyped_storage_serves_tensors_of_two_dtypes(tmp_path):
    untyped = op(("storage", name("torch.storage", "UntypedStorage"), "0", "cpu", 8)) + b"Q"
    rebuild = name("torch._utils", "_rebuild_tensor_v3")
    root = {
        "a": call(rebuild, untyped, 1, (1,), (1,), False, ORDERED, name("torch", "uint32")),
        "b": call(rebuild, untyped, 0, (4,), (1,), False, ORDERED, name("torch", "uint16")),
    }
    path = save(tmp_path / "a.pth", root, {"0": np.array([1, 2, 3, 4], np.uint16)})
    same(files.read(path).state, {"a": np.array([3 + 4 * 65536], np.uint32), "b": np.array([1, 2, 3, 4], np.uint16)})


def twice(path: Path):
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as out:
        out.writestr("x/data/0", b"again")


def with_member(member: str):
    def change(path: Path):
        with zipfile.ZipFile(path, "a") as out:
            out.writestr(member, b"")

    return change


def patched(find: bytes, skip: int, value: bytes):
    """Changes bytes behind the last place of `find`: of the last entry of the table of contents, or of the end."""

    def change(path: Path):
        data = bytearray(path.read_bytes())
        at = data.rindex(find) + skip
        data[at : at + len(value)] = value
        path.write_bytes(data)

    return change


ARCHIVES = {
    "a member twice": twice,
    "a name with ..": with_member("x/../../y"),
    "an absolute name": with_member("/etc/x"),
    "two pickles": with_member("y/data.pkl"),
    "a program": with_member("x/constants.pkl"),
    "encrypted": patched(b"PK\1\2", 8, b"\1"),
    "other compression": patched(b"PK\1\2", 10, b"\x63"),
    "two sizes": patched(b"PK\1\2", 24, struct.pack("<L", 5)),
    "a size past the end": patched(b"PK\1\2", 20, struct.pack("<LL", 1 << 30, 1 << 30)),
    "an offset past the end": patched(b"PK\1\2", 42, struct.pack("<L", 1 << 31)),
    "an offset elsewhere": patched(b"PK\1\2", 42, b"\0\0\0\0"),
    "more members than there are": patched(b"PK\5\6", 8, b"\x09\0\x09\0"),
    "fewer members than there are": patched(b"PK\5\6", 8, b"\x01\0\x01\0"),
    "a million members": patched(b"PK\5\6", 8, b"\xff\xff\xff\xff"),
    "contents elsewhere": patched(b"PK\5\6", 16, b"\0\0\0\0"),
    "bytes in front": lambda path: path.write_bytes(b"PK\3\4" + path.read_bytes()),
    "bytes behind": lambda path: path.write_bytes(path.read_bytes() + b"x"),
}


@pytest.mark.parametrize("fault", ARCHIVES)
def test_a_zip_that_lies_is_refused(tmp_path, fault):
    path = save(tmp_path / "a.pth", {"w": tensor()})
    assert list(files.read(path).state) == ["w"]
    ARCHIVES[fault](path)
    with pytest.raises(WeightsError):
        files.read(path)


def test_compressed_tensors_are_refused_with_the_remedy(tmp_path):
    zeros = {"0": np.zeros(1 << 20, np.float32)}
    path = save(
        tmp_path / "a.pth", {"w": tensor(shape=(1 << 20,), numel=1 << 20)}, zeros, compression=zipfile.ZIP_DEFLATED
    )
    with pytest.raises(WeightsError, match="torch.save never does"):
        files.read(path)


def test_a_file_without_checksums_is_read(tmp_path):
    """`torch.serialization.set_crc32_options(False)` writes 0 for each."""
    path = save(tmp_path / "a.pth", {"w": tensor()})
    data = bytearray(path.read_bytes())
    at = -1
    while (at := data.find(b"PK\1\2", at + 1)) >= 0:
        data[at + 16 : at + 20] = b"\0\0\0\0"
    path.write_bytes(data)
    same(files.read(path).state, {"w": np.arange(4, dtype=np.float32)})
