"""Configuration: every key of a run with its type, default and meaning; what fails before anything is compiled.

    from regvit_jax.config import defaults, evaluator

    def get_config():
        c = defaults(recipe="supervised")
        c.model.name, c.data.train = "vit_s16_reg4", "folder:/my/images"
        c.evals.knn = evaluator("knn", k=(20,))
        return c

Sections are dataclasses: COMMON here, `optim` from the optimiser, `<recipe>` from the recipe's file, `evals.<name>`
  from the
evaluator's. Nothing else is a key: a typing error is an error.
"""

import dataclasses
import difflib
import importlib
import json
import math
import os
import runpy
import types
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

SCHEMA = 1


def key(default: Any, doc: str, *, runtime: bool = False) -> Any:
    """A field of a config section.

    `runtime` marks what does not change the result: it may differ when a run is resumed.
    """
    return dataclasses.field(default=default, metadata={"doc": doc, "runtime": runtime})


@dataclasses.dataclass(frozen=True)
class Run:
    """Keys at the top of a config."""

    seed: int = key(0, "of initialisation, data order and augmentation")
    total_steps: int = key(1000, "updates of the whole run")
    batch_size: int = key(256, "images per update, over all devices and hosts")
    accum_steps: int = key(1, "micro-batches per update, gradients averaged")
    groups: int = key(
        1, "G: what the references compute per GPU is computed per group of batch_size / G images; 1 = globally"
    )
    dtype: str = key("auto", "of residual stream and matmuls: float32 | bfloat16 | auto (bfloat16 on GPU and TPU)")
    init_from: str = key("", "weights the run starts from: whatever rv.load_model takes; adapted to config.model")
    log_every: int = key(50, "steps between progress lines and metrics", runtime=True)
    save_every: int = key(1000, "steps between checkpoints; 0 = no checkpoints at all", runtime=True)
    eval_every: int = key(1000, "steps between evaluations; 0 = no evaluation at all", runtime=True)
    keep: int = key(2, "newest checkpoints kept", runtime=True)
    keep_best: str = key("", "metric, such as knn/top1, whose best checkpoint is kept too", runtime=True)
    remat: str = key("none", "what the backward pass recomputes: none | dots | named | full", runtime=True)
    unroll: bool = key(False, "a Python loop over blocks instead of a scan", runtime=True)
    attention: str = key("auto", "implementation: auto | cudnn | xla | reference", runtime=True)
    xla_flags: str = key("default", "append flags that help on the device to XLA_FLAGS: default | none", runtime=True)
    compile_cache: str = key(
        "default", "folder of compiled programs; default = ~/.cache/regvit_jax/xla, empty = off", runtime=True
    )


@dataclasses.dataclass(frozen=True)
class ModelKeys:
    """config.model: a name of rv.list_models(), and what differs from it. Unset keys keep the name's own value."""

    name: str = key("vit_s16", "one of rv.list_models(), such as vit_s16_reg4")
    registers: int | None = key(None, "register tokens")
    image_size: int | None = key(None, "side of the training images in pixels, at which positions are native")
    patch_size: int | None = key(None, "side of a patch in pixels")
    width: int | None = key(None, "size of a token")
    depth: int | None = key(None, "blocks")
    num_heads: int | None = key(None, "attention heads")
    mlp_dim: int | None = key(None, "hidden units of the MLP")
    activation: str | None = key(None, "gelu | gelu_tanh | quick_gelu | swiglu")
    layerscale: float | None = key(None, "initial gain of each branch")
    drop_path: float | None = key(None, "highest rate of stochastic depth")
    drop_path_uniform: bool | None = key(None, "every block at the same rate")
    position: str | None = key(None, "tokens with a position: patches | cls | all | none")
    position_init: str | None = key(None, "normal | sincos")
    resampler: str | None = key(None, "of positions at another grid: antialias | bicubic | bicubic_offset")
    class_token: bool | None = key(None, "whether there is one")
    mask_token: bool | None = key(None, "whether there is one")
    pool: str | None = key(None, "what the head sees: token | avg | token_avg | map")
    norm_eps: float | None = key(None, "epsilon of every LayerNorm")
    pre_norm: bool | None = key(None, "LayerNorm before the first block")
    final_norm: bool | None = key(None, "LayerNorm over all tokens at the end")
    fc_norm: bool | None = key(None, "LayerNorm on the pooled vector")
    token_init_std: float | None = key(None, "of class and register tokens at initialisation")
    num_classes: int | None = key(None, "classes of the head; unset = those of data.train")


