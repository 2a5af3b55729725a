"""tar:PATH — WebDataset shards, read at random without unpacking.

    tar:/d        tar:/d/train-*.tar        tar:/d/imagenet-train-{000000..000146}.tar        tar:/d/{train,val}/*.tar

    000017.jpg        the image: jpg, jpeg, png or webp; ?image=EXT names another, such as left.png
    000017.cls        its class, a number or a name; ?label=KEY takes it from the entry KEY of 000017.json
    000017.txt        caption
    000017.seg.png    mask of class numbers, 255 where nothing counts, ?ignore=0,11 and where it is one of these; also
                      mask.png; ?mask=EXT names another
    000017.depth.png  16-bit depth in millimetres, 0 where unknown; ?depth=EXT, ?metres=0.0002 for another unit

Class names are the lines of classes.txt or classnames.txt beside the shards, or numbers up to ?classes=N; without any,
numbers up to the largest label of the first split. Where there are no labels, they are those of the masks.
The places of all members are found once and kept (tar_index.py); the order is that of the shards. Splits are told by
the names of shards or folders: see shard_files.py.
"""

import hashlib
import json
import logging
import math
import os
from typing import Any

import numpy as np

from regvit_jax.data.decode import decode_map
from regvit_jax.data.sources import IGNORE, Source, kept_index, shard_files, tar_index
from regvit_jax.data.sources.folder import few
from regvit_jax.data.sources.paired import whole_numbers
from regvit_jax.data.sources.tar_members import member_name

OPTIONS = ("image", "mask", "depth", "label", "classes", "ignore", "metres")
LAYOUT = (
    "Expected WebDataset shards such as train-000000.tar, with 000017.jpg and 000017.cls in them, as tar:FOLDER, "
    "tar:FOLDER/train-*.tar or tar:FOLDER/train-{000000..000146}.tar"
)
_KINDS = {
    "image": tar_index.IMAGES,
    "mask": ("seg.png", "mask.png"),
    "depth": ("depth.png",),
    "caption": ("txt", "text"),
}
_MILLIMETRE = "0.001"

_log = logging.getLogger(__name__)


def open(path: str, options: dict[str, str], split: str | None) -> "Tar":
    """One split; `split` defaults to train, or to the first.

    Raises:
      FileNotFoundError: if there are no shards, or one that braces name is missing.
      ValueError: for compressed shards, an unknown option, a split that is not there, shards without a sample, samples
        with several pictures, or labels of which none can be read.
    """
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise ValueError(f"tar: has no option {', '.join(unknown)}; there are {', '.join(OPTIONS)}")
    root, found = shard_files.shards(path, _is_shard, "tar", LAYOUT)
    split = shard_files.chosen(split, found, f"tar:{path}")
    compressed = [name for name in found[split] if _compressed(os.path.join(root, name))]
    if compressed:
        raise ValueError(
            f"tar: {len(compressed)} shards in {root} are compressed ({few(compressed, 3)}), and then nothing in them "
            f"can be read in place: gunzip them, the pictures are compressed already"
        )
    names = shard_files.class_names(root, options.get("classes"), "tar")
    splits = tuple(filter(None, found))
    source = Tar(root, splits, found[split], options, names)
    first = next(iter(found))
    if not names and source.class_names and split != first:
        source.class_names = Tar(root, splits, found[first], options, names).class_names
    return source


