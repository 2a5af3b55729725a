"""Where the images lie inside the archives of `imagenet22k:`; built once, and again when an archive changes.

    .regvit_index/                    beside the archives, or where they cannot be written below
                                      $REGVIT_CACHE/imagenet22k (by default ~/.cache/regvit_jax)
      index.json                      the archives with size and time, damaged ones, the name of the next file
      samples_<fingerprint>.npy       label, offset and size of every image, in the source's fixed random order
      labels.json                     {wnid: label}

Done in groups whose results are kept: a build that is killed goes on where it was. index.json is written last, and only
it counts. A damaged archive keeps its readable members and is named at every use.
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
import tarfile

import numpy as np
from tqdm import tqdm

from regvit_jax.data.sources.folder import is_image, scattered

VERSION = 1
FOLDER = ".regvit_index"
SAMPLE = np.dtype([("label", "<i4"), ("offset", "<i8"), ("size", "<i8")])
_KEYED = np.dtype([("key", ">u8"), *SAMPLE.descr])
_GROUP = 64  # archives between two savings
_THREADS = 8  # most of the time is waiting for the disk

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Index:
    """A finished index: the file of samples, their number, {archive: reason} of damaged ones."""

    samples: str
    count: int
    fingerprint: str
    torn: dict[str, str]


def indexed(root: str, archives: list[str]) -> Index:
    """The index of `archives` (sorted file names) in `root`, built now if there is none or an archive has changed."""
    state = [[name, status.st_size, status.st_mtime_ns] for name, status in _statuses(root, archives)]
    place = _cache(root) if not os.access(root, os.W_OK) else pathlib.Path(root, FOLDER)
    for there in (pathlib.Path(root, FOLDER), _cache(root)):
        if (found := _load(there, state)) is not None:
            return found
    place.mkdir(parents=True, exist_ok=True)
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (found := _load(place, state)) is None:
            _log.info("%s: building an index of %d archives in %s, once", root, len(archives), place)
            _build(root, state, place)
            found = _load(place, state)
    return found


def samples(index: Index) -> np.ndarray:
    """(n,) of SAMPLE, mapped into memory."""
    return _mapped(index.samples)


@functools.lru_cache(maxsize=8)
def _mapped(path):
    return np.load(path, mmap_mode="r")


def _cache(root):
    cache = os.environ.get("REGVIT_CACHE") or os.path.expanduser("~/.cache/regvit_jax")
    return pathlib.Path(cache, "imagenet22k", hashlib.blake2b(os.fsencode(root), digest_size=8).hexdigest())


def _statuses(root, archives):
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return list(zip(archives, pool.map(os.stat, [os.path.join(root, name) for name in archives]), strict=True))


def _load(place, state):
    try:
        record = json.loads((place / "index.json").read_text())
    except (OSError, ValueError):
        return None
    path = place / record.get("samples", "")
    if record.get("version") != VERSION or record["archives"] != state or not path.is_file():
        return None
    return Index(str(path), record["count"], record["fingerprint"], record["torn"])


def _build(root, state, place):
    parts = place / "unfinished"
    parts.mkdir(exist_ok=True)
    groups = [state[i : i + _GROUP] for i in range(0, len(state), _GROUP)]
    found, torn = [], {}
    every = 0.2 if sys.stderr.isatty() else 10.0
    with (
        concurrent.futures.ThreadPoolExecutor(_THREADS) as pool,
        tqdm(total=len(state), desc="index", unit=" archives", mininterval=every, maxinterval=every) as bar,
    ):
        for number, group in enumerate(groups):
            rows, reasons = _group(root, group, parts, pool, bar)
            rows["label"] += number * _GROUP
            found.append(rows)
            torn.update(reasons)
    rows = np.concatenate(found)
    rows = rows[np.argsort(rows["key"], kind="stable")]
    ordered = np.empty(len(rows), SAMPLE)
    for field in SAMPLE.names:
        ordered[field] = rows[field]
    names = json.dumps([[name, size] for name, size, _ in state])
    digest = hashlib.blake2b(names.encode(), digest_size=16)
    digest.update(rows["key"].tobytes())
    digest.update(ordered.tobytes())
    fingerprint = digest.hexdigest()
    name = f"samples_{fingerprint[:16]}.npy"
    _replace(place / name, lambda file: np.save(file, ordered))
    labels = {archive.removesuffix(".tar"): label for label, (archive, _, _) in enumerate(state)}
    _replace(place / "labels.json", lambda file: file.write(json.dumps(labels, indent=1).encode()))
    record = {"version": VERSION, "samples": name, "count": len(ordered), "fingerprint": fingerprint}
    record |= {"torn": torn, "archives": state}
    _replace(place / "index.json", lambda file: file.write(json.dumps(record).encode()))
    shutil.rmtree(parts, ignore_errors=True)
    for old in place.glob("samples_*.npy"):
        if old.name != name:
            old.unlink(missing_ok=True)


def _group(root, group, parts, pool, bar):
    """(rows of _KEYED with labels from 0, {archive: reason}) of some archives, from an earlier try or read now."""
    stamp = hashlib.blake2b(json.dumps(group).encode(), digest_size=16).hexdigest()
    path = parts / f"{stamp}.npz"
    if path.is_file():
        bar.update(len(group))
        with np.load(path) as kept:
            return kept["rows"], json.loads(str(kept["torn"]))
    rows, torn = [], {}
    names = [name for name, _, _ in group]
    read = pool.map(_members, [root] * len(names), names)
    for label, (name, (members, reason)) in enumerate(zip(names, read, strict=True)):
        rows += [(key, label, offset, size) for key, offset, size in members]
        if reason:
            torn[name] = reason
        bar.update()
    rows = np.array(rows, _KEYED)
    _replace(path, lambda file: np.savez(file, rows=rows, torn=json.dumps(torn)))
    return rows, torn


def _members(root, name):
    """([(key of the order, offset, size)] of the images in an archive, what is wrong with it or "")."""
    wnid, members, end = name.removesuffix(".tar"), [], 0
    path = os.path.join(root, name)
    size = os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                end = member.offset_data + member.size
                base = os.path.basename(member.name)
                if end > size:
                    return members, f"{base} is cut after {size - member.offset_data} of {member.size} bytes"
                if member.isreg() and member.size and is_image(base) and not base.startswith("."):
                    key = int.from_bytes(scattered(f"{wnid}/{base}"), "big")
                    members.append((key, member.offset_data, member.size))
    except (tarfile.TarError, EOFError, OSError) as error:
        return members, f"{error}, after {len(members)} images"
    # A whole archive ends in blocks of zeros. Where a download stopped between two members there are none, and where a
    # header is damaged something else is there: tarfile takes both for the end.
    with open(path, "rb") as file:
        file.seek(-(-end // 512) * 512)
        mark = file.read(512)
    return members, "" if mark == bytes(512) else f"it ends without an end mark, after {len(members)} images"


def _replace(path, write):
    unfinished = path.with_name(f".{path.name}.unfinished")
    with unfinished.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
