"""boxes:PATH — images of your own with boxes: in one file boxes.json, or in the XML that labelImg and others write.

    PATH/boxes.json               {"1.jpg": [[x1, y1, x2, y2], …], "b/2.jpg": [], …}, below PATH/images/ or PATH/
                                  (boxes_json.py: the same with classes)
    PATH/1.jpg, PATH/1.xml        or beside each image, or in PATH/images/ and PATH/annotations/
    PATH/train/, PATH/val/        or a folder of this form a split

    boxes:PATH?names=FILE         the classes of the labels, one a line; PATH/labels.txt is read without being named.
                                  Else they are what the boxes of all splits name, sorted
    boxes:PATH?first=0            XML that counts pixels from 0; VOC and labelImg count from 1

Boxes are xyxy in pixels from 0, the far edges exclusive. Images that no annotation names are left out; one with no box
in its annotation stays. Boxes without extent are refused: mostly they are x, y, width, height taken for corners.
"""

import dataclasses
import logging
import os

from regvit_jax.data.sources import boxes_json
from regvit_jax.data.sources.boxed import Boxed, Object, beside, class_list, pack
from regvit_jax.data.sources.folder import OTHER_NAMES, TRAIN_NAMES, few, listing, visible
from regvit_jax.data.sources.voc_xml import read_all

JSON = "boxes.json"
OPTIONS = ("names", "first")
_XML_FOLDERS = ("annotations", "Annotations")

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Part:
    """The annotated images of one folder: names below `root`, the objects of each, {place: what is wrong with one}."""

    root: str
    names: list[str]
    objects: list[list[Object]]
    bad: dict[int, str]


def open(path: str, options: dict[str, str], split: str | None) -> Boxed:
    """The images of one split; without one, train's, or all where there are no splits.

    Raises:
      FileNotFoundError: if there is no such folder, or no annotation or no image in it.
      ValueError: for an unknown option or split, a file of another form, boxes without extent, or labels that are no
        class.
    """
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown or ("first" in options and options["first"] not in ("0", "1")):
        raise ValueError(
            f"boxes: has no option {', '.join(f'{key}={options[key]}' for key in unknown or ['first'])}; there are "
            "names=FILE and first=0 or 1"
        )
    root = os.path.abspath(os.path.expanduser(path))
    if path and os.path.basename(root) == JSON and os.path.isfile(root):
        root = os.path.dirname(root)
    if not path or not os.path.isdir(root):
        raise FileNotFoundError(f"boxes:{path}: {root} is no folder")
    folders = {name: os.path.join(root, name) for name in _splits(root)}
    if split is not None and split not in folders:
        raise ValueError(f"boxes:{path} has no split {split!r}: it has {', '.join(folders) or 'none'}")
    first = int(options["first"]) if "first" in options else 1
    parts = {name: _read(folder, first) for name, folder in (folders or {None: root}).items()}
    listed = os.path.join(root, "labels.txt")
    names = beside(options["names"], root) if "names" in options else listed if os.path.isfile(listed) else None
    classes, number = _classes(root, names, parts.values())
    part = parts[split or next(iter(parts))]
    return Boxed(part.root, part.names, pack(part.objects, number, False), classes, tuple(folders), part.bad)


def _splits(root):
    """Split folders with annotations, train first; none where the annotations are in `root` itself."""
    folders = visible(root)[0]
    if os.path.isfile(os.path.join(root, JSON)):
        return ()
    places = {name.lower(): name for name in folders if _annotated(os.path.join(root, name))}
    return tuple(places[name] for name in (*TRAIN_NAMES, *OTHER_NAMES) if name in places)


def _annotated(folder):
    folders, _, others = visible(folder)
    return JSON in others or any(name.endswith(".xml") for name in others) or bool({*_XML_FOLDERS} & {*folders})


def _read(folder, first):
    images = os.path.join(folder, "images")
    images = images if os.path.isdir(images) else folder
    files = listing(images)[0]
    if not files:
        raise FileNotFoundError(f"{images} holds no image")
    table = os.path.join(folder, JSON)
    part = _from_json(images, files, table) if os.path.isfile(table) else _from_xml(folder, images, files, first)
    left = len(set(files) - set(part.names))
    if left:
        _log.info("%s: %d images that no annotation names are left out", images, left)
    flat = [(name, each) for name, objects in zip(part.names, part.objects, strict=True) for each in objects]
    thin = [(name, each.box) for name, each in flat if not (each.box[0] < each.box[2] and each.box[1] < each.box[3])]
    if thin:
        where = table if os.path.isfile(table) else folder
        raise ValueError(
            f"{where}: {len(thin)} of {len(flat)} boxes have no extent, such as {list(thin[0][1])} of {thin[0][0]}: "
            'expected x1 < x2 and y1 < y2 ({"xywh": [x, y, width, height]} is a box of boxes.json too)'
        )
    return part


def _from_json(images, files, table):
    entries = boxes_json.read(table)
    known, stems = set(files), {}
    for name in files:
        stems.setdefault(os.path.splitext(name)[0], name)
    names = []
    for key in entries:
        tries = [key, key.removeprefix("images/")]
        found = [name for name in tries if name in known] or [stems[name] for name in tries if name in stems]
        names.append(found[0] if found else key)
    missing = [name for name in names if name not in known]
    if len(missing) == len(names):
        raise FileNotFoundError(
            f"{table} names {len(names)} images, and none is in {images}: it holds {few(files)}, not {few(missing)}"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"{table} names an image twice: {few(sorted({n for n in names if names.count(n) > 1}))}")
    bad = {place: f"{os.path.join(images, name)} is missing" for place, name in enumerate(names) if name not in known}
    return _Part(images, names, list(entries.values()), bad)


def _from_xml(folder, images, files, first):
    places = [images, *(os.path.join(folder, name) for name in _XML_FOLDERS)]
    of_file = {}
    for name in files:
        tries = [os.path.join(place, os.path.splitext(name)[0] + ".xml") for place in places]
        path = next((path for path in tries if os.path.isfile(path)), None)
        if path is not None:
            of_file[name] = path
    if not of_file:
        raise FileNotFoundError(
            f'{folder} has no boxes: expected {JSON} in it, with {{"{files[0]}": [[x1, y1, x2, y2], …], …}}, or '
            f"{os.path.splitext(files[0])[0]}.xml beside {files[0]} or in {folder}/annotations/"
        )
    objects, bad = read_all(list(of_file.values()), first)
    if len(bad) == len(of_file):
        raise ValueError(f"none of the {len(bad)} annotations of {folder} can be read: {bad[0]}")
    return _Part(images, list(of_file), objects, bad)


def _classes(root, path, parts):
    """(names of the classes, {what an object calls its class: label} or None where objects name none)."""
    kinds = {each.kind for part in parts for objects in part.objects for each in objects}
    types = {type(kind) for kind in kinds}
    if len(types) > 1:
        words = {type(None): "nothing", int: "a number", str: "a name"}
        raise ValueError(f"{root}: labels are of one kind, some here are {' and some '.join(words[t] for t in types)}")
    if types <= {type(None)}:
        return (), None
    names = class_list(path) if path is not None else None
    if types == {int}:
        names = names or tuple(str(label) for label in range(max(kinds) + 1))
        number = {label: label for label in range(len(names))}
    else:
        names = names or tuple(sorted(kinds))
        number = {name: label for label, name in enumerate(names)}
    strangers = sorted(kinds - number.keys())
    if strangers:
        raise ValueError(
            f"{root}: labels that are none of the {len(names)} classes of {path}: {few(list(map(str, strangers)))}"
        )
    return names, number
