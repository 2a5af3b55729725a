"""Speed of a run: images per second, MFU, waiting for input, time left; and the line that says so."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping

_WINDOW = 20  # ticks that the time left is estimated from: one slow interval must not swing it


class Clock:
    """Measures a training loop between one `tick` and the next.

    Make it right before the loop. Time inside `compiling()` and `paused()` counts for no rate, so an interval with an
    evaluation in it shows the same images per second as its neighbours. Call `tick(step)` when the results of `step`
    have been read: that it was dispatched says nothing.

        with clock.compiling():  compiled = step.lower(state, batch).compile()      or: the first call of the step
        with clock.waiting():    batch = next(batches)
        with clock.paused():     evaluate(...)

    Args:
      batch_size: images per step, over all devices.
      total_steps: where the run ends.
      start_step: finished updates at the start; not 0 in a resumed run.
      train_flops_per_image: forward and backward, without recomputation (flops.py); None if unknown.
      peak_flops: FLOP/s of one device at the dtype of the matmuls; None (a CPU, an unknown device) leaves `mfu` out.
      devices: how many, over all processes.
      device_hours: spent by earlier processes of this run.
      now: monotonic seconds.
    """

    def __init__(
        self,
        batch_size: int,
        total_steps: int,
        start_step: int = 0,
        train_flops_per_image: float | None = None,
        peak_flops: float | None = None,
        devices: int = 1,
        *,
        device_hours: float = 0.0,
        now: Callable[[], float] = time.perf_counter,
    ):
        self._batch_size, self._total_steps, self._start_step = batch_size, total_steps, start_step
        self._flops_per_image, self._peak_flops, self._devices = train_flops_per_image, peak_flops, devices
        self._earlier_hours, self._now = device_hours, now
        self._began = self._ticked = now()
        self._spent = {"waiting": 0.0, "paused": 0.0, "compiling": 0.0}  # seconds since the last tick
        self._measuring = False
        self._all_paused = 0.0
        self._active = 0.0  # seconds of training, without compilation and pauses
        self._history: deque[tuple[int, float]] = deque([(start_step, 0.0)], maxlen=_WINDOW + 1)

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """Around fetching the next batch: the share of time in here is `input_wait`."""
        return self._measure("waiting")

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Around evaluation and saving. Wait for the running step before (Delayed.flush), or it counts as pause."""
        return self._measure("paused")

    def compiling(self) -> contextlib.AbstractContextManager[None]:
        """Around the compilation of the step."""
        return self._measure("compiling")

    def tick(self, step: int) -> dict[str, float]:
        """The interval since the last tick, which ends with `step` (finished updates).

        Returns:
          images_per_s, images_per_s_device, s_per_step; input_wait (share of training time, 0 to 1); eta_s (seconds to
          total_steps, with the pauses this run usually makes); elapsed_s (this process); device_hours (the whole run);
          mfu (0 to 1) if FLOPs and peak are known; paused_s and compile_s of the interval if there was any.

        Raises:
          ValueError: if no step has passed since the last tick.
        """
        steps = step - self._history[-1][0]
        if steps <= 0:
            raise ValueError(f"tick({step}) after tick({self._history[-1][0]}): no step has passed")
        now = self._now()
        waited, paused, compiled = self._spent["waiting"], self._spent["paused"], self._spent["compiling"]
        active = max(now - self._ticked - paused - compiled, 1e-9)
        self._active += active
        self._all_paused += paused
        self._history.append((step, self._active))
        images_per_s = steps * self._batch_size / active
        elapsed = now - self._began
        metrics = {
            "images_per_s": images_per_s,
            "images_per_s_device": images_per_s / self._devices,
            "s_per_step": active / steps,
            "input_wait": min(waited / active, 1.0),
            "eta_s": self._eta(step),
            "elapsed_s": elapsed,
            "device_hours": self._earlier_hours + elapsed * self._devices / 3600,
        }
        if self._flops_per_image and self._peak_flops:
            metrics["mfu"] = images_per_s * self._flops_per_image / (self._peak_flops * self._devices)
        if paused:
            metrics["paused_s"] = paused
        if compiled:
            metrics["compile_s"] = compiled
        self._ticked = now
        self._spent = dict.fromkeys(self._spent, 0.0)
        return metrics

    def _eta(self, step: int) -> float:
        """Training at the recent rate, pauses at the rate of the whole run: few of them fall into a short window."""
        (first_step, first), (_, last) = self._history[0], self._history[-1]
        per_step = (last - first) / (step - first_step) + self._all_paused / (step - self._start_step)
        return max(self._total_steps - step, 0) * per_step

    @contextlib.contextmanager
    def _measure(self, what: str) -> Iterator[None]:
        if self._measuring:  # An evaluation waits for input and compiles too: all of it is the evaluation's pause.
            yield
            return
        self._measuring, began = True, self._now()
        try:
            yield
        finally:
            self._measuring = False
            self._spent[what] += self._now() - began


def duration(seconds: float) -> str:
    """12s, 3m20s, 1h02m, 2d03h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    hours = round(seconds / 3600)
    return f"{hours // 24}d{hours % 24:02d}h"


def progress_line(step: int, total: int, metrics: Mapping[str, float]) -> str:
    """One line for terminal and log file alike; what `metrics` lacks is left out.

    Shows loss, lr, grad_norm and, from Clock.tick, images_per_s, mfu, input_wait, eta_s, elapsed_s, compile_s. Columns
    keep their width from line to line.
    """
    shown = [f"{step:>{len(str(total))}}/{total} {100 * step / total:5.1f}%"]
    for name, show in _COLUMNS.items():
        if name in metrics:
            shown.append(show(metrics[name]))
    return "  ".join(shown)


_COLUMNS: dict[str, Callable[[float], str]] = {
    "loss": lambda v: f"loss {v:7.4f}",
    "lr": lambda v: f"lr {v:.2e}",
    "grad_norm": lambda v: f"grad {v:8.2e}" if v >= 1000 else f"grad {v:8.3f}",
    "images_per_s": lambda v: f"{v:6,.0f} img/s" if v >= 10 else f"{v:6.2f} img/s",
    "mfu": lambda v: f"mfu {100 * v:4.1f}%",
    "input_wait": lambda v: f"wait {100 * v:3.0f}%",
    "eta_s": lambda v: f"eta {duration(v):>6}",
    "elapsed_s": lambda v: f"run {duration(v):>6}",
    "compile_s": lambda v: f"compiled in {duration(v)}",
}
