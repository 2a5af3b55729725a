"""Registers for released weights: DINOv2 ViT-S/14 gets 4 of them and goes on learning from your own images.

    python -m regvit_jax.main --config=configs/dinov2_continue.py --workdir=runs/continued \
        --config.data.train=folder:/my/images

Not run on real weights here. 20,000 steps of 128 on one GPU; any other weights by --config.init_from=PATH and a
config.model that matches (the error says which keys). What is changed of them is logged at the start: registers added,
positions resampled to 224 pixels. The released file holds one network without heads, so the teacher starts as its copy
and the heads are fresh.

Fresh heads would shake a good trunk. So for 1,000 steps they learn alone, on a trunk that does not move: the teacher's
is the same one, its heads follow the student's as always. Then the trunk thaws, with a warm-up of its own and a tenth
of the learning rate of a run from nothing. Registers start near zero (standard deviation 1e-6), where they disturb
least, and move with the trunk; layer decay stays at 1, since it would slow them most. Drop path .1 and beta2 .99 are
for the small batch.

What others saw: adding registers to weights and fine-tuning with labels alone lost accuracy (timm's maintainer). A run
is worth keeping if k-NN is back at its value of step 0 and norms/outliers has fallen; both are measured from step 0 on.
k-NN needs labels, one sub-folder a class.
"""

from regvit_jax.config import defaults, evaluator


def get_config():
    c = defaults(recipe="dinov2")
    c.init_from, c.model.name, c.model.image_size, c.model.drop_path = "dinov2_vits14", "dinov2_vits14_reg4", 224, 0.1
    c.data.train, c.data.workers = "folder:/my/images", 8
    o = c.dinov2
    o.freeze_backbone, o.freeze_last_layer = 1000, 100
    o.prototypes, o.centering, o.teacher_temp_warmup = 8192, "sinkhorn", 4000
    o.momentum, o.weight_decay_end = 0.996, 0.2
    c.batch_size, c.total_steps = 128, 20_000
    c.optim.lr, c.optim.warmup_steps, c.optim.b2, c.optim.layer_decay = 2e-4, 500, 0.99, 1.0
    c.log_every, c.save_every, c.eval_every = 50, 1000, 2000
    c.evals.knn = evaluator("knn", at_start=True)
    c.evals.norms = evaluator("norms", at_start=True)
    c.evals.maps = evaluator("maps", at_start=True)
    return c
