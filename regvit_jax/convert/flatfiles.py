""".safetensors and .npz: files that are one flat {name: array}, read strictly from a mapped file, and written.

Source of the format: the README of huggingface/safetensors ("Format").
"""

import ast
import json
import math
import re
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from regvit_jax.convert.archive import Archive, WeightsError
from regvit_jax.convert.torchfiles import as_bytes

MAX_HEADER = 100_000_000  # bytes, as the format's own library allows
MAX_NPY_HEADER = 10_000
# An .npz may not inflate to more than this times its size, nor to more than this many bytes where that is more.
INFLATION, INFLATED = 16, 64 << 20
METADATA = "__metadata__"  # in safetensors by its format; in .npz an array of ours with JSON text as uint8

_CODES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": ml_dtypes.bfloat16,
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "?",
    "C64": "<c8",
}
DTYPES = {code: np.dtype(dtype) for code, dtype in _CODES.items()}
_CODE_OF = {dtype.name: code for code, dtype in DTYPES.items()}

Flat = tuple[dict[str, np.ndarray], dict[str, str]]  # arrays, metadata


def read_safetensors(data: memoryview, where: str) -> Flat:
    """The arrays, views of the file, and the metadata of a .safetensors file.

    Raises:
      WeightsError: if the header is too long, names a key twice, or its sizes do not cover the file exactly.
    """
    header, rest = _header(data, where)
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise WeightsError(f"{where}: {METADATA} is no table of texts")
    spans = sorted((_span(name, entry, where), name) for name, entry in header.items())
    state, at = {}, 0
    for (begin, end, code, shape), name in spans:
        if begin != at or end > len(rest):
            raise WeightsError(
                f"{where}: {name[:80]!r} lies at bytes {begin}-{end}, where {at} of {len(rest)} are taken: the file is "
                "truncated or lies"
            )
        at = end
        state[name] = _array(rest[begin:end], DTYPES[code], shape, f"{where}: {name[:80]!r}")
    if at != len(rest):
        raise WeightsError(f"{where}: {len(rest) - at} bytes belong to no array: the file is damaged")
    return {name: state[name] for name in header}, metadata


def _header(data: memoryview, where: str) -> tuple[dict[str, Any], memoryview]:
    if len(data) < 8:
        raise WeightsError(f"{where}: {len(data)} bytes are no .safetensors file")
    (length,) = struct.unpack_from("<Q", data)
    if length > MAX_HEADER or 8 + length > len(data):
        raise WeightsError(f"{where}: a header of {length} bytes in a file of {len(data)}: it is truncated or damaged")
    return parse_json(bytes(data[8 : 8 + length]), where), data[8 + length :]


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """A JSON object of a file that nobody vouches for.

    Raises:
      WeightsError: if it is no JSON object in UTF-8, names a key twice, or nests deeply.
    """

    def once(pairs):
        table = dict(pairs)
        if len(table) != len(pairs):
            raise WeightsError(f"{where}: a key is there twice")
        return table

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except WeightsError:
        raise
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{where}: this should be JSON and is not ({type(error).__name__})") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{where}: this should be a JSON object")
    return value


def _span(name: str, entry: Any, where: str) -> tuple[int, int, str, tuple[int, ...]]:
    """(first byte, end, dtype code, shape) of a header entry."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise WeightsError(f"{where}: the header's entry of {name[:80]!r} is not dtype, shape, data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise WeightsError(f"{where}: {name[:80]!r} is {str(code)[:20]}; only {', '.join(DTYPES)} are read")
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers) or len(offsets) != 2 or len(shape) > 16:
        raise WeightsError(f"{where}: {name[:80]!r} has a shape or offsets that are none")
    if math.prod(shape) * DTYPES[code].itemsize != offsets[1] - offsets[0]:
        raise WeightsError(
            f"{where}: {name[:80]!r} is {code} {str(shape)[:80]} in {offsets[1] - offsets[0]} bytes: that does not fit"
        )
    return offsets[0], offsets[1], code, tuple(shape)


def _array(content: memoryview, dtype: np.dtype, shape: tuple[int, ...], what: str) -> np.ndarray:
    """A read-only view; a copy where the numbers do not lie on a multiple of their size."""
    if math.prod(size or 1 for size in shape) > 1 << 48:
        raise WeightsError(f"{what} declares the impossible shape {shape}")
    array = np.frombuffer(content, np.uint8) if len(content) else np.empty(0, np.uint8)
    if dtype.kind == "b" and array.max(initial=0) > 1:
        raise WeightsError(f"{what} is bool and holds other bytes than 0 and 1")
    if array.ctypes.data % dtype.itemsize:
        array = array.copy()
    array = array.view(dtype).reshape(shape)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    array.flags.writeable = False
    return array


def dump_safetensors(file: BinaryIO, state: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a .safetensors file. The same state and metadata give the same bytes, whatever their order.

    Raises:
      WeightsError: for a dtype that the format does not have.
    """
    for name, array in state.items():
        if array.dtype.name not in _CODE_OF:
            raise WeightsError(f"{name} is {array.dtype}: .safetensors takes {', '.join(_CODE_OF)}")
    # Wide items first: then all of them lie on multiples of their size.
    names = sorted(state, key=lambda name: (-state[name].dtype.itemsize, name))
    header: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    for name in names:
        array = state[name]
        span = [at, at + array.nbytes]
        header[name] = {"dtype": _CODE_OF[array.dtype.name], "shape": list(array.shape), "data_offsets": span}
        at += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in names:
        file.write(as_bytes(state[name]))


