"""The `regvit` command: a model measured from the command line, what it prints and writes, and how it refuses."""

import importlib.util
import json
import os
import pathlib
import signal

import pytest
from PIL import Image

import regvit_jax as rv
from regvit_jax import cli, stopping
from regvit_jax.config import evaluator


@pytest.fixture(scope="module")
def tiny():
    spec = importlib.util.spec_from_file_location("tiny", pathlib.Path(__file__).with_name("tiny.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    shape = dict(width=16, depth=1, num_heads=2, mlp_dim=16, image_size=16, patch_size=8, num_classes=4)
    folder = tmp_path_factory.mktemp("model")
    rv.save_model(rv.create_model("vit_ti16_reg2", seed=1, **shape), folder)
    return folder


def test_eval_prints_a_table_and_writes_the_numbers(saved, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("regvit_jax.main.set_up_logging", lambda: None)
    data = tiny.write_npz(tmp_path / "data.npz")
    out = tmp_path / "new" / "results.json"
    tasks = ["--task=accuracy", "--task=knn", "--task=maps"]
    arguments = ["eval", f"--model={saved}", f"--data={data}", *tasks, f"--out={out}", f"--pictures={tmp_path}"]
    assert cli.main([*arguments, "--set=n=2"]) == 2  # an option of maps is none of knn
    assert "--set n=2" in capsys.readouterr().err
    assert cli.main([*arguments, "--set=batch_size=8"]) == 0
    record = json.loads(out.read_text())
    assert record["data"] == data and record["eval_data"] == f"{data}#test"
    assert 0 <= record["metrics"]["accuracy/top1"] <= 1 and "knn/top1_k10" in record["metrics"]
    assert record["model"] == str(saved) and record["command"].startswith(f"regvit eval --model={saved} --data=")
    for task in ("accuracy", "knn", "maps"):
        assert record["tasks"][task] == json.loads((tmp_path / "eval" / task / "results.json").read_text())
    assert record["tasks"]["knn"]["data"]["data"]["samples"] == 37 and record["tasks"]["knn"]["model"]["weights"]
    printed = capsys.readouterr().out
    assert "knn/top1 " in printed and saved.name in printed
    assert (tmp_path / "eval/maps/maps.png").stat().st_size > 1000
    options = json.loads((tmp_path / "eval/knn/results.json").read_text())["options"]
    assert options["batch_size"] == 8


def test_eval_compares_with_the_untrained_network(saved, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("regvit_jax.main.set_up_logging", lambda: None)
    data = tiny.write_npz(tmp_path / "data.npz")
    out = tmp_path / "results.json"
    arguments = ["eval", f"--model={saved}", f"--data={data}", "--task=accuracy", "--task=knn"]
    options = ["--set=knn.k=3", f"--out={out}", f"--pictures={tmp_path}"]
    assert cli.main([*arguments, *options, "--untrained"]) == 0
    heading, _, *lines = capsys.readouterr().out.splitlines()
    assert heading.split() == ["untrained", saved.name] and all(len(line.split()) == 3 for line in lines)
    record = json.loads(out.read_text())
    assert record["untrained"].keys() == record["metrics"].keys() and "knn/top1_k3" in record["metrics"]
    # Another network: the loss of its random head is another one.
    assert record["untrained"]["accuracy/loss"] != record["metrics"]["accuracy/loss"]
    weights = [record[column]["knn"]["model"]["weights"] for column in ("tasks", "untrained_tasks")]
    assert weights[0] != weights[1]
    assert (tmp_path / "untrained/eval/knn/results.json").is_file() and (tmp_path / "eval/knn/results.json").is_file()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"--model": "/nowhere"}, "/nowhere does not exist"),
        ({"--task": "knnn"}, "unknown evaluator 'knnn'"),
        ({"--data": "photos"}, "names no data source"),
        ({"--set": "k"}, "--set k: write KEY=VALUE"),
        ({"--config": "/nowhere.py"}, "/nowhere.py is no file: name a Python file with get_config()"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(saved, tiny, tmp_path, capsys, monkeypatch, changes, said):
    monkeypatch.setattr("regvit_jax.main.set_up_logging", lambda: None)
    given = {"--model": str(saved), "--task": "knn", "--data": tiny.write_npz(tmp_path / "data.npz")} | changes
    assert cli.main(["eval", *(f"{name}={value}" for name, value in given.items())]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


CONFIG = """
from regvit_jax.config import evaluator, protocol

def get_config():
    c = protocol(image_size=24, crop_ratio=0.5)
    c.evals.near = evaluator("knn", k=(3,))
    c.evals.head = evaluator("accuracy")
    return c
"""


def test_a_config_names_tasks_options_and_how_images_are_prepared(saved, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("regvit_jax.main.set_up_logging", lambda: None)
    config, out = tmp_path / "config.py", tmp_path / "found.json"
    config.write_text(CONFIG)
    command = ["eval", f"--config={config}", f"--model={saved}", f"--data={tiny.write_npz(tmp_path / 'data.npz')}"]
    command += ["--task=near", "--set=temperature=0.5", f"--out={out}", f"--pictures={tmp_path}"]
    assert cli.main(command) == 0
    (record,) = json.loads(out.read_text())["tasks"].values()
    assert record["name"] == "near" and record["type"] == "knn"
    assert record["options"]["k"] == [3] and record["options"]["temperature"] == 0.5
    look = record["model"]["preprocessing"]
    assert (look["size"], look["crop_ratio"]) == (24, 0.5)
    capsys.readouterr()
    for text, argument, said in (
        (CONFIG, "--task=knn", "--task=knn is not in the config: it has head, near"),
        (CONFIG, "--set=far.k=1", "--set far.k=1: write KEY=VALUE"),
        (CONFIG.replace("k=(3,)", "kk=3"), "--task=near", "evaluator 'knn' has no option 'kk'; did you mean 'k'?"),
        (CONFIG.replace("image_size", "imagesize"), "--task=near", "imagesize"),
        ("x = 1", "--task=near", "there is no get_config()"),
        ("def get_config(): return {}", "--task=near", "its config has no evaluators"),
    ):
        config.write_text(text)
        assert cli.main([*command, argument]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert cli.main(["eval", *command[2:4]]) == 2
    assert "give --task, such as --task=knn, or --config" in capsys.readouterr().err


def test_a_stopped_eval_says_that_it_goes_on(saved, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("regvit_jax.main.set_up_logging", lambda: None)

    def stopped(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        stopping.poll()

    monkeypatch.setattr("regvit_jax.evaluate.run", stopped)
    data, out = tiny.write_npz(tmp_path / "data.npz"), tmp_path / "found.json"
    assert cli.main(["eval", f"--model={saved}", f"--data={data}", "--task=accuracy", f"--out={out}"]) == 1
    assert "the same command goes on" in capsys.readouterr().err and not out.exists()


def test_options_take_the_type_of_their_default():
    assert cli._options("knn", evaluator("knn"), ["k=5,10", "temperature=1", "feature=mean_patch"]) == {
        "k": (5, 10),
        "temperature": 1.0,
        "feature": "mean_patch",
    }


def test_models_are_listed(capsys, monkeypatch):
    monkeypatch.setattr("regvit_jax.main.set_up_logging", lambda: None)
    assert cli.main(["models"]) == 0
    assert capsys.readouterr().out.split() == rv.list_models()


@pytest.fixture
def photos(tmp_path):
    """Two classes of three grey pictures."""
    for number in range(6):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (20 * number,) * 3).save(path)
    return tmp_path / "photos"


def test_data_check_prints_a_report_and_its_exit_code_tells(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("regvit_jax.main.set_up_logging", lambda: None)
    command = [
        "data",
        "check",
        f"folder:{photos}",
        f"--picture={tmp_path}/sheet.png",
        f"--json={tmp_path}/new/found.json",
    ]
    assert cli.main(command) == 0
    assert "6 images, 2 classes, 3 each" in capsys.readouterr().out
    assert Image.open(tmp_path / "sheet.png").width > 1000
    (photos / "a" / "0.png").write_bytes(b"")
    assert cli.main(command) == 1
    assert "a/0.png" in capsys.readouterr().out
    assert json.loads((tmp_path / "new" / "found.json").read_text())["splits"][""]["unreadable"][0][0] == "a/0.png"
    assert cli.main(["data", "check", "folder:/nowhere"]) == 2
    assert cli.main(["data", "check", f"folder:{photos}", "--sample=0"]) == 2


def test_data_prepare_says_how_to_train_on_what_it_wrote(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("regvit_jax.main.set_up_logging", lambda: None)
    command = ["data", "prepare", f"folder:{photos}", f"{tmp_path}/made", "--size=20", "--workers=0"]
    (photos / "a" / "0.png").write_bytes(b"")
    assert cli.main(command) == 1
    assert "unfinished: 1 of 6 images cannot be read so far" in capsys.readouterr().err
    assert cli.main([*command, "--max_bad=0.5"]) == 0
    out = capsys.readouterr().out
    assert "train 5 images" in out and "left out: train: a/0.png" in out
    assert f"--config.data.train=tfds:@{tmp_path}/made#train" in out
    assert cli.main([*command, "--size=30"]) == 2
    assert "holds another dataset" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["check"], ["prepare"]])
def test_data_help_teaches(command, capsys):
    with pytest.raises(SystemExit):
        cli.main(["data", *command, "--help"])
    assert "folder:" in capsys.readouterr().out


def test_what_the_system_refuses_is_one_line(monkeypatch, capsys):
    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied", "a.pth")

    monkeypatch.setattr("regvit_jax.hub.convert", refuse)
    assert cli.main(["convert", "a.pth", "out", "--to=timm"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: [Errno 13] Permission denied: 'a.pth'"
