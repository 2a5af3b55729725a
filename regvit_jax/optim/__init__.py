"""Optimisation: schedules, parameter groups, update rules, clipping and the moving average of weights.

schedules.py   scalars that are pure functions of the step
groups.py      what one parameter gets: learning rate multiplier, decay, clipping group, freezing
rules.py       the table of update rules: one function each
optimizer.py   the step that joins them, and `ema_update`
"""

from regvit_jax.optim.groups import EMBEDDINGS, NO_DECAY, NO_DECAY_TOKENS, PER_TENSOR, Group, default_group
from regvit_jax.optim.optimizer import OptimConfig, Optimizer, ema_update, validate_optim
from regvit_jax.optim.rules import RULES
from regvit_jax.optim.schedules import SCHEDULES, lr_schedule, schedule

__all__ = [
    "EMBEDDINGS",
    "NO_DECAY",
    "NO_DECAY_TOKENS",
    "PER_TENSOR",
    "RULES",
    "SCHEDULES",
    "Group",
    "OptimConfig",
    "Optimizer",
    "default_group",
    "ema_update",
    "lr_schedule",
    "schedule",
    "validate_optim",
]
