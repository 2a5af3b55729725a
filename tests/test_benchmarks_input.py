"""benchmarks/input.py runs from end to end, and counts CPU time rightly; its numbers are for idle machines."""

import importlib.util
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]


def load():
    spec = importlib.util.spec_from_file_location("benchmark_input", ROOT / "benchmarks" / "input.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_small_mode_measures_every_pipeline(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "input.py"), "--small", f"--json={tmp_path}/input.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads((tmp_path / "input.json").read_text())
    measured = [(row["pipeline"], row["workers"]) for row in report["rows"]]
    pipelines = ("files", "jpeg array_record", "raw array_record")
    assert measured == [("bare decode", 0), *((name, 0) for name in pipelines)]
    assert all(row["img_s"] > 0 and row["per_core"] > 0 for row in report["rows"])
    assert report["rows"][0]["of_bare_decode"] == 1 and "raw array_record" in done.stdout


def test_photos_have_the_size_of_photos():
    module = load()
    photo = module._photo(np.random.default_rng(0), module.HEIGHT, module.WIDTH)
    sizes = [len(module._jpeg(Image.fromarray(photo), quality)) for quality in (60, 99)]
    assert sizes[0] < 1000 * module.KILOBYTES < sizes[1]
    assert Image.open(io.BytesIO(module._jpeg(Image.fromarray(photo), 80))).size == (500, 375)


def test_cpu_time_is_of_this_process_and_its_children():
    module = load()
    busy = [sys.executable, "-c", "while True: pass"]
    with subprocess.Popen(busy) as child:
        time.sleep(0.2)
        before = module.cpu_seconds()
        time.sleep(0.6)
        used = module.cpu_seconds() - before
        child.kill()
    assert 0.02 < used < 2
