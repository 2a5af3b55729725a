"""Training: one step built from a config, and one run of it in a workdir. It knows no recipe by name."""

import contextlib
import logging
import os
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from regvit_jax import checkpoint, evaluate, hub, metrics, sharding, state
from regvit_jax import config as configs
from regvit_jax.data.sources import Source, open_source
from regvit_jax.loop import Loop, Result, Step
from regvit_jax.optim import Optimizer
from regvit_jax.stopping import Stop, differing, together
from regvit_jax.trees import Array, Tree, named
from regvit_jax.workdir import Workdir


def build_step(config: ConfigDict, mesh: Mesh, loaded: dict[str, Any] | None = None) -> Step:
    """The only place where a training step is jitted.

    Args:
      config: validated; config.model.num_classes is set if the recipe needs labels.
      mesh: from `sharding.make_mesh`.
      loaded: of `read`, what `recipe.init` starts from.

    Raises:
      ValueError: for a config that the recipe refuses, or weights that do not fit it.
    """
    recipe = configs.recipe_class(config)(config)
    # In the host's memory, where it may lie for as long as the run lasts.
    loaded = jax.device_get(recipe.prepare(loaded or {}))
    tensor, heads, hidden = mesh.shape["tensor"], recipe.vit.num_heads, recipe.vit.mlp_dim
    if heads % tensor or hidden % tensor:
        raise ValueError(f"config.mesh.tensor={tensor} must divide the {heads} heads and {hidden} hidden units")
    key = stream(config.seed, "init")
    shapes, _ = jax.eval_shape(recipe.init, key, loaded)
    groups = {path: recipe.param_groups(path) for path in named(shapes)}
    optimizer = Optimizer(config.optim, groups, recipe.schedules())
    place = (recipe.init, optimizer, key, mesh, config.mesh.fsdp_min_bytes, loaded)
    abstract = state.abstract(*place)

    def update(train_state: Tree, batch: dict[str, Array]) -> tuple[Tree, dict[str, Array]]:
        step, params, extras = train_state["step"], train_state["params"], train_state["extras"]
        batch = recipe.augment(batch, jax.random.fold_in(stream(config.seed, "augment"), step), step)
        loss, aux, grads = recipe.grads(
            params, extras, batch, jax.random.fold_in(stream(config.seed, "loss"), step), step
        )
        # In the shards of their parameters before anything else is done with them: every device then reduces, clips and
        # accumulates its own part.
        grads = jax.lax.with_sharding_constraint(grads, shardings["params"])
        params, opt, measured = optimizer.update(grads, train_state["opt"], params, step)
        extras = recipe.after_update(params, extras, aux, step)
        scalars = {"loss": loss} | aux["metrics"] | measured
        new = {"step": step + 1, "params": params, "opt": opt, "extras": extras}
        return new, {name: jnp.asarray(value, jnp.float32) for name, value in scalars.items()}

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    jitted = jax.jit(update, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh)))
    return Step(jitted, abstract, lambda: state.create(*place), recipe, optimizer, mesh)


def read(paths: Mapping[str, str]) -> dict[str, Any]:
    """{name: Model, "name:heads": {name: tree}} of the models that a recipe asks for, with what lies beside them."""
    loaded = {}
    for name, path in paths.items():
        loaded[name], loaded[f"{name}:heads"] = hub.load_trained(path)
    return loaded


def stream(seed: int, name: str) -> Array:
    """The key of a named stream of randomness (init, augment, loss, eval), all from one root."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def run(config: ConfigDict, workdir: str | os.PathLike) -> Result:
    """Trains, evaluates and saves; continues where the workdir's latest checkpoint stands.

    Args:
      config: from a config file; it is not changed.
      workdir: of this run alone; made if absent.

    Raises:
      ValueError: for a config that is not possible, or a workdir of another one, before anything is compiled.
      NonFiniteError: when a metric is NaN or infinite.
      OSError: when the disk is full; CheckpointNotSaved, which is one, says where the run can go on.
      WorkersDied: when data workers die again and again.
    """
    first = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        # Everything that can be refused is refused here, by all processes: after this the workdir belongs to the run.
        with together():
            configs.validate(config, devices=jax.device_count())
            config, source, data = prepare(config)
            mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
            sources = {"data_train": data[0], "data_eval": data[1]}
            evals = evaluate.build(config.evals, **sources, leave_out=True) if config.eval_every else {}
            folder = stack.enter_context(Workdir(workdir, active=first))
        if others := differing(configs.to_json(config)):
            raise ValueError(f"processes {others} were started with another config than process 0: give all the same")
        stack.enter_context(jax.set_mesh(mesh))
        with together():
            step = build_step(config, mesh, read(configs.recipe_class(config).paths(config)))
            folder.bind(config)
        folder.record_environment(jax.devices())
        use_compilation_cache(config.compile_cache)
        writer = stack.enter_context(metrics.Writer(folder.path, active=first))
        saved = None
        # With save_every=0 nothing is written, but a run that saved before goes on from there.
        if config.save_every or (folder.path / "checkpoints").is_dir():
            saving = {"keep": config.keep, "keep_best": config.keep_best, "create": bool(config.save_every)}
            saved = stack.enter_context(checkpoint.Checkpoints(folder.path, **saving))
        loop = Loop(config, step, source, data[0], evals, folder.path, writer, saved)
        return loop.run(stack.enter_context(Stop()))


def prepare(config: ConfigDict) -> tuple[ConfigDict, Source, tuple[str, str]]:
    """Opens the training data and fills what it decides.

    Returns:
      (a copy of the config with model.num_classes set, the training source, the (train, eval) source strings). Where
      data.train has no evaluation split and data.eval names none, a fixed tenth of it is held out.

    Raises:
      ValueError, FileNotFoundError: for data that cannot be read, or has more classes than the config says.
    """
    config = config.copy_and_resolve_references()
    train, held_out = evaluate.data_pair(config.data.train, config.data.eval)
    source, evaluated = open_source(train), open_source(held_out)
    if train != config.data.train:
        logging.info("data: no evaluation split, a fixed tenth is held out; set data.eval to train on all of it")
    logging.info("data: %d images from %s to train on", len(source), train)
    logging.info("data: %d images from %s to evaluate on", len(evaluated), held_out)
    if configs.recipe_class(config).labelled:
        if config.model.num_classes is None:
            config.model.num_classes = source.num_classes
        if config.model.num_classes < source.num_classes:
            asked, there = config.model.num_classes, f"{source.num_classes} classes of {train}"
            raise ValueError(f"config.model.num_classes={asked} is less than the {there}: leave it unset")
    return config, source, (train, held_out)


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs on disk for the next start; "" turns that off."""
    if folder == "default":
        folder = os.path.join(os.environ.get("REGVIT_CACHE", os.path.expanduser("~/.cache/regvit_jax")), "xla")
    jax.config.update("jax_compilation_cache_dir", folder or None)
