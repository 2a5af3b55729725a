"""A Model as its users hold it: composes with JAX, compiles once, runs on any mesh, captures, refuses clearly."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from regvit_jax import sharding
from regvit_jax.models.capture import parse
from regvit_jax.models.config import Execution, ViTConfig
from regvit_jax.models.model import Model, _forward, intermediate

# Compiling is most of the time here.
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def scans(jaxpr):
    """Every scan, those inside jit too, as (length, number of outputs)."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn.params["length"], len(eqn.outvars)
        for inner in jaxprs_in_params(eqn.params):
            yield from scans(inner)


class TestComposition:
    def test_the_same_shape_compiles_once_and_gives_what_the_callers_jit_does(self, tiny, images):
        model = tiny(depth=1, width=8)
        before = _forward._cache_size()
        tokens = model(jnp.asarray(images))
        assert _forward._cache_size() == before + 1
        model(jnp.asarray(1 - images))
        other = jax.tree.map(lambda leaf: leaf * 2, model)  # new weights, the same architecture
        other(jnp.asarray(images))
        config = ViTConfig.from_json(json.loads(json.dumps(model.config.to_json())))
        Model(other.params, config, Execution())(jnp.asarray(images))
        assert _forward._cache_size() == before + 1
        inside = quick(lambda m, x: m(x))(model, images)
        for a, b in zip(leaves(inside), leaves(tokens), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)

    def test_jit_and_vmap_over_images_keys_and_weights(self, tiny, images):
        model, keys = tiny(depth=1, drop_path=0.5, drop_path_uniform=True), jax.random.split(jax.random.key(4))
        models = [model, jax.tree.map(jnp.negative, model)]
        call = lambda m, x, k: m(x[None], key=k)  # noqa: E731
        alone = [quick(call)(m, x, k) for m, x, k in zip(models, images, keys, strict=True)]
        # One lane an image, a key and a set of weights.
        together = quick(jax.vmap(call))(jax.tree.map(lambda *a: jnp.stack(a), *models), images, keys)
        assert together.cls.shape == (2, 1, 16) and together.grid == alone[0].grid == (3, 2)
        for i in range(2):
            for a, b in zip(leaves(together), leaves(alone[i]), strict=True):
                np.testing.assert_allclose(a[i], b, atol=2e-6)

    def test_gradients_reach_every_parameter_and_every_pixel_and_are_slopes(self, tiny, images):
        @quick
        @functools.partial(jax.value_and_grad, argnums=(0, 1))
        def loss(model, images):
            tokens = model(images)
            return jnp.sin(tokens.patches).sum() + model.module().logits(tokens)[:, 0].sum()

        model = tiny(depth=1, num_classes=3, layerscale=1.0)
        _, (in_weights, in_images) = loss(model, images)
        assert isinstance(in_weights, Model) and in_weights.config == model.config
        assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in leaves(in_weights))
        assert (np.abs(in_images).max(-1) > 0).all()
        # Two steps along the gradient differ by its length times theirs.
        square = sum((leaf.astype(np.float64) ** 2).sum() for leaf in leaves(in_weights))
        step = 1e-2 / np.sqrt(square)
        up, down = (
            loss(jax.tree.map(lambda a, g, s=s: a + s * g, model, in_weights), images)[0] for s in (step, -step)
        )
        np.testing.assert_allclose(float(up - down), 2 * step * square, rtol=1e-2)

    def test_it_knows_its_size_and_says_what_it_is(self, tiny):
        model = tiny(width=8, depth=2, mlp_dim=8, registers=1, layerscale=None)
        block = 2 * 16 + 8 * 24 + 24 + 64 + 8 + 64 + 8 + 64 + 8
        assert model.num_params == 48 * 8 + 8 + 8 + 8 + 7 * 8 + 2 * block + 16
        assert "registers 1" in repr(model) and "12x8" in repr(model)


