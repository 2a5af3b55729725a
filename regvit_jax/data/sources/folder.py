"""folder:PATH — a tree of image files, with or without class folders, with or without split folders. No metadata files.

    PATH/1.jpg          PATH/2.jpg              no labels
    PATH/cat/1.jpg      PATH/dog/a/2.png        two classes
    PATH/train/1.jpg    PATH/val/7.jpg          two splits, no labels
    PATH/train/cat/1.jpg  PATH/train/dog/2.jpg  PATH/val/cat/7.jpg    two splits, two classes

Labels are the first folder below the split, sorted by name; a split without class folders, or with images beside them,
has no labels. Files come in the order of their names without labels, and in a fixed random order with labels: sorted,
they would come class by class, and a slice such as [:80%] would leave whole classes out.
"""

import functools
import hashlib
import logging
import os

import numpy as np

from regvit_jax.data.sources import Source

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"})
TRAIN_NAMES = ("train", "training")
OTHER_NAMES = ("val", "valid", "validation", "test", "testing")

_log = logging.getLogger(__name__)


def open(path: str, options: dict[str, str], split: str | None) -> "Folder":
    """The images below `path`, or below its split folder; `split` defaults to train where there are splits.

    Raises:
      FileNotFoundError: if `path` is not a folder, or holds no image.
      ValueError: for a split that is not there, or an option (there are none).
    """
    if options:
        raise ValueError(f"folder: takes no options, got {', '.join(sorted(options))}")
    root = os.path.abspath(os.path.expanduser(path))
    if not path or not os.path.isdir(root):
        kind = "is a file, not a folder" if os.path.isfile(root) else "does not exist"
        raise FileNotFoundError(f"folder:{path}: {root} {kind}")
    folders, loose, _ = visible(root)
    splits = _splits(folders, loose)
    if not splits:
        if split is not None:
            raise ValueError(
                f"folder:{path} has no split {split!r}: it holds {_found(folders, loose)}. "
                f"Make {root}/{split}/, or leave '#{split}' "
                f"out; '#[:80%]' takes a part of the whole"
            )
        return Folder(root, (), None, _class_names(root, folders, loose))
    if split is None:
        split = splits[0]
    if split not in splits:
        raise ValueError(f"folder:{path} has no split {split!r}: it has {', '.join(splits)}")
    # The classes of every split are those of the first, so that a class without validation images shifts no label.
    reference = os.path.join(root, splits[0])
    classes = _class_names(reference, *visible(reference)[:2])
    folder, loose = visible(os.path.join(root, split))[:2]
    if loose or not folder:
        classes = ()
    return Folder(os.path.join(root, split), splits, split, classes)


class Folder(Source):
    """See the top of the file. The list of files is made on first use and pickled with it: 40 MB for 1 M files."""

    def __init__(self, root: str, splits: tuple[str, ...], split: str | None, class_names: tuple[str, ...]):
        self.root, self.splits, self.split, self.class_names = root, splits, split, class_names
        self._folders = class_names
        if not _has_image(root):
            folders, _, others = visible(root)
            raise FileNotFoundError(
                f"no image below {root}: it holds {_found(folders, others)}. Expected files ending in "
                f"{' '.join(sorted(EXTENSIONS))}, in class folders ({root}/cat/1.jpg) or not ({root}/1.jpg)"
            )

    @functools.cached_property
    def _files(self) -> tuple[bytes, np.ndarray, np.ndarray]:
        """(names relative to the root end to end, where each one ends, its label): compact, and quick to pickle."""
        names, skipped = listing(self.root)
        if skipped:
            _log.info("%s: %d files that are not images are left out", self.root, skipped)
        if self._folders:
            names.sort(key=scattered)
            number = {name: label for label, name in enumerate(self._folders)}
            unknown = sorted({name.partition("/")[0] for name in names} - number.keys())
            if unknown:
                raise ValueError(
                    f"{self.root} has folders that are no class of the split {self.splits[0]!r}: {few(unknown)}"
                )
            labels = np.array([number[name.partition("/")[0]] for name in names], np.int32)
        else:
            names.sort()
            labels = np.full(len(names), -1, np.int32)
        return packed(names, labels)

    def __len__(self):
        return len(self._files[1])

    def __getitem__(self, index):
        return {"image": os.path.join(self.root, self.name(index)), "label": int(self._files[2][index])}

    def name(self, index):
        """File name relative to the split folder."""
        joined, ends, _ = self._files
        if not -len(ends) <= index < len(ends):
            raise IndexError(f"sample {index} of {len(ends)} in {self.root}")
        index %= len(ends)
        return os.fsdecode(joined[ends[index - 1] if index else 0 : ends[index]])

    @property
    def labels(self):
        return self._files[2]

    @functools.cached_property
    def fingerprint(self):
        """Of names, sizes and order, not of the place: a copy has the same one. Asks for the size of every file."""
        return self._digest().hexdigest()

    def _digest(self):
        digest = hashlib.blake2b(digest_size=16)
        for index in range(len(self)):
            name = self.name(index)
            digest.update(
                f"{name}\0{os.path.getsize(os.path.join(self.root, name))}\0".encode("utf-8", "surrogateescape")
            )
        return digest


