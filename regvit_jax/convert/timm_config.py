"""config.json of timm's folders (`timm.create_model("local-dir:FOLDER")`), read and written."""

from regvit_jax.convert.shapes import Shapes
from regvit_jax.data.transforms import Preprocess
from regvit_jax.models.config import ViTConfig

_POOLS = ("token", "avg", "map")
_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}


def read(files: dict, shapes: Shapes) -> tuple[dict, Preprocess | None]:
    """What the file says that keys cannot.

    Raises:
      ValueError: if it is not timm's, or asks for a pooling or activation that we do not have.
    """
    if "config.json" not in files:
        return {}, None
    said = files["config.json"]
    if "architecture" not in said:
        raise ValueError("config.json is not timm's: it has no 'architecture'")
    args = said["model_args"] if "model_args" in said else {}
    look = said["pretrained_cfg"] if "pretrained_cfg" in said else {}
    fields = {}
    if "img_size" in args:
        size = args["img_size"]
        fields["image_size"] = size if isinstance(size, int) else tuple(size)
    if "num_heads" in args:
        fields["num_heads"] = args["num_heads"]
    if "drop_path_rate" in args:
        fields["drop_path"] = float(args["drop_path_rate"])
    if "init_values" in args and args["init_values"] and "blocks/ls1/gamma" in shapes:
        fields["layerscale"] = float(args["init_values"])
    if "act_layer" in args:
        if args["act_layer"] not in _ACTIVATIONS:
            raise ValueError(f"config.json has act_layer {args['act_layer']!r}; known: {', '.join(_ACTIVATIONS)}")
        fields["activation"] = _ACTIVATIONS[args["act_layer"]]
    pool = args["global_pool"] if "global_pool" in args else said["global_pool"] if "global_pool" in said else ""
    if pool and "fc_norm/scale" not in shapes:
        if pool not in _POOLS:
            raise ValueError(f"config.json has global_pool {pool!r}; known: {', '.join(_POOLS)}")
        fields["pool"] = pool
    return fields, _read_look(look)


def write(config: ViTConfig, preprocessing: Preprocess, files: dict) -> dict:
    """The file, for a registered architecture whose arguments are all given."""
    swiglu = config.activation == "swiglu"
    # Only registered functions can set classes: one with packed SwiGLU, one with CLIP's epsilon, one plain.
    base = (
        "vit_giant_patch14_dinov2"
        if swiglu
        else "vit_base_patch16_clip_224"
        if config.pre_norm
        else "vit_base_patch16_224"
    )
    height, width = config.image_size
    args = {
        "img_size": height if height == width else [height, width],
        "patch_size": config.patch_size,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": _ratio(config.width, config.mlp_dim * (2 if swiglu else 1)),
        "qkv_bias": config.qkv_bias,
        "init_values": config.layerscale,
        "class_token": config.class_token,
        "reg_tokens": config.registers,
        "no_embed_class": config.position == "patches",
        "pos_embed": "none" if config.position == "none" else "learn",
        "pre_norm": config.pre_norm,
        "fc_norm": config.fc_norm,
        "global_pool": config.pool,
        "dynamic_img_size": True,
        "drop_path_rate": config.drop_path,
    }
    if not (config.final_norm or config.fc_norm):
        args["final_norm"] = False
    look = {
        "num_classes": config.num_classes,
        "input_size": [3, preprocessing.size, preprocessing.size],
        "crop_pct": preprocessing.crop_ratio,
        "crop_mode": "center",
        "interpolation": preprocessing.interpolation,
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "fixed_input_size": False,
    }
    top = {
        "architecture": base,
        "num_classes": config.num_classes,
        "num_features": config.width,
        "global_pool": config.pool,
        "model_args": args,
        "pretrained_cfg": look,
    }
    return {"config.json": top}


def _ratio(width: int, hidden: int) -> float:
    """The mlp_ratio for which int(width * ratio) is `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def _read_look(said: dict) -> Preprocess | None:
    if not {"input_size", "mean", "std"} <= said.keys():
        return None
    interpolation = said["interpolation"] if "interpolation" in said else "bicubic"
    return Preprocess(
        size=min(said["input_size"][1:]),
        crop_ratio=float(said["crop_pct"]) if "crop_pct" in said else 0.875,
        interpolation=interpolation,
        mean=tuple(said["mean"]),
        std=tuple(said["std"]),
    )
