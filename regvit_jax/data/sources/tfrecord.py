"""tfrecord:PATH — TFRecord files, read at random without TensorFlow: a copy that TFDS prepared, or files of Examples.

    tfrecord:/data/tfds/imagenet2012/5.1.0        the folder with dataset_info.json; also NAME@DIR, as for tfds:
    tfrecord:/data/imagenet                       train-00000-of-01024 …  validation-00000-of-00128 …
    tfrecord:/d/train-*?image=image/encoded&label=image/class/label&classes=1000&first=1

Records are in the order of the files. Their places are found once and kept (kept_index.py); a check sum protects each.
What TFDS prepared has its features and options as in tfds:, see tfds_features.py; for others see tfrecord_examples.py.
"""

import functools
import glob
import hashlib
import logging
import os
from typing import Any

import numpy as np

from regvit_jax.data.sources import Source, kept_index, tfds_features, tfrecord_examples, tfrecord_index
from regvit_jax.data.sources.tfds_folder import INFO, prepared_folder

_log = logging.getLogger(__name__)


def open(path: str, options: dict[str, str], split: str | None) -> Source:
    """One split; `split` defaults to train, or to the first.

    Raises:
      FileNotFoundError: if there are no such files, or one of those that belong to a dataset is missing.
      ValueError: for another format, features that leave a choice, an unknown option, or a split that is not there.
    """
    root = os.path.abspath(os.path.expanduser(path))
    if path and os.path.isfile(os.path.join(root, INFO)):
        return _prepared(root, path, options, split)
    if "@" in path and not os.path.exists(root):
        return _prepared(prepared_folder(path, "tfrecord"), path, options, split)
    try:
        return tfrecord_examples.opened(path, options, split)
    except FileNotFoundError as error:
        places = [os.path.join(glob.escape(root), depth, INFO) for depth in ("*", "*/*", "*/*/*")]
        below = [found for place in places for found in glob.glob(place)]
        if not below:
            raise
        hint = f"write tfrecord:{os.path.dirname(below[0])}"
        raise FileNotFoundError(f"{root} is above prepared datasets: {hint}") from error


def _prepared(folder, path, options, split):
    tfds_features.check_options(options, "tfrecord")
    builder = _builder(folder)
    splits, split = tfds_features.chosen_split(builder.info, folder, split, f"tfrecord:{path}")
    return Tfrecord(folder, splits, split, builder.info, tfds_features.keys(builder.info.features, options, folder))


class Tfrecord(tfds_features.Prepared):
    """What TFDS prepared. Pickled as its folder and names; the index is mapped into memory."""

    def __init__(self, folder: str, splits: tuple[str, ...], split: str, info, keys: dict[str, str]):
        super().__init__(folder, splits, split, info, keys)
        about = info.splits[split]
        self.files = tuple(os.path.basename(file) for file in about.filepaths)
        self.index = tfrecord_index.indexed(folder, list(self.files), split)
        self.faults = _faults(folder, self.files, self.index, about.shard_lengths)
        if not self.index.count:
            raise ValueError(f"no record of {folder}#{split} can be read: {self.faults[0]}")
        self._length = self.index.count
        both = f"{self._fingerprint} {self.index.fingerprint}"
        self._fingerprint = hashlib.blake2b(both.encode(), digest_size=16).hexdigest()

    def _place(self, index):
        number, offset, _ = tfrecord_index.place(self.index, index)
        return f"{self.files[number]}, byte {offset}"

    def _record(self, index) -> dict[str, Any]:
        number, offset, size = tfrecord_index.place(self.index, index)
        raw = tfrecord_index.content(os.path.join(self.folder, self.files[number]), self.index, offset, size)
        features, decoders = _parser(self.folder, self._fingerprint)
        try:
            return features.deserialize_example_np(raw, decoders=decoders)
        except Exception as error:
            # The content is what was written, but not what features.json says: that raises errors of all kinds.
            raise ValueError(
                f"{self._place(index)} is no example of the features in {self.folder}: {error}. Are the files and "
                "features.json of one preparation?"
            ) from error


def _faults(folder, files, index, expected):
    """What is wrong with the files of a split, beside how many records dataset_info.json expects in them."""
    counts = np.bincount(kept_index.samples(index)["file"], minlength=len(files)).tolist()
    faults = []
    for name, count, wanted in zip(files, counts, expected, strict=True):
        if name in index.torn:
            faults.append(f"{folder}/{name} is damaged, what is readable of it is used: {index.torn[name]} of {wanted}")
        elif count != wanted:
            faults.append(f"{folder}/{name} holds {count} records, {INFO} says {wanted}: are they of one preparation?")
    for fault in faults:
        _log.warning("%s", fault)
    return tuple(faults)


@functools.lru_cache(maxsize=16)
def _parser(folder, stamp):
    """(features, decoders), one a process; `stamp` is only a key."""
    features = _builder(folder).info.features
    return features, tfds_features.undecoded(features)


def _builder(folder):
    try:
        builder, formats = tfds_features.builder(folder, "tfrecord")
    except ValueError as error:
        plain = f"tfrecord:{folder}/*.tfrecord*?image=image&label=label&classes=N"
        raise ValueError(f"{error}. Its records can be read without its features, by {plain}") from error
    if "tfrecord" not in formats:
        hint = f": write tfds:@{folder}" if "array_record" in formats else ""
        raise ValueError(f"{folder} is prepared as {', '.join(formats)}, not as tfrecord{hint}")
    return builder
