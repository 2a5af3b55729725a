"""A network of two narrow blocks, meshes of 1 and 8 devices, and small datasets of coloured noise.

What loads JAX is imported in the fixtures: pytest reads this file before tests/conftest.py has set up the fake devices.
"""

import contextlib
import io
import itertools

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def quick_to_compile():
    """Programs that run for milliseconds are not worth seconds of optimisation."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def killed(monkeypatch):
    """with killed(after=2): … ends the fit inside when two of its steps are done."""
    from regvit_jax.evals import head_training

    @contextlib.contextmanager
    def kill(after):
        step, update = itertools.count(), head_training._update

        def last(*args):
            if next(step) == after:
                raise SystemExit("killed")
            return update(*args)

        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="killed"):
            patch.setattr(head_training, "_update", last)
            yield

    return kill


@pytest.fixture(scope="session")
def model():
    return tiny()


@pytest.fixture(scope="session")
def make_model():
    return tiny


@pytest.fixture(scope="session")
def bare_model():
    """Patches and nothing else: no class token, no registers."""
    return tiny(class_token=False, registers=0, pool="avg", position="patches")


@pytest.fixture(scope="session")
def mesh():
    import jax

    from regvit_jax import sharding

    return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="session")
def mesh8():
    from regvit_jax import sharding

    return sharding.make_mesh(data=2, fsdp=4)


@pytest.fixture
def make_npz(tmp_path):
    """make_npz("a.npz", train=labels, test=labels) -> path; image i shows noise around the colour of its class."""

    def make(name, **splits):
        arrays = {}
        for number, (split, labels) in enumerate(splits.items()):
            encoded = [png(noise(label, seed=1000 * number + i)) for i, label in enumerate(labels)]
            arrays[f"{split}_jpeg"] = np.frombuffer(b"".join(encoded), np.uint8)
            arrays[f"{split}_offsets"] = np.cumsum([0, *map(len, encoded)])
            arrays[f"{split}_labels"] = np.asarray(labels, np.int32)
        np.savez(tmp_path / name, **arrays)
        return tmp_path / name

    return make


@pytest.fixture
def make_folder(tmp_path):
    """make_folder("photos", "a.png", "b.png") -> path of a folder of images without labels."""

    def make(name, *files):
        (tmp_path / name).mkdir()
        for seed, file in enumerate(files):
            (tmp_path / name / file).write_bytes(png(noise(seed % 4, seed)))
        return tmp_path / name

    return make


def tiny(**changes):
    from regvit_jax.models.zoo import create_model

    shape = dict(width=32, depth=2, num_heads=2, mlp_dim=64, image_size=32, patch_size=8, registers=2)
    return create_model("vit_ti16", **(shape | changes))


def noise(label, seed):
    rng = np.random.default_rng(seed)
    colour = np.array([[220, 40, 40], [40, 220, 40], [40, 40, 220], [200, 200, 40]])[label]
    return np.clip(colour + rng.normal(0, 40, (40, 36, 3)), 0, 255).astype(np.uint8)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()