class TestMesh:
    @pytest.mark.parametrize(("data", "fsdp", "tensor"), [(8, 1, 1), (2, 2, 2)])
    def test_a_sharded_batch_gives_the_same_numbers(self, data, fsdp, tensor, tiny):
        model = tiny(num_classes=5, depth=2)
        batch = np.random.default_rng(3).normal(size=(8, 12, 8, 3)).astype(np.float32)
        both = quick(lambda m, x: (tokens := m(x), m.module().logits(tokens)))
        want, mesh = both(model, batch), sharding.make_mesh(data, fsdp, tensor)
        placed = jax.device_put(model, sharding.shardings(model, mesh, 0))
        with jax.set_mesh(mesh):
            got = both(placed, sharding.put({"image": batch}, mesh)["image"])
        assert {shard.data.shape for shard in got[1].addressable_shards} == {(8 // (data * fsdp), 5)}
        for a, b in zip(leaves(sharding.gather(got)), leaves(want), strict=True):
            np.testing.assert_allclose(a, b, atol=5e-6)

    def test_a_batch_that_does_not_divide_runs_too(self, tiny, images):
        """Looking at two pictures in the middle of a program on eight devices must not need a full batch."""
        model = tiny(depth=1, width=8)
        want = model(images)
        with jax.set_mesh(sharding.make_mesh()):
            np.testing.assert_allclose(model(images).patches, want.patches, atol=5e-6)


class TestCapture:
    def test_costs_nothing_when_empty(self, tiny, images):
        jaxpr = jax.make_jaxpr(lambda m, x: m(x))(tiny(), images).jaxpr
        assert list(scans(jaxpr)) == [(3, 1)], "one loop over all blocks; only the residual stream leaves it"
        assert len(jaxpr.outvars) == 3

    @pytest.mark.parametrize(
        ("names", "segments"),
        [
            (("embed",), [5]),
            (("block4",), [5]),
            (("block1",), [2, 3]),
            (("block1", "block3"), [2, 2, 1]),
            (("block2/q",), [2, 2]),  # the block that is looked into stands between two loops
            (("block0/attn", "block-1/mlp"), [3]),
        ],
    )
    def test_cuts_the_loop_where_something_is_kept_and_stacks_nothing(self, names, segments, tiny, images):
        jaxpr = jax.make_jaxpr(lambda m, x: m(x, capture=names))(tiny(depth=5), images).jaxpr
        assert list(scans(jaxpr)) == [(length, 1) for length in segments]
        assert len(jaxpr.outvars) == 3 + len(names)

    def test_shapes_and_names_are_those_asked_for(self, tiny, images):
        wanted = {
            "embed": (2, 9, 16),
            "block-1": (2, 9, 16),
            "block2": (2, 9, 16),
            "block0/q": (2, 9, 2, 8),
            "block0/k": (2, 9, 2, 8),
            "block-3/v": (2, 9, 2, 8),
            "block1/mlp": (2, 9, 12),
            "block1/attn": (2, 2, 9, 9),
            "block1/attn[cls]": (2, 2, 1, 9),
            "block1/attn[cls,registers]": (2, 2, 3, 9),
            "block1/attn[patches, 0]": (2, 2, 7, 9),
            "block1/attn[-1]": (2, 2, 1, 9),
        }
        _, found = jax.eval_shape(lambda: tiny()(images, capture=list(wanted)))
        assert {name: array.shape for name, array in found.items()} == wanted

    def test_rows_and_negative_blocks_are_the_same_numbers(self, tiny, images):
        names = ("block-1", "block0", "block0/attn", "block-1/attn[2,registers,-1]", "block0/q", "block-1/q")
        _, found = quick(lambda m, x: m(x, capture=names))(tiny(depth=1), images)
        np.testing.assert_array_equal(found["block-1"], found["block0"])
        np.testing.assert_array_equal(found["block-1/q"], found["block0/q"])
        rows = found["block0/attn"][:, :, jnp.array([2, 1, 2, 8])]
        np.testing.assert_allclose(found["block-1/attn[2,registers,-1]"], rows, atol=1e-7)

    @pytest.mark.parametrize(
        ("text", "rows"),
        [
            ("cls", (0,)),
            ("registers", (1, 2)),
            ("patches", (3, 4, 5)),
            ("registers,cls", (1, 2, 0)),
            ("5, 1 ,-6", (5, 1, 0)),
        ],
    )
    def test_queries_by_name_or_number(self, text, rows, tiny):
        (capture,) = parse((f"block-1/attn[{text}]",), tiny().config, 6)
        assert (capture.block, capture.what, capture.rows) == (2, "attn", rows)

    @pytest.mark.parametrize(
        ("name", "problem"),
        [
            ("blocks0", "examples: embed"),
            ("block", "examples: embed"),
            ("block1/query", "examples: embed"),
            ("block1/q[cls]", "examples: embed"),
            ("embed/q", "examples: embed"),
            ("block3", "blocks 0 to 2"),
            ("block-4", "blocks 0 to 2"),
            ("block0/attn[head]", "'head' is neither cls, registers, patches nor a position below 9"),
            ("block0/attn[9]", "'9' is neither"),
            ("block0/attn[-10]", "'-10' is neither"),
            ("block0/attn[]", "selects no query"),
        ],
    )
    def test_a_wrong_name_is_answered_with_what_is_right(self, name, problem, tiny, images):
        with pytest.raises(ValueError, match="capture " + f"'{name}'".replace("[", r"\[") + ".*" + problem):
            tiny()(images, capture=("embed", name))

    def test_queries_that_this_model_has_not(self, tiny, images):
        with pytest.raises(ValueError, match="this model has no such tokens"):
            tiny(registers=0)(images, capture=("block0/attn[registers]",))
        with pytest.raises(ValueError, match="this model has no such tokens"):
            tiny(class_token=False, position="patches", pool="avg")(images, capture=("block0/attn[cls]",))

    def test_a_block_that_intermediate_cannot_find(self, tiny, images):
        with pytest.raises(ValueError, match="blocks 0 to 2"):
            intermediate(tiny(), images, blocks=(3,))


class TestRefusals:
    @pytest.mark.parametrize(
        ("shape", "text"),
        [
            ((1, 30, 28, 3), "height 30 is not a multiple of the patch size 14; the nearest valid sizes are 28 and 42"),
            (
                (1, 28, 100, 3),
                "width 100 is not a multiple of the patch size 14; the nearest valid sizes are 98 and 112",
            ),
            ((1, 28, 5, 3), "width 5 is not a multiple of the patch size 14; the nearest valid sizes are 14"),
            ((1, 0, 28, 3), "height 0 .* 14"),
        ],
    )
    def test_a_size_that_is_no_multiple_of_the_patch_names_the_nearest(self, shape, text, tiny):
        with pytest.raises(ValueError, match=text):
            tiny(patch_size=14, image_size=(28, 28))(np.zeros(shape, np.float32))

    @pytest.mark.parametrize("shape", [(12, 8, 3), (1, 3, 12, 8), (1, 12, 8, 1), (1, 1, 12, 8, 3)])
    def test_images_are_four_axes_with_colour_last(self, shape, tiny):
        with pytest.raises(ValueError, match=r"images must be \(B, H, W, 3\), got"):
            tiny()(np.zeros(shape, np.float32))

    def test_a_mask_without_its_token(self, tiny, images):
        with pytest.raises(ValueError, match="mask_token=True"):
            tiny()(images, patch_mask=np.zeros((2, 6), bool))

    @pytest.mark.parametrize("shape", [(2, 5), (6,), (2, 3, 2), (1, 6)])
    def test_a_mask_of_another_shape(self, shape, tiny, images):
        with pytest.raises(ValueError, match=r"patch_mask must be \(B, P\) = \(2, 6\), got"):
            tiny(mask_token=True)(images, patch_mask=np.zeros(shape, bool))

    def test_logits_without_a_head(self, tiny, images):
        with pytest.raises(ValueError, match="no classification head"):
            tiny().logits(images)


class TestConfig:
    CONFIG = ViTConfig(width=16, depth=2, num_heads=2, mlp_dim=12, patch_size=4, image_size=8)

    def test_survives_json(self):
        for config in (self.CONFIG, dataclasses.replace(self.CONFIG, layerscale=0.1, registers=3, image_size=(8, 12))):
            again = ViTConfig.from_json(json.loads(json.dumps(config.to_json())))
            assert again == config and hash(again) == hash(config) and again.image_size == config.image_size

    def test_of_another_version_is_refused(self):
        with pytest.raises(ValueError, match=r"unknown ViT config fields \['rope'\].*another version"):
            ViTConfig.from_json(self.CONFIG.to_json() | {"rope": True})

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"image_size": (8, 10)}, "width 10 .* 8 and 12"),
            ({"num_heads": 3}, "width 16 is not a multiple of num_heads 3"),
            ({"registers": -1}, "registers must be 0 or more, got -1"),
            ({"position": "rope"}, "position='rope' is not one of 'patches', 'cls', 'all', 'none'"),
            ({"resampler": "bilinear"}, "resampler='bilinear' is not one of"),
            ({"activation": "relu"}, "activation='relu' is not one of"),
            ({"pool": "cls"}, "pool='cls' is not one of 'token', 'avg', 'token_avg', 'map'"),
            ({"position_init": "zeros"}, "position_init='zeros' is not one of"),
            ({"class_token": False}, "without a class token"),
            ({"class_token": False, "pool": "avg"}, "position 'patches', 'all' or 'none'"),
            ({"width": 18, "position_init": "sincos"}, "divisible by 4, got 18"),
            ({"drop_path": 1.0}, r"drop_path must lie in \[0, 1\), got 1.0"),
            ({"drop_path": -0.1}, "drop_path must lie in"),
            ({"depth": 0}, "depth"),
            ({"patch_size": 0}, "patch_size"),
        ],
    )
    def test_what_cannot_be_is_refused(self, changes, text):
        with pytest.raises(ValueError, match=text):
            dataclasses.replace(self.CONFIG, **changes)

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"remat": "some"}, "remat='some' is not one of 'none', 'dots', 'named', 'full'"),
            ({"attention": "flash"}, "attention='flash' is not one of"),
        ],
    )
    def test_execution_lists_what_it_knows(self, changes, text):
        with pytest.raises(ValueError, match=text):
            Execution(**changes)
