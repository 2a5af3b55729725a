"""Update rules: how a gradient becomes a direction. A new rule is one function and one line in RULES.

A rule is called once a leaf as

  rule(grad, mu, nu, param, *, count, weight_decay, path, config) -> (direction, mu, nu)

with all arrays float32 and of the leaf's shape, and the parameter then moves by -lr * lr_mult * direction. `count` is
the number of this update for the leaf, from 1 (float32 scalar). `weight_decay` is None for a leaf without decay, so
that a rule can treat it differently (LAMB: no trust ratio). `path` tells a stacked leaf, each layer of which is a
tensor of its own: `trees.layer_axes(path, ndim)` are the axes of its norms.
"""

import math

import jax.numpy as jnp

from regvit_jax.trees import Array


def adamw(grad, mu, nu, param, *, count, weight_decay, path, config) -> tuple[Array, Array, Array]:
    """Adam with decoupled weight decay. Source: Loshchilov and Hutter 2019."""
    direction, mu, nu = _adam(grad, mu, nu, count, config)
    if weight_decay is not None:
        direction = direction + weight_decay * param
    return direction, mu, nu


RULES = {"adamw": adamw}


def _adam(grad, mu, nu, count, config) -> tuple[Array, Array, Array]:
    """Bias-corrected first moment over the root of the second, and both moments."""
    mu = config.b1 * mu + (1.0 - config.b1) * grad
    nu = config.b2 * nu + (1.0 - config.b2) * jnp.square(grad)
    mu_hat = mu / _bias_correction(config.b1, count)
    nu_hat = nu / _bias_correction(config.b2, count)
    return mu_hat / (jnp.sqrt(nu_hat) + config.eps), mu, nu


def _bias_correction(decay: float, count) -> Array | float:
    """1 - decay ** count. Written with expm1: in float32 the plain form loses 5 digits at count 1 for b2 = 0.999."""
    return -jnp.expm1(count * math.log(decay)) if decay > 0 else 1.0
