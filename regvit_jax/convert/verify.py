"""Beside the original: a weights file in the PyTorch library it belongs to, and in ours, on the same fixed inputs.

This package never imports PyTorch into its own process. The original runs in a child, `original`, which reads the file
with PyTorch's own reader and builds the network with the library's own code; what they say is compared here.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from regvit_jax.convert import certificate, family_of, files, huggingface_config, timm_config
from regvit_jax.models.config import ViTConfig
from regvit_jax.models.model import Model
from regvit_jax.trees import named

LIBRARIES = {"huggingface": "transformers", "dinov2": "timm", "timm": "timm", "deit3": "timm", "dino": "timm"}
# Of the largest token. Float32 stays below 1e-4 over 40 blocks; a wrong rule anywhere shows as 1e-2 or more.
TOLERANCE = 1e-3
REMEDY = "pip install 'regvit_jax[parity]' brings what it needs, or leave --verify out"


def require(family: str | None = None) -> None:
    """Asks, without importing anything, for PyTorch and for the library that knows a family.

    Raises:
      ValueError: if one is not installed; says what to do.
    """
    names = ("torch", *([LIBRARIES[family]] if family else []))
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    if absent:
        raise ValueError(
            f"--verify=torch runs the original in PyTorch, and {' and '.join(absent)} is not installed here: {REMEDY}"
        )


def against_torch(model: Model, path: str | os.PathLike) -> dict[str, Any]:
    """The `verify` field of a certificate: how far a model is from the original, on `certificate.fixed_input`.

    Args:
      model: as it was read from `path`, nothing added to it and nothing resampled.
      path: the file or folder of another library.

    Returns:
      {"library": names and versions, "read_by": who read the file there, "sizes": {"HxW": {"blocks": [error, ...],
      "tokens": error, "logits": error if there is a head}}, "left_out": {what: why}, "tolerance", "agrees"}, where an
      error is {"max_abs", "max_rel"}: see `error`.

    Raises:
      ValueError: if a library is absent or the original cannot be built; says why.
    """
    require(model.origin.family)
    sizes, left_out = _sizes(model)
    inputs = {_name(size): certificate.fixed_input(size) for size in sizes}
    theirs, said = _in_a_child(_request(model, files.read(path, model.origin.source["container"] or None)), inputs)
    found = {}
    names = tuple(f"block{i}" for i in range(model.config.depth))
    with jax.default_matmul_precision("highest"):
        for size, images in inputs.items():
            tokens, streams = model(images, capture=names)
            found[size] = {
                "blocks": [error(streams[name], theirs[f"{size}/{name}"]) for name in names],
                "tokens": error(certificate.sequence(tokens), theirs[f"{size}/tokens"]),
            }
            if model.config.num_classes:
                found[size]["logits"] = error(model.logits(images), theirs[f"{size}/logits"])
    worst = max(part["max_rel"] for size in found.values() for name, part in size.items() if name != "blocks")
    return said | {
        "input": "regvit_jax.convert.certificate.fixed_input",
        "sizes": found,
        "left_out": left_out,
        "tolerance": TOLERANCE,
        "agrees": bool(worst <= TOLERANCE),
    }


def error(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Greatest absolute difference, and the same in units of the original's greatest absolute value.

    Raises:
      ValueError: if the shapes differ.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"the original gives {theirs.shape} where we give {ours.shape}")
    away = float(np.abs(ours - theirs).max())
    # NaN on either side must not look like agreement.
    away = away if np.isfinite(away) else float("inf")
    return {"max_abs": away, "max_rel": away / max(float(np.abs(theirs).max()), 1e-30)}


def _sizes(model: Model) -> tuple[list[tuple[int, int]], dict[str, str]]:
    """Image sizes at which the library follows the same rule as the family's own code, and why not the others."""
    config, family = model.config, model.origin.family
    native, other = certificate.sizes_of(config)
    if LIBRARIES[family] == "timm":
        theirs = "antialias"
    else:
        theirs = family_of(family).configure({"register_tokens": ()} if config.registers else {})["resampler"]
    if config.position == "none" or config.resampler == theirs or native == other:
        return [native, other], {}
    why = f"{LIBRARIES[family]} resamples positions as {theirs}, this model as {config.resampler}"
    return [native], {_name(other): why}


def _request(model: Model, weights: files.Weights) -> dict[str, Any]:
    """What the child has to know: which file, which keys of it under which names, which network."""
    origin, ours = model.origin, family_of(model.origin.family)
    # A sidecar may have said more about the model than the file itself holds.
    config = ours.fitted(model.config, {name: np.asarray(leaf) for name, leaf in named(model.params).items()}).config
    out = {
        "files": [str(file.resolve()) for file in weights.files],
        "container": weights.container,
        "keys": {key: own for key, (own, _) in origin.keys.items()},
        "family": origin.family,
        "head": bool(config.num_classes),
    }
    own = origin.files["config.json"] if "config.json" in origin.files else None
    if origin.family == "huggingface":
        return out | {"config": own or huggingface_config.write(config, model.preprocessing, {})["config.json"]}
    if own is None or origin.family != "timm":
        own = timm_config.write(_as_timm(config, origin.family), model.preprocessing, {})["config.json"]
    return out | {"config": own}


def _as_timm(config: ViTConfig, family: str) -> ViTConfig:
    """The architecture that timm's own importer makes of a family: it adds the class token's position into it."""
    folded = family == "dinov2" and config.registers
    return dataclasses.replace(config, mask_token=False, position="patches" if folded else config.position)


