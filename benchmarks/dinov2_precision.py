"""Loss curves of DINOv2 in bfloat16 and in float32 side by side: does the cheaper arithmetic learn the same?

    python benchmarks/dinov2_precision.py                               300 steps of configs/dinov2_scenes.py, 2 seeds
    python benchmarks/dinov2_precision.py --steps=1000 --seeds=0,1,2 --out=runs/precision
    python benchmarks/dinov2_precision.py --config=configs/dinov2_cifar10.py --train=npz:cifar10_jpeg.npz

Every seed is trained twice, in the two arithmetics, on the same images, crops and masks from the same weights: master
weights, moments, the teacher's average and the losses are float32 in both. Curves of one seed part even so, as those of
two seeds do. So two distances are told, of every curve's mean over the last quarter: between the arithmetics (mean over
the seeds), and between the seeds (standard deviation, mean over the arithmetics). Where the first is not above the
second, bfloat16 changes no more than chance does.

Writes precision.json and precision.png into --out; what is finished stays when --minutes end it.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the package, where it is not installed

DTYPES = ("float32", "bfloat16")
COLOURS = {"float32": "tab:blue", "bfloat16": "tab:orange"}
# The loss, its terms, and what would show a collapse.
CURVES = ("loss", "dino_global", "dino_local", "ibot", "koleo", "teacher_entropy", "prototypes_used", "grad_norm")


def main(argv: list[str]) -> int:
    o = parse(argv)
    from regvit_jax import xla_flags

    xla_flags.append("default")
    import jax

    deadline = time.monotonic() + 60 * o.minutes
    report = {"config": str(o.config), "steps": o.steps, "device": jax.devices()[0].device_kind, "runs": []}
    o.out.mkdir(parents=True, exist_ok=True)
    for seed in o.seeds:
        for dtype in DTYPES:
            if time.monotonic() > deadline:
                print(f"seed {seed}, {dtype}: not begun, --minutes={o.minutes:g} are over")
                continue
            start = time.monotonic()
            curves = run(o, seed, dtype)
            done = {"seed": seed, "dtype": dtype, "seconds": time.monotonic() - start, "curves": curves}
            report["runs"].append(done)
            print(f"seed {seed}, {dtype}: {done['seconds']:.0f} s, loss {curves['loss'][-1]:.4f}", flush=True)
            report["apart"] = apart(report["runs"])
            (o.out / "precision.json").write_text(json.dumps(report, indent=1) + "\n")
            picture(report, o.out / "precision.png")
    if report["runs"]:
        print(table(report))
    return 0 if len(report["runs"]) == len(o.seeds) * len(DTYPES) else 1


def run(o: argparse.Namespace, seed: int, dtype: str) -> dict[str, list[float]]:
    """{curve: values} of one training run, and "step"."""
    from regvit_jax import train

    spec = importlib.util.spec_from_file_location("config_to_compare", o.config)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = module.get_config()
    c.seed, c.dtype, c.log_every, c.save_every, c.eval_every = seed, dtype, o.every, 0, 0
    # The schedules of the config, pressed into so many steps.
    c.optim.warmup_steps = round(c.optim.warmup_steps * o.steps / c.total_steps)
    c.total_steps = o.steps
    if o.train:
        c.data.train = o.train
    with tempfile.TemporaryDirectory(prefix="regvit_precision_") as workdir:
        train.run(c, workdir)
        lines = [json.loads(line) for line in Path(workdir, "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    return {name: [line[name] for line in lines] for name in ("step", *CURVES) if name in lines[0]}


def apart(runs: list[dict]) -> dict[str, dict[str, float | None]]:
    """{curve: {"dtypes", "seeds", "mean"}}: how far means over the last quarter lie apart, as the top of the file says;
    None where there are no two to compare."""
    found = {}
    for name in runs[0]["curves"].keys() - {"step"}:
        ends = {}
        for one in runs:
            values = one["curves"][name]
            ends[one["seed"], one["dtype"]] = statistics.fmean(values[-max(len(values) // 4, 1) :])
        seeds = {seed for seed, _ in ends}
        pairs = [abs(ends[s, "bfloat16"] - ends[s, "float32"]) for s in seeds if all((s, d) in ends for d in DTYPES)]
        groups = [[value for (_, d), value in ends.items() if d == dtype] for dtype in DTYPES]
        spreads = [statistics.stdev(group) for group in groups if len(group) > 1]
        found[name] = {
            "dtypes": statistics.fmean(pairs) if pairs else None,
            "seeds": statistics.fmean(spreads) if spreads else None,
            "mean": statistics.fmean(ends.values()),
        }
    return found


def table(report: dict) -> str:
    lines = [f"{report['config']} on {report['device']}, {report['steps']} steps; the last quarter:"]
    lines.append(f"{'':18}{'mean':>10}{'bf16 - fp32':>13}{'seeds':>10}")
    for name in CURVES:
        if name in report["apart"]:
            row = report["apart"][name]
            dtypes, seeds = ("-" if row[k] is None else f"{row[k]:.2g}" for k in ("dtypes", "seeds"))
            lines.append(f"{name:18}{row['mean']:10.4g}{dtypes:>13}{seeds:>10}")
    return "\n".join(lines)


def picture(report: dict, path: Path) -> None:
    """All curves, the dtype by colour, the seed by the kind of line."""
    from matplotlib.figure import Figure

    names = [name for name in CURVES if name in report["runs"][0]["curves"]]
    figure = Figure(figsize=(13, 6), layout="constrained")
    seeds = list(dict.fromkeys(one["seed"] for one in report["runs"]))
    for axis, name in zip(figure.subplots(2, (len(names) + 1) // 2, squeeze=False).flat, names, strict=False):
        for one in report["runs"]:
            style = ("-", "--", ":", "-.")[seeds.index(one["seed"]) % 4]
            label = f"{one['dtype']}, seed {one['seed']}"
            axis.plot(one["curves"]["step"], one["curves"][name], style, color=COLOURS[one["dtype"]], lw=1, label=label)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
    figure.axes[0].legend(fontsize=7)
    figure.suptitle(f"{report['config']}, {report['device']}", fontsize=10)
    figure.savefig(path, dpi=110)


def parse(argv: list[str]) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--config", type=Path, default=HERE.parent / "configs" / "dinov2_scenes.py", help="a DINOv2 config")
    p.add_argument("--train", default="", help="training source in place of the config's")
    p.add_argument("--steps", type=int, default=300, help="of each run; its schedules end there (300)")
    p.add_argument("--every", type=int, default=5, help="steps between points of a curve (5)")
    p.add_argument("--seeds", default="0,1", help="with two or more, the distance between them is told (0,1)")
    p.add_argument("--minutes", type=float, default=60.0, help="after which no new run is begun (60)")
    p.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/precision")), help="folder of results")
    o = p.parse_args(argv)
    try:
        o.seeds = [int(seed) for seed in o.seeds.split(",")]
    except ValueError:
        p.error(f"--seeds={o.seeds!r}: numbers with commas between them")
    if min(o.steps, o.every) < 1:
        p.error("--steps and --every must be 1 or more")
    if not o.config.is_file():
        p.error(f"--config={o.config}: no such file")
    return o


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
