"""Where the members of the samples lie in the shards of `tar:`, and their labels, which are read on the way.

Members whose names agree up to the first dot of the file name are a sample, wherever they are in their shard; what
follows the dot, in any case, says what a member is. See kept_index.py for where the index is kept.
"""

import functools
import hashlib
import json
import os

import numpy as np

from regvit_jax.data.sources import kept_index
from regvit_jax.data.sources.folder import few
from regvit_jax.data.sources.kept_index import Index, Plan
from regvit_jax.data.sources.tar_members import members

VERSION = 1
IMAGES = ("jpg", "jpeg", "png", "webp")
# Members that are read when a sample is: offset and size of each, (0, 0) where it has none.
FIELDS = ("image", "mask", "depth", "caption")
UNLABELLED, UNREADABLE = -1, -2
ROW = np.dtype(
    [
        ("file", "<i4"),
        ("label", "<i4"),
        *((name, "<i8") for name in FIELDS),
        *((f"{name}_size", "<i8") for name in FIELDS),
    ]
)


def indexed(root: str, files: list[str], kinds: dict[str, tuple[str, ...]], key: str, names: tuple[str, ...]) -> Index:
    """The index of the shards `files` in `root`, in the order of their members.

    Args:
      kinds: {field: what may follow the dot}; a sample has one of those of "image".
      key: the entry of .json members that is the label; "": .cls members are.
      names: classes, for labels that are written as names.

    Raises:
      ValueError: for a sample with several pictures.
    """
    told = hashlib.blake2b(json.dumps([files, kinds, key, names], sort_keys=True).encode(), digest_size=8).hexdigest()
    scan = functools.partial(_samples, kinds, key, {name: number for number, name in enumerate(names)})
    return kept_index.indexed(root, files, Plan("tar", VERSION, ROW, "file", scan, name=f"tar-{told}", unit="shards"))


def _samples(kinds, key, names, root, name):
    """(rows of ROW without the file, what is wrong with the shard or "")."""
    path = os.path.join(root, name)
    found, damage = members(path)
    samples, twice = {}, []
    for member, offset, size in found:
        folder, base = os.path.split(member)
        stem, dot, kind = base.partition(".")
        if not stem or not dot:
            continue
        sample = samples.setdefault(f"{folder}/{stem}".lstrip("./"), {})
        if kind.lower() in sample:
            twice.append(member)
        sample[kind.lower()] = offset, size
    if damage and samples and not next(iter(samples.values())).keys() <= samples[next(reversed(samples))].keys():
        samples.popitem()  # the damage took a part of it
    rows, bare, unlabelled = [], [], []
    with open(path, "rb") as file:
        for stem, sample in samples.items():
            pictures = [kind for kind in kinds["image"] if kind in sample]
            if len(pictures) > 1:
                raise ValueError(
                    f"{path}: the sample {stem} has several pictures, {', '.join(pictures)}: say which is the image by "
                    f"?image={pictures[0]}, and which is a map by ?mask={pictures[1]} or ?depth={pictures[1]}"
                )
            if not pictures:
                bare.append(f"{stem}.{{{','.join(sample)}}}")
                continue
            label, reason = _label(file.fileno(), sample, key, names)
            if reason:
                unlabelled.append(f"{stem}.{reason}")
            places = [_place(sample, kinds[field]) for field in FIELDS]
            rows.append((label, *(offset for offset, _ in places), *(size for _, size in places)))
    reasons = [f"it is damaged, what is readable of it is used: {damage}, after {len(rows)} samples"] if damage else []
    for what, which in (
        ("samples have no picture", bare),
        ("members are there twice, the last one counts", twice),
        ("samples have a label that cannot be used", unlabelled),
    ):
        if which:
            reasons.append(f"{len(which)} {what}: {few(which, 3)}")
    return rows, "; ".join(reasons)


def _place(sample, kinds):
    return next((sample[kind] for kind in kinds if kind in sample), (0, 0))


def _label(file, sample, key, names):
    """(label, "" or what is wrong with it)."""
    kind = "json" if key else "cls"
    if kind not in sample:
        return UNLABELLED, ""
    offset, size = sample[kind]
    written = os.pread(file, size, offset)
    try:
        value = json.loads(written)[key] if key else written.decode().strip()
    except (ValueError, KeyError, TypeError):
        return UNREADABLE, f"{kind} ({f'no JSON with {key!r}' if key else 'no text'})"
    if isinstance(value, str) and value in names:
        return names[value], ""
    try:
        number = int(value)
    except (ValueError, TypeError):
        return UNREADABLE, f"{kind} ({value!r} is no number and no class that a list names)"
    if isinstance(value, float | bool) or not UNLABELLED <= number < 2**31:
        return UNREADABLE, f"{kind} ({value!r} is no class number)"
    return number, ""
