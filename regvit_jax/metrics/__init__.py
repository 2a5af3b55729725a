"""What one sees of a run: measured speed (clock), records on disk (writer), late reading and the NaN stop (guard),
warnings (alarms)."""

from regvit_jax.metrics.alarms import Alarms
from regvit_jax.metrics.clock import Clock, duration, progress_line
from regvit_jax.metrics.guard import Delayed, NonFiniteError, check_finite
from regvit_jax.metrics.writer import Writer

__all__ = ["Alarms", "Clock", "Delayed", "NonFiniteError", "Writer", "check_finite", "duration", "progress_line"]
