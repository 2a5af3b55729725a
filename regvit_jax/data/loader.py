"""Loader: batches of NumPy arrays in an order that is a pure function of (seed, position), for training and for
evaluation.

Row j of step s is position p = s * batch_size + j; the sample there is `Order(n, seed).index(p)` and its randomness
`np.random.default_rng((seed, p))`. So a run resumes from its step alone, on any number of hosts and workers.
Grain does the threads and processes. Each of its elements is one whole batch, so that worker processes hand over few
large arrays.
"""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from regvit_jax.data.decode import DecodeError
from regvit_jax.data.order import Order
from regvit_jax.data.sources import Source
from regvit_jax.data.workers import Batch, iterate

Transform = Callable[[Mapping[str, Any], np.random.Generator], Batch]

# So many unreadable samples in a row are no accident: the disk is gone, or none of the files is an image.
MAX_REPLACEMENTS = 100
# Unreadable samples that a process names in its log; it counts the others.
MAX_NAMED = 20
_ENDLESS = 2**40
# What a source or a transform raises for a sample that is broken or gone; anything else is a mistake of the program.
_UNREADABLE = (DecodeError, OSError)

_log = logging.getLogger(__name__)


def train_batches(
    source: Source,
    transform: Transform,
    *,
    seed: int,
    batch_size: int,
    start_step: int,
    stop_step: int | None = None,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    shuffle: bool = True,
) -> Iterator[Batch]:
    """This process's rows of the batches of steps start_step, start_step + 1, … (before `stop_step`, or without end).

    A sample that cannot be read is replaced by the next readable one of the same permutation, its position and
    randomness unchanged, and is named once in a warning (the first MAX_NAMED of each process are).

    Args:
      transform: sample -> arrays of fixed shapes.
      batch_size: of all processes together; process i yields rows [i, i+1) * batch_size / process_count.
      workers: processes that decode; 0 uses a few threads of this one. They are spawned: the main module of the program
        must be importable without side effects (`if __name__ == "__main__":`), source and transform must be picklable.
      shuffle: False keeps the order of the source, pass after pass.

    Returns:
      A generator of dicts: what the transform gives, stacked on axis 0, and "replaced_b" int32 (1: this row is a
      replacement). Its close() stops threads and workers; so does the end of a loop over it that breaks.

    Raises:
      ValueError: at once for an empty source, a negative seed or a batch that does not divide over the processes; later
        when MAX_REPLACEMENTS samples in a row, or all, cannot be read.
    """
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    if stop_step is not None and not 0 <= start_step <= stop_step:
        raise ValueError(f"cannot go from step {start_step} to {stop_step}")
    rows = _local_rows(batch_size, process_index, process_count)
    steps = (_ENDLESS if stop_step is None else stop_step) - start_step
    return iterate(
        _TrainBatches(source, transform, seed, batch_size, start_step, steps, rows, _order(source, seed), shuffle),
        workers,
    )


