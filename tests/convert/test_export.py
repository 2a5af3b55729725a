"""Exported programs: what they compute without our code, what is in them, what they refuse."""

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import export as jax_export

import regvit_jax as rv
from regvit_jax import cli, sharding
from regvit_jax.convert import export
from regvit_jax.convert.export import export_model
from regvit_jax.data.transforms import Preprocess, normalize
from regvit_jax.models.config import Execution, ViTConfig
from regvit_jax.models.model import Model, abstract_params
from regvit_jax.ops import cudnn
from regvit_jax.trees import map_named, named

LOOK = Preprocess(size=16, crop_ratio=0.8, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
SHAPE = dict(width=32, depth=2, num_heads=2, mlp_dim=24, patch_size=4, image_size=24, registers=3, num_classes=5)


def build(run=None, **changes):
    """Random in every parameter; its positions are native at another size than it is exported for."""
    config, rng = ViTConfig(**(SHAPE | {"layerscale": 0.1} | changes)), np.random.default_rng(0)

    def draw(path, leaf):
        return jnp.asarray(float(path.endswith("scale")) + 0.3 * rng.normal(size=leaf.shape), jnp.float32)

    return Model(map_named(draw, abstract_params(config)), config, run or Execution(), LOOK)


def read(path):
    return jax_export.deserialize(bytearray(path.read_bytes()))


def pixels(batch, *size, seed=1):
    return np.random.default_rng(seed).integers(0, 256, (batch, *(size or (16, 16)), 3), np.uint8)


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setattr("regvit_jax.main.set_up_logging", lambda: None)


# Another process, as a user's: it has no way to import the package, nor what the package is made of.
USER = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("regvit_jax", "flax"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
for name in ("features", "classifier"):
    with open(name + ".py") as file:
        exec(file.read())  # leaves `program`, and `weights` where they lie beside
    run, given = jax.jit(program.call), (weights,) if name == "classifier" else ()
    for batch in (1, 3):
        found = run(*given, np.load(name + ".npy")[:batch])
        np.savez(f"{name}{batch}.npz", **found)
assert not {"regvit_jax", "flax"} & set(sys.modules)
"""


@pytest.mark.process
def test_the_printed_code_runs_it_where_the_package_is_not(tmp_path, capsys, quiet):
    model = build()
    rv.save_model(model, tmp_path / "model")
    raw = pixels(3)
    images = {"features": raw, "classifier": normalize(raw, LOOK)}
    for name, flags in (("features", ["--input=uint8"]), ("classifier", ["--weights=beside", "--batch=symbolic"])):
        file = tmp_path / "new" / f"{name}.stablehlo"
        assert cli.main(["export", str(tmp_path / "model"), str(file), f"--what={name}", *flags]) == 0
        said, code = capsys.readouterr().out.split("\n\n", 1)
        assert f"program    {file}, " in said and "platforms  cpu, cuda, tpu" in said
        (tmp_path / f"{name}.py").write_text(code)
        np.save(tmp_path / f"{name}.npy", images[name])
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiling well takes longer than running less well
    done = subprocess.run(
        [sys.executable, "-c", USER], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [
        "{'cls': (2, 32), 'patches': (2, 16, 32), 'registers': (2, 3, 32)}",
        "{'logits': (2, 5)}",
    ]
    tokens = model(images["classifier"])
    wanted = {"features": {"cls": tokens.cls, "registers": tokens.registers, "patches": tokens.patches}}
    wanted["classifier"] = {"logits": model.logits(images["classifier"])}
    for name, outputs in wanted.items():
        for batch in (1, 3):
            found = np.load(tmp_path / f"{name}{batch}.npz")
            assert set(found) == set(outputs)
            for key, array in outputs.items():
                assert found[key].dtype == np.float32
                np.testing.assert_allclose(found[key], array[:batch], rtol=0, atol=2e-5)


def test_a_gpu_at_hand_leaves_no_trace(tmp_path, monkeypatch):
    """On a machine whose GPU has cuDNN, the model itself would take it; a program for three platforms must not."""
    asked = []

    def fused(q, k, v, *, causal):
        asked.append(q.shape)
        return v

    monkeypatch.setattr(cudnn, "device_of", lambda x: cudnn.Device("gpu", (9, 0)))
    monkeypatch.setattr(cudnn, "cudnn_attention", fused)
    model = build(Execution(dtype="bfloat16"))
    images = jax.ShapeDtypeStruct((2, 48, 48, 3), np.float32)  # 148 tokens, enough for cuDNN
    jax.eval_shape(lambda x: model.module()(x), images)
    assert asked
    asked.clear()
    said = export_model(model, tmp_path / "a", image_size=48)
    program = read(tmp_path / "a")
    assert not asked
    assert program.platforms == ("cpu", "cuda", "tpu") and program.nr_devices == 1
    assert set(re.findall(r"custom_call @([\w$.]+)", program.mlir_module())) <= {"shape_assertion"}
    assert said["dtype"] == "bfloat16" and said["outputs"]["cls"]["dtype"] == "bfloat16"


def test_a_model_spread_over_a_mesh_becomes_a_program_for_one_device(tmp_path):
    model, raw = build(depth=1), pixels(2)
    mesh = sharding.make_mesh(data=2, fsdp=4)
    spread = dataclasses.replace(model, params=jax.device_put(model.params, sharding.shardings(model.params, mesh, 0)))
    with jax.set_mesh(mesh):
        export_model(spread, tmp_path / "a")
    program = read(tmp_path / "a")
    assert program.nr_devices == 1
    images = normalize(raw, LOOK)
    np.testing.assert_allclose(program.call(images)["patches"], model(images).patches, rtol=0, atol=2e-5)


def test_bfloat16_halves_the_file_and_computes_as_the_model_does(tmp_path):
    """Without class token and registers too: no "cls", and no more than an empty axis of registers."""
    model = build(class_token=False, registers=0, pool="avg", position="patches", num_classes=0, depth=1, mlp_dim=256)
    sizes = [
        export_model(model, tmp_path / dtype, dtype=dtype, platforms=["cpu"], batch=2)["bytes"]
        for dtype in ("float32", "bfloat16")
    ]
    weights = sum(leaf.size for path, leaf in named(model.params).items() if "norm" not in path and path != "pos_embed")
    assert sizes[0] - sizes[1] == pytest.approx(2 * weights, rel=0.05)
    images = normalize(pixels(2), LOOK)
    found = read(tmp_path / "bfloat16").call(images)
    assert set(found) == {"registers", "patches"} and found["registers"].shape == (2, 0, 32)
    assert found["patches"].dtype == ml_dtypes.bfloat16
    wanted = np.asarray(model.astype("bfloat16")(images).patches, np.float32)
    # XLA may fuse two roundings to bfloat16 into one: a unit in the last place at the size of the largest token.
    np.testing.assert_allclose(np.asarray(found["patches"], np.float32), wanted, atol=np.abs(wanted).max() / 128)
    with pytest.raises(ValueError, match="2"):
        read(tmp_path / "bfloat16").call(images[:1])


def test_the_manifest_says_how_to_feed_it(tmp_path):
    said = export_model(build(), tmp_path, what="classifier", image_size=(20, 16), platforms="tpu", input="uint8")
    file = tmp_path / "model.stablehlo"
    assert said == json.loads((tmp_path / "model.stablehlo.json").read_text())
    assert said["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest() and said["bytes"] == file.stat().st_size
    assert said["inputs"] == {"images": {"shape": ["b", 20, 16, 3], "dtype": "uint8"}}
    assert said["outputs"] == {"logits": {"shape": ["b", 5], "dtype": "float32"}}
    assert said["grid"] == [5, 4] and said["platforms"] == ["tpu"] and said["weights"] is None
    look = said["preprocessing"]
    assert look["mean"] == [0.4, 0.5, 0.6] and look["inside"] is True
    assert look["size"] == [20, 16] and look["resize_short_side"] is None  # how to resize for no square, nobody says
    assert said["made_by"]["jax"] == jax.__version__
    assert said["calling_convention"]["version"] == read(file).calling_convention_version


def test_the_square_it_wants_follows_the_models_crop(tmp_path):
    look = export_model(build(), tmp_path / "a", platforms="cpu", batch=1)["preprocessing"]
    assert (look["size"], look["resize_short_side"], look["crop_ratio"], look["inside"]) == ([16, 16], 20, 0.8, False)


def test_weights_go_beside_when_there_are_too_many(tmp_path, monkeypatch):
    model = build()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    monkeypatch.setattr(export, "INSIDE", size - 1)
    said = export_model(model, tmp_path / "a", platforms="cpu", batch=1)
    assert said["bytes"] < size / 2 and said["weights"]["file"] == "a.safetensors"
    assert said["weights"]["sha256"] == hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    monkeypatch.setattr(export, "INSIDE", size)  # the same weights, inside this time: nothing stale stays behind
    assert export_model(model, tmp_path / "a", platforms="cpu", batch=1)["bytes"] > size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.json"]
    monkeypatch.setattr(export, "LARGEST", size - 1)
    with pytest.raises(ValueError, match="do not fit into one program"):
        export_model(model, tmp_path / "b", weights="inside")


def test_only_an_earlier_export_is_replaced(tmp_path):
    model, file = build(), tmp_path / "a"
    options = dict(platforms="cpu", batch=1)
    file.write_text("a thesis")
    with pytest.raises(FileExistsError, match="no earlier, unchanged export"):
        export_model(model, file, **options)
    assert file.read_text() == "a thesis"
    export_model(model, file, **options, overwrite=True)
    export_model(model, file, **options, what="classifier")  # an export of ours: replaced
    assert set(read(file).call(normalize(pixels(1), LOOK))) == {"logits"}
    file.write_bytes(file.read_bytes() + b"edited")
    with pytest.raises(FileExistsError):
        export_model(model, file, **options)
    (tmp_path / "b.json").write_text("{}")  # the manifest's place is taken
    with pytest.raises(FileExistsError, match="b.json"):
        export_model(model, tmp_path / "b", **options)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"format": "onnx"}, "format 'onnx' is not one of 'stablehlo'"),
        ({"what": "tokens"}, "'features', 'classifier'"),
        ({"input": "float"}, "'normalized', 'uint8'"),
        ({"dtype": "float16"}, "'float32', 'bfloat16'"),
        ({"platforms": ("cpu", "gpu")}, "platforms are some of 'cpu', 'cuda', 'rocm', 'tpu'"),
        ({"platforms": ()}, "platforms are some of"),
        ({"batch": 0}, "batch is 1 or more, got 0"),
        ({"image_size": 18}, "height 18 is not a multiple of the patch size 4; the nearest valid sizes are 16 and 20"),
        ({"what": "classifier"}, "has no classification head"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        export_model(build(num_classes=0), tmp_path / "new" / "a", **options)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dst": "file/a"}, "file"),  # below something that is no folder
        ({"dst": "file"}, "no earlier, unchanged export"),
        ({"--batch": "many"}, "--batch many: write a number"),
        ({"--image_size": "16x16"}, "--image_size 16x16: write one number"),
        ({"--platforms": "cpu,metal"}, "metal"),
        ({"--what": "classifier"}, "has no classification head"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line_and_exit_code_2(tmp_path, capsys, quiet, changes, said):
    rv.save_model(build(num_classes=0), tmp_path / "model")
    (tmp_path / "file").write_text("not ours")
    given = {"dst": "a"} | changes
    place = tmp_path / given.pop("dst")
    flags = [f"{name}={value}" for name, value in given.items()]
    assert cli.main(["export", str(tmp_path / "model"), str(place), *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "not ours"


def test_an_unknown_format_is_refused_with_the_list(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["export", str(tmp_path / "model"), str(tmp_path / "a"), "--format=onnx"])
    assert stopped.value.code == 2 and "stablehlo" in capsys.readouterr().err