def _in_a_child(request: dict[str, Any], inputs: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict]:
    """`original` in a new interpreter: its arrays, and what it says about itself."""
    program = "import sys; from regvit_jax.convert import verify; verify.original(sys.argv[1])"
    home = str(pathlib.Path(__file__).parents[2])
    here = os.environ["PYTHONPATH"] if "PYTHONPATH" in os.environ else ""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [here, home])),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",  # Both on the CPU: an accelerator multiplies less exactly.
    }
    with tempfile.TemporaryDirectory(prefix="regvit_verify_") as folder:
        place = pathlib.Path(folder)
        (place / "request.json").write_text(json.dumps(request | {"sizes": list(inputs)}))
        np.savez(place / "inputs.npz", **inputs)
        command = [sys.executable, "-c", program, folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            library = LIBRARIES[request["family"]]
            raise ValueError(f"the original could not be run with {library}: {last.strip()[:400]}. {REMEDY}")
        with np.load(place / "outputs.npz", allow_pickle=False) as arrays:
            return dict(arrays), json.loads((place / "said.json").read_text())


def original(folder: str) -> None:
    """Runs the network of a request in its own library. The one function of the package that may import PyTorch; meant
    for a process of its own.

    Args:
      folder: with request.json and inputs.npz of `_in_a_child`; gets outputs.npz and said.json.
    """
    import torch

    place = pathlib.Path(folder)
    request = json.loads((place / "request.json").read_text())

    def load(file: str) -> dict[str, Any]:
        if file.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(file)
        if file.endswith(".npz"):
            raise NotImplementedError("PyTorch has no reader of .npz")
        inside = torch.load(file, map_location="cpu", weights_only=True)
        for part in filter(None, request["container"].split(".")):
            inside = inside[part]
        return dict(inside)

    def state() -> tuple[dict[str, Any], str]:
        """{the table's name: float tensor}, and who read it."""
        try:
            whole = {key: tensor for file in request["files"] for key, tensor in load(file).items()}
            reader = f"torch {torch.__version__}"
        except Exception as refused:
            parts = [files.read(file, request["container"] or None).state for file in request["files"]]
            whole = {k: torch.from_numpy(np.array(a, np.float32)) for part in parts for k, a in part.items()}
            reader = f"regvit_jax ({type(refused).__name__} in PyTorch's reader)"
        return {key: whole[own].float() for key, own in request["keys"].items()}, reader

    def transformers_model(state: dict[str, Any]):
        import transformers

        said = {key: value for key, value in request["config"].items() if key != "model_type"}
        kind = request["config"]["model_type"]
        config = transformers.AutoConfig.for_model(kind, **said)
        base = {"dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}[kind]
        cls = getattr(transformers, base + ("ForImageClassification" if request["head"] else "Model"))
        inner = {key: key if key.startswith("classifier.") else f"{kind}.{key}" for key in state}
        given = {inner[key]: tensor for key, tensor in state.items()} if request["head"] else state
        model, found = cls.from_pretrained(None, config=config, state_dict=given, output_loading_info=True)
        lost = [*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"], *found["error_msgs"]]
        if [key for key in lost if "mask_token" not in str(key)]:
            raise ValueError(f"transformers does not take these weights: {lost[:6]}")
        network = model.base_model

        def run(x):
            return network(x).last_hidden_state, model(x).logits if request["head"] else None

        return model, network.encoder.layer, run, {"transformers": transformers.__version__}

    def timm_model(state: dict[str, Any]):
        import timm
        from timm.models.vision_transformer import checkpoint_filter_fn

        said = request["config"]
        args = (said["model_args"] if "model_args" in said else {}) | {"dynamic_img_size": True}
        classes = said["num_classes"] if request["head"] else 0
        model = timm.create_model(said["architecture"], pretrained=False, num_classes=classes, **args)
        if request["family"] != "timm":  # timm has an importer of its own for these.
            state = {key.replace("reg_tokens", "reg_token"): tensor for key, tensor in state.items()}
            # By this key it knows DINOv2; some files are without.
            state |= {"mask_token": torch.zeros(())} if request["family"] == "dinov2" else {}
            state = checkpoint_filter_fn(state, model, adapt_layer_scale=request["family"] == "deit3")
        model.load_state_dict(state, strict=True)

        def run(x):
            tokens = model.forward_features(x)
            return tokens, model.forward_head(tokens) if request["head"] else None

        return model, model.blocks, run, {"timm": timm.__version__}

    weights, reader = state()
    build = transformers_model if LIBRARIES[request["family"]] == "transformers" else timm_model
    model, blocks, run, library = build(weights)
    model.float().eval()
    streams: list[Any] = []
    for block in blocks:
        block.register_forward_hook(lambda module, given, out: streams.append(out[0] if type(out) is tuple else out))
    out = {}
    with torch.inference_mode(), np.load(place / "inputs.npz") as inputs:
        for size in request["sizes"]:
            streams.clear()
            tokens, logits = run(torch.from_numpy(inputs[size].transpose(0, 3, 1, 2).copy()))
            arrays = {f"block{i}": stream for i, stream in enumerate(streams[: len(blocks)])} | {"tokens": tokens}
            arrays |= {} if logits is None else {"logits": logits}
            out |= {f"{size}/{name}": tensor.numpy() for name, tensor in arrays.items()}
    np.savez(place / "outputs.npz", **out)
    said = {"library": {"torch": torch.__version__} | library, "read_by": reader}
    (place / "said.json").write_text(json.dumps(said))


def _name(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
