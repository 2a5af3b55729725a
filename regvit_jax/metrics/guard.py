"""Reading metrics without stopping the device, and stopping the run when they are not finite."""

import math
from collections import deque
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from regvit_jax.trees import Array

_REMEMBERED = 5


class NonFiniteError(FloatingPointError):
    """A metric of a step is NaN or infinite."""


class Delayed:
    """Holds the metrics of one step until the next has been dispatched.

    The copy to the host starts at once and is waited for one step later, while the device already works on the next
    step; so every step can be checked and the loop never leaves the device idle.

    `recent`: the last few (step, metrics) that were handed out, oldest first; for `check_finite`.
    """

    def __init__(self) -> None:
        self._held: tuple[int, Mapping[str, Array]] | None = None
        self.recent: deque[tuple[int, dict[str, float]]] = deque(maxlen=_REMEMBERED)

    def push(self, step: int, metrics: Mapping[str, Array]) -> tuple[int, dict[str, float]] | None:
        """Takes the metrics of a step that was just dispatched (scalars, replicated), gives those of the one before.

        Returns:
          (step, {name: float}) of the previous push; None at the first.
        """
        for value in metrics.values():
            if isinstance(value, jax.Array):
                value.copy_to_host_async()
        previous = self.flush()
        self._held = (step, metrics)
        return previous

    def flush(self) -> tuple[int, dict[str, float]] | None:
        """What is held, waited for; None if nothing is. Before a save, before an evaluation, at the end of the run."""
        if self._held is None:
            return None
        step, metrics = self._held
        self._held = None
        read = {name: float(np.asarray(value)) for name, value in metrics.items()}
        self.recent.append((step, read))
        return step, read


def check_finite(
    step: int,
    metrics: Mapping[str, float],
    last_checkpoint: int | str | None = None,
    recent: Sequence[tuple[int, Mapping[str, float]]] = (),
    advice: str = "",
) -> None:
    """Stops the run at the first metric that is NaN or infinite.

    Args:
      step: the step that `metrics` belong to.
      metrics: host floats of one step, equal on every process, so that all of them stop together.
      last_checkpoint: what names the last good checkpoint, a step or a path; None if there is none.
      recent: (step, metrics) of steps before, for the message.
      advice: what else to try under this recipe.

    Raises:
      NonFiniteError: naming the step, the metrics, how they came about, the last checkpoint and what to try.
    """
    bad = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    if not bad:
        return
    lines = [f"step {step}: {', '.join(f'{name} is {value}' for name, value in bad.items())}"]
    if finite := [f"{name}={value:.4g}" for name, value in metrics.items() if name not in bad]:
        lines.append(f"the other metrics of this step: {', '.join(finite)}")
    for name in bad:
        if before := [f"{values[name]:.4g} (step {at})" for at, values in recent if at < step and name in values]:
            lines.append(f"{name} before: {', '.join(before)}")
    if last_checkpoint is None:
        lines.append("no checkpoint was saved before it: the run has to start again")
    else:
        named = f"step {last_checkpoint}" if isinstance(last_checkpoint, int) else last_checkpoint
        lines.append(f"last good checkpoint: {named}; the same command continues from there")
    lines.append(
        "the same config fails again at the same step: lower optim.lr, lengthen the warm-up, clip gradients harder, or "
        "rule out precision with dtype='float32'; if the first steps fail already, look at the images and labels"
    )
    raise NonFiniteError("\n  ".join([*lines, *([advice] if advice else [])]))
