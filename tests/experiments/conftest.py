"""Scripts of experiments/ loaded from their files, a small network and a mesh of one device for all of them."""

import importlib.util
import pathlib
import sys

import pytest

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="session")
def script():
    """script("table1/run") -> the module."""
    loaded, before = {}, list(sys.path)

    def load(name):
        if name not in loaded:
            where = EXPERIMENTS / f"{name}.py"
            spec = importlib.util.spec_from_file_location(f"experiments_{name.replace('/', '_')}", where)
            loaded[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded[name])
        return loaded[name]

    yield load
    sys.path[:] = before


@pytest.fixture(scope="session")
def network(tmp_path_factory):
    import regvit_jax as rv

    shape = dict(width=16, depth=4, num_heads=2, mlp_dim=16, image_size=32, patch_size=8)
    folder = tmp_path_factory.mktemp("network")
    rv.save_model(rv.create_model("vit_ti8_reg1", **shape), folder)
    return folder


@pytest.fixture(scope="session")
def run(script, network):
    """run("table1", out, "--stand_in", …) -> exit code; the network is called "tiny"."""
    import jax

    from regvit_jax import sharding

    mesh = sharding.make_mesh(devices=jax.devices()[:1])

    def run(name, out, *options):
        module = script(f"{name}/run")
        arguments = [f"--model=tiny={network}", f"--out={out}", *options]
        return sys.modules["report"].main(module.EXPERIMENT, arguments, mesh=mesh)

    return run


@pytest.fixture(scope="session")
def out(tmp_path_factory):
    """A folder that scripts share, so that none measures what another did."""
    return tmp_path_factory.mktemp("out")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr("regvit_jax.main.set_up_logging", lambda: None)
    if "report" in sys.modules:
        monkeypatch.setattr(sys.modules["report"], "set_up_logging", lambda: None)
