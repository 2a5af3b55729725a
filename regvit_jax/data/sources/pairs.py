"""pairs:IMAGES,MAPS — any images with masks or depth maps, paired by name.

    pairs:/d/photos,/d/masks                              /d/photos/a/1.jpg with /d/masks/a/1.png, at any depth
    "pairs:/d/*.color.jpg,/d/*.depth.png?depth=0.001"     paired by what the * match; quoted, or a shell expands them
    "pairs:/d/{split},/d/{split}annot?ignore=11#train"    splits: names for which both sides exist

    ?ignore=11         values where nothing counts, `0,11` for several; 255 is always one
    ?classes=11        classes 0 to 10, called by their numbers; without it or names all masks are read once to count
    ?names=FILE        their names, one a line, the first is class 0
    ?depth=0.001       the maps are depth, of which 1 is .001 metres
    ?invalid=0,65535   values that mean unknown (0 by itself)          ?range=0.1,10    metres that count

A side is a folder, or files with a * for every part of the name that both share. `{split}` stands in the name of a
folder, once a path or more often, and #NAME chooses: train where there is one, and evaluation takes val or test.
CamVid is "pairs:/d/camvid/{split},/d/camvid/{split}annot?ignore=11", Cityscapes with train ids
"pairs:/d/leftImg8bit/{split}/*/*_leftImg8bit.png,/d/gtFine/{split}/*/*_gtFine_labelTrainIds.png?classes=19".
"""

import dataclasses
import functools
import math
import os
import pathlib

import numpy as np

from regvit_jax.data.sources import EVAL_SPLITS, IGNORE
from regvit_jax.data.sources.folder import TRAIN_NAMES
from regvit_jax.data.sources.paired import Paired, matched, whole_numbers
from regvit_jax.data.sources.pairs_files import SPLIT, files_of, splits_of
from regvit_jax.data.sources.pairs_masks import largest_class

OF_MASKS = ("ignore", "classes", "names")
OF_DEPTH = ("depth", "invalid", "range")
LAYOUT = (
    "pairs:IMAGES,MAPS takes two folders with files of the same names (photos/1.jpg, masks/1.png), or a * for what the "
    "names share (/d/*.color.jpg,/d/*.depth.png)"
)


@dataclasses.dataclass(frozen=True)
class Masks:
    """What the values of masks mean. Without `names` the masks tell how many classes there are."""

    ignore: tuple[int, ...] = ()
    names: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Depth:
    """What the values of depth maps mean: metres of 1, values that mean unknown, metres that count."""

    scale: float
    invalid: tuple[float, ...] = (0.0,)
    range: tuple[float, float] | None = None


def open(path: str, options: dict[str, str], split: str | None) -> "Pairs":
    """The pairs of two folders or globs; `split` only where both paths hold {split}.

    Raises:
      FileNotFoundError: if a folder is not there, or no file.
      ValueError: for a path or an option that cannot be read, a split that is not there, or a file without partner.
    """
    sides = tuple(os.path.abspath(os.path.expanduser(side)) for side in path.split(",") if side)
    if len(sides) != 2:
        raise ValueError(f"pairs:{path} names {len(sides)} paths, two are needed. {LAYOUT}")
    meaning = _meaning(options)
    if not any(SPLIT in side for side in sides):
        if split is not None:
            raise ValueError(f"pairs:{path} has no split {split!r}: write {SPLIT} for it in both paths")
        return Pairs(sides, (), None, meaning)
    splits = tuple(sorted(splits_of(*sides), key=_rank))
    if split is None:
        if splits[0].lower() not in TRAIN_NAMES and len(splits) > 1:
            raise ValueError(f"pairs:{path} has the splits {', '.join(splits)}: name one, as #{splits[0]}")
        split = splits[0]
    if split not in splits:
        raise ValueError(f"pairs:{path} has no split {split!r}: it has {', '.join(splits)}")
    return Pairs(sides, splits, split, meaning)


