"""Where features are kept, so that none is computed twice: in memory while `shared()` lasts, and in a folder of files.

A feature is known by a hash of all that it depends on: weights, architecture, dtype, preparation of images, what is
asked for, and the samples. So nothing has to be thrown away when something changes.
"""

import contextlib
import contextvars
import dataclasses
import hashlib
import logging
import os
import pathlib
import zipfile
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from regvit_jax import sharding
from regvit_jax.data.sources import Source, open_source
from regvit_jax.models.model import Model
from regvit_jax.trees import named

# Part of every key. Raise it when the same inputs give other features: old files are then not found any more.
_FORMAT = 1

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Kept:
    """One feature of the M samples of a source that could be read: features (M, D) float32, labels (M,) int32, index
    (M,) int64 (their places in the source, rising)."""

    features: np.ndarray
    labels: np.ndarray
    index: np.ndarray


class Shared:
    """What `shared` keeps. Models are held, so that no other one gets the id of a model whose hash is known.

    `unreadable` counts, for each source string, the samples that the evaluator at work had to leave out.
    """

    def __init__(self):
        self.kept: dict[str, Kept] = {}
        self.sources: dict[str, Source] = {}
        self.hashes: dict[int, tuple[Model, str]] = {}
        self.unreadable: dict[str, int] = {}


_shared: contextvars.ContextVar[Shared | None] = contextvars.ContextVar("shared", default=None)


@contextlib.contextmanager
def shared() -> Iterator[None]:
    """Inside, features are kept in memory and computed once; at the end they are dropped. May be nested."""
    if is_shared():
        yield
        return
    token = _shared.set(Shared())
    try:
        yield
    finally:
        _shared.reset(token)


def is_shared() -> bool:
    """Whether `shared` is in force here."""
    return _shared.get() is not None


def source_of(spec: str) -> Source:
    """`open_source(spec)`, opened once inside `shared`: the list of files and their fingerprint may take a while."""
    memory = _shared.get()
    if memory is None:
        return open_source(spec)
    if spec not in memory.sources:
        memory.sources[spec] = open_source(spec)
    return memory.sources[spec]


def counted() -> dict[str, int]:
    """{source string: samples left out}, what is written there is read by others inside `shared`."""
    memory = _shared.get()
    return {} if memory is None else memory.unreadable


def keys_of(model: Model, source: Source, outputs: tuple[str, ...], norm: bool) -> dict[str, str]:
    """{output: the key of what it depends on}. All processes must call it."""
    # Every field that is no array counts, also one that a later version adds; of `run` only the dtype changes numbers.
    fields = [field.name for field in dataclasses.fields(model) if field.name not in ("params", "run")]
    described = [f"{name}={getattr(model, name)!r}" for name in fields]
    common = [_FORMAT, hash_of(model), *described, model.run.dtype, norm, source.fingerprint, len(source)]

    def digest(output):
        return hashlib.blake2b("\n".join(map(str, [*common, output])).encode(), digest_size=20).hexdigest()

    return {output: digest(output) for output in outputs}


def find(keys: Mapping[str, str], cache_dir: str, n: int) -> dict[str, Kept]:
    """{output: Kept} of those in memory or, as n intact rows, in `cache_dir`; the same outputs on every process."""
    memory = _shared.get()
    found = {}
    for output, key in keys.items():
        if memory is not None and key in memory.kept:
            found[output] = memory.kept[key]
        elif cache_dir and (kept := _read(_file(cache_dir, key), n)) is not None:
            found[output] = kept
    if cache_dir and jax.process_count() > 1:
        # A disk need not be one that all see.
        everywhere = multihost_utils.process_allgather(np.array([output in found for output in keys])).all(axis=0)
        found = {output: found[output] for output, here in zip(keys, everywhere, strict=True) if here}
    return found


def keep(keys: Mapping[str, str], values: Mapping[str, Kept], cache_dir: str, n: int) -> None:
    """Puts values where `find` looks; files are written whole or not at all, by process 0.

    No file is written where a sample is missing: what cannot be read today may be there tomorrow.
    """
    memory = _shared.get()
    for output, kept in values.items():
        if memory is not None:
            memory.kept[keys[output]] = kept
        path = _file(cache_dir, keys[output])
        whole = len(kept.index) == n
        if cache_dir and whole and jax.process_index() == 0 and not path.is_file():
            _write(path, kept)


def weights_hash(model: Model) -> str:
    """Hex digest of every array of the model, its name, shape and dtype. All processes must call it."""
    digest = hashlib.blake2b(digest_size=16)
    for name, leaf in named(model).items():
        array = np.ascontiguousarray(sharding.gather(leaf))
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def hash_of(model: Model) -> str:
    """`weights_hash`, computed once inside `shared`. All processes must call it."""
    memory = _shared.get()
    if memory is None:
        return weights_hash(model)
    if id(model) not in memory.hashes:
        memory.hashes[id(model)] = model, weights_hash(model)
    return memory.hashes[id(model)][1]


def _file(cache_dir, key):
    return pathlib.Path(cache_dir).expanduser() / f"features-{key}.npz"


def _read(path, n):
    if not path.is_file():
        return None
    try:
        # The archive carries checksums: reading it whole finds a damaged one.
        with np.load(path, allow_pickle=False) as archive:
            kept = Kept(archive["features"], archive["labels"], np.arange(n))
        if len(kept.features) != n or len(kept.labels) != n:
            raise ValueError(f"{len(kept.features)} rows for {n} samples")
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        _log.warning("%s cannot be used (%s): the features are computed again", path, error)
        if jax.process_index() == 0:
            path.unlink(missing_ok=True)
        return None
    _log.info("features read from %s", path)
    return kept


def _write(path, kept):
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            np.savez(file, features=kept.features, labels=kept.labels)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
