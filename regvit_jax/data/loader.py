"""Loader: batches of NumPy arrays in an order that is a pure function of (seed, position), for training and for
evaluation.

Row j of step s is position p = s * batch_size + j; the sample there is `Order(n, seed).index(p)` and its randomness
`np.random.default_rng((seed, p))`. So a run resumes from its step alone, on any number of hosts and workers.
Grain does the threads and processes. Each of its elements is one whole batch, so that worker processes hand over few
large arrays.
"""

import atexit
import contextlib
import dataclasses
import functools
import gc
import logging
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from regvit_jax.data.order import Order
from regvit_jax.data.sources import Source
from regvit_jax.data.transforms import DecodeError

Batch = dict[str, np.ndarray]
Transform = Callable[[Mapping[str, Any], np.random.Generator], Batch]

# So many unreadable samples in a row are no accident: the disk is gone, or none of the files is an image.
MAX_REPLACEMENTS = 100
_ENDLESS = 2**40
# What a worker that was sent SIGTERM leaves the run to end in order.
_GRACE_SECONDS = 60

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
    randomness unchanged, and is named once in a warning.

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
    return _iterate(
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

    Returns:
      A generator of dicts: what the transform gives, stacked on axis 0, "index" int64 (the sample's place in the
      source) and "valid_b" bool. Rows past the end are zeros with index -1 and valid_b False.

    Raises:
      ValueError: for an empty source or a batch that does not divide over the processes; DecodeError, naming the file,
        for a sample that cannot be read: a number measured on fewer images would not be the one that was asked for.
    """
    _order(source, 0)
    rows = _local_rows(batch_size, process_index, process_count)
    return _iterate(_EvalBatches(source, transform, batch_size, rows), workers)


def decoded(source: Source, transform: Transform) -> Batch:
    """The whole source as arrays (N, …) in its order, for caches in memory; `transform` must use no randomness."""
    _order(source, 0)
    return _stack([_sample(source, index, transform, _NoRandomness()) for index in range(len(source))])


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
    warned: set = dataclasses.field(default_factory=set)

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
        n = self.order.n
        tries = min(n, MAX_REPLACEMENTS)
        for attempt in range(tries):
            if attempt:
                following = position - position % n + (position % n + attempt) % n
                index = self.order.index(following) if self.shuffle else following % n
            try:
                sample = _sample(self.source, index, self.transform, np.random.default_rng((self.seed, position)))
            except (DecodeError, OSError) as error:
                if index not in self.warned:
                    self.warned.add(index)
                    _log.warning("sample %s is replaced by the next one: %s", self.source.name(index), error)
                failure = error
            else:
                return {**sample, "replaced_b": np.int32(attempt > 0)}
        raise ValueError(
            f"{tries} samples in a row cannot be read, the last is {self.source.name(index)}: {failure}"
        ) from failure


@dataclasses.dataclass(frozen=True)
class _EvalBatches:
    """Element k is the local part of batch k. Picklable: it travels to the workers."""

    source: Source
    transform: Transform
    batch_size: int
    rows: range

    def __len__(self):
        return -(-len(self.source) // self.batch_size)

    def __getitem__(self, k):
        n = len(self.source)
        indices = np.arange(k * self.batch_size + self.rows.start, k * self.batch_size + self.rows.stop)
        valid = indices < n
        samples = [self._read(index) for index in indices[valid].tolist()]
        # A process may have nothing but padding in the last batch: its shapes are then those of the first sample.
        blank = {name: np.zeros_like(value) for name, value in (samples[0] if samples else self._read(0)).items()}
        batch = _stack(samples + [blank] * int((~valid).sum()))
        return {**batch, "index": np.where(valid, indices, -1), "valid_b": valid}

    def _read(self, index):
        try:
            return _sample(self.source, index, self.transform, np.random.default_rng((0, index)))
        except DecodeError as error:
            raise DecodeError(
                f"sample {self.source.name(index)} cannot be read, repair or remove it: {error}"
            ) from error


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


def _iterate(batches, workers):
    if workers < 0:
        raise ValueError(f"workers must be 0 or more, got {workers}")
    if len(batches) == 0:
        return iter(())
    generator = _grain(batches, workers)
    _running.add(generator)
    return generator


def _grain(batches, workers):
    # Grain imports jax, which the rest of this module has no use for.
    import grain
    from absl import flags

    # Grain reads its flags when it starts workers, which fails in programs that did not start through absl.app.run.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    # Threads and buffers count whole batches: Grain's defaults would keep 500 of them.
    threads = 1 if workers else min(4, os.cpu_count() or 1)
    dataset = grain.MapDataset.source(batches).to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    )
    if workers:
        processes = min(workers, len(batches))
        options = grain.MultiprocessingOptions(num_workers=processes, per_worker_buffer_size=1)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_follow_the_parent)
    _close_at_exit()
    iterator = iter(dataset)
    try:
        for batch in iterator:
            # Batches of workers lie in shared memory, which JAX on a CPU would keep hold of to the end of the program.
            yield {name: np.array(array) for name, array in batch.items()} if workers else batch
    finally:
        iterator.close()
        # The last batch of each worker hangs in a cycle of references; left there, Python complains of it at its end.
        del iterator, dataset
        batch = None
        gc.collect()


def _follow_the_parent(index, count):
    """Runs in a worker: it ends when the run ends, neither before nor after.

    A terminal sends Ctrl-C to workers too, a scheduler SIGTERM; the run then finishes its step, saves, and may need a
    batch for that. And a run that was killed outright tells nobody: its workers would wait for it forever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: _later(_GRACE_SECONDS))
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent):
    parent.join()
    os._exit(1)


def _later(seconds):
    timer = threading.Timer(seconds, os._exit, (1,))
    timer.daemon = True
    timer.start()


# A generator that lives until Python exits (a variable of a notebook) would be closed too late to stop its workers in
# order.
_running: weakref.WeakSet = weakref.WeakSet()


@functools.cache
def _close_at_exit():
    """Called after Grain is imported: what is registered last runs first, so before multiprocessing ends workers."""
    atexit.register(_close_all)


def _close_all():
    for generator in list(_running):
        # One that a thread is inside of cannot be closed from here; the end of the process ends it.
        with contextlib.suppress(ValueError):
            generator.close()
