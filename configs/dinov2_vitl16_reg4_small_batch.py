"""DINOv2 ViT-L/16 with 4 registers on ImageNet-1k for 8 GPUs and a batch of 512: what to change when a run is unstable.

    python -m regvit_jax.main --config=configs/dinov2_vitl16_reg4_small_batch.py --workdir=runs/vitl16_small \
        --config.data.train=imagenet:/data/imagenet

The reference's short run (ViT-L/16, batch 2,048, 32 A100s, k-NN 81.6) with its maintainers' advice for less: half the
learning rate, drop path .1, beta2 .99. 250,000 steps of 512 in 8 groups of 64. Not run.

Signs of trouble in metrics.jsonl: teacher_entropy that goes to log(prototypes), prototypes_used that goes to 1, koleo
that grows. What helps next: a higher momentum (.996), a lower learning rate, teacher_temp at .05.
"""

from regvit_jax.config import defaults, evaluator


def get_config():
    c = defaults(recipe="dinov2")
    c.model.name, c.model.image_size, c.model.drop_path = "vit_l16_reg4", 224, 0.1
    c.data.train, c.data.workers = "imagenet:/data/imagenet", 32
    c.batch_size, c.total_steps, c.groups = 512, 250_000, 8
    c.optim.lr, c.optim.warmup_steps, c.optim.b2 = 2e-3, 25_000, 0.99
    c.remat = "named"
    c.log_every, c.save_every, c.eval_every, c.keep_best = 50, 2500, 12_500, "knn/top1"
    c.evals.knn = evaluator("knn", k=(10, 20, 100, 200))
    c.evals.linear = evaluator("linear", every=0)
    c.evals.maps = evaluator("maps")
    return c
