"""Where the samples lie inside large files: found once, kept on disk, found again when a file changes; and how to read
them there.

    .regvit_index/[NAME/]             beside the files, or where they cannot be written below
                                      $REGVIT_CACHE/KIND/<hash of the folder> (by default ~/.cache/regvit_jax)
      index.json                      the files with size and time, damaged ones, the name of the next file
      samples_<fingerprint>.npy       the rows of all samples

Done in groups whose results are kept: a build that is killed goes on where it was. index.json is written last, and only
it counts. A damaged file keeps its readable samples and is named at every use.
"""

import concurrent.futures
import dataclasses
import fcntl
import functools
import hashlib
import json
import logging
import os
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from tqdm import tqdm

FOLDER = ".regvit_index"
GROUP = 64  # files between two savings
OPEN_FILES = 256
_THREADS = 8  # most of the time is waiting for the disk

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Index:
    """A finished index: the file of samples, their number, {file: reason} of damaged ones."""

    samples: str
    count: int
    fingerprint: str
    torn: dict[str, str]


def _as_they_are(rows):
    return rows, b""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the files of a kind of source are indexed.

    Attributes:
      kind: of the source; its folder in the cache.
      version: of the index; another one on disk is not used.
      row: dtype of a row; its field `number` is filled here with the place of the file in the list.
      scan: (folder, file name) -> (rows, without number; what is wrong with the file or "").
      name: of this index among others in the same folder: it tells apart whatever else the rows depend on.
      ordered: all rows -> (the rows to keep, bytes that belong into the fingerprint).
      group: files between two savings.
    """

    kind: str
    version: int
    row: np.dtype
    number: str
    scan: Callable[[str, str], tuple[Any, str]]
    name: str = ""
    ordered: Callable[[np.ndarray], tuple[np.ndarray, bytes]] = _as_they_are
    unit: str = "files"
    group: int = GROUP


def indexed(root: str, files: list[str], plan: Plan, build: Callable | None = None) -> Index:
    """The index of `files` (names in `root`, in their order), built now if there is none or a file has changed."""
    state = [[name, status.st_size, status.st_mtime_ns] for name, status in _statuses(root, files)]
    places = [pathlib.Path(root, FOLDER, plan.name), _cache(root, plan)]
    for place in places:
        if (found := _load(place, state, plan)) is not None:
            return found
    place = places[0] if os.access(root, os.W_OK) else places[1]
    place.mkdir(parents=True, exist_ok=True)
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (found := _load(place, state, plan)) is None:
            _log.info("%s: building an index of %d %s in %s, once", root, len(files), plan.unit, place)
            (build or build_index)(root, state, place, plan)
            found = _load(place, state, plan)
    return found


def samples(index: Index) -> np.ndarray:
    """(n,) rows, mapped into memory: one copy for all processes."""
    return _mapped(index.samples)


def read(path: str, index: Index, offset: int, size: int) -> bytes:
    """`size` bytes at `offset` of a file of `index`.

    Raises:
      OSError: if the file was cut or is gone since it was indexed; the loader replaces what cannot be read.
    """
    content = opened(path, index.samples).pread(size, offset)
    if len(content) < size:
        raise OSError(f"{path} ends {size - len(content)} bytes too early for the {size} bytes at byte {offset}")
    return content


class OpenFile:
    """Closes when nobody reads it any more: a thread may still do when the cache has dropped it."""

    def __init__(self, path):
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self, close=os.close):  # bound now: when Python ends, `os` may be gone first
        if hasattr(self, "fd"):
            close(self.fd)

    def pread(self, size: int, offset: int) -> bytes:
        """Up to `size` bytes at `offset`. Not by the number of the file alone: that keeps no file open."""
        return os.pread(self.fd, size, offset)


@functools.lru_cache(maxsize=OPEN_FILES)
def opened(path: str, stamp: str) -> OpenFile:
    """`stamp` (the index) is only a key: files that were indexed anew are opened anew."""
    return OpenFile(path)


def build_index(root: str, state: list, place: pathlib.Path, plan: Plan) -> None:
    """Writes the index of the files of `state` ([name, size, time]) into `place`."""
    parts = place / "unfinished"
    parts.mkdir(exist_ok=True)
    groups = [state[i : i + plan.group] for i in range(0, len(state), plan.group)]
    found, torn = [], {}
    every = 0.2 if sys.stderr.isatty() else 10.0
    with (
        concurrent.futures.ThreadPoolExecutor(_THREADS) as pool,
        tqdm(total=len(state), desc="index", unit=f" {plan.unit}", mininterval=every, maxinterval=every) as bar,
    ):
        for number, group in enumerate(groups):
            rows, reasons = _group(root, group, parts, pool, bar, plan)
            rows[plan.number] += number * plan.group
            found.append(rows)
            torn.update(reasons)
    ordered, more = plan.ordered(np.concatenate(found))
    names = json.dumps([[name, size] for name, size, _ in state])
    digest = hashlib.blake2b(names.encode(), digest_size=16)
    digest.update(more)
    digest.update(ordered.tobytes())
    fingerprint = digest.hexdigest()
    name = f"samples_{fingerprint[:16]}.npy"
    replace(place / name, lambda file: np.save(file, ordered))
    record = {"version": plan.version, "samples": name, "count": len(ordered), "fingerprint": fingerprint}
    record |= {"torn": torn, "archives": state}
    replace(place / "index.json", lambda file: file.write(json.dumps(record).encode()))
    shutil.rmtree(parts, ignore_errors=True)
    for old in place.glob("samples_*.npy"):
        if old.name != name:
            old.unlink(missing_ok=True)


def replace(path: pathlib.Path, write: Callable) -> None:
    """Writes a file whole or not at all; `write` gets it open for bytes."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    with unfinished.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


