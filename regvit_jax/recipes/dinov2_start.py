"""What a DINOv2 run starts from besides fresh networks: heads of an earlier run, and the frozen teacher of a
distillation.

A teacher is a trunk and its heads. Released weights carry no heads, and a student cannot train them: it would be
taught by whatever it makes of them. So they are trained first, by a run of this recipe on the frozen trunk
(freeze_backbone = total_steps), whose workdir is then the teacher. The workdir of any DINOv2 run is one as it stands.
"""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from regvit_jax.convert.graft import resize
from regvit_jax.data.transforms import Preprocess
from regvit_jax.models.config import ViTConfig
from regvit_jax.models.model import Model
from regvit_jax.models.prototype_head import HeadConfig
from regvit_jax.recipes.start import same_pixels
from regvit_jax.trees import Tree


@dataclasses.dataclass(frozen=True)
class Networks:
    """Architecture of a student or teacher: its trunk, and its heads by the name of their parameters."""

    vit: ViTConfig
    heads: dict[str, HeadConfig]


def heads_of(found: dict[str, Tree], wanted: dict[str, HeadConfig], path: str) -> dict[str, Tree]:
    """The heads beside a loaded model, which are to have the sizes that the config says.

    Raises:
      ValueError: if one is missing or of another size; names the keys.
    """
    _have(found, wanted, "init_heads", path)
    for name, size in wanted.items():
        there = size_of(found[name])
        # With one projection there are no hidden units, whatever the config says of them.
        same = dataclasses.replace(there, hidden=size.hidden) if there.layers == 1 else there
        if same != size:
            wrong = ", ".join(
                f"{_key(name, field)}={getattr(there, field)} (now {getattr(size, field)})"
                for field in ("width", "hidden", "bottleneck", "prototypes", "layers")
                if getattr(same, field) != getattr(size, field)
            )
            raise ValueError(f"{name} in {path} has another size: set {wrong}, or init_heads to False")
    return {name: found[name] for name in wanted}


def teacher_of(
    model: Model,
    found: dict[str, Tree],
    student: Networks,
    options: ConfigDict,
    *,
    side: int,
    preprocessing: Preprocess,
    dtype: str,
) -> tuple[Networks, dict[str, Tree], list[str]]:
    """The frozen teacher: its architecture, its parameters, and what was changed of them.

    Its matrices have the dtype of the computation, which is all that is ever seen of them.

    Args:
      model: what distill_from holds.
      found: trees beside it, its heads among them.
      student: whose heads have as many prototypes.
      options: config.dinov2.
      side: of the global crops, pixels.
      preprocessing: of the student; the teacher sees the same pixels.
      dtype: of the computation.

    Raises:
      ValueError: for a teacher without heads, or one that does not fit the student; names the keys.
    """
    path, theirs = options.distill_from, model.config
    _have(found, student.heads, "distill_from", path)
    sizes = {name: size_of(found[name]) for name in student.heads}
    needs = [
        (_key(name, "prototypes"), sizes[name].prototypes, student.heads[name].prototypes) for name in student.heads
    ]
    if options.ibot_weight:
        needs.append(("config.model.patch_size", theirs.patch_size, student.vit.patch_size))
    for key, there, here in needs:
        if there != here:
            raise ValueError(f"distill_from={path!r} needs {key}={there}, it is {here}")
    if not theirs.class_token and options.dino_weight:
        raise ValueError(f"distill_from={path!r} has no class token: set config.dinov2.dino_weight=0")
    look = model.preprocessing
    if not (same_pixels(look.mean, preprocessing.mean) and same_pixels(look.std, preprocessing.std)):
        raise ValueError(f"distill_from={path!r} needs config.data.mean={look.mean} and config.data.std={look.std}")
    model, notes = resize(model, side)
    model = model.astype(dtype)
    trunk = {name: part for name, part in model.params.items() if name != "head"}
    networks = Networks(dataclasses.replace(model.config, num_classes=0), sizes)
    return networks, {"backbone": trunk} | {name: found[name] for name in sizes}, notes


def size_of(head: Tree) -> HeadConfig:
    """The size of a head, from its parameters."""
    layers = sum(name.startswith("fc") for name in head)
    width, hidden = np.shape(head["fc1"]["kernel"])
    bottleneck, prototypes = np.shape(head["last_layer"]["v"])
    return HeadConfig(width=width, hidden=hidden, bottleneck=bottleneck, prototypes=prototypes, layers=layers)


def _have(found: dict[str, Tree], wanted: dict[str, HeadConfig], key: str, path: str) -> None:
    """Refuses weights without the heads that are wanted."""
    heads = [name for name in found if name.endswith("_head")]
    missing = [name for name in wanted if name not in heads]
    if not missing:
        return
    if heads:
        remedy = f"it has {', '.join(heads)}: set config.dinov2.separate_head={'ibot_head' in heads}"
    elif key == "distill_from":
        remedy = (
            "released weights carry none, and neither does a saved model: train them on the frozen trunk first, by a "
            "run with init_from and dinov2.freeze_backbone=total_steps, and name its workdir: configs/dinov2_distill.py"
        )
    else:
        remedy = "they lie in the workdir of a DINOv2 run alone: set it to False for fresh ones"
    raise ValueError(f"config.dinov2.{key}: {path} holds no {' and no '.join(missing)}; {remedy}")


def _key(head: str, field: str) -> str:
    """The config key behind a size of a head."""
    if field == "width":
        return "config.model.width"
    of_dino = {"hidden": "head_hidden", "layers": "head_layers"}
    name = f"ibot_{field}" if head == "ibot_head" else of_dino[field] if field in of_dino else field
    return f"config.dinov2.{name}"