@dataclasses.dataclass(frozen=True)
class DataKeys:
    """config.data."""

    train: str = key("scenes:", "training source: folder:PATH, npz:FILE, scenes:, with #split[slice] behind")
    eval: str = key("", "evaluation source; empty = the evaluation split of data.train, else a held-out tenth of it")
    crop: str = key("rrc", "training crop on the host: rrc (random resized) | center | none (resize only)")
    scale: tuple[float, float] = key((0.08, 1.0), "range of the area of a random resized crop, as a share of the image")
    ratio: tuple[float, float] = key((3 / 4, 4 / 3), "range of its aspect ratio")
    interpolation: str = key("bicubic", "of every resize: bicubic | bilinear | nearest | lanczos")
    crop_ratio: float = key(0.875, "evaluation crop: share of the short side that is kept")
    mean: tuple[float, float, float] = key((0.485, 0.456, 0.406), "of the pixels in 0..1, subtracted")
    std: tuple[float, float, float] = key((0.229, 0.224, 0.225), "of the pixels in 0..1, divided by")
    workers: int = key(0, "decoding processes; 0 = threads of this one", runtime=True)
    max_bad: float = key(
        0.01, "share of unreadable training images, replaced and named, past which the run stops", runtime=True
    )
    augment_on: str = key("device", "where a recipe that cuts its own crops does so: device (in the step) | host")
    cache: str = key("none", "keep the decoded set: none | host | device; needs crop center or none", runtime=True)


@dataclasses.dataclass(frozen=True)
class MeshKeys:
    """config.mesh: devices along each axis."""

    data: int = key(-1, "batch split, parameters repeated; -1 = all devices that are left", runtime=True)
    fsdp: int = key(1, "batch and parameters split", runtime=True)
    tensor: int = key(1, "heads and hidden units split", runtime=True)
    fsdp_min_bytes: int = key(4 * 2**20, "a layer's parameter below this size is not split", runtime=True)


@dataclasses.dataclass(frozen=True)
class ProfileKeys:
    """config.profile: a trace for TensorBoard or Perfetto under workdir/profile."""

    start: int = key(10, "first step of the trace", runtime=True)
    steps: int = key(0, "steps to trace; 0 = off", runtime=True)


COMMON = {"model": ModelKeys, "data": DataKeys, "mesh": MeshKeys, "profile": ProfileKeys}
_RUNTIME_SECTIONS = ("evals",)


