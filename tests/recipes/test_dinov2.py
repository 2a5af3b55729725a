"""One DINOv2 step against a second computation in float64, the layout of crops, and every loss on and off."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regvit_jax import flops, hub
from regvit_jax.config import defaults
from regvit_jax.models.model import Model
from regvit_jax.recipes.dinov2 import DINOv2
from regvit_jax.trees import map_named, named

KEY = jax.random.key(0)
B, G, LOCALS, PATCHES, K = 8, 2, 3, 16, 12


def small(**flat):
    """4 x 4 patches, two groups of four images, three local crops of 2 x 2 patches; crops come from the host."""
    c = defaults("dinov2")
    c.model.name, c.model.image_size, c.model.patch_size, c.model.registers = "vit_ti16", 16, 4, 2
    c.model.width, c.model.depth, c.model.num_heads, c.model.mlp_dim = 16, 2, 2, 32
    c.model.layerscale, c.model.drop_path, c.data.augment_on = 0.5, 0.0, "host"
    c.batch_size, c.groups, c.total_steps, c.dtype = B, G, 10, "float32"
    o = c.dinov2
    o.local_size, o.local_crops, o.prototypes, o.head_hidden, o.bottleneck = 8, LOCALS, K, 24, 6
    o.ibot_prototypes, o.ibot_hidden, o.ibot_bottleneck = 10, 20, 5
    c.update_from_flattened_dict({name.replace("__", "."): value for name, value in flat.items()})
    return c


def recipe(**flat):
    """The recipe of that config; a name without __ is a key of config.dinov2."""
    return DINOv2(small(**{name if "__" in name else f"dinov2__{name}": value for name, value in flat.items()}))


def state(of, seed=0):
    """(params, extras) of random numbers, the student's and the teacher's different."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        centre = float(path.endswith(("scale", "/g")))
        return jnp.asarray(centre + 0.3 * rng.normal(size=leaf.shape), jnp.float32)

    return tuple(map_named(draw, tree) for tree in jax.eval_shape(of.init, KEY, {}))


def batch(of, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, 256, spec.shape).astype(np.uint8) for name, spec in of.input_spec.items()}


# The second computation, image by image in float64.


def head(params, x):
    layers = sorted(name for name in params if name.startswith("fc"))
    for i, name in enumerate(layers):
        x = x @ np.float64(params[name]["kernel"]) + np.float64(params[name]["bias"])
        if i + 1 < len(layers):
            x = np.asarray(jax.nn.gelu(x, approximate=False), np.float64)
    v = np.float64(params["last_layer"]["v"])
    kernel = np.float64(params["last_layer"]["g"]) * v / np.sqrt((v**2).sum(0))
    return x / np.sqrt((x**2).sum(-1, keepdims=True)) @ kernel


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sinkhorn(x, temperature):
    q = np.exp((x - x.max()) / temperature)
    for _ in range(3):
        q = q / q.sum(0, keepdims=True) / q.shape[1]
        q = q / q.sum(1, keepdims=True) / q.shape[0]
    return q * q.shape[0]


def entropy_of(student, target):
    return -(target * np.log(softmax(student / 0.1))).sum(-1)


def koleo(x):
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    nearest = [min(np.linalg.norm(a - b) for j, b in enumerate(x) if j != i) for i, a in enumerate(x)]
    return -np.mean(np.log(nearest))


@functools.cache
def network(vit, run):
    return jax.jit(lambda backbone, images, mask: Model(backbone, vit, run)(images, patch_mask=mask))


def tokens(of, backbone, images, mask=None):
    """(cls (B, D), patches (B, P, D)) of normalised images in the order of the batch."""
    out = network(of.vit, of.run)(backbone, jnp.asarray(images, jnp.float32), mask)
    return np.float64(out.cls), np.float64(out.patches)


