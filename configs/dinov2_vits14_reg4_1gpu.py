"""DINOv2 ViT-S/14 with 4 registers on ImageNet-1k, one GPU.

    python -m regvit_jax.main --config=configs/dinov2_vits14_reg4_1gpu.py --workdir=runs/vits14_reg4 \
        --config.data.train=imagenet:/data/imagenet

100,000 steps of 256, 20 passes over 1.28 M images. Not run; what the batch is to the released models' 3,072, hours are
to their days. The reference trains no ViT-S so: released ones are distilled from a giant. Settings are the reference's
short run with its maintainers' advice for small batches: half the learning rate, drop path .1, beta2 .99.
"""

from regvit_jax.config import defaults, evaluator


def get_config():
    c = defaults(recipe="dinov2")
    c.model.name, c.model.image_size, c.model.drop_path = "dinov2_vits14_reg4", 224, 0.1
    c.data.train, c.data.workers = "imagenet:/data/imagenet", 16
    o = c.dinov2
    o.prototypes, o.centering, o.teacher_temp_warmup = 65_536, "sinkhorn", 30_000
    c.batch_size, c.total_steps, c.groups = 256, 100_000, 8
    c.optim.lr, c.optim.warmup_steps, c.optim.b2 = 2e-3, 10_000, 0.99
    c.remat = "named"
    c.log_every, c.save_every, c.eval_every, c.keep_best = 50, 2500, 12_500, "knn/top1"
    c.evals.knn = evaluator("knn", k=(10, 20, 100, 200))
    c.evals.linear = evaluator("linear", every=0)
    c.evals.maps = evaluator("maps")
    return c
