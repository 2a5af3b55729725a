"""benchmarks/dinov2_step.py and dinov2_precision.py run from end to end and count right; their numbers are for idle
machines."""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import pytest

from regvit_jax import sharding, train
from regvit_jax.recipes.dinov2 import DINOv2

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PARTS = [
    "augmentation",
    "teacher",
    "student, global",
    "student, local",
    "heads",
    "Sinkhorn-Knopp",
    "losses",
    "optimiser and averages",
]
# A DINOv2 run that compiles in seconds: no masks, no stochastic depth, crops from the host.
CONFIG = """
from regvit_jax.config import defaults


def get_config():
    c = defaults(recipe="dinov2")
    c.model.name, c.model.image_size, c.model.patch_size, c.model.registers = "vit_ti16", 16, 8, 2
    c.model.width, c.model.depth, c.model.num_heads, c.model.mlp_dim, c.model.drop_path = 16, 1, 2, 32, 0.0
    c.model.layerscale = 0.5
    c.data.augment_on, c.batch_size, c.total_steps, c.optim.warmup_steps = "host", 8, 40, 4
    o = c.dinov2
    o.local_crops, o.ibot_weight, o.mask_prob = 0, 0.0, 0.0
    o.prototypes, o.head_hidden, o.bottleneck, o.head_layers, o.freeze_last_layer = 12, 16, 6, 1, 0
    c.optim.lr = 1e-2
    return c
"""


@pytest.fixture(autouse=True, scope="module")
def quick(compiling_fast):
    with compiling_fast():
        yield