def straightforward(of, params, extras, images, mask, temperature):
    """The terms of the loss; mask (2, B, P) by view and image."""
    o, crops = of.options, (of.preprocessing.mean, of.preprocessing.std)
    normal = {name: (x / 255 - np.array(crops[0])) / np.array(crops[1]) for name, x in images.items()}
    teacher = [tokens(of, extras["teacher"]["backbone"], normal["global"][:, v]) for v in range(2)]
    student = [tokens(of, params["backbone"], normal["global"][:, v], mask[v]) for v in range(2)]
    local = [tokens(of, params["backbone"], normal["local"][:, v])[0] for v in range(LOCALS)]

    def balance(x, name):
        if o.centering == "sinkhorn":
            return sinkhorn(x, temperature)
        return softmax((x - np.float64(extras["center"][name])) / temperature)

    raw = head(extras["teacher"]["dino_head"], np.concatenate([cls for cls, _ in teacher]))
    targets = balance(raw, "dino").reshape(2, B, -1)
    logits = [head(params["dino_head"], cls) for cls in [*(cls for cls, _ in student), *local]]
    pairs = [(t, s) for t in range(2) for s in range(2 + LOCALS) if s != t]
    values = {pair: entropy_of(logits[pair[1]], targets[pair[0]]).mean() / len(pairs) for pair in pairs}
    terms = {
        "dino_global": values[0, 1] + values[1, 0],
        "dino_local": sum(value for (_, s), value in values.items() if s > 1),
    }

    which = "ibot_head" if o.separate_head else "dino_head"
    places = [(v, i, p) for v, i, p in np.ndindex(2, B, PATCHES) if mask[v, i, p]]
    said = head(extras["teacher"][which], np.stack([teacher[v][1][i, p] for v, i, p in places]))
    guess = head(params[which], np.stack([student[v][1][i, p] for v, i, p in places]))
    weights = np.array([1 / mask[v, i].sum() for v, i, _ in places])
    terms["ibot"] = (weights * entropy_of(guess, balance(said, "ibot"))).sum() / (2 * B)
    size = B // G
    terms["koleo"] = 0.1 * sum(
        np.mean([koleo(student[v][0][g * size : (g + 1) * size]) for g in range(G)]) for v in range(2)
    )
    return terms, {"dino": raw.mean(0), "ibot": said.mean(0)}


@pytest.mark.parametrize("centering, separate", [("sinkhorn", True), ("softmax", False)])
def test_the_losses_of_a_step_equal_a_second_computation(centering, separate):
    of = recipe(centering=centering, separate_head=separate)
    (params, extras), images = state(of), batch(of)
    step = 7
    prepared = of.augment(images, KEY, step)
    loss, aux = jax.jit(of.loss)(params, extras, prepared, KEY, step)
    # Rows are (group, crop, image): back to (crop, image of the batch).
    mask = np.asarray(prepared["masks"].mask).reshape(G, 2, B // G, PATCHES).swapaxes(0, 1).reshape(2, B, PATCHES)
    assert 0 < mask.any(-1).sum() <= B, "half of the crops, but for one so small that no block was drawn"
    terms, means = straightforward(of, params, extras, images, mask, float(of.temperature(step)))
    for name, value in terms.items():
        np.testing.assert_allclose(aux["metrics"][name], value, rtol=3e-5, err_msg=name)
    np.testing.assert_allclose(loss, sum(terms.values()), rtol=3e-5)
    assert aux["means"].keys() == (set() if centering == "sinkhorn" else {"dino", "ibot"})
    for name, mean in aux["means"].items():
        np.testing.assert_allclose(mean, means[name], rtol=1e-5, atol=1e-6)
    assert 0 < aux["metrics"]["teacher_entropy"] < np.log(K) and 1 <= aux["metrics"]["prototypes_used"] <= K
    assert "registers" not in " ".join(aux["metrics"])


def test_rows_are_ordered_by_group_then_crop_and_come_back_by_view():
    of = recipe()
    x = np.arange(B * 2).reshape(B, 2)  # image i, crop v: 2 i + v
    rows = np.asarray(of.views.rows(x[..., None]))[:, 0]
    assert rows.tolist() == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]
    np.testing.assert_array_equal(np.asarray(of.views.by_view(rows[:, None], 2))[..., 0], x.T)
    alone = DINOv2(small(groups=1))
    as_one_gpu = np.asarray(alone.views.rows(x[..., None]))[:, 0]
    assert as_one_gpu.tolist() == [*range(0, 16, 2), *range(1, 16, 2)]


