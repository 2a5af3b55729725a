"""Images of any size for object discovery, in batches of one patch grid."""

import concurrent.futures
import dataclasses
import itertools
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from regvit_jax import sharding, stopping
from regvit_jax.data.decode import DecodeError, decode
from regvit_jax.data.sources import Source
from regvit_jax.data.transforms import resize
from regvit_jax.evals.features import multiple_of
from regvit_jax.trees import Array

# Patches of the largest image. All products of two patches are held at once: 1 GiB here, in float32.
MOST_PATCHES = 16384
# Images that wait for others of their grid; past that the fullest grid goes ahead with what it has.
_WAITING = 128
_THREADS = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Photo:
    """One image: place in the source, name, uint8 (H, W, 3) pixels, true boxes (n, 4) xyxy in the pixels of the file,
    and the factor by which it was shrunk (1: not)."""

    index: int
    name: str
    pixels: np.ndarray
    boxes: np.ndarray
    scale: float

    @property
    def size(self) -> tuple[int, int]:
        return self.pixels.shape[:2]


def batches(source: Source, patch: int, max_side: int, batch_size: int) -> Iterator[list[Photo]]:
    """Up to `batch_size` photos at a time that have the same patch grid, nearly in the order of the source. Those that
    cannot be read are left out.

    Raises:
      ValueError: for a source without boxes, or an image of more than MOST_PATCHES patches.
    """
    waiting: dict[tuple[int, int], list[Photo]] = {}
    for photo in _photos(source, max_side):
        grid = grid_of(photo.size, patch)
        if grid[0] * grid[1] > MOST_PATCHES:
            raise ValueError(
                f"{photo.name}: {photo.size[1]} x {photo.size[0]} pixels are {grid[0]} x {grid[1]} patches, more than "
                f"{MOST_PATCHES}: set max_side, to which longer images are shrunk"
            )
        group = waiting.setdefault(grid, [])
        group.append(photo)
        if len(group) == batch_size or sum(map(len, waiting.values())) > _WAITING:
            fullest = max(waiting, key=lambda key: len(waiting[key]))
            yield waiting.pop(fullest)
    yield from waiting.values()


def put(photos: list[Photo], patch: int, batch_size: int, mesh: Mesh) -> dict[str, Array]:
    """{"image" uint8 (B, h p, w p, 3), zeros at the bottom and the right, "size" int32 (B, 2)} on the mesh, the last
    rows empty where there are fewer photos."""
    rows = multiple_of(mesh, batch_size)
    h, w = grid_of(photos[0].size, patch)
    images = np.zeros((rows, h * patch, w * patch, 3), np.uint8)
    sizes = np.zeros((rows, 2), np.int32)
    for row, photo in enumerate(photos):
        images[row, : photo.size[0], : photo.size[1]], sizes[row] = photo.pixels, photo.size
    part = rows // jax.process_count()
    own = slice(jax.process_index() * part, (jax.process_index() + 1) * part)
    return sharding.put({"image": images[own], "size": sizes[own]}, mesh)


def grid_of(size: tuple[int, int], patch: int) -> tuple[int, int]:
    """(h, w) patches that cover (H, W) pixels."""
    return -(-size[0] // patch), -(-size[1] // patch)


def _photos(source, max_side):
    """In the order of the source, decoded a little ahead by a few threads."""
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        ahead = iter(range(len(source)))
        queue = [pool.submit(_photo, source, index, max_side) for index in itertools.islice(ahead, 2 * _THREADS)]
        while queue:
            stopping.poll()
            photo = queue.pop(0).result()
            queue += [pool.submit(_photo, source, index, max_side) for index in itertools.islice(ahead, 1)]
            if photo is not None:
                yield photo


def _photo(source, index, max_side):
    name = source.name(index)
    try:
        sample = source[index]
        pixels = decode(sample["image"], name)
    except (DecodeError, OSError):  # a broken annotation is one of them
        return None
    if "boxes" not in sample:
        raise ValueError(f"{name} has no boxes: object discovery is measured on voc:, coco:, boxes: or scenes:")
    height, width = pixels.shape[:2]
    scale = min(1.0, max_side / max(height, width)) if max_side else 1.0
    if scale < 1:
        pixels = resize(pixels, max(1, round(height * scale)), max(1, round(width * scale)))
    return Photo(index, name, pixels, np.asarray(sample["boxes"], np.float32).reshape(-1, 4), scale)
