"""FLOPs against published counts, the peak table, MFU."""

from types import SimpleNamespace

import jax
import pytest

from regvit_jax import flops


def vit(width, depth, mlp_dim, patch_size, **changes):
    fields = dict(activation="gelu", image_size=224, registers=4, class_token=True, num_classes=0)
    return SimpleNamespace(width=width, depth=depth, mlp_dim=mlp_dim, patch_size=patch_size, **(fields | changes))


@pytest.mark.parametrize(
    "config, giga",
    [
        (vit(384, 12, 1536, 16), 9.4),
        (vit(768, 12, 3072, 16), 35.9),
        (vit(1024, 24, 4096, 16), 125.7),
        (vit(1024, 24, 4096, 14), 164.6),
        (vit(1280, 32, 5120, 14), 340),
        # ViT-g of Zhai et al. 2022: width 1408, plain MLP; DINOv2's giant is wider and gated.
        (vit(1408, 40, 6144, 14), 543),
        (vit(1536, 40, 4096, 14, activation="swiglu"), 608.5),
    ],
)
def test_known_models_with_four_registers_at_224(config, giga):
    assert flops.forward_flops(config) / 1e9 == pytest.approx(giga, rel=2e-3)


def test_by_hand_for_one_tiny_block():
    # 2 x 3 patches of 2 x 2 pixels, 1 register, no class token: N = 7, D = 5, hidden 11, 4 classes.
    config = vit(5, 1, 11, 2, image_size=(4, 6), registers=1, class_token=False, num_classes=4)
    block = 2 * 7 * (5 * 15 + 5 * 5 + 5 * 11 + 11 * 5) + 2 * (2 * 7 * 7 * 5)
    assert flops.num_tokens(config) == 7
    assert flops.forward_flops(config) == 2 * 6 * 12 * 5 + block + 2 * 5 * 4
    assert flops.training_flops(config) == 3 * flops.forward_flops(config)


def test_what_stochastic_depth_leaves_out_is_of_the_blocks_alone():
    config = vit(5, 1, 11, 2, image_size=(4, 6), registers=1, class_token=False, num_classes=4)
    ends = 2 * 6 * 12 * 5 + 2 * 5 * 4
    blocks = flops.forward_flops(config) - ends
    assert flops.forward_flops(config, kept=0.25) == blocks / 4 + ends


def test_a_head_by_hand():
    sizes = SimpleNamespace(width=3, hidden=5, bottleneck=2, prototypes=7, layers=3)
    assert flops.head_flops(sizes) == 2 * (3 * 5 + 5 * 5 + 5 * 2 + 2 * 7)
    sizes.layers = 1
    assert flops.head_flops(sizes) == 2 * (3 * 2 + 2 * 7)


def test_a_compiler_counts_the_same_for_an_unrolled_block():
    config = vit(16, 1, 64, 4, image_size=8, registers=0, class_token=False)

    def matmuls(x, image, embed, qkv, proj, fc1, fc2):
        q, k, v = (x @ qkv).reshape(4, 3, 16).transpose(1, 0, 2)
        x = (q @ k.T) @ v @ proj
        return image @ embed, x @ fc1 @ fc2

    shapes = [(4, 16), (4, 48), (48, 16), (16, 48), (16, 16), (16, 64), (64, 16)]
    compiled = jax.jit(matmuls).lower(*(jax.ShapeDtypeStruct(s, "float32") for s in shapes)).compile()
    assert compiled.cost_analysis()["flops"] == pytest.approx(flops.forward_flops(config), rel=1e-3)


def test_another_image_size_only_changes_the_tokens():
    config = vit(384, 12, 1536, 14)
    assert flops.num_tokens(config, 98) == 49 + 5
    assert flops.num_tokens(config, (518, 224)) == 37 * 16 + 5
    assert flops.forward_flops(config, 224) == flops.forward_flops(config)
    assert flops.forward_flops(config, 98) < 54 / 261 * flops.forward_flops(config)


@pytest.mark.parametrize(
    "kind, dtype, tera",
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA H200", "bfloat16", 989),
        ("NVIDIA H200 NVL", "bfloat16", 835),
        ("NVIDIA A100-SXM4-40GB", "bfloat16", 312),
        ("NVIDIA A100-SXM4-40GB", "float32", 156),
        ("NVIDIA A10G", "bfloat16", None),
        ("Tesla V100-SXM2-16GB", "float16", 125),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA L40S", "bfloat16", 362),
        ("Tesla T4", "float32", 8.1),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("TPU v3", "bfloat16", 61.5),
        ("TPU v4", "float32", 275),
        ("TPU v5 lite", "bfloat16", 197),
        ("TPU v5e", "bfloat16", 197),
        ("TPU v5p", "bfloat16", 459),
        ("TPU v5", "bfloat16", 459),
        ("TPU v6 lite", "bfloat16", 918),
        ("cpu", "float32", None),
    ],
)
def test_peaks(kind, dtype, tera):
    assert flops.peak_flops(kind, dtype) == (None if tera is None else tera * 1e12)


def test_a_dtype_without_a_peak_is_refused():
    with pytest.raises(ValueError, match="not for int8"):
        flops.peak_flops("NVIDIA H200", "int8")


def test_mfu_is_the_share_of_all_devices():
    # A chip of 100 FLOP/s, two of them, 5 images a second of 10 FLOPs each.
    assert flops.mfu(10.0, 5.0, 2, 100.0) == 0.25
    assert flops.mfu(10.0, 5.0, 2, None) is None


def test_a_cpu_has_a_measured_peak_and_keeps_it():
    device = jax.devices("cpu")[0]
    assert flops.peak_flops(device) is None
    peak = flops.measured_peak(device, "float32", 128)
    assert 1e7 < peak < 1e14
    assert flops.measured_peak(device, "float32", 128) == peak
