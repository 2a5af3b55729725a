"""Images with boxes, as voc:, coco: and boxes: hold them: a few arrays, quick to pickle; a sample is a slice."""

import dataclasses
import functools
import hashlib
import math
import os
from collections.abc import Iterable, Sequence

import numpy as np

from regvit_jax.data.decode import DecodeError
from regvit_jax.data.sources import Source
from regvit_jax.data.sources.folder import few, packed

# Coordinates are kept as float32, which counts pixels exactly up to here.
_LARGEST = 2.0**24


@dataclasses.dataclass(frozen=True)
class Object:
    """One object of an image: xyxy in pixels from 0, the far edges exclusive; the name or number of its class."""

    box: tuple[float, float, float, float]
    kind: str | int | None = None
    difficult: bool = False
    truncated: bool = False


@dataclasses.dataclass(frozen=True)
class Objects:
    """The m objects of n images: those of image i are the rows from ends[i - 1] to ends[i].

    boxes (m, 4) float32, ends (n,) int64; labels (m,) int32, difficult and truncated (m,) bool, each None where that is
    not known.
    """

    boxes: np.ndarray
    ends: np.ndarray
    labels: np.ndarray | None = None
    difficult: np.ndarray | None = None
    truncated: np.ndarray | None = None

    def rows(self, index: int) -> slice:
        return slice(int(self.ends[index - 1]) if index else 0, int(self.ends[index]))

    def sample(self, index: int) -> dict[str, np.ndarray]:
        """The fields of image `index`, arrays of their own."""
        rows, fields = self.rows(index), {}
        fields["boxes"] = self.boxes[rows].copy()
        if self.labels is not None:
            fields["box_labels"] = self.labels[rows].astype(np.int64)
        for key in ("difficult", "truncated"):
            if getattr(self, key) is not None:
                fields[key] = getattr(self, key)[rows].copy()
        return fields

    def take(self, images: Sequence[int]) -> "Objects":
        """The objects of the chosen images, in that order."""
        rows = [np.arange(rows.start, rows.stop) for rows in map(self.rows, images)]
        chosen = np.concatenate(rows)
        ends = np.cumsum([len(each) for each in rows], dtype=np.int64)
        fields = (self.labels, self.difficult, self.truncated)
        return Objects(self.boxes[chosen], ends, *(None if array is None else array[chosen] for array in fields))

    def __len__(self) -> int:
        return len(self.ends)


def pack(images: Iterable[Sequence[Object]], number: dict[str | int, int] | None, flags: bool) -> Objects:
    """The objects of each image in turn; `number` gives each class its label (None: no labels), `flags` keeps whether
    objects are difficult or truncated."""
    images = [list(objects) for objects in images]
    flat = [found for objects in images for found in objects]
    return Objects(
        np.array([found.box for found in flat], np.float32).reshape(-1, 4),
        np.cumsum([len(objects) for objects in images], dtype=np.int64),
        None if number is None else np.array([number[found.kind] for found in flat], np.int32),
        np.array([found.difficult for found in flat], bool) if flags else None,
        np.array([found.truncated for found in flat], bool) if flags else None,
    )


class Boxed(Source):
    """Image files with their objects, all in memory but the pixels.

    Args:
      root: the folder of the images.
      names: their paths below it, in order.
      bad: {index: why its objects are unknown}: such a sample raises DecodeError, as an unreadable image does, so that
        `regvit data check` lists it and a loader takes another.
    """

    def __init__(
        self,
        root: str,
        names: Sequence[str],
        objects: Objects,
        box_names: tuple[str, ...] = (),
        splits: tuple[str, ...] = (),
        bad: dict[int, str] | None = None,
    ):
        self.root, self.objects, self.box_names, self.splits = root, objects, box_names, splits
        self._names, self._ends, _ = packed(list(names), np.zeros(0))
        self._bad = bad or {}

    def __len__(self):
        return len(self._ends)

    def __getitem__(self, index):
        image = {"image": os.path.join(self.root, self.name(index))}
        index %= len(self)
        if index in self._bad:
            raise DecodeError(self._bad[index])
        return image | self.objects.sample(index)

    def name(self, index):
        """File name relative to the folder of the images."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.root}")
        index %= len(self)
        return os.fsdecode(self._names[self._ends[index - 1] if index else 0 : self._ends[index]])

    @functools.cached_property
    def fingerprint(self):
        """Of names, sizes, order and objects, not of the place. Asks for the size of every file."""
        return self._digest().hexdigest()

    def _digest(self):
        digest = hashlib.blake2b(repr(self.box_names).encode(), digest_size=16)
        for index in range(len(self)):
            name = self.name(index)
            digest.update(f"{name}\0{file_size(os.path.join(self.root, name))}\0".encode("utf-8", "surrogateescape"))
        for array in dataclasses.astuple(self.objects):
            digest.update(b"" if array is None else array.tobytes())
        return digest


def file_size(path: str) -> int:
    """In bytes; -1 for one that is missing: to read that sample says so."""
    try:
        return os.path.getsize(path)
    except OSError:
        return -1


def coordinates(values: Sequence) -> tuple[float, ...]:
    """Four numbers that boxes can hold.

    Raises:
      ValueError: for other things.
    """
    four = [float(value) for value in values if not isinstance(value, bool)]
    if len(four) != 4 or not all(math.isfinite(value) and abs(value) < _LARGEST for value in four):
        raise ValueError(f"{values!r} are no four numbers of pixels")
    return tuple(four)


def below(name: str) -> str:
    """A file name that an annotation gives, if it stays below the folder of the images.

    Raises:
      ValueError: if it leaves it.
    """
    parts = name.replace("\\", "/").split("/")
    if not parts[0] or ".." in parts or ":" in parts[0] or "\0" in name:
        raise ValueError(f"the file name {name!r} leaves the folder of the images")
    return name


def class_list(path: str) -> tuple[str, ...]:
    """The names of a text file, one a line.

    Raises:
      ValueError: for a file without names, or with one twice.
      OSError: if it cannot be read.
    """
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        names = [line.strip() for line in file if line.strip()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if not names or twice:
        raise ValueError(
            f"{path} is no list of classes, one name a line: " + (f"{few(twice)} twice" if twice else "it is empty")
        )
    return tuple(names)


def beside(path: str, root: str) -> str:
    """The file that an option names: as it is, from here or from the home folder, else below `root`.

    Raises:
      FileNotFoundError: where there is none.
    """
    places = [os.path.abspath(os.path.expanduser(path)), os.path.join(root, path)]
    for place in places:
        if os.path.isfile(place):
            return place
    raise FileNotFoundError(f"no file {path!r}: neither {' nor '.join(dict.fromkeys(places))}")
