"""Weights files of every kind to {name: array} and back: `read` looks at the bytes, `write` at the extension.

    weights = read("dinov2_vits14_reg4_pretrain.pth")
    weights.state["register_tokens"].shape
    write("copy.safetensors", weights.state, weights.metadata)

Nothing in a file is executed, sizes are checked before anything is allocated, and arrays stay views of the file.
"""

import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from regvit_jax.convert.archive import WeightsError, map_file
from regvit_jax.convert.flatfiles import dump_npz, dump_safetensors, parse_json, read_npz, read_safetensors
from regvit_jax.convert.pickles import Global, Opaque, Table, Tensor
from regvit_jax.convert.torchfiles import DTYPES, LEGACY_START, TorchFile, dump_pth

__all__ = ["Weights", "WeightsError", "read", "sha256_of", "write", "write_npz", "write_pth", "write_safetensors"]

StateDict = Mapping[str, np.ndarray]

# All arrays together may be this much larger than the file: tied weights are stored once. More is a lie.
EXPANSION, SPARE = 8, 1 << 20
MAX_JSON = 16 << 20
CONFIG = "config.json"
# The files of a Hugging Face folder, in the order in which its own library looks for them.
FOLDER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
)
EXTENSIONS = (".safetensors", ".pth", ".pt", ".bin", ".npz")
_SHARD = re.compile(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)")
# Where training programs keep the weights that are meant to be used.
CONTAINERS = ("teacher", "model", "state_dict")


@dataclasses.dataclass(frozen=True)
class Weights:
    """What a weights file holds.

    Attributes:
      state: {name: array}, torch shapes, read-only, most of them views of the file; bfloat16 as ml_dtypes.bfloat16.
      config: the config.json of a Hugging Face folder, else None.
      metadata: {text: text} that was written along: safetensors' own, or what `write` puts into .pth and .npz.
      dropped: {key: what it is} of everything in the file that is not in `state`.
      container: key below which the state dict was found, "" for the file itself.
      path: as given to `read`.
      files: the files that were read, without config.json.
    """

    state: dict[str, np.ndarray]
    config: dict[str, Any] | None
    metadata: dict[str, str]
    dropped: dict[str, str]
    container: str
    path: pathlib.Path
    files: tuple[pathlib.Path, ...]

    @functools.cached_property
    def sha256(self) -> str:
        """Hex digest of the file; of several, the digest of the lines that `sha256sum` prints for them."""
        if len(self.files) == 1:
            return sha256_of(self.files[0])
        lines = (f"{sha256_of(file)}  {file.name}\n" for file in self.files)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def read(path: str | os.PathLike, container: str | None = None) -> Weights:
    """The state dict in a file or folder.

    Args:
      path: .pth, .pt, .bin, .safetensors, .npz, a .index.json of shards, or a folder with one of these.
      container: where in a training checkpoint the state dict is ("student", "optimizer.state" …). None: "teacher",
        "model" or "state_dict" where there is one of them, else the only table of tensors.

    Raises:
      FileNotFoundError: if there is no such file; says what was looked for.
      WeightsError: if the file is truncated, lies, is unsafe, or holds several state dicts and none was chosen.
    """
    path = pathlib.Path(path).expanduser()
    file = _in_folder(path) if path.is_dir() else path
    if file.name.endswith(".index.json"):
        parts, files = _shards(file)
    else:
        parts, files = [_read_file(file, container)], (file,)
    state, metadata, dropped = {}, {}, {}
    for part in parts:
        state |= part.state
        metadata |= part.metadata
        dropped |= part.dropped
    named_as_there = file.name in FOLDER or _SHARD.fullmatch(file.name)
    config = _json(file.parent / CONFIG) if named_as_there and (file.parent / CONFIG).is_file() else None
    return Weights(state, config, metadata, dropped, parts[0].container, path, files)


