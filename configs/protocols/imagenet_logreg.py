"""ImageNet-1k by logistic regression, DINOv2's protocol, which table 1 of the registers paper uses too.

    regvit eval --config=configs/protocols/imagenet_logreg.py --model=dinov2_vitl14_reg4 \
        --data=imagenet:/data/imagenet --dtype=bfloat16 --out=imagenet_logreg.json

/data/imagenet has train/n01440764/*.JPEG and val/, in class folders or flat beside the devkit's list. Class tokens,
short side 224, centre 224; 45 values of C from 1e-6 to 1e5, chosen on a tenth of the training set, then fitted to all
of it. --set val_data=SOURCE chooses C there. Not run yet: one pass over the images, then 46 fits by L-BFGS on 1.28 M
features.

To expect: the registers paper has 86.0 for the class token of DINOv2 ViT-g/14 (table 1).
"""

from regvit_jax.config import evaluator, protocol


def get_config():
    c = protocol(image_size=224, crop_ratio=1.0)
    c.evals.logreg = evaluator("logreg", crop_ratio=1.0, choose_on="held_out", max_iter=1000)
    return c
