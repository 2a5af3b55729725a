"""nyud:PATH — depth of NYU Depth v2, as BTS prepared it: photos and 16-bit depth maps in millimetres, 0 unknown.

    PATH/nyudepthv2_train_files_with_gt.txt            24,231 lines "PHOTO DEPTH FOCAL", also called nyu_train.txt
    PATH/nyudepthv2_test_files_with_gt.txt             654 lines, also called nyu_test.txt
    PATH/sync/kitchen_0028b/rgb_00045.jpg              PATH/sync/kitchen_0028b/sync_depth_00045.png
    PATH/official_splits/test/bathroom/rgb_00045.jpg   …/sync_depth_00045.png

The lines name files relative to PATH, PATH/sync or PATH/official_splits/SPLIT (some begin with a "/"); the splits are
train and test, in the order of the lists. Without lists every rgb_*.jpg below PATH is paired with the sync_depth_*.png
of its number beside it, or in a folder depth/ beside its folder rgb/, and there are no splits.
"""

import os
import pathlib
import re

import numpy as np

from regvit_jax.data.sources.folder import few, listing
from regvit_jax.data.sources.paired import Paired, matched

SPLITS = ("train", "test")
LISTS = ("nyudepthv2_{split}_files_with_gt.txt", "nyu_{split}.txt")
LAYOUT = (
    "Expected PATH/nyudepthv2_train_files_with_gt.txt and PATH/nyudepthv2_test_files_with_gt.txt with lines such as "
    "'kitchen_0028b/rgb_00045.jpg kitchen_0028b/sync_depth_00045.png 518.8579', the files below PATH, PATH/sync or "
    "PATH/official_splits/test; without lists, rgb_*.jpg beside sync_depth_*.png. Depth is a 16-bit png in millimetres"
)
GET = (
    "Get what BTS trains on (github.com/cleinc/bts says how): sync.zip, made of the raw NYU Depth v2, the official "
    f"test split of nyu_depth_v2_labeled.mat, and its two lists. {LAYOUT}"
)
_PLACES = ("", "sync", "official_splits/{split}")
_FILE = re.compile(r"(rgb|sync_depth)_(\w+)\.\w+")


def open(path: str, options: dict[str, str], split: str | None) -> "Nyud":
    """One split; `split` is train or test, and defaults to the first of which there is a list.

    Raises:
      FileNotFoundError: if there is no such folder, or a file that a list names is not there.
      ValueError: for a split that is not there, an option (there are none), a line that cannot be read, or, without
        lists, photos or depth maps without the other.
    """
    if options:
        raise ValueError(f"nyud: takes no options, got {', '.join(sorted(options))}")
    root = os.path.abspath(os.path.expanduser(path))
    if not path or not os.path.isdir(root):
        raise FileNotFoundError(f"nyud:{path}: {root} is no folder. {GET}")
    lists = {}
    for name in SPLITS:
        there = [place for pattern in LISTS if os.path.isfile(place := os.path.join(root, pattern.format(split=name)))]
        if there:
            lists[name] = there[0]
    if split is not None and split not in lists:
        has = f"it has {', '.join(lists)}" if lists else f"{root} has no lists. {LAYOUT}"
        raise ValueError(f"nyud:{path} has no split {split!r}: {has}")
    if not lists:
        return Nyud(root, (), None, _beside(root))
    split = split or next(iter(lists))
    return Nyud(root, tuple(lists), split, _listed(root, split, lists[split]))


class Nyud(Paired):
    """See the top of the file. Depth may lie outside `depth_range`: what measures leaves it out."""

    layout = LAYOUT
    depth_range = (0.001, 10.0)

    def __init__(self, root: str, splits: tuple[str, ...], split: str | None, pairs: list[tuple[str, str]]):
        self.splits, self.split = splits, split
        super().__init__(root, root, pairs)

    def fields(self, values, path):
        if values.dtype.kind not in "iu" or values.dtype.itemsize < 2:
            raise ValueError(f"{path} holds {values.dtype} values, too few for millimetres. {LAYOUT}")
        return {"depth": values.astype(np.float32) / 1000}


def _listed(root, split, path):
    """The pairs of a list, relative to the root."""
    rows = []
    for number, line in enumerate(pathlib.Path(path).read_text("utf-8").splitlines(), 1):
        cells = line.split()
        if cells and len(cells) < 2:
            raise ValueError(f"line {number} of {path} is {line!r}: it names no depth map. {LAYOUT}")
        if cells:
            rows.append(tuple(cell.lstrip("/") for cell in cells[:2]))
    if not rows:
        raise ValueError(f"{path} is empty. {LAYOUT}")
    # The first photo tells where all of them are.
    places = [place.format(split=split) for place in _PLACES]
    found = [place for place in places if os.path.exists(os.path.join(root, place, rows[0][0]))]
    pairs = [tuple(os.path.join(found[0], name) for name in row) for row in rows] if found else []
    missing = [name for pair in pairs for name in pair if not os.path.exists(os.path.join(root, name))]
    if missing or not found:
        what = f"{len(missing)} files that {path} names are" if found else f"{rows[0][0]}, the first of {path}, is"
        raise FileNotFoundError(
            f"{what} not below {root}{'' if found else f' nor its {places[1]}/, {places[2]}/'}"
            + (f": {few(missing)}" if missing else "")
            + f". {LAYOUT}"
        )
    return pairs


def _beside(root):
    """The pairs that the names tell."""
    named = {"rgb": {}, "sync_depth": {}}
    for name in listing(root)[0]:
        folder, _, file = name.rpartition("/")
        if found := _FILE.fullmatch(file):
            # rgb/ and depth/ beside each other count as one folder.
            place = re.sub(r"(^|/)(rgb|depth)$", "", folder)
            named[found[1]][place, found[2]] = name
    if not named["rgb"]:
        raise FileNotFoundError(f"{root} has no list of files and no photo rgb_*.jpg. {GET}")
    return matched(named["rgb"], named["sync_depth"], LAYOUT)
