"""A model as a file that needs none of our code: a StableHLO program with its weights, for CPUs, GPUs and TPUs alike.

`jax.export.deserialize` reads it wherever JAX and flatbuffers are installed; beside it lies a manifest (JSON) with
everything else a user has to know.
"""

import dataclasses
import json
import logging
import os
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export
from jax.sharding import Mesh

from regvit_jax import sharding
from regvit_jax.convert import export_manifest, files
from regvit_jax.models.config import Execution
from regvit_jax.models.model import Model
from regvit_jax.models.vit import Tokens
from regvit_jax.trees import Array, named, unname

FORMATS = ("stablehlo",)
WHAT = ("features", "classifier")
INPUTS = ("normalized", "uint8")
WEIGHTS = ("auto", "inside", "beside")
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
NAME = "model.stablehlo"  # of the program, where only a folder is given

# Up to so many bytes of weights "auto" puts them into the program. One file is handy, constants are dear to compile,
# and that once for every batch size: to load and run ViT-B (343 MB) took 34 s and 2.0 GB of memory on 2 busy CPU cores;
# with weights as arguments 9 s and 1.1 GB.
INSIDE = 512 << 20
# A flatbuffer ends at 2 GiB, and so does an HLO protobuf; the program itself takes well under 1 MiB.
LARGEST = (2 << 30) - (16 << 20)


