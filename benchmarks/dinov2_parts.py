"""One row of dinov2_step.py, in a process of its own: the DINOv2 training step whole, then each of its parts alone.

python dinov2_parts.py '{"model": "tiny", "batch": 8, "dtype": "float32", ...}'

It answers in lines of JSON, each with more of the row: what is known so far survives whatever ends it.
"""

import functools
import json
import math
import os
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package, where it is not installed

# Network, side of its global crops and of its local ones.
MODELS = {
    "vitl14": ({"name": "dinov2_vitl14_reg4"}, 224, 98),
    "vits14": ({"name": "dinov2_vits14_reg4"}, 224, 98),
    "tiny": ({"name": "vit_ti16_reg4", "width": 32, "depth": 2, "num_heads": 2, "mlp_dim": 64, "patch_size": 4}, 16, 8),
}
LOCAL_CROPS = 8


def config_of(o: dict) -> Any:
    """The run that is timed: DINOv2's losses with Sinkhorn-Knopp, subset stochastic depth, one head for both losses."""
    from regvit_jax import config

    c, (network, side, local) = config.defaults("dinov2"), MODELS[o["model"]]
    for name, value in network.items():
        c.model[name] = value
    c.model.image_size, c.model.registers, c.model.drop_path, c.model.mask_token = side, 4, o["drop_path"], True
    c.dinov2.local_size, c.dinov2.local_crops, c.dinov2.prototypes = local, LOCAL_CROPS, o["prototypes"]
    c.dinov2.centering = "sinkhorn"
    if o["model"] == "tiny":
        c.dinov2.head_hidden, c.dinov2.bottleneck = 64, 16
        # Crops and flips alone: colours take longer to compile than all of the rest.
        c.dinov2.jitter, c.dinov2.gray, c.dinov2.blur, c.dinov2.solarize = 0.0, 0.0, (0.0, 0.0, 0.0), 0.0
    c.batch_size, c.dtype, c.remat, c.unroll, c.attention = (
        o[name] for name in ("batch", "dtype", "remat", "unroll", "attention")
    )
    config.validate(c, devices=1)
    return c


def measure(o: dict) -> Iterator[dict[str, Any]]:
    """Pieces of the row: the machine; the step with its memory; then one part after the other."""
    import jax

    from regvit_jax import flops, sharding, train

    device = jax.devices()[0]
    o["in_order"] = device.platform != "cpu"  # a CPU may run several programs at once
    side = {"tiny": 256}.get(o["model"], 2048 if device.platform == "cpu" else 8192)
    peak = flops.measured_peak(device, o["dtype"], side)
    yield {"device": device.device_kind, "jax": jax.__version__, "peak_flops": peak, "peak_of": f"{side}^3 matmul"}

    mesh = sharding.make_mesh(devices=[device])
    with jax.set_mesh(mesh):
        step = train.build_step(config_of(o), mesh)
        recipe, state = step.recipe, step.init()
        batch = {name: jax.device_put(_random(name, spec)) for name, spec in recipe.input_spec.items()}
        start = time.perf_counter()
        compiled = step.update.lower(state, batch).compile()
        rows, every = rows_over(compiled.as_text(), o["prototypes"]), 2 * o["batch"] * math.prod(recipe.views.grid)
        yield {
            "compile_seconds": time.perf_counter() - start,
            "logits_rows": rows,
            "patches": every,
            "masked_bound": recipe.views.bound,
            "flops": o["batch"] * recipe.train_flops(),
            "program_bytes": _program_bytes(compiled),
        }
        refuse_all_tokens(rows, every, o["prototypes"])

        def whole():
            nonlocal state
            state, scalars = compiled(state, batch)
            return scalars

        seconds = timed(whole, o)
        stats = device.memory_stats()
        unit = 1 if sys.platform == "darwin" else 1024  # Linux counts ru_maxrss in KiB
        used = stats["peak_bytes_in_use"] if stats else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        yield {"seconds": seconds, "peak_bytes": used, "peak_bytes_of": "device" if stats else "process"}

        found = {}
        for name, run, work in parts(step, state, batch):
            found[name] = {"seconds": timed(run, o), "flops": work}
            yield {"parts": found}


