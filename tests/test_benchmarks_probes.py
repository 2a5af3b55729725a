"""benchmarks/probes_at_scale.py runs from end to end; its numbers are for full scale and idle machines."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "probes_at_scale.py"


def test_it_measures_both_probes_on_files_that_it_writes(tmp_path):
    """Ten classes, 600 rows, an epoch of ten steps: far better than one in ten."""
    small = ["--rows=600", "--queries=70", "--width=16", "--classes=10", "--batch=64", f"--json={tmp_path}/out.json"]
    done = subprocess.run([sys.executable, str(SCRIPT), *small], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["files_gib"] * 2**30 == 5 * 670 * 16 * 2
    assert report["grid"]["steps"] == 10 and report["grid"]["best_top1"] > 0.5
    assert report["knn"]["accuracy"]["top1_k20"] > 0.3
    assert all(report[probe]["seconds"] > 0 and "peak_private_gib" in report[probe] for probe in ("knn", "grid"))
