"""Models in and out: our own folders, training workdirs, weights of PyTorch libraries by file, folder or name."""

import dataclasses
import difflib
import json
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from regvit_jax import checkpoint, sharding
from regvit_jax.convert import FAMILIES, certificate, family_of, files, folder, graft, heads, released, verify
from regvit_jax.convert.detect import detect
from regvit_jax.convert.folder import Written
from regvit_jax.convert.origin import Origin
from regvit_jax.convert.table import Reading
from regvit_jax.data.transforms import Preprocess
from regvit_jax.models.config import Execution, ViTConfig
from regvit_jax.models.model import Model, abstract_params, init_params
from regvit_jax.trees import Tree, named, unname

FORMAT = 1
WEIGHTS, CONFIG = "params.safetensors", "model.json"


def save_model(model: Model, path: str | os.PathLike, format: str = "regvit", *, kind: str | None = None) -> None:
    """Writes a model for ourselves or for another library.

    Our own format is a folder of `model.json` (architecture, preprocessing) and `params.safetensors` (our names). Other
    formats get a sidecar beside the weights: what they cannot hold, so that `load_model` gives the same model to the
    last bit. Hugging Face and timm get the folder that they load, the others a weights file.

    Args:
      model: any Model.
      path: a folder, made if absent, its files of these names replaced; for other libraries also a file that ends in
        .pth, .safetensors or .npz.
      format: "regvit" or one of `regvit_jax.convert.FAMILIES`.
      kind: "safetensors", "pth" or "npz" for the weights file in a folder; None: what the library's users expect.

    Raises:
      ValueError: for an unknown format, or one that cannot hold this model (says why).
    """
    if format == "regvit":
        _write_own(model, pathlib.Path(path))
    elif format in FAMILIES:
        _write_foreign(model, pathlib.Path(path), format, kind)
    else:
        raise ValueError(f"format {format!r} cannot be written; known: 'regvit', {', '.join(map(repr, FAMILIES))}")


def load_model(
    path: str | os.PathLike,
    *,
    family: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    registers: int | None = None,
    head: str | os.PathLike | None = None,
    container: str | None = None,
    dtype: str = "float32",
    **config: Any,
) -> Model:
    """A model from a file, a folder, a training workdir or a released name.

    Args:
      path: a folder of `save_model`, a training workdir (its latest checkpoint), a folder of Hugging Face or timm, a
        .pth, .pt, .bin, .safetensors or .npz file, or a name such as "dinov2_vits14_reg4" (from the cache, else
        downloaded).
      family: one of `regvit_jax.convert.FAMILIES`, where files and keys cannot tell.
      image_size: side or (height, width) in pixels that shall be native: positions are resampled to it once, by the
        family's own rule, and `preprocess` crops to it. The network takes any other multiple of its patch too. Where
        position rows do not tell their native grid, it is this one.
      registers: adds so many freshly initialised registers to weights that have none (logged; they want training).
      head: file (or released name) of Meta's one-layer linear classifier for these weights.
      container: which of several state dicts in a checkpoint ("teacher").
      dtype: of the computation, "float32" or "bfloat16".
      **config: fields of ViTConfig that the weights cannot tell: num_heads of an unusual width, resampler.

    Raises:
      FileNotFoundError: if the path holds no model; says what was looked for.
      ValueError: if the weights do not fit, or more than one family explains them; says what is wrong.
    """
    model = _open(path, family, container, image_size, dtype, config)
    notes: list[str] = []
    if head is not None:
        file = released.fetch(str(head)) if str(head) in released.RELEASED else pathlib.Path(head)
        model = heads.attach(model, heads.read(files.read(file).state))
        notes.append(f"the linear classifier {file.name} was attached")
    if registers is not None:
        model, added = graft.add_registers(model, registers)
        notes += added
    if image_size is not None:
        model, resized = graft.resize(model, image_size)
        notes += resized
    for note in notes:
        logging.info("%s: %s", path, note)
    return model if model.origin is None else dataclasses.replace(model, origin=model.origin.noted(*notes))


def load_trained(path: str | os.PathLike) -> tuple[Model, dict[str, Tree]]:
    """(model, {name: tree}) of whatever `load_model` takes.

    The trees are what a training workdir holds beside the backbone of its model, such as the projection heads of a
    teacher, as NumPy arrays; {} where there is nothing.

    Raises:
      FileNotFoundError, ValueError: as `load_model` does.
    """
    place = pathlib.Path(path)
    if (place / CONFIG).is_file() or not (place / "checkpoints").is_dir():
        return load_model(path), {}
    description, arrays = _newest(place)
    parent = description["prefix"].rstrip("/").rpartition("/")[0]
    heads = {}
    if parent:
        beside = [n for n in arrays if n.startswith(f"{parent}/") and not n.startswith(description["prefix"])]
        heads = unname({name.removeprefix(f"{parent}/"): arrays[name] for name in beside})
    return _in_state(description, arrays, place, "float32"), heads


