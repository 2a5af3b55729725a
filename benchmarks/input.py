"""How fast images come in: the bare JPEG decode, and what the loader makes of files, JPEG shards and raw shards.

    python benchmarks/input.py                        its own photos of 500 x 375 pixels, about 75 KB each
    python benchmarks/input.py --source=imagenet:/data/imagenet#val[:5000]
    python benchmarks/input.py --workers=0,2,8 --seconds=20 --json=input.json

Every pipeline does the same: read, decode, random resized crop to 224 pixels (bicubic, antialiased), batch. The shards
are made by `regvit data prepare` with a short side of 256. "per core" divides by the CPU time that this process and its
workers really used, so it holds on a busy machine and for any number of threads; img/s is what came out on the clock.
What the training step needs is img/s of the accelerator; divided by img/s per core, it says how many cores to ask for.
"""

import argparse
import io
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time

import numpy as np
import PIL
from PIL import Image, features

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # the package, where it is not installed

from regvit_jax.data.loader import train_batches  # noqa: E402
from regvit_jax.data.prepare import prepare  # noqa: E402
from regvit_jax.data.sources import Source, open_source  # noqa: E402
from regvit_jax.data.transforms import TrainTransform  # noqa: E402

WIDTH, HEIGHT, KILOBYTES = 500, 375, 75  # the mean image of ImageNet is 469 x 387 pixels and 110 KB
CROP, SHORT_SIDE, BATCH = 224, 256, 64


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    workers = sorted({int(number) for number in args.workers.split(",")})
    with tempfile.TemporaryDirectory(dir=args.scratch or None, prefix="regvit_input_") as scratch:
        scratch = pathlib.Path(scratch)
        text = args.source or f"folder:{photos(scratch / 'photos', args.images, args.small)}"
        source = open_source(text)
        print(f"{text}: {len(source)} images; preparing shards", file=sys.stderr)
        sources = {"files": source}
        for form in ("jpeg", "raw"):
            prepare(text, str(scratch / form), size=SHORT_SIDE, format=form, workers=max(workers), max_bad=1.0)
            sources[f"{form} array_record"] = open_source(f"tfds:@{scratch / form}")
        rows = [
            {"pipeline": "bare decode", "workers": 0} | median(lambda: decode_only(source, args.seconds), args.rounds)
        ]
        for name, one in sources.items():
            for count in workers:
                rate = median(lambda one=one, count=count: load(one, count, args.seconds), args.rounds)
                rows.append({"pipeline": name, "workers": count} | rate)
    for row in rows:
        row["of_bare_decode"] = row["per_core"] / rows[0]["per_core"]
    report = {"source": args.source or f"synthetic {WIDTH}x{HEIGHT}", "machine": machine(), "rows": rows}
    print(table(report))
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    return 0


def _arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--source", default="", help="a source string; default: synthetic photos")
    parser.add_argument("--images", type=int, default=1000, help="how many photos to make (default: 1000)")
    parser.add_argument("--workers", default="", help=f"of the loader; 0: threads (default: 0,{cores}; --small: 0)")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement (default: 6)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each, of which the median (default: 3)")
    parser.add_argument("--json", default="", help="file for the numbers")
    parser.add_argument("--scratch", default="", help="folder for photos and shards (default: the system's)")
    parser.add_argument("--small", action="store_true", help="a check that it works; the numbers mean nothing")
    args = parser.parse_args(argv)
    if args.small:
        args.images, args.seconds, args.rounds = 64, 0.2, 1
    args.workers = args.workers or ("0" if args.small else f"0,{cores}")
    return args


def photos(folder: pathlib.Path, count: int, small: bool) -> pathlib.Path:
    """Photo-like JPEGs: noise whose power falls as that of natural images, over a few large shapes with edges."""
    folder.mkdir()
    width, height = (100, 75) if small else (WIDTH, HEIGHT)
    quality = 85
    for number in range(count):
        rng = np.random.default_rng(number)
        pixels = Image.fromarray(_photo(rng, height, width))
        if number == 0 and not small:
            quality = min(range(60, 100), key=lambda q: abs(len(_jpeg(pixels, q)) - 1000 * KILOBYTES))
        (folder / f"{number:06d}.jpg").write_bytes(_jpeg(pixels, quality))
    return folder


