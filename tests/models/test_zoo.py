"""Names, architectures and published parameter counts; initialisation. Big networks are only described, never built."""

import math

import jax
import numpy as np
import pytest

from regvit_jax.models import zoo
from regvit_jax.models.config import ViTConfig
from regvit_jax.models.model import abstract_params, init_params
from regvit_jax.trees import named

# Parameters as published. DINOv2: the released files. ViT: the original architecture with the 1000-class head, as in
# torchvision, timm and DeiT. DeiT-III: timm's deit3 models (tiny is not released: the sum of its parts).
COUNTS = [
    ("dinov2_vits14", {}, 22_056_576),
    ("dinov2_vitb14", {}, 86_580_480),
    ("dinov2_vitl14", {}, 304_368_640),
    ("dinov2_vitg14", {}, 1_136_480_768),
    ("dinov2_vits14_reg4", {}, 22_058_112),
    ("dinov2_vitb14_reg4", {}, 86_583_552),
    ("dinov2_vitl14_reg4", {}, 304_372_736),
    ("dinov2_vitg14_reg4", {}, 1_136_486_912),
    # The paper's ImageNet-22k network as its training config builds it.
    ("vit_l14_swiglu", {"layerscale": 1e-5, "mask_token": True}, 303_655_168),
    ("vit_ti16", {"num_classes": 1000}, 5_717_416),
    ("vit_s16", {"num_classes": 1000}, 22_050_664),
    ("vit_b16", {"num_classes": 1000}, 86_567_656),
    ("vit_l16", {"num_classes": 1000}, 304_326_632),
    ("vit_h14", {"num_classes": 1000}, 632_045_800),
    ("deit3_vitti16", {}, 5_717_416 + 12 * 2 * 192 - 192),
    ("deit3_vits16", {}, 22_059_496),
    ("deit3_vitm16", {}, 38_849_512),
    ("deit3_vitb16", {}, 86_585_320),
    ("deit3_vitl16", {}, 304_374_760),
    ("deit3_vith14", {}, 632_126_440),
]
TINY = {"width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24, "image_size": (32, 48)}


def count(config):
    return sum(math.prod(leaf.shape) for leaf in named(abstract_params(config)).values())


@pytest.mark.parametrize(("name", "changes", "published"), COUNTS, ids=[name for name, *_ in COUNTS])
def test_parameters_are_as_many_as_published(name, changes, published):
    assert count(zoo.config_of(name, **changes)) == published


def test_a_register_costs_its_width():
    plain = count(zoo.config_of("vit_s16"))
    assert [count(zoo.config_of(f"vit_s16_reg{r}")) - plain for r in (1, 4, 16)] == [384, 4 * 384, 16 * 384]
    # Where every token has a position, a register has one too.
    everywhere = [count(zoo.config_of("vit_s16", registers=r, position="all")) for r in (0, 4)]
    assert everywhere[1] - everywhere[0] == 2 * 4 * 384


class TestNames:
    def test_every_listed_name_has_an_architecture_of_its_patch_and_registers(self):
        names = zoo.list_models()
        assert names == sorted(set(names))
        for name in names:
            config = zoo.config_of(name)
            patch = name.removesuffix("_reg4").removesuffix("_swiglu")[-2:]
            assert config.patch_size == int(patch.lstrip("sbgliht"))
            assert config.registers == (4 if name.endswith("_reg4") else 0)
            assert (config.activation == "swiglu") == ("swiglu" in name or "vitg" in name or "vit_g" in name)

    def test_every_size_and_patch_is_listed(self):
        names = set(zoo.list_models())
        assert {
            f"vit_{size}{p}{r}" for size in ("ti", "s", "b", "l", "h", "g") for p in (8, 14, 16) for r in ("", "_reg4")
        } <= names
        assert {"dinov2_vitl14_reg4", "deit3_vitb16", "vit_ti16_reg4"} <= names, "names that the manual uses"

    @pytest.mark.parametrize("registers", range(17))
    def test_any_count_of_registers_is_a_name(self, registers):
        for family in ("vit_b16", "vit_l14_swiglu", "dinov2_vits14", "deit3_vitb16"):
            assert zoo.config_of(f"{family}_reg{registers}").registers == registers
            assert zoo.config_of(family, registers=registers).registers == registers

    @pytest.mark.parametrize(
        ("name", "near"),
        [
            ("vit_b16_reg", "vit_b16_reg4"),
            ("dinov2_vitl14_reg", "dinov2_vitl14_reg4"),
            ("vit_b_16", "vit_b16"),
            ("deit3_b16", "deit3_vitb16"),
        ],
    )
    def test_an_unknown_name_is_answered_with_the_nearest(self, name, near):
        with pytest.raises(ValueError, match=f"unknown model '{name}'.*{near}.*list_models"):
            zoo.config_of(name)

    @pytest.mark.parametrize(
        "name", ["", "resnet50", "vit_b12", "dinov2_vith14", "deit3_vitl14", "vit_b16_reg-1", "VIT_B16"]
    )
    def test_what_is_no_name_is_refused(self, name):
        with pytest.raises(ValueError, match="unknown model"):
            zoo.config_of(name)

    def test_an_unknown_option_lists_the_known(self):
        with pytest.raises(ValueError, match=r"vit_b16: unknown option \['register'\].*registers"):
            zoo.config_of("vit_b16", register=4)


class TestArchitectures:
    @pytest.mark.parametrize(("width", "hidden"), [(384, 1024), (768, 2048), (1024, 2736), (1536, 4096)])
    def test_swiglu_is_two_thirds_rounded_up_to_eights(self, width, hidden):
        assert zoo.swiglu_dim(width) == hidden

    def test_dinov2_is_as_released(self):
        for name in ("dinov2_vitl14", "dinov2_vitl14_reg4"):
            c = zoo.config_of(name)
            assert (c.width, c.depth, c.num_heads, c.head_dim, c.mlp_dim) == (1024, 24, 16, 64, 4096)
            assert c.grid == (37, 37) and c.position == "cls" and c.mask_token and c.norm_eps == 1e-6
            assert c.activation == "gelu" and c.num_classes == 0 and c.final_norm and c.qkv_bias
        assert zoo.config_of("dinov2_vitg14").mlp_dim == 4096

    @pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vits14_reg0"])
    def test_dinov2_without_registers_keeps_the_scale_factor_resampler(self, name):
        assert zoo.config_of(name).resampler == "bicubic_offset"

    def test_dinov2_with_registers_resamples_with_antialias(self):
        assert zoo.config_of("dinov2_vits14_reg4").resampler == "antialias"
        assert zoo.config_of("dinov2_vits14_reg1").resampler == "antialias"

    def test_registers_by_option_and_by_name_are_the_same_architecture(self):
        for name in ("vit_b16", "dinov2_vits14", "deit3_vitb16"):
            assert zoo.config_of(name, registers=4) == zoo.config_of(f"{name}_reg4")

    def test_deit3_is_as_released(self):
        c = zoo.config_of("deit3_vitb16")
        assert c.position == "patches" and c.resampler == "bicubic" and c.drop_path_uniform and c.layerscale == 1e-4
        assert c.num_classes == 1000 and c.pool == "token" and c.grid == (14, 14)
        assert zoo.config_of("deit3_vith14").grid == (16, 16)

    def test_a_size_may_be_a_number_or_a_pair(self):
        assert zoo.config_of("vit_s16", image_size=96).grid == (6, 6)
        assert zoo.config_of("vit_s16", image_size=(96, 32)).grid == (6, 2)


@pytest.fixture(scope="module")
def model():
    return zoo.create_model(
        "vit_ti16_reg3",
        seed=5,
        mask_token=True,
        layerscale=0.25,
        num_classes=7,
        token_init_std=1e-3,
        **(TINY | {"width": 64}),
    )


class TestCreation:
    def test_parameters_are_float32_of_the_described_shapes(self, model):
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), model.params) == jax.tree.map(
            lambda leaf: (leaf.shape, np.dtype("float32")), abstract_params(model.config)
        )
        assert model.num_params == count(model.config)

    def test_spreads_are_those_of_the_references(self, model):
        p = {name: np.asarray(leaf) for name, leaf in named(model.params).items()}

        def spread(name, std):
            # Five standard errors of a standard deviation estimated from n draws.
            assert abs(p[name].std() / std - 1) < 5 / math.sqrt(2 * p[name].size), name
            assert abs(p[name].mean()) < 5 * std / math.sqrt(p[name].size), name

        for name in p:
            if name.endswith("/kernel") and not name.startswith("patch_embed"):
                spread(name, 0.02)
        spread("pos_embed", 0.02)
        spread("register_tokens", 1e-3)
        spread("cls_token", 1e-3)
        bound = 1 / math.sqrt(3 * 16 * 16)
        for name in ("patch_embed/kernel", "patch_embed/bias"):
            spread(name, bound / math.sqrt(3))
            assert np.abs(p[name]).max() <= bound
        assert np.abs(p["blocks/mlp/fc1/kernel"]).max() > 0.06, "not cut at two standard deviations"

    def test_constants_are_those_of_the_references(self, model):
        for name, leaf in named(model.params).items():
            if name.startswith("patch_embed"):
                continue
            if name.endswith("/bias") or name == "mask_token":
                assert (np.asarray(leaf) == 0).all(), name
            if name.endswith("/scale"):
                assert (np.asarray(leaf) == 1).all(), name
            if name.endswith("/gamma"):
                assert (np.asarray(leaf) == 0.25).all(), name

    def test_blocks_and_tensors_are_drawn_apart(self, model):
        p = {name: np.asarray(leaf) for name, leaf in named(model.params).items()}
        fc1 = p["blocks/mlp/fc1/kernel"]
        assert (fc1[0] != fc1[1]).mean() > 0.99
        q, k, v = np.moveaxis(p["blocks/attn/qkv/kernel"], 2, 0)
        assert (q != k).mean() > 0.99 and (k != v).mean() > 0.99
        assert (p["blocks/attn/proj/kernel"] != q).mean() > 0.99
        assert len({token.tobytes() for token in p["register_tokens"][0]}) == 3

    def test_the_seed_decides(self, model):
        # Compiled otherwise than create_model does: a last bit may differ.
        draw = jax.jit(init_params, static_argnums=0)
        again, other = draw(model.config, jax.random.key(5)), draw(model.config, jax.random.key(6))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), again, model.params)
        assert all(
            (np.asarray(a) != b).mean() > 0.99
            for a, b in zip(*(named(t)["pos_embed"] for t in (other, again)), strict=True)
        )

    def test_preprocessing_follows_the_family_and_the_size(self):
        config = zoo.config_of("vit_s16", image_size=(96, 32))
        assert zoo.preprocessing_of("vit_s16", config).size == 32
        assert zoo.preprocessing_of("vit_s16", config).crop_ratio == 0.875
        assert zoo.preprocessing_of("deit3_vits16", config).crop_ratio == 1.0


def test_sincos_positions_start_with_nothing_for_the_class_token():
    config = ViTConfig(**TINY, patch_size=16, position_init="sincos")
    rows = jax.jit(lambda key: init_params(config, key)["pos_embed"])(jax.random.key(0))
    assert rows.shape == (1, 1 + 2 * 3, 16)
    np.testing.assert_array_equal(rows[0, 0], 0)
    np.testing.assert_array_equal(rows[0, 1], [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4)
