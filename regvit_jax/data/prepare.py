"""regvit data prepare: a source made smaller once, as array_record shards that `tfds:@FOLDER` reads.

Decoding a photo of 500 x 375 pixels and resizing it is most of the work of an input pipeline; here it is done once.
Shard by shard, in worker processes: shards that are finished are kept, so a run that was killed loses at most one a
worker, and the same command goes on. The order of the samples is that of the source.

    FOLDER/prepare.json                   the plan: source, size, format, shards; from the start
    FOLDER/NAME-train.array_record-…      shards, each with a note (.json) until all are there
    FOLDER/report.json                    how many images, and which could not be read
    FOLDER/dataset_info.json features.json label.labels.txt    what TFDS reads; written last
"""

import collections
import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import pathlib
import re
import shutil
import time
from collections.abc import Sequence

from regvit_jax.data import prepare_shard, prepare_workers
from regvit_jax.data.prepare_shard import FORMATS, Settings, Shard
from regvit_jax.data.prepare_workers import Unfinished
from regvit_jax.data.sources import Source, open_source, parse
from regvit_jax.data.sources.tfds_folder import INFO, PLAN

VERSION = 1
REPORT = "report.json"
# Readers keep every shard open: not more of them than file handles are allowed. Nor should a killed worker lose hours.
MAX_SHARDS, MIN_PER_SHARD = 256, 1000
_CARRIED = ("image", "label", "caption")

_log = logging.getLogger(__name__)


