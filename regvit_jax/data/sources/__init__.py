"""Sources: datasets named by one string, `kind:path?option=value&…#split[start:stop]`.

    folder:/photos        npz:cifar10.npz#test        imagenet:/data/imagenet#train[:80%]
    scenes:?n=1000#train[100:200]                     tfds:imagenet2012@/data/tfds#validation

`kind` is a line of `SOURCES`; its module has `open(path, options, split) -> Source`: a new dataset is one of each.
Slices count samples or percent, also from the end, in the order of the split.
"""

import dataclasses
import hashlib
import importlib
import re
from typing import Any

import numpy as np

from regvit_jax.data.order import Order

SOURCES = {
    "ade20k": "regvit_jax.data.sources.ade20k",
    "boxes": "regvit_jax.data.sources.boxes",
    "coco": "regvit_jax.data.sources.coco",
    "folder": "regvit_jax.data.sources.folder",
    "imagenet": "regvit_jax.data.sources.imagenet",
    "imagenet22k": "regvit_jax.data.sources.imagenet22k",
    "list": "regvit_jax.data.sources.listed",
    "npz": "regvit_jax.data.sources.npz",
    "nyud": "regvit_jax.data.sources.nyud",
    "pairs": "regvit_jax.data.sources.pairs",
    "scenes": "regvit_jax.data.sources.scenes",
    "tar": "regvit_jax.data.sources.tar",
    "tfds": "regvit_jax.data.sources.tfds",
    "tfrecord": "regvit_jax.data.sources.tfrecord",
    "voc": "regvit_jax.data.sources.voc",
}

# The value of a mask where nothing counts. Sources that keep other values give this one.
IGNORE = 255

# The split to evaluate on when several exist: validation splits first, `test` is for the end of a project.
EVAL_SPLITS = ("val", "valid", "validation", "test", "testing")
_SYNONYMS = ({"val", "valid", "validation"}, {"test", "testing"})

_HOLDOUT_SEED = 0x5EED
_HOLDOUT_FRACTION = 10
_BOUND = r"-?\d+(?:\.\d+(?=%))?%?"
_FRAGMENT = re.compile(rf"(?P<split>[\w\-]*)(?:\[(?P<start>{_BOUND})?:(?P<stop>{_BOUND})?\])?")
_OPTIONS = re.compile(r"\w+=[^&]*(&\w+=[^&]*)*")


class Source:
    """A dataset with random access. Subclasses are picklable and cheap to reopen: every worker process gets a copy.

    Attributes:
      class_names: one name a class, in label order; empty where there are no labels.
      splits: the names that `#split` may take, the one meant without it first; empty where there are none.
      faults: what opening it found wrong with it, such as a torn archive; `regvit data check` reports it.
      mask_names: one name an id of the masks, 0 first; empty where there are no masks.
      box_names: one name a class of the boxes; empty where they have none.
      depth_range: (nearest, farthest) metres that the protocol of this data counts; None where it has none.
      dense_refusal: why its masks or depth may not be measured on; "" where they may. See `require_dense`.
    """

    class_names: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    mask_names: tuple[str, ...] = ()
    box_names: tuple[str, ...] = ()
    depth_range: tuple[float, float] | None = None
    dense_refusal: str = ""

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample: "image" (encoded bytes, a path, uint8 (H,W,3) or a PIL image) and, where it has them, "label"
        (int; absent or -1 is unlabelled), "mask" (a uint8 (H,W) array, encoded bytes or a path; ids from 0, IGNORE
        where nothing counts), "depth" (float32 (H,W) metres, 0 where unknown), "boxes" (float32 (n,4) xyxy in pixels,
        the far edges exclusive), "box_labels" (int64 (n,)), "difficult" and "truncated" (bool (n,)), "caption"."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What to call this sample in a message: its file name where it has one."""
        return str(index)

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 where there are no labels."""
        return len(self.class_names)

    @property
    def labels(self) -> np.ndarray | None:
        """(n,) integers, the label of every sample, -1 where it has none; None where only reading all would tell."""
        return None

    @property
    def fingerprint(self) -> str:
        """Hex digest that changes when the samples or their order change."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Spec:
    """The parts of a source string; str() gives the string back."""

    kind: str
    path: str
    options: dict[str, str]
    split: str | None = None
    start: str = ""
    stop: str = ""

    @property
    def sliced(self) -> bool:
        return bool(self.start or self.stop)

    def __str__(self):
        options = "&".join(f"{key}={value}" for key, value in self.options.items())
        bounds = f"[{self.start}:{self.stop}]" if self.sliced else ""
        fragment = (self.split or "") + bounds
        return f"{self.kind}:{self.path}" + (f"?{options}" if options else "") + (f"#{fragment}" if fragment else "")


def parse(text: str) -> Spec:
    """The parts of `text`.

    Raises:
      ValueError: for an unknown kind, a malformed option or split; the message shows the form.
    """
    kind, colon, rest = text.partition(":")
    if not colon or kind not in SOURCES:
        raise ValueError(
            f"{text!r} names no data source: write kind:path with kind one of {', '.join(sorted(SOURCES))}, such as "
            f"'folder:{text if not colon else '/path/to/images'}'"
        )
    # A '#' or '?' may belong to a file name: then what follows holds a '/' or is no 'option=value'.
    path, mark, fragment = rest.rpartition("#")
    if not mark or "/" in fragment:
        path, fragment = rest, ""
    parts = _FRAGMENT.fullmatch(fragment)
    if parts is None:
        raise ValueError(
            f"cannot read the split '#{fragment}' of {text!r}: write #train, #train[:80%], #train[100:200] or #[10%:]"
        )
    before, mark, options = path.rpartition("?")
    pairs = {}
    if mark and "=" in options:
        if not _OPTIONS.fullmatch(options):
            raise ValueError(f"cannot read the options '?{options}' of {text!r}: write ?name=value&name=value")
        path = before
        for pair in options.split("&"):
            key, _, value = pair.partition("=")
            if key in pairs:
                raise ValueError(f"option {key!r} is given twice in {text!r}")
            pairs[key] = value
    return Spec(kind, path, pairs, parts["split"] or None, parts["start"] or "", parts["stop"] or "")