def _photo(rng, height, width):
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    # Field (1987): the amplitude spectrum of natural images falls as 1 / frequency.
    amplitude = 1 / np.maximum(frequency, 1 / width)
    channels = []
    for _ in range(3):
        phase = np.exp(2j * np.pi * rng.random(amplitude.shape))
        channels.append(np.fft.irfft2(amplitude * phase, (height, width)))
    light, *colours = [channel / channel.std() for channel in channels]
    image = np.stack([light + 0.3 * colours[0], light, light + 0.3 * colours[1]], -1) * 40 + 128
    y, x = np.mgrid[:height, :width]
    for _ in range(6):
        cy, cx, r = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(20, height / 2)
        image[(y - cy) ** 2 + (x - cx) ** 2 < r * r] += rng.uniform(-60, 60, 3)
    return image.clip(0, 255).astype(np.uint8)


def _jpeg(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def decode_only(source: Source, seconds: float) -> tuple[float, float]:
    """(img/s, img/s per core) of Pillow decoding bytes that are in memory already."""
    encoded = []
    for index in range(min(len(source), 500)):
        image = source[index]["image"]
        encoded.append(pathlib.Path(image).read_bytes() if isinstance(image, str) else image)
    done, wall, cpu = 0, time.perf_counter(), cpu_seconds()
    while time.perf_counter() - wall < seconds:
        with Image.open(io.BytesIO(encoded[done % len(encoded)])) as image:
            image.load()
        done += 1
    return done / (time.perf_counter() - wall), done / (cpu_seconds() - cpu)


def load(source: Source, workers: int, seconds: float) -> tuple[float, float]:
    """(img/s, img/s per core) of the training loader, once its workers run."""
    batch = min(BATCH, len(source))
    batches = train_batches(source, TrainTransform(CROP), seed=0, batch_size=batch, start_step=0, workers=workers)
    for _ in range(2 * max(1, workers)):
        next(batches)
    done, wall, cpu = 0, time.perf_counter(), cpu_seconds()
    while time.perf_counter() - wall < seconds:
        next(batches)
        done += batch
    rates = done / (time.perf_counter() - wall), done / (cpu_seconds() - cpu)
    batches.close()
    return rates


def median(measure, rounds: int) -> dict:
    results = [measure() for _ in range(rounds)]
    clock, per_core = (statistics.median(values) for values in zip(*results, strict=True))
    return {"img_s": clock, "per_core": per_core, "per_core_of_rounds": [per_core for _, per_core in results]}


def cpu_seconds() -> float:
    """CPU time of this process and of its living child processes (where there is /proc; else of this process)."""
    total, ticks = time.process_time(), os.sysconf("SC_CLK_TCK")
    for status in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # It ended meanwhile.
        if int(fields[1]) == os.getpid():
            total += (int(fields[11]) + int(fields[12])) / ticks
    return total


def machine() -> dict:
    model = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "pillow": PIL.__version__,
        "libjpeg_turbo": features.check_feature("libjpeg_turbo"),
    }


def table(report: dict) -> str:
    host = report["machine"]
    turbo = "libjpeg-turbo" if host["libjpeg_turbo"] else "libjpeg without turbo"
    lines = [
        f"{report['source']}, {host['cpu']}, {host['cores']} cores (load {host['load']:.1f}), "
        f"Pillow {host['pillow']} with {turbo}",
        f"{'':<20}{'workers':>8}{'img/s':>9}{'per core':>10}{'of bare decode':>16}",
    ]
    lines += [
        f"{row['pipeline']:<20}{row['workers']:>8}{row['img_s']:>9,.0f}{row['per_core']:>10,.0f}"
        f"{row['of_bare_decode']:>15.2f}x"
        for row in report["rows"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
