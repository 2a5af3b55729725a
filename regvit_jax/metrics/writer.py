"""Records of a run: metrics.jsonl, always, and TensorBoard events beside it."""

import contextlib
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np


class Writer:
    """Appends metrics to workdir/metrics.jsonl and workdir/events.*.

    A line is one object with "step" and what was measured then, written whole and flushed; floats have all their
    digits. NaN and infinities, which JSON lacks, are the strings "NaN", "Infinity", "-Infinity", which float() reads.
    Several lines may share a step (training, then evaluations). A last line that a kill left torn is cut on opening.

    Args:
      workdir: a local folder, created if missing.
      active: False on every process but the first: all calls do nothing.
    """

    def __init__(self, workdir, *, active: bool = True):
        self._active = active
        self._workdir = Path(workdir).expanduser().absolute()
        self._path = self._workdir / "metrics.jsonl"
        self._tensorboard = None
        self._tensorboard_missing = False
        self._purge_step: int | None = None
        self._file = None
        if active:
            if "://" in os.fspath(workdir):
                raise ValueError(f"metrics are appended line by line, which {workdir} cannot do: use a local workdir")
            self._workdir.mkdir(parents=True, exist_ok=True)
            _cut_torn_tail(self._path)
            self._file = self._path.open("a", encoding="utf-8")

    def truncate_after(self, step: int) -> None:
        """On resume from `step`: forgets later lines, so that the file reads as one run without interruption."""
        if not self._active:
            return
        self._file.close()
        lines = [line for line, record in _records(self._path) if record["step"] <= step]
        fresh = self._path.with_name(self._path.name + ".new")
        fresh.write_text("".join(lines), encoding="utf-8")
        os.replace(fresh, self._path)
        self._file = self._path.open("a", encoding="utf-8")
        self._purge_step = step + 1

    def names_at(self, step: int) -> set[str]:
        """Names of all metrics written for `step`: after a resume, they tell which evaluations of it were finished."""
        if not self._active:
            return set()
        here = [record for _, record in _records(self._path) if record["step"] == step]
        return {name for record in here for name in record if name != "step"}

    def write(self, step: int, metrics: Mapping[str, float], prefix: str = "") -> None:
        """One line, and one TensorBoard point a metric (float32 there).

        Args:
          step: finished updates.
          metrics: scalars: Python or NumPy numbers, or arrays of one element already on the host.
          prefix: put before every name, as "eval/knn/".

        Raises:
          ValueError: if a value is not a scalar, or is named "step".
          OSError: naming the file, if the disk is full or gone. What is torn then, the next start cuts.
        """
        if not self._active:
            return
        numbers = {prefix + name: _number(prefix + name, value) for name, value in metrics.items()}
        if "step" in numbers:
            raise ValueError("a metric may not be named 'step': every line has that key")
        record = {"step": int(step)} | {name: _json_value(value) for name, value in numbers.items()}
        try:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        for name, value in numbers.items():
            # Asked anew each time: its thread may die of any of them.
            if (board := self._board()) is not None:
                board.add_scalar(name, value, step)

    def image(self, name: str, step: int, image_hwc: np.ndarray) -> None:
        """A picture for TensorBoard: (H, W, 3) uint8, or float in 0 to 1."""
        board = self._board() if self._active else None
        if board is not None:
            board.add_image(name, np.asarray(image_hwc), step, dataformats="HWC")

    def close(self) -> None:
        """Flushes and closes both files. Twice does no harm."""
        if self._file is not None:
            # Closing writes again what could not be written; that was told.
            with contextlib.suppress(OSError):
                self._file.close()
        if self._tensorboard is not None:
            _close_board(self._tensorboard)
        self._tensorboard = None
        self._active = False

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _board(self):
        """The TensorBoard writer; made at the first point, when it is known from which step on old events are void."""
        if self._tensorboard is not None and not _is_alive(self._tensorboard):
            logging.warning("TensorBoard events end here, their file cannot be written; %s goes on", self._path)
            _close_board(self._tensorboard)
            self._tensorboard, self._tensorboard_missing = None, True
        if self._tensorboard is None and not self._tensorboard_missing:
            try:
                from tensorboardX import SummaryWriter

                # A queue without end: one that is full when its thread dies would be waited for forever.
                self._tensorboard = SummaryWriter(
                    str(self._workdir), purge_step=self._purge_step, max_queue=0, flush_secs=30
                )
            except (ImportError, OSError) as error:
                self._tensorboard_missing = True
                logging.warning("no TensorBoard events (%s); %s has everything", error, self._path)
        return self._tensorboard


def _is_alive(board) -> bool:
    """Whether the thread behind a TensorBoard writer runs; it dies of an event that it cannot write."""
    return board.file_writer.event_writer._worker.is_alive()


def _close_board(board) -> None:
    """Closes a TensorBoard writer, also one that cannot write: left open, it would try again when Python ends, or wait
    forever for its thread."""
    events = board.file_writer.event_writer
    try:
        if _is_alive(board):
            board.close()
            return
    except OSError:
        events._worker.stop()
    events._closed = True
    events._event_queue.cancel_join_thread()
    events._event_queue.close()


def _number(name: str, value) -> float | int:
    if np.ndim(value) != 0 and np.size(value) != 1:
        raise ValueError(f"metric {name!r} is not a scalar but of shape {np.shape(value)}")
    number = np.asarray(value).reshape(()).item()
    if not isinstance(number, int | float):
        raise ValueError(f"metric {name!r} is not a number: {value!r}")
    return number


def _json_value(value: float | int) -> float | int | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _cut_torn_tail(path: Path) -> None:
    """Drops what follows the last whole line, and whole last lines that are no records (a crash may leave zeros)."""
    if not path.exists():
        return
    content = path.read_bytes()
    kept = content[: content.rfind(b"\n") + 1]
    while kept and not _is_record(kept[kept.rfind(b"\n", 0, -1) + 1 :]):
        kept = kept[: kept.rfind(b"\n", 0, -1) + 1]
    if len(kept) < len(content):
        logging.warning("%s: cut %d bytes of a line that was not finished", path, len(content) - len(kept))
        os.truncate(path, len(kept))


def _is_record(line: bytes | str) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return isinstance(record, dict) and "step" in record


def _records(path: Path) -> list[tuple[str, dict]]:
    """Every (line, what it says)."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if not _is_record(line):
            raise ValueError(f"{path}, line {number} is no JSON object with a step: {line[:80]!r}; mend or delete it")
    return [(line, json.loads(line)) for line in lines]
