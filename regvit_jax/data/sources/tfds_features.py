"""Samples of the records that TFDS writes, in any file format: which feature is what, and what a dataset must not be
used for.

Features are found by type: an Image (or a uint8 (H, W, 3) Tensor) named image, or the only one; a ClassLabel named
label, or the only one; ?image=KEY&label=KEY name others. Encoded pictures stay as they are: TFDS's own decoding without
TensorFlow does not honour the declared channels.
"""

import hashlib
import io
import json
import os
from typing import Any

import numpy as np
from PIL import Image

from regvit_jax.data.sources import Source

OPTIONS = ("image", "label")
# What TFDS's builders call the name of the file that a picture was made from.
_FILE_NAMES = ("file_name", "filename", "image/filename", "image/file_name")
# Datasets whose maps are not those of the protocol that goes by their name -> why, and what to read instead.
NOT_DENSE = {
    "scene_parse150": "TFDS made it from the instance annotations of ADE20K (class and number of the object in two "
    "channels of a colour picture), not from the 150 classes of a pixel that are measured. Read the unpacked "
    "ADEChallengeData2016: ade20k:/data/ADEChallengeData2016",
    "nyu_depth_v2": "TFDS made it from FastDepth's re-encoded copy of NYU Depth v2 (float16, other training images), "
    "whose numbers compare with no published ones. Read the pictures and depth maps that BTS gives: nyud:/data/nyu",
}

# Our field -> what TFDS's builders call it in a list of objects.
_OF_BOXES = {"box_labels": "label", "difficult": "is_difficult", "truncated": "is_truncated"}


class Prepared(Source):
    """One split of a dataset that TFDS prepared; subclasses read a record, as a nested dict of arrays and bytes."""

    def __init__(self, folder: str, splits: tuple[str, ...], split: str, info, keys: dict[str, str]):
        self.folder, self.splits, self.split, self.keys = folder, splits, split, keys
        self.title = info.full_name
        self.dense_refusal = NOT_DENSE[info.name] if info.name in NOT_DENSE else ""
        about = info.splits[split]
        self._length = about.num_examples
        self.class_names = tuple(info.features[keys["label"]].names) if "label" in keys else ()
        self.box_names = tuple(_feature(info.features, keys["box_labels"]).names) if "box_labels" in keys else ()
        described = [info.full_name, info.description, split, int(about.num_bytes), list(about.shard_lengths)]
        described = json.dumps([*described, info.features.to_json(), keys, self.class_names], sort_keys=True)
        self._fingerprint = hashlib.blake2b(described.encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return sample(self._record(self._checked(index)), self.keys)

    def name(self, index: int) -> str:
        """The file that the picture was made from, where the records tell, and its place."""
        index = self._checked(index)
        if "name" not in self.keys:
            return self._place(index)
        try:
            record = self._record(index)
        except OSError:
            return self._place(index)
        return f"{record[self.keys['name']].decode('utf-8', 'replace')} ({self._place(index)})"

    @property
    def fingerprint(self) -> str:
        """Of name, version, description, features and the sizes of the shards: reading all records would take hours."""
        return self._fingerprint

    def _checked(self, index):
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.folder}#{self.split}")
        return index % len(self)

    def _place(self, index) -> str:
        return f"{self.title}#{self.split}[{index}]"

    def _record(self, index) -> dict[str, Any]:
        raise NotImplementedError


def builder(folder: str, form: str):
    """(TFDS's builder of a prepared dataset, opened in the format `form` where it is there; the formats that are).

    Raises:
      ValueError: if TFDS cannot open it without TensorFlow.
    """
    import tensorflow_datasets as tfds

    try:
        found = tfds.builder_from_directory(folder)
    except Exception as error:
        # Features that need TensorFlow (video, audio), the features.json of another TFDS: errors of all kinds.
        raise ValueError(f"{folder} cannot be opened without TensorFlow: {error}") from error
    formats = sorted({form.value for form in found.info.available_file_formats()}) or ["tfrecord"]
    if form in formats and found.info.file_format.value != form:
        found = tfds.builder_from_directory(folder, file_format=form)
    return found, formats


def chosen_split(info, folder: str, split: str | None, kind: str) -> tuple[tuple[str, ...], str]:
    """(splits that hold samples, the one asked for; train or the only one where none is), with all its files there.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: for a split that is not there, or where several are and none is named.
    """
    found = {name: about for name, about in info.splits.items() if about.num_examples}
    splits = tuple(sorted(found, key=lambda name: name != "train"))
    if not splits:
        raise ValueError(f"{folder} holds no sample: prepare it again")
    if split is None:
        if "train" not in splits and len(splits) > 1:
            raise ValueError(f"{folder} has the splits {', '.join(splits)}: name one, as {kind}#{splits[0]}")
        split = splits[0]
    if split not in splits:
        raise ValueError(f"{folder} has no split {split!r}: it has {', '.join(splits)}")
    files = found[split].filepaths
    missing = [str(file) for file in files if not os.path.exists(file)]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(files)} files of the split {split!r} are not there, the first is {missing[0]}: "
            "copy them, or prepare the dataset again"
        )
    return splits, split


