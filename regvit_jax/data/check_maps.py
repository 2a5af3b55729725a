"""What `regvit data check` tells of masks and depth maps: classes and their pixels, metres, what is unknown."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from regvit_jax.data.decode import decode_map
from regvit_jax.data.sources import IGNORE, Source

# Classes that the terminal names: the largest and the smallest.
_LARGEST, _SMALLEST = 8, 3
# A median depth outside of these metres is worth a question about the unit.
_USUAL = (0.05, 200.0)


def measured(sample: Mapping[str, Any], shape: tuple[int, int], source: Source) -> dict[str, Any]:
    """What `Look` keeps of the maps of a sample whose image has `shape`.

    Returns:
      {"problem": text; or "mask": ((value, pixels), …) and "depth": (pixels, known ones, known ones outside the
      source's depth_range, nearest, median, farthest metres), each where the sample has one}.
    """
    found: dict[str, Any] = {}
    for key in ("mask", "depth"):
        if key not in sample:
            continue
        values = decode_map(sample[key])
        if values.shape != shape:
            return {"problem": f"its {key} has shape {values.shape}, the image {shape}: they must agree"}
        if key == "mask":
            if values.dtype.kind not in "biu":
                return {"problem": f"its mask holds {values.dtype} values, no class numbers"}
            numbers, pixels = np.unique(values, return_counts=True)
            found["mask"] = tuple(zip(numbers.astype(int).tolist(), pixels.tolist(), strict=True))
        else:
            known = values[np.isfinite(values) & (values > 0)].astype(np.float64)
            low, high = source.depth_range or (0.0, np.inf)
            metres = np.percentile(known, (0, 50, 100)).tolist() if known.size else (0.0, 0.0, 0.0)
            found["depth"] = (values.size, known.size, int(((known < low) | (known > high)).sum()), *metres)
    return found


def report_of(title: str, source: Source, looks: Sequence, report: dict) -> dict:
    """{"mask": …, "depth": …} of the samples that could be read, where they have them; what is wrong goes into the
    report's lists."""
    found = {}
    for key, tell in (("mask", _masks), ("depth", _depths)):
        having = [look for look in looks if getattr(look, key)]
        if having:
            found[key] = tell(title, source, having, report)
        if 0 < len(having) < len(looks):
            without = [look for look in looks if not getattr(look, key)]
            report["problems"].append(f"{title}{len(without)} images have no {key}, the others do: {_few(without)}")
    if found and source.dense_refusal:
        report["notes"].append(f"{title}segmentation and depth are refused on it: {source.dense_refusal}")
    return found


def lines(found: dict) -> list[str]:
    """The same for a terminal."""
    text = []
    if "mask" in found:
        mask = found["mask"]
        shares = sorted((pair for pair in mask["classes"] if pair[1]), key=lambda pair: -pair[1])
        if len(shares) > _LARGEST + _SMALLEST:
            shares[_LARGEST:-_SMALLEST] = [("…", None)]
        named = ", ".join(name if share is None else f"{name}: {_percent(share)}" for name, share in shares)
        text.append(
            f"  mask       {mask['maps']:,} maps, {len(mask['classes'])} classes, {_percent(mask['ignored'])} of the "
            "pixels ignored"
        )
        text.append(f"             {named}")
    if "depth" in found:
        depth = found["depth"]
        text.append(
            f"  depth      {depth['maps']:,} maps, {depth['nearest']:.2f} to {depth['farthest']:.2f} m, median "
            f"{depth['median']:.2f} m, {_percent(depth['unknown'])} of the pixels unknown"
        )
    return text


def _masks(title, source, looks, report):
    pixels = collections.Counter()
    for look in looks:
        pixels.update(dict(look.mask))
    ignored, total = pixels.pop(IGNORE, 0), sum(pixels.values())
    names = list(source.mask_names) or [str(number) for number in range(max(pixels, default=-1) + 1)]
    beyond = [look for look in looks if any(number >= len(names) and number != IGNORE for number, _ in look.mask)]
    if beyond:
        report["problems"].append(
            f"{title}{len(beyond)} masks have a class number above {len(names) - 1}, with {len(names)} classes: "
            f"{_few(beyond)}"
        )
    blank = [look for look in looks if all(number == IGNORE for number, _ in look.mask)]
    if blank:
        report["notes"].append(f"{title}{len(blank)} masks have no pixel that counts: {_few(blank)}")
    absent = [name for number, name in enumerate(names) if not pixels[number]]
    if absent:
        shown = ", ".join(absent[:10]) + (", …" if len(absent) > 10 else "")
        report["notes"].append(
            f"{title}{len(absent)} of {len(names)} classes are in none of the {len(looks)} masks decoded: {shown}"
        )
    return {
        "maps": len(looks),
        "ignored": _share(ignored, ignored + total),
        "classes": [[name, _share(pixels[number], total)] for number, name in enumerate(names)],
    }


def _depths(title, source, looks, report):
    sizes, known, outside, nearest, median, farthest = np.array([look.depth for look in looks]).T
    some = known > 0
    if not some.any():
        report["problems"].append(f"{title}no depth map has a known pixel: {_few(looks)}")
    elif not some.all():
        blank = [look for look, has in zip(looks, some, strict=True) if not has]
        report["notes"].append(f"{title}{len(blank)} depth maps have no known pixel: {_few(blank)}")
    middle = float(np.median(median[some])) if some.any() else 0.0
    if some.any() and not _USUAL[0] <= middle <= _USUAL[1]:
        report["notes"].append(f"{title}the median depth is {middle:g} m: is the unit right (millimetres are 0.001)")
    if outside.any():
        low, high = source.depth_range
        report["notes"].append(
            f"{title}{_percent(_share(outside.sum(), known.sum()))} of the known depth is outside the {low:g} to "
            f"{high:g} m that count"
        )
    return {
        "maps": len(looks),
        "unknown": _share((sizes - known).sum(), sizes.sum()),
        "nearest": float(nearest[some].min()) if some.any() else 0.0,
        "median": middle,
        "farthest": float(farthest.max()),
    }


def _share(part, whole):
    return float(part / whole) if whole else 0.0


def _percent(share):
    """Two digits, and none that say 0 of something."""
    percent = 100 * share
    return (
        "0 %"
        if not share
        else "<.01 %"
        if percent < 0.01
        else f"{percent:.2g} %"
        if percent < 10
        else f"{percent:.0f} %"
    )


def _few(looks):
    return ", ".join(look.name for look in looks[:5]) + (", …" if len(looks) > 5 else "")
