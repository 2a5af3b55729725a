"""How fast multi-crop augmentation is: all of it on the host with Pillow, or one resize there, crops on a device.

    python benchmarks/multicrop.py                        three settings, on the accelerator if there is one
    python benchmarks/multicrop.py --settings=photos --batch=64 --seconds=20 --json=multicrop.json
    python benchmarks/multicrop.py --train=configs/folder_vit.py --batch=32     augmentation's share of a training step

Settings: "photos" is DINOv2's own, 2 crops of 224 and 8 of 98 pixels, of JPEG photos of 500 x 375 pixels that are
decoded each time and squashed to 256 x 256 for the device; "scenes" (64 pixels, 2 crops of 32 and 2 of 16) and "cifar"
(32 pixels, 2 crops of 32 and 6 of 16) start from decoded images, as a cache in memory holds them.

Three rows a setting: what the host does where it makes the crops (data.augment_on='host'), what it does where the
device makes them, and what the device does. "per core" is img/s by CPU time, so it holds on a busy machine: how many
images a second one core of the host gets ready in the first row and in the second. The device works while the host
prepares the next batch; only where it is this CPU itself do both share the cores, and the times of rows two and three
add up. Of several devices each makes the crops of its own images.

--train=CONFIG times the whole training step of a config, and what `recipe.augment` takes of it, on random images.
"""

import argparse
import importlib.util
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # the package, where it is not installed; input.py

from input import machine, photos  # noqa: E402

from regvit_jax.data.multicrop_host import MultiCropTransform, SquareTransform  # noqa: E402
from regvit_jax.data.multicrop_spec import MultiCrop  # noqa: E402
from regvit_jax.data.transforms import IMAGENET_MEAN, IMAGENET_STD  # noqa: E402

# The crops, and the side of the square that the device gets.
SETTINGS = {
    "photos": (MultiCrop(), 256),
    "scenes": (MultiCrop(32, 16, 2, (0.4, 1.0), (0.1, 0.4)), 64),
    "cifar": (MultiCrop(32, 16, 6), 32),
}


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    report = {"machine": machine(), "batch": args.batch, "rows": []}
    if args.train:
        report["step"] = step_share(args.train, args.batch, args.seconds, args.rounds)
    else:
        with tempfile.TemporaryDirectory(prefix="regvit_multicrop_") as scratch:
            files = [
                str(path) for path in sorted(photos(pathlib.Path(scratch) / "p", args.images, args.small).iterdir())
            ]
            for name in args.settings:
                spec, side = SETTINGS[name]
                images = (
                    files if name == "photos" else [SquareTransform(side)({"image": f}, None)["image"] for f in files]
                )
                report["rows"] += measure(name, spec, side, images, args)
    print(table(report))
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    return 0


def _arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", default=",".join(SETTINGS), help=f"of {', '.join(SETTINGS)} (default: all)")
    parser.add_argument("--batch", type=int, default=32, help="images that the device crops at once (default: 32)")
    parser.add_argument("--images", type=int, default=64, help="how many photos to make (default: 64)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement (default: 5)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each, of which the median (default: 3)")
    parser.add_argument("--train", default="", help="a config file: time its training step instead")
    parser.add_argument("--json", default="", help="file for the numbers")
    parser.add_argument("--small", action="store_true", help="a check that it works; the numbers mean nothing")
    args = parser.parse_args(argv)
    if args.small:
        args.batch, args.images, args.seconds, args.rounds = min(args.batch, 8), 8, 0.1, 1
    args.settings = args.settings.split(",")
    if wrong := [name for name in args.settings if name not in SETTINGS]:
        parser.error(f"--settings: {', '.join(wrong)} is none of {', '.join(SETTINGS)}")
    if args.batch < 1 or args.images < 1 or args.rounds < 1:
        parser.error("--batch, --images and --rounds must be 1 or more")
    return args


def measure(name: str, spec: MultiCrop, side: int, images: list, args: argparse.Namespace) -> list[dict]:
    """The three rows of a setting."""
    rng = np.random.default_rng(0)

    def on_host(transform):
        def one(turn):
            transform({"image": images[turn % len(images)]}, rng)

        return rate(one, 1, args.seconds, args.rounds)

    rows = [
        {"setting": name, "work": "host: crops"} | on_host(MultiCropTransform(spec)),
        {"setting": name, "work": "host: one resize"} | on_host(SquareTransform(side)),
        {"setting": name, "work": "device: crops"} | on_device(spec, side, images, args),
    ]
    for row in rows:
        row["of_host_crops"] = row["per_core"] / rows[0]["per_core"] if row["per_core"] else None
    return rows


