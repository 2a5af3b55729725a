"""tfrecord: of files that no TFDS metadata describes: records are tf.train.Example messages with a picture in each.

    ?image=KEY      feature with the encoded picture; by default image/encoded, image or jpg
    ?label=KEY      feature with its class, an integer; by default image/class/label, label or cls where it is there
    ?classes=N      number of classes, or classes.txt beside the files: nothing else says it without reading them all
    ?first=1        number of the first class: 1 in ImageNet as TF-Slim and the TPU tools write it; by default 0

Splits are told by the names of files: see shard_files.py.
"""

import hashlib
import json
import logging
import os
import re
from typing import Any

from regvit_jax.data.sources import Source, shard_files, tfrecord_index

OPTIONS = ("image", "label", "classes", "first")
LAYOUT = (
    "Expected the folder of a dataset that TFDS prepared (with dataset_info.json), or files such as "
    "train-00000-of-01024 or train-00000.tfrecord, as tfrecord:FOLDER or tfrecord:FOLDER/train-*"
)
_OF = re.compile(r"-\d+-of-(\d+)")
_KEYS = {
    "image": ("image/encoded", "image", "jpg"),
    "label": ("image/class/label", "label", "cls"),
    "caption": ("caption", "text", "txt"),
    "name": ("image/filename", "file_name", "filename", "__key__"),
}

_log = logging.getLogger(__name__)


def opened(path: str, options: dict[str, str], split: str | None) -> "Examples":
    """See `tfrecord.open`."""
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise ValueError(
            f"tfrecord: has no option {', '.join(unknown)}; there are {', '.join(OPTIONS)} for files that TFDS did not "
            "prepare"
        )
    root, found = shard_files.shards(path, _is_shard, "tfrecord", LAYOUT)
    split = shard_files.chosen(split, found, f"tfrecord:{path}")
    names = shard_files.class_names(root, options.get("classes"), "tfrecord")
    return Examples(root, tuple(filter(None, found)), found[split], options, names)


class Examples(Source):
    """Pickled as its folder and names; the index is mapped into memory."""

    def __init__(self, root: str, splits: tuple[str, ...], files: list[str], options: dict, names: tuple[str, ...]):
        self.root, self.splits, self.files = root, splits, tuple(files)
        first = options.get("first", "0")
        if not first.isdecimal():
            raise ValueError(f"tfrecord: ?first= is the number of the first class, got {first!r}")
        self.first = int(first)
        listed = hashlib.blake2b(json.dumps(files).encode(), digest_size=8).hexdigest()
        self.index = tfrecord_index.indexed(root, files, f"tfrecord-{listed}")
        self.faults = _faults(root, files, self.index)
        for fault in self.faults:
            _log.warning("%s", fault)
        if not self.index.count:
            raise ValueError(f"no record of {root} can be read: {'; '.join(self.faults[:3]) or 'the files are empty'}")
        self.keys = _chosen(_features(self._content(0)), options, f"{root}/{files[0]}")
        self.class_names = names if "label" in self.keys else ()
        if "label" in self.keys and not names:
            _log.warning(
                "%s has labels (%s), and nothing says of how many classes: they are not used. Write ?classes=N, or a "
                "name a line into %s",
                *(root, self.keys["label"], os.path.join(root, shard_files.CLASS_LISTS[0])),
            )

    def __len__(self) -> int:
        return self.index.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = self._checked(index)
        features = _features(self._content(index))
        sample = {"image": self._value(features, "image", index), "label": -1}
        if self.class_names:
            sample["label"] = label = self._value(features, "label", index) - self.first
            if not 0 <= label < self.num_classes:
                raise ValueError(
                    f"{self.name(index)} has the label {label + self.first}, of {self.num_classes} classes from "
                    f"{self.first}: set ?classes= and ?first= (1 where labels begin at 1)"
                )
        if "caption" in self.keys:
            sample["caption"] = self._value(features, "caption", index).decode("utf-8", "replace")
        return sample

    def name(self, index: int) -> str:
        """The file that the picture was made from, where the record tells, and its place."""
        index = self._checked(index)
        number, offset, _ = tfrecord_index.place(self.index, index)
        place = f"{self.files[number]}, byte {offset}"
        if "name" not in self.keys:
            return place
        try:
            found = self._value(_features(self._content(index)), "name", index)
        except OSError:
            return place
        return f"{found.decode('utf-8', 'replace')} ({place})"

    @property
    def fingerprint(self) -> str:
        """Of names, sizes and places of the records, and of what is taken for what."""
        meaning = [self.index.fingerprint, self.keys, self.class_names, self.first]
        return hashlib.blake2b(json.dumps(meaning, sort_keys=True).encode(), digest_size=16).hexdigest()

    def _checked(self, index):
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.root}")
        return index % len(self)

    def _content(self, index):
        number, offset, size = tfrecord_index.place(self.index, index)
        return tfrecord_index.content(os.path.join(self.root, self.files[number]), self.index, offset, size)

    def _value(self, features, field, index):
        key = self.keys[field]
        if key not in features or len(features[key]) != 1:
            place = tfrecord_index.place(self.index, index)
            raise OSError(f"{self.files[place[0]]}, byte {place[1]}: the record has not one value of {key!r}")
        return features[key][0]


def _is_shard(name):
    return "tfrecord" in name.lower() or _OF.search(name) is not None


def _features(content) -> dict[str, list]:
    """{key: values} of an Example.

    Raises:
      OSError: if it is none.
    """
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2

    try:
        features = tf_example_pb2.Example.FromString(content).features.feature
    except DecodeError as error:
        raise OSError(f"a record of {len(content)} bytes is no tf.train.Example: {error}") from error
    # A feature of no kind is an empty one.
    return {
        key: getattr(feature, kind).value if (kind := feature.WhichOneof("kind")) else []
        for key, feature in features.items()
    }


def _chosen(features, options, place):
    """{our field: key} by the features of the first record."""
    types = {"image": bytes, "label": int, "caption": bytes, "name": bytes}
    found = {}
    for field, names in _KEYS.items():
        fitting = [key for key, values in features.items() if len(values) == 1 and isinstance(values[0], types[field])]
        asked = options.get(field)
        there = [key for key in ([asked] if asked else names) if key in fitting]
        if there:
            found[field] = there[0]
        elif asked or field == "image":
            what = "one encoded picture" if field == "image" else "one integer"
            kinds = ", ".join(
                f"{key} ({len(values)} {type(values[0]).__name__ if len(values) else 'values'})"
                for key, values in sorted(features.items())
            )
            raise ValueError(
                f"the first record of {place} has no feature {asked or ' or '.join(names)} with {what}; name it by "
                f"?{field}=KEY: it has {kinds or 'none'}"
            )
    return found


def _faults(root, files, index):
    faults = [f"{root}/{name} is damaged, what is readable of it is used: {index.torn[name]}" for name in index.torn]
    parts = [int(found[1]) for name in files if (found := _OF.search(name))]
    if parts and len(set(parts)) == 1 and len(files) < parts[0]:
        faults.append(f"{len(files)} of {parts[0]} files such as {root}/{files[0]} are there: copy the others")
    return tuple(faults)
