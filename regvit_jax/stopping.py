"""Stopping in order: SIGTERM and the first Ctrl-C ask the loop to save and end; several processes agree on the step."""

import logging
import signal
import threading

import jax
from jax.experimental import multihost_utils


class Stop:
    """Listens for signals while it is entered. The second Ctrl-C interrupts at once.

    With several processes the step is agreed by JAX's preemption service, which listens for SIGTERM itself.
    """

    def __init__(self):
        self._asked = False
        self._previous: dict[int, object] = {}

    def requested(self, step: int) -> bool:
        """Whether the loop shall end after `step`. With several processes all must call it for every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def __enter__(self) -> "Stop":
        # Python delivers signals to the main thread only; in another (a notebook's, a test's) the loop cannot be
        # stopped so.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True
        logging.warning("%s: saving and stopping after this step", signal.Signals(number).name)
