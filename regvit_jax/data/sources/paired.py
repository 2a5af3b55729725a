"""Images beside maps of the same size, a mask or a depth map for each: what `ade20k:`, `nyud:` and `pairs:` share."""

import hashlib
import os
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from regvit_jax.data.decode import DecodeError, decode, decode_map
from regvit_jax.data.sources import Source
from regvit_jax.data.sources.folder import few


class Paired(Source):
    """Subclasses say in `fields` what the values of a map mean.

    A map that cannot be decoded is a DecodeError, which the loader replaces and counts, as it does broken images; one
    that does not fit its image, or holds what it should not, is a plain ValueError: the dataset is another one.

    Attributes:
      layout: how the files should look; it ends the messages.
    """

    layout = ""

    def __init__(self, image_root: str, map_root: str, pairs: Sequence[tuple[str, str]]):
        """`pairs` are the names of images and of their maps, relative to the two folders, in the order of samples."""
        self.image_root, self.map_root, self.pairs = image_root, map_root, tuple(pairs)

    def fields(self, values: np.ndarray, path: str) -> dict[str, np.ndarray]:
        """{"mask": uint8 (H, W)} or {"depth": float32 (H, W)} of the decoded values of the map at `path`."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, path = self.paths(index)
        try:
            values = decode_map(path)
        except DecodeError as error:
            raise DecodeError(f"{error}. {self.layout}") from error
        if not _of_shape(image, values.shape):
            height, width = decode(image).shape[:2]
            raise ValueError(
                f"{path} has {values.shape[1]} x {values.shape[0]} pixels, its image {image} {width} x {height}: they "
                f"must agree. {self.layout}"
            )
        return {"image": image, "label": -1, **self.fields(values, path)}

    def paths(self, index: int) -> tuple[str, str]:
        """The files of one sample: (image, map)."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.image_root}")
        image, values = self.pairs[index]
        return os.path.join(self.image_root, image), os.path.join(self.map_root, values)

    def name(self, index: int) -> str:
        """File name of the image, relative to the folder of the images."""
        self.paths(index)
        return self.pairs[index][0]

    @property
    def labels(self) -> np.ndarray:
        return np.full(len(self), -1, np.int32)

    @property
    def fingerprint(self) -> str:
        """Of the names and sizes of all files, in order, and of what the values mean; not of the place."""
        digest = hashlib.blake2b(self.meaning().encode(), digest_size=16)
        for index in range(len(self)):
            sizes = " ".join(str(os.path.getsize(path)) for path in self.paths(index))
            digest.update("\0".join((*self.pairs[index], sizes, "")).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def meaning(self) -> str:
        """What, beside the files, decides the samples."""
        return type(self).__name__


def matched(images: Mapping[Hashable, str], maps: Mapping[Hashable, str], hint: str) -> list[tuple[str, str]]:
    """(image, map) names of equal keys, in the order of the images' names.

    Raises:
      ValueError: if one side has a key that the other lacks; names the first of both sides and ends with `hint`.
    """
    alone = [
        sorted(names[key] for key in names.keys() - others.keys()) for names, others in ((images, maps), (maps, images))
    ]
    if any(alone):
        parts = [
            f"{len(names)} {what} ({few(names, 3)})"
            for names, what in zip(alone, ("images have no map", "maps have no image"), strict=True)
            if names
        ]
        raise ValueError(f"{' and '.join(parts)}. {hint}")
    return sorted((images[key], maps[key]) for key in images)


def whole_numbers(values: np.ndarray, path: str, layout: str) -> np.ndarray:
    """The values as integers: one-bit masks are 0 and 1.

    Raises:
      ValueError: for floating point values.
    """
    if values.dtype == bool:
        return values.astype(np.uint8)
    if values.dtype.kind not in "iu":
        raise ValueError(f"{path} holds {values.dtype} values, no class numbers. {layout}")
    return values


def _of_shape(image, shape):
    """Whether an image has (H, W): its head is believed where it says so, else the image, turned upright, tells."""
    try:
        with Image.open(image) as opened:
            said = opened.height, opened.width
    except Exception:  # what is wrong with it, `decode` says better
        said = None
    return said == shape or decode(image).shape[:2] == shape
