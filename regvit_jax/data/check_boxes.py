"""What `regvit data check` tells of boxes: how many, of which classes, which cannot be right."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from regvit_jax.data.sources import Source

# Classes that the terminal names: the most frequent and the rarest.
_FREQUENT, _RARE = 8, 3
# Pixels that a box may reach over the edge: annotations of smaller pictures, scaled and rounded, do.
_SLACK = 1.0


class Boxes(NamedTuple):
    """Of one image: number of boxes; of those without extent, over the edge a little or by more than a pixel, there
    twice, difficult, truncated; the class numbers."""

    count: int
    thin: int = 0
    over: int = 0
    outside: int = 0
    twice: int = 0
    difficult: int = 0
    truncated: int = 0
    labels: tuple[int, ...] = ()


def measured(sample: Mapping[str, Any], shape: tuple[int, int]) -> dict[str, Any]:
    """What `Look` keeps of the boxes of a sample whose image has `shape`: {"boxes": Boxes}, {"problem": text}, or
    nothing where it has none."""
    if "boxes" not in sample:
        return {}
    boxes = np.asarray(sample["boxes"], np.float64)
    if boxes.shape == (0,):
        boxes = boxes.reshape(0, 4)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not np.isfinite(boxes).all():
        return {"problem": f"its boxes have shape {boxes.shape} or are not finite: expected (n, 4), xyxy"}
    labels = np.asarray(sample.get("box_labels", []), np.int64)
    for key in ("box_labels", "difficult", "truncated"):
        if key in sample and len(sample[key]) != len(boxes):
            return {"problem": f"it has {len(boxes)} boxes and {len(sample[key])} {key}: they must agree"}
    height, width = shape
    beyond = np.maximum(-boxes[:, :2], boxes[:, 2:] - (width, height)).max(axis=1, initial=0)
    rows = {tuple(row) for row in np.column_stack([boxes, labels if len(labels) else np.zeros(len(boxes))]).tolist()}
    return {
        "boxes": Boxes(
            len(boxes),
            int((boxes[:, 2:] <= boxes[:, :2]).any(axis=1).sum()),
            int(((beyond > 0) & (beyond <= _SLACK)).sum()),
            int((beyond > _SLACK).sum()),
            len(boxes) - len(rows),
            int(np.sum(sample.get("difficult", False))),
            int(np.sum(sample.get("truncated", False))),
            tuple(labels.tolist()),
        )
    }


def report_of(title: str, source: Source, looks: Sequence, report: dict) -> dict:
    """{"boxes": …} of the samples that could be read, where they have them; what is wrong goes into the report's
    lists."""
    having = [look for look in looks if look.boxes is not None]
    if not having:
        return {}
    _faults(title, having, report)
    found = {
        "images": len(having),
        "boxes": sum(look.boxes.count for look in having),
        "per_image": {
            name: float(np.percentile([look.boxes.count for look in having], share))
            for name, share in (("min", 0), ("median", 50), ("max", 100))
        },
        "empty": sum(not look.boxes.count for look in having),
        "difficult": sum(look.boxes.difficult for look in having),
        "truncated": sum(look.boxes.truncated for look in having),
        "classes": [],
    }
    labels = collections.Counter(label for look in having for label in look.boxes.labels)
    if labels or source.box_names:
        found["classes"] = _classes(title, source, labels, having, report)
    return {"boxes": found}


def lines(found: dict) -> list[str]:
    """The same for a terminal."""
    if "boxes" not in found:
        return []
    boxes = found["boxes"]
    each = ", ".join(f"{name} {value:g}" for name, value in boxes["per_image"].items())
    marked = "".join(f", {boxes[key]:,} {key}" for key in ("difficult", "truncated") if boxes[key])
    text = [f"  boxes      {boxes['boxes']:,} in {boxes['images']:,} images ({each}), {boxes['empty']:,} empty{marked}"]
    shares = sorted((pair for pair in boxes["classes"] if pair[1]), key=lambda pair: -pair[1])
    if len(shares) > _FREQUENT + _RARE:
        shares[_FREQUENT:-_RARE] = [("…", None)]
    if shares:
        named = ", ".join(name if count is None else f"{name} {count:,}" for name, count in shares)
        text.append(f"             {named}")
    return text


def _faults(title, looks, report):
    for key, where, what in (
        ("thin", "problems", "boxes have no extent: x1 < x2 and y1 < y2 are expected"),
        ("outside", "problems", "boxes reach over the edge of their image by more than a pixel"),
        ("over", "notes", "boxes reach over the edge of their image by a pixel or less"),
        ("twice", "notes", "boxes are there twice in their image"),
    ):
        chosen = [look for look in looks if getattr(look.boxes, key)]
        count = sum(getattr(look.boxes, key) for look in chosen)
        if chosen:
            report[where].append(f"{title}{count} {what}: {_few(chosen)}")
    empty = [look for look in looks if not look.boxes.count]
    if empty:
        report["notes"].append(
            f"{title}{len(empty)} of {len(looks)} images have no box, there is nothing to find in them: {_few(empty)}"
        )
    turned = [look for look in looks if look.turned and look.boxes.count]
    if turned:
        report["notes"].append(
            f"{title}{len(turned)} images with boxes are turned by their EXIF orientation: boxes are taken as those of "
            f"the upright picture, see whether they fit: {_few(turned)}"
        )


def _classes(title, source, labels, looks, report):
    names = list(source.box_names) or [str(number) for number in range(max(labels) + 1)]
    strange = [look for look in looks if any(not 0 <= label < len(names) for label in look.boxes.labels)]
    if strange:
        report["problems"].append(
            f"{title}{len(strange)} images have boxes of a class that is none of the {len(names)}: {_few(strange)}"
        )
    absent = [name for number, name in enumerate(names) if not labels[number]]
    if absent and source.box_names:
        shown = ", ".join(absent[:10]) + (", …" if len(absent) > 10 else "")
        report["notes"].append(
            f"{title}{len(absent)} of {len(names)} classes have no box in the {len(looks)} images decoded: {shown}"
        )
    return [[name, labels[number]] for number, name in enumerate(names)]


def _few(looks):
    return ", ".join(look.name for look in looks[:5]) + (", …" if len(looks) > 5 else "")
