"""Mesh, placement of parameters, the way in and out of it, on 8 fake devices."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from regvit_jax import sharding
from regvit_jax.sharding import make_mesh, spec_for

DEPTH, D = 24, 32
QKV, FC2 = (DEPTH, D, 3, D), (DEPTH, 4 * D, D)


class TestMesh:
    def test_has_three_named_axes(self):
        assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
        assert dict(make_mesh(2, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}

    @pytest.mark.parametrize(
        ("sizes", "want"), [((-1, 2, 2), (2, 2, 2)), ((1, -1, 4), (1, 2, 4)), ((2, 4, -1), (2, 4, 1))]
    )
    def test_minus_one_takes_what_is_left(self, sizes, want):
        assert tuple(make_mesh(*sizes).shape.values()) == want

    def test_lies_on_the_devices_given(self):
        mesh = make_mesh(fsdp=2, devices=jax.devices()[4:6])
        assert [device.id for device in mesh.devices.flat] == [4, 5] and mesh.shape["fsdp"] == 2

    @pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (16, 1, 1), (2, 2, 1)])
    def test_that_does_not_fit_names_the_devices(self, sizes):
        with pytest.raises(ValueError, match="does not fit 8 devices"):
            make_mesh(*sizes)

    @pytest.mark.parametrize("sizes", [(-1, -1, 1), (0, 8, 1), (8, -2, 1)])
    def test_of_senseless_sizes_is_refused(self, sizes):
        with pytest.raises(ValueError, match="at most one of them -1"):
            make_mesh(*sizes)


class TestSpec:
    @pytest.mark.parametrize(
        ("path", "shape", "spec"),
        [
            ("blocks/mlp/fc2/kernel", FC2, P(None, "fsdp")),  # the hidden axis is the larger
            ("blocks/mlp/fc1/kernel", (DEPTH, D, 4 * D), P(None, None, "fsdp")),
            ("blocks/norm1/scale", (DEPTH, D), P(None, "fsdp")),
            ("teacher/blocks/norm1/scale", (DEPTH, D), P(None, "fsdp")),
            ("pos_embed", (1, 257, D), P(None, None, "fsdp")),  # 257 is larger, and prime
            ("head/kernel", (D, 1000), P(None, "fsdp")),
            ("head/bias", (1001,), P()),
            ("step", (), P()),
            # 3 is all a layer has beside a depth of 24: nothing to split.
            ("blocks/odd", (DEPTH, 3), P()),
        ],
    )
    def test_fsdp_takes_the_largest_axis_it_divides(self, path, shape, spec):
        assert spec_for(path, shape, make_mesh(1, 8), 0) == spec

    @pytest.mark.parametrize(
        ("path", "shape", "tensor", "both"),
        [
            ("blocks/attn/qkv/kernel", QKV, P(None, None, None, "tensor"), P(None, "fsdp", None, "tensor")),
            ("blocks/attn/qkv/bias", (DEPTH, 3, D), P(None, None, "tensor"), P(None, None, "tensor")),
            ("blocks/attn/proj/kernel", (DEPTH, D, D), P(None, "tensor"), P(None, "tensor", "fsdp")),
            ("blocks/attn/proj/bias", (DEPTH, D), P(), P(None, "fsdp")),
            ("blocks/mlp/fc1/kernel", (DEPTH, D, 4 * D), P(None, None, "tensor"), P(None, "fsdp", "tensor")),
            ("blocks/mlp/fc1/bias", (DEPTH, 4 * D), P(None, "tensor"), P(None, "tensor")),
            ("blocks/mlp/fc2/kernel", FC2, P(None, "tensor"), P(None, "tensor", "fsdp")),
            ("blocks/norm1/scale", (DEPTH, D), P(), P(None, "fsdp")),
            ("head/kernel", (D, 8), P(), P("fsdp")),
        ],
    )
    def test_tensor_splits_heads_and_hidden_units_but_not_the_residual_stream(self, path, shape, tensor, both):
        assert spec_for(path, shape, make_mesh(4, 1, 2), 0) == tensor
        assert spec_for(path, shape, make_mesh(1, 4, 2), 0) == both

    def test_tensor_that_does_not_divide_is_left_out(self):
        assert spec_for("blocks/mlp/fc2/kernel", (DEPTH, 6, 5), make_mesh(1, 1, 8), 0) == P()

    @pytest.mark.parametrize("fsdp", [2, 4, 8])
    def test_the_depth_is_never_split(self, fsdp):
        mesh = make_mesh(-1, fsdp)
        for shape in [(DEPTH,), (DEPTH, 8), (64, 8, 8), (64, 7, 5)]:
            spec = spec_for("blocks/x", shape, mesh, 0)
            assert not spec or spec[0] is None

    def test_min_bytes_counts_one_layer_of_a_stacked_leaf(self):
        mesh, layer = make_mesh(1, 8), 4 * D * D * 4
        assert spec_for("blocks/mlp/fc2/kernel", FC2, mesh, layer) == P(None, "fsdp")
        assert spec_for("blocks/mlp/fc2/kernel", FC2, mesh, layer + 1) == P()
        assert spec_for("blocks/mlp/fc2/kernel", FC2, mesh, layer, itemsize=2) == P()
        assert spec_for("head/kernel", (D, 8), mesh, D * 8 * 4) == P("fsdp")

    def test_shardings_know_the_size_of_a_dtype(self):
        mesh = make_mesh(1, 8)
        tree = {"a": jax.ShapeDtypeStruct((16, 16), jnp.float32), "b": jax.ShapeDtypeStruct((16, 16), jnp.bfloat16)}
        got = sharding.shardings(tree, mesh, 16 * 16 * 4)
        assert got == {"a": NamedSharding(mesh, P("fsdp")), "b": NamedSharding(mesh, P())}


class TestInAndOut:
    def test_put_spreads_rows_over_data_and_fsdp_and_gather_brings_them_back(self):
        mesh = make_mesh(2, 2, 2)
        batch = {"image": np.arange(8 * 6, dtype=np.uint8).reshape(8, 6), "label": np.arange(8)}
        placed = sharding.put(batch, mesh)
        assert placed["image"].sharding == sharding.batch_sharding(mesh) and placed["image"].dtype == np.uint8
        shards = placed["image"].addressable_shards
        assert len(shards) == 8 and {s.data.shape for s in shards} == {(2, 6)}
        rows = {s.index[0].start or 0 for s in shards}
        assert rows == {0, 2, 4, 6}, "tensor repeats rows, data and fsdp divide them"
        for name, whole in sharding.gather(placed).items():
            assert type(whole) is np.ndarray
            np.testing.assert_array_equal(whole, batch[name])

    def test_rows_that_do_not_divide_are_refused(self):
        with pytest.raises(ValueError, match="divi"):
            sharding.put({"image": np.zeros((6, 2))}, make_mesh())

    def test_replicate_gives_every_device_the_whole(self):
        tree = {"a": np.arange(6.0).reshape(2, 3), "b": np.int32(7)}
        placed = sharding.replicate(tree, make_mesh(2, 4))
        assert placed["a"].sharding.is_fully_replicated and {s.data.shape for s in placed["a"].addressable_shards} == {
            (2, 3)
        }
        np.testing.assert_array_equal(sharding.gather(placed)["a"], tree["a"])
        assert sharding.gather(placed)["b"] == 7

    def test_gather_takes_host_values_as_they_are(self):
        assert sharding.gather({"a": 3, "b": np.ones(2)})["a"] == 3


class TestConstrain:
    def test_without_a_mesh_does_nothing(self):
        x = jnp.ones((3, 2))
        assert sharding.constrain(x, sharding.BATCH) is x
        assert "sharding_constraint" not in str(jax.make_jaxpr(lambda y: sharding.constrain(y, sharding.BATCH))(x))

    def test_on_one_device_does_nothing(self):
        with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
            x = jnp.ones((3, 2))
            assert sharding.constrain(x, sharding.BATCH) is x

    def test_on_a_foreign_mesh_does_nothing(self):
        with jax.set_mesh(jax.make_mesh((8,), ("model",))):
            assert "sharding_constraint" not in str(
                jax.make_jaxpr(lambda y: sharding.constrain(y, sharding.BATCH))(jnp.ones((8, 2)))
            )

    def test_pins_rows_to_data_and_fsdp(self):
        mesh = make_mesh(2, 2, 2)
        with jax.set_mesh(mesh):
            y = jax.jit(lambda x: sharding.constrain(2 * x, sharding.BATCH))(np.ones((8, 4), np.float32))
        assert y.sharding.is_equivalent_to(sharding.batch_sharding(mesh), 2)

    def test_without_a_spec_gathers(self):
        mesh = make_mesh(1, 8)
        with jax.set_mesh(mesh):
            y = jax.jit(sharding.constrain)(jax.device_put(np.ones((8, 4)), NamedSharding(mesh, P("fsdp"))))
        assert y.sharding.is_fully_replicated

    def test_sizes_of_axes_are_those_of_the_mesh_in_use(self):
        assert sharding.axis_size("tensor") == 1
        with jax.set_mesh(make_mesh(1, 2, 4)):
            assert [sharding.axis_size(name) for name in (*sharding.AXES, "model")] == [1, 2, 4, 1]


class TestReport:
    @staticmethod
    def state(mesh):
        return {
            "split": jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=NamedSharding(mesh, P("fsdp"))),
            "whole": jax.ShapeDtypeStruct((10,), jnp.bfloat16, sharding=NamedSharding(mesh, P())),
        }

    def test_bytes_by_hand(self):
        assert sharding.sharded_bytes(self.state(make_mesh(1, 8))) == (16 * 4 * 4 + 10 * 2, 16 * 4 * 4)
        # Over an axis of one device nothing is split, whatever the spec says.
        assert sharding.sharded_bytes(self.state(make_mesh(8, 1))) == (16 * 4 * 4 + 10 * 2, 0)

    def test_fsdp_that_splits_nothing_warns_with_the_key(self, caplog):
        mesh = make_mesh(1, 8)
        with caplog.at_level(logging.INFO):
            sharding.log_sharding({"whole": self.state(mesh)["whole"]}, mesh)
        assert [r.levelname for r in caplog.records] == ["INFO", "WARNING"]
        assert "mesh.fsdp=8" in caplog.messages[1] and "mesh.fsdp_min_bytes" in caplog.messages[1]

    def test_nothing_to_warn_about(self, caplog):
        with caplog.at_level(logging.INFO):
            sharding.log_sharding(self.state(make_mesh(1, 8)), make_mesh(1, 8))
            sharding.log_sharding({"whole": self.state(make_mesh(8, 1))["whole"]}, make_mesh(8, 1))
        assert [r.levelname for r in caplog.records] == ["INFO", "INFO"]

    def test_one_device_says_nothing(self, caplog):
        mesh = make_mesh(devices=jax.devices()[:1])
        with caplog.at_level(logging.INFO):
            sharding.log_sharding(self.state(mesh), mesh)
        assert not caplog.records
