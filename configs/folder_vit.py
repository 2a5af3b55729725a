"""Supervised training on your own images: a folder with one sub-folder a class.

    python -m regvit_jax.main --config=configs/folder_vit.py --workdir=runs/mine \
        --config.data.train=folder:/my/images

ViT-S/16 with 4 registers at 224 px, random resized crops, flips, mixup and cutmix, 20,000 steps of 256: meant for one
GPU. On a laptop make it small:

    --config.model.name=vit_ti16_reg4 --config.model.image_size=96 --config.batch_size=64 --config.total_steps=1000

From random weights expect little below some ten thousand images; --config.init_from=PATH starts from a saved model.
Sub-folders train/ and val/ are used as such; otherwise a fixed tenth of the images is held out for k-NN and the linear
probe.
"""

from regvit_jax.config import defaults, evaluator


def get_config():
    c = defaults(recipe="supervised")
    c.model.name, c.model.image_size, c.model.drop_path = "vit_s16_reg4", 224, 0.1
    c.data.train, c.data.workers = "folder:/my/images", 2
    c.batch_size, c.total_steps = 256, 20_000
    c.optim.lr, c.optim.warmup_steps, c.optim.weight_decay = 1e-3, 1000, 0.05
    c.supervised.smoothing, c.supervised.mixup, c.supervised.cutmix = 0.1, 0.8, 1.0
    c.log_every, c.save_every, c.eval_every, c.keep_best = 50, 1000, 2000, "knn/top1"
    c.evals.knn = evaluator("knn", at_start=True)
    c.evals.linear = evaluator("linear", every=0)
    c.evals.maps = evaluator("maps")
    return c