def prepare(
    source: str,
    folder: str,
    *,
    size: int = 256,
    format: str = "jpeg",
    quality: int = 95,
    shards: int | None = None,
    splits: Sequence[str] = (),
    workers: int = 2,
    max_bad: float = 0.01,
    command: str = "",
) -> dict:
    """Writes `source` into `folder`, or goes on where an earlier call stopped.

    Args:
      source: a source string; with a split or slice only that part, else the splits of `splits` (empty: all).
      size: the short side becomes this many pixels, antialiased bicubic; smaller images stay as they are.
      format: "jpeg" (encoded, `quality`) or "raw" (uint8 pixels: 5 to 10 times the bytes, nothing to decode).
      shards: files of the largest split; by default one a 1,000 images, at most 256.
      workers: processes; 0 works in this one.
      max_bad: share of the images that may be unreadable; they are left out and named in report.json.
      command: what to run again, for messages.

    Returns:
      The report: {"images": {split: n}, "left_out": [[split, name, reason], …], "bytes", "seconds"}, and
      "not_written": what samples have beside images, labels and captions (masks, depth, boxes).

    Raises:
      ValueError, FileNotFoundError: before anything is written, for options out of range, a split that is not there, or
        a folder that holds something else.
      Unfinished: too many unreadable images, a disk that is full, a worker that was killed.
    """
    if format not in FORMATS or size < 1 or not 1 <= quality <= 100 or (shards is not None and shards < 1):
        raise ValueError(
            f"format is one of {', '.join(FORMATS)}, size and shards are 1 or more, quality is 1 to 100; got "
            f"format={format!r}, size={size}, shards={shards}, quality={quality}"
        )
    if workers < 0 or not 0 <= max_bad <= 1:
        raise ValueError(f"workers is 0 or more and max_bad a share from 0 to 1, got {workers} and {max_bad}")
    place = pathlib.Path(os.path.abspath(os.path.expanduser(folder)))
    parts = _parts(source, splits)
    first = next(iter(parts.values()))
    fields = _fields(first)
    settings = Settings(size, format, quality, _unique(first.class_names), "caption" in fields)
    dropped = sorted(set(fields) - set(_CARRIED))
    if dropped:
        _log.warning(
            "%s: only images, labels and captions are written; not in the new dataset: %s. What needs them "
            "(segmentation, depth, discovery) reads the source itself",
            *(source, ", ".join(dropped)),
        )
    per_shard = _per_shard(max(len(part) for part in parts.values()), shards)
    plan = {"version": VERSION, **dataclasses.asdict(settings)}
    plan["splits"] = {
        name: {"samples": len(part), "shards": -(-len(part) // per_shard), "fingerprint": part.fingerprint}
        for name, part in parts.items()
    }
    with _mine(place):
        name = _agreed(place, json.loads(json.dumps(plan)), {"source": source, "command": command})
        if (place / INFO).is_file():
            _log.info("%s is complete already", place)
            return json.loads((place / REPORT).read_text()) | {"not_written": dropped}
        started = time.monotonic()
        todo = {split: _shards(place, name, split, **plan["splits"][split]) for split in parts}
        try:
            notes = prepare_workers.write(parts, todo, settings, workers, max_bad)
        except Unfinished as stopped:
            if stopped.left_out:
                prepare_shard.replace(place / REPORT, json.dumps({"left_out": stopped.left_out}, indent=1))
            raise
        # Part of the new source's fingerprint: sizes of shards alone would not tell two preparations apart.
        made = {key: value for key, value in plan.items() if key != "class_names"}
        made = f"Made by regvit data prepare: {json.dumps(made, sort_keys=True)}"
        report = _finish(place, name, settings, made, todo, notes, time.monotonic() - started, dropped)
    return report


def _parts(text, splits) -> dict[str, Source]:
    """{split name in the new dataset: source}"""
    spec = parse(text)
    if spec.split is not None or spec.sliced or "holdout" in spec.options:
        if splits:
            raise ValueError(f"{text!r} names a part already: leave --splits or the part out")
        return {_split_name(spec.split or "train"): open_source(text)}
    source = open_source(text)
    missing = sorted(set(splits) - set(source.splits))
    if missing:
        raise ValueError(f"{text!r} has no split {', '.join(missing)}: it has {', '.join(source.splits) or 'none'}")
    if not source.splits:
        return {"train": source}
    named = {split: str(dataclasses.replace(spec, split=split)) for split in splits or source.splits}
    return {_split_name(split): open_source(text) for split, text in named.items()}


def _split_name(split):
    return re.sub(r"\W", "_", split)


def _unique(names):
    """Class names as TFDS keeps them: one a line, none empty, none twice."""
    cleaned = [" ".join(name.split()) or str(label) for label, name in enumerate(names)]
    often = collections.Counter(cleaned)
    return tuple(name if often[name] == 1 else f"{name} [{label}]" for label, name in enumerate(cleaned))


def _fields(source):
    """The fields of the first sample that can be read."""
    for index in range(min(len(source), 10)):
        with contextlib.suppress(OSError):
            return tuple(source[index])
    return ()


def _per_shard(most, shards):
    return -(-most // shards) if shards else max(MIN_PER_SHARD, -(-most // MAX_SHARDS))


@contextlib.contextmanager
def _mine(place):
    """One process at a time works on a folder."""
    place.mkdir(parents=True, exist_ok=True)
    with (place / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process prepares {place} now: wait for it, or choose another folder") from None
        for rest in place.glob(".*.unfinished"):
            shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
        yield


def _agreed(place, plan, about):
    """The name of the dataset, from the plan in the folder; written now where the folder is empty."""
    path = place / PLAN
    if path.is_file():
        kept = json.loads(path.read_text())
        different = [_difference(key, kept.get(key), plan[key]) for key in plan if kept.get(key) != plan[key]]
        if different:
            raise ValueError(
                f"{place} holds another dataset, of {kept.get('source')}: {', '.join(different)}. Choose another "
                "folder, or remove this one"
            )
        return kept["name"]
    others = sorted(entry.name for entry in place.iterdir() if not entry.name.startswith("."))
    if others:
        raise ValueError(f"{place} holds other files ({', '.join(others[:5])}): choose an empty or a new folder")
    name = re.sub(r"\W+", "_", place.name.lower()).strip("_")
    name = name if name[:1].isalpha() else f"images_{name}"
    prepare_shard.replace(path, json.dumps({"name": name, **about, **plan}, indent=1))
    return name


def _difference(key, kept, asked):
    if key == "splits" and kept is not None and kept.keys() == asked.keys():
        split = next(split for split in asked if kept[split] != asked[split])
        field = next(field for field in asked[split] if kept[split][field] != asked[split][field])
        kept, asked, key = kept[split][field], asked[split][field], f"{field} of {split}"
    shown = [text if len(text) < 60 else text[:57] + "…" for text in (json.dumps(kept), json.dumps(asked))]
    return f"{key} is {shown[0]} there and {shown[1]} now"


def _shards(place, name, split, samples, shards, fingerprint):
    bounds = [samples * number // shards for number in range(shards + 1)]
    return [
        Shard(split, start, stop, str(place / f"{name}-{split}.array_record-{number:05d}-of-{shards:05d}"))
        for number, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False))
    ]


def _finish(place, name, settings, made, todo, notes, seconds, dropped):
    """Writes the report and what TFDS reads, and removes the notes."""
    import tensorflow_datasets as tfds

    written = {split: [notes[shard.path] for shard in shards] for split, shards in todo.items()}
    images = {split: sum(note["count"] for note in of_split) for split, of_split in written.items()}
    if empty := [split for split, count in images.items() if not count]:
        raise Unfinished(f"no image of the split {', '.join(empty)} can be read")
    report = {
        "images": images,
        "left_out": [[split, *bad] for split, of_split in written.items() for note in of_split for bad in note["bad"]],
        "bytes": sum(note["bytes"] for of_split in written.values() for note in of_split),
        "seconds": round(seconds, 1),
        "not_written": dropped,
    }
    prepare_shard.replace(place / REPORT, json.dumps(report, indent=1))
    version = tfds.core.Version("1.0.0")
    identity = tfds.core.dataset_info.DatasetIdentity(name=name, version=version, data_dir=str(place), module_name="")
    info = tfds.core.DatasetInfo(builder=identity, features=prepare_shard.features(settings), description=made)
    info.set_file_format("array_record")
    template = tfds.core.ShardedFileTemplate(dataset_name=name, data_dir=place, filetype_suffix="array_record")
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[note["count"] for note in of_split],
            num_bytes=sum(note["bytes"] for note in of_split),
            filename_template=template.replace(split=split),
        )
        for split, of_split in written.items()
    ]
    info.set_splits(tfds.core.splits.SplitDict(infos))
    metadata = place / ".metadata.unfinished"
    metadata.mkdir()
    info.write_to_directory(metadata)
    for file in sorted(metadata.iterdir(), key=lambda file: file.name == INFO):
        os.replace(file, place / file.name)
    metadata.rmdir()
    for shards in todo.values():
        for shard in shards:
            shard.note.unlink(missing_ok=True)
    return report
