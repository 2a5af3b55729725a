"""Progress of what takes minutes or hours: a line now and then that says how far it is and how long it will take."""

import logging
import time

from regvit_jax.metrics import duration

_SECONDS_BETWEEN_LINES = 30.0

_log = logging.getLogger(__name__)


class Progress:
    """progress = Progress("depth probe: measured", len(source)); in the loop, progress(number of images done)."""

    def __init__(self, label: str, total: int):
        self._label, self._total = label, total
        self._start = self._line = time.monotonic()

    def __call__(self, done: int) -> None:
        """Writes the line if the last one is half a minute old and anything is done."""
        now = time.monotonic()
        if now - self._line < _SECONDS_BETWEEN_LINES or not done:
            return
        self._line, speed = now, done / (now - self._start)
        left = duration((self._total - done) / speed)
        shown = f"{speed:,.0f}" if speed >= 10 else f"{speed:.2f}"
        _log.info("%s %d of %d images, %s img/s, %s left", self._label, done, self._total, shown, left)
