"""The network against a second one written from the papers in NumPy, its token layout, masks and stochastic depth."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf, expit

from regvit_jax.models.config import Execution
from regvit_jax.models.layers import branches, drop_path
from regvit_jax.trees import named

FAST = {"xla_backend_optimization_level": 0}  # compiling is most of the time here
CASES = {
    "dinov2 giant": {"activation": "swiglu", "layerscale": 1.0, "mask_token": True, "drop_path": 0.5, "norm_eps": 0.1},
    "clip": {"activation": "quick_gelu", "pre_norm": True, "patch_bias": False, "registers": 0, "num_classes": 5},
    "timm gap": {
        "activation": "gelu_tanh", "class_token": False, "pool": "avg", "fc_norm": True, "final_norm": False,
        "qkv_bias": False, "position": "all", "registers": 3, "num_classes": 5,
    },
    "timm map": {"pool": "map", "position": "patches", "registers": 1, "num_classes": 5},
    "deit3": {"position": "patches", "layerscale": 1e-4, "registers": 0, "num_classes": 5, "drop_path_uniform": True},
    "no positions": {"position": "none", "registers": 4, "fc_norm": True, "num_classes": 5},
}  # fmt: skip


class Reference:
    """A Vision Transformer in float64. `p` are its parameters by name."""

    def __init__(self, model):
        self.c, self.p = (
            model.config,
            {name: np.asarray(leaf, np.float64) for name, leaf in named(model.params).items()},
        )

    def norm(self, x, name, i=...):
        centred = x - x.mean(-1, keepdims=True)
        unit = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + self.c.norm_eps)
        return unit * self.p[f"{name}/scale"][i] + self.p[f"{name}/bias"][i]

    def linear(self, x, name, i=...):
        return x @ self.p[f"{name}/kernel"][i] + self.p[f"{name}/bias"][i]

    def embed(self, images, mask=None):
        p, size, b = self.p, self.c.patch_size, len(images)
        cells = [images[:, y : y + size, x : x + size] for y in range(0, 12, size) for x in range(0, 8, size)]
        patches = np.stack([cell.reshape(b, -1) for cell in cells], 1) @ p["patch_embed/kernel"] + p.get(
            "patch_embed/bias", 0
        )
        if mask is not None:
            patches[mask] = p["mask_token"][0]
        repeat = lambda name: np.repeat(p[name], b, 0) if name in p else np.zeros((b, 0, self.c.width))  # noqa: E731
        cls, registers, rows = repeat("cls_token"), repeat("register_tokens"), p.get("pos_embed", 0)
        if self.c.position == "all":
            x = np.concatenate([cls, registers, patches], 1) + rows
        elif self.c.position == "cls":
            x = np.concatenate([cls, patches], 1) + rows
            x = np.concatenate([x[:, :1], registers, x[:, 1:]], 1)
        else:
            x = np.concatenate([cls, registers, patches + rows], 1)
        return self.norm(x, "pre_norm") if self.c.pre_norm else x

    def attend(self, q, k, v):
        scores = np.einsum("bqhk,bnhk->bhqn", q, k) / np.sqrt(self.c.head_dim)
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        return np.einsum("bhqn,bnhk->bqhk", weights, v).reshape(*q.shape[:2], -1), weights

    def heads(self, x):
        return x.reshape(*x.shape[:2], self.c.num_heads, -1)

    def attention(self, x, i):
        """The first branch of block i, and what happens inside."""
        x, w, bias = (
            self.norm(x, "blocks/norm1", i),
            self.p["blocks/attn/qkv/kernel"][i],
            self.p.get("blocks/attn/qkv/bias"),
        )
        q, k, v = (self.heads(x @ w[:, j] + (0 if bias is None else bias[i, j])) for j in range(3))
        out, weights = self.attend(q, k, v)
        gain = self.p["blocks/ls1/gamma"][i] if self.c.layerscale else 1
        return gain * self.linear(out, "blocks/attn/proj", i), {"q": q, "k": k, "v": v, "attn": weights}

    def hidden(self, x, name, i=...):
        x = self.linear(x, f"{name}/fc1", i)
        half = self.c.mlp_dim
        match self.c.activation:
            case "gelu":
                return x * (1 + erf(x / np.sqrt(2))) / 2
            case "gelu_tanh":
                return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2
            case "quick_gelu":
                return x * expit(1.702 * x)
            case "swiglu":
                return x[..., :half] * expit(x[..., :half]) * x[..., half:]

    def mlp(self, x, i):
        """The second branch of block i, and its hidden units."""
        hidden = self.hidden(self.norm(x, "blocks/norm2", i), "blocks/mlp", i)
        gain = self.p["blocks/ls2/gamma"][i] if self.c.layerscale else 1
        return gain * self.linear(hidden, "blocks/mlp/fc2", i), hidden

    def tokens(self, images, mask=None):
        """(B, N, D) and everything that can be captured."""
        found = {"embed": self.embed(images, mask)}
        x = found["embed"]
        for i in range(self.c.depth):
            y, inside = self.attention(x, i)
            x = x + y
            y, inside["mlp"] = self.mlp(x, i)
            x = found[f"block{i}"] = x + y
            found |= {f"block{i}/{name}": value for name, value in inside.items()}
        return (self.norm(x, "norm") if self.c.final_norm else x), found

    def logits(self, x):
        patches = x[:, self.c.class_token + self.c.registers :]
        if self.c.pool == "map":
            query = self.heads(self.linear(np.repeat(self.p["attn_pool/latent"], len(x), 0), "attn_pool/q"))
            k, v = map(self.heads, np.split(self.linear(patches, "attn_pool/kv"), 2, -1))
            y = self.linear(self.attend(query, k, v)[0], "attn_pool/proj")
            y += self.linear(self.hidden(self.norm(y, "attn_pool/norm"), "attn_pool/mlp"), "attn_pool/mlp/fc2")
            pooled = y[:, 0]
        else:
            pooled = patches.mean(1) if self.c.pool == "avg" else x[:, 0]
        return self.linear(self.norm(pooled, "fc_norm") if self.c.fc_norm else pooled, "head")


def sequence(tokens):
    cls = [] if tokens.cls is None else [tokens.cls[:, None]]
    return np.concatenate([*cls, tokens.registers, tokens.patches], axis=1)


@functools.partial(jax.jit, static_argnums=3, compiler_options=FAST)
def run(model, images, key=None, capture=(), patch_mask=None):
    """(Tokens, captures, logits or None): the calls of a Model in one compilation."""
    tokens, found = model(images, key=key, capture=(*capture, "embed"), patch_mask=patch_mask)
    return tokens, found, model.module().logits(tokens) if model.config.num_classes else None


@functools.partial(jax.jit, static_argnums=2, compiler_options=FAST)
def embed(model, images, grid, patch_mask=None):
    """What enters block 0."""
    return model.module().embed(images, grid, patch_mask)


@pytest.mark.parametrize("case", CASES)
def test_every_option_equals_the_network_in_numpy(case, tiny, images):
    model = tiny(**CASES[case])
    mask = np.array([[1, 0, 0, 1, 1, 0], [0, 1, 0, 0, 0, 0]], bool) if model.config.mask_token else None
    names = tuple(f"block{i}{part}" for i in range(3) for part in ("", "/q", "/k", "/v", "/attn", "/mlp"))
    tokens, found, logits = run(model, images, None, names, mask)
    reference = Reference(model)
    want, inside = reference.tokens(images.astype(np.float64), mask)
    for name in ("embed", *names):
        np.testing.assert_allclose(found[name], inside[name], rtol=1e-5, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(sequence(tokens), want, rtol=1e-5, atol=1e-5)
    assert (tokens.cls is None) == (not model.config.class_token)
    assert tokens.registers.shape == (2, model.config.registers, 16) and tokens.patches.shape == (2, 6, 16)
    if logits is not None:
        np.testing.assert_allclose(logits, reference.logits(want), rtol=1e-5, atol=2e-5)


class TestLayout:
    def test_a_bright_patch_lands_in_its_cell_of_a_grid_that_is_not_square(self, tiny):
        model = tiny()
        for row, column in [(0, 0), (0, 3), (1, 2), (4, 1)]:
            picture = np.zeros((1, 20, 16, 3), np.float32)
            picture[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 1
            lit = np.abs(embed(model, picture, (5, 4)) - embed(model, 0 * picture, (5, 4))).max(-1)[0] > 0
            assert np.flatnonzero(lit).tolist() == [1 + 2 + 4 * row + column]

    def test_split_names_the_tokens_and_map_is_the_picture(self, tiny):
        module = tiny().module()
        tokens = module.split(jnp.arange(1 + 2 + 6.0)[None, :, None] * jnp.ones(16), (3, 2))
        assert tokens.cls.shape == (1, 16) and tokens.cls[0, 0] == 0
        assert tokens.registers[0, :, 0].tolist() == [1, 2] and tokens.grid == (3, 2)
        assert tokens.map()[0, :, :, 0].tolist() == [[3, 4], [5, 6], [7, 8]]

    @pytest.mark.parametrize("registers", range(17))
    def test_any_number_of_registers(self, registers, tiny):
        model = tiny(registers=registers)
        tokens = jax.eval_shape(model, jnp.zeros((5, 8, 24, 3)))
        assert (tokens.cls.shape, tokens.registers.shape, tokens.patches.shape) == (
            (5, 16),
            (5, registers, 16),
            (5, 12, 16),
        )
        assert tokens.grid == (2, 6)
        assert ("register_tokens" in model.params) == (registers > 0)

    def test_sixteen_registers_compute_what_numpy_does(self, tiny, images):
        model = tiny(registers=16, depth=1)
        np.testing.assert_allclose(
            sequence(run(model, images)[0]), Reference(model).tokens(images)[0], rtol=1e-5, atol=1e-5
        )

    def test_without_registers_it_is_the_plain_network(self, tiny, images):
        with_four = tiny(registers=4)
        params = {name: leaf for name, leaf in with_four.params.items() if name != "register_tokens"}
        plain = dataclasses.replace(with_four, params=params, config=dataclasses.replace(with_four.config, registers=0))
        four, none = embed(with_four, images, (3, 2)), embed(plain, images, (3, 2))
        np.testing.assert_array_equal(np.delete(four, range(1, 5), axis=1), none)


class TestPositions:
    def moved(self, model, images, grid=(3, 2)):
        """Which tokens at block 0 feel another set of position rows."""
        other = dataclasses.replace(model, params=model.params | {"pos_embed": model.params["pos_embed"] + 1})
        return np.abs(embed(model, images, grid) - embed(other, images, grid)).min(-1)[0] > 0.5

    @pytest.mark.parametrize(
        ("position", "tokens"),
        [("patches", [0, 0, 0, 1, 1, 1, 1, 1, 1]), ("cls", [1, 0, 0, 1, 1, 1, 1, 1, 1]), ("all", [1] * 9)],
    )
    def test_who_has_one(self, position, tokens, tiny, images):
        model = tiny(position=position)
        assert model.params["pos_embed"].shape == (1, sum(tokens), 16)
        assert self.moved(model, images).tolist() == [bool(t) for t in tokens]

    def test_registers_have_none_whatever_the_picture_and_its_size(self, tiny, images):
        model = tiny()
        for x, grid in ((images, (3, 2)), (np.tile(images, (1, 2, 3, 1)), (6, 6))):
            registers = embed(model, x, grid)[:, 1:3]
            np.testing.assert_array_equal(registers, np.repeat(model.params["register_tokens"], 2, axis=0))

    def test_rows_before_the_patches_are_never_resampled(self, tiny, images):
        model = tiny(position="all")
        native, larger = embed(model, images, (3, 2)), embed(model, np.tile(images, (1, 2, 3, 1)), (6, 6))
        np.testing.assert_array_equal(native[:, :3], larger[:, :3])

    def test_without_a_class_token_rows_of_registers_stay_with_registers(self, tiny, images):
        model = tiny(position="all", class_token=False, pool="avg")
        want = model.params["register_tokens"] + model.params["pos_embed"][:, :2]
        np.testing.assert_allclose(embed(model, images, (3, 2))[:1, :2], want, atol=1e-6)


class TestMask:
    mask = np.array([[0, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1]], bool)

    def test_masked_patches_become_the_mask_token_and_keep_their_position(self, tiny, images):
        model = tiny(mask_token=True)
        x, rows = np.asarray(embed(model, images, (3, 2), self.mask)), model.params["pos_embed"][0, 1:]
        want = np.broadcast_to(model.params["mask_token"] + rows, (2, 6, 16))
        np.testing.assert_allclose(x[:, 3:][self.mask], want[self.mask], atol=1e-6)

    def test_all_other_tokens_are_untouched(self, tiny, images):
        model = tiny(mask_token=True)
        plain, masked = embed(model, images, (3, 2)), np.asarray(embed(model, images, (3, 2), self.mask))
        np.testing.assert_array_equal(masked[:, :3], plain[:, :3])
        np.testing.assert_array_equal(masked[:, 3:][~self.mask], np.asarray(plain)[:, 3:][~self.mask])

    def test_an_empty_mask_is_no_mask_and_a_full_one_hides_the_picture(self, tiny, images):
        model, full = tiny(mask_token=True), np.ones((2, 6), bool)
        np.testing.assert_array_equal(embed(model, images, (3, 2), ~full), embed(model, images, (3, 2)))
        np.testing.assert_array_equal(*(embed(model, x, (3, 2), full) for x in (images, 3 - images)))


class TestStochasticDepth:
    SAMPLES, DEPTH = 256, 3

    def drops(self, model, key):
        """(depth, 2, samples) bool, True where a branch lives: read off the numbers, one story fits each sample.

        A dropped branch leaves the stream as it was; a living one is divided by its chance to live.
        """
        x = np.random.default_rng(0).normal(size=(self.SAMPLES, 4, 8, 3)).astype(np.float32)
        _, found, _ = run(model, x, key, tuple(f"block{i}" for i in range(self.DEPTH)))
        stream = [np.asarray(found[name], np.float64) for name in ("embed", *(f"block{i}" for i in range(self.DEPTH)))]
        reference, alive = Reference(model), np.zeros((self.DEPTH, 2, self.SAMPLES), bool)
        for i, keep in enumerate(1 - self.rates(model.config)):
            error = []
            for attn, mlp in np.ndindex(2, 2):
                y = stream[i] + attn * reference.attention(stream[i], i)[0] / keep
                y = y + mlp * reference.mlp(y, i)[0] / keep
                error.append(np.abs(y - stream[i + 1]).max((1, 2)))
            best = np.argsort(error, axis=0)
            assert (np.min(error, axis=0) < 1e-4).all() and (np.sort(error, axis=0)[1] > 1e-3).all()
            alive[i] = best[0] // 2, best[0] % 2
        return alive

    def rates(self, config):
        return np.full(3, config.drop_path) if config.drop_path_uniform else np.array([0, 0.5, 1]) * config.drop_path

    @pytest.mark.parametrize("uniform", [False, True], ids=["linear", "uniform"])
    def test_branches_of_samples_are_dropped_at_the_rates_of_their_blocks(self, tiny, uniform):
        model = tiny(image_size=(4, 8), registers=1, width=8, mlp_dim=8, drop_path=0.6, drop_path_uniform=uniform)
        alive, keep = self.drops(model, jax.random.key(0)), 1 - self.rates(model.config)[:, None]
        tolerance = 5 * np.sqrt(keep * (1 - keep) / self.SAMPLES)
        assert (np.abs(alive.mean(-1) - keep) <= tolerance).all()
        # No two of the random masks go together: neither blocks, nor the two branches of one, nor two keys.
        masks = np.concatenate(
            [alive[keep[:, 0] < 1].reshape(-1, self.SAMPLES), self.drops(model, jax.random.key(1))[2]]
        )
        correlation = np.corrcoef(masks) - np.eye(len(masks))
        assert np.abs(correlation).max() < 5 / np.sqrt(self.SAMPLES)

    @staticmethod
    def alive(seed, count, rate):
        """(count,) of the branches of one block."""
        return branches(jax.random.key(seed), count, np.array([rate]))[:, 0, 0]

    def test_expectation_is_kept(self):
        y = drop_path(jnp.full((4096, 2, 3), 2.0), self.alive(3, 4096, 0.25), 0.25)
        assert set(np.unique(y)) == {0, np.float32(2 / 0.75)}
        assert (y == y[:, :1, :1]).all(), "a sample is dropped as a whole"
        assert abs(y.mean() - 2) < 5 * 2 * np.sqrt(0.25 / 0.75 / 4096)

    def test_a_dropped_branch_sends_no_gradient(self):
        x, alive = jnp.ones((64, 2)), self.alive(0, 64, 0.5)
        y, grad = drop_path(x, alive, 0.5), jax.grad(lambda x: drop_path(x, alive, 0.5).sum())(x)
        np.testing.assert_array_equal(grad, y)
        assert 0 < (grad == 0).mean() < 1

    def test_rate_zero_and_no_key_are_the_identity(self):
        x = jax.random.normal(jax.random.key(1), (8, 2, 2))
        np.testing.assert_array_equal(drop_path(x, self.alive(0, 8, 0.0), 0.0), x)
        assert drop_path(x, None, 0.9) is x
        assert drop_path(x.astype(jnp.bfloat16), self.alive(0, 8, 0.3), 0.3).dtype == jnp.bfloat16

    def test_branches_may_be_drawn_beforehand(self, tiny, images):
        model, key = tiny(drop_path=0.8), jax.random.key(5)
        drawn = branches(key, 2, np.linspace(0, 0.8, 3))
        assert drawn.shape == (2, 3, 2) and drawn[:, 0].all() and not drawn.all()
        jax.tree.map(np.testing.assert_array_equal, run(model, images, key)[0], run(model, images, drawn)[0])

    def test_nothing_is_drawn_without_key_or_without_rate(self, tiny, images):
        for model, key in ((tiny(drop_path=0.5), None), (tiny(), jax.random.key(0))):
            assert "random" not in str(jax.make_jaxpr(model)(images, key=key))
        assert "random" in str(jax.make_jaxpr(tiny(drop_path=0.5))(images, key=jax.random.key(0)))


RUNS = {
    f"{loop}, {remat}": Execution(unroll=loop == "unroll", remat=remat)
    for loop in ("scan", "unroll")
    for remat in ("none", "dots", "named", "full")
    if (loop, remat) != ("scan", "none")
}


class TestExecution:
    """How a network is computed changes neither its numbers nor its gradients."""

    @staticmethod
    @functools.partial(jax.jit, static_argnums=3, compiler_options=FAST)
    def outputs_and_gradients(model, images, key, capture):
        def loss(model):
            out = model(images, key=key, capture=capture)
            return sum(jnp.sin(leaf).mean() for leaf in jax.tree.leaves(out)), out

        grads, out = jax.grad(loss, has_aux=True)(model)
        return out, grads.params

    def compare(self, model, run, images, key, capture):
        ours, theirs = (
            self.outputs_and_gradients(dataclasses.replace(model, run=r), images, key, capture)
            for r in (Execution(), run)
        )
        for (name, a), b in zip(named(ours).items(), jax.tree.leaves(theirs), strict=True):
            assert np.abs(a).max() > 0, name
            np.testing.assert_allclose(b, a, rtol=0, atol=1e-6 * max(1, np.abs(a).max()), err_msg=name)

    @pytest.mark.parametrize("name", RUNS)
    def test_with_stochastic_depth(self, name, tiny, images):
        self.compare(tiny(depth=2, layerscale=0.5, drop_path=0.8), RUNS[name], images, jax.random.key(7), ())

    def test_with_captures(self, tiny, images):
        self.compare(tiny(depth=2), Execution(unroll=True), images, None, ("block0", "block1/attn[cls]"))

    def test_all_of_them_repeat_the_products_that_they_say(self, tiny, images):
        def products(run):
            text = str(jax.make_jaxpr(jax.grad(lambda m: m(images).patches.sum()))(tiny(run, layerscale=0.5)))
            return text.count("dot_general"), text.count("erf")

        none, dots, named, full = (products(Execution(remat=remat)) for remat in ("none", "dots", "named", "full"))
        assert named[0] == none[0] + 1, "the attention's logits"
        assert dots[0] == none[0] + 2, "its weighted sum, too"
        assert full[0] == none[0] + 2 + 5, "q, k, v, proj and fc1: of fc2 nothing needs the output"
        assert none[1] < min(dots[1], named[1], full[1]), "all of them make activations again"

    @pytest.mark.parametrize("swiglu", [False, True])
    def test_all_of_them_keep_the_bytes_that_they_say(self, tiny, images, swiglu):
        """What a backward pass takes over from the forward pass, per block and token, beside the D numbers of the
        block's input: what is named below."""
        model = tiny(depth=2, layerscale=0.5, activation="swiglu" if swiglu else "gelu")
        d, hidden = model.config.width, model.config.mlp_dim * (2 if swiglu else 1)

        def kept(remat):
            chosen = dataclasses.replace(model, run=Execution(remat=remat))
            backward = jax.eval_shape(lambda m: jax.vjp(lambda m: m.module()(images).patches, m)[1], chosen)
            return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(backward) if 1 + 2 + 6 in leaf.shape)

        none, dots, named, full = map(kept, ("none", "dots", "named", "full"))
        tokens = 2 * (1 + 2 + 6) * model.config.depth
        assert named - full == tokens * (5 * d + hidden), "q, k, v, the attention's output, the residual, fc1"
        assert dots - full == tokens * (4 * d + hidden), "q, k, v, proj, fc1"
        assert none > max(dots, named) and full >= tokens * d
