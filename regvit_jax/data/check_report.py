"""What `regvit data check` reports of the samples that it looked at: counts, statistics, problems, notes."""

import collections
import dataclasses

import numpy as np

from regvit_jax.data import check_boxes, check_maps
from regvit_jax.data.sources import EVAL_SPLITS, Source

# What is worth a note: sides in pixels, megapixels, long side over short side, most over fewest images a class.
TINY, HUGE, ODD, UNEVEN = 16, 50, 4, 100
_PERCENTILES = {"min": 0, "5 %": 5, "median": 50, "95 %": 95, "max": 100}


@dataclasses.dataclass(frozen=True)
class Look:
    """One sample, looked at: `problem` says why it cannot be used, or is empty; `mask` and `depth` as
    `check_maps.measured` gives them, `boxes` as check_boxes does."""

    split: str
    index: int
    name: str
    label: int = -1
    kind: str = ""
    width: int = 0
    height: int = 0
    size: int = 0
    digest: bytes = b""
    turned: bool = False
    mask: tuple[tuple[int, int], ...] = ()
    depth: tuple[float, ...] = ()
    boxes: check_boxes.Boxes | None = None
    problem: str = ""


def of(text: str, parts: dict[str, Source], looks: list[Look]) -> dict:
    """The report of `check`, without its picture."""
    report = {"source": text, "splits": {}, "eval_split": None, "problems": [], "notes": [], "picture": None}
    for split, source in parts.items():
        report["splits"][split] = _split(split, source, [look for look in looks if look.split == split], report)
    _evaluation(parts, report)
    _twice(looks, report)
    return report


def as_text(report: dict) -> str:
    """The report as lines for a terminal."""
    lines = [report["source"]]
    for split, found in report["splits"].items():
        lines.append(f"\n{split or 'all'}: {found['samples']:,} images, {_classes(found)}")
        lines.append(f"  decoded {found['decoded']:,}, {len(found['unreadable'])} unreadable")
        if found["kinds"]:
            lines.append("  kinds      " + ", ".join(f"{kind} {count:,}" for kind, count in found["kinds"].items()))
            lines.append("             " + "".join(f"{name:>11}" for name in _PERCENTILES))
            lines += [
                f"  {title:<10} " + "".join(f"{value:>11,}" for value in found[key].values())
                for title, key in (("width", "width"), ("height", "height"), ("kB", "kilobytes"))
            ]
        lines += check_maps.lines(found) + check_boxes.lines(found)
    lines.append(
        f"\nevaluation: {report['eval_split'] or 'no split of its own: a fixed tenth is held out of training'}"
    )
    for title, key in (("problems", "problems"), ("notes", "notes")):
        lines.append(f"{title}: {'' if report[key] else 'none'}")
        lines += [f"  - {text}" for text in report[key]]
    if report["picture"]:
        lines.append(f"picture: {report['picture']}")
    return "\n".join(lines)


def _split(split, source, looks, report):
    """Counts and statistics of one split; what is wrong goes into the report's lists."""
    title = f"{split}: " if split else ""
    report["problems"] += [f"{title}{fault}" for fault in source.faults]
    good = [look for look in looks if not look.problem]
    unreadable = [[look.name, look.problem] for look in looks if look.problem]
    labels, of_all = source.labels, source.labels is not None
    if labels is None:
        labels = np.array([look.label for look in good], int)
    found = {
        "samples": len(source),
        "classes": source.num_classes,
        "decoded": len(looks),
        "unreadable": unreadable,
        "kinds": dict(collections.Counter(look.kind for look in good).most_common()),
        "width": _spread([look.width for look in good]),
        "height": _spread([look.height for look in good]),
        "kilobytes": _spread([look.size / 1000 for look in good]),
    }
    if unreadable:
        shown = "".join(f"\n      {name}: {reason}" for name, reason in unreadable[:10])
        more = f"\n      and {len(unreadable) - 10} more" if len(unreadable) > 10 else ""
        report["problems"].append(
            f"{title}{len(unreadable)} of {len(looks)} decoded images are unreadable{shown}{more}"
        )
    if source.num_classes:
        found |= _labels(title, source, labels, of_all, next(iter(report["splits"]), split) == split, report)
    found |= check_maps.report_of(title, source, good, report)
    found |= check_boxes.report_of(title, source, good, report)
    for what, chosen in (
        (f"have a side below {TINY} pixels", [look for look in good if min(look.width, look.height) < TINY]),
        (f"are above {HUGE} megapixels", [look for look in good if look.width * look.height > HUGE * 1e6]),
        (
            f"are more than {ODD} times as long as wide",
            [look for look in good if max(look.width, look.height) > ODD * max(1, min(look.width, look.height))],
        ),
        ("are turned by their EXIF orientation", [look for look in good if look.turned]),
    ):
        if chosen:
            names = ", ".join(look.name for look in chosen[:5]) + (", …" if len(chosen) > 5 else "")
            report["notes"].append(f"{title}{len(chosen)} of {len(good)} images {what}: {names}")
    return found


