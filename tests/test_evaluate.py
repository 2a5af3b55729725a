"""Building evaluators from a config, when they run, what is written and returned, and the table."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from regvit_jax import evals, evaluate, sharding
from regvit_jax.evals import features
from regvit_jax.evals.knn import KNN
from regvit_jax.evaluate import Scheduled
from regvit_jax.models.zoo import create_model


@pytest.fixture(scope="module")
def model():
    return create_model(
        "vit_ti16", width=32, depth=2, num_heads=2, mlp_dim=64, image_size=16, patch_size=8, registers=1
    )


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Two classes, dark and bright, in train and test."""
    path = tmp_path_factory.mktemp("data") / "data.npz"
    arrays = {}
    for split, n in (("train", 30), ("test", 8)):
        encoded = []
        for i in range(n):
            pixels = (
                np.random.default_rng(i + n).integers(100 * (i % 2), 100 + 100 * (i % 2), (20, 20, 3)).astype(np.uint8)
            )
            Image.fromarray(pixels).save(file := io.BytesIO(), "png")
            encoded.append(file.getvalue())
        arrays[f"{split}_jpeg"] = np.frombuffer(b"".join(encoded), np.uint8)
        arrays[f"{split}_offsets"] = np.cumsum([0, *map(len, encoded)])
        arrays[f"{split}_labels"] = np.arange(n) % 2
    np.savez(path, **arrays)
    return f"npz:{path}"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(20):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "photos" / f"{i}.png")
    return f"folder:{tmp_path / 'photos'}"


def test_every_registered_evaluator_has_documented_options():
    for name in evals.EVALUATORS:
        kind = evals.get(name)
        kind()
        for field in dataclasses.fields(kind):
            assert field.metadata["doc"] and field.default is not None
    with pytest.raises(ValueError, match="'kmn'; did you mean 'knn'"):
        evals.get("kmn")


def test_build_fills_defaults_schedule_and_sources(archive):
    config = ConfigDict(
        {
            "near": {"type": "knn", "every": 100, "at_start": True, "k": (5,), "temperature": 0.1},
            "probe": {"type": "linear", "every": 0, "data": f"{archive}#train[:50%]"},
            "maps": {"type": "maps"},
            "other": {"type": "knn", "eval_data": f"{archive}#train[:10]"},
        }
    )
    built = evaluate.build(config, data_train=archive, data_eval="")
    assert set(built) == set(config)
    test = f"{archive}#test"
    near = KNN(data=archive, eval_data=test, k=(5,), temperature=0.1)
    assert built["near"] == Scheduled(near, every=100, at_start=True)
    assert (built["probe"].evaluator.data, built["probe"].evaluator.eval_data) == (f"{archive}#train[:50%]", test)
    assert (built["maps"].every, built["maps"].evaluator.eval_data) == (-1, test)
    assert (built["other"].evaluator.data, built["other"].evaluator.eval_data) == (archive, f"{archive}#train[:10]")
    assert config.near.type == "knn", "the config is not consumed"


def test_where_there_is_no_split_a_tenth_is_held_out(folder):
    train, held_out = evaluate.data_pair(folder)
    knn = evaluate.build({"knn": {"type": "knn"}}, data_train=folder, data_eval="")["knn"].evaluator
    assert (knn.data, knn.eval_data) == (train, held_out)
    names = [{s.name(i) for i in range(len(s))} for s in map(features.source_of, (train, held_out))]
    assert [len(n) for n in names] == [18, 2] and not names[0] & names[1]
    assert evaluate.data_pair(folder, "npz:b.npz") == (folder, "npz:b.npz")


def test_what_the_data_of_a_run_cannot_serve_is_left_out_of_it(folder, archive, caplog):
    """Images without labels: k-NN goes, maps stay; and so does a k-NN on labelled data that it names itself."""
    config = {"near": {"type": "knn"}, "maps": {"type": "maps"}, "other": {"type": "knn", "data": archive}}
    built = evaluate.build(config, data_train=folder, data_eval="", leave_out=True)
    assert list(built) == ["maps", "other"]
    assert "eval near: left out, because KNN needs a label" in caplog.text and "eval other" not in caplog.text
    assert list(evaluate.build(config, data_train=archive, data_eval="", leave_out=True)) == list(config)
    assert list(evaluate.build(config, data_train=folder, data_eval="")) == list(config)


def test_every_evaluator_says_what_its_data_must_have():
    truths = {name: evals.get(name).TRUTH for name in evals.EVALUATORS}
    assert set(truths.values()) <= {"", "label", "mask", "depth", "boxes"}
    assert (truths["knn"], truths["linear"], truths["accuracy"], truths["maps"]) == ("label", "label", "label", "")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "has no type: one of .*knn"),
        ({"type": "liner"}, "did you mean 'linear'"),
        ({"type": "knn", "temprature": 0.1}, "no option 'temprature'; did you mean 'temperature'"),
        ({"type": "knn", "evry": 10}, "no option 'evry'; did you mean 'every'"),
        ({"type": "knn", "every": -2}, "every is a number of steps"),
        ({"type": "knn", "at_start": 1}, "at_start is True or False"),
        ({"type": "knn", "k": (0,)}, "KNN: k must be"),
        ({"type": "knn", "eval_data": "npz:x.npz"}, "KNN has no source: set data here, or data.train"),
    ],
)
def test_mistakes_in_the_config_name_the_key(options, says):
    with pytest.raises(ValueError, match=f"config.evals.mine.*{says}"):
        evaluate.build({"mine": options}, data_train="", data_eval="")


