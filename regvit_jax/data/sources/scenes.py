"""scenes: — procedural 3-D scenes, the dataset that is always there: eight shapes to tell apart, with masks, depth,
boxes and captions.

    scenes:                       4,000 training scenes of 64 x 64 pixels        scenes:#test    800 from other seeds
    scenes:?size=128&n=20000      larger pictures, more of them

Drawn on first use and kept (tens of MB) under $REGVIT_CACHE/scenes, by default ~/.cache/regvit_jax/scenes.
"""

import hashlib
from typing import Any

import numpy as np

from regvit_jax.data.sources import Source, scenes_build
from regvit_jax.data.sources.scenes_layout import SPLITS, VERSION
from regvit_jax.data.sources.scenes_shapes import CLASS_NAMES

OPTIONS = {"size": 64, "n": 4000, "n_test": 800, "seed": 0}
# Metres. Nothing is nearer than the first; the farthest walls, seen at their ends, come close to the last.
DEPTH_RANGE = (0.1, 15.0)
_LEAST = {"size": 8, "n": 1, "n_test": 1, "seed": 0}


def open(path: str, options: dict[str, str], split: str | None) -> "Scenes":
    """The scenes of one split, drawn now if they are not on disk; `split` is train or test.

    Options: `size` in pixels, `n` and `n_test` scenes of each split, `seed` for another world.

    Raises:
      ValueError: for a path, an unknown option or split, or a value out of range.
    """
    if path:
        raise ValueError(f"scenes: takes no path, got {path!r}: write scenes:?size=128#test")
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise ValueError(f"scenes: has no option {', '.join(unknown)}; there are {', '.join(OPTIONS)}")
    values = {name: _number(name, options[name]) if name in options else default for name, default in OPTIONS.items()}
    split = split or SPLITS[0]
    if split not in SPLITS:
        raise ValueError(f"scenes: has no split {split!r}: it has {', '.join(SPLITS)}")
    plan = scenes_build.Plan(**values)
    return Scenes(plan, str(scenes_build.prepared(plan)), split)


class Scenes(Source):
    """See the top of the file. Pickled as its folder; every process opens the records on first use."""

    class_names = CLASS_NAMES
    mask_names = ("ground", "wall", *CLASS_NAMES)
    box_names = CLASS_NAMES
    depth_range = DEPTH_RANGE
    splits = SPLITS

    def __init__(self, plan: scenes_build.Plan, folder: str, split: str):
        self.plan, self.folder, self.split = plan, folder, split
        self._records = None

    def __len__(self) -> int:
        return self.plan.count(self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"image" PNG bytes, "label" int, "mask" PNG bytes (0 ground, 1 wall, 2 + class), "depth" (S, S) float32
        metres along
        the view axis, "boxes" (K, 4) float32 xyxy of what is visible, the main object first, "box_labels" (K,),
        "caption" str}."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"scene {index} of {len(self)}")
        if self._records is None:
            self._records = scenes_build.records(self.folder, self.split)
        record = self._records[index % len(self)]
        return {
            "image": record["image"],
            "label": int(record["label"]),
            "mask": record["mask"],
            "depth": record["depth"].astype(np.float32) / 1000.0,
            "boxes": np.asarray(record["boxes"], np.float32).reshape(-1, 4),
            "box_labels": np.asarray(record["box_labels"], np.int64),
            "caption": record["caption"].decode(),
        }

    def __getstate__(self):
        return self.__dict__ | {"_records": None}

    def name(self, index: int) -> str:
        return f"scenes:#{self.split}[{index}]"

    @property
    def fingerprint(self) -> str:
        return hashlib.blake2b(f"scenes {VERSION} {self.plan} {self.split}".encode(), digest_size=16).hexdigest()


def _number(name: str, text: str) -> int:
    if not text.isdecimal() or int(text) < _LEAST[name]:
        raise ValueError(f"scenes: {name} is a whole number from {_LEAST[name]} up, got {text!r}")
    return int(text)