def read_npz(data: memoryview, where: str) -> Flat:
    """The arrays (views of the file where it is not compressed) and the metadata of an .npz file.

    Raises:
      WeightsError: if it holds anything but plain arrays, or inflates to very much more than its size.
    """
    archive = Archive(data, where)
    inflated = sum(member.size for member in archive.members.values() if member.method)
    if inflated > max(INFLATION * len(data), INFLATED):
        raise WeightsError(f"{where}: {len(data)} bytes that inflate to {inflated} are no weights")
    state: dict[str, np.ndarray] = {}
    for member in archive.members:
        name = member.removesuffix(".npy")
        if name == member:
            raise WeightsError(f"{where}: {member[:80]!r} in it is no .npy")
        state[name] = _npy(archive.read(member), f"{where}: {name[:80]!r}")
    if METADATA not in state:
        return state, {}
    sidecar = parse_json(state.pop(METADATA).tobytes(), f"{where}: {METADATA}")
    metadata, halves = sidecar.get("metadata"), sidecar.get("bfloat16")
    good = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if not good or not isinstance(halves, list) or not all(state[n].dtype == np.uint16 for n in halves if n in state):
        raise WeightsError(f"{where}: {METADATA} is not what dump_npz leaves")
    return {n: a.view(ml_dtypes.bfloat16) if n in halves else a for n, a in state.items()}, metadata


def _npy(content: memoryview, what: str) -> np.ndarray:
    """The array of an .npy. Its header is a Python literal, whose names and calls `literal_eval` does not accept."""
    start = bytes(content[:12])
    wide = start[6:7] in (b"\2", b"\3")
    if start[:6] != b"\x93NUMPY" or len(start) < 12 or not (wide or start[6:7] == b"\1"):
        raise WeightsError(f"{what} is no .npy array of version 1 to 3")
    length = int.from_bytes(start[8:12] if wide else start[8:10], "little")
    text, rest = content[10 + 2 * wide :][:length], content[10 + 2 * wide + length :]
    try:
        if length > MAX_NPY_HEADER:
            raise ValueError("too long")
        header = ast.literal_eval(bytes(text).decode("latin-1").strip())
        descr, fortran, shape = header.pop("descr"), header.pop("fortran_order"), header.pop("shape")
    except (ValueError, SyntaxError, TypeError, KeyError, AttributeError, MemoryError, RecursionError) as error:
        raise WeightsError(f"{what} has no header of an .npy array ({type(error).__name__})") from error
    if not isinstance(descr, str) or not re.fullmatch(r"[<>|=]?[fiubc]\d+", descr):
        hint = "; write bfloat16 with convert.files.write, or as float32" if descr in ("|V2", "<V2") else ""
        raise WeightsError(f"{what} is of dtype {str(descr)[:40]}, not of plain numbers{hint}")
    try:
        dtype = np.dtype(descr)
    except TypeError as error:
        raise WeightsError(f"{what} is of the unknown dtype {descr[:40]}") from error
    sizes = shape if isinstance(shape, tuple) else (None,)
    if header or type(fortran) is not bool or not all(type(n) is int and 0 <= n < 1 << 62 for n in sizes):
        raise WeightsError(f"{what} has a damaged header")
    if len(shape) > 16 or math.prod(shape) * dtype.itemsize != len(rest):
        raise WeightsError(f"{what} is {dtype} {str(shape)[:80]} in {len(rest)} bytes: that does not fit")
    return _array(rest, dtype, shape[::-1], what).T if fortran else _array(rest, dtype, shape, what)


def dump_npz(file: BinaryIO, state: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes an uncompressed .npz. bfloat16, which NumPy's format loses, goes as uint16 and is named in the sidecar.

    Raises:
      WeightsError: for a name or dtype that the format cannot carry.
    """
    halves = sorted(name for name, array in state.items() if array.dtype.name == "bfloat16")
    arrays = {name: array.view(np.uint16) if name in halves else array for name, array in state.items()}
    if METADATA in state or any(array.dtype.kind not in "fiubc" for array in arrays.values()):
        raise WeightsError(f".npz takes arrays of plain numbers, under other names than {METADATA}")
    if metadata or halves:
        text = json.dumps({"metadata": dict(sorted(metadata.items())), "bfloat16": halves})
        arrays[METADATA] = np.frombuffer(text.encode(), np.uint8)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            info = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            with archive.open(info, "w", force_zip64=array.nbytes > 1 << 30) as member:
                np.lib.format.write_array(member, array, version=(1, 0), allow_pickle=False)
