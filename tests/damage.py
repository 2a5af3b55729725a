"""Folders of small image files, many of them damaged, and what Pillow alone makes of a file; for tests of reading."""

import io
import os
import pathlib
import struct
import zlib

import numpy as np
from PIL import Image

from regvit_jax.data import open_source
from regvit_jax.data.order import Order

FORMATS = {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".gif": "GIF", ".tif": "TIFF", ".bmp": "BMP", ".ppm": "PPM"}
SIZE = 16  # side of what is compared


def write(folder: pathlib.Path, *, good: int, damaged: int, seed: int = 0):
    """Writes good + damaged files and opens them as a source; then damages some of them in every way there is.

    Returns:
      (the source, [uint8 (SIZE, SIZE, 3) or None where there is no image, in the order of the source]).
    """
    folder.mkdir()
    rng = np.random.default_rng(seed)
    kinds = list(FORMATS.items())
    for number in range(good + damaged):
        extension, kind = kinds[number % len(kinds)]
        size = tuple(int(x) for x in rng.integers(8, 40, 2))
        # Smooth, as a photo is: noise has no long codes that a flipped bit could break.
        image = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
        image.save(folder / f"{number:05}{extension}", kind)
    source = open_source(f"folder:{folder}")
    assert len(source) == good + damaged
    paths = [folder / source.name(index) for index in range(len(source))]
    for turn, index in enumerate(rng.permutation(len(source))[:damaged]):
        _WAYS[turn % len(_WAYS)](paths[index], rng)
    return source, [pillow_alone(path) for path in paths]


def pillow_alone(path: pathlib.Path) -> np.ndarray | None:
    """The file as (SIZE, SIZE, 3) by nothing but Pillow and the documented rules for 16 and 32 bits."""
    try:
        if not path.is_file() or path.stat().st_size > 2**20:
            return None
        with Image.open(path) as image:
            image.load()
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            if image.mode in ("I", "F"):
                return None
            return np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    except Exception:
        return None


def read_at(pixels: list, positions: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(images (B, SIZE, SIZE, 3), bool (B,) replaced) that training must read: the next good file of the epoch."""
    n, order, images, replaced = len(pixels), Order(len(pixels), seed), [], []
    for position in positions.tolist():
        epoch, place = divmod(position, n)
        tries = 0
        while pixels[order.index(epoch * n + (place + tries) % n)] is None:
            tries += 1
        images.append(pixels[order.index(epoch * n + (place + tries) % n)])
        replaced.append(tries > 0)
    return np.stack(images), np.array(replaced)


def _cut(path, rng):
    whole = path.read_bytes()
    path.write_bytes(whole[: rng.integers(1, len(whole))])


def _flip(path, rng):
    data = np.frombuffer(path.read_bytes(), np.uint8).copy()
    for bit in rng.integers(0, 8 * len(data), rng.integers(1, 20)):
        data[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(data.tobytes())


def _zero(path, rng):
    data = bytearray(path.read_bytes())
    start, length = rng.integers(0, len(data)), rng.integers(1, 200)
    data[start : start + length] = bytes(len(data[start : start + length]))
    path.write_bytes(bytes(data))


def _garbage(path, rng):
    path.write_bytes(rng.bytes(int(rng.integers(1, 3000))))


def _headless(path, rng):
    whole = path.read_bytes()
    path.write_bytes(whole[:8] + rng.bytes(len(whole)))


def _empty(path, rng):
    path.write_bytes(b"")


def _text(path, rng):
    path.write_text("<html>404 not found</html>\n")


def _other_format(path, rng):
    """Not damaged: a photo under a wrong name is read by what it holds."""
    with Image.open(path) as image:
        image.convert("RGB").save(buffer := io.BytesIO(), "PNG" if path.suffix != ".png" else "JPEG")
    path.write_bytes(buffer.getvalue())


def _bomb(path, rng):
    """A PNG of a hundred bytes that says it has 10 gigapixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


def _folder(path, rng):
    path.unlink()
    path.mkdir()


def _dangling(path, rng):
    path.unlink()
    path.symlink_to(path.with_name("gone"))


def _gone(path, rng):
    path.unlink()


def _pipe(path, rng):
    path.unlink()
    os.mkfifo(path)


def _endless(path, rng):
    path.unlink()
    path.symlink_to("/dev/zero")


def _loop(path, rng):
    path.unlink()
    path.symlink_to(path)


def _huge(path, rng):
    """A hole of 64 GiB, which takes no place on the disk."""
    with path.open("wb") as file:
        file.truncate(2**36)


# The ways of a bad disk or a broken download come more than once.
_WAYS = (
    *(_cut, _flip, _zero, _cut, _flip, _empty, _flip, _garbage, _headless, _text, _other_format, _bomb, _flip, _cut),
    *(_folder, _dangling, _gone, _pipe, _endless, _loop, _huge),
)
