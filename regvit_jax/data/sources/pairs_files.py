"""The files of one side of `pairs:`: below a folder, or those that a path with * matches; and what {split} may be."""

import glob
import os
import re

from regvit_jax.data.sources.folder import EXTENSIONS, few, listing, visible

SPLIT = "{split}"


def files_of(side: str) -> tuple[str, dict[tuple[str, ...], str]]:
    """(folder, {what names it: file below that folder}) of a folder, by the names without extension, or of a path with
    *, by what each * matches.

    Raises:
      FileNotFoundError: if there is no such folder, or no image in it.
      ValueError: if two files have the same name but for the extension.
    """
    root, names = _globbed(side) if "*" in side else _below(side)
    if not names:
        raise FileNotFoundError(f"{side}: no file there ends in {' '.join(sorted(EXTENSIONS))}")
    files = {}
    for key, name in names:
        if key in files:
            raise ValueError(
                f"{root}: {files[key]} and {name} have one name: remove one, or name files of one kind, as {root}/*.png"
            )
        files[key] = name
    return root, files


def splits_of(first: str, second: str) -> list[str]:
    """What stands for {split} so that both sides are there.

    Raises:
      ValueError: if a side has no {split}, or not in the name of a folder.
      FileNotFoundError: if there is none.
    """
    for side in (first, second):
        folders = side.split("/")[: -1 if "*" in os.path.basename(side) else None]
        if SPLIT not in side or not any(SPLIT in folder for folder in folders):
            raise ValueError(
                f"pairs: both paths hold {SPLIT} in the name of a folder, or none does (/d/{SPLIT},/d/{SPLIT}annot); "
                f"got {first},{second}"
            )
    parts = first.split("/")
    place = next(number for number, part in enumerate(parts) if SPLIT in part)
    if "*" in "/".join(parts[: place + 1]):
        raise ValueError(f"{first}: put {SPLIT} before the first *")
    above = "/".join(parts[:place]) or "/"
    if not os.path.isdir(above):
        raise FileNotFoundError(f"{above} is no folder (looking for the splits of {first})")
    shape = re.compile(r"([\w\-]+)".join(map(re.escape, parts[place].split(SPLIT, 1))).replace(re.escape(SPLIT), r"\1"))
    names = [found[1] for name in visible(above)[0] if (found := shape.fullmatch(name))]
    there = [name for name in names if all(_there(side.replace(SPLIT, name)) for side in (first, second))]
    if not there:
        raise FileNotFoundError(
            f"no split: {above} holds {few(visible(above)[0]) or 'no folder'}, and none of them stands for {SPLIT} in "
            f"{first} and {second} both"
        )
    return there


def _there(side):
    return next(glob.iglob(_escaped(side)), None) is not None


def _escaped(side):
    """The path for `glob`, in which only * is special."""
    return "*".join(map(glob.escape, side.split("*")))


def _globbed(side):
    if "**" in side:
        raise ValueError(f"{side}: write one * for each folder, or name the folder: all below it is read")
    fixed = side.split("*")[0]
    root = os.path.dirname(fixed)
    shape = re.compile("([^/]*)".join(map(re.escape, side.split("*"))))
    files = sorted(path for path in glob.glob(_escaped(side)) if os.path.isfile(path))
    return root, [(shape.fullmatch(path).groups(), os.path.relpath(path, root)) for path in files]


def _below(side):
    if not os.path.isdir(side):
        raise FileNotFoundError(f"{side} is no folder: name a folder, or files by a * in their names")
    return side, [((os.path.splitext(name)[0],), name) for name in sorted(listing(side)[0])]
