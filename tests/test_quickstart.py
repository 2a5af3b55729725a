"""The README's first command, whole: minutes, so it is part of `make soak` only."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.soak
def test_the_quickstart_learns_what_the_readme_says(tmp_path):
    command = [sys.executable, "-m", "regvit_jax.main", "--config=configs/quickstart.py", f"--workdir={tmp_path}"]
    # One device, as a user has it, and not the eight of the tests.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    untrained, trained = (next(line for line in found if "knn/top1" in line) for found in (lines, lines[::-1]))
    assert (untrained["step"], trained["step"]) == (0, 568)
    assert untrained["knn/top1"] < 0.35 and trained["knn/top1"] > 0.8
    assert trained["linear/top1"] > 0.85
    assert "knn/top1" in done.stdout and f"wrote {tmp_path / 'eval/maps/maps.png'}" in done.stderr
    assert (tmp_path / "eval/maps/maps.png").is_file()
