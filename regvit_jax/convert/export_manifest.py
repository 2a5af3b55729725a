"""What lies beside an exported program: its inputs, outputs and preprocessing as a manifest, code that runs it."""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from jax import export as jax_export

from regvit_jax.convert import certificate, files
from regvit_jax.models.model import Model

VERSION = 1
WINDOW = (
    "jax.export promises that JAX and jaxlib up to 6 months newer, or 3 weeks older, than those that exported can run "
    'the program (docs.jax.dev, "Compatibility guarantees")'
)


def make(
    model: Model,
    exported: jax_export.Exported,
    target: pathlib.Path,
    program: bytes,
    *,
    what: str,
    input: str,
    size: tuple[int, int],
    aside: pathlib.Path | None,
) -> dict[str, Any]:
    """The manifest of an export, as a JSON object.

    Args:
      model: what was exported.
      exported: the program.
      target: its file.
      program: the bytes of that file.
      what, input: as in `export_model`.
      size: (height, width) of the images in pixels.
      aside: the file of the weights; None where they are in the program.
    """
    look, square = model.preprocessing, size[0] == size[1]
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    said = {
        "regvit_export": VERSION,
        "format": "stablehlo",
        "what": what,
        "file": target.name,
        "bytes": len(program),
        "sha256": hashlib.sha256(program).hexdigest(),
        "weights": aside and {"file": aside.name, "bytes": aside.stat().st_size, "sha256": files.sha256_of(aside)},
        "platforms": list(exported.platforms),
        "inputs": {"images": _array(exported.in_avals[-1])},
        "outputs": {
            name: _array(outputs[name]) for name in ("logits", "cls", "registers", "patches") if name in outputs
        },
        "grid": list(model.config.grid_of(size)),
        "preprocessing": {
            "inside": input == "uint8",  # whether the program does this part: pixels / 255, less mean, over std
            "mean": list(look.mean),
            "std": list(look.std),
            "size": list(size),
            "resize_short_side": dataclasses.replace(look, size=size[0]).resize_size if square else None,
            "crop_ratio": look.crop_ratio,
            "interpolation": look.interpolation,
        },
        "dtype": model.run.dtype,
        "matmul_precision": str(jax.config.jax_default_matmul_precision or "default of the platform"),
        "calling_convention": {
            "version": exported.calling_convention_version,
            "readable_here": [
                jax_export.minimum_supported_calling_convention_version,
                jax_export.maximum_supported_calling_convention_version,
            ],
            "window": WINDOW,
        },
        "model": model.config.to_json(),
        "made_by": certificate.versions(),
    }
    return said | {"example": example(said)}


def table(manifest: Mapping[str, Any], folder: str | os.PathLike) -> str:
    """What `regvit export` prints: what it wrote into `folder`, and code that uses it."""
    folder = pathlib.Path(folder)
    aside, made_by = manifest["weights"], manifest["made_by"]

    def shapes(arrays):
        return ", ".join(
            f"{name} ({', '.join(map(str, array['shape']))}) {array['dtype']}" for name, array in arrays.items()
        )

    lines = {
        "program": f"{folder / manifest['file']}, {manifest['bytes'] / 1e6:.2f} MB",
        "weights": f"{folder / aside['file']}, {aside['bytes'] / 1e6:.2f} MB" if aside else "inside",
        "manifest": f"{folder / manifest['file']}.json",
        "input": shapes(manifest["inputs"]),
        "outputs": shapes(manifest["outputs"]),
        "platforms": ", ".join(manifest["platforms"]),
        "runs on": f"jax {made_by['jax']}, up to 6 months newer or 3 weeks older",
    }
    text = "\n".join(f"{name:<10} {value}" for name, value in lines.items())
    return f"{text}\n\n# Use it (pip install jax flatbuffers{' safetensors' if aside else ''}):\n" + example(
        manifest, folder
    )


def example(manifest: Mapping[str, Any], folder: str | os.PathLike = "") -> str:
    """A Python program that runs an export; it imports nothing of ours. `folder`: where the export lies."""
    look, aside = manifest["preprocessing"], manifest["weights"]
    batch, height, width, _ = manifest["inputs"]["images"]["shape"]
    shape = (2 if batch == "b" else batch, height, width, 3)
    how = f"{look['interpolation']}, " + (
        f"short side {look['resize_short_side']}, centre crop {height}"
        if look["resize_short_side"]
        else f"{height} x {width}"
    )
    lines = ["import jax", "import numpy as np", "from jax import export"]
    lines += ["from safetensors.flax import load_file"] if aside else []
    lines += ["", f"with open({str(pathlib.Path(folder, manifest['file']))!r}, 'rb') as file:"]
    lines += ["    program = export.deserialize(bytearray(file.read()))"]
    lines += [f"weights = load_file({str(pathlib.Path(folder, aside['file']))!r})"] if aside else []
    lines += [f"images = np.zeros({shape}, np.uint8)  # RGB pixels: {how}"]
    if not look["inside"]:
        mean, std = (f"np.float32({look[name]})" for name in ("mean", "std"))
        lines += [f"images = (images.astype(np.float32) / 255 - {mean}) / {std}"]
    lines += [f"outputs = jax.jit(program.call)({'weights, ' if aside else ''}images)"]
    lines += ["print({name: array.shape for name, array in outputs.items()})"]
    return "\n".join(lines) + "\n"


def _array(aval: Any) -> dict[str, Any]:
    return {"shape": [n if isinstance(n, int) else str(n) for n in aval.shape], "dtype": str(aval.dtype)}