def test_names_that_are_no_folder_are_refused():
    with pytest.raises(ValueError, match="becomes a folder"):
        evaluate.build({"../x": {"type": "maps"}}, data_train="", data_eval="a")


@pytest.mark.parametrize(
    ("every", "at_start", "eval_every", "steps"),
    [
        (-1, False, 4, [4, 8, 10]),
        (-1, True, 4, [0, 4, 8, 10]),
        (0, False, 4, [10]),
        (0, True, 0, [0, 10]),
        (3, False, 0, [3, 6, 9, 10]),
        (-1, True, 0, []),
    ],
)
def test_schedule(every, at_start, eval_every, steps):
    scheduled = Scheduled(KNN(), every, at_start)
    assert [s for s in range(11) if scheduled.due(s, total_steps=10, eval_every=eval_every)] == steps


def test_run_returns_and_records(archive, model, mesh, tmp_path, monkeypatch, caplog):
    passes = []
    compute = features._compute
    monkeypatch.setattr(features, "_compute", lambda *args: passes.append(args[2]) or compute(*args))
    built = evaluate.build(
        {
            "knn": {"type": "knn", "feature": "mean_patch", "k": (1, 3), "batch_size": 8},
            "linear": {"type": "linear", "l2": (0.1,)},
            "maps": {"type": "maps", "n": 2},
        },
        data_train=archive,
        data_eval="",
    )
    with caplog.at_level("INFO"):
        results = evaluate.run(built, model, mesh=mesh, workdir=tmp_path / "work", step=12)
    assert results["knn/top1"] == results["knn/top1_k1"] == 1.0 and results["linear/l2"] == 0.1
    assert "maps/patch_norm_max_over_median" in results and all(type(value) is float for value in results.values())
    assert passes == [archive, f"{archive}#test"], "one pass over each source, for k-NN and linear together"
    assert "eval knn at step 12: top1 1.0000" in caplog.text and "maps.png" in caplog.text
    assert (tmp_path / "work/eval/maps/maps.png").is_file()

    record = json.loads((tmp_path / "work/eval/knn/results.json").read_text())
    assert {f"knn/{name}": value for name, value in record["metrics"].items()}.items() <= results.items()
    assert record["step"] == 12 and record["type"] == "knn" and record["seconds"] > 0
    assert KNN(**record["options"]) == built["knn"].evaluator
    assert record["data"]["eval_data"]["samples"] == 8 and len(record["data"]["data"]["fingerprint"]) == 32
    assert record["model"]["config"]["registers"] == 1 and record["model"]["dtype"] == "float32"
    assert not list((tmp_path / "work").rglob(".*")), "no unfinished file is left"

    again = evaluate.run({"knn": built["knn"]}, model, mesh=mesh, workdir=tmp_path / "work")
    assert again["knn/top1"] == results["knn/top1"]
    assert json.loads((tmp_path / "work/eval/knn/results.json").read_text())["step"] is None


def test_an_error_names_the_evaluator(folder, model, mesh, tmp_path):
    built = evaluate.build({"near": {"type": "knn"}}, data_train=folder, data_eval="")
    with pytest.raises(ValueError, match="no labels") as caught:
        evaluate.run(built, model, mesh=mesh, workdir=tmp_path)
    assert "'near'" in caught.value.__notes__[-1]
    assert not (tmp_path / "eval/near/results.json").exists()


def test_numbers_that_json_lacks_are_written_as_words(model, mesh, tmp_path, archive, monkeypatch):
    monkeypatch.setattr(KNN, "run", lambda self, model, *, mesh, out_dir: {"ratio": float("nan")})
    built = evaluate.build({"knn": {"type": "knn"}}, data_train=archive, data_eval="")
    evaluate.run(built, model, mesh=mesh, workdir=tmp_path)
    assert json.loads((tmp_path / "eval/knn/results.json").read_text())["metrics"] == {"ratio": "nan"}


def test_table():
    runs = {"untrained": {"knn/top1": 0.151, "l2": 1e-5}, "trained": {"knn/top1": 0.75, "top5": 1.0}}
    assert evaluate.table(runs).splitlines() == [
        "          untrained  trained",
        "----------------------------",
        "knn/top1     0.1510   0.7500",
        "l2            1e-05        -",
        "top5              -   1.0000",
    ]


def test_history_is_the_first_and_the_last_evaluation(tmp_path):
    lines = [
        {"step": 0, "knn/top1": 0.1},
        {"step": 1, "loss": 2.0, "lr": 0.1},
        {"step": 2, "knn/top1": 0.3},
        {"step": 4, "loss": 1.0, "lr": 0.1},
        {"step": 4, "knn/top1": 0.5},
        {"step": 4, "linear/top1": "NaN"},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = evaluate.history(path)
    assert list(rows) == ["untrained", "step 4"]
    assert rows["untrained"] == {"knn/top1": 0.1}
    assert rows["step 4"]["knn/top1"] == 0.5 and np.isnan(rows["step 4"]["linear/top1"])
    path.write_text(json.dumps(lines[1]) + "\n")
    assert evaluate.history(path) == {}
