"""Self-supervised training on your own images: any folder of them, with or without labels.

    python -m regvit_jax.main --config=configs/dinov2_folder.py --workdir=runs/mine \
        --config.data.train=folder:/my/images

ViT-S/14 with 4 registers, 2 crops of 224 and 8 of 98 pixels, 30,000 steps of 128: meant for one GPU. Not run yet. On
several GPUs give --config.groups their number; on a laptop make it small:

    --config.model.name=vit_ti16_reg4 --config.model.image_size=96 --config.dinov2.local_crops=4 \
        --config.dinov2.prototypes=4096 --config.batch_size=32 --config.total_steps=2000

With one sub-folder a class, k-NN and a linear probe are measured on a part of the images; without labels they are left
out. The settings are those that keep small batches stable: half the learning rate, drop path .1, beta2 .99, and targets
by Sinkhorn-Knopp. From a hundred thousand images on, expect features that are worth having; with fewer, start from
released weights: --config.init_from=PATH.
"""

from regvit_jax.config import defaults, evaluator


def get_config():
    c = defaults(recipe="dinov2")
    c.model.name, c.model.image_size, c.model.drop_path = "dinov2_vits14_reg4", 224, 0.1
    c.data.train, c.data.workers = "folder:/my/images", 2
    o = c.dinov2
    o.prototypes, o.centering, o.teacher_temp_warmup = 16_384, "sinkhorn", 5000
    o.freeze_last_layer = 200
    c.batch_size, c.total_steps = 128, 30_000
    c.optim.lr, c.optim.warmup_steps, c.optim.b2 = 2e-3, 2000, 0.99
    c.log_every, c.save_every, c.eval_every = 50, 1000, 2000
    c.evals.knn = evaluator("knn", at_start=True)
    c.evals.linear = evaluator("linear", every=0)
    c.evals.maps = evaluator("maps")
    return c
