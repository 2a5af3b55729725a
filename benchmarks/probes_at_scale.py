"""k-NN and one epoch of the 52-head linear probe on as many features as ImageNet gives: time and peak memory.

    python benchmarks/probes_at_scale.py --json=probes.json               1,281,167 x 1,024 float16, 1,000 classes
    python benchmarks/probes_at_scale.py --rows=20000 --queries=1000      the same for a small machine

The features are random, with a mean for each class, in files that are mapped into memory: five of rows x width, as the
grid of heads reads the class tokens of four blocks and the mean patch token (13 GiB in all; --scratch says where). k-NN
reads one of them. Both probes are a process of their own, so that each has a peak of its own; "private" is the memory
that it holds itself, "resident" has those pages of the files that the system left in memory too. Without the files'
pages nothing grows with the number of rows.
"""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # the package, where it is not installed

BLOCKS = 4
PROBES = ("knn", "grid")
_ROWS_AT_ONCE = 16384


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    if args.probe:
        print(json.dumps(PROBE[args.probe](args, pathlib.Path(args.scratch))))
        return 0
    with tempfile.TemporaryDirectory(dir=args.scratch or None, prefix="regvit_probes_") as scratch:
        start = time.perf_counter()
        size = write(pathlib.Path(scratch), args)
        report = {
            "options": {key: value for key, value in vars(args).items() if key not in ("probe", "json", "scratch")}
        }
        report |= {"files_gib": size / 2**30, "files_seconds": round(time.perf_counter() - start, 1)}
        print(f"{size / 2**30:.2f} GiB of features written", file=sys.stderr)
        for probe in args.only.split(","):
            report[probe] = _in_a_process(probe, args, scratch)
            print(json.dumps({probe: report[probe]}), file=sys.stderr)
    report["machine"] = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    report["machine"]["load"] = os.getloadavg()[0]
    text = json.dumps(report, indent=2)
    print(text)
    if args.json:
        pathlib.Path(args.json).write_text(text + "\n")
    return 0


