"""ImageNet-1k by linear classifiers, DINOv2's protocol: the best of 52, trained together on frozen features.

    regvit eval --config=configs/protocols/imagenet_linear.py --model=dinov2_vitl14_reg4 \
        --data=imagenet:/data/imagenet --dtype=bfloat16 --out=imagenet_linear.json

/data/imagenet has train/n01440764/*.JPEG and val/, in class folders or flat beside the devkit's list. 12,500 steps of
1,024 random crops of 224 pixels; class tokens of the last block or of the last four, with or without the mean patch,
at 13 learning rates. The head is chosen on the validation images themselves, as published;
--set held_out=0.1 chooses it on training images. Not run yet: 12.8 M crops decoded and passed through the network.

Top-1 to expect (DINOv2's README, without and with registers): ViT-S/14 81.1 and 80.9, B 84.5 and 84.6, L 86.3 and
86.7, g 86.5 and 87.1. The registers paper (table 2a), trained on ImageNet-22k: DINOv2 L 84.3 and 84.8, DeiT-III B 84.7
and 84.7, OpenCLIP B 78.2 and 78.1.
"""

from regvit_jax.config import evaluator, protocol


def get_config():
    c = protocol(image_size=224, crop_ratio=0.875)
    c.evals.linear = evaluator("linear_grid", blocks=(1, 4), avgpool=(0, 1), steps=12_500, train_batch_size=1024)
    return c