def on_device(spec: MultiCrop, side: int, images: list, args: argparse.Namespace) -> dict:
    """The same of `multi_crop`, with its compilation and memory."""
    import jax

    from regvit_jax.data.multicrop import multi_crop
    from regvit_jax.sharding import jit_once

    square = SquareTransform(side)
    samples = [square({"image": images[turn % len(images)]}, None) for turn in range(args.batch)]
    batch = [jax.device_put(np.stack([sample[field] for sample in samples])) for field in ("image", "size")]
    key, start = jax.random.key(0), time.perf_counter()
    function = (jit_once if args.small else jax.jit)(
        lambda key, *batch: multi_crop(key, *batch, spec, IMAGENET_MEAN, IMAGENET_STD)
    )
    compiled = function.lower(key, *batch).compile()
    seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
    found = {"device": jax.devices()[0].device_kind, "compile_s": seconds, "batch": args.batch}
    if memory is not None:
        found |= {"temporary_bytes": memory.temp_size_in_bytes, "output_bytes": memory.output_size_in_bytes}

    def one(turn):
        jax.block_until_ready(compiled(key, *batch))

    measured = rate(one, args.batch, args.seconds, args.rounds)
    if jax.devices()[0].platform != "cpu":
        measured["per_core"] = None  # of the host it takes next to nothing
    return found | measured


def rate(one: Callable[[int], None], images: int, seconds: float, rounds: int) -> dict:
    """img/s and img/s per core of a call that works on so many images, the median of `rounds` measurements."""
    one(0)
    results = []
    for _ in range(rounds):
        done, wall, cpu = 0, time.perf_counter(), time.process_time()
        while not done or time.perf_counter() - wall < seconds:
            one(done)
            done += 1
        elapsed = time.perf_counter() - wall
        results.append((done * images / elapsed, done * images / max(time.process_time() - cpu, 1e-9)))
    clock, per_core = (statistics.median(values) for values in zip(*results, strict=True))
    return {"img_s": clock, "per_core": per_core, "per_core_of_rounds": [one for _, one in results]}


def step_share(path: str, batch_size: int, seconds: float, rounds: int) -> dict:
    """Seconds of a config's training step, and of `recipe.augment` alone, on random images."""
    import jax

    from regvit_jax import sharding, train

    spec = importlib.util.spec_from_file_location("config_to_time", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.batch_size = batch_size
    if config.model.num_classes is None:
        config.model.num_classes = 1000
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        step = train.build_step(config, mesh)
        batch = sharding.put({name: _random(name, s) for name, s in step.recipe.input_spec.items()}, mesh)
        augment = jax.jit(lambda batch, key: step.recipe.augment(batch, key, 0))
        key, state = jax.random.key(0), step.init()

        def augmented(turn):
            jax.block_until_ready(augment(batch, key))

        def trained(turn):
            nonlocal state
            state, scalars = step.update(state, batch)
            jax.block_until_ready(scalars)

        trained(0)
        rates = {
            name: rate(one, batch_size, seconds, rounds) for name, one in (("augment", augmented), ("step", trained))
        }
    found = {f"{name}_s": batch_size / measured["img_s"] for name, measured in rates.items()}
    return {
        "config": path,
        "device": jax.devices()[0].device_kind,
        "share": found["augment_s"] / found["step_s"],
    } | found


def _random(name, struct):
    if struct.dtype == np.uint8:
        return np.random.default_rng(0).integers(0, 256, struct.shape, np.uint8)
    return np.full(struct.shape, 256 if name == "size" else 0, struct.dtype)


def table(report: dict) -> str:
    host = report["machine"]
    lines = [f"{host['cpu']}, {host['cores']} cores (load {host['load']:.1f}), Pillow {host['pillow']}"]
    if report["rows"]:
        lines.append(f"{'':<10}{'':<19}{'img/s':>9}{'per core':>10}{'of host crops':>15}")
    for row in report["rows"]:
        core = f"{row['per_core']:>10,.0f}{row['of_host_crops']:>14.3g}x" if row["per_core"] else f"{'':>25}"
        line = f"{row['setting']:<10}{row['work']:<19}{row['img_s']:>9,.0f}{core}"
        if "device" in row:
            line += f"  {row['device']}, batch {row['batch']}, compiled in {row['compile_s']:.1f} s"
        if "temporary_bytes" in row:
            line += f", {row['temporary_bytes'] / 2**20:.0f} MiB temporary"
        lines.append(line)
    if "step" in report:
        step = report["step"]
        lines.append(
            f"{step['config']} on {step['device']}, batch {report['batch']}: step {1e3 * step['step_s']:.1f} ms, of it "
            f"augmentation {1e3 * step['augment_s']:.1f} ms alone ({100 * step['share']:.1f} %)"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
