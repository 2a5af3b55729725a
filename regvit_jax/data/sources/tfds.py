"""tfds:NAME@DIR — datasets that TFDS prepared as array_record, read at random without TensorFlow.

    tfds:imagenet2012@/data/tfds      the newest version below the TFDS data_dir
    tfds:cifar10:3.0.2@/data/tfds#test      tfds:my/config:1.0.0@/data/tfds
    tfds:@/data/imagenet256           the folder of one prepared dataset, such as `regvit data prepare` writes
    tfds:mnist                        DIR is $TFDS_DATA_DIR, by default ~/tensorflow_datasets

The builder's class is not needed. Features are found by type, ?image=KEY&label=KEY name others: see tfds_features.py.
"""

import functools
from typing import Any

from regvit_jax.data.sources import tfds_features
from regvit_jax.data.sources.tfds_folder import prepared_folder


def open(path: str, options: dict[str, str], split: str | None) -> "Tfds":
    """One split of a prepared dataset; `split` defaults to train, or to the only one.

    Raises:
      FileNotFoundError: if there is no such folder, dataset, version or shard; the message says what is there.
      ValueError: for a preparation in another format, features that leave a choice, or a split that is not there.
    """
    tfds_features.check_options(options, "tfds")
    folder = prepared_folder(path)
    info = _builder(folder).info
    splits, split = tfds_features.chosen_split(info, folder, split, f"tfds:{path}")
    return Tfds(folder, splits, split, info, tfds_features.keys(info.features, options, folder))


class Tfds(tfds_features.Prepared):
    """See the top of the file. Pickled as its folder; every process opens the records on first use."""

    def __init__(self, folder: str, splits: tuple[str, ...], split: str, info, keys: dict[str, str]):
        super().__init__(folder, splits, split, info, keys)
        self._records = None

    def __getstate__(self):
        return self.__dict__ | {"_records": None}

    def _record(self, index) -> dict[str, Any]:
        if self._records is None:
            self._records = _records(self.folder, self.split, self._fingerprint)
        try:
            return self._records[index]
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            # What array_record and the parser raise for damaged shards; the loader replaces what cannot be read.
            raise OSError(f"record {index} of {self.folder}#{self.split} cannot be read: {error}") from error


@functools.lru_cache(maxsize=16)
def _records(folder, split, stamp):
    """Random access to the records of a split, one a process: slices and the parts of a holdout share its files.
    `stamp` is only a key: what was prepared anew is opened anew."""
    builder = _builder(folder)
    return builder.as_data_source(split, decoders=tfds_features.undecoded(builder.info.features))


def _builder(folder):
    builder, formats = tfds_features.builder(folder, "array_record")
    if "array_record" in formats:
        return builder
    written = ", ".join(formats)
    raise ValueError(
        f"{folder} is prepared as {written}, which tfds: does not read. "
        + (f"Read it as it is by tfrecord:@{folder}, or prepare" if "tfrecord" in formats else "Prepare")
        + " it as array_record once, in an environment that has TensorFlow: "
        f"tfds build {builder.name} --file_format=array_record --data_dir=ANOTHER_DIR, or "
        f"tfds convert_format --dataset_version_dir={folder} --out_file_format=array_record --out_dir=ANOTHER_DIR"
    )
