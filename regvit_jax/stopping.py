"""Stopping in order: SIGTERM and the first Ctrl-C ask the loop to save and end; several processes agree on the place.

And starting in order: what one process refuses, all refuse.
"""

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

_MESSAGE_BYTES = 4096

# The Stop that `poll` asks: evaluators know of no run.
_listening: "Stop | None" = None


class Stopped(BaseException):
    """Ends what is done between two steps, because the run was asked to stop. No `except Exception` holds it up."""


class Stop:
    """Listens for signals while it is entered. The second Ctrl-C interrupts at once.

    With several processes the place is agreed by JAX's preemption service, which listens for SIGTERM itself: it counts
    how often each process has asked, so that all hear yes at the same question.
    """

    def __init__(self):
        self._asked = False
        self._questions = 0
        self._previous: dict[int, object] = {}

    def requested(self, step: int) -> bool:
        """Whether the loop shall end after `step`. With several processes all must call it for every step."""
        return self._heard()

    @contextlib.contextmanager
    def breaking(self) -> Iterator[None]:
        """What is inside may be given up: `poll` raises Stopped there once the run is asked to stop."""
        global _listening
        _listening = self
        try:
            yield
        finally:
            _listening = None

    def _heard(self) -> bool:
        if jax.process_count() > 1 and not self._asked:
            self._questions += 1
            self._asked = multihost_utils.reached_preemption_sync_point(self._questions)
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


def poll() -> None:
    """What runs long between two steps (an evaluation: every batch, every fit) calls this, on all processes alike.

    Raises:
      Stopped: if the run is asked to stop and can do what is left undone here when it goes on. Outside a run: never.
    """
    if _listening is not None and _listening._heard():
        raise Stopped


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around what one process may refuse while the others do not: an error of one is an error of all.

    What is inside must not wait for other processes.

    Raises:
      ValueError: on a process that had no error itself, with the error of the first that had.
    """
    failure = None
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        failure = error
    if jax.process_count() == 1:
        return
    told = _told_by_everyone(str(failure) or type(failure).__name__ if failure else "")
    if failure is not None:
        raise failure
    for process, message in enumerate(told):
        if message:
            raise ValueError(f"process {process}: {message}")


def differing(text: str) -> list[int]:
    """The processes whose text is not that of process 0."""
    if jax.process_count() == 1:
        return []
    told = _told_by_everyone(text)
    return [process for process, other in enumerate(told) if other != told[0]]


def _told_by_everyone(text: str) -> list[str]:
    message = np.zeros(_MESSAGE_BYTES, np.uint8)
    encoded = np.frombuffer(text.encode()[:_MESSAGE_BYTES], np.uint8)
    message[: len(encoded)] = encoded
    rows = np.asarray(multihost_utils.process_allgather(message)).reshape(-1, _MESSAGE_BYTES)
    return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in rows]