def from_torch(
    state: Mapping[str, np.ndarray], family: str | None = None, *, dtype: str = "float32", **config: Any
) -> Model:
    """A model from a PyTorch state dict of NumPy arrays.

    Args:
      state: {name: array} under the names of its library, torch shapes.
      family: one of `regvit_jax.convert.FAMILIES`; None: the one family whose table accounts for every key.
      dtype: of the computation.
      **config: fields of ViTConfig that a state dict cannot tell: num_heads of an unusual width, image_size of a native
        grid that is no square, resampler, norm_eps.

    Raises:
      ValueError: if no family or more than one explains the keys (lists the candidates), a key is left over, a
        parameter not filled, or a shape wrong.
    """
    state = {key: np.asarray(array) for key, array in state.items()}
    name, why = (family, "it was given") if family else detect(state, given=config)
    return _model(family_of(name).read(state, why=why, **config), dtype)


def to_torch(model: Model, family: str | None = None) -> dict[str, np.ndarray]:
    """The state dict of a model under the names of a PyTorch library: contiguous arrays, torch shapes.

    Weights that came from that family get back their own names (prefixes, chunks) and number formats. What the family
    has no place for is folded where the tokens stay the same, left out if it is a head, else refused.

    Args:
      model: any Model.
      family: one of `regvit_jax.convert.FAMILIES`; None: the one the weights came from.

    Raises:
      ValueError: if the family cannot hold the model, or none is given and none is known.
    """
    if family is None and model.origin is None:
        raise ValueError(f"this model did not come from another library: pass family=, one of {', '.join(FAMILIES)}")
    ours = family_of(family or model.origin.family)
    fitted = ours.fitted(model.config, _arrays(model))
    for note in fitted.notes:
        logging.info("as %s: %s", ours.name, note)
    state = ours.write(fitted, model.origin)
    # Views of JAX's own memory are not handed out: torch.from_numpy would let PyTorch write into it.
    return {name: array if array.flags.writeable else array.copy() for name, array in state.items()}


