"""certificate.json: what a conversion did, and what the model computes on fixed inputs, so that anyone can check it."""

import contextlib
import hashlib
import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from regvit_jax.convert.files import EXTENSIONS
from regvit_jax.convert.folder import Written
from regvit_jax.convert.origin import Origin
from regvit_jax.models.config import ViTConfig
from regvit_jax.models.model import Model, abstract_params
from regvit_jax.models.vit import Tokens
from regvit_jax.trees import named

NAME = "certificate.json"
VERSION = 1
SAMPLES = 16


def fixed_input(size: tuple[int, int]) -> np.ndarray:
    """(1, H, W, 3) float32 in [-2, 2), the same bits everywhere: Weyl's sequence of the golden ratio over the index."""
    index = np.arange(size[0] * size[1] * 3, dtype=np.uint64)
    turns = (index * np.uint64(2654435761) & np.uint64(0xFFFFFFFF)).astype(np.float64) / 2**32
    return (4 * turns - 2).astype(np.float32).reshape(1, *size, 3)


def sizes_of(config: ViTConfig) -> list[tuple[int, int]]:
    """The native size and a smaller one that is no square, where positions are resampled."""
    (h, w), p = config.grid, config.patch_size
    return [config.image_size, (max(1, h // 2) * p, (max(1, w // 2) + 1) * p)]


def outputs(model: Model) -> list[dict[str, Any]]:
    """What the model makes of the fixed inputs: exact hashes, and numbers to compare within a tolerance elsewhere."""
    found = []
    with jax.default_matmul_precision("highest"):
        for size in sizes_of(model.config):
            array = sequence(model(fixed_input(size)))
            flat = array.reshape(-1).astype(np.float64)
            picked = np.linspace(0, flat.size - 1, SAMPLES).astype(int)
            found.append(
                {
                    "input": "regvit_jax.convert.certificate.fixed_input",
                    "size": list(size),
                    "shape": list(array.shape),
                    "dtype": str(array.dtype),
                    "sha256": hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest(),
                    "mean": float(flat.mean()),
                    "std": float(flat.std()),
                    "max_abs": float(np.abs(flat).max()),
                    "samples": {str(i): float(flat[i]) for i in picked},
                }
            )
    return found


def difference(one: Model, other: Model) -> dict[str, float]:
    """{"HxW": greatest absolute difference of any token} on the fixed inputs."""
    out = {}
    with jax.default_matmul_precision("highest"):
        for size in sizes_of(one.config):
            a, b = (sequence(model(fixed_input(size))).astype(np.float64) for model in (one, other))
            out[f"{size[0]}x{size[1]}"] = float(np.abs(a - b).max())
    return out


def sequence(tokens: Tokens) -> np.ndarray:
    """(B, N, D): [cls, registers, patches]."""
    parts = [] if tokens.cls is None else [tokens.cls[:, None]]
    return np.concatenate([np.asarray(part) for part in (*parts, tokens.registers, tokens.patches)], axis=1)


def fingerprint(flat: Mapping[str, np.ndarray]) -> str:
    """Hexadecimal SHA-256 over names, dtypes, shapes and bytes of arrays, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(flat):
        array = np.ascontiguousarray(flat[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.view(np.uint8).reshape(-1) if array.size else b"")
    return digest.hexdigest()


def make(
    model: Model, *, source: dict[str, str], target: str, written: Written | None, files: dict[str, str]
) -> dict[str, Any]:
    """The certificate of a conversion, as a JSON object.

    Args:
      model: what was written.
      source: name and SHA-256 of what was read.
      target: the family it was written as, or "regvit".
      written: from `folder.write`; None for our own format.
      files: {name: SHA-256} of the written files.
    """
    origin: Origin | None = model.origin
    flat = {name: np.asarray(leaf) for name, leaf in named(model.params).items()}
    return {
        "certificate": VERSION,
        "source": source,
        "family": {"name": origin.family, "why": origin.why} if origin else {"name": "regvit", "why": "our own format"},
        "target": {"family": target, "files": files},
        "config": model.config.to_json(),
        "preprocessing": {
            "size": model.preprocessing.size,
            "crop_ratio": model.preprocessing.crop_ratio,
            "interpolation": model.preprocessing.interpolation,
            "mean": list(model.preprocessing.mean),
            "std": list(model.preprocessing.std),
        },
        "keys": {
            "consumed": [own for own, _ in origin.keys.values()] if origin else [],
            "dropped": dict(origin.dropped) if origin else {},
            "filled": {name: list(leaf.shape) for name, leaf in named(abstract_params(model.config)).items()},
        },
        "notes": [*(origin.notes if origin else ()), *(written.fitted.notes if written else ())],
        "kept_aside": list(written.kept_aside) if written else [],
        "parameters": {"count": model.num_params, "sha256": fingerprint(flat)},
        "outputs": outputs(model),
        "read_back": None,
        "without_sidecar": None,
        "verify": None,
        "made_by": versions(),
    }


def make_room(target: pathlib.Path, source: dict[str, str], to: str) -> None:
    """Empties the folder of an earlier conversion of the same weights to the same family.

    Raises:
      ValueError: for a folder that holds anything else, or a path that is meant as a file.
    """
    if target.suffix in EXTENSIONS:
        raise ValueError(f"{target}: a conversion makes a folder; leave out {target.suffix}")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if (target / NAME).is_file():
        before = json.loads((target / NAME).read_text())
        if before["source"]["sha256"] == source["sha256"] and before["target"]["family"] == to:
            for name in before["target"]["files"]:
                (target / pathlib.Path(name).name).unlink(missing_ok=True)
            return
        raise ValueError(
            f"{target} holds {before['source']['name']} as {before['target']['family']}, not {source['name']} as {to}: "
            "choose another folder, or remove it"
        )
    raise ValueError(f"{target} exists and is not of a conversion of these weights: choose another folder")


def versions() -> dict[str, str]:
    """What made a certificate: packages, Python, machine."""
    found = {"regvit_jax": "a checkout"}
    for name in ("regvit_jax", "jax", "jaxlib", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    device = jax.devices()[0].device_kind
    return found | {"python": platform.python_version(), "machine": platform.machine(), "device": device}


def table(certificate: Mapping[str, Any]) -> str:
    """The few lines that `regvit convert` prints."""
    config = ViTConfig.from_json(certificate["config"])
    (h, w), (height, width) = config.grid, config.image_size
    position = {
        "patches": "patches only",
        "cls": "class token and patches",
        "all": "every token",
        "none": "none",
    }[config.position]
    family, target = certificate["family"], certificate["target"]
    lines = {
        "family": f"{family['name']} -> {target['family']}",
        "parameters": f"{certificate['parameters']['count']:,}",
        "registers": str(config.registers),
        "positions": f"{position}, {h} x {w} ({height} x {width} px), {config.resampler}",
        "keys": f"{len(certificate['keys']['consumed'])} consumed, {len(certificate['keys']['dropped'])} dropped",
        "certificate": result(certificate),
    }
    notes = "".join(f"\n  note: {note}" for note in certificate["notes"])
    return "\n".join(f"{name:<12} {text}" for name, text in lines.items()) + notes


def result(certificate: Mapping[str, Any]) -> str:
    """One line: whether reading back is exact, what PyTorch says, and how far the format alone computes the same."""
    text = f"read back {certificate['read_back']}"
    if certificate["verify"] is not None:
        text += f"; {_against_torch(certificate['verify'])}"
    without = certificate["without_sidecar"]
    if without is None:
        return text
    away = ", ".join(f"{value:.1e} at {size}" for size, value in without.items())
    return f"{text}; without the sidecar tokens differ by {away}"


def _against_torch(verified: Mapping[str, Any]) -> str:
    """One line of the errors."""
    library = " ".join(f"{name} {version}" for name, version in verified["library"].items())
    parts = [
        f"{size}: blocks {max(block['max_abs'] for block in found['blocks']):.1e}, "
        f"tokens {found['tokens']['max_abs']:.1e}"
        for size, found in verified["sizes"].items()
    ]
    verdict = "equals" if verified["agrees"] else "DIFFERS FROM"
    return f"{verdict} the original ({library}); greatest difference {'; '.join(parts)}"
