"""Outliers: norms of tokens, and the rules by which some of them are called artifacts.

Norms are those of the residual stream, before the final norm: after it the artifacts of a network look like all others.

    norms_bp = token_norms(stream_bpd)
    limit = cutoff(norms_bp, "mad")             # or cutoff(norms_bp, "absolute", 150.0), the paper's for DINOv2
    share = (norms_bp > limit).mean()
"""

import jax.numpy as jnp

from regvit_jax.trees import Array

# Rule -> its parameter where none is given; "absolute" has no default: a number that fits one network fits no other.
RULES = {"absolute": None, "sigma": 3.0, "percentile": 98.0, "otsu": 0.0, "mad": 6.0}

_OTSU_BINS = 256
_NORMAL = 1.4826  # standard deviation of a normal distribution over its median absolute deviation
_LEAST_RATIO = 3.0


def token_norms(tokens: Array) -> Array:
    """(…,) float32: L2 norm over the channels of (…, D) tokens of any float dtype."""
    return jnp.linalg.norm(tokens.astype(jnp.float32), axis=-1)


def cutoff(norms: Array, rule: str = "mad", value: float | None = None) -> Array:
    """The norm above which a token is an outlier, a float32 scalar; one for all of `norms`, whatever their shape.

    rule, value:
      absolute    the value itself (Darcet et al. take 150 for DINOv2, whose typical norm is below 100)
      sigma       mean + value standard deviations (Jiang et al. 2025, 3); flags something in any distribution
      percentile  the value-th percentile; flags a fixed share by definition
      otsu        the split of log norms with the least variance within its two sides; it always splits, so look at
                  the histogram before believing it; takes no value
      mad         in log norms: median + value robust standard deviations, and at least 3 times the median norm. It
                  flags nothing in one-humped distributions, however long their tail

    Raises:
      ValueError: for an unknown rule, or "absolute" without a value.
    """
    if rule not in RULES:
        raise ValueError(f"no rule for outliers is called {rule!r}: there are {', '.join(RULES)}")
    value = RULES[rule] if value is None else value
    if value is None:
        raise ValueError("the rule 'absolute' needs a value: the norm above which a token counts as an outlier")
    norms = norms.astype(jnp.float32).reshape(-1)
    if rule == "absolute":
        return jnp.float32(value)
    if rule == "sigma":
        return norms.mean() + value * norms.std()
    if rule == "percentile":
        return jnp.percentile(norms, value)
    logs = jnp.log(jnp.maximum(norms, jnp.finfo(jnp.float32).tiny))
    if rule == "otsu":
        return jnp.exp(_otsu(logs))
    median = jnp.median(logs)
    spread = _NORMAL * jnp.median(jnp.abs(logs - median))
    return jnp.exp(median + jnp.maximum(value * spread, jnp.log(_LEAST_RATIO)))


def _otsu(values: Array) -> Array:
    """The edge of a histogram bin that separates `values` best: largest variance between the two sides (Otsu 1979)."""
    low, high = values.min(), values.max()
    width = jnp.maximum(high - low, 1e-6) / _OTSU_BINS
    bins = jnp.clip(((values - low) / width).astype(jnp.int32), 0, _OTSU_BINS - 1)
    # Sums of the values themselves, not of bin centres: exact, whatever the width.
    counts = jnp.zeros(_OTSU_BINS).at[bins].add(1.0)
    sums = jnp.zeros(_OTSU_BINS).at[bins].add(values - low)
    below, sum_below = jnp.cumsum(counts)[:-1], jnp.cumsum(sums)[:-1]
    above, sum_above = len(values) - below, sums.sum() - sum_below
    gap = sum_above / jnp.maximum(above, 1.0) - sum_below / jnp.maximum(below, 1.0)
    between = jnp.where((below > 0) & (above > 0), below * above * gap**2, -1.0)
    best = between == between.max()
    # Every edge of an empty stretch is as good as the others: its middle.
    edges = jnp.arange(1, _OTSU_BINS, dtype=jnp.float32)
    return low + width * jnp.sum(edges * best) / jnp.sum(best)
