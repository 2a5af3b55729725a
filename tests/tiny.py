"""The smallest run there is, 4 patches and 2 blocks, what can happen to it, and images for it; for tests of training.

python -m regvit_jax.main --config=tests/tiny.py --config.data.train=npz:FILE --workdir=DIR
python -m regvit_jax.main --config=tests/tiny.py:5-SIGKILL …

N-SIGxxx            it gets the signal after step N
N-group-SIGxxx      its data workers get it too, as from a terminal
N-settled-SIGxxx    after step N and when every checkpoint that was begun is whole
N-saving-SIGxxx     at step N, while the checkpoint that was begun there is being written
N-slowly-SIGxxx     steps take half a second, and so does a batch of an evaluation
0-slightly          steps take 20 ms
N-evaluating-SIGxxx between two batches of the evaluation at step N
N-worker-SIGxxx     one of its data workers gets it, not the run

Two signals may stand there: N-SIGINT-SIGINT.
"""

import io
import json
import multiprocessing
import os
import signal
import time

import numpy as np
from PIL import Image

from regvit_jax.config import defaults, evaluator

CLASSES = 4


def get_config(happens=""):
    if happens:
        _let_happen(*happens.split("-"))
    c = defaults(recipe="supervised")
    c.model.name, c.model.image_size, c.model.patch_size, c.model.registers = "vit_ti16", 16, 8, 2
    c.model.width, c.model.depth, c.model.num_heads, c.model.mlp_dim = 32, 2, 2, 64
    c.data.crop = "none"
    c.batch_size, c.total_steps, c.dtype = 8, 12, "float32"
    c.optim.lr, c.optim.warmup_steps = 1e-3, 2
    c.log_every, c.save_every, c.eval_every = 1, 3, 0
    # With --config.eval_every=4, say: two batches of four.
    c.evals.accuracy = evaluator("accuracy", batch_size=4, at_start=True)
    return c


def everything(train: str):
    """The config of a run on `train` that draws random numbers wherever it can, and keeps an average of weights."""
    c = get_config()
    c.data.train, c.batch_size, c.groups, c.total_steps = train, 16, 8, 10
    c.model.drop_path, c.supervised.crop_pad = 0.3, 1
    c.supervised.mixup, c.supervised.cutmix, c.supervised.mix_prob = 0.8, 1.0, 0.8
    c.supervised.smoothing, c.supervised.ema = 0.1, 0.9
    c.optim.layer_decay = 0.75
    c.mesh.fsdp, c.mesh.fsdp_min_bytes = 8, 0
    # The gradient of a key bias is zero but for rounding, which Adam would blow up to the size of the others.
    c.optim.eps = 1e-3
    return c


def write_npz(path, *, train=37, test=8, size=16, seed=0) -> str:
    """Writes an archive of random images, the brighter the higher their class. Returns its source string."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for split, count in (("train", train), ("test", test)):
        labels = np.arange(count) % CLASSES
        encoded = [_png(rng.integers(0, 80, (size, size, 3)) + 40 * label) for label in labels]
        arrays[f"{split}_jpeg"] = np.frombuffer(b"".join(encoded), np.uint8)
        arrays[f"{split}_offsets"] = np.cumsum([0, *map(len, encoded)])
        arrays[f"{split}_labels"] = labels
    np.savez(path, classes=np.array([f"class{i}" for i in range(CLASSES)]), **arrays)
    return f"npz:{path}"


def losses(workdir) -> dict[int, float]:
    """{step: loss} of metrics.jsonl, in the order of its lines."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines) if "loss" in record}


def _let_happen(step, *what):
    from regvit_jax import checkpoint, evaluate, stopping

    requested, save = stopping.Stop.requested, checkpoint.Checkpoints.save
    evaluated, poll = evaluate.run, stopping.poll
    opened, polls = [], []

    def saved(self, at, *args, **options):
        opened[:] = [self]
        started = save(self, at, *args, **options)
        if "saving" in what and at == int(step):
            _strike(what)
        elif "saving" in what:
            self.wait()
        return started

    def asked(self, done):
        if done == int(step) and not {"saving", "evaluating"} & set(what):
            if "settled" in what:
                opened[0].wait()
            _strike(what)
        if "slowly" in what:
            time.sleep(0.5)
        if "slightly" in what:
            time.sleep(0.02)
        return requested(self, done)

    def evaluating(*args, **options):
        polls[:] = [] if options["step"] == int(step) and "evaluating" in what else [None] * 10
        return evaluated(*args, **options)

    def polled():
        polls.append(None)
        if "slowly" in what:
            time.sleep(0.5)
        if len(polls) == 3:  # one before the evaluator, one before each batch
            _strike(what)
        return poll()

    stopping.Stop.requested, checkpoint.Checkpoints.save = asked, saved
    evaluate.run, stopping.poll = evaluating, polled


def _strike(what):
    for name in what:
        if name.startswith("SIG"):
            kill, whom = (os.killpg, os.getpgrp()) if "group" in what else (os.kill, os.getpid())
            if "worker" in what:
                whom = multiprocessing.active_children()[0].pid
            kill(whom, getattr(signal, name))


def _png(pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()
