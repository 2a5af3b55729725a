"""ADE20k by a linear head, DINOv2's and the registers paper's protocol: the last block, one scale.

    regvit eval --config=configs/protocols/ade20k_linear.py --model=dinov2_vitl14_reg4 \
        --data=ade20k:/data/ADEChallengeData2016 --set workers=8 --out=ade20k_linear.json

/data/ADEChallengeData2016 is what its zip holds: images/ and annotations/ with training/ and validation/. 40,000 steps
of 16 crops of 512 pixels, then 2,000 images by windows of 512 that are 341 apart. Not run yet: 640,000 crops through
the network. Killed, the same command goes on from the last 1,000 steps.

mIoU to expect, the released models without registers (Oquab et al. 2023, "lin.", as recalled: check): ViT-S/14 44.3,
B 47.3, L 47.7, g 49.0; with registers nobody has published them. The registers paper (table 2a), without and with:
DINOv2 L trained on ImageNet-22k 46.6 and 47.9, DeiT-III B 38.9 and 39.1, OpenCLIP B 26.6 and 26.7.
Lower by several points: masks resized before the loss, or features before the final norm.
"""

from regvit_jax.config import evaluator, protocol


def get_config():
    c = protocol()
    c.evals.ade20k = evaluator("segmentation", blocks=(-1,), crop=512, stride=341, ratio=(0.5, 2.0), steps=40_000)
    return c
