"""The optimiser: gradients clipped, turned into directions by a rule, applied at per-group rates; and the only EMA."""

import dataclasses
from collections.abc import Mapping
from dataclasses import field

import jax
import jax.numpy as jnp

from regvit_jax.optim.groups import PER_TENSOR, Group
from regvit_jax.optim.rules import RULES
from regvit_jax.optim.schedules import SCHEDULES, Schedule
from regvit_jax.trees import Array, Tree, layer_axes, named, unname

_MU_DTYPES = ("float32", "bfloat16")


def _key(default, doc: str):
    return field(default=default, metadata={"doc": doc})


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Defaults of the section `config.optim`; the meaning of a key is in its metadata."""

    name: str = _key("adamw", "update rule: adamw")
    lr: float = _key(1e-3, "peak learning rate")
    end_lr: float = _key(0.0, "learning rate that the schedule reaches at total_steps")
    schedule: str = _key("cosine", "course of the learning rate after the warm-up: cosine | linear | constant")
    warmup_steps: int = _key(1000, "steps from 0 to the peak, linear; clipped to total_steps with a warning")
    weight_decay: float = _key(0.05, "decoupled weight decay, multiplied by the learning rate")
    b1: float = _key(0.9, "decay of the first moment")
    b2: float = _key(0.999, "decay of the second moment")
    eps: float = _key(1e-8, "added to the root of the second moment")
    clip_norm: float = _key(1.0, "largest gradient norm of a clipping group; 0 turns clipping off")
    mu_dtype: str = _key("float32", "dtype in which the first moment is stored: float32 | bfloat16")
    layer_decay: float = _key(1.0, "factor on the learning rate from one layer to the one below; 1 turns it off")


def validate_optim(config) -> None:
    """Checks a section with the fields of `OptimConfig`.

    Raises:
      ValueError: naming the key of `config.optim` and the values it may have.
    """
    rules = [
        ("name", config.name in RULES, f"one of {', '.join(RULES)}"),
        ("schedule", config.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
        ("mu_dtype", config.mu_dtype in _MU_DTYPES, f"one of {', '.join(_MU_DTYPES)}"),
        ("lr", config.lr >= 0, "at least 0"),
        ("end_lr", config.end_lr >= 0, "at least 0"),
        ("warmup_steps", config.warmup_steps >= 0, "at least 0"),
        ("weight_decay", config.weight_decay >= 0, "at least 0"),
        ("b1", 0 <= config.b1 < 1, "in [0, 1)"),
        ("b2", 0 <= config.b2 < 1, "in [0, 1)"),
        ("eps", config.eps > 0, "positive"),
        ("clip_norm", config.clip_norm >= 0, "at least 0 (0 turns clipping off)"),
        ("layer_decay", 0 < config.layer_decay <= 1, "in (0, 1]"),
    ]
    for key, good, allowed in rules:
        if not good:
            raise ValueError(f"config.optim.{key} must be {allowed}, got {getattr(config, key)!r}")


class Optimizer:
    """Clipping, an update rule and per-parameter groups as two pure functions, `init` and `update`.

    The state is {"mu": tree, "nu": tree}: leaves have the shape of their parameter (so they shard like it), `mu` in
    config.mu_dtype and `nu` in float32; permanently frozen parameters have none. The step comes from outside.

    Args:
      config: an `OptimConfig` or a config section with the same fields.
      groups: {path: Group} for every parameter.
      schedules: {name: step -> float32 scalar}: every name that a group uses. A schedule called "wd" gives the weight
          decay in place of config.weight_decay.

    Raises:
      ValueError: if the config is not valid, or a group names a schedule that is not there.
    """

    def __init__(self, config, groups: Mapping[str, Group], schedules: Mapping[str, Schedule]):
        validate_optim(config)
        for path, group in groups.items():
            if group.lr_schedule not in schedules:
                raise ValueError(f"{path}: no schedule {group.lr_schedule!r} was given, only {sorted(schedules)}")
        self.config = config
        self.groups = dict(groups)
        self.schedules = dict(schedules)

    def init(self, params: Tree) -> dict:
        """Zero moments.

        Raises:
          ValueError: if the paths of `params` and of the groups differ, or a vector `lr_mult` does not fit its leaf.
        """
        leaves = named(params)
        if leaves.keys() != self.groups.keys():
            without, unused = sorted(leaves.keys() - self.groups.keys()), sorted(self.groups.keys() - leaves.keys())
            raise ValueError(f"every parameter needs one group: parameters without {without}, groups without {unused}")
        for path, leaf in leaves.items():
            self.groups[path].lr_mult_of(path, leaf.shape)
        trained = {path: leaf for path, leaf in leaves.items() if self.groups[path].thaw is not None}
        return {
            "mu": unname({path: jnp.zeros_like(leaf, self.config.mu_dtype) for path, leaf in trained.items()}),
            "nu": unname({path: jnp.zeros_like(leaf, jnp.float32) for path, leaf in trained.items()}),
        }

    def update(self, grads: Tree, opt: dict, params: Tree, step) -> tuple[Tree, dict, dict[str, Array]]:
        """One update.

        A parameter frozen until step n neither moves nor gathers moments before it, its gradient counts in no norm, and
        its bias correction counts from n. All of that is selected by `step` inside one compilation.

        Args:
          grads: tree of `params`.
          opt: what `init` or the last `update` returned.
          params: float32.
          step: number of finished updates, int32 scalar or Python int.

        Returns:
          (params, opt, metrics). Metrics are float32 scalars: grad_norm (before clipping; also grad_norm/<clip group>
          where there are several), param_norm (after the update) and update_norm, all over the parameters that have
          state, and every schedule under its name.
        """
        step = jnp.asarray(step, jnp.int32)
        scalars = {name: fn(step) for name, fn in self.schedules.items()}
        leaves, gradients = named(params), named(grads)
        mus, nus = named(opt["mu"]), named(opt["nu"])
        # A gradient that is held back is zero from here on, so that it counts in no norm, whatever it holds.
        gradients = {path: self._hold(path, step, gradients[path].astype(jnp.float32), 0.0) for path in mus}
        gradients, metrics = self._clip(gradients)

        squares = {"param_norm": [], "update_norm": []}
        for path, grad in gradients.items():
            group, param, mu, nu = self.groups[path], leaves[path], mus[path], nus[path]
            direction, new_mu, new_nu = RULES[self.config.name](
                grad,
                mu.astype(jnp.float32),
                nu,
                param.astype(jnp.float32),
                count=jnp.maximum(step - group.thaw + 1, 1).astype(jnp.float32),
                weight_decay=self._weight_decay(group, scalars),
                path=path,
                config=self.config,
            )
            delta = scalars[group.lr_schedule] * group.lr_mult_of(path, param.shape) * direction
            delta = self._hold(path, step, delta, 0.0)
            leaves[path] = (param - delta).astype(param.dtype)
            mus[path] = self._hold(path, step, new_mu.astype(mu.dtype), mu)
            nus[path] = self._hold(path, step, new_nu, nu)
            squares["param_norm"].append(_sum_of_squares(leaves[path]))
            squares["update_norm"].append(_sum_of_squares(delta))

        metrics |= {name: jnp.sqrt(_total(values)) for name, values in squares.items()} | scalars
        # Rebuilt on the structure that came in: a sub-tree without leaves survives, and donation finds its partner.
        opt = {"mu": _like(opt["mu"], mus), "nu": _like(opt["nu"], nus)}
        return _like(params, leaves), opt, metrics

    def _hold(self, path: str, step, new, old):
        """`new` from the step on that thaws the parameter, `old` before."""
        thaw = self.groups[path].thaw
        return new if thaw == 0 else jnp.where(step >= thaw, new, old)

    def _weight_decay(self, group: Group, scalars: dict[str, Array]):
        """The group's decay; None where it is zero for the whole run."""
        scheduled = "wd" in self.schedules
        if group.wd_mult == 0 or (not scheduled and self.config.weight_decay == 0):
            return None
        return group.wd_mult * (scalars["wd"] if scheduled else self.config.weight_decay)

    def _clip(self, grads: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
        """Gradients with no norm of a clipping group above config.clip_norm, and the norms from before."""
        squares: dict[str, list] = {}
        for path, grad in grads.items():
            squares.setdefault(self.groups[path].clip_group, []).append(_sum_of_squares(grad))
        totals = {name: _total(values) for name, values in squares.items()}
        norms = {name: jnp.sqrt(total) for name, total in totals.items()}
        metrics = {"grad_norm": jnp.sqrt(_total(list(totals.values())))}
        if len(norms) > 1:
            metrics |= {f"grad_norm/{name}": norm for name, norm in norms.items()}
        limit = self.config.clip_norm
        if limit == 0:
            return grads, metrics

        def clipped(path, grad):
            name = self.groups[path].clip_group
            norm = _tensor_norms(path, grad) if name == PER_TENSOR else norms[name]
            return grad * (limit / jnp.maximum(norm, limit))

        return {path: clipped(path, grad) for path, grad in grads.items()}, metrics


def ema_update(ema: Tree, params: Tree, decay) -> Tree:
    """decay * ema + (1 - decay) * params, leaf by leaf: the only moving average of weights in the package.

    Args:
      ema: float32 tree, usually a copy of `params` at the start.
      params: tree of the same structure; computed in float32 whatever its dtype.
      decay: Python float or traced scalar in [0, 1]; 1 keeps `ema` and 0 copies `params`, both exactly.

    Returns:
      Tree of `ema`'s dtypes.
    """

    def average(old, new):
        return (decay * old.astype(jnp.float32) + (1.0 - decay) * new.astype(jnp.float32)).astype(old.dtype)

    return jax.tree.map(average, ema, params)


def _like(tree: Tree, leaves: dict[str, Array]) -> Tree:
    return jax.tree.unflatten(jax.tree.structure(tree), list(leaves.values()))


def _sum_of_squares(x: Array) -> Array:
    return jnp.sum(jnp.square(x.astype(jnp.float32)))


def _tensor_norms(path: str, x: Array) -> Array:
    """Norm of the tensor, or of every layer of a stacked one, in a shape that broadcasts against it."""
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=layer_axes(path, x.ndim), keepdims=True))


def _total(squares: list[Array]) -> Array:
    """Sum of a list of scalars; 0 for none (everything is frozen)."""
    return sum(squares, jnp.zeros((), jnp.float32))
