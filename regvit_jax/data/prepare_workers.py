"""The worker processes of `regvit data prepare`: progress, stopping, and what happens when one of them dies."""

import concurrent.futures
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence

from tqdm import tqdm

from regvit_jax.data import prepare_shard
from regvit_jax.data.prepare_shard import Progress

_log = logging.getLogger(__name__)


class Unfinished(RuntimeError):
    """Preparation stopped; the message says why and what to do. Finished shards are kept.

    `left_out`: [[split, name, reason], …] of the images that could not be read so far.
    """

    def __init__(self, message: str, left_out: Sequence = ()):
        super().__init__(message)
        self.left_out = list(left_out)


def write(parts, todo, settings, workers, max_bad):
    """{path of a shard: its note} of all shards, {split: [Shard]}; what is finished is not written again.

    Raises:
      Unfinished: see `prepare`.
    """
    every = [shard for shards in todo.values() for shard in shards]
    notes = {shard.path: json.loads(shard.note.read_text()) for shard in every if shard.finished}
    left_out = [[shard.split, *row] for shard in every if shard.path in notes for row in notes[shard.path]["bad"]]
    waiting = [shard for shard in every if shard.path not in notes]
    total = sum(len(part) for part in parts.values())
    kept = total - sum(shard.stop - shard.start for shard in waiting)
    if kept:
        _log.info("%d of %d shards are there already", len(notes), len(every))
    context = multiprocessing.get_context("spawn")  # a fork of a process that runs JAX can hang
    progress = Progress(context.Value("q", kept), context.Value("q", len(left_out)), context.Value("b", 0))
    job = (parts, settings, progress)
    if workers:
        pool = concurrent.futures.ProcessPoolExecutor(min(workers, len(waiting) or 1), context, _start, (*job, True))
    else:
        pool = concurrent.futures.ThreadPoolExecutor(1, initializer=_start, initargs=(*job, False))
    interval = 0.5 if sys.stderr.isatty() else 10.0
    with pool, tqdm(total=total, initial=kept, desc="prepare", unit=" images", mininterval=interval) as bar:
        running = {pool.submit(_one, shard): shard for shard in waiting}
        try:
            while running:
                finished, _ = concurrent.futures.wait(running, 0.2, concurrent.futures.FIRST_COMPLETED)
                bar.update(progress.done.value - bar.n)
                for future in finished:
                    shard = running.pop(future)
                    note, bad = future.result()
                    left_out += [[shard.split, *row] for row in bad]
                    if note is not None:
                        notes[shard.path] = note
                if progress.bad.value > max_bad * total and not progress.stop.value:
                    progress.stop.value = 1
                    for future in [future for future in running if future.cancel()]:
                        del running[future]
        except concurrent.futures.process.BrokenProcessPool as error:
            raise Unfinished("a worker process died (killed, or out of memory); finished shards are kept") from error
        except (OSError, RuntimeError) as error:
            raise Unfinished(f"a shard cannot be written, finished ones are kept: {error}") from error
        finally:
            progress.stop.value = 1
            pool.shutdown(wait=True, cancel_futures=True)
    if progress.bad.value > max_bad * total:
        raise Unfinished(_too_many(left_out, total, max_bad), left_out)
    return notes


def _too_many(left_out, total, max_bad):
    first = "; ".join(reason for _, _, reason in left_out[:3])
    return (
        f"{len(left_out)} of {total} images cannot be read so far, more than max_bad = {max_bad:g} allows ({first}). "
        f"report.json names them: repair or remove them, or allow more by --max_bad"
    )


# What a worker knows: set once when it starts, so that a list of a million files travels once.
_job = None


def _start(parts, settings, progress, process):
    global _job
    _job = parts, settings, progress
    if process:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches workers too; the main process tells them to stop
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def _one(shard):
    parts, settings, progress = _job
    return prepare_shard.write(parts[shard.split], shard, settings, progress)
