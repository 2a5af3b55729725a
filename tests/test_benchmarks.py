"""The benchmarks run and count right. What they measure is in LOG.md."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestThroughput:
    @pytest.fixture(autouse=True)
    def script(self, monkeypatch):
        monkeypatch.setattr(sys, "path", [*sys.path])
        self.throughput = load("throughput")

    def rows(self):
        common = {"model": "s", "work": "train", "batch": 8, "peak_bytes": 3 * 2**29, "what": "float32"}
        ours = common | {"contender": "ours", "seconds": [2.0, 1.0, 4.0]}
        return [ours, common | {"contender": "timm", "seconds": [3.0, 0.5, 4.0]}]

    def test_rates_mfu_and_the_ratio_within_a_repetition(self):
        ours, peer = self.throughput.summarise(self.rows(), flops_per_image=5.0, peak_flops=100.0)
        assert ours["images_per_second"] == [4.0, 2.0, 8.0] and ours["mfu"] == pytest.approx(0.2)
        assert peer["images_per_second"] == [pytest.approx(8 / 3), 2.0, 16.0]
        # 3/2, 0.5/1, 4/4: not the ratio of the medians, which would be 1.5.
        assert ours["ratio"] == [1.0, 0.5, 1.5] and "ratio" not in peer

    def test_the_table_tells_figures_and_failures(self):
        ours, peer = self.throughput.summarise(self.rows(), 5.0, 100.0)
        lost = {name: peer[name] for name in ("model", "work", "batch", "contender")} | {
            "failed": "timm: out of memory"
        }
        head, first, second = self.throughput.table([ours, lost]).splitlines()
        assert head.split() == ["model", "work", "batch", "contender", "img/s", "ms", "MFU", "GiB", "ratio", "how"]
        assert first.split() == "s train 8 ours 4 (2-8) 2000.0 0.20 1.50 1.000 (0.500-1.500) float32".split()
        assert second.endswith("timm: out of memory")
        # Without the peer there is no ratio, and ours still counts.
        assert "ratio" not in self.throughput.summarise([self.rows()[0], lost], 5.0, 100.0)[0]

    def test_the_device_decides_what_is_left_open(self, monkeypatch):
        monkeypatch.delenv("OUT", raising=False)
        gpu, cpu = (self.throughput.parse([], device) for device in ("cuda", "cpu"))
        assert (gpu.models, gpu.batch, gpu.dtype, gpu.unroll, gpu.compile) == (
            ["l", "b", "s"],
            128,
            "bfloat16",
            "yes",
            "yes",
        )
        assert (cpu.models, cpu.batch, cpu.dtype, cpu.unroll, cpu.compile) == (["s", "b"], 8, "float32", "no", "no")
        small = self.throughput.parse(["--small", "--batch=4"], "cpu")
        assert (small.models, small.batch, small.repetitions, small.json) == (["s"], 4, 3, None)
        monkeypatch.setenv("OUT", "/tmp/out")
        assert self.throughput.parse([], "cuda").json == Path("/tmp/out/throughput.json")

    @pytest.mark.parametrize(
        ("argument", "message"),
        [("--models=s,x", "x is none of s, b, l"), ("--work=eval", "eval is none of"), ("--steps=0", "1 or more")],
    )
    def test_what_cannot_be_run_is_named(self, argument, message, capsys):
        with pytest.raises(SystemExit):
            self.throughput.parse([argument], "cpu")
        assert message in capsys.readouterr().err

    def test_a_contender_that_breaks_or_hangs_is_a_row_with_the_reason(self):
        # Options are missing, so it ends with an error before it imports JAX.
        options = {"model": "s", "work": "train", "batch": 8}
        [row] = self.throughput.compare(options, ["ours"], steps=1, repetitions=1, seconds=60)
        assert row["failed"] == "ours: KeyError: 'xla_flags'"
        [row] = self.throughput.compare(options, ["ours"], steps=1, repetitions=1, seconds=0)
        assert row["failed"] == "ours took more than 0 s"

    @pytest.mark.process
    def test_one_block_of_vit_s_trains_and_is_measured(self, tmp_path, capsys):
        file = tmp_path / "throughput.json"
        tiny = "--models=s --depth=1 --image_size=28 --batch=2 --steps=1 --repetitions=2 --work=train --peer=none"
        assert self.throughput.main([*tiny.split(), f"--json={file}"]) == 0
        report = json.loads(file.read_text())
        [row] = report["results"]
        low, high = sorted(2 / s for s in row["seconds"])
        assert row["images_per_second"][1:] == [low, high] and row["what"] == "float32, attention xla, scan, remat none"
        # 1 + 4 + 4 tokens of width 384: 2 N 12 D^2 + 4 N^2 D of the block, 4 patches of 588 numbers, times 3.
        forward = 2 * 9 * 12 * 384**2 + 4 * 9**2 * 384 + 2 * 4 * 588 * 384
        assert report["flops"]["s"] == forward
        assert row["mfu"] == pytest.approx(row["images_per_second"][0] * 3 * forward / report["peak_flops"])
        assert 2**26 < row["peak_bytes"] < 2**34
        assert "s     train        2  ours" in capsys.readouterr().out