@functools.lru_cache(maxsize=8)
def _mapped(path):
    return np.load(path, mmap_mode="r")


def _cache(root, plan):
    cache = os.environ.get("REGVIT_CACHE") or os.path.expanduser("~/.cache/regvit_jax")
    return pathlib.Path(cache, plan.kind, hashlib.blake2b(os.fsencode(root), digest_size=8).hexdigest(), plan.name)


def _statuses(root, files):
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return list(zip(files, pool.map(os.stat, [os.path.join(root, name) for name in files]), strict=True))


def _load(place, state, plan):
    try:
        record = json.loads((place / "index.json").read_text())
    except (OSError, ValueError):
        return None
    path = place / record.get("samples", "")
    if record.get("version") != plan.version or record["archives"] != state or not path.is_file():
        return None
    return Index(str(path), record["count"], record["fingerprint"], record["torn"])


def _group(root, group, parts, pool, bar, plan):
    """(rows with numbers from 0, {file: reason}) of some files, from an earlier try or read now."""
    stamp = hashlib.blake2b(json.dumps(group).encode(), digest_size=16).hexdigest()
    path = parts / f"{stamp}.npz"
    if path.is_file():
        bar.update(len(group))
        with np.load(path) as kept:
            return kept["rows"], json.loads(str(kept["torn"]))
    found, torn = [], {}
    names = [name for name, _, _ in group]
    for number, (name, (rows, reason)) in enumerate(
        zip(names, pool.map(plan.scan, [root] * len(names), names), strict=True)
    ):
        rows = np.array(rows, [field for field in plan.row.descr if field[0] != plan.number])
        numbered = np.full(len(rows), number, plan.row)
        for field in rows.dtype.names:
            numbered[field] = rows[field]
        found.append(numbered)
        if reason:
            torn[name] = reason
        bar.update()
    rows = np.concatenate(found)
    replace(path, lambda file: np.savez(file, rows=rows, torn=json.dumps(torn)))
    return rows, torn
