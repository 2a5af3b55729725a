"""imagenet:PATH — ImageNet-1k as it is unpacked, or a part of its classes; labels in the order of the wnids.

    PATH/train/n01440764/n01440764_10026.JPEG
    PATH/val/ILSVRC2012_val_00000001.JPEG            flat, with a list of its classes (imagenet_lists.py: which, where)
    PATH/val/n01751748/ILSVRC2012_val_00000001.JPEG  or in class folders, as DINOv2 and torchvision's script leave it
    PATH/test/ILSVRC2012_test_00000001.JPEG          no labels
    PATH/ILSVRC/Data/CLS-LOC/{train,val,test}        Kaggle's folders are found below PATH

Labels are the places of the sorted wnids of train/, also for a subset such as ImageNet-100: validation files of other
classes are left out. Order as in folder:, a fixed random one for what has labels.
"""

import functools
import logging
import os
import re

import numpy as np

from regvit_jax.data.sources import imagenet_lists
from regvit_jax.data.sources.folder import Folder, few, packed, scattered, visible

WNID = re.compile(r"n\d{8}")
VALIDATION = ("val", "validation")
GET = (
    "Download ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz (image-net.org), or "
    "Kaggle's imagenet-object-localization-challenge. Expected train/n01440764/*.JPEG and val/, flat beside the devkit "
    "or in class folders"
)
_KAGGLE = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC")

_log = logging.getLogger(__name__)


def open(path: str, options: dict[str, str], split: str | None) -> "ImageNet":
    """One split of the ILSVRC layout; `split` defaults to train.

    Raises:
      FileNotFoundError: if there is no such folder, or no list of the validation classes; the message says which file
        to get and where to put it.
      ValueError: for a split that is not there, or a list that does not fit.
    """
    if options:
        raise ValueError(f"imagenet: takes no options, got {', '.join(sorted(options))}")
    given = os.path.abspath(os.path.expanduser(path))
    if not path or not os.path.isdir(given):
        raise FileNotFoundError(f"imagenet:{path}: {given} is no folder. {GET}")
    root, folders = _data_folder(given)
    validation = [name for name in VALIDATION if name in folders][:1]
    splits = tuple(name for name in ("train", *validation) if name in folders)
    # The test images have no labels: nothing to evaluate on, unless somebody asks for them.
    if "test" in folders and (validation or not splits):
        splits += ("test",)
    split = split or splits[0]
    if split not in folders or split not in ("train", *VALIDATION, "test"):
        raise ValueError(f"imagenet:{path} has no split {split!r}: it has {', '.join(splits)}")
    wnids = _wnids(root, folders, splits)
    return ImageNet(root, splits, split, wnids, imagenet_lists.places(root))


class ImageNet(Folder):
    """See the top of the file. The list of files is made on first use and pickled with the source."""

    def __init__(self, root: str, splits: tuple[str, ...], split: str, wnids: tuple[str, ...], places: tuple[str, ...]):
        self.root, self.splits, self.split, self.wnids = os.path.join(root, split), splits, split, wnids
        self._places = places
        folders, images, others = visible(self.root)
        self._flat = not any(WNID.fullmatch(name) for name in folders)
        if not images and self._flat:
            archives = [name for name in others if name.endswith(".tar")]
            raise FileNotFoundError(
                f"{self.root} holds no image and no class folder such as n01440764, but "
                f"{few(folders + others) or 'nothing'}"
                + (": unpack the archives, each into a folder of its name" if archives else "")
            )
        if split == "test" and self._flat:
            self.class_names = ()
            return
        # What the flat files show is found now: a list that is missing must not be noticed in a worker.
        self._truth = imagenet_lists.ground_truth(places, self.root) if self._flat else {}
        self.wnids = wnids or tuple(sorted(set(self._truth.values())))
        self.class_names = imagenet_lists.class_names(places, self.wnids)

    @functools.cached_property
    def _files(self):
        if not self.class_names:
            names = visible(self.root)[1]
            return packed(names, np.full(len(names), -1, np.int32))
        number = {wnid: label for label, wnid in enumerate(self.wnids)}
        of_class = self._listed() if self._flat else self._in_folders()
        pairs = [(name, number[wnid]) for name, wnid in of_class if wnid in number]
        if not pairs:
            raise ValueError(f"{self.root}: none of its {len(of_class)} images is of one of the {len(number)} classes")
        if len(pairs) < len(of_class):
            _log.info("%s: %d images of other classes are left out", self.root, len(of_class) - len(pairs))
        pairs.sort(key=lambda pair: scattered(pair[0]))
        return packed([name for name, _ in pairs], np.array([label for _, label in pairs], np.int32))

    def _in_folders(self):
        wnids = [name for name in visible(self.root)[0] if WNID.fullmatch(name)]
        with_images = [(wnid, visible(os.path.join(self.root, wnid))[1]) for wnid in wnids]
        return [(f"{wnid}/{name}", wnid) for wnid, names in with_images for name in names]

    def _listed(self):
        names = visible(self.root)[1]
        unlisted = [name for name in names if os.path.splitext(name)[0] not in self._truth]
        if unlisted:
            raise ValueError(
                f"{self.root} has {len(unlisted)} images that the list of classes does not name: {few(unlisted)}. "
                "Flat files keep their names, such as ILSVRC2012_val_00000001.JPEG"
            )
        return [(name, self._truth[os.path.splitext(name)[0]]) for name in names]

    @functools.cached_property
    def fingerprint(self):
        """Of names, sizes, order and labels."""
        digest = self._digest()
        digest.update(self.labels.tobytes())
        return digest.hexdigest()


def _data_folder(given):
    """(the folder with train/ or val/, the names of its folders)."""
    for below in ("", *_KAGGLE):
        root = os.path.join(given, below) if below else given
        folders = visible(root)[0] if os.path.isdir(root) else []
        if {"train", "test", *VALIDATION} & set(folders):
            return root, folders
    folders, images, others = visible(given)
    hint = f". {GET}"
    if any(WNID.fullmatch(name) for name in folders):
        hint = ". These are class folders: put them into a folder train/, or read them by folder: or imagenet22k:"
    elif any(name.endswith(".tar") for name in others):
        hint = (
            ". Unpack the archives: ILSVRC2012_img_train.tar holds one archive a class, each for a folder of its name"
        )
    raise FileNotFoundError(
        f"{given} has no folder train/ or val/: it holds {few(folders + images + others) or 'nothing'}{hint}"
    )


def _wnids(root, folders, splits):
    """The classes: class folders of train/, without it those of the validation folder, else none (a list tells)."""
    first = splits[0]
    names = visible(os.path.join(root, first))[0]
    wnids = tuple(name for name in names if WNID.fullmatch(name))
    strangers = [name for name in names if not WNID.fullmatch(name)]
    if wnids and strangers:
        _log.warning("%s/%s: folders that are no wnid are left out: %s", root, first, few(strangers))
    if first == "train" and not wnids:
        others = visible(os.path.join(root, first))[2]
        hint = ", unpack them, each into a folder of its name" if any(name.endswith(".tar") for name in others) else ""
        raise FileNotFoundError(
            f"{root}/train has no class folders such as n01440764: it holds {few(names + others) or 'no folder'}{hint}"
        )
    return wnids
