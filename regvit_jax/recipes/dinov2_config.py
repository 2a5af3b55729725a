"""The keys of the DINOv2 recipe, config.dinov2, and what they may be."""

import dataclasses

from ml_collections import ConfigDict

from regvit_jax.config import key
from regvit_jax.data.multicrop_spec import MultiCrop
from regvit_jax.models.config import ViTConfig
from regvit_jax.models.prototype_head import HeadConfig

# Batch sizes at which optim.lr counts as it is written.
LR_SCALING = {"none": None, "sqrt": 1024, "linear": 256}


@dataclasses.dataclass(frozen=True)
class DINOv2Config(MultiCrop):
    """config.dinov2: the crops (the fields of MultiCrop) and the method. Durations are in updates; DINOv2 counts 1,250
    of them as an epoch, whatever the data."""

    global_size: int = key(0, "side of the two global crops in pixels; 0 = model.image_size")
    local_size: int = key(0, "side of the local crops in pixels; 0 = 3 / 7 of the global ones, in whole patches")
    source_size: int = key(
        0, "side of the square into which the host decodes an image, for crops on the device; 0 = 1.5 x global crops"
    )

    dino_weight: float = key(1.0, "of the loss on class tokens; 0 = off")
    ibot_weight: float = key(1.0, "of the loss on masked patches; 0 = off")
    koleo_weight: float = key(0.1, "of what spreads class tokens, for each of the two global crops; 0 = off")

    prototypes: int = key(65536, "K: outputs of the head")
    head_hidden: int = key(2048, "hidden units of the head")
    head_layers: int = key(3, "projections of the head before its prototypes")
    bottleneck: int = key(256, "size of the unit vector before the prototypes")
    separate_head: bool = key(False, "a head of their own for patches; its size is ibot_*")
    ibot_prototypes: int = key(65536, "prototypes of a separate head")
    ibot_hidden: int = key(2048, "hidden units of a separate head")
    ibot_layers: int = key(3, "projections of a separate head")
    ibot_bottleneck: int = key(256, "size of the unit vector of a separate head")

    mask_prob: float = key(0.5, "share of the student's global crops that are masked; 0 = no masks")
    mask_ratio: tuple[float, float] = key((0.1, 0.5), "range of the masked share of their patches")

    centering: str = key("softmax", "of the teacher's outputs: softmax (around a running centre) | sinkhorn")
    sinkhorn_iterations: int = key(3, "rounds of Sinkhorn-Knopp")
    center_momentum: float = key(0.9, "of the running centre")
    student_temp: float = key(0.1, "softmax temperature of the student")
    teacher_temp: float = key(0.07, "softmax temperature of the teacher after its warm-up")
    teacher_temp_start: float = key(0.04, "softmax temperature of the teacher at the start")
    teacher_temp_warmup: int = key(37_500, "updates from one to the other, linear")
    teacher_temp_every: int = key(1, "updates between changes of it; DINO (v1): the updates of one pass over the data")
    momentum: float = key(0.992, "of the teacher's moving average at the start")
    momentum_end: float = key(1.0, "of the same at the end, by a cosine")

    drop: str = key("subset", "stochastic depth: subset (of each group so many crops, others not computed) | sample")
    lr_scaling: str = key("sqrt", "optim.lr grows with the batch: sqrt (batch / 1024) | linear (batch / 256) | none")
    weight_decay_end: float = key(0.4, "weight decay at the end, by a cosine from optim.weight_decay")
    patch_embed_lr: float = key(0.2, "factor on the learning rate of the patch embedding")
    clip: str = key("network", "one gradient norm for: network (backbone and each head) | tensor (each parameter)")
    freeze_last_layer: int = key(1250, "updates during which the prototypes do not move")
    freeze_by: str = key("lr", "how: lr (rate 0, moments gather) | gradient (no gradient, as in DINO v1)")
    train_norms: bool = key(True, "train the lengths of the prototypes; False keeps them at 1")

    freeze_backbone: int = key(
        0, "updates during which the heads alone learn, the trunk of init_from untouched; total_steps = the whole run"
    )
    init_heads: bool = key(False, "take the heads of the DINOv2 workdir at init_from too; False: fresh ones")
    distill_from: str = key("", "workdir of a DINOv2 run: its teacher, frozen, teaches; saved is an average student")


