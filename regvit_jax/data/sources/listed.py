"""list:PATH?train=FILE&test=FILE — images and their classes as text files list them, a split each: how many small
datasets come.

    cat/1.jpg 3            an image and its class, a number or a name, behind a blank, a tab or a comma
    1025794 Boeing 707     names of classes may have blanks; the ending of the image may be missing
    apple_pie/1005649      no class: the folder is the class

    list:/data/dtd?images=images&train=labels/train1.txt+labels/val1.txt&test=labels/test1.txt#test

Every option but `images`, the folder of the images, names a split and its lists, several joined by +; the first one is
meant without #. Paths are below PATH. Lines of several numbers (pets: class, species, breed) count the first.
Classes are numbered in their order, of all lists together; images come in a fixed random order, as in folder:.
"""

import hashlib
import os
import pathlib
import re

import numpy as np

from regvit_jax.data.sources.boxed import below, file_size
from regvit_jax.data.sources.folder import EXTENSIONS, Folder, few, is_image, packed, scattered

_NUMBERS = re.compile(r"\d+(\s+\d+)*")
_SEPARATOR = re.compile(r",|\s+")


def open(path: str, options: dict[str, str], split: str | None) -> "Listed":
    """The images of one split; without one, of the first.

    Raises:
      FileNotFoundError: if the folder, a list, or the first image is not there.
      ValueError: for a split that is not there, or a list that cannot be read; it names the line.
    """
    root = os.path.abspath(os.path.expanduser(path))
    lists = {name: files.split("+") for name, files in options.items() if name != "images"}
    if not lists:
        raise ValueError(f"list:{path} names no list: write list:{path}?train=train.txt&test=test.txt")
    if not path or not os.path.isdir(root):
        raise FileNotFoundError(f"list:{path}: {root} is no folder")
    split = split or next(iter(lists))
    if split not in lists:
        raise ValueError(f"list:{path} has no split {split!r}: it has {', '.join(lists)}")
    images = os.path.join(root, options["images"]) if "images" in options else root
    rows = {name: [row for file in files for row in _read(os.path.join(root, file))] for name, files in lists.items()}
    kinds = {kind for found in rows.values() for _, kind in found}
    classes = sorted(kinds, key=int) if all(kind.isdecimal() for kind in kinds) else sorted(kinds)
    return Listed(images, tuple(lists), split, tuple(classes), rows[split])


class Listed(Folder):
    """See the top of the file."""

    def __init__(self, root, splits, split, class_names, rows):
        self.root, self.splits, self.split, self.class_names = root, splits, split, class_names
        number = {kind: label for label, kind in enumerate(class_names)}
        ending = _ending(root, rows[0][0])
        rows = sorted(((name + ending, number[kind]) for name, kind in rows), key=lambda row: scattered(row[0]))
        self._files = packed([name for name, _ in rows], np.array([label for _, label in rows], np.int32))

    def _digest(self):
        digest = hashlib.blake2b(repr(self.class_names).encode(), digest_size=16)
        for index in range(len(self)):
            name = self.name(index)
            digest.update(f"{name}\0{file_size(os.path.join(self.root, name))}\0".encode("utf-8", "surrogateescape"))
        digest.update(self.labels.tobytes())
        return digest


def _read(path):
    """[(image, class)] of a list."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"list: no file {path}")
    rows = []
    for number, line in enumerate(pathlib.Path(path).read_text("utf-8-sig", "replace").splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, *rest = line.split("\t", 1) if "\t" in line else _SEPARATOR.split(line, maxsplit=1)
        kind = rest[0].strip() if rest else ""
        if _NUMBERS.fullmatch(kind):
            kind = kind.split()[0]
        try:
            name = below(name.lstrip("/"))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        kind = kind or os.path.dirname(name)
        if not kind:
            raise ValueError(
                f"{path}, line {number}: {few([line])!r} has no class: expected an image and its class, or an image in "
                f"the folder of its class"
            )
        rows.append((name, kind))
    if not rows:
        raise ValueError(f"{path} is empty: expected an image and its class a line")
    return rows


def _ending(root, name):
    """What the names of a list lack of those of the files: told by the first one."""
    if is_image(name) and os.path.isfile(os.path.join(root, name)):
        return ""
    for ending in sorted(EXTENSIONS, key=lambda ending: (ending != ".jpg", ending)):
        if os.path.isfile(os.path.join(root, name + ending)):
            return ending
    raise FileNotFoundError(
        f"{os.path.join(root, name)}, the first image of the list, is not there"
        + ("" if is_image(name) else ", with no ending of an image file either")
        + ": ?images=FOLDER says in which folder the images are"
    )
