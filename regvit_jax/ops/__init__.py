"""Operations with more than one implementation: one dispatcher each, a reference path beside every fast one."""

from regvit_jax.ops.attention import attention, attention_weights

__all__ = ["attention", "attention_weights"]
