"""Weights of other libraries as files: which file of a folder, the JSON beside it, our sidecar; read and written."""

import dataclasses
import json
import logging
import pathlib
from typing import Any

from regvit_jax.convert import family_of, files, sidecar
from regvit_jax.convert.detect import detect
from regvit_jax.convert.fit import Fitted, Flat
from regvit_jax.convert.flatfiles import parse_json
from regvit_jax.convert.origin import Origin
from regvit_jax.convert.shapes import PositionError
from regvit_jax.convert.table import Reading
from regvit_jax.data.transforms import Preprocess
from regvit_jax.models.config import ViTConfig
from regvit_jax.models.model import abstract_params
from regvit_jax.trees import named

LOOK = "preprocessor_config.json"
KINDS = {"safetensors": ".safetensors", "pth": ".pth", "npz": ".npz"}


@dataclasses.dataclass(frozen=True)
class Written:
    """What `write` left: the weights file, all files, the network as the format holds it, and what only the sidecar
    holds."""

    weights: pathlib.Path
    paths: tuple[pathlib.Path, ...]
    fitted: Fitted
    kept_aside: tuple[str, ...]


def read(
    path: pathlib.Path,
    family: str | None = None,
    container: str | None = None,
    hint: int | tuple[int, int] | None = None,
    **given: Any,
) -> Reading:
    """The network in a file or folder of another library.

    Args:
      path: .pth, .pt, .bin, .safetensors, .npz or index file, or a folder with one (Hugging Face's, timm's, ours).
      family: one of `convert.FAMILIES`; None: found by config.json, sidecar or keys.
      container: of several state dicts in one checkpoint, which ("teacher").
      hint: native image size, where position rows leave it open (more than one square grid, or none).
      **given: fields of ViTConfig that the files do not tell.

    Raises:
      ValueError: as `Family.read`, `detect` and `files.read` do.
    """
    weights = files.read(path, container=container)
    beside = _json_beside(weights)
    aside = sidecar.read(weights.files[0], weights.sha256) if len(weights.files) == 1 else None
    if aside is not None and family in (None, aside.family) and not given:
        reading = _with_sidecar(weights, beside, aside)
    else:
        known = set(given) | ({"image_size"} if hint is not None else set())
        name, why = (family, "it was given") if family else detect(weights.state, beside, known)
        logging.info("%s is read as %s: %s", path, name, why)
        try:
            reading = family_of(name).read(weights.state, files=beside, why=why, **given)
        except PositionError:
            if hint is None:
                raise
            reading = family_of(name).read(weights.state, files=beside, why=why, **(given | {"image_size": hint}))
    source = {"name": path.name, "sha256": weights.sha256, "container": weights.container}
    origin = dataclasses.replace(reading.origin, source=source, dropped=reading.origin.dropped | dict(weights.dropped))
    return dataclasses.replace(reading, origin=origin)


def write(
    path: pathlib.Path,
    family: str,
    config: ViTConfig,
    flat: Flat,
    preprocessing: Preprocess,
    origin: Origin | None = None,
    kind: str | None = None,
) -> Written:
    """Writes a network as another library's file or folder, with a sidecar that makes reading it back exact.

    Args:
      path: a file by its suffix (.pth, .safetensors, .npz), else a folder.
      family: one of `convert.FAMILIES`.
      config, flat, preprocessing: the network; float arrays by our names.
      origin: of the model, see `Family.write`.
      kind: "safetensors", "pth" or "npz"; None: the file's suffix, or what users of the family expect.

    Raises:
      ValueError: if the format cannot hold the network.
    """
    ours = family_of(family)
    fitted = ours.fitted(config, flat)
    before = origin.files if origin is not None and origin.family == family else {}
    beside = ours.to_files(fitted.config, preprocessing, before) if ours.to_files is not None else {}
    state = ours.write(fitted, origin)
    target = _target(path, ours.kind, kind)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Hugging Face asks safetensors for this word.
    files.write(target, state, {"format": "pt"} if target.suffix == ".safetensors" else None)
    dtypes = {name: str(array.dtype) for name, array in flat.items() if str(array.dtype) != "float32"}
    lost = sidecar.lost(flat, ours.arrays(state))
    model = {"config": config.to_json(), "preprocessing": dataclasses.asdict(preprocessing)}
    sidecar.write(target, sidecar.Sidecar(files.sha256_of(target), family, model, dtypes, lost))
    paths = [target, sidecar.path_of(target)]
    if target.parent == path:
        for name, said in beside.items():
            (path / name).write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")
            paths.append(path / name)
    return Written(target, tuple(paths), fitted, tuple(sorted(lost)))


def _with_sidecar(weights, beside: dict[str, dict], aside: sidecar.Sidecar) -> Reading:
    try:
        config = ViTConfig.from_json(aside.model["config"])
        look = Preprocess(**aside.model["preprocessing"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"the sidecar describes no model ({error}): remove it to read the weights alone") from error
    ours = family_of(aside.family)
    # Without these a state dict of unusual size could not be read at all; everything else is the sidecar's word.
    known = {"num_heads": config.num_heads, "image_size": config.image_size}
    reading = ours.read(weights.state, files=beside, why="its sidecar says so", **known)
    flat = sidecar.complete(aside, reading.flat)
    wanted = named(abstract_params(config))
    missing = [name for name in wanted if name not in flat or flat[name].shape != wanted[name].shape]
    if missing:
        raise ValueError(f"the sidecar does not fit its weights: {', '.join(missing[:6])}")
    return dataclasses.replace(reading, config=config, flat={name: flat[name] for name in wanted}, preprocessing=look)


def _json_beside(weights: files.Weights) -> dict[str, dict]:
    """The JSON files that describe weights, by name."""
    if weights.config is None:
        return {}
    look = weights.files[0].parent / LOOK
    return {"config.json": weights.config} | (
        {LOOK: parse_json(look.read_bytes(), str(look))} if look.is_file() else {}
    )


def _target(path: pathlib.Path, usual: str, kind: str | None) -> pathlib.Path:
    named_kind = next((kind for kind, suffix in KINDS.items() if path.suffix == suffix), None)
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind {kind!r} cannot be written; known: {', '.join(KINDS)}")
    if named_kind is not None and not path.is_dir():
        if kind not in (None, named_kind):
            raise ValueError(f"{path} is named as {named_kind}, {kind} was asked for")
        return path
    kind = kind or usual
    # Both libraries that read folders look for this name where there is no model.safetensors.
    name = "pytorch_model.bin" if kind == "pth" and usual == "safetensors" else f"model{KINDS[kind]}"
    return path / name
