"""The self-supervised quickstart: a small Vision Transformer with 4 registers learns from scenes without their labels.

    python -m regvit_jax.main --config=configs/dinov2_scenes.py --workdir=runs/scenes

4,000 rendered scenes of 64 x 64 pixels, drawn on first use (30 s); 981 steps of 128, 31 passes. Meant for 2 CPU cores
and ten minutes; not run to its end yet. What it is compared with is the untrained network, evaluated first.

What makes so short a run work: few prototypes and sharp targets (with 512 at .05 they stay near uniform), crops of 32
and 16 pixels, iBOT at a fifth of its weight (at full weight it crowds out the class token), more KoLeo.
"""

from regvit_jax.config import defaults, evaluator


def get_config():
    c = defaults(recipe="dinov2")
    c.model.name, c.model.image_size, c.model.patch_size, c.model.registers = "vit_s8", 64, 8, 4
    c.model.width, c.model.depth, c.model.num_heads, c.model.mlp_dim = 128, 4, 4, 512
    c.model.layerscale, c.model.position_init, c.model.drop_path = 0.3, "sincos", 0.0
    c.data.train, c.data.crop_ratio, c.data.cache = "scenes:", 1.0, "device"
    o = c.dinov2
    o.source_size, o.global_size, o.local_size, o.local_crops = 64, 32, 16, 2
    o.global_scale, o.local_scale = (0.4, 1.0), (0.1, 0.4)
    o.saturation, o.blur, o.solarize = 0.4, (0.4, 0.4, 0.4), 0.0
    o.prototypes, o.head_hidden, o.bottleneck = 256, 256, 64
    o.centering, o.teacher_temp_start, o.teacher_temp, o.teacher_temp_warmup = "sinkhorn", 0.03, 0.03, 0
    o.ibot_weight, o.koleo_weight = 0.2, 0.3
    o.momentum, o.weight_decay_end, o.lr_scaling, o.patch_embed_lr = 0.99, 0.05, "none", 1.0
    o.freeze_last_layer = 0
    c.batch_size, c.total_steps = 128, 981
    c.optim.lr, c.optim.end_lr, c.optim.warmup_steps, c.optim.layer_decay = 2e-3, 0.0, 98, 1.0
    c.optim.weight_decay, c.optim.b2 = 0.05, 0.98
    c.remat = "dots"  # a CPU recomputes faster than it fetches
    c.log_every, c.save_every, c.eval_every = 25, 500, 981
    c.evals.knn = evaluator("knn", at_start=True)
    c.evals.linear = evaluator("linear", at_start=True)
    c.evals.maps = evaluator("maps", at_start=True)
    return c
