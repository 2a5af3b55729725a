"""ade20k:PATH — scene parsing of ADE20K: 150 classes, as ADEChallengeData2016.zip is unpacked.

    PATH/images/training/ADE_train_00000001.jpg       PATH/annotations/training/ADE_train_00000001.png
    PATH/images/validation/ADE_val_00000001.jpg       PATH/annotations/validation/ADE_val_00000001.png
    PATH/objectInfo150.txt                            names of the classes, where it is there

The splits are train (20,210 images) and val (2,000). In the files 0 is "other" and 1 to 150 are the classes; samples
have IGNORE and 0 to 149. A part of the data without split folders, PATH/images/*.jpg and PATH/annotations/*.png, has
no splits. The full ADE20K (colour pictures *_seg.png) and TFDS's scene_parse150 hold other labels.
"""

import os
import pathlib

import numpy as np

from regvit_jax.data.sources.folder import few, visible
from regvit_jax.data.sources.paired import Paired, matched, whole_numbers

CLASSES = 150
FOLDERS = {"train": "training", "val": "validation"}
LAYOUT = (
    "Expected images/training/NAME.jpg with annotations/training/NAME.png, and the same with validation/, as "
    "ADEChallengeData2016.zip has them; a mask has one channel, 0 for nothing and 1 to 150 for the class"
)
_UNPACKED = "ADEChallengeData2016"
GET = (
    f"Download {_UNPACKED}.zip of the MIT scene parsing benchmark (sceneparsing.csail.mit.edu) and unpack it. {LAYOUT}"
)


def open(path: str, options: dict[str, str], split: str | None) -> "Ade20k":
    """One split; `split` is train or val (also training, validation), and defaults to the first that is there.

    Raises:
      FileNotFoundError: if there is no such folder; the message says what is there.
      ValueError: for a split that is not there, an option (there are none), an image without mask or a mask without
        image.
    """
    if options:
        raise ValueError(f"ade20k: takes no options, got {', '.join(sorted(options))}")
    root = os.path.abspath(os.path.expanduser(path))
    if not path or not os.path.isdir(root):
        raise FileNotFoundError(f"ade20k:{path}: {root} is no folder. {GET}")
    if not os.path.isdir(os.path.join(root, "images")) and os.path.isdir(os.path.join(root, _UNPACKED)):
        root = os.path.join(root, _UNPACKED)
    for folder in ("images", "annotations"):
        if not os.path.isdir(os.path.join(root, folder)):
            found = few(sum(visible(root), [])) or "nothing"
            raise FileNotFoundError(f"{root} has no folder {folder}/: it holds {found}. {GET}")
    folders, loose, _ = visible(os.path.join(root, "images"))
    splits = tuple(name for name, folder in FOLDERS.items() if folder in folders)
    if not splits and not loose:
        raise FileNotFoundError(f"{root}/images holds no images: it holds {few(folders) or 'nothing'}. {LAYOUT}")
    wanted = {folder: name for name, folder in FOLDERS.items()}.get(split, split) or (splits[0] if splits else None)
    if wanted is not None and wanted not in splits:
        there = f"it has {', '.join(splits)}" if splits else f"{root}/images has no folder training/ or validation/"
        raise ValueError(f"ade20k:{path} has no split {split!r}: {there}")
    return Ade20k(root, splits, wanted)


class Ade20k(Paired):
    """See the top of the file. The list of files is made when it is opened: an incomplete copy is noticed at once."""

    layout = LAYOUT

    def __init__(self, root: str, splits: tuple[str, ...], split: str | None):
        self.splits, self.split = splits, split
        below = FOLDERS[split] if split else ""
        image_root, map_root = (os.path.join(root, folder, below) for folder in ("images", "annotations"))
        if not os.path.isdir(map_root):
            raise FileNotFoundError(f"{map_root} is no folder, {image_root} is. {LAYOUT}")
        named = [{os.path.splitext(name)[0]: name for name in visible(place)[1]} for place in (image_root, map_root)]
        if not named[0]:
            raise FileNotFoundError(f"{image_root} holds no image. {LAYOUT}")
        hint = (
            f"An image and its mask have the same name, in {image_root} and {map_root}: copy or remove files. {LAYOUT}"
        )
        super().__init__(image_root, map_root, matched(*named, hint))
        self.mask_names = _names(root)

    def fields(self, values, path):
        values = whole_numbers(values, path, LAYOUT)
        if values.max() > CLASSES or values.min() < 0:
            wrong = values[(values > CLASSES) | (values < 0)][0]
            raise ValueError(f"{path} has the value {wrong}: not of the annotation of {CLASSES} classes. {LAYOUT}")
        # In eight bits 0 - 1 is 255: what is no class becomes IGNORE.
        return {"mask": values.astype(np.uint8) - np.uint8(1)}


def _names(root):
    """The first name of each class, or its number where there is no table of names.

    The zip has objectInfo150.txt, its columns parted by tabs and the names by commas. The project's repository has a
    .csv, in which ";" stands for space and comma both.
    """
    for name, separator in (("objectInfo150.txt", "\t"), ("objectInfo150.csv", ",")):
        path = os.path.join(root, name)
        if os.path.isfile(path):
            return _table(path, separator)
    return tuple(f"class {number}" for number in range(1, CLASSES + 1))


def _table(path, separator):
    rows = [row for row in pathlib.Path(path).read_text("utf-8").splitlines() if row.strip()]
    columns = rows[0].count(separator) if rows else 0
    names = {}
    for row in rows[1:]:
        number, *_, name = row.split(separator, columns)
        if number.strip().isdecimal():
            names[int(number)] = name.replace(";", " ").split(",")[0].strip()
    if sorted(names) != list(range(1, CLASSES + 1)):
        raise ValueError(
            f"{path}: expected a line of headings and one line a class, its number, 1 to {CLASSES}, in the first "
            f"column and its names in the last; found {len(names)} such lines. Without the file classes are numbers"
        )
    return tuple(names[number] for number in sorted(names))