def crops(o: ConfigDict, vit: ViTConfig) -> MultiCrop:
    """The crops that a config asks for.

    Raises:
      ValueError: naming the key.
    """
    fields = {f.name: o[f.name] for f in dataclasses.fields(MultiCrop)}
    side = o.global_size or vit.image_size[0]
    patches = max(round(3 / 7 * side / vit.patch_size), 1)
    try:
        spec = MultiCrop(**fields | {"global_size": side, "local_size": o.local_size or patches * vit.patch_size})
    except ValueError as error:
        raise ValueError(f"config.dinov2: {error}") from error
    for name in ("global_size", "local_size") if spec.local_crops else ("global_size",):
        side = getattr(spec, name)
        try:
            vit.grid_of((side, side))
        except ValueError as error:
            raise ValueError(f"config.dinov2.{name}={side}: {error}") from error
    return spec


def heads(o: ConfigDict, vit: ViTConfig) -> dict[str, HeadConfig]:
    """{name of the parameters: size} of the heads that any loss needs.

    Raises:
      ValueError: for sizes below 1.
    """
    found = {}
    try:
        if o.dino_weight or (o.ibot_weight and not o.separate_head):
            found["dino_head"] = HeadConfig(
                width=vit.width,
                hidden=o.head_hidden,
                bottleneck=o.bottleneck,
                prototypes=o.prototypes,
                layers=o.head_layers,
            )
        if o.ibot_weight and o.separate_head:
            found["ibot_head"] = HeadConfig(
                width=vit.width,
                hidden=o.ibot_hidden,
                bottleneck=o.ibot_bottleneck,
                prototypes=o.ibot_prototypes,
                layers=o.ibot_layers,
            )
    except ValueError as error:
        raise ValueError(f"config.dinov2, a head: {error}") from error
    return found


def validate(config: ConfigDict, vit: ViTConfig) -> None:
    """Checks config.dinov2 and what it needs of the other sections.

    Raises:
      ValueError: naming the key, its value and what it may be.
    """
    o = config.dinov2
    group = config.batch_size // config.groups
    shares = ("mask_prob", "center_momentum", "momentum", "momentum_end")
    positive = ("student_temp", "teacher_temp", "teacher_temp_start")
    at_least = {"sinkhorn_iterations": 1, "teacher_temp_every": 1} | dict.fromkeys(
        ("source_size", "teacher_temp_warmup", "freeze_last_layer", "freeze_backbone"), 0
    )
    weights = ("dino_weight", "ibot_weight", "koleo_weight", "weight_decay_end", "patch_embed_lr")
    choices = {
        "centering": ("softmax", "sinkhorn"),
        "drop": ("subset", "sample"),
        "lr_scaling": tuple(LR_SCALING),
        "clip": ("network", "tensor"),
        "freeze_by": ("lr", "gradient"),
    }
    low_high = len(o.mask_ratio) == 2 and 0 < o.mask_ratio[0] <= o.mask_ratio[1] <= 1
    checks = [(name, 0 <= o[name] <= 1, "in [0, 1]") for name in shares]
    checks += [(name, o[name] > 0, "above 0") for name in positive]
    checks += [(name, o[name] >= least, f"at least {least}") for name, least in at_least.items()]
    checks += [(name, o[name] >= 0, "0 or more") for name in weights]
    checks += [(name, o[name] in known, " or ".join(known)) for name, known in choices.items()]
    checks += [
        ("mask_ratio", low_high, "(low, high) in (0, 1]"),
        ("dino_weight", o.dino_weight or o.ibot_weight, "above 0 where ibot_weight is 0: one of them trains"),
        ("koleo_weight", not o.koleo_weight or group > 1, f"0 with groups of {group} image: it compares them"),
        ("mask_prob", not (o.distill_from and o.mask_prob), "0 with distill_from: its student sees whole images"),
        (
            "mask_prob",
            o.distill_from or not o.ibot_weight or int(2 * group * o.mask_prob) > 0,
            f"large enough that one of the {2 * group} global crops of a group is masked: ibot_weight is not 0",
        ),
    ]
    for name, good, allowed in checks:
        if not good:
            raise ValueError(f"config.dinov2.{name}={o[name]!r} must be {allowed}")
    needs = [
        ("model.class_token", vit.class_token, "True: DINOv2 compares class tokens"),
        ("model.mask_token", vit.mask_token or not o.mask_prob, "True where config.dinov2.mask_prob is above 0"),
        ("model.drop_path", not (o.distill_from and vit.drop_path), "0 with config.dinov2.distill_from"),
        ("init_from", config.init_from or not o.init_heads, "given where config.dinov2.init_heads is True"),
        ("model.image_size", vit.image_size[0] == vit.image_size[1], "one side: crops are square"),
        ("data.crop", config.data.crop == "none", "'none': crops are cut as config.dinov2 says"),
        (
            "data.cache",
            config.data.cache == "none" or config.data.augment_on == "device",
            "'none' with data.augment_on='host', which cuts new crops every time",
        ),
    ]
    for name, good, allowed in needs:
        if not good:
            raise ValueError(f"config.{name} must be {allowed}")
