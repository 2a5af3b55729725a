"""Models in and out: our own folders, training workdirs, and state dicts of PyTorch libraries."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from regvit_jax import checkpoint
from regvit_jax.convert import FAMILIES, family_of
from regvit_jax.data.transforms import Preprocess
from regvit_jax.models.config import Execution, ViTConfig
from regvit_jax.models.model import Model, abstract_params
from regvit_jax.trees import named, unname

FORMAT = 1
WEIGHTS, CONFIG = "params.safetensors", "model.json"


def save_model(model: Model, path: str | os.PathLike, format: str = "regvit") -> None:
    """Writes a model to a folder: `model.json` (architecture, preprocessing) and `params.safetensors` (our names,
    exact).

    Args:
      model: any Model.
      path: the folder; made if absent, its two files replaced.
      format: "regvit", our own.

    Raises:
      ValueError: for another format.
    """
    if format != "regvit":
        raise ValueError(f"format {format!r} cannot be written; known: 'regvit'")
    folder = pathlib.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: np.asarray(leaf) for name, leaf in named(model.params).items()}, folder / f".{WEIGHTS}")
    os.replace(folder / f".{WEIGHTS}", folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"format": FORMAT} | describe(model), indent=2) + "\n")


def load_model(
    path: str | os.PathLike, *, image_size: int | tuple[int, int] | None = None, dtype: str = "float32"
) -> Model:
    """A model from a folder of `save_model` or a training workdir (its latest checkpoint).

    Args:
      path: the folder.
      image_size: what `preprocess` shall make of images (crop ratio kept); the network itself takes any multiple of its
        patch.
      dtype: of the computation, "float32" or "bfloat16".

    Raises:
      FileNotFoundError: if the path holds no model; says what was looked for.
      ValueError: if parameters do not fit the architecture in the file.
    """
    folder = pathlib.Path(path)
    if (folder / CONFIG).is_file():
        description = json.loads((folder / CONFIG).read_text())
        if description["format"] != FORMAT:
            raise ValueError(f"{folder / CONFIG} has format {description['format']}; this version reads {FORMAT}")
        flat = load_file(folder / WEIGHTS)
    elif (folder / "checkpoints").is_dir():
        description, flat = _from_workdir(folder)
    else:
        raise FileNotFoundError(
            f"{folder} holds no model: expected {CONFIG} and {WEIGHTS} (rv.save_model), or a training workdir with "
            "checkpoints/"
        )
    model = restore(description, flat, where=str(folder), dtype=dtype)
    if image_size is None:
        return model
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    model.config.grid_of(size)
    return dataclasses.replace(model, preprocessing=dataclasses.replace(model.preprocessing, size=min(size)))


def from_torch(
    state: Mapping[str, np.ndarray], family: str | None = None, *, dtype: str = "float32", **config
) -> Model:
    """A model from a PyTorch state dict of NumPy arrays.

    Args:
      state: {name: array} under the names of its library, torch shapes.
      family: one of `regvit_jax.convert.FAMILIES`; None: the one family whose table accounts for every key.
      dtype: of the computation.
      **config: fields of ViTConfig that a state dict cannot tell: num_heads of an unusual width, resampler, norm_eps.

    Raises:
      ValueError: if no family or more than one explains the keys (lists the candidates), a key is left over, a
        parameter not filled, or a shape wrong.
    """
    vit, params, preprocessing = family_of(family or _detect(state)).read(state, **config)
    return Model(jax.tree.map(jnp.asarray, params), vit, Execution(dtype=dtype), preprocessing)


def describe(model: Model) -> dict:
    """What, beside its arrays, makes a model; the inverse of `restore`."""
    return {"config": model.config.to_json(), "preprocessing": dataclasses.asdict(model.preprocessing)}


def restore(description: dict, flat: Mapping[str, np.ndarray], *, where: str, dtype: str = "float32") -> Model:
    """The model of a description and its arrays by name; strict about names and shapes."""
    config = ViTConfig.from_json(description["config"])
    wanted = {name: leaf.shape for name, leaf in named(abstract_params(config)).items()}
    found = {name: np.shape(array) for name, array in flat.items()}
    wrong = [name for name in sorted(wanted.keys() | found.keys()) if wanted.get(name) != found.get(name)]
    if wrong:
        lines = [f"{n}: expected {wanted.get(n, 'nothing')}, found {found.get(n, 'nothing')}" for n in wrong[:8]]
        raise ValueError(f"{where}: the parameters do not fit the architecture: " + "; ".join(lines))
    params = unname({name: jnp.asarray(flat[name]) for name in wanted})
    return Model(params, config, Execution(dtype=dtype), Preprocess(**description["preprocessing"]))


def locate(model: Model) -> dict:
    """Where in a train state a model's leaves lie, for the checkpoint's meta.

    Args:
      model: what a recipe's `eval_model` makes of trees whose leaves are their own names ("extras/ema/norm/scale").

    Returns:
      {"item": the checkpoint item, "prefix": path of the tree inside it}, beside `describe(model)`.

    Raises:
      ValueError: if the model is no sub-tree of one item.
    """
    prefixes = {source.removesuffix(name) for name, source in named(model.params).items()}
    if len(prefixes) != 1:
        raise ValueError(
            f"eval_model must select one sub-tree of the state, this one takes from {sorted(prefixes)[:4]}"
        )
    item, _, prefix = prefixes.pop().partition("/")
    return describe(model) | {"item": item, "prefix": prefix}


def _from_workdir(folder: pathlib.Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Description and arrays of the model in a workdir's latest checkpoint."""
    with checkpoint.Checkpoints(folder, create=False) as checkpoints:
        description = checkpoints.meta()["model"]
        arrays = named(checkpoints.restore_item(description["item"]))
    prefix = description["prefix"]
    return description, {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _detect(state: Mapping[str, np.ndarray]) -> str:
    """The one family whose table accounts for every key.

    Raises:
      ValueError: if it is none, or more than one.
    """
    leftover = {name: family_of(name).unexplained(state) for name in FAMILIES}
    candidates = [name for name, keys in leftover.items() if not keys]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise ValueError(f"these keys fit several families ({', '.join(candidates)}): pass family=")
    nearest = min(leftover, key=lambda name: len(leftover[name]))
    raise ValueError(
        f"these keys fit none of the families {', '.join(FAMILIES)}; nearest is {nearest}, which does not know "
        f"{', '.join(leftover[nearest][:6])}"
    )
