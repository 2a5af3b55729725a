"""One training, any mesh: the same losses and checkpoints, every parameter where it belongs, no needless traffic.

tests/golden/param_specs.json holds the PartitionSpec of every parameter of a ViT-L/14 with 4 registers. To write it
again after a deliberate change, and to read the difference before it is committed:

  XLA_FLAGS=--xla_force_host_platform_device_count=8 PYTHONPATH=. python tests/test_meshes.py
"""

import collections
import importlib.util
import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from regvit_jax import sharding, train
from regvit_jax.checkpoint import Checkpoints
from regvit_jax.config import defaults
from regvit_jax.data.feed import feed
from regvit_jax.data.transforms import TrainTransform
from regvit_jax.models import layers
from regvit_jax.models.config import Execution, ViTConfig
from regvit_jax.state import report
from regvit_jax.trees import named

# data x fsdp x tensor, on as many devices as that makes.
MESHES = [(8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)]
GOLDEN = Path(__file__).parent / "golden" / "param_specs.json"


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Every program here is compiled for one mesh and runs a few times: compiling it well would take most of the time.
    What is sent between devices is decided before that."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def mesh_of(data, fsdp, tensor):
    return sharding.make_mesh(data, fsdp, tensor, devices=jax.devices()[: data * fsdp * tensor])


class Run:
    """One training that goes on on any mesh: 10 steps, with random draws everywhere."""

    def __init__(self, folder):
        spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
        tiny = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tiny)
        config = tiny.everything(tiny.write_npz(folder / "train.npz"))
        config.model.num_heads = 8
        self.config, self.source, _ = train.prepare(config)
        self.steps, self.fresh = {}, None

    def step(self, shape):
        """The Step of a mesh; compiled once."""
        if shape not in self.steps:
            with jax.set_mesh(mesh_of(*shape)):
                self.steps[shape] = train.build_step(self.config, mesh_of(*shape))
        return self.steps[shape]

    def init(self, step):
        """The state at step 0, initialised where it is trained on one device and on 2x2x2. The other meshes are given
        its values, to save the compilation: that these do not depend on the mesh is what test_state.py is about."""
        if self.fresh is None or step.mesh.size == 8 and min(step.mesh.shape.values()) > 1:
            state = step.init()
            self.fresh = sharding.gather(state) if self.fresh is None else self.fresh
            return state
        return jax.device_put(self.fresh, jax.tree.map(lambda leaf: leaf.sharding, step.abstract))

    def go(self, shape, start=0, stop=10, state=None):
        """([loss of each step], the state after the last)."""
        step, losses = self.step(shape), []
        order = {"seed": self.config.seed, "batch_size": 16, "start_step": start, "stop_step": stop}
        with jax.set_mesh(step.mesh):
            state = self.init(step) if state is None else state
            transform = TrainTransform(16, crop="none")
            for batch in feed(self.source, transform, step.mesh, fields=("image", "label"), **order):
                state, metrics = step.update(state, batch)
                losses.append(float(metrics["loss"]))
        return losses, state


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def straight(run):
    """Losses and the last state on one device."""
    losses, state = run.go((1, 1, 1))
    return losses, named(sharding.gather(state))


