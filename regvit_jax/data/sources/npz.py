"""npz:FILE — encoded images in one NumPy archive: small datasets without thousands of files.

Per split: `{split}_jpeg` (all encoded images end to end, uint8), `{split}_offsets` (n+1 integers: image i is bytes
offsets[i] to offsets[i+1]), `{split}_labels` (n integers; without it there are no labels). Optional: `classes` (names,
in label order).
"""

import functools
import hashlib
import os
import zipfile

import numpy as np

from regvit_jax.data.sources import Source

_IMAGES, _OFFSETS, _LABELS, _CLASSES = "jpeg", "offsets", "labels", "classes"


def open(path: str, options: dict[str, str], split: str | None) -> "Npz":
    """The images of one split of the archive; `split` defaults to train, or to the only one.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is no such archive, its arrays do not fit together, or the split is not in it.
    """
    if options:
        raise ValueError(f"npz: takes no options, got {', '.join(sorted(options))}")
    path = os.path.abspath(os.path.expanduser(path))
    if not os.path.isfile(path):
        raise FileNotFoundError(f"npz:{path}: no such file")
    members = _members(path)
    splits = [name[: -len(_IMAGES) - 1] for name in members if name.endswith("_" + _IMAGES)]
    splits = tuple(sorted(splits, key=lambda name: name != "train"))
    if not splits:
        raise ValueError(
            f"{path} holds no split: expected arrays named like train_{_IMAGES}, found {', '.join(members)}"
        )
    if split is None:
        if "train" not in splits and len(splits) > 1:
            raise ValueError(f"{path} has the splits {', '.join(splits)}: name one, as npz:{path}#{splits[0]}")
        split = splits[0]
    if split not in splits:
        raise ValueError(f"{path} has no split {split!r}: it has {', '.join(splits)}")
    return Npz(path, splits, split, members)


class Npz(Source):
    """See the top of the file. Pickled as its path; each process reads the bytes once, on first use."""

    def __init__(self, path: str, splits: tuple[str, ...], split: str, members: dict[str, int]):
        self.path, self.splits, self.split = path, splits, split
        status = os.stat(path)
        self._stamp = (status.st_mtime_ns, status.st_size)
        used = [name for name in members if name == _CLASSES or name.startswith(f"{split}_")]
        # The archive keeps a checksum of every array: no need to read them again.
        listed = " ".join(f"{name}:{members[name]:08x}" for name in sorted(used))
        self._fingerprint = hashlib.blake2b(listed.encode(), digest_size=16).hexdigest()
        offsets, labels = _index(path, split, self._stamp)
        size = _length(path, f"{split}_{_IMAGES}")
        if (
            offsets.ndim != 1
            or len(offsets) < 2
            or offsets[0] != 0
            or offsets[-1] != size
            or (np.diff(offsets) < 0).any()
        ):
            raise ValueError(
                f"{path}: {split}_{_OFFSETS} must be n+1 growing integers from 0 to the {size} bytes of "
                f"{split}_{_IMAGES}, got shape "
                f"{offsets.shape}" + (f" from {offsets.flat[0]} to {offsets.flat[-1]}" if offsets.size else "")
            )
        if labels is not None and labels.shape != (len(offsets) - 1,):
            raise ValueError(f"{path}: {len(offsets) - 1} images but {split}_{_LABELS} of shape {labels.shape}")
        self.class_names = _class_names(path, splits, members, self._stamp) if labels is not None else ()
        if labels is not None and labels.max() >= len(self.class_names):
            raise ValueError(
                f"{path}: label {labels.max()} in {split}_{_LABELS}, but only {len(self.class_names)} classes"
            )

    def __len__(self):
        return len(_index(self.path, self.split, self._stamp)[0]) - 1

    def __getitem__(self, index):
        n = len(self)
        if not -n <= index < n:
            raise IndexError(f"sample {index} of {n} in {self.path}#{self.split}")
        index %= n
        offsets, labels = _index(self.path, self.split, self._stamp)
        encoded = _encoded(self.path, self.split, self._stamp)[offsets[index] : offsets[index + 1]].tobytes()
        return {"image": encoded, "label": -1 if labels is None else int(labels[index])}

    def name(self, index):
        return f"{os.path.basename(self.path)}#{self.split}[{index}]"

    @property
    def labels(self):
        labels = _index(self.path, self.split, self._stamp)[1]
        return np.full(len(self), -1) if labels is None else labels.astype(np.int32)

    @property
    def fingerprint(self):
        return self._fingerprint


def _members(path):
    """{array name: checksum of its bytes} of the archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {info.filename.removesuffix(".npy"): info.CRC for info in archive.infolist()}
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is no npz archive: {error}") from error


def _class_names(path, splits, members, stamp):
    if _CLASSES in members:
        return tuple(str(name) for name in _array(path, _CLASSES))
    labels = [_index(path, split, stamp)[1] for split in splits]
    return tuple(str(label) for label in range(1 + max(int(array.max()) for array in labels if array is not None)))


# The caches belong to the process, not to the source: slices and the two parts of a holdout share one copy of the
# bytes. `stamp` (time and size of the file) is only a key: a file that was written anew is read anew.
@functools.lru_cache(maxsize=4)
def _encoded(path, split, stamp):
    return _array(path, f"{split}_{_IMAGES}")


@functools.lru_cache(maxsize=16)
def _index(path, split, stamp):
    members = _members(path)
    if f"{split}_{_OFFSETS}" not in members:
        raise ValueError(f"{path} has {split}_{_IMAGES} but no {split}_{_OFFSETS}, which says where each image ends")
    labels = f"{split}_{_LABELS}"
    return _array(path, f"{split}_{_OFFSETS}"), _array(path, labels) if labels in members else None


def _array(path, name):
    with np.load(path, allow_pickle=False) as archive:
        return archive[name]


def _length(path, name):
    """Length of a vector in the archive, from its header."""
    with zipfile.ZipFile(path) as archive, archive.open(name + ".npy") as member:
        version = np.lib.format.read_magic(member)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read_header(member)[0][0]
