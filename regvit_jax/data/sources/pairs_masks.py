"""How many classes the masks of `pairs:` have, when nobody says: all of them are read, once a process."""

import concurrent.futures
import functools
import logging
import os
import time

import numpy as np

from regvit_jax.data.decode import decode_map
from regvit_jax.data.sources import IGNORE

_EVERY = 10.0  # seconds between two lines of progress

_log = logging.getLogger(__name__)


@functools.lru_cache(maxsize=16)
def largest_class(paths: tuple[str, ...], stamps: tuple, ignore: tuple[int, ...]) -> int:
    """The largest value of the masks that is not ignored; `stamps` of the files only make changed ones be read anew.

    Masks that cannot be decoded are left out here: reading them as samples says what is wrong.

    Raises:
      ValueError: if no class number is left, one is above 254, or the values are 0 and 255 only.
    """
    _log.info(
        "reading %d masks once to count their classes: ?classes=N or ?names=FILE makes that unnecessary", len(paths)
    )
    found, told = set(), time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for number, values in enumerate(pool.map(_values, paths), 1):
            found.update(values)
            if time.monotonic() - told > _EVERY:
                told = time.monotonic()
                _log.info("%d of %d masks read", number, len(paths))
    ids = sorted(found - {IGNORE, *ignore})
    if not ids or not 0 <= ids[0] <= ids[-1] < IGNORE:
        shown = ", ".join(map(str, sorted(found)[:10])) + (", …" if len(found) > 10 else "")
        raise ValueError(
            f"the masks beside {paths[0]} have the values {shown}: class numbers from 0 to {IGNORE - 1} are expected, "
            f"{IGNORE} where nothing counts. Name other values without meaning by ?ignore=, or say by ?depth=0.001 "
            "that the maps are depth"
        )
    if found == {0, IGNORE}:
        raise ValueError(
            f"the masks beside {paths[0]} have the values 0 and {IGNORE} only: {IGNORE} is where nothing counts, which "
            "leaves one class. Save them with 1 for the object"
        )
    _log.info("the masks have classes 0 to %d", ids[-1])
    return ids[-1]


def _values(path):
    try:
        return np.unique(decode_map(path)).tolist()
    except (ValueError, OSError):
        return []
