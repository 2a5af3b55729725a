""".pth and .pt files without PyTorch: the zip format of today and the older one of a row of pickles, and writing them.

Sources of the format: PyTorch's documentation ("Serialization semantics") and files written by torch 2.13.
"""

import math
import struct
import zipfile
from collections.abc import Iterator, Mapping
from typing import BinaryIO

import ml_dtypes
import numpy as np

from regvit_jax.convert import pickles
from regvit_jax.convert.archive import Archive, WeightsError
from regvit_jax.convert.pickles import Storage, Tensor

LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
LEGACY_START = b"\x80\x02\x8a\x0a" + LEGACY_MAGIC.to_bytes(10, "little")
MAX_PICKLE = 64 << 20  # bytes of data.pkl; that of a ViT-g is 60 kB
ALIGNMENT = 64  # of a storage in a written file, as PyTorch does it

_PLAIN = "float64 float32 float16 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool complex64 complex128".split()
DTYPES = {name: np.dtype(name) for name in _PLAIN} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
_STORAGE_OF = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


class TorchFile:
    """A checkpoint: what its pickle describes (`root`), and the numbers of those tensors that are asked for.

    Args:
      data: the whole file.
      where: what error messages call it.

    Raises:
      WeightsError: if it is damaged or is no data.
    """

    def __init__(self, data: memoryview, where: str):
        self._where = where
        self._big = False
        self._bytes: dict[tuple[str, int], np.ndarray] = {}  # {(key, item size): (nbytes,) uint8, native order}
        self._runs: dict[str, memoryview] = {}  # of the older format: storage by key
        self._archive = None
        if bytes(data[: len(LEGACY_START)]) == LEGACY_START:
            self.root = self._open_legacy(data)
        else:
            self._archive = Archive(data, where)
            self.root = self._open_zip(self._archive)

    def array(self, tensor: Tensor, name: str) -> np.ndarray:
        """The read-only array of a tensor: a view of the file where alignment and byte order allow.

        Raises:
          WeightsError: if the tensor reaches outside its storage, the storage has another size than declared, or the
            dtype has no counterpart.
        """
        if tensor.dtype not in DTYPES:
            raise self._bad(f"{name} is {tensor.dtype}, which cannot be read: save it as float32, float16 or bfloat16")
        dtype = DTYPES[tensor.dtype]
        if math.prod(size or 1 for size in tensor.shape) > 1 << 48:
            raise self._bad(f"{name} declares the impossible shape {tensor.shape}")
        if not math.prod(tensor.shape):
            return _read_only(np.empty(tensor.shape, dtype))
        content = self._storage(tensor, dtype, name)
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride, strict=True)) + 1
        if tensor.offset + reach > len(content):
            raise self._bad(
                f"{name} reaches to element {tensor.offset + reach} of a storage of {len(content)}: the file is "
                "damaged or lies"
            )
        strides = [0 if n == 1 else s * dtype.itemsize for n, s in zip(tensor.shape, tensor.stride, strict=True)]
        # NumPy checks the same bounds again.
        return np.ndarray(tensor.shape, dtype, content, tensor.offset * dtype.itemsize, strides)

    def _storage(self, tensor: Tensor, dtype: np.dtype, name: str) -> np.ndarray:
        """(n,) of the tensor's dtype."""
        storage = tensor.storage
        if storage.dtype not in ("bytes", tensor.dtype):
            raise self._bad(f"{name} reads a storage of {storage.dtype} as {tensor.dtype}")
        raw = self._raw(storage.key, dtype)
        if storage.numel * (1 if storage.dtype == "bytes" else dtype.itemsize) != len(raw):
            raise self._bad(
                f"{name}: storage {storage.key[:40]!r} has {len(raw)} bytes and declares {storage.numel} items"
            )
        content = raw[: len(raw) // dtype.itemsize * dtype.itemsize].view(dtype)
        if storage.view is not None:
            content = content[storage.view[0] :][: storage.view[1]]
        # Any other byte in a bool is undefined behaviour to whoever computes with it.
        if dtype.kind == "b" and content.view(np.uint8).max(initial=0) > 1:
            raise self._bad(f"{name} is bool and holds other bytes than 0 and 1")
        return content

    def _raw(self, key: str, dtype: np.dtype) -> np.ndarray:
        unit = dtype.itemsize // (2 if dtype.kind == "c" else 1)
        if (key, unit) not in self._bytes:
            if self._archive is None and key not in self._runs:
                raise self._bad(f"storage {key[:40]!r} is missing")
            run = self._archive.read(f"{self._prefix}/data/{key}") if self._archive else self._runs[key]
            raw = np.frombuffer(run, np.uint8)
            if self._big and unit > 1:
                raw = raw[: len(raw) // unit * unit].view(f"u{unit}").byteswap().view(np.uint8)
            elif raw.ctypes.data % dtype.itemsize:
                raw = raw.copy()
            self._bytes[key, unit] = _read_only(raw)
        return self._bytes[key, unit]

    def _open_zip(self, archive: Archive):
        pickled = [name for name in archive.members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickled) != 1:
            raise self._bad("this zip archive is no PyTorch file: it has no data.pkl, or several")
        self._prefix = pickled[0].removesuffix("/data.pkl")
        if f"{self._prefix}/constants.pkl" in archive.members:
            raise self._bad("this is a TorchScript program: save its state_dict() with torch.save instead")
        packed = [m.name for m in archive.members.values() if m.method != 0]
        if packed:
            raise self._bad(f"member {packed[0][:80]!r} is compressed, which torch.save never does: save it again")
        if f"{self._prefix}/byteorder" in archive.members:
            order = bytes(archive.read(f"{self._prefix}/byteorder")[:16])
            if order not in (b"little", b"big"):
                raise self._bad(f"its byte order is {order!r}")
            self._big = order == b"big"
        return self._load(archive.read(pickled[0]), 0)[0]

    def _open_legacy(self, data: memoryview):
        at = 0
        for expected in (LEGACY_MAGIC, LEGACY_PROTOCOL):
            value, at = self._load(data, at)
            if value != expected:
                raise self._bad("its header is damaged")
        system, at = self._load(data, at)
        if not isinstance(system, dict) or type(system.get("little_endian")) is not bool:
            raise self._bad("its header does not say the byte order")
        self._big = not system["little_endian"]
        root, at = self._load(data, at)
        keys, at = self._load(data, at)
        if type(keys) is not list or len(set(map(type, keys)) - {str}) or len(set(keys)) != len(keys):
            raise self._bad("its list of storages is damaged")
        sizes = {storage.key: storage for storage in _storages(root)}
        order = "<" if not self._big else ">"
        for key in keys:
            # Only the pickle says how wide an item is, so a storage that no tensor uses cannot be skipped either.
            if key not in sizes or sizes[key].dtype not in DTYPES:
                raise self._bad(f"storage {key[:40]!r} belongs to no tensor that can be read")
            if at + 8 > len(data):
                raise self._bad("it is truncated")
            (numel,) = struct.unpack_from(f"{order}q", data, at)
            end = at + 8 + numel * DTYPES[sizes[key].dtype].itemsize
            if numel != sizes[key].numel or end > len(data):
                raise self._bad(f"storage {key[:40]!r} has {numel} items, not {sizes[key].numel}, or is truncated")
            self._runs[key] = data[at + 8 : end]
            at = end
        if at != len(data):
            raise self._bad(f"{len(data) - at} bytes follow the last storage")
        return root

    def _load(self, data: memoryview, at: int):
        try:
            return pickles.load(data[: at + MAX_PICKLE], at)
        except WeightsError as error:
            raise WeightsError(f"{self._where}: {error}") from error

    def _bad(self, what: str) -> WeightsError:
        return WeightsError(f"{self._where}: {what}")


def _storages(root) -> Iterator[Storage]:
    """Every storage below an object, however it is nested, each container once."""
    todo, seen = [root], set()
    while todo:
        value = todo.pop()
        if isinstance(value, Tensor):
            yield value.storage
        elif isinstance(value, Storage):
            yield value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            todo += value.values() if isinstance(value, dict) else value


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def dump_pth(file: BinaryIO, state: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes what `torch.save(OrderedDict(state), file)` would: `torch.load(file, weights_only=True)` reads it.

    Args:
      file: open for writing, seekable.
      state: {name: array}; order is kept. The same state gives the same bytes.
      metadata: attribute `regvit_metadata` of the OrderedDict, which `load_state_dict` ignores.

    Raises:
      WeightsError: for a dtype that PyTorch has no storage for.
    """
    arrays = {}
    for name, array in state.items():
        if array.dtype.name not in _STORAGE_OF:
            raise WeightsError(f"{name} is {array.dtype}: .pth takes {', '.join(_STORAGE_OF)}")
        arrays[name] = array
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, file, "data.pkl", [_pickled(arrays, metadata)])
        _add(archive, file, "byteorder", [b"little"])
        for i, array in enumerate(arrays.values()):
            _add(archive, file, f"data/{i}", [as_bytes(array)])
        _add(archive, file, "version", [b"3\n"])


def as_bytes(array: np.ndarray) -> np.ndarray:
    """(nbytes,) uint8: the array's bytes, C order, little-endian; a view where it is that already."""
    array = np.asarray(array, order="C")
    if array.dtype.byteorder == ">" or (array.dtype.byteorder == "=" and not np.little_endian):
        array = array.astype(array.dtype.newbyteorder("<"))
    return array.reshape(-1).view(np.uint8)


def _add(archive: zipfile.ZipFile, file: BinaryIO, name: str, parts: list) -> None:
    """One stored member, its data on a multiple of ALIGNMENT through padding in the extra field, as PyTorch does it."""
    info = zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0))
    info.file_size = sum(memoryview(part).nbytes for part in parts)
    wide = info.file_size * 1.05 > zipfile.ZIP64_LIMIT  # ZipFile.open decides by the same rule
    header = file.tell() + 30 + len(info.filename) + (20 if wide else 0) + 4
    info.extra = struct.pack("<2sH", b"FB", -header % ALIGNMENT) + b" " * (-header % ALIGNMENT)
    with archive.open(info, "w", force_zip64=wide) as member:
        for part in parts:
            member.write(part)


def _pickled(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """The pickle, protocol 2, of an OrderedDict of tensors. Written by hand: `pickle` would have to import torch."""
    out = [b"\x80\x02ccollections\nOrderedDict\n)R("]
    for i, (name, array) in enumerate(arrays.items()):
        strides, step = [], 1
        for size in reversed(array.shape):
            strides.insert(0, step)
            step *= size
        out += [_text(name), b"ctorch._utils\n_rebuild_tensor_v2\n(("]
        out += [_text("storage"), f"ctorch\n{_STORAGE_OF[array.dtype.name]}\n".encode()]
        out += [_text(str(i)), _text("cpu"), _integer(array.size), b"tQK\x00"]
        out += [b"(", *map(_integer, array.shape), b"t(", *map(_integer, strides), b"t"]
        out += [b"\x89ccollections\nOrderedDict\n)RtR"]
    out += [b"u"]
    if metadata:
        out += [b"}(", _text("regvit_metadata"), b"}("]
        out += [text for pair in sorted(metadata.items()) for text in map(_text, pair)]
        out += [b"uub"]
    return b"".join(out) + b"."


def _text(value: str) -> bytes:
    encoded = value.encode("utf-8")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x09" + struct.pack("<q", value) + b"\x00"
