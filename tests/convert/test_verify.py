"""What `--verify=torch` does where PyTorch is not: it refuses before anything is written; and how errors are counted.

The comparison itself needs PyTorch: tests/parity/test_verify.py.
"""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest

import regvit_jax as rv
from regvit_jax import cli, hub
from regvit_jax.convert import certificate, files, verify

TORCHES = ("torch", "timm", "transformers")
COMMAND = ("--to=regvit", "--num_heads=2", "--verify=torch")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr("regvit_jax.main.set_up_logging", lambda: None)
    # Compiles twice, and is no matter of these tests.
    monkeypatch.setattr(certificate, "outputs", lambda model: [])


@pytest.fixture
def source(theirs, tmp_path):
    files.write(tmp_path / "meta.pth", theirs("dinov2, 4 registers")[1])
    return tmp_path / "meta.pth"


@pytest.fixture
def installed(monkeypatch):
    """f(*names): of PyTorch and its libraries only these seem to be there."""
    real = importlib.util.find_spec

    def only(*names):
        def find_spec(name):
            return real("json" if name in names else "no_such_module" if name in TORCHES else name)

        monkeypatch.setattr(verify.importlib.util, "find_spec", find_spec)

    return only


@pytest.mark.parametrize(("there", "absent"), [((), "torch"), (("torch", "transformers"), "timm")])
def test_without_pytorch_it_says_what_to_do_and_writes_nothing(there, absent, source, installed, tmp_path, capsys):
    installed(*there)
    assert cli.main(["convert", str(source), str(tmp_path / "out"), *COMMAND]) == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and f"{absent} is not installed here" in error
    assert "pip install 'regvit_jax[parity]'" in error and not (tmp_path / "out").exists()


@pytest.mark.process
def test_an_earlier_conversion_stays_if_the_original_cannot_be_run(source, installed, tmp_path, capsys, monkeypatch):
    """The child is a real one: without PyTorch it fails at its first line."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.json").write_text("of before")
    said = {"source": {"name": "meta.pth", "sha256": files.sha256_of(source)}}
    said |= {"target": {"family": "regvit", "files": {"model.json": ""}}}
    (tmp_path / "out" / "certificate.json").write_text(json.dumps(said))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    installed("torch", "timm")
    (tmp_path / "torch.py").write_text("raise ImportError('no torch in this test')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert cli.main(["convert", str(source), str(tmp_path / "out"), *COMMAND]) == 2
    error = capsys.readouterr().err
    assert "could not be run with timm: ImportError: no torch in this test" in error
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_our_own_format_has_no_original(source, installed, tmp_path, capsys):
    installed(*TORCHES)
    rv.save_model(rv.load_model(source, num_heads=2), tmp_path / "own")
    assert cli.main(["convert", str(tmp_path / "own"), str(tmp_path / "out"), "--to=dinov2", "--verify=torch"]) == 2
    assert "is in our own format" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_errors_by_hand():
    """|3.5 - 4| = 0.5 is the greatest difference; the original's greatest value is 4."""
    theirs = np.float32([[1, -2], [4, 0]])
    assert verify.error(np.float32([[1, -2.25], [3.5, 0]]), theirs) == {"max_abs": 0.5, "max_rel": 0.125}
    assert verify.error(np.float32([[np.nan, -2], [4, 0]]), theirs)["max_abs"] == float("inf")
    with pytest.raises(ValueError, match=r"the original gives \(2, 2\) where we give \(4,\)"):
        verify.error(theirs.reshape(-1), theirs)


@pytest.mark.parametrize(("shift", "code", "verdict"), [(0.0, 0, "equals"), (0.5, 1, "DIFFERS FROM")])
def test_the_certificate_has_every_block(shift, code, verdict, source, installed, tmp_path, capsys, monkeypatch):
    """The child is played by our own model, its last tokens moved by a known amount."""
    installed("torch", "timm")
    asked = {}

    def child(request, inputs):
        asked.update(request)
        model, out = rv.load_model(source, num_heads=2), {}
        for size, images in inputs.items():
            tokens, streams = model(images, capture=("block0", "block1"))
            out |= {f"{size}/{name}": np.asarray(stream) for name, stream in streams.items()}
            out[f"{size}/tokens"] = certificate.sequence(tokens) + np.float32(shift)
        return out, {"library": {"torch": "9", "timm": "8"}, "read_by": "torch 9"}

    monkeypatch.setattr(verify, "_in_a_child", child)
    assert cli.main(["convert", str(source), str(tmp_path / "out"), *COMMAND]) == code
    assert f"{verdict} the original (torch 9 timm 8)" in capsys.readouterr().out
    said = json.loads((tmp_path / "out" / "certificate.json").read_text())["verify"]
    assert said["agrees"] == (code == 0) and said["sizes"].keys() == {"12x12", "4x8"} and said["left_out"] == {}
    for found in said["sizes"].values():
        assert len(found["blocks"]) == 2
        assert abs(found["tokens"]["max_abs"] - shift) < 1e-4
    # timm's importer adds the class token's position into it, so its network has none there.
    assert asked["config"]["model_args"]["no_embed_class"] is True and asked["config"]["model_args"]["num_heads"] == 2
    assert asked["files"] == [str(source)] and asked["keys"]["register_tokens"] == "register_tokens"


def test_the_model_that_is_compared_is_the_one_that_was_read(source, installed, tmp_path, monkeypatch):
    installed("torch", "timm")
    compared = []

    def against_torch(model, path):
        compared.append((model.config.image_size, path))
        return {"agrees": True, "library": {}, "sizes": {}}

    monkeypatch.setattr(verify, "against_torch", against_torch)
    made = hub.convert(source, tmp_path / "out", "regvit", with_torch=True, num_heads=2, image_size=16)
    assert compared == [((12, 12), source)] and made["config"]["image_size"] == (16, 16)


@pytest.mark.parametrize(
    ("name", "given", "left_out"),
    [
        ("dinov2", {}, {"4x8": "timm resamples positions as antialias, this model as bicubic_offset"}),
        ("dinov2, 4 registers", {}, {}),
        ("Hugging Face", {}, {}),
        (
            "Hugging Face",
            {"resampler": "antialias"},
            {"4x8": "transformers resamples positions as bicubic, this model as antialias"},
        ),
    ],
)
def test_sizes_at_which_the_library_has_another_rule_are_left_out(name, given, left_out, theirs):
    family, state = theirs(name)
    model = rv.from_torch(state, family, num_heads=2)
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, **given))
    sizes, said = verify._sizes(model)
    assert said == left_out and sizes == [(12, 12)] + ([] if left_out else [(4, 8)])