@pytest.mark.parametrize("shape", MESHES)
def test_losses_and_parameters_do_not_depend_on_the_mesh(run, straight, shape):
    expected, expected_state = straight
    losses, state = run.go(shape)
    np.testing.assert_allclose(losses[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    for path, leaf in named(sharding.gather(state)).items():
        np.testing.assert_allclose(leaf, expected_state[path], rtol=0, atol=1e-4, err_msg=path)
    step = run.step(shape)
    assert step.update._cache_size() == 1
    split, whole = report(state).sharded, report(state).total
    # Tensor parallelism leaves the ends of the network whole, which are a good part of one this small.
    least = 0.9 if shape[1] > 1 else 0.6
    assert split > least * whole if max(shape[1:]) > 1 else split == 0
    for tree in (state["opt"]["mu"], state["opt"]["nu"], state["extras"]["ema"]):
        assert jax.tree.map(lambda x: x.sharding, tree) == jax.tree.map(lambda x: x.sharding, state["params"])


def test_the_loss_goes_down_and_every_random_draw_is_new(straight):
    losses, state = straight
    assert len(set(losses)) == 10 and min(losses[5:]) < losses[0]
    assert state["step"] == 10
    params = {path: leaf for path, leaf in state.items() if path.startswith("params/")}
    assert any((state[path.replace("params/", "extras/ema/")] != leaf).any() for path, leaf in params.items())


def test_a_run_goes_on_on_other_meshes_and_other_numbers_of_devices(run, straight, tmp_path):
    """Saved on 8 devices, sharded; the same checkpoint goes on on 8, split three ways, on 2 and on 1."""
    first, state = run.go((1, 8, 1), stop=5)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state, data={}, meta={}, wait=True)
        saved = named(sharding.gather({name: state[name] for name in ("params", "opt", "extras")}))
        for shape in [(2, 2, 2), (1, 2, 1), (1, 1, 1)]:
            restored, _, _ = checkpoints.restore(run.step(shape).abstract)
            for path, leaf in saved.items():
                np.testing.assert_array_equal(np.asarray(named(restored)[path]), leaf, err_msg=path)
            losses, _ = run.go(shape, start=5, state=restored)
            np.testing.assert_allclose(first + losses, straight[0], rtol=1e-4, err_msg=str(shape))


# A ViT whose four kernels of a block, patch kernel, position rows and head are large enough to be split, and nothing
# else. No axis of a parameter is as long as the sequence of tokens.
WIDTH, DEPTH, HEADS, HIDDEN, TOKENS, CLASSES, BATCH = 64, 2, 8, 256, 1 + 4 + 16, 16, 32
OPS = ("all-gather", "all-to-all", "all-reduce", "reduce-scatter", "collective-permute")


def compiled_step(shape, monkeypatch=None, without=None):
    """The text of the optimised program of one training step, for one device of a mesh.

    `without` is the PartitionSpec whose constraint is left out of models.layers. Networks are traced once for equal
    configs, so then the rate of stochastic depth, which no collective depends on, is another.
    """
    config = defaults("supervised")
    config.update_from_flattened_dict(
        {
            "model.name": "vit_ti16_reg4", "model.image_size": 32, "model.patch_size": 8, "model.width": WIDTH,
            "model.depth": DEPTH, "model.num_heads": HEADS, "model.mlp_dim": HIDDEN, "model.num_classes": CLASSES,
            "model.drop_path": 0.1 if without is None else 0.2, "batch_size": BATCH, "dtype": "float32",
            "total_steps": 10, "optim.warmup_steps": 1, "mesh.fsdp_min_bytes": WIDTH * CLASSES * 4,
        }
    )  # fmt: skip
    if without is not None:
        kept = layers.constrain
        monkeypatch.setattr(layers, "constrain", lambda x, *spec: x if spec == without else kept(x, *spec))
    mesh = mesh_of(*shape)
    with jax.set_mesh(mesh):
        step = train.build_step(config, mesh)
        where = sharding.batch_sharding(mesh)
        batch = {k: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where) for k, s in step.recipe.input_spec.items()}
        return step.update.lower(step.abstract, batch).compile().as_text()


def instructions(text, *ops):
    """[(op, [shape of each result], line)] of every instruction of these kinds; an asynchronous pair counts once."""
    found = []
    for line in text.splitlines():
        match = re.match(rf"\s*(?:ROOT )?%?\S+ = (.*?) ({'|'.join(ops)})(?:-start)?\(", line)
        if match:
            shapes = re.findall(r"[a-z]+\d*\[([\d,]*)\]", match[1])
            found.append((match[2], [tuple(int(n) for n in s.split(",") if n) for s in shapes], line))
    return found


def traffic(text):
    """How many instructions of each kind of collective there are, and how many arrays with an axis of tokens each kind
    carries."""
    found = instructions(text, *OPS)
    arrays = [f"{op} of activations" for op, shapes, _ in found for s in shapes if TOKENS in s]
    return collections.Counter([op for op, _, _ in found] + arrays)


def product_flops(text):
    """FLOPs of all matrix products in the program; what is in a loop counts once."""
    shapes = {
        name: [int(n) for n in dims.split(",") if n]
        for name, dims in re.findall(r"^\s*(?:ROOT )?(%?\S+) = [a-z]+\d*\[([\d,]*)\]", text, re.MULTILINE)
    }
    total = 0
    for _, (result,), line in instructions(text, "dot"):
        left = re.search(r" dot\((?:[a-z]+\d*\[\S* )?([^\s,)]+)", line)[1]
        axes = re.search(r"lhs_contracting_dims={([\d,]*)}", line)[1]
        total += 2 * math.prod(result) * math.prod(shapes[left][int(axis)] for axis in axes.split(","))
    return total


# FSDP needs, of every split kernel, the whole where it is used: q, k, v, proj, fc1, fc2 in the forward loop and again
# in the backward loop (12; a loop's body counts once), and at the ends of the network, once each, the patch kernel, the
# head, and the position rows in two pieces, class token and patches (4). Nothing else is gathered and nothing changes
# its layout. Gradients are summed where they arise: in the backward loop, at either end, for norms and metrics. How
# many of these sums go together is the compiler's choice.
BUDGET = {
    (1, 8, 1): {"all-gather": 12 + 4, "all-reduce": 8},
    # Tensor parallelism adds sums of activations over its devices: of proj and fc2 forward, of the inputs of fc1 and of
    # q, k, v backward. What is split differently is summed over different sets of devices: more all-reduces.
    (2, 2, 2): {"all-gather": 12 + 4, "all-reduce": 20, "all-reduce of activations": 2 + 1 + 3},
}


def over_budget(text, shape):
    """What there is too much of."""
    return {kind: count for kind, count in traffic(text).items() if count > BUDGET[shape].get(kind, 0)}


