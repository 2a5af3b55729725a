"""Distillation: a ViT-S/14 with 4 registers learns from a frozen, released ViT-L/14 on your own images. Two runs.

    python -m regvit_jax.main --config=configs/dinov2_distill.py:teacher --workdir=runs/teacher \
        --config.data.train=folder:/my/images
    python -m regvit_jax.main --config=configs/dinov2_distill.py --workdir=runs/student \
        --config.data.train=folder:/my/images --config.dinov2.distill_from=runs/teacher

Not run on real weights here. Released weights carry no heads, and it is heads that say what a student has to predict:
the first run trains them on the frozen trunk, 10,000 steps without a backward pass through it. A DINOv2 run of your own
has its heads already: give its workdir to the second command and leave the first out (config.dinov2.prototypes and
separate_head are then those of that run).

The second run, 50,000 steps of 128, is the paper's: the frozen network in the teacher's place, no masks, no stochastic
depth, iBOT on all patches of both global crops; saved is a running average of the student. Memory: those are 65,536
patches a step, 4 GiB of float32 for each array of their 16,384 logits (teacher's logits, targets), and two of half that
for the student's; the log says so at the start. It grows with batch_size x prototypes.
"""

from regvit_jax.config import defaults, evaluator


def get_config(stage="student"):
    if stage not in ("teacher", "student"):
        raise ValueError(f"configs/dinov2_distill.py:{stage} is no stage: teacher or student")
    c = defaults(recipe="dinov2")
    c.model.image_size, c.model.drop_path = 224, 0.0
    c.data.train, c.data.workers = "folder:/my/images", 8
    o = c.dinov2
    # Both runs have the same prototypes: one head for class tokens, one for patches.
    o.prototypes, o.ibot_prototypes, o.separate_head, o.centering = 16_384, 16_384, True, "sinkhorn"
    c.batch_size = 128
    c.optim.b2, c.optim.layer_decay = 0.99, 1.0
    if stage == "teacher":
        c.model.name, c.init_from = "dinov2_vitl14_reg4", "dinov2_vitl14_reg4"
        c.total_steps = o.freeze_backbone = 10_000
        o.koleo_weight = 0.0  # it is about the trunk
        o.momentum, o.teacher_temp_warmup, o.freeze_last_layer = 0.996, 4000, 100
        c.optim.lr, c.optim.warmup_steps = 2e-3, 500
    else:
        c.model.name, o.distill_from = "dinov2_vits14_reg4", "runs/teacher"
        c.total_steps = 50_000
        o.mask_prob, o.momentum, o.weight_decay_end = 0.0, 0.994, 0.2
        # The teacher is as sure of its targets at the start as it will ever be.
        o.teacher_temp_start, o.teacher_temp_warmup, o.freeze_last_layer = 0.07, 0, 0
        c.optim.lr, c.optim.warmup_steps = 2e-3, 2500
    c.log_every, c.save_every, c.eval_every = 50, 1000, 5000
    c.evals.knn = evaluator("knn", at_start=True)
    c.evals.norms = evaluator("norms")
    return c
