"""The loop that trains a head on a frozen network: segmentation, depth and the grid of linear classifiers share it.

    head = train_head(model, open_feed, features=…, init_head=…, loss=…, tx=optax.sgd(0.1), steps=1000, batch_size=16,
                      seed=0, mesh=mesh, label="linear probe")

The features are computed in the same compiled step as the head's update, so that every step may see new crops. The
order of samples is a function of seed and step: a fit that was stopped goes on with the same numbers.
"""

import functools
import logging
import math
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from regvit_jax import sharding, stopping
from regvit_jax.data.feed import Feed
from regvit_jax.evals.feature_cache import counted
from regvit_jax.evals.features import multiple_of, place
from regvit_jax.evals.saved import Saved
from regvit_jax.metrics import Delayed, duration
from regvit_jax.models.model import Model
from regvit_jax.trees import Array, Tree

# Of a head, a dict, what lies under this key is no parameter: running statistics, which `loss` hands on.
STATISTICS = "statistics"

_SECONDS_BETWEEN_LINES = 30.0
_STEPS_BETWEEN_COUNTS = 1000  # of replaced samples over all processes, which waits for them

_log = logging.getLogger(__name__)

Loss = Callable[[Tree, Array, Mapping[str, Array], Array], tuple[Array, Tree]]


def train_head(
    model: Model | None,
    open_feed: Callable[[int, int], Feed],
    *,
    features: Callable[[Model | None, Mapping[str, Array]], Array],
    init_head: Callable[[Array], Tree],
    loss: Loss,
    tx: optax.GradientTransformation,
    steps: int,
    batch_size: int,
    seed: int,
    mesh: Mesh,
    label: str,
    source_spec: str = "",
    saved: Saved | None = None,
) -> Tree:
    """A head trained on the features of a frozen network. All processes make this call; each gets the same head.

    `features`, `loss` and `tx` are parts of a compiled step, which is found again if they are equal to those of an
    earlier call: frozen dataclasses with `__call__`, and a cached function that makes the optimiser.

    Args:
      model: the network; None where `features` needs none.
      open_feed: (first step, rows of a batch) -> the batches from that step on, up to `steps`.
      features: (model, batch) -> (B, …) float32; no gradient reaches the model.
      init_head: key -> the head, a dict of float32 arrays; under `STATISTICS` what is not trained.
      loss: (head, features, batch, step from 0) -> (scalar, the head with new statistics). The batch is that of all
        devices; a mean over it is one over all.
      tx: updates everything but the statistics.
      batch_size: over all devices. Where the mesh does not divide it, a batch has more rows, which count for nothing.
      seed: of the head.
      label: what the log calls it.
      source_spec: the string of the source, under which results.json counts unreadable samples; empty: none are.
      saved: where the state is kept, and whence it goes on; it stays when the fit is done. None: nowhere.

    Returns:
      The head, replicated over the mesh.

    Raises:
      ValueError: if the loss is not finite, or more samples are unreadable than the feed allows.
    """
    model = place(model, mesh)
    rows = multiple_of(mesh, batch_size)
    if rows != batch_size:
        _log.info("%s: a batch of %d does not divide over the mesh: %d rows fill it", label, batch_size, rows)
    delayed, replaced = Delayed(), 0
    with jax.set_mesh(mesh):
        first, state = _first_state(init_head, tx, seed, mesh, saved)
        if first:
            _log.info("%s: goes on after step %d of %d, found in %s", label, first, steps, saved.path)
        start = line = time.monotonic()
        stream = open_feed(first, rows)
        try:
            for step, batch in enumerate(stream, first):
                _poll(saved, step, state)
                state, scalars = _update(model, state, batch, np.int32(step), features, loss, tx, batch_size)
                _check(delayed.push(step, scalars), label)
                now = time.monotonic()
                if now - line > _SECONDS_BETWEEN_LINES and delayed.recent:
                    line, speed = now, (step + 1 - first) / (now - start)
                    _log.info(
                        "%s: step %d of %d, loss %.4f, %.0f img/s, %s left",
                        *(label, step + 1, steps, delayed.recent[-1][1]["loss"], speed * batch_size),
                        duration((steps - step - 1) / speed),
                    )
                if step + 1 == steps or (step + 1) % _STEPS_BETWEEN_COUNTS == 0:
                    replaced = stream.replaced()
                if saved is not None and (saved.due(step + 1) or step + 1 == steps):
                    _check(delayed.flush(), label)  # A state that is not finite is not worth keeping.
                    saved.save(step + 1, state)
            _check(delayed.flush(), label)
        finally:
            stream.close()
    if source_spec:
        passes = max(1, -(-(steps - first) * rows // stream.order.n))
        counted()[source_spec] = -(-replaced // passes)
    _log.info("%s: %d steps of %d in %s", label, steps - first, batch_size, duration(time.monotonic() - start))
    return state[0]


def _first_state(init_head, tx, seed, mesh, saved):
    """(finished steps, (head, optimiser state) on the mesh)."""
    whole = sharding.replicated(mesh)
    head = sharding.jit_once(init_head, out_shardings=whole)(jax.random.key(seed))
    state = head, sharding.jit_once(tx.init, out_shardings=whole)(_trained(head))
    found = None if saved is None else saved.load(state)
    return (0, state) if found is None else (found[0], sharding.replicate(found[1], mesh))


def _poll(saved, step, state):
    """`stopping.poll`, with what is done so far saved first."""
    try:
        stopping.poll()
    except stopping.Stopped:
        if saved is not None:
            saved.save(step, state)
        raise


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7), donate_argnums=1)
def _update(model, state, batch, step, features, loss, tx, batch_size):
    """((head, optimiser state), {"loss"}) after one step. The model is an argument: as a constant it would be compiled
    in."""
    head, opt = state
    inputs = jax.lax.stop_gradient(features(model, batch))
    if inputs.shape[0] != batch_size:
        inputs, batch = jax.tree.map(lambda x: sharding.constrain(x[:batch_size]), (inputs, batch))
    else:
        inputs = sharding.constrain(inputs, sharding.BATCH)

    def objective(trained):
        return loss(head | trained, inputs, batch, step)

    (value, head), grads = jax.value_and_grad(objective, has_aux=True)(_trained(head))
    updates, opt = tx.update(grads, opt, _trained(head))
    head = head | optax.apply_updates(_trained(head), updates)
    (head, opt, value) = jax.tree.map(sharding.constrain, (head, opt, value))
    return (head, opt), {"loss": value}


def _trained(head):
    return {name: part for name, part in head.items() if name != STATISTICS}


def _check(measured, label):
    if measured is None or math.isfinite(measured[1]["loss"]):
        return
    step, values = measured
    raise ValueError(
        f"{label}: the loss is {values['loss']} at step {step}: lower its lr or lengthen its warm-up; if it is so from "
        f"the first step on, the features are not finite (diverged weights, too narrow a dtype) or the labels are wrong"
    )
