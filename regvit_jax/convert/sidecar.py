"""What a foreign format cannot say about a model, in a small file beside its weights, so that reading them back gives
the same model to the last bit.

It holds architecture and preprocessing, and those parameters that the format folds, drops or rounds. It belongs to one
content of the weights file (by SHA-256): weights that were changed since are read without it.
"""

import dataclasses
import json
import logging
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from safetensors import safe_open

from regvit_jax.convert import files
from regvit_jax.convert.fit import Flat

FORMAT = 1
SUFFIX = ".sidecar"


@dataclasses.dataclass(frozen=True)
class Sidecar:
    """One sidecar.

    Attributes:
      weights: SHA-256 of the weights file, hexadecimal.
      family: whose format that is.
      model: architecture and preprocessing, as `hub.describe` gives them.
      dtypes: {our name: dtype} of parameters that are not float32.
      arrays: {our name: array} of the parameters that the format does not hold exactly.
    """

    weights: str
    family: str
    model: dict[str, Any]
    dtypes: dict[str, str]
    arrays: Flat


def lost(flat: Flat, readable: Iterable[tuple[str, np.ndarray]]) -> Flat:
    """The parameters that do not come back bit for bit.

    Args:
      flat: {our name: array}, of any float dtype.
      readable: (our name, float32 array) as the written weights give them.
    """
    left = dict(flat)
    for name, array in readable:
        if name in left and array.shape == left[name].shape:
            ours = left[name]
            if array.astype(ours.dtype).tobytes() == np.ascontiguousarray(ours).tobytes():
                del left[name]
    return left


def complete(sidecar: Sidecar, read: Flat) -> Flat:
    """All parameters of the model: what was read, and the sidecar's own in its place."""
    flat = read | sidecar.arrays
    return {name: flat[name].astype(_dtype(dtype)) for name, dtype in sidecar.dtypes.items()} | {
        name: array for name, array in flat.items() if name not in sidecar.dtypes
    }


def path_of(weights: pathlib.Path) -> pathlib.Path:
    return weights.with_name(weights.name + SUFFIX)


def write(weights: pathlib.Path, sidecar: Sidecar) -> None:
    """Puts a sidecar beside its weights file."""
    said = {"sidecar": FORMAT, "weights": sidecar.weights, "family": sidecar.family}
    said |= {"model": sidecar.model, "dtypes": sidecar.dtypes}
    files.write_safetensors(path_of(weights), sidecar.arrays, {"regvit_jax": json.dumps(said)})


def read(weights: pathlib.Path, sha256: str) -> Sidecar | None:
    """The sidecar of a weights file, None if there is none or it belongs to another content.

    Raises:
      ValueError: if it is damaged or of another version.
    """
    path = path_of(weights)
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as file:
            said = json.loads(file.metadata()["regvit_jax"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}
        version = said["sidecar"]
        found = Sidecar(said["weights"], said["family"], said["model"], said["dtypes"], arrays)
    except Exception as error:
        raise ValueError(f"{path} is no readable sidecar ({error}): remove it to read the weights alone") from error
    if version != FORMAT:
        raise ValueError(f"{path} has format {version}; this version reads {FORMAT}")
    if found.weights != sha256:
        logging.warning("%s belongs to other weights than %s holds now: it is ignored", path, weights.name)
        return None
    return found


def _dtype(name: str) -> np.dtype:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