def _arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_281_167, help="training samples (default: ImageNet's)")
    parser.add_argument("--queries", type=int, default=50_000, help="evaluation samples (default: ImageNet's)")
    parser.add_argument("--width", type=int, default=1024, help="of the network (default: that of ViT-L)")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--dtype", default="float16", choices=("float16", "float32"), help="of the files")
    parser.add_argument("--batch", type=int, default=1024, help="samples of one update of the heads")
    parser.add_argument("--steps", type=int, default=0, help="updates of the heads; 0: one epoch")
    parser.add_argument("--only", default="knn,grid", help="which probes")
    parser.add_argument("--scratch", default="", help="folder for the files (default: the system's)")
    parser.add_argument("--json", default="", help="file for the numbers")
    parser.add_argument("--probe", default="", choices=("", *PROBES), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if set(args.only.split(",")) - set(PROBES):
        parser.error(f"--only takes {' and '.join(PROBES)}")
    return args


def write(folder: pathlib.Path, args) -> int:
    """Features of all parts and splits, part by part; returns their bytes."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(args.classes, args.width)).astype(np.float32)
    spread = 4 * (args.width / 1024) ** 0.5  # Neither hopeless nor trivial, whatever the width.
    size = 0
    for split, rows in (("train", args.rows), ("test", args.queries)):
        labels = rng.integers(args.classes, size=rows).astype(np.int32)
        np.save(folder / f"{split}_labels.npy", labels)
        for part in range(BLOCKS + 1):
            shape = rows, args.width
            file = np.lib.format.open_memmap(folder / f"{split}_{part}.npy", "w+", np.dtype(args.dtype), shape)
            for start in range(0, rows, _ROWS_AT_ONCE):
                own = labels[start : start + _ROWS_AT_ONCE]
                noise = rng.standard_normal((len(own), args.width), np.float32)
                file[start : start + len(own)] = means[own] + spread * noise
            file.flush()
            size += file.nbytes
            del file
    return size


def knn(args, folder: pathlib.Path) -> dict:
    from regvit_jax import sharding
    from regvit_jax.evals.knn import knn_accuracy

    train, test = (_load(folder, split, 1)[0] for split in ("train", "test"))
    labels = [np.load(folder / f"{split}_labels.npy") for split in ("train", "test")]
    mesh = sharding.make_mesh()
    with Memory() as memory:
        found = knn_accuracy(train, labels[0], test, labels[1], num_classes=args.classes, mesh=mesh)
    return {"accuracy": found, "queries_per_second": args.queries / memory.seconds} | memory.report()


def grid(args, folder: pathlib.Path) -> dict:
    from regvit_jax import sharding
    from regvit_jax.data.feed import feed_rows
    from regvit_jax.evals.features import Features
    from regvit_jax.evals.grid_heads import GridLoss, Inputs, KeptFeatures, init_heads, measure, sgd
    from regvit_jax.evals.head_training import train_head
    from regvit_jax.evals.linear_grid import LR

    inputs = Inputs(tuple((blocks, pool) for blocks in (1, BLOCKS) for pool in (0, 1)))
    train, test = (
        dict(zip(inputs.outputs, _load(folder, split, BLOCKS + 1), strict=True)) for split in ("train", "test")
    )
    labels = {split: np.load(folder / f"{split}_labels.npy") for split in ("train", "test")}
    steps = args.steps or -(-args.rows // args.batch)
    mesh = sharding.make_mesh()

    def open_feed(first, rows):
        arrays = train | {"label": labels["train"]}
        return feed_rows(arrays, mesh, seed=0, batch_size=rows, start_step=first, stop_step=steps)

    with Memory() as memory:
        heads = train_head(
            None,
            open_feed,
            features=KeptFeatures(inputs.outputs),
            init_head=lambda key: init_heads(key, inputs, args.width, len(LR), args.classes),
            loss=GridLoss(inputs),
            tx=sgd(tuple(lr * args.batch / 256 for lr in LR), steps),
            steps=steps,
            batch_size=args.batch,
            seed=0,
            mesh=mesh,
            label="grid of heads",
        )
        training = time.perf_counter() - memory.start
        index = np.arange(args.queries)
        features = Features(test, labels["test"], index, tuple(map(str, range(args.classes))), "", "")
        top1 = measure(heads, inputs, features, batch_size=256, mesh=mesh)["top1"]
    return {
        "steps": steps,
        "training_seconds": round(training, 2),
        "samples_per_second": steps * args.batch / training,
        "best_top1": float(top1.max()),
    } | memory.report()


PROBE = {"knn": knn, "grid": grid}


class Memory:
    """Time and peak memory of what is inside, sampled ten times a second; Linux only, elsewhere without memory."""

    def __enter__(self):
        self.private = self.resident = 0
        self.start, self._done = time.perf_counter(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error):
        self.seconds = time.perf_counter() - self.start
        self._done.set()
        self._thread.join()

    def _watch(self):
        while True:
            self._sample()
            if self._done.wait(0.1):
                return

    def _sample(self):
        status = pathlib.Path("/proc/self/status")
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines()) if status.is_file() else {}
        sizes = {key: int(lines[key].split()[0]) * 1024 for key in ("RssAnon", "VmRSS") if key in lines}
        self.private = max(self.private, sizes.get("RssAnon", 0))
        self.resident = max(self.resident, sizes.get("VmRSS", 0))

    def report(self) -> dict:
        import jax

        device = jax.devices()[0]
        stats = device.memory_stats() or {}
        return {
            "seconds": round(self.seconds, 2),
            "peak_private_gib": self.private / 2**30,
            "peak_resident_gib": self.resident / 2**30,
            "peak_device_gib": stats.get("peak_bytes_in_use", 0) / 2**30,
            "devices": f"{jax.device_count()} x {device.device_kind}",
        }


def _load(folder, split, parts):
    return [np.load(folder / f"{split}_{part}.npy", mmap_mode="r") for part in range(parts)]


def _in_a_process(probe, args, scratch):
    options = [f"--{key}={getattr(args, key)}" for key in ("rows", "queries", "width", "classes", "batch", "steps")]
    command = [sys.executable, os.path.abspath(__file__), *options, f"--probe={probe}", f"--scratch={scratch}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