# Every loss off and on, both kinds of head and centring, with and without registers and local crops.
OPTIONS = {
    "dino_weight": (1.0, 0.0),
    "ibot_weight": (1.0, 0.0),
    "koleo_weight": (0.1, 0.0),
    "local_crops": (2, 0),
    "separate_head": (False, True),
    "centering": ("softmax", "sinkhorn"),
    "model__registers": (0, 4),
}
POSSIBLE = [
    dict(zip(OPTIONS, values, strict=True)) for values in itertools.product(*OPTIONS.values()) if values[0] or values[1]
]


def one_step(of, params, extras, images, key):
    """(loss, aux, gradients, extras after it) as the training step has them."""
    prepared = of.augment(images, key, 0)
    loss, aux, grads = of.grads(params, extras, prepared, key, 0)
    return loss, aux["metrics"], grads, of.after_update(params, extras, aux, 0)


def test_combinations_of_losses_have_a_step():
    """Traced, not run: the parameters that gradients reach, what is carried along, what is logged."""
    some = POSSIBLE[::11]
    pairs = {pair for options in some for pair in itertools.combinations(options.items(), 2)}
    assert pairs >= {pair for options in POSSIBLE for pair in itertools.combinations(options.items(), 2)}
    for options in some:
        of = recipe(**options, model__drop_path=0.5)
        params, extras = jax.eval_shape(of.init, KEY, {})
        loss, metrics, grads, after = jax.eval_shape(
            functools.partial(one_step, of), params, extras, of.input_spec, KEY
        )
        names = {"backbone"} | ({"ibot_head"} if options["ibot_weight"] and options["separate_head"] else set())
        if options["dino_weight"] or not options["separate_head"]:
            names.add("dino_head")
        assert params.keys() == names, options
        assert jax.tree.structure(after) == jax.tree.structure(extras)
        centred = {name for name in ("dino", "ibot") if options[f"{name}_weight"]}
        assert extras["center"].keys() == (centred if options["centering"] == "softmax" else set())
        on = {
            "dino_global": options["dino_weight"],
            "dino_local": options["dino_weight"] and options["local_crops"],
            "ibot": options["ibot_weight"],
            "koleo": options["koleo_weight"],
        }
        assert {name for name, value in on.items() if value} == metrics.keys() & on.keys()
        assert ("register_tokens" in params["backbone"]) == (options["model__registers"] > 0)


@pytest.mark.parametrize(
    "options",
    [
        {"dino_weight": 0.0, "koleo_weight": 0.0, "separate_head": True, "centering": "sinkhorn", "local_crops": 0},
        {"ibot_weight": 0.0, "mask_prob": 0.0, "model__mask_token": False, "local_crops": 1, "drop": "sample"},
    ],
    ids=["iBOT alone", "DINO and KoLeo"],
)
def test_a_step_moves_what_takes_part(options):
    of = recipe(**options, model__drop_path=0.5)
    (params, extras), images = state(of), batch(of)
    loss, metrics, grads, after = jax.jit(functools.partial(one_step, of))(params, extras, images, KEY)
    assert np.isfinite(float(loss))
    # iBOT's class token and DINO's patches feel the other tokens through attention alone, registers always do.
    still = {path for path, grad in named(grads).items() if not np.abs(grad).max() > 0}
    assert still == set()
    m = of.options.momentum
    for path, leaf in named(after["teacher"]).items():
        expected = m * named(extras["teacher"])[path] + (1 - m) * named(params)[path]
        np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-6, err_msg=path)
    for name, center in after["center"].items():
        assert np.abs(center - 0.9 * extras["center"][name]).max() > 0


def test_the_model_that_is_measured_is_the_teachers_backbone():
    of = recipe()
    params, extras = jax.eval_shape(of.init, KEY, {})
    names = (map_named(lambda path, _, item=item: f"{item}/{path}", tree) for item, tree in
             (("params", params), ("extras", extras)))  # fmt: skip
    where = hub.locate(of.eval_model(*names))
    assert (where["item"], where["prefix"]) == ("extras", "teacher/backbone/")
    assert where["config"]["registers"] == 2 and where["config"]["num_classes"] == 0


