"""Workers: the threads and processes that make batches ahead, through Grain; started again when they die, gone when the
run is."""

import atexit
import contextlib
import functools
import gc
import logging
import multiprocessing
import os
import re
import signal
import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence

import numpy as np

Batch = dict[str, np.ndarray]

# After so many deaths of workers, each within _SETTLED batches of the one before, the run ends.
MAX_DEATHS = 3
_SETTLED = 100
# How Grain tells of one.
_DEATH = re.compile(r"Worker process was terminated unexpectedly with exit code (-?\d+)")
# What a worker that was sent SIGTERM leaves the run to end in order.
_GRACE_SECONDS = 60
_log = logging.getLogger(__name__)


class WorkersDied(RuntimeError):
    """Data workers die as often as they are started."""


def iterate(batches: Sequence[Batch], workers: int) -> Iterator[Batch]:
    """The elements of `batches` in order, made ahead by threads of this process (workers = 0) or by processes.

    Returns:
      A generator; its close() stops threads and workers. `batches` must be picklable for processes.

    Raises:
      ValueError: for a negative number of workers; WorkersDied, later, when they die again and again.
    """
    if workers < 0:
        raise ValueError(f"workers must be 0 or more, got {workers}")
    if len(batches) == 0:
        return iter(())
    generator = _again_when_workers_die(batches, workers) if workers else _grain(batches, 0)
    _running.add(generator)
    return generator


def _again_when_workers_die(batches, workers):
    """What `_grain` yields. A batch is a function of its number alone: new workers go on where the dead ones were."""
    done = deaths = 0
    lived = 0  # batches at the last death
    while True:
        try:
            with contextlib.closing(_grain(batches, workers, done)) as stream:
                for batch in stream:
                    done += 1
                    yield batch
            return
        except RuntimeError as error:
            died = _DEATH.search(str(error))
            if died is None:
                raise
            deaths, lived = (deaths + 1 if done < lived + _SETTLED else 1), done
            how = f"exit code {died[1]}" + (", as when memory is full" if int(died[1]) == -signal.SIGKILL else "")
            if deaths > MAX_DEATHS:
                raise WorkersDied(
                    f"data workers died {deaths} times within {_SETTLED} batches, the last with {how}: lower "
                    "data.workers (each holds images and batches of its own) or set it to 0, and look for the reason "
                    "in the messages of the system; the same command goes on from the last checkpoint"
                ) from error
            _log.warning("a data worker died (%s): all are started again at batch %d of this process", how, done)


def _grain(batches, workers, start=0):
    # Grain imports jax, which the rest of this module has no use for.
    import grain
    from absl import flags

    # Grain reads its flags when it starts workers, which fails in programs that did not start through absl.app.run.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    # Threads and buffers count whole batches: Grain's defaults would keep 500 of them.
    threads = 1 if workers else min(4, os.cpu_count() or 1)
    dataset = grain.MapDataset.source(batches)[start:].to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    )
    if workers:
        processes = min(workers, len(batches) - start)
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
    # Of a broken file Pillow says much, in its own words; what matters of it is in our warning.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
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