def eval_batches(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """This process's rows of ceil(n / batch_size) full batches, in the order of the source: every process gets as many.

    A sample that cannot be read is left out and named in a warning: what measures must count what it got.

    Returns:
      A generator of dicts: what the transform gives, stacked on axis 0, "index" int64 (the sample's place in the
      source) and "valid_b" bool. Rows past the end and rows of unreadable samples are zeros with index -1 and valid_b
      False.

    Raises:
      ValueError: at once for an empty source or a batch that does not divide over the processes; later when none of the
        first MAX_REPLACEMENTS samples can be read.
    """
    _order(source, 0)
    rows = _local_rows(batch_size, process_index, process_count)
    return iterate(_EvalBatches(source, transform, batch_size, rows), workers)


def decoded(source: Source, transform: Transform) -> tuple[Batch, np.ndarray]:
    """The whole source for caches in memory; `transform` must use no randomness.

    Returns:
      (arrays (N, …) in the order of the source, bool (N,): which could be read; rows of the others are zeros).

    Raises:
      ValueError: for an empty source, or one of which no sample can be read.
    """
    _order(source, 0)
    named: dict = {}
    samples = [_sample_or_none(source, index, transform, _NoRandomness(), named) for index in range(len(source))]
    readable = np.array([sample is not None for sample in samples])
    if not readable.any():
        raise ValueError(f"none of the {len(source)} samples can be read: {source.name(0)} and all others")
    blank = _zeros(samples[int(readable.argmax())])
    return _stack([blank if sample is None else sample for sample in samples]), readable


def replaced_index(order: Order, positions: np.ndarray, readable_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `train_batches` reads at `positions` when `readable_n` says which samples can be read.

    Returns:
      (index int64 of the samples, int32 1 where it is a replacement), both of the shape of `positions`.

    Raises:
      ValueError: when MAX_REPLACEMENTS samples in a row, or all, cannot be read.
    """
    index = order.index(positions)
    replaced = ~readable_n[index]
    for row in np.flatnonzero(replaced):
        good = (other for other in _following(order, int(positions[row])) if readable_n[other])
        index[row] = next(good, -1)
        if index[row] < 0:
            raise ValueError(f"{min(order.n, MAX_REPLACEMENTS)} samples in a row cannot be read: the log names some")
    return index, replaced.astype(np.int32)


def _following(order, position, shuffle=True):
    """Indices that may replace the sample of a position, the nearest first: the next ones of its epoch, then its first
    ones."""
    n = order.n
    for ahead in range(1, min(n, MAX_REPLACEMENTS)):
        place = position - position % n + (position + ahead) % n
        yield order.index(place) if shuffle else place % n


@dataclasses.dataclass(frozen=True)
class _TrainBatches:
    """Element k is the local batch of step start_step + k. Picklable: it travels to the workers."""

    source: Source
    transform: Transform
    seed: int
    batch_size: int
    start_step: int
    steps: int
    rows: range
    order: Order
    shuffle: bool
    named: dict = dataclasses.field(default_factory=dict)

    def __len__(self):
        return self.steps

    def __getitem__(self, k):
        first = (self.start_step + k) * self.batch_size
        positions = np.arange(first + self.rows.start, first + self.rows.stop)
        indices = self.order.index(positions) if self.shuffle else positions % self.order.n
        samples = [self._readable(int(p), int(index)) for p, index in zip(positions, indices, strict=True)]
        return _stack(samples)

    def _readable(self, position, index):
        """The sample of this position, or the next of its epoch that can be read."""
        tries = 0
        for candidate in itertools.chain([index], _following(self.order, position, self.shuffle)):
            try:
                sample = _sample(self.source, candidate, self.transform, np.random.default_rng((self.seed, position)))
            except _UNREADABLE as error:
                _name(self.named, self.source, candidate, "is replaced by the next one", error)
                last, failure, tries = candidate, error, tries + 1
            else:
                return {**sample, "replaced_b": np.int32(tries > 0)}
        raise ValueError(
            f"{tries} samples in a row cannot be read, the last is {self.source.name(last)}: {failure}"
        ) from failure


@dataclasses.dataclass(frozen=True)
class _EvalBatches:
    """Element k is the local part of batch k. Picklable: it travels to the workers."""

    source: Source
    transform: Transform
    batch_size: int
    rows: range
    named: dict = dataclasses.field(default_factory=dict)

    def __len__(self):
        return -(-len(self.source) // self.batch_size)

    def __getitem__(self, k):
        n = len(self.source)
        indices = np.arange(k * self.batch_size + self.rows.start, k * self.batch_size + self.rows.stop)
        samples = [self._read(index) if index < n else None for index in indices.tolist()]
        valid = np.array([sample is not None for sample in samples])
        # A process may have nothing but padding or broken files in a batch: its shapes are then those of another one.
        blank = _zeros(next((sample for sample in samples if sample is not None), None) or self._any())
        batch = _stack([blank if sample is None else sample for sample in samples])
        return {**batch, "index": np.where(valid, indices, -1), "valid_b": valid}

    def _read(self, index):
        return _sample_or_none(self.source, index, self.transform, np.random.default_rng((0, index)), self.named)

    def _any(self):
        """The first sample that can be read."""
        tries = min(len(self.source), MAX_REPLACEMENTS)
        sample = next((sample for sample in map(self._read, range(tries)) if sample is not None), None)
        if sample is None:
            raise ValueError(f"none of the first {tries} samples can be read: {self.source.name(0)} and those after it")
        return sample


class _NoRandomness:
    """Stands for the generator where there must be none."""

    def __getattr__(self, name):
        raise ValueError(f"this needs a transform without randomness (such as EvalTransform); it asked for rng.{name}")


def _sample(source, index, transform, rng):
    try:
        return transform(source[index], rng)
    except Exception as error:
        error.add_note(f"while reading sample {source.name(index)}")
        raise


def _sample_or_none(source, index, transform, rng, named):
    try:
        return _sample(source, index, transform, rng)
    except _UNREADABLE as error:
        _name(named, source, index, "cannot be read and is left out", error)
        return None


def _name(named, source, index, fate, error):
    """Tells of a bad sample once, and of the first MAX_NAMED only: a log of a million lines helps nobody."""
    mine = object()
    # Threads share the dict; each of its calls here is atomic.
    if named.setdefault(index, mine) is not mine or len(named) > 10 * MAX_NAMED:
        return
    place = list(named).index(index)
    if place < MAX_NAMED:
        _log.warning("sample %s %s: %s", source.name(index), fate, error)
    elif place == MAX_NAMED:
        _log.warning("further unreadable samples are counted, not named")


def _zeros(sample):
    return {name: np.zeros_like(value) for name, value in sample.items()}


def _stack(samples):
    first = samples[0]
    for sample in samples:
        for name in first.keys() | sample.keys():
            shapes = [np.shape(fields[name]) if name in fields else "missing" for fields in (first, sample)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"the samples of a batch must have the same fields: {name!r} is {shapes[0]} in one and "
                    f"{shapes[1]} in another"
                )
    return {name: np.stack([sample[name] for sample in samples]) for name in first}


def _order(source, seed):
    if len(source) == 0:
        raise ValueError("the data source has no samples")
    return Order(len(source), seed)


def _local_rows(batch_size, process_index, process_count):
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size={batch_size} must be a positive multiple of the number of processes, {process_count}"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} of {process_count} processes")
    local = batch_size // process_count
    return range(process_index * local, (process_index + 1) * local)