def export_model(
    model: Model,
    path: str | os.PathLike,
    format: str = "stablehlo",
    *,
    what: str = "features",
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    batch: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    dtype: str | None = None,
    input: str = "normalized",
    weights: str = "auto",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes a model as a program that `jax.export.deserialize(...).call(images)` runs; the body of `regvit export`.

    The program is deterministic and belongs to one device; whatever mesh is in use, and whatever the machine that
    exports has, it is the same. Attention is XLA's, which every platform has.

    Args:
      model: any Model.
      path: the file to write, or an existing folder, for `model.stablehlo` in it. The manifest is PATH.json; weights
        that do not fit into the program are PATH.safetensors.
      format: "stablehlo".
      what: "features": {"cls": (B, D), "registers": (B, R, D), "patches": (B, P, D)}, without "cls" for a model that
        has none; "classifier": {"logits": (B, C) float32}.
      platforms: where it shall run, of "cpu", "cuda", "rocm", "tpu".
      batch: the one batch size it takes; None: any.
      image_size: side or (height, width) of the images in pixels; None: the side of `model.preprocessing`.
      dtype: of the computation and of the stored matrices, "float32" or "bfloat16"; None: the model's.
      input: "normalized", (B, H, W, 3) float32 as `model.preprocess` makes them, or "uint8", RGB pixels, resized and
        cropped, which the program normalises.
      weights: "inside" the program, "beside" it (then it is called as `call(weights, images)`), or "auto": inside up to
        512 MiB.
      overwrite: also replaces files that are not an earlier, unchanged export.

    Returns:
      The manifest; `export_manifest.table` prints it.

    Raises:
      ValueError: for a choice that is not offered (lists what is), a size that is no multiple of the patch, a
        classifier of a model without head, or weights too large for inside.
      FileExistsError: if `path`, or a file to be written beside it, is no earlier, unchanged export.
      OSError: if it cannot be written; before anything is computed.
    """
    for name, value, known in (
        ("format", format, FORMATS),
        ("what", what, WHAT),
        ("input", input, INPUTS),
        ("weights", weights, WEIGHTS),
    ):
        if value not in known:
            raise ValueError(f"{name} {value!r} is not one of {', '.join(map(repr, known))}")
    platforms = _checked_platforms(platforms)
    if batch is not None and batch < 1:
        raise ValueError(f"batch is 1 or more, got {batch}; leave it out for any size")
    if what == "classifier" and not model.config.num_classes:
        raise ValueError(
            "this model has no classification head (num_classes is 0): export features, or load it with head="
        )
    size = image_size if image_size is not None else model.preprocessing.size
    size = (size, size) if isinstance(size, int) else tuple(size)
    model.config.grid_of(size)
    model = _alone(model, dtype or model.run.dtype)
    flat = named(model.params)
    inside = _inside(sum(array.nbytes for array in flat.values()), weights)
    target = pathlib.Path(path).expanduser()
    target = target / NAME if target.is_dir() else target
    aside = _beside(target, ".safetensors")
    stale = _make_room(target, [target, _beside(target, ".json"), *([] if inside else [aside])], overwrite)

    exported = _lower(model, flat, what, input, inside, size, batch, platforms)
    program = bytes(exported.serialize())
    for old in stale:
        old.unlink()
    if not inside:
        files.write_safetensors(aside, flat)
    _write(target, program)
    said = export_manifest.make(
        model, exported, target, program, what=what, input=input, size=size, aside=None if inside else aside
    )
    text = json.dumps(said, indent=2) + "\n"
    _write(_beside(target, ".json"), text.encode())
    logging.info("exported %s to %s", model, target)
    return json.loads(text)


def _checked_platforms(platforms: Sequence[str]) -> tuple[str, ...]:
    asked = (platforms,) if isinstance(platforms, str) else tuple(platforms)
    unknown = [name for name in asked if name not in PLATFORMS]
    if unknown or not asked or len(set(asked)) < len(asked):
        raise ValueError(f"platforms are some of {', '.join(map(repr, PLATFORMS))}, each once; got {asked}")
    return asked


def _alone(model: Model, dtype: str) -> Model:
    """The model with whole NumPy arrays of any mesh, and nothing in it that depends on this machine's devices."""
    whole = dataclasses.replace(model, params=sharding.gather(model.params)).astype(dtype)
    return dataclasses.replace(whole, run=Execution(dtype=dtype, attention="xla"))


def _inside(size: int, weights: str) -> bool:
    if weights == "inside" and size > LARGEST:
        raise ValueError(
            f"{size / 2**30:.2f} GiB of weights do not fit into one program, whose file format ends at "
            f"{LARGEST / 2**30:.2f} GiB: export with weights 'beside', or dtype 'bfloat16'"
        )
    return weights == "inside" or (weights == "auto" and size <= min(INSIDE, LARGEST))


def _lower(
    model: Model,
    flat: Mapping[str, np.ndarray],
    what: str,
    input: str,
    inside: bool,
    size: tuple[int, int],
    batch: int | None,
    platforms: tuple[str, ...],
) -> jax_export.Exported:
    look = model.preprocessing

    def compute(weights: Mapping[str, Array], images: Array) -> dict[str, Array]:
        if input == "uint8":
            mean, std = (jnp.asarray(value, jnp.float32) for value in (look.mean, look.std))
            images = (images.astype(jnp.float32) / 255.0 - mean) / std
        module = dataclasses.replace(model, params=unname(weights)).module()
        tokens = module(images)
        return {"logits": module.logits(tokens)} if what == "classifier" else _features(tokens)

    def closed(images: Array) -> dict[str, Array]:
        return compute({name: jnp.asarray(array) for name, array in flat.items()}, images)

    program = closed if inside else compute
    program.__name__ = program.__qualname__ = what
    (rows,) = jax_export.symbolic_shape("b") if batch is None else (batch,)
    images = jax.ShapeDtypeStruct((rows, *size, 3), np.uint8 if input == "uint8" else np.float32)
    given = () if inside else ({name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in flat.items()},)
    # Under a mesh, constraints of the forward pass would bind the program to so many devices.
    with jax.set_mesh(Mesh(np.empty((), object), ())):
        return jax_export.export(jax.jit(program), platforms=platforms)(*given, images)


def _features(tokens: Tokens) -> dict[str, Array]:
    found = {"cls": tokens.cls, "registers": tokens.registers, "patches": tokens.patches}
    return {name: array for name, array in found.items() if array is not None}


def _beside(target: pathlib.Path, suffix: str) -> pathlib.Path:
    return target.with_name(target.name + suffix)


def _make_room(target: pathlib.Path, wanted: Sequence[pathlib.Path], overwrite: bool) -> list[pathlib.Path]:
    """Sees to it that `wanted` can be written. Returns what an earlier export left that this one does not replace."""
    mine = _earlier(target)
    strange = [path for path in wanted if path.exists() and path not in mine]
    if strange and not overwrite:
        raise FileExistsError(
            f"{strange[0]} exists and is no earlier, unchanged export: choose another name, or say overwrite"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=target.parent):
        pass
    return [path for path in mine if path not in wanted]


def _earlier(target: pathlib.Path) -> list[pathlib.Path]:
    """The files of the export at `target`, if its manifest is ours and they are as it says."""
    manifest = _beside(target, ".json")
    try:
        said = json.loads(manifest.read_bytes())
        parts = {target: said["sha256"]} if said["regvit_export"] else {}
        if said["weights"]:
            parts[_beside(target, ".safetensors")] = said["weights"]["sha256"]
        whole = all(files.sha256_of(path) == sha256 for path, sha256 in parts.items())
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [*parts, manifest] if whole and parts else []


def _write(path: pathlib.Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)
