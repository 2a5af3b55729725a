"""A contender of throughput.py, in a process of its own: ours here, the others in peers.py.

python contenders.py '{"contender": "ours", "model": "s", "work": "train", ...}'

It answers in lines of JSON: first what it built, once that is compiled and warm; for "go N" the seconds that N steps
took, the device's work included; for "end" its peak memory.
"""

import dataclasses
import importlib.metadata
import json
import logging
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package, where it is not installed

CLASSES = 1000

# What a contender returns: (run N steps and wait, peak bytes or None for those of the process, what is to be told).
Built = tuple[Callable[[int], None], Callable[[], int | None], dict[str, Any]]


def name_of(model: str) -> str:
    return f"dinov2_vit{model}14_reg4"


def peak(o: dict) -> dict[str, Any]:
    """What MFU is measured against: FLOP/s of a large square matmul, and FLOPs of an image of every model."""
    import jax

    from regvit_jax import flops
    from regvit_jax.models.zoo import config_of

    device = jax.devices()[0]
    side = 2048 if device.platform == "cpu" else 8192
    depth = {"depth": o["depth"]} if o["depth"] else {}
    return {
        "peak_flops": flops.measured_peak(device, o["dtype"], side),
        "measured_on": f"{side}^3 {o['dtype']} matmul",
        "device": device.device_kind,
        "flops": {
            model: flops.forward_flops(config_of(name_of(model), image_size=o["image_size"], **depth))
            for model in o["models"]
        },
        "versions": versions("jax", "jaxlib"),
    }


def ours(o: dict) -> Built:
    """regvit_jax through its public paths: `create_model`, and the step of `train.build_step`."""
    from regvit_jax import xla_flags

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the others need room on the device too
    flags = xla_flags.append(o["xla_flags"])
    import jax

    from regvit_jax.ops import cudnn

    fused, kernel = [], cudnn.kernel

    def recording(*args):
        out = kernel(*args)
        fused.append(out.shape)
        return out

    cudnn.kernel = recording
    run = (_ours_forward if o["work"] == "forward" else _ours_train)(o)
    run(2)
    attention = ("cudnn" if fused else "xla") if o["attention"] != "reference" else "reference"
    what = f"{o['dtype']}, attention {attention}, {'unrolled' if o['unroll'] else 'scan'}"
    what += f", remat {o['remat']}" if o["work"] == "train" else ""

    def memory():
        stats = jax.devices()[0].memory_stats()
        return stats["peak_bytes_in_use"] if stats else None

    return run, memory, {"what": what, "xla_flags": list(flags), "versions": versions("jax", "jaxlib", "flax")}


def _ours_forward(o: dict) -> Callable[[int], None]:
    import jax
    import jax.numpy as jnp

    import regvit_jax as rv

    changes = {"depth": o["depth"]} if o["depth"] else {}
    model = rv.create_model(name_of(o["model"]), image_size=o["image_size"], dtype=o["dtype"], **changes)
    execution = dataclasses.replace(model.run, attention=o["attention"], unroll=o["unroll"])
    model = dataclasses.replace(model, run=execution)
    if o["dtype"] != "float32":
        model = model.astype(o["dtype"])
    images = jnp.asarray(pixels(o) / 128.0 - 1.0, jnp.float32)

    def run(steps: int) -> None:
        for _ in range(steps):
            tokens = model(images)
        jax.block_until_ready(tokens)

    return run


def _ours_train(o: dict) -> Callable[[int], None]:
    import jax

    from regvit_jax import config, sharding, train

    c = config.defaults("supervised")
    c.model.name, c.model.image_size, c.model.num_classes = name_of(o["model"]), o["image_size"], CLASSES
    if o["depth"]:
        c.model.depth = o["depth"]
    c.batch_size, c.dtype, c.remat, c.unroll, c.attention = (
        o["batch"],
        o["dtype"],
        o["remat"],
        o["unroll"],
        o["attention"],
    )
    # What the peer does: cross-entropy and AdamW, nothing else.
    c.supervised.flip, c.optim.clip_norm, c.optim.warmup_steps, c.optim.lr = False, 0.0, 0, 1e-4
    config.validate(c, devices=1)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    jax.set_mesh(mesh)
    step = train.build_step(c, mesh)
    state = step.init()
    labels = np.arange(o["batch"], dtype=np.int32) % CLASSES
    batch = sharding.put({"image": pixels(o), "label": labels}, mesh)

    def run(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            state, scalars = step.update(state, batch)
        jax.block_until_ready((state["step"], scalars))

    return run


def pixels(o: dict) -> np.ndarray:
    """(B, S, S, 3) uint8, the same for everybody."""
    shape = (o["batch"], o["image_size"], o["image_size"], 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def versions(*packages: str) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in packages}


class _Notes(logging.Handler):
    """What the package tells, such as a fallback of attention."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == "root":
            self.lines.append(record.getMessage())


def main(options: dict) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is printed is no answer
    notes = _Notes()
    logging.getLogger().addHandler(notes)
    logging.getLogger().setLevel(logging.INFO)

    def answer(**values) -> None:
        answers.write(json.dumps(values) + "\n")

    if options["contender"] == "peak":
        return answer(**peak(options))
    start = perf_counter()
    if options["contender"] == "ours":
        run, memory, told = ours(options)
    else:
        import peers  # and with it PyTorch, which nothing else here imports

        images = pixels(options)
        run, memory, told = getattr(peers, options["contender"])(options, images, CLASSES)
    answer(**told, notes=notes.lines, setup_seconds=perf_counter() - start)
    for command in sys.stdin:
        word, *count = command.split()
        if word == "end":
            break
        start = perf_counter()
        run(int(count[0]))
        answer(seconds=perf_counter() - start)
    # Linux counts ru_maxrss in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    answer(peak_bytes=memory() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
