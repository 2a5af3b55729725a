"""regvit data check: what is in a source, and what is wrong with it, before a run spends a day on it.

Counts are of all samples. Of `sample` images a split, or all, the files are decoded: unreadable ones, sizes, modes,
files that are there twice; masks and depth maps that do not fit. A contact sheet shows a few of them with their labels.
"""

import concurrent.futures
import dataclasses
import hashlib
import io
import os
import pathlib
import sys
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from regvit_jax.data import check_boxes, check_maps, check_report, contact_sheet
from regvit_jax.data.check_report import Look
from regvit_jax.data.decode import decode
from regvit_jax.data.sources import Source, open_source, parse

_ORIENTATION = 0x0112


def check(text: str, *, sample: int = 1000, picture: str = "contact_sheet.png", threads: int | None = None) -> dict:
    """Looks at a source: all its splits, or the one that `text` names.

    Args:
      sample: images of each split to decode; 0 decodes all.
      picture: PNG to write; empty writes none.
      threads: that decode; by default one a core.

    Returns:
      {"source", "splits": {name: counts and statistics}, "eval_split", "problems": [text], "notes": [text], "picture"},
      as JSON can hold it; `check_report.as_text` prints it.

    Raises:
      ValueError, FileNotFoundError: for a source that cannot be opened.
    """
    if sample < 0:
        raise ValueError(f"sample is 0 (all) or more, got {sample}")
    parts = _parts(text)
    drawn = {
        split: np.arange(len(source))
        if sample in (0, len(source)) or len(source) < sample
        else np.sort(np.random.default_rng(0).choice(len(source), sample, replace=False))
        for split, source in parts.items()
    }
    looks = _look_at(parts, drawn, threads or os.cpu_count() or 1)
    report = check_report.of(text, parts, looks)
    if picture:
        good = [look for look in looks if not look.problem]
        # A picture with its depth takes two places.
        places = contact_sheet.COLUMNS * contact_sheet.ROWS // (2 if any(look.depth for look in good) else 1)
        chosen = contact_sheet.chosen(good, places)
        pictures = [(parts[look.split], look.index, look.label) for look in chosen]
        if pictures:
            pathlib.Path(picture).parent.mkdir(parents=True, exist_ok=True)
            contact_sheet.draw(pictures).save(picture)
            report["picture"] = picture
    return report


def _parts(text) -> dict[str, Source]:
    """{split: source}: all of them, or the part that `text` names; "" where there are no splits."""
    spec = parse(text)
    source = open_source(text)
    if spec.split is not None or spec.sliced or "holdout" in spec.options or not source.splits:
        return {spec.split or (source.splits[0] if source.splits else ""): source}
    others = {split: open_source(str(dataclasses.replace(spec, split=split))) for split in source.splits[1:]}
    return {source.splits[0]: source} | others


def _look_at(parts, drawn, threads):
    jobs = [(split, parts[split], int(index)) for split, indices in drawn.items() for index in indices]
    every = 0.2 if sys.stderr.isatty() else 10.0
    looks = []
    with (
        concurrent.futures.ThreadPoolExecutor(threads) as pool,
        tqdm(total=len(jobs), desc="check", unit=" images", mininterval=every, maxinterval=every) as bar,
    ):
        # By thousands: the queue of a pool holds every job that it is given.
        for start in range(0, len(jobs), 1000):
            for look in pool.map(lambda job: _look(*job), jobs[start : start + 1000]):
                looks.append(look)
                bar.update()
    return looks


def _look(split: str, source: Source, index: int) -> Look:
    look = Look(split, index, source.name(index))
    try:
        sample = source[index]
        image, found = sample["image"], {"label": int(sample.get("label", -1))}
        if isinstance(image, str | os.PathLike):
            image = pathlib.Path(image).read_bytes()
        found |= _header(image)
        look = dataclasses.replace(look, **found)
        pixels = decode(image, look.name)
        boxes = check_boxes.measured(sample, pixels.shape[:2])
        return dataclasses.replace(look, **boxes | check_maps.measured(sample, pixels.shape[:2], source))
    except (ValueError, OSError) as error:
        return dataclasses.replace(look, problem=str(error))


def _header(image: Any) -> dict:
    """What the head of a file says, before it is decoded; what is no image is for `decode` to say."""
    if isinstance(image, bytes):
        found = {"size": len(image), "digest": hashlib.blake2b(image, digest_size=16).digest()}
        try:
            with Image.open(io.BytesIO(image)) as opened:
                found |= {"kind": f"{opened.format} {opened.mode}", "width": opened.width, "height": opened.height}
                found["turned"] = opened.getexif().get(_ORIENTATION, 1) != 1
        except Exception:
            return {"size": len(image)}
        return found
    pixels = np.asarray(image)
    kind = f"array {pixels.dtype} {pixels.shape[2] if pixels.ndim == 3 else 1} channels"
    digest = hashlib.blake2b(np.ascontiguousarray(pixels), digest_size=16).digest()
    height, width = (*pixels.shape, 0, 0)[:2]
    return {"kind": kind, "width": width, "height": height, "size": pixels.nbytes, "digest": digest}
