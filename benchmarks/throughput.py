"""Images per second of ViT-S, B and L/14 with 4 registers: forward and one training step, ours beside a peer.

    python benchmarks/throughput.py                                 all there is for the device here
    python benchmarks/throughput.py --small                         ViT-S alone, for a machine with 2 cores
    python benchmarks/throughput.py --models=l --work=train --remat=named --unroll=no --json=out.json

The peer is timm's model of the same architecture: with torch.compile and half precision on a GPU, eager in float32 on a
CPU; --peer=huggingface is transformers' (sdpa). Without PyTorch ours runs alone.

Every contender is a process of its own, so nobody shares threads or memory, and they take turns: one repetition each,
in alternating order, only one at a time. So both see the same clocks and the same noise; "ratio" is the median of ours
over the peer's within a repetition. A figure is the median over the repetitions with the lowest and the highest in
brackets. Figures of different machines do not compare, ratios do.

Forward: all tokens after the final norm, weights in the dtype of the computation. Training: cross-entropy over 1000
classes and AdamW on float32 weights, computed in --dtype (autocast in PyTorch). Inputs are synthetic and already on the
device. MFU: FLOPs by formula (regvit_jax/flops.py; training 3 x forward, what remat repeats does not count) over the
FLOP/s of a large matmul measured at the start. Memory: the allocator's peak on a GPU, the process's on a CPU.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import select
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the package, where it is not installed

from regvit_jax import xla_flags  # noqa: E402

PEERS = {"timm": ("torch", "timm"), "huggingface": ("torch", "transformers"), "none": ()}


class Failed(Exception):
    """A contender did not come to a result; the reason is its message."""


class Contender:
    """A process of contenders.py, built and warm when the constructor returns.

    Args:
      options: what it is to run.
      seconds: that it may take to get there, and later for any answer.
    """

    def __init__(self, options: dict[str, Any], seconds: float):
        self.name, self._seconds = options["contender"], seconds
        self._errors = tempfile.TemporaryFile("w+")
        command = [sys.executable, str(HERE / "contenders.py"), json.dumps(options)]
        pipe = subprocess.PIPE
        self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._errors, text=True, bufsize=1)
        try:
            self.told = self._answer()
        except BaseException:
            self.close()
            raise

    def measure(self, steps: int) -> float:
        """Seconds of `steps` steps."""
        return self._ask(f"go {steps}")["seconds"]

    def peak_bytes(self) -> int:
        """The end of it."""
        return self._ask("end")["peak_bytes"]

    def close(self) -> None:
        self._child.kill()
        self._child.communicate()
        self._errors.close()

    def _ask(self, command: str) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # it died: the missing answer says why
            self._child.stdin.write(command + "\n")
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        ready, _, _ = select.select([self._child.stdout], [], [], max(0.0, self._seconds))
        line = self._child.stdout.readline() if ready else ""
        if line:
            return json.loads(line)
        if not ready:
            raise Failed(f"{self.name} took more than {self._seconds:.0f} s")
        self._errors.seek(0)
        lines = [line for line in self._errors.read().splitlines() if line.strip()]
        raise Failed(f"{self.name}: {lines[-1] if lines else 'ended without a word'}")


def compare(options: dict[str, Any], names: list[str], steps: int, repetitions: int, seconds: float) -> list[dict]:
    """One model and one kind of work: a row for each contender, ours first."""
    contenders, rows = [], []
    try:
        for name in names:
            row = {"model": options["model"], "work": options["work"], "batch": options["batch"], "contender": name}
            rows.append(row)
            start = time.monotonic()
            try:
                contenders.append((Contender(options | {"contender": name}, seconds), row | {"seconds": []}))
            except Failed as failure:
                row["failed"] = str(failure)
            seconds -= time.monotonic() - start
        for repetition in range(repetitions):
            for contender, row in contenders[:: -1 if repetition % 2 else 1]:
                row["seconds"].append(contender.measure(steps) / steps)
        for contender, row in contenders:
            row |= contender.told | {"peak_bytes": contender.peak_bytes()}
    except Failed as failure:
        return [row | {"failed": str(failure)} for row in rows]
    finally:
        for contender, _ in contenders:
            contender.close()
    measured = {row["contender"]: row for _, row in contenders}
    return [measured[row["contender"]] if row["contender"] in measured else row for row in rows]


def summarise(rows: list[dict], flops_per_image: float, peak_flops: float) -> list[dict]:
    """Adds images_per_second (median, low, high), mfu, and to ours the ratio to the peer, to rows that have seconds."""
    for row in rows:
        if "seconds" in row:
            rates = [row["batch"] / s for s in row["seconds"]]
            row["images_per_second"] = [statistics.median(rates), min(rates), max(rates)]
            row["mfu"] = row["images_per_second"][0] * flops_per_image / peak_flops
    if len(rows) == 2 and all("seconds" in row for row in rows):
        ours, peer = rows
        ratios = [theirs / mine for mine, theirs in zip(ours["seconds"], peer["seconds"], strict=True)]
        ours["ratio"] = [statistics.median(ratios), min(ratios), max(ratios)]
    return rows


def table(rows: list[dict]) -> str:
    """The rows as text."""
    head = f"{'model':6}{'work':9}{'batch':>5}  {'contender':12}"
    lines = [f"{head}{'img/s':>24}{'ms':>9}{'MFU':>6}{'GiB':>7}  {'ratio':24}how"]
    for row in rows:
        head = f"{row['model']:6}{row['work']:9}{row['batch']:5}  {row['contender']:12}"
        if "failed" in row:
            lines.append(f"{head}{row['failed']}")
            continue
        median, low, high = row["images_per_second"]
        rate = f"{median:.4g} ({low:.4g}-{high:.4g})"
        ratio = "{:.3f} ({:.3f}-{:.3f})".format(*row["ratio"]) if "ratio" in row else ""
        memory = row["peak_bytes"] / 2**30
        ms = 1e3 * row["batch"] / median
        lines.append(f"{head}{rate:>24}{ms:9.1f}{row['mfu']:6.2f}{memory:7.2f}  {ratio:24}{row['what']}")
    return "\n".join(lines)


def parse(argv: list[str], device: str) -> argparse.Namespace:
    """Options, with what they leave open filled in for `device` ("cuda", "tpu" or "cpu")."""
    gpu = device != "cpu"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", help="of s, b, l, in the order to run them; l,b,s on an accelerator, s,b on a CPU")
    p.add_argument("--work", default="forward,train", help="of forward, train (default both)")
    p.add_argument("--peer", default="timm", choices=PEERS, help="whom to measure beside ours (default timm)")
    p.add_argument("--batch", type=int, default=128 if gpu else 8, help="images a step (128, on a CPU 8)")
    p.add_argument("--dtype", default="bfloat16" if gpu else "float32", choices=("bfloat16", "float32"))
    p.add_argument("--attention", default="auto", choices=("auto", "cudnn", "xla", "reference"), help="ours")
    p.add_argument("--remat", default="none", choices=("none", "dots", "named", "full"), help="ours, in training")
    p.add_argument("--unroll", default="yes" if gpu else "no", choices=("yes", "no"), help="ours: a loop or a scan")
    p.add_argument("--xla_flags", default="default", choices=xla_flags.CHOICES, help="ours: as --config.xla_flags")
    p.add_argument("--compile", default="yes" if gpu else "no", choices=("yes", "no"), help="the peer: torch.compile")
    p.add_argument("--steps", type=int, default=20 if gpu else 2, help="in a repetition (20, on a CPU 2)")
    p.add_argument("--repetitions", type=int, default=5, help="of everybody, taking turns (5)")
    p.add_argument("--image_size", type=int, default=224, help="side in pixels (224: 261 tokens)")
    p.add_argument("--depth", type=int, default=0, help="blocks instead of the model's own, to try things out")
    p.add_argument("--small", action="store_true", help="ViT-S, batch 8, 3 repetitions: some minutes on 2 cores")
    p.add_argument("--minutes", type=float, default=9.0, help="after which nothing new is begun (9)")
    p.add_argument("--json", type=Path, help="file for the results (default: throughput.json in $OUT, if that is set)")
    o = p.parse_args(argv)
    if o.small:
        o.models, o.batch, o.repetitions = o.models or "s", min(o.batch, 8), min(o.repetitions, 3)
    o.models = (o.models or ("l,b,s" if gpu else "s,b")).split(",")
    o.work = o.work.split(",")
    for name, values, known in (("models", o.models, "sbl"), ("work", o.work, ("forward", "train"))):
        if wrong := [value for value in values if value not in known or not value]:
            p.error(f"--{name}: {', '.join(wrong)} is none of {', '.join(known)}")
    for name in ("batch", "steps", "repetitions", "image_size"):
        if getattr(o, name) < 1:
            p.error(f"--{name} must be 1 or more")
    if o.json is None and os.environ.get("OUT"):
        o.json = Path(os.environ["OUT"], "throughput.json")
    return o


def main(argv: list[str]) -> int:
    device = xla_flags.platform()
    o = parse(argv, device)
    deadline = time.monotonic() + 60 * o.minutes
    options = vars(o) | {"unroll": o.unroll == "yes", "compile": o.compile == "yes", "platform": device}
    del options["json"]
    names = ["ours", o.peer]
    if missing := [package for package in PEERS[o.peer] if importlib.util.find_spec(package) is None]:
        print(f"{' and '.join(missing)} not installed: ours alone")
    if missing or o.peer == "none" or device == "tpu":
        names = ["ours"]
    try:
        child = Contender(options | {"contender": "peak"}, 120)
    except Failed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    facts = child.told
    child.close()
    peak = f"{facts['measured_on']}: {facts['peak_flops'] / 1e12:.4g} TFLOP/s"
    print(f"{facts['device']}, {peak}, jax {facts['versions']['jax']}")
    report = {"time": time.strftime("%Y-%m-%d %H:%M:%S %z"), "host": platform.node(), "cores": os.cpu_count()}
    report |= {"python": platform.python_version(), "options": options} | facts | {"results": []}
    for model in o.models:
        for work in o.work:
            left = deadline - time.monotonic()
            if left <= 0:
                print(f"{model} {work}: not begun, --minutes={o.minutes:g} are over")
                continue
            rows = compare(options | {"model": model, "work": work}, names, o.steps, o.repetitions, left)
            flops = facts["flops"][model] * (3 if work == "train" else 1)
            report["results"] += summarise(rows, flops, facts["peak_flops"])
            for note in dict.fromkeys(note for row in rows for note in row.get("notes", ())):
                print(f"  {note}")
            print(table(rows), flush=True)
            if o.json:
                o.json.write_text(json.dumps(report, indent=1) + "\n")
    print("\n" + table(report["results"]))
    return 1 if not report["results"] or any("failed" in row for row in report["results"]) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