def _labels(title, source, labels, of_all, first, report):
    """Counts per class; classes without images and images without label are problems where training would see them."""
    counts = np.bincount(labels[labels >= 0], minlength=source.num_classes)
    unlabelled = int((labels < 0).sum())
    found = {"unlabelled": unlabelled, "labels_of": "all" if of_all else "the decoded images"}
    if len(counts) > source.num_classes:
        report["problems"].append(f"{title}a label is {len(counts) - 1}, with {source.num_classes} classes")
    low, high = int(counts.argmin()), int(counts.argmax())
    names = [*source.class_names, *map(str, range(source.num_classes, len(counts)))]
    found["fewest"], found["most"] = [names[low], int(counts[low])], [names[high], int(counts[high])]
    empty = [names[label] for label in np.flatnonzero(counts == 0)]
    if empty and of_all:
        shown = ", ".join(empty[:10]) + (", …" if len(empty) > 10 else "")
        report["problems" if first else "notes"].append(f"{title}{len(empty)} classes have no image: {shown}")
    if unlabelled:
        report["problems"].append(f"{title}{unlabelled} images have no label, the others do")
    if source.num_classes == 1 and first:
        report["notes"].append(
            f"{title}there is one class only ({names[0]}): if that is no class, name its folder in the source"
        )
    if of_all and counts.min() and counts.max() > UNEVEN * counts.min():
        report["notes"].append(
            f"{title}classes are uneven: {names[high]} has {counts[high]:,} images, {names[low]} {counts[low]:,}"
        )
    return found


def _evaluation(parts, report):
    """Names the split that runs evaluate on."""
    splits = list(next(iter(parts.values())).splits)
    candidates = sorted((s for s in splits if s.lower() in EVAL_SPLITS), key=lambda s: EVAL_SPLITS.index(s.lower()))
    report["eval_split"] = candidates[0] if candidates else None
    if candidates and candidates[0] in parts and len(parts) > 1:
        held, train = parts[candidates[0]], next(iter(parts.values()))
        if held is not train and held.num_classes != train.num_classes:
            report["problems"].append(
                f"the evaluation split {candidates[0]!r} has {held.num_classes} classes, training {train.num_classes}"
            )


def _twice(looks, report):
    """Files that are there twice, byte for byte: in two splits, or with two labels, they falsify what is measured."""
    same = collections.defaultdict(list)
    for look in looks:
        if look.digest and not look.problem:
            same[look.digest].append(look)
    groups = [group for group in same.values() if len(group) > 1]
    across = [group for group in groups if len({look.split for look in group}) > 1]
    apart = [group for group in groups if group not in across and len({look.label for look in group}) > 1]
    rest = [group for group in groups if group not in across and group not in apart]
    for chosen, what, place in (
        (across, "are in two splits", "problems"),
        (apart, "have two labels", "problems"),
        (rest, "are there more than once", "notes"),
    ):
        if chosen:
            names = "; ".join(" = ".join(look.name for look in group[:3]) for group in chosen[:5])
            report[place].append(f"{len(chosen)} images {what}, byte for byte: {names}{'; …' if chosen[5:] else ''}")


def _spread(values):
    if not values:
        return {}
    found = np.percentile(values, list(_PERCENTILES.values()))
    return {
        name: round(float(value), 1 if value < 10 else None) for name, value in zip(_PERCENTILES, found, strict=True)
    }


def _classes(found):
    if not found["classes"]:
        return "no labels"
    (fewest, low), (most, high) = found["fewest"], found["most"]
    per_class = f"{low:,} each" if low == high else f"{low:,} ({fewest}) to {high:,} ({most}) each"
    return f"{found['classes']:,} classes, {per_class}" + ("" if found["labels_of"] == "all" else " of those decoded")