class Tar(Source):
    """See the top of the file. Pickled as its folder and names; the index is mapped into memory."""

    def __init__(self, root: str, splits: tuple[str, ...], files: list[str], options: dict, names: tuple[str, ...]):
        self.root, self.splits, self.files = root, splits, tuple(files)
        self.metres = _number(options.get("metres", _MILLIMETRE))
        self.ignore = _values(options["ignore"]) if "ignore" in options else ()
        kinds = {field: (options[field].lower(),) if field in options else of for field, of in _KINDS.items()}
        if "image" not in options:
            # 000017.png is a mask where ?mask=png says so.
            taken = kinds["mask"] + kinds["depth"]
            kinds["image"] = tuple(kind for kind in kinds["image"] if kind not in taken)
        self.index = tar_index.indexed(root, files, kinds, options.get("label", ""), names)
        self.faults = tuple(f"{root}/{name}: {reason}" for name, reason in self.index.torn.items())
        for fault in self.faults:
            _log.warning("%s", fault)
        if not self.index.count:
            raise ValueError(f"no sample is in the {len(files)} shards in {root}: {few(self.faults, 2)}. {LAYOUT}")
        rows = kept_index.samples(self.index)
        highest, lowest = int(rows["label"].max()), int(rows["label"].min())
        if highest < 0 and lowest == tar_index.UNREADABLE:
            raise ValueError(
                f"no label can be used. {few(self.faults, 2)}. Labels are numbers from 0, or names that are lines of "
                f"{os.path.join(root, shard_files.CLASS_LISTS[0])}"
            )
        if highest >= 0:
            self.class_names = names or tuple(map(str, range(highest + 1)))
        elif rows["mask_size"].any():
            self.mask_names = names

    def __len__(self) -> int:
        return self.index.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, row = self._row(index)
        sample = {"image": self._member(path, row, "image"), "label": max(int(row["label"]), -1)}
        if row["mask_size"]:
            sample["mask"] = self._mask(self._member(path, row, "mask"), index)
        if row["depth_size"]:
            sample["depth"] = self._depth(self._member(path, row, "depth"), index)
        if row["caption_size"]:
            sample["caption"] = self._member(path, row, "caption").decode("utf-8", "replace").strip()
        return sample

    def name(self, index: int) -> str:
        """shard/member of the image."""
        path, row = self._row(index)
        offset = int(row["image"])
        try:
            member = member_name(kept_index.opened(path, self.index.samples), offset)
        except OSError:
            member = ""
        return f"{self.files[row['file']]}/{member or f'byte {offset}'}"

    @property
    def labels(self) -> np.ndarray:
        return np.maximum(kept_index.samples(self.index)["label"], -1)

    @property
    def fingerprint(self) -> str:
        """Of names and sizes of the shards, places of the members, labels and classes, not of the folder."""
        meaning = [self.index.fingerprint, self.class_names, self.mask_names, self.metres, self.ignore]
        return hashlib.blake2b(json.dumps(meaning).encode(), digest_size=16).hexdigest()

    def _row(self, index):
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.root}")
        row = kept_index.samples(self.index)[index]
        return os.path.join(self.root, self.files[row["file"]]), row

    def _member(self, path, row, field):
        return kept_index.read(path, self.index, int(row[field]), int(row[f"{field}_size"]))

    def _mask(self, encoded, index):
        name = f"the mask of {self.name(index)}"
        values = whole_numbers(decode_map(encoded, name), name, LAYOUT)
        counts = ~np.isin(values, (*self.ignore, IGNORE))
        wrong = values[counts & ((values < 0) | (values > IGNORE))]
        if wrong.size:
            raise ValueError(
                f"{name} has the value {wrong[0]}: classes are below {IGNORE}. ?ignore={wrong[0]} leaves it out"
            )
        return np.where(counts, values, IGNORE).astype(np.uint8)

    def _depth(self, encoded, index):
        values = decode_map(encoded, f"the depth map of {self.name(index)}")
        if values.dtype.kind not in "iu" or values.dtype.itemsize < 2:
            raise ValueError(f"the depth map of {self.name(index)} holds {values.dtype} values, expected 16 bits")
        return values.astype(np.float32) * np.float32(self.metres)


def _is_shard(name):
    return name.lower().endswith((".tar", ".tar.gz", ".tgz"))


def _compressed(path):
    """By the name; of a .tar that is compressed all the same, the index says so."""
    return path.lower().endswith((".gz", ".tgz"))


def _values(written):
    if not all(part.isdecimal() for part in written.split(",")):
        raise ValueError(f"tar: ?ignore= are values of masks where nothing counts, such as 11 or 0,11; got {written!r}")
    return tuple(map(int, written.split(",")))


def _number(written):
    try:
        value = float(written)
    except ValueError:
        value = 0.0
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"tar: ?metres= is the unit of depth maps in metres, such as 0.001, got {written!r}")
    return value
