"""One shard of `regvit data prepare`: images read, made smaller, encoded and written; runs in a worker process.

A shard appears under its name only when it is whole, with a note beside it of what it holds.
"""

import dataclasses
import io
import json
import os
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from regvit_jax.data.decode import DecodeError, decode
from regvit_jax.data.sources import Source
from regvit_jax.data.transforms import resize_short

FORMATS = ("jpeg", "raw")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How pictures are stored: short side in pixels (smaller ones stay), "jpeg" or "raw", JPEG quality; the classes
    (none: no labels); whether there are captions."""

    size: int
    format: str
    quality: int
    class_names: tuple[str, ...]
    captions: bool


@dataclasses.dataclass(frozen=True)
class Shard:
    """Samples [start, stop) of a split, and the file they go to."""

    split: str
    start: int
    stop: int
    path: str

    @property
    def note(self) -> pathlib.Path:
        """{"count", "bytes", "bad": [[name, reason], …]} of the finished shard."""
        return pathlib.Path(self.path + ".json")

    @property
    def finished(self) -> bool:
        return os.path.isfile(self.path) and self.note.is_file()


@dataclasses.dataclass(frozen=True)
class Progress:
    """Counters that workers and the main process share (multiprocessing.Value): images done, unreadable ones among
    them, and 1 once everybody shall stop."""

    done: Any
    bad: Any
    stop: Any


def features(settings: Settings):
    """The TFDS features of a record: image, label and caption where there are any, file_name."""
    import tensorflow_datasets as tfds

    if settings.format == "raw":
        shape, encoding = (None, None, 3), tfds.features.Encoding.BYTES
        image = tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding=encoding)
    else:
        image = tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")
    found = {"image": image, "file_name": tfds.features.Text()}
    if settings.class_names:
        found["label"] = tfds.features.ClassLabel(names=list(settings.class_names))
    if settings.captions:
        found["caption"] = tfds.features.Text()
    return tfds.features.FeaturesDict(found)


def picture(image: Any, name: str, settings: Settings) -> bytes | np.ndarray:
    """What is stored of an image: JPEG bytes, or uint8 (H, W, 3).

    A JPEG that is small enough already stays as it is: encoding it again would only lose.

    Raises:
      DecodeError, OSError: if it cannot be read, or not be encoded.
    """
    if isinstance(image, str | os.PathLike):
        image = pathlib.Path(image).read_bytes()
    pixels = decode(image, name)
    smaller = resize_short(pixels, settings.size) if min(pixels.shape[:2]) > settings.size else pixels
    if settings.format == "raw":
        return np.ascontiguousarray(smaller)
    if smaller is pixels and isinstance(image, bytes) and image.startswith(b"\xff\xd8"):
        return image
    file = io.BytesIO()
    Image.fromarray(smaller).save(file, "JPEG", quality=settings.quality)
    return file.getvalue()


def write(source: Source, shard: Shard, settings: Settings, progress: Progress) -> tuple[dict | None, list]:
    """Writes one shard and its note.

    Returns:
      The note, or None if it was told to stop before the end; [[name, reason], …] of what could not be read.

    Raises:
      OSError, RuntimeError: if the shard cannot be written (the disk is full).
    """
    from array_record.python import array_record_module

    # The number of the process is in the name: a worker that outlives its run by a moment spoils no new one.
    folder, name = os.path.split(shard.path)
    unfinished = os.path.join(folder, f".{name}.{os.getpid()}.unfinished")
    layout, count, bad = features(settings), 0, []
    try:
        # One record a group: random access reads nothing else. JPEG does not shrink further, and raw is to be fast.
        writer = array_record_module.ArrayRecordWriter(unfinished, "group_size:1,uncompressed")
        try:
            for index in range(shard.start, shard.stop):
                if progress.stop.value:
                    return None, bad
                name = source.name(index)
                try:
                    record = _record(source[index], name, settings)
                except (DecodeError, OSError) as error:
                    bad.append([name, str(error)])
                    _add(progress.bad)
                else:
                    writer.write(layout.serialize_example(record))
                    count += 1
                _add(progress.done)
        finally:
            writer.close()
        reader = array_record_module.ArrayRecordReader(unfinished)
        if (written := reader.num_records()) != count:
            raise OSError(f"{unfinished} holds {written} of {count} records: is the disk full?")
        reader.close()
        note = {"count": count, "bytes": os.path.getsize(unfinished), "bad": bad}
        replace(shard.note, json.dumps(note))
        _sync(unfinished)
        os.replace(unfinished, shard.path)
        return note, bad
    finally:
        pathlib.Path(unfinished).unlink(missing_ok=True)


def replace(path: pathlib.Path, text: str) -> None:
    """Writes a file that is there whole or not at all."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text)
    _sync(unfinished)
    os.replace(unfinished, path)


def _record(sample, name, settings):
    record = {"image": picture(sample["image"], name, settings), "file_name": name}
    if settings.format == "jpeg":
        record["image"] = io.BytesIO(record["image"])
    if settings.class_names:
        record["label"] = int(sample.get("label", -1))
    if settings.captions:
        record["caption"] = sample["caption"]
    return record


def _add(counter):
    with counter.get_lock():
        counter.value += 1


def _sync(path):
    with open(path, "rb") as file:
        os.fsync(file.fileno())
