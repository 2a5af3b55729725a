"""Shards: a folder, a glob or a brace pattern -> files, by split, and the class names that lie beside them.

    /d                          all shards in /d, or in /d/train, /d/val, …
    /d/train-*.tar              /d/train-{000000..000146}.tar              /d/{train,val}/*.tar

A split is a word of the file name (train-00017-of-01024, imagenet-val-003.tar) or the folder of the file.
"""

import glob
import itertools
import os
import re
from collections.abc import Callable

from regvit_jax.data.sources.folder import OTHER_NAMES, TRAIN_NAMES, few, visible

CLASS_LISTS = ("classes.txt", "classnames.txt")
_SPLITS = (*TRAIN_NAMES, *OTHER_NAMES)
_BRACES = re.compile(r"\{([^{}]*)\}")


def shards(path: str, is_shard: Callable[[str], bool], kind: str, layout: str) -> tuple[str, dict[str, list[str]]]:
    """(common folder, {split, train first: shards relative to it, sorted}); the split is "" where names tell none.

    Args:
      is_shard: of a file name in a folder; what a pattern names needs not pass.
      layout: how the files should look; it ends messages.

    Raises:
      FileNotFoundError: if there is no shard, or one that the braces name is not there.
      ValueError: if names of some shards tell a split, and of others not.
    """
    given = os.path.abspath(os.path.expanduser(path))
    if path and os.path.isdir(given):
        folders, images, others = visible(given)
        names = [os.path.join(given, name) for name in others if is_shard(name)]
        for folder in () if names else [name for name in folders if name.lower() in _SPLITS]:
            inside = os.path.join(given, folder)
            names += [os.path.join(inside, name) for name in visible(inside)[2] if is_shard(name)]
        if not names:
            there = few(folders + images + others) or "nothing"
            raise FileNotFoundError(f"{kind}:{path}: no shard is in {given}: it holds {there}. {layout}")
        root = given
    else:
        names = _matching(path, given, kind, layout)
        root = os.path.commonpath([os.path.dirname(name) for name in names])
    found = {}
    for name in sorted(os.path.relpath(name, root) for name in names):
        found.setdefault(_split(name), []).append(name)
    if "" in found and len(found) > 1:
        others = ", ".join(sorted(split for split in found if split))
        raise ValueError(
            f"{kind}:{path}: beside shards of {others} there are some of no split, {few(found[''])}: name those that "
            f"belong together, such as {kind}:{os.path.join(root, os.path.dirname(found[''][0]), 'train-*')}"
        )
    return root, {split: found[split] for split in sorted(found, key=lambda split: ("", *_SPLITS).index(split))}


def chosen(split: str | None, found: dict[str, list[str]], text: str) -> str:
    """The key of `found` that `split` names; the first where it is None.

    Raises:
      ValueError: if there is no such split.
    """
    if split is None:
        return next(iter(found))
    if split in found:
        return split
    if "" in found:
        raise ValueError(f"{text} has no split {split!r}, no file name tells one; '#[:80%]' takes a part of the whole")
    raise ValueError(f"{text} has no split {split!r}: it has {', '.join(found)}")


def class_names(root: str, asked: str | None, kind: str) -> tuple[str, ...]:
    """The classes: numbers up to `asked` (the value of ?classes=), else the lines of a list in `root`, else none.

    Raises:
      ValueError: if `asked` is no number, or a list has an empty line between others.
    """
    if asked is not None:
        if not asked.isdecimal() or int(asked) < 1:
            raise ValueError(f"{kind}: ?classes= is the number of classes, got {asked!r}")
        return tuple(map(str, range(int(asked))))
    places = [root, os.path.dirname(root)] if os.path.basename(root).lower() in _SPLITS else [root]
    for place, name in itertools.product(places, CLASS_LISTS):
        path = os.path.join(place, name)
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                names = tuple(line.strip() for line in file.read().rstrip().split("\n"))
            if "" in names:
                raise ValueError(f"{path}, line {names.index('') + 1} is empty: one class a line, in label order")
            return names
    return ()


def expanded(pattern: str) -> list[str]:
    """`pattern` with each {a,b} and {000..146} spelled out."""
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if bounds is None:
        parts = found[1].split(",")
    else:
        first, last = int(bounds[1]), int(bounds[2])
        width = len(bounds[1]) if bounds[1].startswith("0") else 0
        parts = [str(number).zfill(width) for number in range(first, last + 1)]
    rest = expanded(pattern[found.end() :])
    return [pattern[: found.start()] + part + end for part in parts for end in rest]


def _matching(path, given, kind, layout):
    names, missing = set(), []
    for pattern in expanded(given):
        matching = [name for name in glob.glob(pattern) if os.path.isfile(name)] if glob.has_magic(pattern) else []
        if os.path.isfile(pattern):
            matching = [pattern]
        names.update(matching)
        if not matching:
            missing.append(pattern)
    if missing or not names:
        what = f"{few(missing, 3)} ({len(missing)} in all)" if len(missing) > 1 else few(missing)
        raise FileNotFoundError(f"{kind}:{path}: {what or given} is not there. {layout}")
    return names


def _split(name):
    """The split that the name of a shard tells, or ""."""
    folder, base = os.path.split(name)
    words = [word for word in re.split(r"[^a-z]+", base.lower()) if word in _SPLITS]
    above = os.path.basename(folder).lower()
    return words[-1] if words else (above if above in _SPLITS else "")
