"""What a DINOv2 training step costs on the device here, and which of its parts take the time.

    python benchmarks/dinov2_step.py                                    ViT-L/14, batch 32 and 64; on a CPU a toy
    python benchmarks/dinov2_step.py --batch=16 --prototypes=131072
    python benchmarks/dinov2_step.py --compare=bf16,float32 --model=vits14 --json=out.json
    python benchmarks/dinov2_step.py --batch=64 --remat=named --unroll=no

The step is the one that a run takes (train.build_step): 2 crops of 224 and 8 of 98 pixels cut from uint8 images that
lie on the device, 4 registers, stochastic depth, DINO, iBOT and KoLeo, targets by Sinkhorn-Knopp, AdamW, the teacher's
average. What it sees are random pixels, which cost what photos cost.

Every batch and dtype is a process of its own, so that its peak memory is its own. ms: median over --repetitions of the
mean of --steps, lowest and highest in brackets; the host waits at the end of a repetition only. TFLOP: by formula
(regvit_jax/flops.py): what stochastic depth drops, what remat repeats, augmentation and losses do not count. "of peak":
TFLOP/s over those of a large square matmul, measured in the same process.

Parts: each of them compiled alone on the arrays that it meets in the step; the student's trunks and the heads forward
and backward, "heads" with the teacher's. Alone, a part reads and writes what the step keeps in registers, and nothing
overlaps, so the sum may be above the step; where it is below, the step loses time between its parts (more live memory,
slower kernels). Read shares as shares of the sum.

No array of all tokens times all prototypes may exist: the largest one over the prototypes is looked up in the compiled
step, and as many rows as the global crops have patches are an error.
"""

import argparse
import json
import os
import platform
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # the package, where it is not installed; dinov2_parts.py

from dinov2_parts import MODELS, median  # noqa: E402

from regvit_jax import xla_flags  # noqa: E402

DTYPES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp32": "float32", "float32": "float32"}


def main(argv: list[str]) -> int:
    o = parse(argv, xla_flags.platform())
    deadline = time.monotonic() + 60 * o.minutes
    options = {name: value for name, value in vars(o).items() if name not in ("json", "batches", "dtypes", "minutes")}
    report = {"time": time.strftime("%Y-%m-%d %H:%M:%S %z"), "host": platform.node(), "options": options, "rows": []}

    def keep():
        if o.json:
            o.json.write_text(json.dumps(report, indent=1) + "\n")

    for batch in o.batches:
        for dtype in o.dtypes:
            row = {"model": o.model, "batch": batch, "dtype": dtype, "prototypes": o.prototypes}
            report["rows"].append(row)
            run(options | {"batch": batch, "dtype": dtype}, row, deadline, keep)
            print(table([row]), flush=True)
    print(compared(report["rows"]))
    return 1 if any("failed" in row for row in report["rows"]) else 0


