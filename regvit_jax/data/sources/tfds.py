"""tfds:NAME@DIR — datasets that TFDS prepared as array_record, read at random without TensorFlow.

    tfds:imagenet2012@/data/tfds      the newest version below the TFDS data_dir
    tfds:cifar10:3.0.2@/data/tfds#test      tfds:my/config:1.0.0@/data/tfds
    tfds:@/data/imagenet256           the folder of one prepared dataset, such as `regvit data prepare` writes
    tfds:mnist                        DIR is $TFDS_DATA_DIR, by default ~/tensorflow_datasets

The builder's class is not needed. Features are found by type: an Image (or a uint8 (H, W, 3) Tensor) named image, or
the only one; a ClassLabel named label, or the only one; ?image=KEY&label=KEY name others. Encoded pictures come as they
are: TFDS's own decoding without TensorFlow does not honour the declared channels.
"""

import functools
import hashlib
import io
import json
import os
from typing import Any

import numpy as np
from PIL import Image

from regvit_jax.data.sources import Source
from regvit_jax.data.sources.tfds_folder import prepared_folder

OPTIONS = ("image", "label")
# What TFDS's builders call the name of the file that a picture was made from.
_FILE_NAMES = ("file_name", "filename", "image/filename", "image/file_name")


def open(path: str, options: dict[str, str], split: str | None) -> "Tfds":
    """One split of a prepared dataset; `split` defaults to train, or to the only one.

    Raises:
      FileNotFoundError: if there is no such folder, dataset, version or shard; the message says what is there.
      ValueError: for a preparation in another format, features that leave a choice, or a split that is not there.
    """
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise ValueError(f"tfds: has no option {', '.join(unknown)}; there are {', '.join(OPTIONS)}")
    folder = prepared_folder(path)
    builder = _builder(folder)
    found = {name: info for name, info in builder.info.splits.items() if info.num_examples}
    splits = tuple(sorted(found, key=lambda name: name != "train"))
    if not splits:
        raise ValueError(f"{folder} holds no sample: prepare it again")
    if split is None:
        if "train" not in splits and len(splits) > 1:
            raise ValueError(f"{folder} has the splits {', '.join(splits)}: name one, as tfds:{path}#{splits[0]}")
        split = splits[0]
    if split not in splits:
        raise ValueError(f"{folder} has no split {split!r}: it has {', '.join(splits)}")
    missing = [str(file) for file in found[split].filepaths if not os.path.exists(file)]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(found[split].filepaths)} files of the split {split!r} are not there, the first is "
            f"{missing[0]}: copy them, or prepare the dataset again"
        )
    return Tfds(folder, splits, split, builder.info, _keys(builder.info.features, options, folder))


class Tfds(Source):
    """See the top of the file. Pickled as its folder; every process opens the records on first use."""

    def __init__(self, folder: str, splits: tuple[str, ...], split: str, info, keys: dict[str, str]):
        self.folder, self.splits, self.split, self.keys = folder, splits, split, keys
        self.title = info.full_name
        about = info.splits[split]
        self._length = about.num_examples
        self.class_names = tuple(info.features[keys["label"]].names) if "label" in keys else ()
        described = [info.full_name, info.description, split, int(about.num_bytes), list(about.shard_lengths)]
        described = json.dumps([*described, info.features.to_json(), keys, self.class_names], sort_keys=True)
        self._fingerprint = hashlib.blake2b(described.encode(), digest_size=16).hexdigest()
        self._records = None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._record(index)
        sample = {"image": record[self.keys["image"]], "label": -1}
        if "label" in self.keys:
            sample["label"] = int(record[self.keys["label"]])
        for field in ("mask", "depth"):
            if field in self.keys:
                value = record[self.keys[field]]
                sample[field] = value[..., 0] if isinstance(value, np.ndarray) and value.ndim == 3 else value
        if "boxes" in self.keys:
            sample["boxes"] = _pixels(_at(record, self.keys["boxes"]), sample["image"])
        if "caption" in self.keys:
            sample["caption"] = record[self.keys["caption"]].decode("utf-8", "replace")
        return sample

    def name(self, index: int) -> str:
        """The file that the picture was made from, where the records tell, and its place."""
        place = f"{self.title}#{self.split}[{index}]"
        if "name" not in self.keys:
            return place
        try:
            return f"{self._record(index)[self.keys['name']].decode('utf-8', 'replace')} ({place})"
        except OSError:
            return place

    @property
    def fingerprint(self) -> str:
        """Of name, version, description, features and the sizes of the shards: reading all records would take hours."""
        return self._fingerprint

    def __getstate__(self):
        return self.__dict__ | {"_records": None}

    def _record(self, index):
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.folder}#{self.split}")
        if self._records is None:
            self._records = _records(self.folder, self.split, self._fingerprint)
        try:
            return self._records[index % len(self)]
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            # What array_record and the parser raise for damaged shards; the loader replaces what cannot be read.
            raise OSError(f"record {index} of {self.folder}#{self.split} cannot be read: {error}") from error


