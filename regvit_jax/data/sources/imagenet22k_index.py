"""Where the images lie inside the archives of `imagenet22k:`; built once, and again when an archive changes.

.regvit_index/                    as kept_index.py says; a row is label, offset and size of an image, and the rows
                                  are in the source's fixed random order
  labels.json                     {wnid: label}
"""

import json
import os
import pathlib

import numpy as np

from regvit_jax.data.sources import kept_index
from regvit_jax.data.sources.folder import is_image, scattered
from regvit_jax.data.sources.kept_index import Index
from regvit_jax.data.sources.tar_members import members

VERSION = 1
SAMPLE = np.dtype([("label", "<i4"), ("offset", "<i8"), ("size", "<i8")])
_KEYED = np.dtype([("key", ">u8"), *SAMPLE.descr])
_GROUP = kept_index.GROUP


def indexed(root: str, archives: list[str]) -> Index:
    """The index of `archives` (sorted file names) in `root`, built now if there is none or an archive has changed."""
    plan = kept_index.Plan(
        "imagenet22k", VERSION, _KEYED, "label", _members, ordered=_ordered, unit="archives", group=_GROUP
    )
    return kept_index.indexed(root, archives, plan, _build)


def samples(index: Index) -> np.ndarray:
    """(n,) of SAMPLE, mapped into memory."""
    return kept_index.samples(index)


def _build(root, state, place: pathlib.Path, plan):
    labels = {archive.removesuffix(".tar"): label for label, (archive, _, _) in enumerate(state)}
    kept_index.replace(place / "labels.json", lambda file: file.write(json.dumps(labels, indent=1).encode()))
    kept_index.build_index(root, state, place, plan)


def _ordered(rows):
    """(rows of SAMPLE by their keys, the keys)."""
    rows = rows[np.argsort(rows["key"], kind="stable")]
    ordered = np.empty(len(rows), SAMPLE)
    for field in SAMPLE.names:
        ordered[field] = rows[field]
    return ordered, rows["key"].tobytes()


def _members(root, name):
    """([(key of the order, offset, size)] of the images in an archive, what is wrong with it or "")."""
    wnid, images = name.removesuffix(".tar"), []
    found, reason = members(os.path.join(root, name))
    for member, offset, size in found:
        base = os.path.basename(member)
        if size and is_image(base) and not base.startswith("."):
            images.append((int.from_bytes(scattered(f"{wnid}/{base}"), "big"), offset, size))
    return images, f"{reason}, after {len(images)} images" if reason else ""
