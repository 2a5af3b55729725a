"""config.json and preprocessor_config.json of Hugging Face's Dinov2 and Dinov2WithRegisters, read and written."""

from regvit_jax.convert.shapes import Shapes
from regvit_jax.data.transforms import Preprocess
from regvit_jax.models.config import ViTConfig

PLAIN, REGISTERS = "dinov2", "dinov2_with_registers"
_CLASS = {PLAIN: "Dinov2", REGISTERS: "Dinov2WithRegisters"}
# What the classes assume where the file says nothing.
_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "image_size": 224,
    "num_channels": 3,
    "layerscale_value": 1.0,
    "drop_path_rate": 0.0,
    "use_swiglu_ffn": False,
}
_OWN_DEFAULTS = {
    PLAIN: {"patch_size": 14, "num_register_tokens": 0},
    REGISTERS: {"patch_size": 16, "num_register_tokens": 4},
}
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
_WRITTEN = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu", "swiglu": "gelu"}
_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # Pillow's numbers


def read(files: dict, shapes: Shapes) -> tuple[dict, Preprocess | None]:
    """What the files say that keys cannot.

    Raises:
      ValueError: for another model type, an unknown activation, or files that contradict the weights.
    """
    fields = {}
    if "config.json" in files:
        said = files["config.json"]
        kind = said["model_type"] if "model_type" in said else "none"
        if kind not in _CLASS:
            raise ValueError(f"config.json has model_type {kind!r}; known: {', '.join(_CLASS)}")
        said = _DEFAULTS | _OWN_DEFAULTS[kind] | said
        _agree(said, shapes)
        if said["hidden_act"] not in _ACTIVATIONS and not said["use_swiglu_ffn"]:
            raise ValueError(f"config.json has hidden_act {said['hidden_act']!r}; known: {', '.join(_ACTIVATIONS)}")
        size = said["image_size"]
        fields = {
            "num_heads": said["num_attention_heads"],
            "norm_eps": float(said["layer_norm_eps"]),
            "activation": "swiglu" if said["use_swiglu_ffn"] else _ACTIVATIONS[said["hidden_act"]],
            "image_size": size if isinstance(size, int) else tuple(size),
            "layerscale": float(said["layerscale_value"]),
            # Every block has the same rate there.
            "drop_path": float(said["drop_path_rate"]),
            "drop_path_uniform": True,
        }
    look = files["preprocessor_config.json"] if "preprocessor_config.json" in files else None
    return fields, None if look is None else _read_look(look)


def write(config: ViTConfig, preprocessing: Preprocess, files: dict) -> dict:
    """The two files; keys of the source's own that are not ours to know are kept."""
    kind = REGISTERS if config.registers else PLAIN
    name = _CLASS[kind] + ("ForImageClassification" if config.num_classes else "Model")
    said = {
        "architectures": [name],
        "model_type": kind,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "mlp_ratio": _ratio(config),
        "hidden_act": _WRITTEN[config.activation],
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": config.norm_eps,
        "image_size": config.image_size[0],
        "patch_size": config.patch_size,
        "num_channels": 3,
        "qkv_bias": config.qkv_bias,
        "layerscale_value": config.layerscale,
        "drop_path_rate": config.drop_path,
        "use_swiglu_ffn": config.activation == "swiglu",
    }
    said |= {"num_register_tokens": config.registers} if config.registers else {"use_mask_token": True}
    before = files["config.json"] if "config.json" in files else {}
    if config.num_classes:
        same = "id2label" in before and len(before["id2label"]) == config.num_classes
        labels = before["id2label"] if same else {str(i): f"LABEL_{i}" for i in range(config.num_classes)}
        said |= {"id2label": labels, "label2id": {label: int(i) for i, label in labels.items()}}
    before = before if "model_type" in before and before["model_type"] == kind else {}
    # A class that only wraps the same network differently (a backbone) keeps its name.
    if "architectures" in before and not config.num_classes:
        said["architectures"] = before["architectures"]
    if "hidden_act" in before and config.activation == "swiglu":
        said["hidden_act"] = before["hidden_act"]
    return {"config.json": before | said, "preprocessor_config.json": _write_look(preprocessing)}


def prefix(config: ViTConfig, key: str) -> str:
    """Classifiers keep the network below its own name."""
    wrapped = config.num_classes and not key.startswith("classifier.")
    return f"{REGISTERS if config.registers else PLAIN}." if wrapped else ""


def _ratio(config: ViTConfig) -> int | float:
    """The mlp_ratio from which the class computes our hidden size.

    Raises:
      ValueError: if none gives it.
    """
    for ratio in (*range(1, 17), config.mlp_dim / config.width):
        hidden = int(config.width * ratio)
        if config.activation == "swiglu":
            hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        if hidden == config.mlp_dim:
            return ratio
    raise ValueError(f"huggingface: no mlp_ratio gives {config.mlp_dim} hidden units at width {config.width}")


def _agree(said: dict, shapes: Shapes) -> None:
    patch_rows, width = shapes["patch_embed/kernel"]
    found = {
        "hidden_size": width,
        "num_hidden_layers": shapes["blocks/mlp/fc2/kernel"][0],
        "patch_size": int(round((patch_rows / 3) ** 0.5)),
        "num_register_tokens": shapes["register_tokens"][1] if "register_tokens" in shapes else 0,
    }
    wrong = [f"{key} {said[key]}, the weights {value}" for key, value in found.items() if said[key] != value]
    if wrong:
        raise ValueError(f"config.json and the weights disagree: config.json has {'; '.join(wrong)}")


def _read_look(said: dict) -> Preprocess:
    lacking = [key for key in ("size", "crop_size", "resample", "image_mean", "image_std") if key not in said]
    if lacking:
        raise ValueError(
            f"preprocessor_config.json has no {', '.join(lacking)}: without that file the family's own preprocessing "
            "is used"
        )
    crop, size = said["crop_size"], said["size"]
    side = crop if isinstance(crop, int) else min(crop["height"], crop["width"])
    short = size if isinstance(size, int) else size["shortest_edge"] if "shortest_edge" in size else min(size.values())
    names = {number: name for name, number in _RESAMPLE.items()}
    return Preprocess(
        size=side,
        crop_ratio=side / short,
        interpolation=names[said["resample"]],
        mean=tuple(said["image_mean"]),
        std=tuple(said["image_std"]),
    )


def _write_look(look: Preprocess) -> dict:
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": look.resize_size},
        "resample": _RESAMPLE[look.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": look.size, "width": look.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(look.mean),
        "image_std": list(look.std),
    }
