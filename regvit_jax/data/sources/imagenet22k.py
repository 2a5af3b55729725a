"""imagenet22k:PATH — ImageNet-22k: one tar a class, read without unpacking, or class folders.

    PATH/n00004475.tar  PATH/n00005787.tar  …        as they are downloaded
    PATH/n00004475/n00004475_1.JPEG  …               unpacked

Labels are the places of the sorted wnids (index.json's neighbour labels.json lists them). An index of the archives
(imagenet22k_index.py) is built on first use, once, and again when an archive changes; a sample is then one read at an
offset. Unpacked folders are listed by every run: for 14 M files that takes minutes and half a GB a process.
Order as in folder:, a fixed random one, so #[:10%] has all classes. There are no splits: name the folder of one.
"""

import logging
import os
import re

import numpy as np

from regvit_jax.data.sources import Source, imagenet22k_index, imagenet_lists
from regvit_jax.data.sources.folder import Folder, few, visible
from regvit_jax.data.sources.kept_index import opened as _archive
from regvit_jax.data.sources.tar_members import member_name

WNID = re.compile(r"n\d{8}")

_log = logging.getLogger(__name__)


def open(path: str, options: dict[str, str], split: str | None) -> Source:
    """All images below `path`.

    Raises:
      FileNotFoundError: if there is no such folder, or neither archives nor class folders are in it.
      ValueError: for a split or an option (there are none), or where archives and class folders are mixed.
    """
    if options:
        raise ValueError(f"imagenet22k: takes no options, got {', '.join(sorted(options))}")
    root = os.path.abspath(os.path.expanduser(path))
    if not path or not os.path.isdir(root):
        raise FileNotFoundError(f"imagenet22k:{path}: {root} is no folder")
    folders, images, others = visible(root)
    if split is not None:
        hint = f"imagenet22k:{path}/{split}" if split in folders else f"imagenet22k:{path}#[:90%]"
        raise ValueError(f"imagenet22k: has no splits, got #{split}: write {hint}")
    archives = [name for name in others if name.endswith(".tar") and WNID.fullmatch(name[:-4])]
    classes = [name for name in folders if WNID.fullmatch(name)]
    if archives and classes:
        raise ValueError(
            f"{root} holds {len(archives)} archives and {len(classes)} class folders: keep one of the two in it, for "
            "a class that is there twice would count twice"
        )
    if not archives and not classes:
        raise FileNotFoundError(
            f"{root} holds neither archives such as n00004475.tar nor class folders such as n00004475: it holds "
            f"{few(folders + images + others) or 'nothing'}"
        )
    wnids = tuple(name.removesuffix(".tar") for name in archives or classes)
    names = imagenet_lists.class_names((root,), wnids)
    if archives:
        return Tars(root, imagenet22k_index.indexed(root, archives), wnids, names)
    return ClassFolders(root, wnids, names)


class ClassFolders(Folder):
    """The unpacked form: `folder:`, with words for class names."""

    def __init__(self, root: str, wnids: tuple[str, ...], names: tuple[str, ...]):
        super().__init__(root, (), None, wnids)
        self.class_names = names


class Tars(Source):
    """The archives. Pickled as its folders and names; the index is mapped into memory, one copy for all processes."""

    def __init__(self, root: str, index: imagenet22k_index.Index, wnids: tuple[str, ...], names: tuple[str, ...]):
        self.root, self.index, self.wnids, self.class_names = root, index, wnids, names
        self.faults = tuple(
            f"{root}/{archive} is damaged, what is readable of it is used: {reason}"
            for archive, reason in index.torn.items()
        )
        for fault in self.faults:
            _log.warning("%s", fault)
        if index.count == 0:
            raise FileNotFoundError(f"the {len(wnids)} archives in {root} hold no image")

    def __len__(self) -> int:
        return self.index.count

    def __getitem__(self, index: int) -> dict:
        path, label, offset, size = self._place(index)
        # Raised where the archive was cut or is gone since it was indexed; the loader replaces what cannot be read.
        content = _archive(path, self.index.samples).pread(size, offset)
        if len(content) < size:
            raise OSError(f"{path} ends {size - len(content)} bytes too early for {self.name(index)}")
        return {"image": content, "label": label}

    def name(self, index: int) -> str:
        """archive/member."""
        path, _, offset, _ = self._place(index)
        try:
            member = member_name(_archive(path, self.index.samples), offset)
        except OSError:
            member = ""
        return f"{os.path.basename(path)}/{member or f'byte {offset}'}"

    @property
    def labels(self) -> np.ndarray:
        return np.array(imagenet22k_index.samples(self.index)["label"])

    @property
    def fingerprint(self) -> str:
        """Of names, sizes and places of the members, not of the folder: a copy has the same one."""
        return self.index.fingerprint

    def _place(self, index):
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.root}")
        label, offset, size = imagenet22k_index.samples(self.index)[index].item()
        return os.path.join(self.root, f"{self.wnids[label]}.tar"), label, offset, size
