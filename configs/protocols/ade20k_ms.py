"""ADE20k by a linear head, DINOv2's protocol "+ms": four blocks, larger crops, five scales and their mirror images.

    regvit eval --config=configs/protocols/ade20k_ms.py --model=dinov2_vitl14_reg4 \
        --data=ade20k:/data/ADEChallengeData2016 --set workers=8 --out=ade20k_ms.json

/data/ADEChallengeData2016 is what its zip holds: images/ and annotations/ with training/ and validation/. 40,000 steps
of 16 crops of 640 pixels from images enlarged up to three times; then 2,000 images at scales 1 to 3, about 150 windows
of 640 pixels each, probabilities averaged. Not run yet. Killed, the same command goes on from the last 1,000 steps of
the training; the measuring begins anew.

Windows are 320 apart, which the published files do not say. mIoU to expect, without registers (Oquab et al. 2023, table
10, "+ms"): ViT-S/14 47.2, B 51.3, L 53.1, g 53.0; with registers nobody has published them.
"""

from regvit_jax.config import evaluator, protocol


def get_config():
    c = protocol()
    c.evals.ade20k_ms = evaluator(
        "segmentation",
        blocks=(-4, -3, -2, -1),
        crop=640,
        stride=320,
        ratio=(1.0, 3.0),
        steps=40_000,
        scales=(1.0, 1.32, 1.73, 2.28, 3.0),
        flip=True,
    )
    return c
