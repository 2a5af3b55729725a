"""benchmarks/multicrop.py runs from end to end; its numbers are for idle machines."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "multicrop.py"


def load(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("benchmark_multicrop", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.process
def test_small_mode_measures_the_three_works_of_a_setting(tmp_path):
    command = [sys.executable, str(SCRIPT), "--small", "--settings=cifar", f"--json={tmp_path}/out.json"]
    environment = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["work"] for row in rows] == ["host: crops", "host: one resize", "device: crops"]
    assert all(row["img_s"] > 0 and row["per_core"] > 0 for row in rows)
    assert rows[0]["of_host_crops"] == 1 and rows[2]["batch"] == 8 and rows[2]["output_bytes"] > 0
    assert "one resize" in done.stdout


def test_an_unknown_setting_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        load(monkeypatch).main(["--settings=cifar,imagenet"])
    assert "imagenet is none of photos, scenes, cifar" in capsys.readouterr().err


def test_rates_count_images_over_time_and_over_the_cpu_time_of_this_process(monkeypatch):
    rate = load(monkeypatch).rate
    slept = rate(lambda turn: time.sleep(0.01), 5, 0.1, 3)
    # 5 images in 10 ms or more, in which the processor has hardly anything to do.
    assert 50 < slept["img_s"] <= 500 and slept["per_core"] > 3 * slept["img_s"]
    assert len(slept["per_core_of_rounds"]) == 3


def test_the_table_leaves_out_the_cores_of_an_accelerator(monkeypatch):
    module = load(monkeypatch)
    row = {"setting": "photos", "work": "device: crops", "img_s": 5000.0, "per_core": None, "of_host_crops": None}
    row |= {"device": "some GPU", "batch": 64, "compile_s": 3.0, "temporary_bytes": 2**29}
    step = {"config": "a.py", "device": "some GPU", "share": 0.02, "step_s": 0.2, "augment_s": 0.004}
    report = {
        "machine": {"cpu": "x", "cores": 2, "load": 0.0, "pillow": "13"},
        "batch": 64,
        "rows": [row],
        "step": step,
    }
    text = module.table(report)
    assert "some GPU, batch 64, compiled in 3.0 s, 512 MiB temporary" in text and "4.0 ms alone (2.0 %)" in text
