"""Preparation of `scenes:`: a TFDS builder that draws them in worker processes and writes array_record, once.

The folder appears under its name only when it is whole, so a killed preparation starts again and two at a time wait for
each other.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import io
import logging
import multiprocessing
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator

from PIL import Image
from tqdm import tqdm

from regvit_jax.data.sources import scenes_render
from regvit_jax.data.sources.scenes_layout import SPLITS, VERSION
from regvit_jax.data.sources.scenes_shapes import CLASS_NAMES

_CHUNK = 50  # scenes a worker draws at a time

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is drawn: pictures of size x size pixels, n for training and n_test for testing, from a seed."""

    size: int
    n: int
    n_test: int
    seed: int

    def count(self, split: str) -> int:
        return self.n if split == "train" else self.n_test

    @property
    def folder(self) -> pathlib.Path:
        root = os.environ.get("REGVIT_CACHE") or os.path.expanduser("~/.cache/regvit_jax")
        return pathlib.Path(root) / "scenes" / f"v{VERSION}_size{self.size}_n{self.n}_test{self.n_test}_seed{self.seed}"


def prepared(plan: Plan) -> pathlib.Path:
    """The folder of a plan's records, drawn now if it is not there."""
    folder = plan.folder
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            unfinished = folder.with_name(f".{folder.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            _write(plan, unfinished)
            os.replace(unfinished, folder)
    return folder


def records(folder: str, split: str):
    """Random access to the records of a split; pictures stay encoded."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(_version_folder(pathlib.Path(folder)))
    as_bytes = {"image": tfds.decode.SkipDecoding(), "mask": tfds.decode.SkipDecoding()}
    return builder.as_data_source(split, decoders=as_bytes)


def encode(plan: Plan, split: str, indices: range) -> list[dict]:
    """The records of some scenes; runs in a worker process."""
    return [_record(scenes_render.picture(plan.seed, split, i, plan.size)) for i in indices]


def _record(picture: scenes_render.Picture) -> dict:
    return {
        "image": _png(picture.image),
        "label": picture.label,
        "mask": _png(picture.mask),
        "depth": picture.depth_mm,
        "boxes": list(picture.boxes),
        "box_labels": picture.box_labels.tolist(),
        "caption": picture.caption,
    }


def _png(pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png", compress_level=3)
    return file.getvalue()


def _write(plan: Plan, folder: pathlib.Path) -> None:
    import tensorflow_datasets as tfds

    total = plan.n + plan.n_test
    _log.info("scenes: drawing %d scenes of %d x %d pixels into %s, once", total, plan.size, plan.size, plan.folder)
    tfds.disable_progress_bar()  # it would draw a bar for every stage of every split; ours has the time left
    # Where nobody watches (a log file), a line now and then instead of a bar that redraws itself.
    every = 0.2 if sys.stderr.isatty() else 10.0
    with (
        tqdm(total=total, desc="scenes", unit=" scenes", mininterval=every, maxinterval=every) as bar,
        _drawn() as draw,
    ):
        builder = _builder_class()(plan, draw, bar, data_dir=str(folder))
        with contextlib.redirect_stdout(io.StringIO()):  # it would print that it downloads
            builder.download_and_prepare(file_format="array_record")
    shutil.rmtree(folder / "downloads", ignore_errors=True)


@functools.cache
def _builder_class():
    """The TFDS builder; made on use, once: importing TFDS takes a second that a data worker has no need to spend, and
    it
    registers every class by name."""
    import numpy as np
    import tensorflow_datasets as tfds

    class Scenes(tfds.core.GeneratorBasedBuilder):
        """Procedural scenes of eight solids."""

        VERSION = tfds.core.Version(f"{VERSION}.0.0")
        pkg_dir_path = pathlib.Path(__file__).parent

        def __init__(self, plan, draw, bar, **kwargs):
            self.plan, self.draw, self.bar = plan, draw, bar
            super().__init__(**kwargs)

        def _info(self):
            size = self.plan.size
            label = tfds.features.ClassLabel(names=list(CLASS_NAMES))
            features = {
                "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
                "label": label,
                "mask": tfds.features.Image(shape=(size, size, 1), encoding_format="png"),
                "depth": tfds.features.Tensor(
                    shape=(size, size), dtype=np.uint16, encoding=tfds.features.Encoding.ZLIB, doc="millimetres"
                ),
                "boxes": tfds.features.Sequence(tfds.features.Tensor(shape=(4,), dtype=np.float32)),
                "box_labels": tfds.features.Sequence(tfds.features.ClassLabel(names=list(CLASS_NAMES))),
                "caption": tfds.features.Text(),
            }
            # Scene i stays record i.
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in SPLITS}

        def _generate_examples(self, split):
            for index, record in enumerate(self.draw(self.plan, split)):
                self.bar.update()
                yield index, record

    return Scenes


@contextlib.contextmanager
def _drawn():
    """draw(plan, split) -> records in order, from one process a core; from this one where processes cannot be
    started."""
    workers = min(os.cpu_count() or 1, 16)
    # Spawned, for a fork of a process that runs JAX or Grain can hang.
    pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))

    def draw(plan: Plan, split: str) -> Iterator[dict]:
        chunks = [range(i, min(i + _CHUNK, plan.count(split))) for i in range(0, plan.count(split), _CHUNK)]
        done = 0
        try:
            for records_of_chunk in pool.map(encode, [plan] * len(chunks), [split] * len(chunks), chunks):
                yield from records_of_chunk
                done += 1
        except concurrent.futures.process.BrokenProcessPool:
            _log.warning("scenes: worker processes cannot be started here, drawing in this one")
            for chunk in chunks[done:]:
                yield from encode(plan, split, chunk)

    try:
        yield draw
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _version_folder(folder: pathlib.Path) -> pathlib.Path:
    """Where TFDS put the records below the folder it was given: name/version."""
    return next(folder.glob("*/*/dataset_info.json")).parent
