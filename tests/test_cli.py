"""The `regvit` command: a model measured from the command line, what it prints and writes, and how it refuses."""

import importlib.util
import json
import pathlib

import pytest
from PIL import Image

import regvit_jax as rv
from regvit_jax import cli


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
    assert (tmp_path / "untrained/eval/knn/results.json").is_file() and (tmp_path / "eval/knn/results.json").is_file()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"--model": "/nowhere"}, "/nowhere does not exist"),
        ({"--task": "knnn"}, "unknown evaluator 'knnn'"),
        ({"--data": "photos"}, "names no data source"),
        ({"--set": "k"}, "--set k: write KEY=VALUE"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(saved, tiny, tmp_path, capsys, monkeypatch, changes, said):
    monkeypatch.setattr("regvit_jax.main.set_up_logging", lambda: None)
    given = {"--model": str(saved), "--task": "knn", "--data": tiny.write_npz(tmp_path / "data.npz")} | changes
    assert cli.main(["eval", *(f"{name}={value}" for name, value in given.items())]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_options_take_the_type_of_their_default():
    assert cli._options("knn", ["k=5,10", "temperature=1", "feature=mean_patch"]) == {
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
