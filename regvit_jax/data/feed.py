"""Feed: a stream of global device batches for training, decoded as they come or kept decoded on the host or the
device."""

import logging
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from regvit_jax import sharding
from regvit_jax.data.loader import decoded, train_batches
from regvit_jax.data.order import Order
from regvit_jax.data.sources import Source
from regvit_jax.data.transforms import TrainTransform
from regvit_jax.trees import Array

Batch = dict[str, Array]


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
) -> Iterator[Batch]:
    """Batches of steps start_step … stop_step - 1, axis 0 over data x fsdp.

    Args:
      fields: what of the samples the step takes ("image", "label").
      cache: "none" decodes every image every time; "host" and "device" decode the whole set once and keep it (uint8) in
        the memory of every host or device. The batches are the same.

    Returns:
      A generator; its close() stops workers.
    """
    args = {"seed": seed, "batch_size": batch_size, "start_step": start_step, "stop_step": stop_step}
    if cache == "none":
        return _decode_each(source, transform, mesh, fields, workers, args)
    arrays = decoded(source, transform)
    arrays = {name: arrays[name] for name in fields}
    size = sum(a.nbytes for a in arrays.values()) / 2**20
    logging.info("data: %d decoded samples (%.0f MiB) kept on the %s", len(source), size, cache)
    return _from_memory(arrays, len(source), mesh, cache == "device", args)


def _decode_each(source, transform, mesh, fields, workers, args) -> Iterator[Batch]:
    batches = train_batches(
        source, transform, workers=workers, process_index=jax.process_index(), process_count=jax.process_count(), **args
    )
    replaced = 0
    try:
        for batch in batches:
            bad = int(batch["replaced_b"].sum())
            replaced += bad
            if bad:
                logging.warning("data: %d unreadable samples were replaced so far", replaced)
            yield sharding.put({name: batch[name] for name in fields}, mesh)
    finally:
        if hasattr(batches, "close"):
            batches.close()


def _from_memory(arrays, n, mesh, on_device, args) -> Iterator[Batch]:
    order, batch_size = Order(n, args["seed"]), args["batch_size"]
    local = batch_size // jax.process_count()
    rows = np.arange(local) + jax.process_index() * local
    if on_device:
        arrays = sharding.replicate(arrays, mesh)
        where = sharding.batch_sharding(mesh)
        take = jax.jit(lambda arrays, index: {name: a[index] for name, a in arrays.items()}, out_shardings=where)
    for step in range(args["start_step"], args["stop_step"]):
        index = order.index(step * batch_size + rows)
        if on_device:
            yield take(arrays, sharding.put({"index": index.astype(np.int32)}, mesh)["index"])
        else:
            yield sharding.put({name: a[index] for name, a in arrays.items()}, mesh)
