"""Images and maps decoded with Pillow: every mode and orientation right, nothing believed that a file says itself."""

import io
import os
import stat
import struct
from typing import Any

import numpy as np
from PIL import Image

# Pixels of the largest image that is decoded, and of the largest that a resize may make: 16384 x 16384, above any
# camera (200 megapixels). Such an image takes 2.6 GiB while it is decoded, and its file need not be large: a few
# hundred kilobytes of PNG can hold it.
MAX_PIXELS = 2**28
# Bytes of the largest file that is read into memory: MAX_PIXELS of 16-bit RGBA, not compressed.
MAX_BYTES = 2**31

# Orientation tag of EXIF -> what turns the stored pixels upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_TAG = 0x0112
# To read these Pillow starts another program, on whatever bytes the file holds.
_REFUSED_FORMATS = ("EPS",)


class DecodeError(ValueError):
    """An input that is no readable image; the message names it."""


def decode(image: Any, name: str | None = None) -> np.ndarray:
    """uint8 (H, W, 3) RGB, upright, from encoded bytes, a path, a PIL image or an array.

    Grey and palette images are spread to three channels. An alpha channel is dropped, not blended. CMYK is converted
    without its colour profile, in JPEG files with Adobe's polarity, where 255 is no ink. 16 bits keep their high byte.
    Of an animation or a file of several pages the first is taken. An orientation in EXIF or XMP is applied. All as
    torchvision's image loader, but for two things: that one leaves photos lying as the camera stored them, and clips
    16-bit grey to white. Arrays are uint8 (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).

    Raises:
      DecodeError: a ValueError that names the input (`name`, or its path), if it is truncated, corrupt or no image, has
        more than MAX_PIXELS, or is of 32-bit or floating point values, of which nobody says which one is white.
      OSError: if a path cannot be opened.
    """
    if hasattr(image, "__array__") and not isinstance(image, Image.Image):
        return _from_array(np.asarray(image), name or type(image).__name__)
    if isinstance(image, Image.Image):
        return _read(image, name or getattr(image, "filename", "") or "PIL image")
    encoded, name = _encoded(image, name)
    with _pillow_errors(name), _open(encoded, name) as opened:
        return _read(opened, name)


def decode_map(image: Any, name: str | None = None) -> np.ndarray:
    """(H, W) values of a mask or depth map as stored (class numbers of a palette, 16-bit depth), from the forms
    `decode` takes. An orientation is not applied: what writes masks writes none.

    Raises:
      DecodeError: if it is no readable image, has several channels or more than MAX_PIXELS.
      OSError: if a path cannot be opened.
    """
    if isinstance(image, np.ndarray):
        values, name = image, name or "array"
    elif isinstance(image, Image.Image):
        values, name = np.asarray(image), name or "PIL image"
    else:
        encoded, name = _encoded(image, name)
        with _pillow_errors(name), _open(encoded, name) as opened:
            _check_size(*opened.size, name)
            values = np.asarray(opened)
    if values.ndim != 2:
        raise DecodeError(f"{name}: a mask or depth map has one channel, this has shape {values.shape}")
    return values


def _from_array(array, name):
    if array.dtype != np.uint8:
        raise DecodeError(f"{name}: image arrays are uint8 from 0 to 255, this is {array.dtype}")
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
        raise DecodeError(f"{name}: image arrays are (H, W, 3), (H, W, 1), (H, W, 4) or (H, W), this is {array.shape}")
    return np.repeat(array, 3, axis=-1) if array.shape[-1] == 1 else array[..., :3]


def _encoded(image, name):
    """(bytes, what to call them) of bytes or of a regular file."""
    if isinstance(image, bytes | bytearray | memoryview):
        return image, name or f"{len(image)} encoded bytes"
    if not isinstance(image, str | os.PathLike):
        raise DecodeError(
            f"{name or 'image'}: expected encoded bytes, a path, a PIL image or an array, got {type(image).__name__}"
        )
    name = name or os.fspath(image)
    status = os.stat(image)
    if not stat.S_ISREG(status.st_mode):
        # To open a pipe waits for its other end, and a device may never end.
        raise DecodeError(f"{name}: not a readable image (it is no file)")
    if status.st_size > MAX_BYTES:
        raise DecodeError(f"{name}: not a readable image ({status.st_size} bytes, more than {MAX_BYTES})")
    with open(image, "rb") as file:
        return file.read(), name


def _open(encoded, name):
    """Image.open without its limit of pixels, which only a global variable moves, and its warning at half of that."""
    file, prefix = io.BytesIO(encoded), bytes(encoded[:16])
    tried, lacking = set(_REFUSED_FORMATS), ""
    for load in (Image.preinit, Image.init):
        load()
        for kind in tuple(Image.ID):
            if kind in tried:
                continue
            tried.add(kind)
            factory, accept = Image.OPEN[kind]
            try:
                known = accept is None or accept(prefix)
                if isinstance(known, str):
                    lacking = f": {known}"
                elif known:
                    file.seek(0)
                    return factory(file, "")
            except (SyntaxError, IndexError, TypeError, struct.error):
                # Some formats begin alike: the next one may know the file.
                continue
    raise DecodeError(f"{name}: not a readable image (no known format{lacking})")


def _check_size(width, height, name):
    """Before anything is allocated; a header may say what it likes."""
    if min(width, height) < 1 or width * height > MAX_PIXELS:
        raise DecodeError(
            f"{name}: not a readable image (it says it has {width} x {height} pixels; from 1 to {MAX_PIXELS} are read)"
        )


def _read(image, name):
    with _pillow_errors(name):
        _check_size(*image.size, name)
        image.load()
        # A TIFF file may turn itself upright while it is loaded: its orientation is asked for after that.
        turn = _UPRIGHT.get(_orientation(image))
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
            # Both hold 16 bits at most; Pillow gives them as "I" where it is older, or where the file says how many.
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode in ("I", "F"):
            kind = "32-bit integers" if image.mode == "I" else "floating point"
            raise DecodeError(
                f"{name}: not a readable image (its values are {kind}, and nothing says which one is white: save it "
                f"with 8 or 16 bits)"
            )
        elif image.mode == "P" and "transparency" in image.info:
            # Straight to RGB gives the same pixels, with a warning for each image.
            image = image.convert("RGBA")
        if image.mode != "RGB":
            image = image.convert("RGB")
        return np.array(image if turn is None else image.transpose(turn))


def _orientation(image):
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:
        # Garbage among the notes of a camera says nothing of the pixels, which were read.
        return 1


class _pillow_errors:
    """What Pillow raises for a broken file (half a dozen types) as one DecodeError that names the file."""

    def __init__(self, name):
        self.name = name

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        passes = (DecodeError, FileNotFoundError, PermissionError, MemoryError)
        if isinstance(error, Exception) and not isinstance(error, passes):
            raise DecodeError(f"{self.name}: not a readable image ({error})") from error
