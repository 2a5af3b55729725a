"""boxes.json: the boxes of many images in one file, in the forms that people write.

    {"1.jpg": [[x1, y1, x2, y2], …], …}                                       no classes
    {"1.jpg": {"boxes": [[x1, y1, x2, y2], …], "labels": ["cat", …]}, …}      names, or numbers from 0
    {"1.jpg": [{"label": "cat", "xyxy": [x1, y1, x2, y2]}, …], …}
    [{"file": "1.jpg", "boxes": […], …}, …]                                   a list of any of these

Corners are in pixels from 0, the far edges exclusive; {"xywh": [x, y, width, height]} is a box too. A file may be
named without its ending. Other keys are left alone.
"""

import json
import pathlib
from typing import Any

from regvit_jax.data.sources.boxed import Object, below, coordinates

_FILES = ("file", "image", "file_name", "filename", "name")
_LABELS = ("label", "class", "category", "name")
_CORNERS = (("xmin", "ymin", "xmax", "ymax"), ("x1", "y1", "x2", "y2"))
_FORM = '{"1.jpg": [[x1, y1, x2, y2], …], …}, or {"1.jpg": {"boxes": [[x1, y1, x2, y2], …], "labels": ["cat", …]}, …}'


def read(path: str) -> dict[str, list[Object]]:
    """{name of an image, as the file has it: its objects}.

    Raises:
      ValueError: if the file is of another form; the message names the entry.
      OSError: if it cannot be read.
    """
    try:
        whole = json.loads(pathlib.Path(path).read_text("utf-8-sig"))
        pairs = _pairs(whole)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}; expected {_FORM}") from error
    found = {}
    for name, entry in pairs:
        try:
            if name in found:
                raise ValueError("is there twice")
            found[below(name)] = _objects(entry)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, entry {name!r}: {error}; expected {_FORM}") from error
    return found


def _pairs(whole: Any) -> list[tuple[str, Any]]:
    if isinstance(whole, dict) and {"images", "annotations"} <= whole.keys():
        raise ValueError("this is the form of COCO: put it into annotations/instances_train.json, and read it by coco:")
    if isinstance(whole, dict):
        pairs = list(whole.items())
    elif isinstance(whole, list):
        pairs = [(_first(row, _FILES), row) for row in whole]
    else:
        raise ValueError(f"it holds a {type(whole).__name__}")
    if not pairs:
        raise ValueError("it names no image")
    if not all(isinstance(name, str) and name for name, _ in pairs):
        raise ValueError('an entry of the list has no "file"')
    return pairs


def _objects(entry):
    boxes, labels = entry, None
    if isinstance(entry, dict):
        if "boxes" not in entry:
            raise ValueError(f'it has no "boxes" but {", ".join(entry) or "nothing"}')
        boxes, labels = entry["boxes"], entry.get("labels")
    if not isinstance(boxes, list):
        raise ValueError(f"its boxes are a {type(boxes).__name__}, not a list")
    if boxes and all(isinstance(value, int | float) for value in boxes):
        boxes = [boxes]  # one box, not in a list of boxes
    if labels is not None and (not isinstance(labels, list) or len(labels) != len(boxes)):
        raise ValueError(f"{len(boxes)} boxes and labels {labels!r}: expected a label a box")
    return [_object(box, label) for box, label in zip(boxes, labels or [None] * len(boxes), strict=True)]


def _object(box, label):
    if isinstance(box, list):
        return Object(coordinates(box), _label(label))
    if not isinstance(box, dict):
        raise ValueError(f"{box!r} is no box")
    label = _label(_first(box, _LABELS) if label is None else label)
    if "xyxy" in box:
        return Object(coordinates(box["xyxy"]), label)
    if "xywh" in box:
        x, y, width, height = coordinates(box["xywh"])
        return Object((x, y, x + width, y + height), label)
    for keys in _CORNERS:
        if box.keys() >= set(keys):
            return Object(coordinates([box[key] for key in keys]), label)
    raise ValueError(f'a box has "xyxy" (corners) or "xywh" (a corner, width, height), this one has {", ".join(box)}')


def _label(value):
    if value is None or isinstance(value, str) or (type(value) is int and value >= 0):
        return value
    raise ValueError(f"a label is a name, or a number from 0, not {value!r}")


def _first(row, keys):
    return next((row[key] for key in keys if key in row), None) if isinstance(row, dict) else None
