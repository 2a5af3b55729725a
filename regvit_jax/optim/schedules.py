"""Schedules of learning rate, decay, momentum or temperature: pure functions of the step, evaluated inside jit."""

import logging
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from regvit_jax.trees import Array

Schedule = Callable[[Any], Array]

# What is left of the way from `end` to `peak`, as a function of the progress t in [0, 1] after the warm-up.
SCHEDULES = {
    "cosine": lambda t: 0.5 * (1.0 + jnp.cos(jnp.pi * t)),
    "linear": lambda t: 1.0 - t,
    "constant": lambda t: jnp.ones_like(t),
}


def schedule(
    kind: str, peak: float, total_steps: int, warmup_steps: int, end: float = 0.0, start: float = 0.0
) -> Schedule:
    """A warm-up of `warmup_steps` steps from `start` to `peak`, then `kind` from `peak` towards `end`.

    With w = warmup_steps, T = total_steps and `step` the number of finished updates (the first update sees 0):

      step 0                 start (peak if w = 0)
      step 0 .. w-1          linspace(start, peak, w): both ends are reached, so the last warm-up step has `peak`
      step w                 peak
      step w .. T            with t = (step - w) / (T - w):
                             cosine end + (peak - end) (1 + cos(pi t)) / 2; linear peak + (end - peak) t
      step T-1 (the last)    one increment short of `end`
      step >= T              end
      constant               peak from step w-1 on; `end` is not used

    A ramp of (step + 1) / w is `start = peak / w`. A temperature that rises and stays is `constant` with a warm-up; a
    momentum that grows from m to 1 is `cosine` with peak = m, end = 1 and no warm-up.

    Returns:
      step (Python int or traced int32 scalar) -> float32 scalar.

    Raises:
      ValueError: if `kind` is unknown, total_steps < 1 or warmup_steps < 0. A warm-up longer than `total_steps` is
          clipped with a warning.

    Source: linspace warm-up and cosine as in DINOv2 and OpenCLIP training.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"unknown schedule {kind!r}: choose one of {', '.join(SCHEDULES)}")
    if total_steps < 1 or warmup_steps < 0:
        raise ValueError(f"need total_steps >= 1 and warmup_steps >= 0, got {total_steps} and {warmup_steps}")
    if warmup_steps > total_steps:
        logging.warning("a warm-up of %d steps is clipped to the %d steps of the run", warmup_steps, total_steps)
        warmup_steps = total_steps
    shape = SCHEDULES[kind]

    def value(step) -> Array:
        step = jnp.asarray(step).astype(jnp.float32)
        ramp = jnp.clip(step / max(warmup_steps - 1, 1), 0.0, 1.0)
        progress = jnp.clip((step - warmup_steps) / max(total_steps - warmup_steps, 1), 0.0, 1.0)
        remaining = shape(progress)
        # Both are written as weighted sums and not as start + slope * t: they are exact at either end.
        warming = start * (1.0 - ramp) + peak * ramp
        decaying = end * (1.0 - remaining) + peak * remaining
        return jnp.where(step < warmup_steps, warming, decaying).astype(jnp.float32)

    return value


def lr_schedule(config, total_steps: int) -> Schedule:
    """The learning rate that an `OptimConfig` (or config section with its fields) describes."""
    return schedule(config.schedule, config.lr, total_steps, config.warmup_steps, end=config.end_lr)
