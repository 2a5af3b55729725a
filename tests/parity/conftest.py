"""The PyTorch side of a comparison: libraries, networks whose every parameter is random, what they compute by block.

Only `make parity` collects this folder. One process holds PyTorch, JAX, and one small network at a time.
"""

import contextlib
import os
import pathlib
import sys

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
MEASURED = "greatest difference"
STUB = str(pathlib.Path(__file__).with_name("stub"))


@contextlib.contextmanager
def _torchvision_or_its_stub():
    """While timm is imported. transformers must not find the stub: it would take it for the whole library."""
    if "torchvision" in sys.modules:
        yield
        return
    sys.path.append(STUB)
    yield
    sys.path.remove(STUB)
    if sys.modules["torchvision"].__file__.startswith(STUB):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != "torchvision"]


with _torchvision_or_its_stub():
    import timm
import torch  # noqa: E402

HERE_IS_TORCHVISION = timm.layers.create_norm.FrozenBatchNorm2d.__module__.startswith("torchvision.")


def pytest_report_header():
    import transformers

    return f"torch {torch.__version__}, timm {timm.__version__}, transformers {transformers.__version__}"


@pytest.fixture(scope="session", autouse=True)
def _eager():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


@pytest.fixture
def child_with_timm(monkeypatch):
    """A new process that imports timm finds the stub where this one needed it."""
    if not HERE_IS_TORCHVISION:
        monkeypatch.setenv("PYTHONPATH", STUB)


@pytest.fixture(scope="session")
def randomised():
    """f(build): the network that `build` makes, every parameter at random, none where its absence would not show."""

    def fill(build):
        with torch.device("meta"):  # What it would draw is not wanted.
            module = build()
        assert not list(module.buffers()), "only parameters are filled"
        module, rng = module.to_empty(device="cpu"), np.random.default_rng(0)
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(drawn(name, tuple(parameter.shape), rng)))
        return module.eval()

    return fill


@pytest.fixture(scope="session")
def draw():
    return drawn


def drawn(name, shape, rng):
    """Gains of branches in [0.2, 0.6), norms 1 + 0.2 N, biases 0.1 N, tokens and positions 0.5 N, others by fan-in."""
    last = name.replace("/", ".").split(".")[-1]
    if last in ("gamma", "lambda1"):
        value = rng.uniform(0.2, 0.6, shape)
    elif "norm" in name and last in ("weight", "scale"):
        value = 1 + 0.2 * rng.standard_normal(shape)
    elif last == "bias":
        value = 0.1 * rng.standard_normal(shape)
    elif "token" in name or "pos" in name or last == "latent":
        value = 0.5 * rng.standard_normal(shape, np.float32)
    else:
        fan_in = int(np.prod(shape[1:])) if last == "weight" else shape[-2]
        if last == "kernel":  # Ours: (in, out), qkv (in, 3, out), below blocks/ with the depth in front.
            fan_in = shape[-3] if "qkv" in name else shape[-2]
        value = rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(fan_in))
    return value.astype(np.float32, copy=False)


@pytest.fixture(scope="session")
def numbers():
    """f(module): its state dict as NumPy arrays."""
    return lambda module: {key: tensor.numpy().copy() for key, tensor in module.state_dict().items()}


@pytest.fixture(scope="session")
def watched():
    """f(blocks, run, images (B, H, W, 3)): ([residual stream after each block], *what `run(x)` gives), NumPy."""

    def watch(blocks, run, images):
        streams = []
        hooks = [block.register_forward_hook(lambda module, given, out: streams.append(out)) for block in blocks]
        results = run(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))))
        for hook in hooks:
            hook.remove()
        streams = [stream[0] if isinstance(stream, tuple) else stream for stream in streams]
        return [stream.numpy() for stream in streams[: len(blocks)]], *(r if r is None else r.numpy() for r in results)

    return watch


@pytest.fixture(scope="session")
def images():
    """f(height, width): (1, H, W, 3) float32."""
    return lambda height, width: np.random.default_rng(height * width).standard_normal(
        (1, height, width, 3), np.float32
    )


@pytest.fixture
def measured(record_property):
    """f(label, {what: greatest absolute difference}): into the table at the end of the run."""
    return lambda label, away: record_property(MEASURED, (label, {what: float(x) for what, x in away.items()}))


def pytest_terminal_summary(terminalreporter):
    reports = [report for found in terminalreporter.stats.values() for report in found]
    properties = [value for r in reports for name, value in getattr(r, "user_properties", ()) if name == MEASURED]
    if properties:
        terminalreporter.section("greatest absolute difference from the original")
    for label, away in sorted(dict(properties).items()):
        terminalreporter.write_line(f"{label:<56}" + "  ".join(f"{what} {value:.1e}" for what, value in away.items()))
