"""PASCAL VOC 2012 segmentation by a linear head: ADE20k's protocol on 21 classes, background among them.

    regvit eval --config=configs/protocols/voc12_linear.py --model=dinov2_vitl14_reg4 \
        --data='voc:/data/VOCdevkit?year=2012&set=segmentation#trainaug' --set workers=8 --out=voc12_linear.json

/data/VOCdevkit/VOC2012 has JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/. #trainaug, the 10,582 images of
most published numbers, needs SegmentationClassAug/ and ImageSets/Segmentation/trainaug.txt of the SBD annotations;
without it #train has 1,464 images. Measured on the 1,449 images of val. 40,000 steps of 16 crops of 512 pixels. Not run
yet. Killed, the same command goes on from the last 1,000 steps.

mIoU to expect, without registers (Oquab et al. 2023, "lin.", as recalled: check): ViT-S/14 81.1, B 82.5, L 82.1,
g 83.0. The file behind them is not published: crop, steps and training list may differ.
"""

from regvit_jax.config import evaluator, protocol


def get_config():
    c = protocol()
    c.evals.voc12 = evaluator("segmentation", blocks=(-1,), crop=512, stride=341, ratio=(0.5, 2.0), steps=40_000)
    return c