def parts(step, state, batch) -> Iterator[tuple[str, Callable[[], Any], float]]:
    """(name, a call that runs it, FLOPs) of what `recipe.loss` and the update are made of, as programs of their own on
    the arrays that they meet in the step. The student's trunks, heads and losses run forward and backward.

    The last of them donates `state`.
    """
    import jax
    import jax.numpy as jnp

    from regvit_jax.recipes import dinov2_teacher

    recipe, key, temperature = step.recipe, jax.random.key(0), 0.05
    work, extras = flops_of_parts(recipe), state["extras"]

    augment = jax.jit(lambda batch, key: recipe.augment(batch, key, 0))
    yield "augmentation", lambda: augment(batch, key), 0.0
    seen = augment(batch, key)

    look = jax.jit(recipe.teacher_tokens)
    yield "teacher", lambda: look(extras["teacher"]["backbone"], seen), work["teacher"]
    taught = look(extras["teacher"]["backbone"], seen)

    tokens = {"dino": {}}
    for kind in recipe.views.counts:
        run = both_ways(functools.partial(_student, recipe, kind), [state["params"]["backbone"]], seen)
        yield f"student, {kind}", run, work[kind]
        out = run()[0]
        tokens = tokens | out | {"dino": tokens["dino"] | out["dino"]}

    own = {name: state["params"][name] for name in recipe.heads}
    say = jax.jit(lambda heads, tokens: recipe.logits(heads, tokens, recipe.teacher.heads, jnp.float32))
    run = both_ways(lambda heads, tokens: recipe.logits(heads, tokens, recipe.heads), [own, tokens])
    yield "heads", lambda: (say(extras["teacher"], taught), run()), work["heads"]
    said, guessed = say(extras["teacher"], taught), run()[0]

    target = jax.jit(functools.partial(dinov2_teacher.targets, recipe.options))
    given = said, seen["masks"].valid, extras["center"], jnp.float32(temperature)
    yield "Sinkhorn-Knopp", lambda: target(*given), 0.0
    targets = target(*given)

    @jax.jit
    def lose(tokens, logits, targets, masks):
        return jax.grad(lambda t, x: sum(recipe.terms(t, x, targets, masks).values()), (0, 1))(tokens, logits)

    yield "losses", lambda: lose(tokens, guessed, targets, seen["masks"]), 0.0

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state, grads, means):
        params, opt, _ = step.optimizer.update(grads, state["opt"], state["params"], state["step"])
        extras = recipe.after_update(params, state["extras"], {"means": means}, state["step"])
        return {"step": state["step"] + 1, "params": params, "opt": opt, "extras": extras}

    grads = jax.tree.map(lambda x: jnp.full_like(x, 1e-3), state["params"])

    def updated():
        nonlocal state
        state = update(state, grads, targets.means)
        return state["step"]

    yield "optimiser and averages", updated, 0.0


def _student(recipe, kind: str, backbone, seen):
    return recipe.student_tokens(backbone, seen, (kind,))


def both_ways(function: Callable, learnt: list, *rest) -> Callable[[], Any]:
    """A call that computes function(*learnt, *rest) and, from random gradients of that, those of `learnt`."""
    import jax

    @jax.jit
    def run(learnt, rest, slopes):
        out, pull = jax.vjp(lambda *learnt: function(*learnt, *rest), *learnt)
        return out, pull(slopes)

    shapes = jax.eval_shape(function, *learnt, *rest)
    key = jax.random.key(1)
    slopes = jax.tree.map(lambda s: jax.random.normal(key, s.shape, s.dtype), shapes)
    return lambda: run(learnt, rest, slopes)


def flops_of_parts(recipe) -> dict[str, float]:
    """{part: FLOPs of a step} of trunks by kind of crop, and of the heads, which are the rest."""
    from regvit_jax.flops import forward_flops

    views, images = recipe.views, recipe.config.batch_size
    found = {"teacher": 2 * images * forward_flops(recipe.teacher.vit, views.sizes["global"])}
    for kind, crops in views.counts.items():
        one = forward_flops(recipe.vit, views.sizes[kind], kept=views.share_kept(kind))
        found[kind] = 3 * images * crops * one
    return found | {"heads": images * recipe.train_flops() - sum(found.values())}


def timed(run: Callable[[], Any], o: dict) -> list[float]:
    """Seconds a call, one number a repetition; within a repetition nobody waits for a call to end."""
    import jax

    for _ in range(2):
        jax.block_until_ready(run())
    found = []
    for _ in range(o["repetitions"]):
        start = time.perf_counter()
        for _ in range(o["steps"]):
            out = run()
            if not o["in_order"]:
                jax.block_until_ready(out)
        jax.block_until_ready(out)
        found.append((time.perf_counter() - start) / o["steps"])
    return sorted(found)


def rows_over(text: str, prototypes: int) -> int:
    """The most rows that an array over all prototypes has, anywhere in a compiled program."""
    most = 0
    for shape in set(re.findall(r"\[(\d[\d,]*)\]", text)):
        sizes = [int(size) for size in shape.split(",")]
        if prototypes in sizes:
            most = max(most, math.prod(sizes) // prototypes)
    return most


def median(row: dict) -> float:
    return statistics.median(row["seconds"])


def refuse_all_tokens(rows: int, every: int, prototypes: int) -> None:
    """Raises ValueError where a program has as many rows of logits as there are patches."""
    if rows >= every:
        raise ValueError(f"the step has logits of all tokens: {rows} rows of {prototypes} prototypes")


def _program_bytes(compiled) -> int | None:
    """What the step holds while it runs: arguments and temporaries; results lie where arguments did."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + results


def _random(name: str, spec) -> np.ndarray:
    if name == "size":
        return np.full(spec.shape, [375, 500], spec.dtype)
    return np.random.default_rng(0).integers(0, 256, spec.shape, np.uint8)


def main(options: dict) -> None:
    from regvit_jax import xla_flags

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is printed is no answer
    xla_flags.append(options["xla_flags"])
    for piece in measure(options):
        answers.write(json.dumps(piece) + "\n")
    answers.write(json.dumps({"complete": True}) + "\n")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
