"""voc:PATH — PASCAL VOC as it is unpacked, or a tree of its form with classes of its own: objects, or dense masks.

    PATH/JPEGImages/000005.jpg            PATH is VOCdevkit/VOC2007, or VOCdevkit: with several years, add ?year=2007
    PATH/Annotations/000005.xml           objects, in XML (voc_xml.py)
    PATH/ImageSets/Main/trainval.txt      the images of a split, a name a line; without any, one split of all images
    PATH/SegmentationClass/2007_000032.png     palette PNG with the class of every pixel, 255 where none counts
    PATH/ImageSets/Segmentation/train.txt      its splits

    voc:PATH                        trainval, with boxes; difficult and truncated objects are in, and marked
    voc:PATH?hard=no                without them, and without the images that then have no object
    voc:PATH?set=segmentation#val   with masks; #trainaug reads SegmentationClassAug

Class numbers follow the twenty sorted names; masks have the background as 0. A tree that is not called VOC and a year
has the classes of its labels.txt, or those its annotations name, sorted; ?names=FILE gives others.
Splits that share images are not offered together: beside trainval only test, train and val where one of them is named.
"""

import os
import pathlib
import re

import numpy as np

from regvit_jax.data.sources.boxed import Boxed, Objects, beside, class_list, file_size, pack
from regvit_jax.data.sources.folder import few, is_image, visible
from regvit_jax.data.sources.voc_xml import read_all

CLASS_NAMES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
BACKGROUND = ("background", "_background_", "__background__")
OPTIONS = {"year": r"\d{4}", "set": "detection|segmentation", "hard": "yes|no", "names": ".+"}

GET = (
    "Download VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar, or VOCtrainval_11-May-2012.tar "
    "(host.robots.ox.ac.uk/pascal/VOC), and unpack them: VOCdevkit/VOC2007/JPEGImages/ with Annotations/ and ImageSets/"
)

_YEAR = re.compile(r"VOC(\d{4})")
_ROW_OF_A_CLASS = re.compile(r"\S+\s+(-1|0|1)")
_IMAGES, _OBJECTS, _MASKS = ("JPEGImages", "images"), "Annotations", "SegmentationClass"
# Lists that share no image. The first of them that holds a split says what to offer beside it.
_APART = (("trainval", "test"), ("train", "val", "test"), ("trainaug", "val", "test"))


def open(path: str, options: dict[str, str], split: str | None) -> "Voc":
    """The images of one split; without one, trainval of the objects and train of the masks.

    Raises:
      FileNotFoundError: if there is no such tree, or a part of it is missing.
      ValueError: for an unknown option or split, or classes that the tree does not have.
    """
    for name, value in options.items():
        if name not in OPTIONS or not re.fullmatch(OPTIONS[name], value):
            raise ValueError(
                f"voc: has no option {name}={value}; there are year=2007, set=detection or segmentation, hard=yes or "
                "no, names=FILE with a class a line"
            )
    root = _root(path, options.get("year"))
    masks = options.get("set") == "segmentation"
    if masks and "hard" in options:
        raise ValueError("voc: hard= chooses among the objects of set=detection; masks have none")
    annotations = _annotations(root, masks, split)
    if not os.path.isdir(annotations):
        other = _OBJECTS if masks else _MASKS
        hint = f"; it has {other}/: write ?set={'detection' if masks else 'segmentation'}"
        raise FileNotFoundError(
            f"voc:{path}: {root} has no folder {os.path.basename(annotations)}/"
            + (hint if os.path.isdir(os.path.join(root, other)) else "")
        )
    ending = ".png" if masks else ".xml"
    stems, splits = _split(root, ending, masks, split)
    images = next(folder for folder in _IMAGES if os.path.isdir(os.path.join(root, folder)))
    files = {os.path.splitext(name)[0]: name for name in visible(os.path.join(root, images))[1]}
    if not any(stem in files for stem in stems):
        raise FileNotFoundError(
            f"{os.path.join(root, images)} has none of the {len(stems)} images of the split, such as {stems[0]}.jpg"
        )
    paths = [os.path.join(annotations, stem + ending) for stem in stems]
    names = [files.get(stem, stem + ".jpg") for stem in stems]
    classes = _classes(root, options.get("names"))
    if masks:
        if classes is None:
            raise FileNotFoundError(
                f"nothing names the classes of the masks of {root}: write one a line, the background first, into "
                f"{root}/labels.txt, or add ?names=FILE"
            )
        return Voc(os.path.join(root, images), names, None, splits, classes=classes, masks=paths)
    return _detection(os.path.join(root, images), names, paths, splits, classes, options.get("hard") != "no")


