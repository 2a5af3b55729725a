"""Annotation files in the form of COCO's instances_*.json, read once a process into a few arrays.

    {"images": [{"id": 9, "file_name": "000000000009.jpg", …}, …], "categories": [{"id": 1, "name": "person"}, …],
     "annotations": [{"id": 1, "image_id": 9, "category_id": 51, "bbox": [x, y, width, height], "iscrowd": 0, …}, …]}

A box becomes (x, y, x + width, y + height), each rounded, halves to even. What is marked iscrowd, a region around many
objects, is left out. Outlines are cut out before the file is parsed: they are most of it.
"""

import array
import dataclasses
import functools
import json
import logging
import os
import pathlib
import re

import numpy as np

from regvit_jax.data.sources.boxed import Objects, below, coordinates
from regvit_jax.data.sources.folder import few

# Nothing but numbers in brackets, and the quotes of a text within JSON are escaped: this matches no other place.
_OUTLINE = re.compile(rb'"segmentation":\s*\[[\d\s.,\[\]eE+-]*\]')
_PARTS = ("images", "annotations", "categories")

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Instances:
    """The images of a file in the order of their numbers, and their objects.

    Attributes:
      names: file name of each image, as the file has it.
      objects: labels are places among the categories in the order of their numbers.
      box_names: names of the categories.
    """

    names: tuple[str, ...]
    objects: Objects
    box_names: tuple[str, ...]


def read(path: str) -> Instances:
    """What the file holds; it is parsed again only if it was written anew.

    Raises:
      ValueError: if it is no such file; the message names it and what is wrong.
      OSError: if it cannot be read.
    """
    status = os.stat(path)
    return _read(path, status.st_mtime_ns, status.st_size)


# The time and size of the file are only part of the key.
@functools.lru_cache(maxsize=4)
def _read(path, _, size):
    if size > 50e6:
        _log.info("reading %s, %d MB", path, size // 1_000_000)
    try:
        return _instances(*_parsed(pathlib.Path(path).read_bytes()))
    except (ValueError, RecursionError) as error:
        what = "cut short or no JSON, get it again" if isinstance(error, json.JSONDecodeError) else "not of its form"
        raise ValueError(
            f"{path} is no annotation file like COCO's instances_val2017.json ({what}: {error})"
        ) from error


def _parsed(content):
    """(images and annotations, the rest); a third of the time and of the memory that all of it takes."""
    for text in (_OUTLINE.sub(rb'"segmentation":0', content), content):
        parts = _Parts()
        try:
            return parts, json.loads(text, object_hook=parts.take)
        except json.JSONDecodeError:
            # What is wrong is told of the file as it is.
            if text is content:
                raise
    raise AssertionError


class _Parts:
    """Takes images and annotations out of the JSON as soon as each is parsed."""

    def __init__(self):
        self.image_ids, self.names = array.array("q"), []
        self.of_image, self.of_category, self.boxes = array.array("q"), array.array("q"), array.array("d")
        self.crowds = 0

    def take(self, found):
        """None in the place of what was taken."""
        try:
            if "image_id" in found and "bbox" in found:
                return self._annotation(found)
            if "id" in found and "file_name" in found:
                self.image_ids.append(found["id"])
                self.names.append(below(found["file_name"]))
                return None
        except (TypeError, KeyError, ValueError, OverflowError) as error:
            reason = f"has no {error}" if isinstance(error, KeyError) else str(error)
            kind = "annotation" if "bbox" in found else "image"
            raise ValueError(f"{kind} {found.get('id')!r}: {reason}") from error
        return found

    def _annotation(self, found):
        if found.get("iscrowd"):
            self.crowds += 1
            return None
        x, y, width, height = coordinates(found["bbox"])
        self.of_image.append(found["image_id"])
        self.of_category.append(found["category_id"])
        self.boxes.extend((x, y, x + width, y + height))


def _instances(parts, whole):
    missing = [key for key in _PARTS if not isinstance(whole, dict) or not isinstance(whole.get(key), list)]
    if missing:
        keys = f"has {few(list(whole)) or 'nothing'}" if isinstance(whole, dict) else f"is a {type(whole).__name__}"
        raise ValueError(f"it lacks the list{'s' if missing[1:] else ''} {', '.join(missing)}, it {keys}")
    strange = {key: next((each for each in whole[key] if each is not None), None) for key in ("images", "annotations")}
    if strange["annotations"] is not None:
        raise ValueError(
            f"annotation {_shown(strange['annotations'])} has no image_id or bbox: captions and panoptic annotations "
            f"are other files"
        )
    if strange["images"] is not None or not parts.names:
        raise ValueError(f"image {_shown(strange['images'])} has no id or file_name" if parts.names else "no images")
    category_ids, names = _categories(whole["categories"])
    ids = np.frombuffer(parts.image_ids, np.int64)
    order = np.argsort(ids, kind="stable")
    ids = ids[order]
    if (ids[1:] == ids[:-1]).any():
        raise ValueError(f"image {ids[1:][ids[1:] == ids[:-1]][0]} is there twice")
    place = _places(ids, parts.of_image, "image")
    label = _places(category_ids, parts.of_category, "category")
    by_image = np.argsort(place, kind="stable")
    _log.debug("%d images, %d objects, %d crowds left out", len(ids), len(place), parts.crowds)
    boxes = np.rint(np.frombuffer(parts.boxes, np.float64)).reshape(-1, 4)[by_image]
    ends = np.cumsum(np.bincount(place, minlength=len(ids)))
    objects = Objects(boxes.astype(np.float32), ends, label[by_image].astype(np.int32))
    return Instances(tuple(parts.names[old] for old in order), objects, names)


def _categories(rows):
    """(numbers in order, their names)."""
    pairs = [(row.get("id"), row.get("name")) if isinstance(row, dict) else (None, None) for row in rows]
    if not all(type(number) is int and isinstance(name, str) for number, name in pairs):
        raise ValueError("a category is {'id': number, 'name': text}")
    ids = np.array(sorted(number for number, _ in pairs), np.int64)
    if (ids[1:] == ids[:-1]).any():
        raise ValueError("a category number is there twice")
    return ids, tuple(name for _, name in sorted(pairs))


def _places(ids, wanted, what):
    """Where each of `wanted` is in the sorted `ids`."""
    wanted = np.frombuffer(wanted, np.int64)
    places = np.searchsorted(ids, wanted)
    strangers = wanted[~np.isin(wanted, ids)]
    if len(strangers):
        raise ValueError(f"{len(strangers)} annotations are of no {what} of the file, such as of number {strangers[0]}")
    return places


def _shown(value):
    text = repr(value)
    return text if len(text) < 80 else text[:80] + "…"