def packed(names: list[str], labels: np.ndarray) -> tuple[bytes, np.ndarray, np.ndarray]:
    """What `Folder._files` is, of the names and labels in their final order."""
    encoded = [os.fsencode(name) for name in names]
    return b"".join(encoded), np.cumsum([len(name) for name in encoded]), labels


def scattered(name: str) -> bytes:
    """A sort key that looks random and depends on the name only: a new file moves no other."""
    return hashlib.blake2b(os.fsencode(name), digest_size=8).digest()


def is_image(name: str) -> bool:
    """Whether the name ends as an image file's does."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def visible(folder: str) -> tuple[list[str], list[str], list[str]]:
    """(sub-folders, images, other files) of `folder`, sorted names, without hidden ones."""
    folders, images, others = [], [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(entry.name)
            else:
                (images if is_image(entry.name) else others).append(entry.name)
    return sorted(folders), sorted(images), sorted(others)


def _walk(root):
    """(relative folder, its images, its other files) for each folder below `root`; links are followed, loops not."""
    stack = [("", frozenset())]
    while stack:
        relative, above = stack.pop()
        folder = os.path.join(root, relative)
        status = os.stat(folder)
        itself = (status.st_dev, status.st_ino)
        if itself in above:
            continue
        folders, images, others = visible(folder)
        yield relative, images, others
        stack.extend((os.path.join(relative, name), above | {itself}) for name in reversed(folders))


def listing(root):
    """(image names relative to `root` and below it, number of other files)."""
    names, skipped = [], 0
    for relative, images, others in _walk(root):
        names.extend(f"{relative}/{name}" if relative else name for name in images)
        skipped += len(others)
    return names, skipped


def _has_image(root):
    """Whether there is any, reading as little as possible: it is asked of every class folder."""
    stack, seen = [root], set()
    while stack:
        folder = stack.pop()
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    stack.append(entry.path)
                elif is_image(entry.name):
                    return True
    return False


def _splits(folders, loose):
    """Split folders among `folders`, train first; none where "train" looks like one class (a vehicle) among others."""
    train = [name for name in folders if name.lower() in TRAIN_NAMES]
    other = [name for name in folders if name.lower() in OTHER_NAMES]
    if (train and other) or ((train or other) and len(train + other) == len(folders) and not loose):
        return (*train, *sorted(other, key=lambda name: OTHER_NAMES.index(name.lower())))
    return ()


def _class_names(root, folders, loose):
    """Sub-folders with images, in label order; none where images lie beside them: then folders mean something else."""
    names = tuple(name for name in folders if _has_image(os.path.join(root, name)))
    if loose and names:
        _log.warning(
            "%s has %d images beside %d folders with images: all are read, without labels", root, len(loose), len(names)
        )
        return ()
    return names


def _found(folders, files):
    parts = [f"{len(names)} {kind} ({few(names)})" for kind, names in (("folders", folders), ("files", files)) if names]
    return " and ".join(parts) if parts else "nothing"


def few(names: list[str], limit: int = 5) -> str:
    """The first names, for a message."""
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")