@pytest.mark.parametrize("shape", BUDGET)
def test_a_step_sends_parameters_and_no_activations_but_for_tensor_parallel_sums(shape):
    text = compiled_step(shape)
    assert over_budget(text, shape) == {}
    assert traffic(text)["all-gather"] == BUDGET[shape]["all-gather"], "less than it takes: is anything split?"
    # Every device does its share: of the blocks 1 in 8; of both ends, which tensor devices repeat, 1 in data x fsdp.
    # Backward is twice forward, but for the patches: no gradient goes into the images.
    rows = BATCH // (shape[0] * shape[1])
    block = 2 * TOKENS * (4 * WIDTH**2 + 2 * WIDTH * HIDDEN) + 4 * TOKENS**2 * WIDTH
    patches, head = 2 * 16 * 3 * 8**2 * WIDTH, 2 * WIDTH * CLASSES
    assert product_flops(text) == 3 * block * BATCH // 8 + rows * (2 * patches + 3 * head)


def test_without_the_constraint_on_the_residual_stream_the_budget_is_exceeded(monkeypatch):
    over = over_budget(compiled_step((1, 8, 1), monkeypatch, without=(sharding.BATCH,)), (1, 8, 1))
    assert over.keys() >= {"all-gather of activations", "all-reduce of activations"}


def test_without_gathering_the_ends_of_the_network_the_budget_is_exceeded(monkeypatch):
    over = over_budget(compiled_step((2, 2, 2), monkeypatch, without=()), (2, 2, 2))
    assert over.keys() >= {"all-to-all", "collective-permute"}


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 8)])
def test_swiglu_moves_weights_but_neither_activations_nor_work(shape):
    """The halves of fc1 lie on other tensor devices than they are needed on."""
    vit = ViTConfig(width=WIDTH, depth=1, num_heads=HEADS, mlp_dim=HIDDEN, activation="swiglu")
    mlp = layers.Mlp(vit, Execution(), rngs=nnx.Rngs(0))
    graph, params = nnx.split(mlp)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), nnx.to_pure_dict(params))
    x = rng.normal(size=(BATCH, TOKENS, WIDTH)).astype(np.float32)

    def loss(params, x):
        return (sharding.constrain(nnx.merge(graph, params)(x)[0], sharding.BATCH) ** 2).sum()

    grads = jax.value_and_grad(loss, argnums=(0, 1))
    expected = jax.jit(grads)(params, x)
    mesh = mesh_of(*shape)
    where = sharding.shardings({"blocks": {"mlp": jax.tree.map(lambda x: x[None], params)}}, mesh, 0)["blocks"]["mlp"]
    where = jax.tree.map(lambda s: jax.sharding.NamedSharding(mesh, jax.P(*s.spec[1:])), where)
    rows = sharding.batch_sharding(mesh)
    with jax.set_mesh(mesh):
        placed = jax.device_put((params, x), (where, rows))
        step = jax.jit(grads, out_shardings=(None, (where, rows))).lower(*placed).compile()
        found = step(*placed)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
    sent = traffic(step.as_text())
    # Two exchanges each, by way of the rows: forward, again backward (unless the compiler shares one), and the gradient
    # back. Sums of activations: of fc2, and of the inputs of gate and value.
    assert 4 <= sent["all-to-all"] <= 6 and sent["collective-permute"] == 0
    assert {kind: n for kind, n in sent.items() if "activations" in kind} == {"all-reduce of activations": 1 + 2}
    assert product_flops(step.as_text()) == 3 * 2 * BATCH * TOKENS * 3 * WIDTH * HIDDEN // 8


def specs(shape):
    """({path: PartitionSpec as a list}, the abstract state) of a real run; nothing is allocated or compiled."""
    config = defaults("supervised")
    config.model.name, config.model.num_classes, config.supervised.ema = "dinov2_vitl14_reg4", 1000, 0.999
    mesh = mesh_of(*shape)
    with jax.set_mesh(mesh):
        state = train.build_step(config, mesh).abstract
    return {path: list(leaf.sharding.spec) for path, leaf in named(state["params"]).items()}, state


def title(shape):
    return "x".join(map(str, shape))


@pytest.mark.parametrize("shape", MESHES)
def test_every_parameter_of_a_vit_l_lies_where_it_should(shape):
    found, state = specs(shape)
    assert found == json.loads(GOLDEN.read_text())[title(shape)]
    for tree in (state["opt"]["mu"], state["opt"]["nu"], state["extras"]["ema"]):
        assert {path: list(leaf.sharding.spec) for path, leaf in named(tree).items()} == found


if __name__ == "__main__":
    table = {title(shape): specs(shape)[0] for shape in MESHES}
    lines = ",\n".join(
        f'  "{mesh}": {{\n' + ",\n".join(f'    "{k}": {json.dumps(v)}' for k, v in leaves.items()) + "\n  }"
        for mesh, leaves in table.items()
    )
    GOLDEN.write_text("{\n" + lines + "\n}\n")