def convert(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    to: str,
    *,
    kind: str | None = None,
    with_torch: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Converts weights into a folder, proves it, and leaves certificate.json there; the body of `regvit convert`.

    Args:
      src: whatever `load_model` takes.
      dst: the folder; new, empty, or of an earlier conversion of the same weights to the same format.
      to: "regvit" or one of `regvit_jax.convert.FAMILIES`.
      kind: as in `save_model`.
      with_torch: also runs the original in PyTorch, in a process of its own, and puts the differences into the
        certificate.
      **options: of `load_model`: family, registers, image_size, head, num_heads, …

    Returns:
      The certificate; `regvit_jax.convert.certificate.table` prints it.

    Raises:
      ValueError: if `dst` holds something else, PyTorch was asked for and is not there (then nothing is written), or as
        `load_model` and `save_model` do.
    """
    target = pathlib.Path(dst)
    if to not in ("regvit", *FAMILIES):
        raise ValueError(f"format {to!r} cannot be written; known: 'regvit', {', '.join(map(repr, FAMILIES))}")
    if with_torch:
        verify.require()
    model = load_model(src, **options)
    verified = _verified(src, model, options) if with_torch else None
    source = dict(model.origin.source) if model.origin else _own_source(pathlib.Path(src), model)
    certificate.make_room(target, source, to)
    written = _write_foreign(model, target, to, kind) if to != "regvit" else None
    paths = written.paths if written else _write_own(model, target)
    said = certificate.make(
        model,
        source=source,
        target=to,
        written=written,
        files={path.name: files.sha256_of(path) for path in paths},
    )
    said["read_back"] = _read_back(model, target)
    said["verify"] = verified
    if written is not None and (written.kept_aside or written.fitted.resampler):
        bare = family_of(to).read(
            files.read(written.weights).state,
            num_heads=model.config.num_heads,
            image_size=model.config.image_size,
            norm_eps=model.config.norm_eps,
            activation=model.config.activation,
        )
        said["without_sidecar"] = certificate.difference(model, _model(bare, model.run.dtype))
    (target / certificate.NAME).write_text(json.dumps(said, indent=2) + "\n")
    return said


def untrained(model: Model, seed: int = 0) -> Model:
    """The same network with fresh weights: what a trained one has to beat."""
    params = sharding.jit_once(init_params, static_argnums=0)(model.config, jax.random.key(seed))
    return dataclasses.replace(model, params=params, origin=None)


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


def _open(
    path: str | os.PathLike,
    family: str | None,
    container: str | None,
    image_size: int | tuple[int, int] | None,
    dtype: str,
    config: dict[str, Any],
) -> Model:
    place = pathlib.Path(path)
    if (place / CONFIG).is_file() or (place / "checkpoints").is_dir():
        if family is not None or container is not None or config:
            given = [name for name, value in (("family", family), ("container", container)) if value is not None]
            raise ValueError(f"{place} says itself what it is: leave out {', '.join([*given, *config])}")
        return _read_own(place, dtype) if (place / CONFIG).is_file() else _from_workdir(place, dtype)
    if not place.exists() and str(path) in released.RELEASED:
        # Of what its authors released the family is known, where keys alone would not tell it.
        family = family or released.RELEASED[str(path)].family
        if family == "linear_head":
            raise ValueError(f"{path} is a classifier without its network: load_model(network, head={str(path)!r})")
        place = released.fetch(str(path))
    elif not place.exists():
        near = difflib.get_close_matches(str(path), released.RELEASED, n=3, cutoff=0.6)
        raise FileNotFoundError(
            f"{path} does not exist, and no weights were released under that name"
            + (f"; nearest: {', '.join(near)}" if near else "")
        )
    try:
        return _model(folder.read(place, family, container, image_size, **config), dtype)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{place} holds no model: expected {CONFIG} and {WEIGHTS} (rv.save_model), a training workdir with "
            f"checkpoints/, or weights of another library: {error}"
        ) from error


def _model(reading: Reading, dtype: str) -> Model:
    flat = reading.flat
    # One array at a time: the NumPy copy goes when its JAX array is there.
    params = unname({name: jnp.asarray(flat.pop(name)) for name in list(flat)})
    return Model(params, reading.config, Execution(dtype=dtype), reading.preprocessing, reading.origin)


def _arrays(model: Model) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in named(model.params).items()}


def _write_own(model: Model, target: pathlib.Path) -> tuple[pathlib.Path, ...]:
    target.mkdir(parents=True, exist_ok=True)
    files.write_safetensors(target / WEIGHTS, _arrays(model))
    origin = {"origin": model.origin.to_json()} if model.origin else {}
    (target / CONFIG).write_text(json.dumps({"format": FORMAT} | describe(model) | origin, indent=2) + "\n")
    return target / WEIGHTS, target / CONFIG


def _read_own(place: pathlib.Path, dtype: str) -> Model:
    description = json.loads((place / CONFIG).read_text())
    if description["format"] != FORMAT:
        raise ValueError(f"{place / CONFIG} has format {description['format']}; this version reads {FORMAT}")
    model = restore(description, files.read(place / WEIGHTS).state, where=str(place), dtype=dtype)
    if "origin" not in description:
        return model
    return dataclasses.replace(model, origin=Origin.from_json(description["origin"]))


def _write_foreign(model: Model, path: pathlib.Path, family: str, kind: str | None) -> Written:
    flat = _arrays(model)
    return folder.write(path, family, model.config, flat, model.preprocessing, model.origin, kind)


def _from_workdir(place: pathlib.Path, dtype: str) -> Model:
    """The model in a workdir's latest checkpoint."""
    return _in_state(*_newest(place), place, dtype)


def _newest(place: pathlib.Path) -> tuple[dict, dict[str, np.ndarray]]:
    """The description of the model in a workdir's latest checkpoint, and the arrays of the item that holds it."""
    with checkpoint.Checkpoints(place, create=False) as checkpoints:

        def read(step):
            description = checkpoints.meta(step)["model"]
            return description, named(checkpoints.restore_item(description["item"], step))

        return checkpoints.newest(read)


def _in_state(description: dict, arrays: Mapping[str, np.ndarray], place: pathlib.Path, dtype: str) -> Model:
    prefix = description["prefix"]
    flat = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    return restore(description, flat, where=str(place), dtype=dtype)


def _own_source(place: pathlib.Path, model: Model) -> dict[str, str]:
    """Name and hash of what had no weights file of another library: of its parameters, wherever they lay."""
    container = "regvit" if (place / CONFIG).is_file() else "workdir"
    return {"name": place.name, "sha256": certificate.fingerprint(_arrays(model)), "container": container}


def _verified(src: str | os.PathLike, model: Model, options: dict[str, Any]) -> dict[str, Any]:
    """The original beside the model as it was read: before anything was added to it or resampled."""
    place = pathlib.Path(src) if pathlib.Path(src).exists() else released.fetch(str(src))
    if model.origin is None or (place / CONFIG).is_file():
        raise ValueError(f"--verify=torch: {src} is in our own format, there is no original of it to run")
    asked = {"container": None, "image_size": None} | options
    if asked.keys() & {"registers", "head"} or asked["image_size"] is not None:
        taken = ("family", "container", "image_size", "registers", "head", "dtype")
        config = {name: value for name, value in options.items() if name not in taken}
        model = _open(place, model.origin.family, asked["container"], asked["image_size"], "float32", config)
    return verify.against_torch(model, place)


def _read_back(model: Model, target: pathlib.Path) -> str:
    """ "exact", once the written folder has given the same model to the last bit."""
    again = load_model(target, dtype=model.run.dtype)
    ours, theirs = _arrays(model), _arrays(again)
    same = ours.keys() == theirs.keys() and (model.config, model.preprocessing) == (again.config, again.preprocessing)
    changed = [n for n in ours if same and (ours[n].dtype, ours[n].tobytes()) != (theirs[n].dtype, theirs[n].tobytes())]
    if not same or changed:
        raise RuntimeError(f"{target} does not read back as it was written: {changed[:4] or 'another architecture'}")
    return "exact"
