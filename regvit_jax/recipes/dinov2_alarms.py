"""When a DINOv2 run has collapsed or is about to, and what to try.

The thresholds say what a healthy run is far from. A fresh teacher says nearly the same of every image, which looks like
a collapse, so nothing is said before the warm-up is over.
"""

import math
from collections.abc import Mapping

from ml_collections import ConfigDict

# Shares of log K: a teacher whose targets are this near to uniform, or to a single prototype each, teaches nothing.
UNIFORM, ONE_HOT = 0.99, 0.01
# exp(entropy of the mean target): all images share one prototype or two. Sinkhorn-Knopp keeps it at K by construction.
FEW = 3.0
# Mean -log distance of a class token to the nearest other one of its group, on the unit sphere: here e^-4 = .02, a
# cosine of .9998. Fresh networks are at 8; healthy ones come below 1.
CROWDED = 4.0

STEADY = (
    "what keeps small batches stable: half of optim.lr, model.drop_path=0.1, optim.b2=0.99, dinov2.momentum=0.996, a "
    "longer optim.warmup_steps, a larger batch_size"
)
WHEN_NOT_FINITE = f"DINOv2: {STEADY}; with init_from, dinov2.freeze_backbone lets fresh heads settle first"


def alarms(config: ConfigDict, prototypes: int, step: int, values: Mapping[str, float]) -> dict[str, str]:
    """{kind: message} of what the metrics of a step say.

    Args:
      config: of the run.
      prototypes: K of the head that teacher_entropy is about.
      step: finished updates.
      values: metrics of this step.
    """
    o = config.dinov2
    if step <= max(config.optim.warmup_steps, o.freeze_last_layer):
        return {}
    found, most = {}, math.log(prototypes)
    entropy, used = values["teacher_entropy"], values["prototypes_used"]
    measured = f"teacher_entropy {entropy:.3f} of log K = {most:.3f}"
    if entropy > UNIFORM * most:
        found["uniform"] = (
            f"collapse: the teacher's targets are uniform ({measured}), it says the same of every image. Try a sharper "
            f"teacher (dinov2.teacher_temp now {o.teacher_temp:g}, teacher_temp_start {o.teacher_temp_start:g}), fewer "
            f"prototypes (now {prototypes}), dinov2.koleo_weight=0.1; {STEADY}"
        )
    if entropy < ONE_HOT * most and used >= FEW:
        found["one-hot"] = (
            f"the teacher's targets are one-hot ({measured}): nothing is learnt from how alike images are. Try a "
            f"higher dinov2.teacher_temp (now {o.teacher_temp:g})"
        )
    if used < FEW < prototypes / 4:
        found["one prototype"] = (
            f"collapse: the teacher gives all images the same prototype (prototypes_used {used:.2f} of {prototypes}). "
            f"Try dinov2.centering='sinkhorn', a higher dinov2.teacher_temp (now {o.teacher_temp:g}), "
            f"dinov2.koleo_weight=0.1; {STEADY}"
        )
    if o.koleo_weight and values["koleo"] > 2 * o.koleo_weight * CROWDED:
        distance = math.exp(-values["koleo"] / (2 * o.koleo_weight))
        found["crowded"] = (
            f"collapse: class tokens of different images lie {distance:.2g} apart on the unit sphere (koleo "
            f"{values['koleo']:.3g}). If no images are there twice, try a higher dinov2.koleo_weight (now "
            f"{o.koleo_weight:g}); {STEADY}"
        )
    return found