@pytest.fixture
def load(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv("OUT", raising=False)

    def one(name):
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return one


def options(**changes):
    found = {"model": "tiny", "batch": 2, "dtype": "float32", "prototypes": 96, "drop_path": 0.3, "remat": "none"}
    return found | {"unroll": False, "attention": "auto", "steps": 1, "repetitions": 2} | changes


def test_every_part_of_a_tiny_step_is_measured_and_their_work_is_that_of_the_step(load):
    module, step, row = load("dinov2_parts"), load("dinov2_step"), {"model": "tiny", "batch": 2, "dtype": "float32"}
    for piece in module.measure(options(drop_path=0.0)):
        row |= piece
    assert list(row["parts"]) == PARTS and all(len(part["seconds"]) == 2 for part in row["parts"].values())
    assert min(second for part in row["parts"].values() for second in part["seconds"]) > 0
    assert sum(part["flops"] for part in row["parts"].values()) == pytest.approx(row["flops"])
    # 2 images: 4 global crops of 16 patches; at most 16 class tokens of local crops beside 2 masked crops' patches.
    assert row["patches"] == 64 and row["masked_bound"] == int(0.3 * 16) + int(0.5 * 16)
    assert 16 <= row["logits_rows"] < 64
    text = step.table([row | {"prototypes": 96}])
    assert text.splitlines()[0].startswith("tiny, batch 2, float32, 96 prototypes: cpu, 256^3 matmul")
    total = sum(step.median(part) for part in row["parts"].values())
    assert text.splitlines()[-1].split() == ["sum", f"{1e3 * total:.4g}", f"{total / step.median(row):.1%}"]


def test_logits_of_all_tokens_are_found_in_a_program(load):
    module = load("dinov2_parts")
    rows_over = module.rows_over
    assert rows_over("%a = f32[96]{0} add(f32[96]{0} %b, f32[96]{0} %c)", 96) == 1
    assert rows_over("bf16[16,96] dot(bf16[16,24], bf16[24,96]) slice={[0:96]} s32[5000] f32[7,960]", 96) == 24
    assert rows_over("f32[2,8,4,96]{3,2,1,0} fusion(f32[64,24])", 96) == 64
    module.refuse_all_tokens(63, 64, 96)
    with pytest.raises(ValueError, match="logits of all tokens: 64 rows of 96 prototypes"):
        module.refuse_all_tokens(64, 64, 96)


def test_work_of_the_parts_is_that_of_the_step(load):
    """ViT-L/14 at batch 64: 101 TFLOP in the trunks, some more in the heads."""
    module = load("dinov2_parts")
    recipe = DINOv2(module.config_of(options(model="vitl14", batch=64, prototypes=65_536)))
    work = module.flops_of_parts(recipe)
    assert sum(work.values()) == pytest.approx(64 * recipe.train_flops())
    assert sum(work.values()) - work["heads"] == pytest.approx(101e12, rel=0.01)
    assert work["global"] == pytest.approx(3 * 0.7 * work["teacher"], rel=0.01), "kept are seven of ten branches"


def child(text):
    """What stands for dinov2_parts.py."""
    return f"import json, sys, time\n{text}"


@pytest.mark.parametrize(
    "text, kept, failed",
    [
        ('print(\'{"device": "x"}\')\nprint(\'{"complete": true}\')', {"device", "complete"}, None),
        ("print('{\"device\": \"x\"}')\nsys.exit('out of memory')", {"device"}, "out of memory"),
        ('print(\'{"device": "x"}\', flush=True)\ntime.sleep(60)', {"device"}, "--minutes are over"),
    ],
)
def test_what_a_child_said_is_kept_however_it_ends(load, tmp_path, monkeypatch, text, kept, failed):
    module, row, saved = load("dinov2_step"), {}, []
    (tmp_path / "dinov2_parts.py").write_text(child(text))
    monkeypatch.setattr(module, "HERE", tmp_path)
    seconds = 1 if failed and "minutes" in failed else 60
    module.run({}, row, module.time.monotonic() + seconds, lambda: saved.append({*row}))
    assert row.keys() - {"failed"} == kept and saved[0] == {"device"}
    assert ("failed" in row) == bool(failed) and (not failed or row["failed"] == failed)


def test_rows_are_compared_by_dtype_and_options_say_what_is_wrong(load, capsys):
    step = load("dinov2_step")
    rows = [
        {"batch": 32, "dtype": d, "seconds": [s, s, 9.0], "peak_bytes": b} for d, s, b in (("a", 1, 2), ("b", 3, 5))
    ]
    assert step.compared(rows) == "batch 32: b takes 3.00 x the time and 2.50 x the memory of a"
    gpu, cpu = (step.parse([], device) for device in ("cuda", "cpu"))
    assert (gpu.model, gpu.batches, gpu.dtypes, gpu.prototypes) == ("vitl14", [32, 64], ["bfloat16"], 65_536)
    assert (cpu.model, cpu.batches, cpu.dtypes, cpu.unroll) == ("tiny", [8], ["float32"], False)
    assert step.parse(["--compare=bf16,float32"], "cpu").dtypes == ["bfloat16", "float32"]
    for argument, message in (
        ("--batch=1", "2 or more"),
        ("--dtype=fp8", "fp8 is none of bf16"),
        ("--steps=0", "1 or"),
    ):
        with pytest.raises(SystemExit):
            step.parse([argument], "cpu")
        assert message in capsys.readouterr().err


def test_curves_of_both_arithmetics_are_written_side_by_side(load, tmp_path, monkeypatch, capsys):
    module, config = load("dinov2_precision"), tmp_path / "config.py"
    one = sharding.make_mesh(1, devices=jax.devices()[:1])
    monkeypatch.setattr(train.sharding, "make_mesh", lambda *sizes: one)
    config.write_text(CONFIG)
    arguments = [f"--config={config}", "--train=scenes:?size=16&n=32&n_test=8", "--steps=6", "--every=2", "--seeds=3"]
    assert module.main([*arguments, f"--out={tmp_path / 'out'}"]) == 0
    report = json.loads((tmp_path / "out" / "precision.json").read_text())
    assert [(one["seed"], one["dtype"]) for one in report["runs"]] == [(3, "float32"), (3, "bfloat16")]
    full, half = (one["curves"] for one in report["runs"])
    assert full["step"] == half["step"] == [1, 2, 4, 6]
    assert full["loss"] != half["loss"] and full["loss"] == pytest.approx(half["loss"], rel=0.05)
    assert report["apart"]["loss"]["dtypes"] == pytest.approx(abs(full["loss"][-1] - half["loss"][-1]))
    assert report["apart"]["loss"]["seeds"] is None and "dino_local" not in report["apart"]
    assert (tmp_path / "out" / "precision.png").read_bytes()[:4] == b"\x89PNG"
    assert "seed 3, bfloat16" in capsys.readouterr().out


def test_distances_between_dtypes_and_between_seeds(load):
    apart = load("dinov2_precision").apart
    ends = {(0, "float32"): 1.0, (1, "float32"): 3.0, (0, "bfloat16"): 1.5, (1, "bfloat16"): 3.1}
    runs = [{"seed": s, "dtype": d, "curves": {"step": [1, 2], "loss": [99, end]}} for (s, d), end in ends.items()]
    found = apart(runs)["loss"]
    assert found["dtypes"] == pytest.approx(0.3) and found["mean"] == pytest.approx(2.15)
    assert found["seeds"] == pytest.approx((2.0 + 1.6) / 2 / 2**0.5)