def run(options: dict, row: dict, deadline: float, keep) -> None:
    """Fills a row from a process of dinov2_parts.py, piece by piece; `keep` is called after each."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        row["failed"] = "not begun, --minutes are over"
        return keep()
    command = [sys.executable, str(HERE / "dinov2_parts.py"), json.dumps(options)]
    with tempfile.TemporaryFile("w+") as errors:
        # Unbuffered: a line that lay in a buffer here would be one that select does not see.
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, bufsize=0)
        try:
            while "complete" not in row:
                ready, _, _ = select.select([child.stdout], [], [], max(0.0, deadline - time.monotonic()))
                line = child.stdout.readline() if ready else b""
                if not line:
                    errors.seek(0)
                    said = [text for text in errors.read().splitlines() if text.strip()]
                    row["failed"] = (said[-1] if said else "ended without a word") if ready else "--minutes are over"
                    break
                row |= json.loads(line)
                keep()
        finally:
            child.kill()
            child.communicate()
    keep()


def table(rows: list[dict]) -> str:
    """The rows as text, each with its parts."""
    lines = []
    for row in rows:
        name = f"{row['model']}, batch {row['batch']}, {row['dtype']}, {row['prototypes']:,} prototypes"
        if "device" in row:
            peak = f"{row['peak_of']} {row['peak_flops'] / 1e12:.4g} TFLOP/s"
            lines.append(f"{name}: {row['device']}, {peak}, jax {row['jax']}")
        else:
            lines.append(f"{name}:")
        if "seconds" in row:
            lines += _step_lines(row)
        if "parts" in row:
            lines += _part_lines(row)
        if "failed" in row:
            lines.append(f"  stopped: {row['failed']}")
    return "\n".join(lines)


def _step_lines(row: dict) -> list[str]:
    step, low, high = median(row), min(row["seconds"]), max(row["seconds"])
    share, memory = row["flops"] / step / row["peak_flops"], f"{row['peak_bytes'] / 2**30:.1f} GiB"
    memory += f" at most on the {row['peak_bytes_of']}"
    if row["program_bytes"] is not None:
        memory += f" ({row['program_bytes'] / 2**30:.1f} GiB by the compiler)"
    return [
        f"  {row['batch'] / step:.4g} img/s, step {1e3 * step:.4g} ms ({1e3 * low:.4g}-{1e3 * high:.4g}), "
        f"{row['flops'] / 1e12:.3g} TFLOP, {share:.2f} of peak; {memory}",
        f"  logits of at most {row['logits_rows']:,} rows; all tokens would be {row['patches']:,}",
    ]


def _part_lines(row: dict) -> list[str]:
    lines = [f"  {'':24}{'ms':>10}{'of step':>9}{'of sum':>8}{'TFLOP':>9}{'of peak':>9}"]
    total, step = sum(median(part) for part in row["parts"].values()), median(row)
    for name, part in row["parts"].items():
        seconds, work = median(part), ""
        if part["flops"]:
            work = f"{part['flops'] / 1e12:9.3g}{part['flops'] / seconds / row['peak_flops']:9.2f}"
        lines.append(f"  {name:24}{1e3 * seconds:10.4g}{seconds / step:9.1%}{seconds / total:8.1%}{work}")
    lines.append(f"  {'sum':24}{1e3 * total:10.4g}{total / step:9.1%}")
    return lines


def compared(rows: list[dict]) -> str:
    """How the dtypes of a batch relate."""
    lines, done = [], [row for row in rows if "seconds" in row]
    for batch in dict.fromkeys(row["batch"] for row in done):
        first, *others = (row for row in done if row["batch"] == batch)
        for row in others:
            slower, larger = median(row) / median(first), row["peak_bytes"] / first["peak_bytes"]
            who = f"batch {batch}: {row['dtype']} takes"
            lines.append(f"{who} {slower:.2f} x the time and {larger:.2f} x the memory of {first['dtype']}")
    return "\n".join(lines)


def parse(argv: list[str], device: str) -> argparse.Namespace:
    """Options, with what they leave open filled in for `device` ("cuda", "tpu" or "cpu")."""
    gpu = device != "cpu"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="vitl14" if gpu else "tiny", choices=MODELS, help="(vitl14; on a CPU tiny)")
    p.add_argument("--batch", dest="batches", default="32,64" if gpu else "8", help="images a step (32,64; on a CPU 8)")
    p.add_argument("--prototypes", type=int, default=0, help="of the one head (65536, of tiny 512)")
    p.add_argument("--dtype", "--compare", dest="dtypes", default="bf16" if gpu else "float32",
                   help="of bf16, float32: one, or two to compare (bf16; on a CPU float32)")  # fmt: skip
    p.add_argument("--drop_path", type=float, default=0.3, help="share of branches not computed for a sample (0.3)")
    p.add_argument("--remat", default="none", choices=("none", "dots", "named", "full"), help="as --config.remat")
    p.add_argument("--unroll", default="yes" if gpu else "no", choices=("yes", "no"), help="a loop or a scan of blocks")
    p.add_argument("--attention", default="auto", choices=("auto", "cudnn", "xla", "reference"), help="as --config.…")
    p.add_argument("--xla_flags", default="default", choices=xla_flags.CHOICES, help="as --config.xla_flags")
    p.add_argument("--steps", type=int, default=10 if gpu else 1, help="in a repetition (10, on a CPU 1)")
    p.add_argument("--repetitions", type=int, default=5, help="of the step and of each part (5)")
    p.add_argument("--minutes", type=float, default=9.0, help="after which what is running is ended; kept is what came")
    p.add_argument("--json", type=Path, help="file for the results (default: dinov2_step.json in $OUT, if that is set)")
    o = p.parse_args(argv)
    o.unroll = o.unroll == "yes"
    o.prototypes = o.prototypes or (512 if o.model == "tiny" else 65_536)
    try:
        o.batches = [int(batch) for batch in o.batches.split(",")]
    except ValueError:
        p.error(f"--batch={o.batches!r}: numbers with commas between them")
    if wrong := [name for name in o.dtypes.split(",") if name not in DTYPES]:
        p.error(f"--dtype: {', '.join(wrong)} is none of {', '.join(DTYPES)}")
    o.dtypes = [DTYPES[name] for name in o.dtypes.split(",")]
    if min(o.batches) < 2:
        p.error("--batch must be 2 or more: KoLeo compares images")
    if min(o.steps, o.repetitions, o.prototypes) < 1:
        p.error("--steps, --repetitions and --prototypes must be 1 or more")
    if o.json is None and os.environ.get("OUT"):
        o.json = Path(os.environ["OUT"], "dinov2_step.json")
    return o


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