def open_source(text: str) -> Source:
    """The source that `text` names, sliced as it says.

    Raises:
      ValueError: where the string cannot be read, or its slice or split is not there.
      FileNotFoundError: where the path is not there.
    """
    spec = parse(text)
    options = dict(spec.options)
    part = options.pop("holdout", None)
    if part not in (None, "train", "eval"):
        raise ValueError(f"holdout is 'train' or 'eval', not {part!r} (in {text!r})")
    source = importlib.import_module(SOURCES[spec.kind]).open(spec.path, options, spec.split)
    if spec.sliced:
        source = Subset(source, *_bounds(spec, len(source), text))
    if part is not None:
        if len(source) < 2:
            raise ValueError(f"{text!r} has {len(source)} sample: too few to hold some out")
        held_out = max(1, len(source) // _HOLDOUT_FRACTION)
        bounds = (0, held_out) if part == "eval" else (held_out, len(source))
        source = Subset(source, *bounds, shuffled=True)
    return source


def eval_split(text: str) -> str | None:
    """The string of the split to evaluate on when `text` is trained on, or None: then use `holdout(text)`."""
    spec = parse(text)
    if "holdout" in spec.options:
        return holdout(text)[1]
    available = open_source(str(dataclasses.replace(spec, start="", stop=""))).splits
    trained_on = spec.split if spec.split is not None or not available else available[0]
    candidates = [split for split in available if split.lower() in EVAL_SPLITS and not _same(split, trained_on)]
    if not candidates:
        return None
    split = min(candidates, key=lambda split: EVAL_SPLITS.index(split.lower()))
    return str(dataclasses.replace(spec, split=split, start="", stop=""))


def _same(split: str, other: str | None) -> bool:
    """Whether two names may mean one split: a source may take #validation for its val."""
    return split == other or any({split.lower(), str(other).lower()} <= names for names in _SYNONYMS)


def holdout(text: str) -> tuple[str, str]:
    """(train, eval) strings: a fixed random tenth of what `text` names is held out for evaluation, the rest is trained
    on.

    The choice depends on the number of samples only, so it is the same in every run; the two parts never overlap.
    """
    spec = parse(text)
    train, evaluation = (
        str(dataclasses.replace(spec, options={**spec.options, "holdout": part})) for part in ("train", "eval")
    )
    return train, evaluation


class Subset(Source):
    """Samples [start, stop) of `source`, in its order or, with `shuffled`, in a fixed random order of the whole."""

    def __init__(self, source: Source, start: int, stop: int, shuffled: bool = False):
        self.source, self.start, self.stop = source, start, stop
        self.order = Order(len(source), _HOLDOUT_SEED) if shuffled else None

    def _inner(self, index):
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index = self.start + index % len(self)
        return index if self.order is None else self.order.index(index)

    def __len__(self):
        return self.stop - self.start

    def __getitem__(self, index):
        return self.source[self._inner(index)]

    def name(self, index):
        return self.source.name(self._inner(index))

    @property
    def class_names(self):
        return self.source.class_names

    @property
    def num_classes(self):
        return self.source.num_classes

    @property
    def splits(self):
        return self.source.splits

    @property
    def faults(self):
        return self.source.faults

    @property
    def mask_names(self):
        return self.source.mask_names

    @property
    def box_names(self):
        return self.source.box_names

    @property
    def depth_range(self):
        return self.source.depth_range

    @property
    def dense_refusal(self):
        return self.source.dense_refusal

    @property
    def labels(self):
        labels = self.source.labels
        if labels is None:
            return None
        indices = np.arange(self.start, self.stop)
        return labels[indices if self.order is None else self.order.index(indices)]

    @property
    def fingerprint(self):
        part = f"{self.source.fingerprint} {self.start}:{self.stop} {'shuffled' if self.order else 'in order'}"
        return hashlib.blake2b(part.encode(), digest_size=16).hexdigest()


def require_dense(source: Source, text: str) -> None:
    """What evaluations call before they use masks or depth.

    Raises:
      ValueError: if the maps of `source`, the one that `text` names, are not those of the protocol; says why.
    """
    if source.dense_refusal:
        raise ValueError(f"{text} has no masks or depth to measure on: {source.dense_refusal}")


def _bounds(spec: Spec, n: int, text: str) -> tuple[int, int]:
    start = _bound(spec.start, n, 0)
    stop = _bound(spec.stop, n, n)
    if not 0 <= start < stop <= n:
        raise ValueError(
            f"the slice [{spec.start}:{spec.stop}] of {text!r} is samples {start} to {stop} of {n}: not a part of them"
        )
    return start, stop


def _bound(written: str, n: int, default: int) -> int:
    if not written:
        return default
    # Rounded, not truncated, and the same for start and stop: [:33%] and [33%:] share no sample and miss none.
    value = round(n * float(written[:-1]) / 100) if written.endswith("%") else int(written)
    return n + value if written.startswith("-") else value
