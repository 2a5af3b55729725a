"""Feed: a stream of global device batches for training, decoded as they come or kept decoded on the host or the
device; it counts the samples that could not be read."""

import itertools
import logging
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from regvit_jax import sharding
from regvit_jax.data.loader import decoded, replaced_index, train_batches
from regvit_jax.data.order import Order
from regvit_jax.data.sources import Source
from regvit_jax.data.transforms import TrainTransform
from regvit_jax.trees import Array

Batch = dict[str, Array]

_NAMED = 5  # bad files in an error message


def feed(
    source: Source,
    transform: TrainTransform,
    mesh: Mesh,
    *,
    fields: tuple[str, ...],
    seed: int,
    batch_size: int,
    start_step: int,
    stop_step: int,
    workers: int = 0,
    cache: str = "none",
    max_bad: float = 1.0,
    key: str = "--config.data.max_bad",
) -> "Feed":
    """Batches of steps start_step … stop_step - 1, axis 0 over data x fsdp.

    Args:
      fields: what of the samples the step takes ("image", "label"); empty: all that the transform gives.
      cache: "none" decodes every image every time; "host" and "device" decode the whole set once and keep it (uint8) in
        the memory of every host or device. The batches are the same, those with replaced samples too.
      max_bad: share of replaced samples past which there is an error, see `Feed`; 1: any share is taken.
      key: what a user calls `max_bad`, for the message of that error.
    """
    args = {"seed": seed, "batch_size": batch_size, "start_step": start_step, "stop_step": stop_step}
    if cache == "none":
        stream = _decode_each(source, transform, mesh, fields, workers, args)
    else:
        arrays, readable = decoded(source, transform)
        arrays = {name: arrays[name] for name in fields or arrays}
        size = sum(a.nbytes for a in arrays.values()) / 2**20
        logging.info("data: %d decoded samples (%.0f MiB) kept on the %s", readable.sum(), size, cache)
        stream = _from_memory(arrays, readable, mesh, cache == "device", args)
    return Feed(stream, source, Order(len(source), seed), batch_size, start_step, max_bad, key)


def feed_rows(
    arrays: Mapping[str, np.ndarray], mesh: Mesh, *, seed: int, batch_size: int, start_step: int, stop_step: int
) -> "Feed":
    """As `feed`, of samples that are NumPy arrays already, (N, …) each, alike on every process; they may be on disk,
    mapped into memory."""
    args = {"seed": seed, "batch_size": batch_size, "start_step": start_step, "stop_step": stop_step}
    n = len(next(iter(arrays.values())))
    stream = _from_memory(arrays, np.ones(n, bool), mesh, False, args)
    return Feed(stream, None, Order(n, seed), batch_size, start_step, 1.0)


class Feed:
    """An iterator over batches. Its close() stops workers.

    A sample that cannot be read is replaced by the next of the order, up to a share `max_bad` of all samples for every
    pass that was begun since the start: a few bad files in the first batch of a pass are no reason to stop, and at its
    end the share is the true one. A process that is alone sees at once that there are too many, several processes when
    they ask together.

    Raises:
      ValueError: by `next` or `replaced`, when more are replaced; it names some, the share and the key.
    """

    def __init__(
        self,
        stream: Iterator,
        source: Source | None,
        order: Order,
        batch_size: int,
        start_step: int,
        max_bad: float,
        key: str = "--config.data.max_bad",
    ):
        self.stream, self.source, self.order, self.batch_size = stream, source, order, batch_size
        self.max_bad, self.key = max_bad, key
        self.start_step = self.step = start_step
        self.own = self.told = 0
        self.bad: dict[int, None] = {}

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> Batch:
        batch, replaced_b = next(self.stream)
        rows = np.flatnonzero(replaced_b)
        if rows.size:
            self.own += len(rows)
            first = self.step * self.batch_size + jax.process_index() * len(replaced_b)
            if len(self.bad) < _NAMED:
                self.bad |= dict.fromkeys(self.order.index(first + rows).tolist())
        self.step += 1
        if rows.size and jax.process_count() == 1:
            self._check(self.own)
        return batch

    def close(self) -> None:
        self.stream.close()

    def replaced(self) -> int:
        """Samples replaced since the start, over all processes, which must make this call after the same step; it
        waits for the others, so ask when something is logged, not every step."""
        count = self.own
        if jax.process_count() > 1:
            count = int(multihost_utils.process_allgather(np.array(self.own, np.int32)).sum())
            self._check(count)
        if count > self.told:
            logging.warning("data: %d unreadable samples were replaced so far", count)
            self.told = count
        return count

    def _check(self, count):
        n, first, last = self.order.n, self.start_step * self.batch_size, self.step * self.batch_size - 1
        passes = last // n - first // n + 1
        share = count / (passes * n) if count else 0.0
        if share <= self.max_bad:
            return
        names = ", ".join(self.source.name(index) for index in itertools.islice(self.bad, _NAMED))
        raise ValueError(
            f"{count} training samples could not be read and were replaced by others: {100 * share:.3g} % of "
            f"{passes} x {n}, more than {self.key}={self.max_bad:g} allows. Among them: "
            f"{names or 'those that other processes name'}. Repair or remove the files, or raise {self.key}"
        )


def _decode_each(source, transform, mesh, fields, workers, args):
    """(global batch, int32 1 where a row of this process is a replacement) of each step."""
    batches = train_batches(
        source, transform, workers=workers, process_index=jax.process_index(), process_count=jax.process_count(), **args
    )
    try:
        for batch in batches:
            replaced_b = batch.pop("replaced_b")
            yield sharding.put({name: batch[name] for name in fields or batch}, mesh), replaced_b
    finally:
        if hasattr(batches, "close"):
            batches.close()


def _from_memory(arrays, readable_n, mesh, on_device, args):
    """As `_decode_each`, of the decoded samples (N, …)."""
    order, batch_size = Order(len(readable_n), args["seed"]), args["batch_size"]
    local = batch_size // jax.process_count()
    rows = np.arange(local) + jax.process_index() * local
    if on_device:
        arrays = sharding.replicate(arrays, mesh)
        where = sharding.batch_sharding(mesh)
        take = jax.jit(lambda arrays, index: {name: a[index] for name, a in arrays.items()}, out_shardings=where)
    for step in range(args["start_step"], args["stop_step"]):
        index, replaced_b = replaced_index(order, step * batch_size + rows, readable_n)
        if on_device:
            batch = take(arrays, sharding.put({"index": index.astype(np.int32)}, mesh)["index"])
        else:
            batch = sharding.put({name: a[index] for name, a in arrays.items()}, mesh)
        yield batch, replaced_b