def check_options(options: dict[str, str], kind: str) -> None:
    """Raises ValueError for an option that is not one of OPTIONS."""
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise ValueError(f"{kind}: has no option {', '.join(unknown)}; there are {', '.join(OPTIONS)}")


def undecoded(features) -> dict:
    """The decoders that leave the pictures among `features` encoded."""
    from tensorflow_datasets import decode
    from tensorflow_datasets import features as kinds

    return {key: decode.SkipDecoding() for key, feature in features.items() if isinstance(feature, kinds.Image)}


def sample(record: dict[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    """A sample, as `Source` describes it, of a record."""
    found = {"image": record[keys["image"]], "label": -1}
    if "label" in keys:
        found["label"] = int(record[keys["label"]])
    for field in ("mask", "depth"):
        if field in keys:
            value = record[keys[field]]
            found[field] = value[..., 0] if isinstance(value, np.ndarray) and value.ndim == 3 else value
    if "boxes" in keys:
        found["boxes"] = _pixels(_at(record, keys["boxes"]), found["image"])
    for field in _OF_BOXES:
        if field in keys:
            found[field] = np.asarray(_at(record, keys[field]), np.int64 if field == "box_labels" else bool)
    if "caption" in keys:
        found["caption"] = record[keys["caption"]].decode("utf-8", "replace")
    return found


def keys(features, options: dict[str, str], folder: str) -> dict[str, str]:
    """{our field: path of the feature} by the types of `features`, or as `options` say.

    Raises:
      ValueError: if there is no picture, several and none chosen, or not the one asked for.
    """
    from tensorflow_datasets import features as kinds

    def of(*types):
        return [key for key, feature in features.items() if isinstance(feature, types)]

    tensors = [key for key, feature in features.items() if type(feature) is kinds.Tensor]
    raw = [key for key in tensors if features[key].np_dtype == np.uint8 and features[key].shape[2:] == (3,)]
    pictures = [*of(kinds.Image), *raw]
    coloured = [key for key in pictures if features[key].shape[-1] != 1]
    found = {"image": _choice("image", coloured or pictures, options, features, folder)}
    labels = of(kinds.ClassLabel)
    if labels or "label" in options:
        found["label"] = _choice("label", labels, options, features, folder)
    masks = [key for key in pictures if key not in (found["image"], "depth") and features[key].shape[-1] == 1]
    if len(masks) == 1:
        found["mask"] = masks[0]
    if "depth" in tensors and len(features["depth"].shape) in (2, 3):
        found["depth"] = "depth"
    boxes = [
        path for key, feature in features.items() for path in _boxes(key, feature, kinds.Sequence, kinds.BBoxFeature)
    ]
    if len(boxes) == 1:
        found["boxes"] = boxes[0]
        outer, _, _ = boxes[0].rpartition("/")
        beside = features[outer].feature if outer else {}
        for field, name in _OF_BOXES.items():
            if name in beside and (field != "box_labels" or isinstance(beside[name], kinds.ClassLabel)):
                found[field] = f"{outer}/{name}"
    texts = of(kinds.Text)
    for field, names in (("caption", ("caption", "text")), ("name", _FILE_NAMES)):
        there = [name for name in names if name in texts]
        if there:
            found[field] = there[0]
    return found


def _choice(field, candidates, options, features, folder):
    """The feature that `field` is read from: the one asked for, the one of that name, or the only one."""
    asked = options.get(field)
    if asked is not None and asked in candidates:
        return asked
    if asked is None and field in candidates:
        return field
    if asked is None and len(candidates) == 1:
        return candidates[0]
    there = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in features.items())
    kind = "picture" if field == "image" else "ClassLabel"
    if asked is not None:
        raise ValueError(f"{folder} has no {kind} {asked!r} for ?{field}=: its features are {there}")
    if not candidates:
        raise ValueError(f"{folder} holds no {kind}: its features are {there}")
    raise ValueError(f"{folder} has several {kind}s, choose one by ?{field}={candidates[0]}: its features are {there}")


def _boxes(path, feature, sequence, boxes):
    """Paths of lists of boxes: `bboxes`, or `objects/bbox` in a list of objects."""
    if not isinstance(feature, sequence):
        return []
    inner = feature.feature
    if isinstance(inner, boxes):
        return [path]
    return (
        [f"{path}/{key}" for key, part in inner.items() if isinstance(part, boxes)] if hasattr(inner, "items") else []
    )


def _feature(features, path):
    outer, _, inner = path.rpartition("/")
    return features[outer].feature[inner]


def _at(record, path):
    if path in record:
        return record[path]
    outer, _, inner = path.rpartition("/")
    return record[outer][inner]


def _pixels(boxes, image):
    """(n, 4) float32 xyxy in pixels, of TFDS's (ymin, xmin, ymax, xmax) in 0..1."""
    if isinstance(image, np.ndarray):
        height, width = image.shape[:2]
    else:
        with Image.open(io.BytesIO(image)) as opened:
            width, height = opened.size
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    return boxes[:, [1, 0, 3, 2]] * np.float32([width, height, width, height])