def write(path: str | os.PathLike, state: StateDict, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a state dict in the format of the extension, atomically: a reader sees the old file or the new one.

    Args:
      path: .safetensors, .npz, or .pth, .pt and .bin, which `torch.load(path, weights_only=True)` reads.
      state: {name: array}; the same one gives the same bytes.
      metadata: {text: text} to keep along.

    Raises:
      WeightsError: for another extension, or a name or dtype that the format cannot carry.
    """
    suffix = pathlib.Path(path).suffix
    writers = {".safetensors": dump_safetensors, ".npz": dump_npz} | dict.fromkeys((".pth", ".pt", ".bin"), dump_pth)
    if suffix not in writers:
        raise WeightsError(f"{path}: {suffix or 'no extension'} is none of {', '.join(EXTENSIONS)}")
    _write(writers[suffix], path, state, metadata)


def write_safetensors(path: str | os.PathLike, state: StateDict, metadata: Mapping[str, str] | None = None) -> None:
    """As `write`, whatever the extension. Order plays no role in the bytes."""
    _write(dump_safetensors, path, state, metadata)


def write_pth(path: str | os.PathLike, state: StateDict, metadata: Mapping[str, str] | None = None) -> None:
    """As `write`, whatever the extension."""
    _write(dump_pth, path, state, metadata)


def write_npz(path: str | os.PathLike, state: StateDict, metadata: Mapping[str, str] | None = None) -> None:
    """As `write`, whatever the extension."""
    _write(dump_npz, path, state, metadata)


def _write(dump, path: str | os.PathLike, state: StateDict, metadata: Mapping[str, str] | None) -> None:
    path = pathlib.Path(path).expanduser()
    arrays = {name: np.asarray(array) for name, array in state.items()}
    for name in [*arrays, *(metadata or {}), *(metadata or {}).values()]:
        if not isinstance(name, str) or not _is_text(name):
            raise WeightsError(f"{path}: {name!r} is no text that a file can carry")
    with _replacing(path) as temporary, temporary.open("wb") as file:
        dump(file, arrays, metadata or {})


def sha256_of(path: str | os.PathLike) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclasses.dataclass
class _Part:
    """What one file gives to Weights."""

    state: dict[str, np.ndarray]
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    dropped: dict[str, str] = dataclasses.field(default_factory=dict)
    container: str = ""


def _read_file(file: pathlib.Path, container: str | None) -> _Part:
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist: expected a folder or one of {', '.join(EXTENSIONS)}")
    data, where = map_file(file), str(file)
    start = bytes(data[:16])
    zipped = start.startswith(b"PK\3\4")
    if start.startswith(LEGACY_START) or (zipped and file.suffix != ".npz"):
        return _from_torch(TorchFile(data, where), len(data), container, where)
    if container:
        raise WeightsError(f"{file}: this kind of file has no containers to choose {container!r} from")
    if zipped:
        part = _Part(*read_npz(data, where))
    elif start[8:9] == b"{":
        part = _Part(*read_safetensors(data, where))
    else:
        raise WeightsError(
            f"{file}: these bytes are no .pth, .safetensors or .npz file ({start[:8]!r}). Files of PyTorch before 0.4 "
            "and bare pickles are not read: load and torch.save them once with PyTorch; web pages and Git LFS pointers "
            "are downloads gone wrong"
        )
    return part


def _from_torch(checkpoint: TorchFile, size: int, container: str | None, where: str) -> _Part:
    table, container = _choose(checkpoint.root, container, where)
    dropped = {}
    if container:
        top = container.split(".")[0]
        dropped = {str(k): describe(v) for k, v in checkpoint.root.items() if k != top and isinstance(k, str)}
    tensors = {}
    for key, value in table.items():
        if isinstance(value, Tensor) and isinstance(key, str) and _is_text(key):
            tensors[key] = value
        else:
            dropped[key if isinstance(key, str) else f"({describe(key)})"] = describe(value)
    sizes = {key: math.prod(t.shape) * DTYPES[t.dtype].itemsize for key, t in tensors.items() if t.dtype in DTYPES}
    _check_total(sizes, size, where)
    state = {key: checkpoint.array(tensor, repr(key[:80])) for key, tensor in tensors.items()}
    kept = table.attributes.get("regvit_metadata", {})
    metadata = {k: v for k, v in kept.items() if type(k) is type(v) is str} if isinstance(kept, Table) else {}
    return _Part(state, metadata, dropped, container)


def _choose(root: Any, container: str | None, where: str) -> tuple[Table, str]:
    """The state dict of a checkpoint and the key it lies below."""
    if not isinstance(root, Table):
        raise WeightsError(
            f"{where} holds no state dict but one {describe(root)}: where it was written, save model.state_dict()"
        )
    found = {}
    todo = [("", root, 0)]
    for name, table, depth in todo:
        if any(isinstance(value, Tensor) for value in table.values()):
            found[name] = table
        if depth < 2 and len(todo) < 1000:
            inside = ((k, v) for k, v in table.items() if isinstance(k, str) and isinstance(v, Table))
            todo += [(f"{name}.{k}" if name else k, v, depth + 1) for k, v in inside]
    choices = ", ".join(repr(name) if name else "'' (the top)" for name in list(found)[:12])
    if container is not None:
        if container not in found:
            raise WeightsError(f"{where}: no tensors in container {container!r}; there are: {choices or 'none'}")
        return found[container], container
    usual = [name for name in CONTAINERS if name in found]
    if len(usual) == 1 or len(found) == 1:
        name = usual[0] if usual else next(iter(found))
        return found[name], name
    if not found:
        raise WeightsError(f"{where} holds no tensors: {describe(root)}, keys {[str(k)[:40] for k in list(root)[:8]]}")
    raise WeightsError(f"{where} holds several state dicts: pass container= one of {choices}")


def describe(value: Any) -> str:
    """What an object of a checkpoint is, in a few words."""
    if isinstance(value, Tensor):
        return f"tensor {value.dtype} {value.shape}"
    if isinstance(value, Opaque):
        return f"object of class {value.of[:100]}"
    if isinstance(value, Global):
        return f"name {str(value)[:100]}"
    if isinstance(value, dict | list | tuple):
        kind = "dict" if isinstance(value, dict) else type(value).__name__
        return f"{kind} of {len(value)}"
    return "nothing" if value is None else type(value).__name__


def _check_total(sizes: Mapping[str, int], available: int, where: str) -> None:
    total = sum(sizes.values())
    if total > EXPANSION * available + SPARE:
        largest = max(sizes, key=lambda name: sizes[name])
        raise WeightsError(
            f"{where}: its arrays claim {total} bytes ({largest[:80]!r}: {sizes[largest]}), the file has {available}"
        )


def _in_folder(folder: pathlib.Path) -> pathlib.Path:
    """The one file of a folder to read."""
    for name in FOLDER:
        if (folder / name).is_file():
            return folder / name
    others = sorted(p for p in folder.iterdir() if p.suffix in EXTENSIONS and p.name[0] != "." and p.is_file())
    if len(others) == 1:
        return others[0]
    if others:
        names = ", ".join(p.name for p in others[:8])
        raise WeightsError(f"{folder} holds several weights files ({names}): name the one that is meant")
    raise FileNotFoundError(f"{folder} holds no weights: expected {', '.join(FOLDER[:4])} or one of {EXTENSIONS}")


def _shards(index: pathlib.Path) -> tuple[list[_Part], tuple[pathlib.Path, ...]]:
    """The parts of a model that is cut into several files, each with exactly the keys the index gives it."""
    places = _json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise WeightsError(f"{index} has no weight_map of file names")
    parts, files = [], []
    for name in sorted(set(places.values())):
        if name != os.path.basename(name) or name in (".", "..", "") or "\\" in name or not name.endswith(EXTENSIONS):
            raise WeightsError(f"{index} names {name[:80]!r}, which is no weights file in the same folder")
        file = index.parent / name
        if not file.is_file():
            raise FileNotFoundError(f"{index} needs {file}, which is missing: copy all of the model's files")
        part = _read_file(file, None)
        wanted = {key for key, place in places.items() if place == name}
        wrong = sorted(wanted ^ part.state.keys())
        if wrong:
            side = "lacks" if wrong[0] in wanted else "also has"
            raise WeightsError(f"{file} {side} {wrong[0][:80]!r}, against {index.name} ({len(wrong)} such keys)")
        parts.append(part)
        files.append(file)
    return parts, tuple(files)


def _json(path: pathlib.Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_JSON:
        raise WeightsError(f"{path} is no configuration: {path.stat().st_size} bytes")
    return parse_json(path.read_bytes(), str(path))


def _is_text(value: str) -> bool:
    """Whether it can be written down: a damaged pickle may hold half a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextlib.contextmanager
def _replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary file beside `path` that takes its place if all goes well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