class Pairs(Paired):
    """See the top of the file."""

    layout = LAYOUT

    def __init__(self, sides: tuple[str, str], splits: tuple[str, ...], split: str | None, meaning: Masks | Depth):
        self.sides, self.splits, self.split, self._meaning = sides, splits, split, meaning
        (image_root, images), (map_root, maps) = (files_of(side.replace(SPLIT, split or "")) for side in sides)
        super().__init__(
            image_root, map_root, matched(images, maps, f"Images are {sides[0]}, maps {sides[1]}. {LAYOUT}")
        )
        if isinstance(meaning, Depth):
            self.depth_range = meaning.range

    def fields(self, values, path):
        if isinstance(self._meaning, Depth):
            return {"depth": _metres(values, self._meaning)}
        values = whole_numbers(values, path, LAYOUT)
        counts = ~np.isin(values, (*self._meaning.ignore, IGNORE))
        classes = IGNORE if self._meaning.names is None else len(self._meaning.names)
        wrong = values[counts & ((values < 0) | (values >= classes))]
        if wrong.size:
            raise ValueError(
                f"{path} has the value {wrong[0]}: classes are 0 to {classes - 1}. Name values where nothing counts by "
                f"?ignore={wrong[0]}, or the number of classes by ?classes=; is it depth, by ?depth=0.001"
            )
        return {"mask": np.where(counts, values, IGNORE).astype(np.uint8)}

    @functools.cached_property
    def mask_names(self) -> tuple[str, ...]:
        """One name a class. Where nobody says how many there are, the masks of all splits are read once."""
        if isinstance(self._meaning, Depth):
            return ()
        if self._meaning.names is not None:
            return self._meaning.names
        sides = [Pairs(self.sides, self.splits, split, self._meaning) for split in self.splits] or [self]
        paths = tuple(side.paths(index)[1] for side in sides for index in range(len(side)))
        sizes = tuple((status.st_size, status.st_mtime_ns) for status in map(os.stat, paths))
        return tuple(map(str, range(largest_class(paths, sizes, self._meaning.ignore) + 1)))

    def meaning(self):
        return repr(self._meaning)


def _meaning(options):
    """Masks or Depth, as the options say."""
    unknown = sorted(set(options) - {*OF_MASKS, *OF_DEPTH})
    if unknown:
        raise ValueError(f"pairs: has no option {', '.join(unknown)}; there are {', '.join((*OF_MASKS, *OF_DEPTH))}")
    if "depth" in options:
        if mixed := [name for name in OF_MASKS if name in options]:
            raise ValueError(f"pairs: ?depth= says that the maps are depth, ?{mixed[0]}= is for masks")
        scale, *more = _numbers("depth", options["depth"])
        if more or not scale > 0:
            raise ValueError(f"pairs: ?depth= is how many metres 1 is, such as 0.001, got {options['depth']!r}")
        invalid = _numbers("invalid", options["invalid"]) if "invalid" in options else ()
        limits = _numbers("range", options["range"]) if "range" in options else None
        if limits is not None and not (len(limits) == 2 and 0 <= limits[0] < limits[1]):
            raise ValueError(
                f"pairs: ?range= is the nearest and farthest metres, such as 0.1,10, got {options['range']!r}"
            )
        return Depth(scale, tuple(sorted({0.0, *invalid})), limits)
    if alone := [name for name in OF_DEPTH if name in options]:
        raise ValueError(
            f"pairs: ?{alone[0]}= is for depth: say by ?depth=0.001 that the maps are depth, in millimetres"
        )
    ignore = _numbers("ignore", options["ignore"]) if "ignore" in options else ()
    if any(value != int(value) for value in ignore):
        raise ValueError(f"pairs: ?ignore= is one or more whole numbers, such as 0,11, got {options['ignore']!r}")
    return Masks(tuple(sorted(map(int, ignore))), _names(options))


def _names(options):
    if "classes" in options and "names" in options:
        raise ValueError("pairs: ?names= tells the number of classes: leave ?classes= out")
    if "classes" in options:
        if not options["classes"].isdecimal() or not 1 <= int(options["classes"]) <= IGNORE:
            raise ValueError(f"pairs: ?classes= is a whole number from 1 to {IGNORE}, got {options['classes']!r}")
        return tuple(map(str, range(int(options["classes"]))))
    if "names" in options:
        path = os.path.abspath(os.path.expanduser(options["names"]))
        if not os.path.isfile(path):
            raise FileNotFoundError(f"pairs: ?names={options['names']}: {path} is no file; it has one name a line")
        names = tuple(line.strip() for line in pathlib.Path(path).read_text("utf-8").splitlines() if line.strip())
        if not 1 <= len(names) <= IGNORE:
            raise ValueError(f"{path} has {len(names)} names: one a line is expected, from 1 to {IGNORE} of them")
        return names
    return None


def _numbers(name, text):
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = (math.nan,)
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"pairs: ?{name}= is a number, or several with commas between, got {text!r}")
    return numbers


def _metres(values, meaning):
    known = np.isfinite(values) & ~np.isin(values, meaning.invalid)
    # In doubles, then rounded once: 1234 mm are the float32 next to 1.234 m.
    return np.where(known, values.astype(np.float64) * meaning.scale, 0).astype(np.float32)


def _rank(split):
    """Training first, then what is evaluated on, then others."""
    name = split.lower()
    if name in TRAIN_NAMES:
        return 0, TRAIN_NAMES.index(name), split
    return (1, EVAL_SPLITS.index(name), split) if name in EVAL_SPLITS else (2, 0, split)
