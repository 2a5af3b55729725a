"""coco:PATH — COCO as it is unpacked, or what has its form: images with boxes, and the classes of these.

    PATH/annotations/instances_val2017.json     objects (coco_json.py)
    PATH/val2017/000000000139.jpg               images, or below PATH/images/
    PATH/train/_annotations.coco.json           or both in one folder a split, as labelling services export it

    coco:PATH#val2017       one split by its name; #train and #val are those of ?year=, by default the last one there
    coco:PATH?list=FILE     the images that a text file names, one a line and in its order, such as COCO20k's
                            train2014/COCO_train2014_000000000009.jpg

Images come by number. Class numbers follow those of the categories, without gaps: 0 to 79. Regions marked iscrowd are
left out. An image without any other object stays, with no boxes: where what is counted is whether an object was found,
it must not count.
"""

import os
import pathlib
import re

from regvit_jax.data.sources import coco_json
from regvit_jax.data.sources.boxed import Boxed, beside
from regvit_jax.data.sources.folder import few, visible

GET = (
    "Download train2017.zip, val2017.zip and annotations_trainval2017.zip (cocodataset.org; for COCO20k train2014.zip "
    "and annotations_trainval2014.zip) and unpack them: annotations/instances_val2017.json, val2017/000000000139.jpg"
)

_FILE = re.compile(r"instances_(.+)\.json")
_YEAR = re.compile(r"(.*?)(\d{4})")
_EXPORT = "_annotations.coco.json"


def open(path: str, options: dict[str, str], split: str | None) -> Boxed:
    """The images of one split; without one, those of train.

    Raises:
      FileNotFoundError: if there is no such folder, or annotations or images are missing.
      ValueError: for an unknown option or split, a broken file, or a list that names other images.
    """
    unknown = sorted(set(options) - {"list", "year"})
    if unknown:
        raise ValueError(f"coco: has no option {', '.join(unknown)}; there are list=FILE and year=2014")
    root = os.path.abspath(os.path.expanduser(path))
    if not path or not os.path.isdir(root):
        raise FileNotFoundError(f"coco:{path}: {root} is no folder. {GET}")
    files = _files(root)
    if "list" not in options:
        name, splits = _split(path, files, options.get("year"), split)
        found = coco_json.read(files[name])
        return Boxed(_images(root, name, found.names), found.names, found.objects, found.box_names, splits)
    try:
        listed = beside(options["list"], root)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}. That of COCO20k comes with LOST (github.com/valeoai/LOST)") from None
    name, chosen = _listed(listed)
    if split not in (None, name) or "year" in options:
        raise ValueError(f"{listed} names images of {name}: leave the split and year= out of coco:{path}")
    if name not in files:
        raise FileNotFoundError(f"{root}/annotations/instances_{name}.json is missing: {listed} names images of {name}")
    found = coco_json.read(files[name])
    place = {os.path.basename(file): index for index, file in enumerate(found.names)}
    strangers = [file for file in chosen if file not in place]
    if strangers:
        raise ValueError(
            f"{listed} names {len(strangers)} images (of {len(chosen)}) that {files[name]} has not: {few(strangers)}"
        )
    places = [place[file] for file in chosen]
    names = [found.names[index] for index in places]
    return Boxed(_images(root, name, names), names, found.objects.take(places), found.box_names)


def _files(root):
    """{split: its annotation file}."""
    folders, images, loose = visible(root)
    below = os.path.join(root, "annotations")
    places = [(below, visible(below)[2])] if "annotations" in folders else []
    found = {
        match[1]: os.path.join(folder, name)
        for folder, names in [*places, (root, loose)]
        for name in names
        if (match := _FILE.fullmatch(name))
    }
    exports = {name: os.path.join(root, name, _EXPORT) for name in folders}
    found |= {name: file for name, file in exports.items() if name not in found and os.path.isfile(file)}
    if not found:
        inside = [f"annotations/{name}" for _, names in places for name in names] or folders + loose + images
        raise FileNotFoundError(
            f"{root} has no annotations of boxes: expected annotations/instances_val2017.json or the like in it, found "
            f"{few(inside) or 'nothing'}. {GET}"
        )
    return found


def _split(path, files, year, split):
    """(name of the split, the splits to offer beside it)."""
    years = sorted({match[2] for name in files if (match := _YEAR.fullmatch(name))})
    if year is not None and year not in years:
        raise ValueError(f"coco:{path} has no year {year!r}: it has {few(years) or 'none'}")
    # 2014 and 2017 share their images: splits of two years are never offered together.
    suffix = year or (years[-1] if years else "")
    names = {name.removesuffix(suffix): name for name in sorted(files) if name.endswith(suffix)}
    if split is None:
        split = "train" if "train" in names else next(iter(names))
    name = split if split in files else names.get(split)
    if name is None:
        raise ValueError(f"coco:{path} has no split {split!r}: it has {', '.join(sorted(files))}")
    if year is not None and name not in names.values():
        raise ValueError(f"coco:{path} has ?year={year} and the split {name}: leave one of them out")
    if name not in names.values() or (split in files and split not in names and not split.startswith("train")):
        return name, (name,)
    return name, tuple(sorted(names, key=lambda name: (name != "train", name)))


def _listed(path):
    """(split, names of the image files) of a list such as COCO20k's; what is there twice counts once."""
    lines = pathlib.Path(path).read_text("utf-8-sig", "replace").splitlines()
    pairs = dict.fromkeys(line.strip().rpartition("/")[::2] for line in lines if line.strip())
    splits = sorted({os.path.basename(folder) for folder, _ in pairs})
    if len(splits) != 1 or not splits[0]:
        raise ValueError(
            f"{path} is no list of images of one split: expected lines such as "
            f"train2014/COCO_train2014_000000000009.jpg, found {few(['/'.join(pair) for pair in pairs]) or 'nothing'}"
        )
    return splits[0], list(dict.fromkeys(name for _, name in pairs))


def _images(root, split, names):
    """The folder that holds the images."""
    places = [os.path.join(root, *below) for below in ((split,), ("images", split), ("images",), ())]
    for place in places:
        # Not every image needs to be there, and to ask for all of them takes long.
        if any(os.path.isfile(os.path.join(place, name)) for name in names[:100]):
            return place
    raise FileNotFoundError(
        f"none of the images of {split}, such as {names[0]}, is in {places[0]} or {places[1]}: unpack {split}.zip there"
    )