class Voc(Boxed):
    """See the top of the file. Annotations are read once, when it is opened."""

    def __init__(self, root, names, objects, splits, *, classes, masks=(), bad=None):
        nothing = Objects(np.zeros((0, 4), np.float32), np.zeros(len(names), np.int64))
        super().__init__(root, names, objects or nothing, () if masks else classes, splits, bad)
        self.mask_names = ("background", *classes) if masks else ()
        self._folder = os.path.dirname(masks[0]) if masks else ""

    def _mask(self, index):
        return os.path.join(self._folder, os.path.splitext(self.name(index))[0] + ".png")

    def __getitem__(self, index):
        if not self._folder:
            return super().__getitem__(index)
        return {"image": os.path.join(self.root, self.name(index)), "mask": self._mask(index)}

    def _digest(self):
        digest = super()._digest()
        if self._folder:
            sizes = [file_size(self._mask(index)) for index in range(len(self))]
            digest.update(f"{self.mask_names} {sizes}".encode())
        return digest


def _detection(root, names, paths, splits, classes, hard):
    images, bad = read_all(paths)
    if len(bad) == len(paths):
        raise ValueError(f"none of the {len(paths)} annotations of the split can be read: {bad[0]}")
    if classes is None:
        # Of all annotations, not of this split: every split numbers the classes alike.
        folder = os.path.dirname(paths[0])
        others = [os.path.join(folder, name) for name in visible(folder)[2] if name.endswith(".xml")]
        known = set(paths)
        found = [*images, *read_all([path for path in others if path not in known])[0]]
        classes = tuple(sorted({each.kind for objects in found for each in objects}))
    unknown = sorted({each.kind for objects in images for each in objects} - set(classes))
    if unknown:
        raise ValueError(
            f"{os.path.dirname(paths[0])} has objects of classes that are none of the {len(classes)} expected "
            f"({few(list(classes))}): {few(unknown)}. Name all of them in a file, one a line: ?names=FILE"
        )
    if not hard:
        images = [[each for each in objects if not (each.difficult or each.truncated)] for objects in images]
        kept = [place for place, objects in enumerate(images) if objects or place in bad]
        if not kept:
            raise ValueError(f"no object of the split is easy: all {len(paths)} images have none without hard ones")
        bad = {new: bad[old] for new, old in enumerate(kept) if old in bad}
        names, images = [names[place] for place in kept], [images[place] for place in kept]
    number = {name: label for label, name in enumerate(classes)}
    return Voc(root, names, pack(images, number, flags=True), splits, classes=classes, bad=bad)


def _root(path, year):
    """The folder with the images and their annotations."""
    given = os.path.abspath(os.path.expanduser(path))
    if not path or not os.path.isdir(given):
        raise FileNotFoundError(f"voc:{path}: {given} is no folder. {GET}")
    if _is_tree(given):
        named = _YEAR.fullmatch(os.path.basename(given))
        if year is not None and (named is None or named[1] != year):
            raise ValueError(f"voc:{path}: {given} is one tree, and not VOC{year}: leave ?year={year} out")
        return given
    for place in (given, os.path.join(given, "VOCdevkit")):
        folders = visible(place)[0] if os.path.isdir(place) else []
        years = {found[1]: name for name in folders if (found := _YEAR.fullmatch(name))}
        if year in years or (year is None and len(years) == 1):
            root = os.path.join(place, years[year] if year in years else next(iter(years.values())))
            if _is_tree(root):
                return root
            given = root
        elif years:
            raise ValueError(f"voc:{path} has the years {', '.join(years)}: name one, as voc:{path}?year={min(years)}")
    folders, images, others = visible(given)
    raise FileNotFoundError(
        f"{given} is no VOC tree: expected the folders JPEGImages/ and {_OBJECTS}/ (or {_MASKS}/) with ImageSets/, "
        f"found {few(folders + images + others) or 'nothing'}"
        + (". Unpack the archives" if any(name.endswith(".tar") for name in others) else f". {GET}")
    )