def test_work_of_one_image():
    """Teacher on 2 global crops, student on both kinds three times over with its dropped rows left out, and heads."""
    of = recipe(model__drop_path=0.5, separate_head=True)
    whole, part = flops.forward_flops(of.vit, 16), flops.forward_flops(of.vit, 8)
    ends = [2 * patches * 48 * 16 for patches in (16, 4)]
    half = [ends[0] + (whole - ends[0]) / 2, ends[1] + (part - ends[1]) / 2]
    dino, ibot = 2 * (16 * 24 + 24 * 24 + 24 * 6 + 6 * K), 2 * (16 * 20 + 20 * 20 + 20 * 5 + 5 * 10)
    masked = sum(int(16 * edge) for edge in (0.2, 0.3, 0.4, 0.5)) / 4  # of 8 crops of a group of 4 images
    heads = (2 + 3 * 5) * dino + 4 * masked * ibot
    assert of.train_flops() == pytest.approx(2 * whole + 3 * (2 * half[0] + LOCALS * half[1]) + heads, rel=1e-9)
    assert recipe(model__drop_path=0.5, drop="sample").train_flops() > recipe(model__drop_path=0.5).train_flops()


def test_the_papers_network_does_the_work_that_is_known():
    """ViT-L/14 with 4 registers, 2 x 224 and 8 x 98 pixels, drop path .3, batch 32: about 50 TFLOP a step."""
    c = defaults("dinov2")
    c.model.name, c.model.image_size, c.batch_size = "dinov2_vitl14_reg4", 224, 32
    c.dinov2.ibot_weight = c.dinov2.mask_prob = 0.0
    assert 32 * DINOv2(c).train_flops() == pytest.approx(50e12, rel=0.02)
    assert DINOv2(c).views.crops.local_size == 98


def test_the_loader_delivers_what_the_step_takes():
    host = recipe()
    sample = {"image": np.full((20, 30, 3), 7, np.uint8)}
    c = small(data__augment_on="device", dinov2__source_size=12)
    for of in (host, DINOv2(c)):
        out = of.transform(sample, np.random.default_rng(0))
        for name, spec in of.input_spec.items():
            assert (B, *np.shape(out[name])) == spec.shape and out[name].dtype == spec.dtype
    assert out["size"].tolist() == [20, 30] and DINOv2(small(data__augment_on="device")).views.source_size == 24


def test_crops_cut_on_the_device_become_rows():
    of = DINOv2(small(data__augment_on="device", dinov2__source_size=16))
    images = np.random.default_rng(0).integers(0, 256, (B, 16, 16, 3), np.uint8)
    out = jax.eval_shape(of.augment, {"image": images, "size": np.full((B, 2), 40, np.int32)}, KEY, 0)
    assert out["global"].shape == (2 * B, 16, 16, 3) and out["local"].shape == (LOCALS * B, 8, 8, 3)
    assert out["masks"].index.shape == (G, sum(int(16 * edge) for edge in (0.2, 0.3, 0.4, 0.5)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dino_weight": 0.0, "ibot_weight": 0.0}, "dino_weight=0.0 must be above 0 where ibot_weight is 0"),
        ({"groups": 8}, "koleo_weight=0.1 must be 0 with groups of 1 image"),
        ({"groups": 8, "koleo_weight": 0.0, "mask_prob": 0.3}, "mask_prob=0.3 .* one of the 2 global crops"),
        ({"mask_ratio": (0.5, 0.1)}, r"mask_ratio=\(0.5, 0.1\) must be"),
        ({"centering": "none"}, "centering='none' must be softmax or sinkhorn"),
        ({"teacher_temp": 0.0}, "teacher_temp=0.0 must be above 0"),
        ({"momentum": 1.5}, r"momentum=1.5 must be in \[0, 1\]"),
        ({"prototypes": 0}, "prototypes must be 1 or more"),
        ({"local_size": 9}, "local_size=9: .* not a multiple of the patch size 4"),
        ({"blur": (0.0, 2.0, 0.5)}, "config.dinov2: multi-crop: blur="),
        ({"model__mask_token": False}, "config.model.mask_token must be True where config.dinov2.mask_prob"),
        ({"data__crop": "rrc"}, "config.data.crop must be 'none'"),
        ({"data__cache": "host"}, "config.data.cache must be 'none' with data.augment_on='host'"),
        ({"accum_steps": 2}, "accum_steps=2 is not possible with recipe 'dinov2': masks, KoLeo"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    common = ("groups", "accum_steps")
    flat = {n if "__" in n or n in common else f"dinov2__{n}": value for n, value in change.items()}
    with pytest.raises(ValueError, match=message):
        DINOv2(small(**flat))