def defaults(recipe: str) -> ConfigDict:
    """A locked config in which every key of a recipe exists, common keys with the values that suit it.

    Raises:
      ValueError: for an unknown recipe; lists the known ones.
    """
    config = ConfigDict({"schema": SCHEMA, "recipe": recipe} | _fields(Run))
    for name, section in COMMON.items():
        config[name] = ConfigDict(_fields(section))
    config.optim = ConfigDict(_fields(_find("regvit_jax.optim", "OptimConfig")))
    config[recipe] = ConfigDict(_fields(_recipe(recipe).Config))
    config.evals = ConfigDict()
    config.lock()
    config.evals.unlock()
    config.update_from_flattened_dict(_recipe(recipe).DEFAULTS)
    return config


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Keys at the top of a config of `regvit eval`, beside its `evals`: how images are prepared for all of them."""

    image_size: int | None = key(None, "side in pixels at which the network runs; unset = the model's own")
    crop_ratio: float | None = key(None, "share of the short side that the central crop keeps; unset = the model's own")


def protocol(**options: Any) -> ConfigDict:
    """A locked config for `regvit eval --config`, without evaluators yet: add them to its `evals`.

    Args:
      **options: fields of Protocol.
    """
    config = ConfigDict(_fields(Protocol) | {"evals": {}})
    config.lock()
    config.evals.unlock()
    config.update(options)
    return config


def load(path: str | os.PathLike) -> ConfigDict:
    """What get_config() of a Python file returns.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it cannot be run or has no get_config, or what that returns has no evaluators under `evals`.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is no file: name a Python file with get_config(), such as those of configs/")
    try:
        namespace = runpy.run_path(os.fspath(path))
        if "get_config" not in namespace:
            raise ValueError("there is no get_config()")
        config = namespace["get_config"]()
    except (AttributeError, KeyError, NameError, SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {' '.join(str(error.args[0]).split())}") from error
    if "evals" not in config or not config.evals:
        raise ValueError(f"{path}: its config has no evaluators: give config.evals one or more")
    return config


def evaluator(type: str, *, every: int = -1, at_start: bool = False, **options: Any) -> ConfigDict:
    """A section for `config.evals`.

    Args:
      type: the evaluator's name (knn, linear, maps, …).
      every: steps between runs; -1 = config.eval_every, 0 = only at the end.
      at_start: also on the freshly initialised network.
      **options: fields of the evaluator; the others keep their defaults.

    Raises:
      ValueError: for an unknown type or option; names the nearest.
    """
    registry = _find("regvit_jax.evals", "EVALUATORS")
    if type not in registry:
        raise ValueError(f"unknown evaluator {type!r}; known: {', '.join(registry)}")
    section = ConfigDict(
        {"type": type, "every": every, "at_start": at_start} | _fields(_find("regvit_jax.evals", "get")(type))
    )
    section.lock()
    for name, value in options.items():
        if name not in section:
            near = difflib.get_close_matches(name, list(section), n=1)
            raise ValueError(
                f"evaluator {type!r} has no option {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
        section[name] = value
    return section


def recipe_class(config: ConfigDict) -> type:
    """The class behind config.recipe."""
    return _recipe(config.recipe)


def validate(config: ConfigDict, *, devices: int) -> None:
    """Checks the keys that every run has, before anything is compiled.

    Args:
      config: from `defaults`.
      devices: how many the mesh is laid over.

    Raises:
      ValueError: naming the key, its value and what it may be.
    """
    c = config

    def need(good: bool, name: str, allowed: str) -> None:
        if not good:
            raise ValueError(f"config.{name}={get(config, name)!r} is not possible: {allowed}")

    for name in ("total_steps", "batch_size", "accum_steps", "groups", "log_every", "keep"):
        need(c[name] >= 1, name, "must be at least 1")
    for name in (
        "seed",
        "save_every",
        "eval_every",
        "data.workers",
        "profile.start",
        "profile.steps",
        "mesh.fsdp_min_bytes",
    ):
        need(get(c, name) >= 0, name, "must be 0 or more")
    choices = {
        "dtype": ("auto", "float32", "bfloat16"),
        "remat": ("none", "dots", "named", "full"),
        "attention": ("auto", "cudnn", "xla", "reference"),
        "xla_flags": ("default", "none"),
        "data.crop": ("rrc", "center", "none"),
        "data.augment_on": ("device", "host"),
        "data.cache": ("none", "host", "device"),
    }
    for name, values in choices.items():
        need(get(c, name) in values, name, f"must be one of {', '.join(values)}")
    _find("regvit_jax.optim", "validate_optim")(c.optim)
    need(bool(c.data.train), "data.train", "name a source, such as folder:/my/images")
    need(
        c.data.cache == "none" or c.data.crop != "rrc",
        "data.cache",
        "random crops on the host cannot be cached: set data.crop to center or none",
    )
    need(0 <= c.data.max_bad <= 1, "data.max_bad", "a share, from 0 to 1")
    need(0 < c.data.crop_ratio <= 1, "data.crop_ratio", "must lie in (0, 1]")
    for name, most in (("data.scale", 1.0), ("data.ratio", math.inf)):
        pair = get(c, name)
        allowed = "two numbers above 0, low before high" + (", at most 1" if most == 1 else "")
        need(len(pair) == 2 and 0 < pair[0] <= pair[1] <= most, name, f"must be {allowed}")
    for name in ("data.mean", "data.std"):
        need(len(get(c, name)) == 3, name, "must be three numbers: red, green, blue")
    need(min(c.data.std) > 0, "data.std", "must be above 0")
    best = c.keep_best.partition("/")[0]
    known = ", ".join(c.evals) or "none"
    there = not best or not c.eval_every or best in c.evals
    need(there, "keep_best", f"must be NAME/METRIC of one of config.evals: {known}")

    shards = mesh_shards(c, devices)
    need(c.batch_size % c.accum_steps == 0, "accum_steps", f"must divide batch_size={c.batch_size}")
    micro = c.batch_size // c.accum_steps
    nearest = max(shards, round(micro / shards) * shards) * c.accum_steps
    need(
        micro % shards == 0,
        "batch_size",
        f"each of {c.accum_steps} micro-batches must split over data x fsdp = {shards} devices; the nearest that "
        f"does is {nearest}",
    )
    need(micro % c.groups == 0, "groups", f"must divide the {micro} images of a micro-batch")
    following = -(-c.groups // shards) * shards
    need(
        c.groups == 1 or c.groups % shards == 0,
        "groups",
        f"must be 1 or a multiple of data x fsdp = {shards}; the next is {following}",
    )


def mesh_shards(config: ConfigDict, devices: int) -> int:
    """data x fsdp, the number of pieces a batch is cut into.

    Raises:
      ValueError: if the mesh does not fit the devices.
    """
    sizes = [config.mesh.data, config.mesh.fsdp, config.mesh.tensor]
    if any(s == 0 or s < -1 for s in sizes) or sizes.count(-1) > 1:
        raise ValueError(
            f"config.mesh: sizes must be positive, at most one of them -1; got data, fsdp, tensor = {sizes}"
        )
    fixed = 1
    for size in sizes:
        fixed *= size if size > 0 else 1
    if devices % fixed or (-1 not in sizes and fixed != devices):
        raise ValueError(
            f"config.mesh: data, fsdp, tensor = {sizes} do not multiply to the {devices} devices here; "
            "set one of them to -1 to take what is left"
        )
    sizes = [devices // fixed if s == -1 else s for s in sizes]
    return sizes[0] * sizes[1]


def get(config: ConfigDict, name: str) -> Any:
    """The value of a dotted key."""
    for part in name.split("."):
        config = config[part]
    return config


def to_json(config: ConfigDict) -> str:
    return json.dumps(json.loads(config.to_json()), indent=2, sort_keys=True) + "\n"


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted key: JSON value} of a config or of what `to_json` wrote."""
    out: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            out |= flat(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = list(value) if isinstance(value, tuple) else value
    return out


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[dict[str, tuple], dict[str, tuple]]:
    """({key: (old, new)} that change the result, the same for runtime keys)."""
    old, new = flat(old), flat(new)
    changed = {k: (old.get(k), new.get(k)) for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)}
    runtime = {k: v for k, v in changed.items() if is_runtime(k)}
    return {k: v for k, v in changed.items() if k not in runtime}, runtime


def is_runtime(name: str) -> bool:
    """Whether a dotted key may differ when a run is resumed."""
    section, _, rest = name.rpartition(".")
    if section.split(".")[0] in _RUNTIME_SECTIONS:
        return True
    owner = COMMON.get(section, Run if not section else None)
    names = {f.name: f.metadata["runtime"] for f in dataclasses.fields(owner)} if owner else {}
    return names.get(rest or name, False)


def explain(config: ConfigDict) -> str:
    """Every key of a config with its value and meaning, one a line."""
    recipe = config.recipe
    sections = {"": Run} | COMMON | {"optim": _find("regvit_jax.optim", "OptimConfig"), recipe: _recipe(recipe).Config}
    for name, options in config.evals.items():
        sections[f"evals.{name}"] = _find("regvit_jax.evals", "get")(options.type)
    lines = []
    for section, cls in sections.items():
        for f in dataclasses.fields(cls):
            name = f"{section}.{f.name}" if section else f.name
            value = get(config, name)
            lines.append(f"  {name:<28} {'unset' if value is None else repr(value):<24} {f.metadata['doc']}")
    return "\n".join(lines)


def _fields(cls: type) -> dict[str, Any]:
    """{name: default} of a dataclass; an optional field becomes a typed placeholder, so that it can be set from the
    command line."""
    hints = typing.get_type_hints(cls)
    out = {}
    for f in dataclasses.fields(cls):
        value = f.default
        if value is None:
            value = config_dict.placeholder(_plain_type(hints[f.name]))
        elif value is dataclasses.MISSING:
            raise TypeError(f"{cls.__name__}.{f.name} has no default: every key of a config needs one")
        out[f.name] = value
    return out


def _plain_type(hint: Any) -> type:
    parts = [t for t in typing.get_args(hint) if t is not types.NoneType]
    return parts[0] if parts else hint


def _recipe(name: str) -> type:
    registry = _find("regvit_jax.recipes", "RECIPES")
    if name not in registry:
        raise ValueError(f"unknown recipe {name!r}; known: {', '.join(registry)}")
    return _find("regvit_jax.recipes", "get")(name)


def _find(module: str, attribute: str) -> Any:
    """The one upward door: recipes, evaluators and the optimiser are named by strings and resolved on use."""
    return getattr(importlib.import_module(module), attribute)