def _is_tree(folder):
    inside = set(visible(folder)[0])
    return bool(inside & set(_IMAGES)) and bool(inside & {_OBJECTS, _MASKS})


def _annotations(root, masks, split):
    """The folder of them; trainaug has masks that others drew."""
    return os.path.join(root, (_MASKS + "Aug" if split == "trainaug" else _MASKS) if masks else _OBJECTS)


def _split(root, ending, masks, split):
    """(names of the images of `split` without their endings, the splits to offer beside it)."""
    sets = os.path.join(root, "ImageSets")
    folders = [os.path.join(sets, "Segmentation" if masks else "Main"), sets]
    lists = next(
        (folder for folder in folders if os.path.isdir(folder) and any(map(_is_list, visible(folder)[2]))), None
    )
    if lists is None:
        _, pictures, others = visible(_annotations(root, masks, split))
        stems = sorted(name.removesuffix(ending) for name in pictures + others if name.endswith(ending))
        if split is not None or not stems:
            what = f"no split {split!r}: {folders[0]} has no list {split}.txt" if stems else f"no annotation {ending}"
            raise ValueError(f"{root} has {what}")
        return stems, ()
    there = {os.path.splitext(name)[0]: os.path.join(lists, name) for name in visible(lists)[2] if _is_list(name)}
    first = ("train", "trainval") if masks else ("trainval", "train")
    offered = [name for name in dict.fromkeys((*first, "val", "test", "trainaug")) if name in there] or sorted(there)
    split = split or offered[0]
    if split not in there:
        raise ValueError(f"{root} has no split {split!r}: {lists} has lists of {few(offered)}")
    stems = _listed(there[split])
    apart = next((group for group in _APART if split in group), ())
    # The lists of a year come with the archive of its images, the annotations of the test images not always.
    splits = [
        name
        for name in apart
        if name == split
        or (
            name in there
            and os.path.isfile(os.path.join(_annotations(root, masks, name), _listed(there[name])[0] + ending))
        )
    ]
    return stems, tuple(splits) or (split,)


def _is_list(name):
    return name.endswith(".txt")


def _listed(path):
    """The names of a list."""
    lines = pathlib.Path(path).read_text("utf-8-sig", "replace").splitlines()
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise ValueError(f"{path} is empty: expected the name of an image a line, such as 000005")
    if any(_ROW_OF_A_CLASS.fullmatch(name) for name in names):
        raise ValueError(
            f"{path} says which images show one class: expected the name of an image a line, such as 000005, found "
            f"{next(filter(_ROW_OF_A_CLASS.fullmatch, names))!r}"
        )
    return list(dict.fromkeys(os.path.splitext(name)[0] if is_image(name) else name for name in names))


def _classes(root, given):
    """The classes that a file or the year's name tells, without the background; None where only annotations can."""
    default = os.path.join(root, "labels.txt")
    if given is not None or os.path.isfile(default):
        path = beside(given, root) if given is not None else default
        # labelme's lists begin with the class of pixels that do not count: 255 in its masks.
        names = tuple(name for name in class_list(path) if name != "__ignore__")
        if set(names[1:]) & set(BACKGROUND):
            raise ValueError(f"{path}: the background is 0 in masks, so it is the first class or not named")
        return names[1:] if names[:1] and names[0] in BACKGROUND else names
    return CLASS_NAMES if _YEAR.fullmatch(os.path.basename(root)) else None