@functools.lru_cache(maxsize=16)
def _records(folder, split, stamp):
    """Random access to the records of a split, one a process: slices and the parts of a holdout share its files.
    `stamp` is only a key: what was prepared anew is opened anew."""
    from tensorflow_datasets import decode, features

    builder = _builder(folder)
    pictures = [key for key, feature in builder.info.features.items() if isinstance(feature, features.Image)]
    return builder.as_data_source(split, decoders={key: decode.SkipDecoding() for key in pictures})


def _builder(folder):
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:
        # Features that need TensorFlow (video, audio), the features.json of another TFDS: errors of all kinds.
        raise ValueError(f"{folder} cannot be opened without TensorFlow: {error}") from error
    formats = {form.value for form in builder.info.available_file_formats()}
    if "array_record" not in formats:
        raise ValueError(
            f"{folder} is prepared as {', '.join(sorted(formats)) or 'tfrecord'}, which cannot be read at random "
            "without TensorFlow. Prepare it as array_record once, in an environment that has TensorFlow: "
            f"tfds build {builder.name} --file_format=array_record --data_dir=ANOTHER_DIR, or "
            f"tfds convert_format --dataset_version_dir={folder} --out_file_format=array_record --out_dir=ANOTHER_DIR"
        )
    if builder.info.file_format.value != "array_record":
        builder = tfds.builder_from_directory(folder, file_format="array_record")
    return builder


def _keys(features, options, folder):
    """{our field: path of the feature} by the types of `features`."""
    from tensorflow_datasets import features as kinds

    def of(*types):
        return [key for key, feature in features.items() if isinstance(feature, types)]

    tensors = [key for key, feature in features.items() if type(feature) is kinds.Tensor]
    raw = [key for key in tensors if features[key].np_dtype == np.uint8 and features[key].shape[2:] == (3,)]
    pictures = [*of(kinds.Image), *raw]
    coloured = [key for key in pictures if features[key].shape[-1] != 1]
    keys = {"image": _choice("image", coloured or pictures, options, features, folder)}
    labels = of(kinds.ClassLabel)
    if labels or "label" in options:
        keys["label"] = _choice("label", labels, options, features, folder)
    masks = [key for key in pictures if key not in (keys["image"], "depth") and features[key].shape[-1] == 1]
    if len(masks) == 1:
        keys["mask"] = masks[0]
    if "depth" in tensors and len(features["depth"].shape) in (2, 3):
        keys["depth"] = "depth"
    boxes = [
        path for key, feature in features.items() for path in _boxes(key, feature, kinds.Sequence, kinds.BBoxFeature)
    ]
    if len(boxes) == 1:
        keys["boxes"] = boxes[0]
    texts = of(kinds.Text)
    for field, names in (("caption", ("caption", "text")), ("name", _FILE_NAMES)):
        there = [name for name in names if name in texts]
        if there:
            keys[field] = there[0]
    return keys


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
